"""Dense and accelerated generation of one prompt and seed, side by side."""

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from dittools.commands.terminal import count_or_share
from dittools.errors import DitToolsError, InputError
from dittools.metrics import scene
from dittools.pipelines.demo import DEMO_DEFAULTS, PROMPTS
from dittools.pipelines.session import FPS, Request
from dittools.plans import Plan
from dittools.studio import html, result
from dittools.studio.context import Context
from dittools.studio.engine import Job, Snapshot
from dittools.studio.generation import Generation
from dittools.studio.runs import Run
from dittools.studio.sizes import number, whole
from dittools.studio.tabs.jobs import controls, follow, optional_number, sentence
from dittools.studio.tabs.method_fields import MethodFields
from dittools.studio.uploads import describe_plan, read_plan

RECOMMENDED, METHOD, PLAN = "Recommended", "A method", "A plan"
SIZES = {
    "height": "Height",
    "width": "Width",
    "frames": "Frames",
    "steps": "Steps",
    "guidance": "Guidance",
}
MOST_LETTERS = 2000  # of a prompt
MOST_REPEATS = 20
COMING = "The clips appear here as they are made, the dense one first."
EMPTY = "Press Generate: the dense clip and the accelerated one appear here, from the same seed."


def build(context: Context) -> None:
    """Put the tab's components on the page."""
    form = _Form(context)
    with gr.Row(elem_classes="dt-halves"):
        with gr.Column(elem_classes="dt-ask"):
            form.ask()
            buttons = controls("Generate", "gen")
            look = gr.Button("Forecast only", size="sm", elem_id="gen-forecast")
        with gr.Column(elem_classes="dt-show"):
            ahead = gr.HTML(elem_id="gen-ahead")
            player = gr.HTML(html.empty(EMPTY), elem_id="gen-player")
            details = gr.HTML(elem_id="gen-details")
        with gr.Column(elem_classes="dt-set"):
            form.settings()
    shown = [*buttons.outputs, ahead, player, details]

    def generate(*values: Any) -> Iterator[list[Any]]:
        yield from _follow(context, form, values, only_forecast=False)

    def forecast(*values: Any) -> Iterator[list[Any]]:
        yield from _follow(context, form, values, only_forecast=True)

    for button, handler in ((buttons.start, generate), (look, forecast)):
        button.click(handler, form.inputs, shown, show_progress="hidden")
    form.prompt.submit(generate, form.inputs, shown, show_progress="hidden")


class _Form:
    """What to generate, and with which plan."""

    def __init__(self, context: Context) -> None:
        """Keep the context; `ask` and `settings` make the fields."""
        self.context = context

    def ask(self) -> None:
        """Put the prompt on the page."""
        self.prompt = gr.Textbox(
            str(DEMO_DEFAULTS["prompt"]), label="Prompt", lines=2, elem_id="gen-prompt"
        )
        gr.Examples([[prompt] for prompt in PROMPTS], self.prompt, label="Examples")
        with gr.Accordion("Words the demo model knows", open=False):
            gr.HTML(_words())

    def settings(self) -> None:
        """Put all other fields on the page."""
        with gr.Row(elem_classes="dt-sizes"):
            self.sizes = {
                key: optional_number(label, DEMO_DEFAULTS[key], min_width=90, elem_id=f"gen-{key}")
                for key, label in SIZES.items()
            }
            self.seed = optional_number(
                "Seed", 0, placeholder="0", min_width=90, elem_id="gen-seed"
            )
        self.source = gr.Radio(
            [RECOMMENDED, METHOD, PLAN], value=RECOMMENDED, label="Accelerate with"
        )
        self.plan = gr.State(None)
        with gr.Column(visible=False) as by_method:
            self.fields = MethodFields()
        with gr.Column(visible=False) as by_plan:
            upload = gr.File(
                label="Plan file (.json, with its .safetensors where it has one)",
                file_count="multiple",
                file_types=[".json", ".safetensors"],
                height=120,
                elem_id="gen-upload",
            )
            note = gr.HTML(html.empty("No plan yet. Upload one, or send one from another tab."))
        self._more()
        self._react([by_method, by_plan], upload, note)

    def _react(self, sections: list[Any], upload: Any, note: Any) -> None:
        context = self.context
        self.source.change(
            lambda chosen: [gr.update(visible=chosen == name) for name in (METHOD, PLAN)],
            self.source,
            sections,
            show_progress="hidden",
            queue=False,
        )
        upload.change(_uploaded, upload, [self.plan, note], show_progress="hidden")
        context.plan.change(
            self._offered, context.plan, [self.source, self.plan, note], show_progress="hidden"
        )
        context.model.change(
            _defaults, context.model, list(self.sizes.values()), show_progress="hidden"
        )

    def _more(self) -> None:
        with gr.Accordion("Schedule, repeats and floors", open=False):
            with gr.Row(elem_classes="dt-sizes"):
                own: dict[str, Any] = {"placeholder": "the plan's own", "min_width": 130}
                self.dense_steps = optional_number(
                    "First steps dense", info="A count, or a share below 1.", **own
                )
                self.dense_layers = optional_number("First layers dense", info="A count.", **own)
                self.repeats = optional_number(
                    "Timed repeats", 1, placeholder="1", info="Medians count.", min_width=130
                )
            self.negative = gr.Textbox(label="Negative prompt", elem_id="gen-negative")
        self.floors = gr.Checkbox(
            True,
            label="Measure the floors afterwards",
            info="Another seed, and random blocks at the same density: what the numbers mean.",
            elem_id="gen-floors",
        )

    @property
    def inputs(self) -> list[Any]:
        """Components in the order `read` takes their values."""
        fixed = [self.context.model, self.prompt, self.negative, self.seed, self.source, self.plan]
        fixed += [self.dense_steps, self.dense_layers, self.repeats, self.floors]
        return [*fixed, *self.sizes.values(), *self.fields.inputs]

    def read(self, values: tuple[Any, ...]) -> Generation:
        """Return the generation that the fields ask for.

        Raises:
            DitToolsError: a field is not usable.
        """
        model, prompt, negative, seed, source, plan, first, layers, repeats, floors = values[:10]
        rest = values[10:]
        sizes = dict(zip(self.sizes, rest[: len(self.sizes)], strict=True))
        if len(prompt) > MOST_LETTERS or len(negative or "") > MOST_LETTERS:
            raise InputError("the prompt is too long", expected=f"at most {MOST_LETTERS} letters")
        method: str | None = None
        params: dict[str, Any] = {}
        if source == METHOD:
            method, params = self.fields.read(rest[len(self.sizes) :])
        if source == PLAN and plan is None:
            raise InputError("no plan is chosen", remedy="upload one, or another way to accelerate")
        request = Request(
            model=str(model or "").strip(),
            prompt=prompt.strip(),
            negative_prompt=(negative or "").strip() or None,
            method=method,
            params=params,
            dense_steps=count_or_share(number("first steps dense", first)),
            dense_layers=whole("first layers dense", layers),
            seed=whole("seed", seed) or 0,
            steps=whole("steps", sizes["steps"]),
            frames=whole("frames", sizes["frames"]),
            height=whole("height", sizes["height"]),
            width=whole("width", sizes["width"]),
            guidance=number("guidance", sizes["guidance"]),
            compare=True,
            repeats=_between("timed repeats", repeats, 1, MOST_REPEATS),
            dtype=self.context.engine.dtype,
            device=self.context.engine.device,
        )
        chosen = plan if source == PLAN else None
        return Generation(request, bool(floors), self.context.runs, chosen)

    def _offered(self, path: str) -> tuple[Any, Any, str]:
        """Take the plan that another tab offers."""
        if not path or not self.context.runs.owns(Path(path)):
            return gr.update(), gr.update(), ""
        try:
            plan = Plan.load(path)
        except DitToolsError as error:
            return gr.update(), gr.update(), html.alert(sentence(error))
        return PLAN, plan, html.notice(f"From another tab. {describe_plan(plan)}.")


def _follow(
    context: Context, form: _Form, values: tuple[Any, ...], *, only_forecast: bool
) -> Iterator[list[Any]]:
    """Yield job, start, stop, status, forecast, player and details until the job is finished."""
    remarks: list[str] = []

    def submit() -> Job:
        wanted = form.read(values)
        remarks.extend(wanted.remarks)
        work = wanted.forecast if only_forecast else wanted
        return context.engine.submit(wanted.settings.prompt, wanted.request.model, work)

    view = _View(only_forecast)
    for outputs, shot, job in follow(context, submit):
        if remarks and outputs[3]:
            outputs[3] += "".join(html.notice(html.sentence(text)) for text in remarks)
        yield [*outputs, *(view.changes(shot, job) if shot else [gr.skip()] * 3)]


class _View:
    """What forecast, player and details show of one job; only changes are sent."""

    def __init__(self, only_forecast: bool) -> None:
        self._only_forecast = only_forecast
        self._seen: dict[str, Any] = {}
        self._is_first = True

    def changes(self, shot: Snapshot, job: Job | None) -> list[Any]:
        """Return values or skips for forecast, player and details."""
        posted, fresh = shot.posted, {}
        for name, value in shot.posted.items():
            if self._seen.get(name) != value:
                fresh[name] = value
        self._seen = dict(posted)
        ahead, player, details = [gr.skip()] * 3
        if self._is_first:
            ahead, self._is_first = "", False
            if not self._only_forecast:
                player, details = html.empty(COMING), ""
        if "forecast" in fresh:
            ahead = result.forecast_card(fresh["forecast"])
        if "clips" in fresh:
            player = result.player(fresh["clips"], "the plan", FPS)
        if "report" in fresh:
            details = result.numbers(fresh["report"], floors_pending=True)
        if shot.is_finished and job is not None and isinstance(job.result, Run):
            player, details = result.view(job.result)
        elif shot.is_finished and not self._only_forecast:
            player = html.empty(EMPTY)  # the files of a run that is not kept are gone
        return [ahead, player, details]


def _uploaded(paths: list[str] | None) -> tuple[Plan | None, str]:
    if not paths:
        return None, html.empty("No plan yet. Upload one, or send one from another tab.")
    try:
        plan = read_plan(paths)
    except DitToolsError as error:
        return None, html.alert(sentence(error))
    return plan, html.notice(f"{describe_plan(plan)}.")


def _defaults(model: str) -> list[Any]:
    """Return the sizes a model starts from; empty leaves the pipeline's own."""
    known: dict[str, Any] = {}
    if model == "demo":
        known = DEMO_DEFAULTS
    return [gr.update(value=f"{known[name]:g}" if name in known else "") for name in SIZES]


def _words() -> str:
    groups = {
        "Colours": scene.OBJECT_COLOURS,
        "Shapes": scene.SHAPES,
        "Motion": scene.MOTIONS,
        "Background": scene.BACKGROUND_COLOURS,
        "Texture": scene.TEXTURES,
    }
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(', '.join(words))}</dd>"
        for name, words in groups.items()
    )
    form = "a COLOUR SHAPE moving MOTION over a COLOUR TEXTURE background"
    return f'<dl class="dt-facts">{rows}<dt>Form</dt><dd>{escape(form)}</dd></dl>'


def _between(name: str, value: Any, least: int, most: int) -> int:
    count = whole(name, value)
    if count is None or not least <= count <= most:
        raise InputError(f"{name} is not usable", expected=f"{least} to {most}", got=str(count))
    return count
