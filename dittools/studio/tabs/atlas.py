"""Layers x heads with what each looks at; a click chooses a method for a head, and makes a plan."""

import base64
import json
import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from dittools.errors import DitToolsError
from dittools.methods import METHODS
from dittools.pipelines.demo import DEFAULT_PROMPT
from dittools.studio import atlas_view, html
from dittools.studio.atlas_edit import SCOPES, AtlasEdit, plan_of, read_atlas
from dittools.studio.context import Context
from dittools.studio.live_search import methods_to_search, run_atlas
from dittools.studio.runs import Run
from dittools.studio.sizes import prompts_of, settings_for
from dittools.studio.tabs.jobs import (
    controls,
    follow,
    offer,
    on_tab_select,
    run_choices,
    sentence,
    size_fields,
)

EMPTY = (
    "No atlas is open. Measure the heads of the model above, or open a finished atlas or search."
)
_CLICK_HEAD = """
element.addEventListener('click', (event) => {
  const cell = event.target.closest('button[data-layer]');
  if (!cell) return;
  trigger('click', {layer: +cell.dataset.layer, head: +cell.dataset.head});
  if (window.innerWidth <= 900) document.getElementById('atlas-head').scrollIntoView();
});
element.addEventListener('keydown', (event) => {
  const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
  const cell = event.target.closest('button[data-layer]'), move = step[event.key];
  if (!cell || !move) return;
  const place = `[data-layer="${+cell.dataset.layer + move[0]}"]` +
    `[data-head="${+cell.dataset.head + move[1]}"]`;
  const next = element.querySelector(place);
  if (next) { event.preventDefault(); next.focus(); }
});
"""
_CLICK_CANDIDATE = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-candidate]');
  if (button) trigger('click', {candidate: +button.dataset.candidate});
});
"""


def build(context: Context) -> None:
    """Put the tab's components on the page."""
    edit, opened = gr.State(None), gr.State((0, 0))
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            prompt = gr.Textbox(
                DEFAULT_PROMPT, label="Prompt to look at", lines=1, elem_id="atlas-prompt"
            )
        with gr.Column(scale=2, min_width=300):
            saved = gr.Dropdown(
                run_choices(context, "atlas", "search"),
                value=None,
                label="Or open a finished atlas or search",
                elem_id="atlas-saved",
            )
    methods = gr.CheckboxGroup(
        methods_to_search(METHODS),
        value=["gna", "radial", "sparse_vdit"],
        label="Candidates",
        info="Each is tried at several densities on every head; none chosen tries all.",
        elem_id="atlas-methods",
    )
    sizes = size_fields("atlas")
    job = controls("Measure the heads", "atlas")
    blank = gr.HTML(html.empty(EMPTY), elem_id="atlas-empty")
    with gr.Column(visible=False) as panel:
        with gr.Row():
            with gr.Column(min_width=260):
                part = gr.Dropdown([], label="Steps shown", interactive=True, elem_id="atlas-range")
            with gr.Column(min_width=300, scale=2):
                scope = gr.Radio(list(SCOPES), value=SCOPES[0], label="A choice acts on")
                every = gr.Checkbox(True, label="in all steps", elem_id="atlas-every")
        with gr.Row(elem_classes="dt-split"):
            grid = gr.HTML(js_on_load=_CLICK_HEAD, elem_id="atlas-grid")
            head = gr.HTML(js_on_load=_CLICK_CANDIDATE, elem_id="atlas-head")
        summary = gr.HTML(elem_id="atlas-summary")
        with gr.Row():
            use = gr.Button("Use in the next generation", elem_id="atlas-use")
            undo = gr.Button("Undo all changes", interactive=False, elem_id="atlas-undo")
        said = gr.HTML(elem_id="atlas-said")
    view = [grid, head, summary, undo, said]
    page = [blank, panel, edit, opened, part, *view]

    def measure(model: str, text: str, chosen: list[str], *size: Any) -> Iterator[Any]:
        yield from _measure(context, model, text, chosen, sizes.read(size))

    def click_head(
        now: AtlasEdit | None, shown: int, event: gr.EventData
    ) -> tuple[tuple[int, int], Any, Any]:
        place = _place(now, shown, event)
        return place, *(_view(now, place, shown)[:2] if now else (gr.skip(), gr.skip()))

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    job.start.click(
        measure,
        [context.model, prompt, methods, *sizes.inputs],
        [*job.outputs, *page, saved],
        **quiet,
    )
    saved.input(lambda run: _open(context, run), saved, page, **quiet)
    part.input(_show, [edit, opened, part], view, **quiet)
    grid.click(click_head, [edit, part], [opened, grid, head], **quiet)
    head.click(_choose, [edit, opened, part, scope, every], [edit, *view], **quiet)
    undo.click(_undo, [edit, opened, part], [edit, *view], **quiet)
    use.click(lambda now: _use(context, now), edit, [context.plan, said], **quiet)
    on_tab_select(lambda: gr.update(choices=run_choices(context, "atlas", "search")), None, saved)


def _measure(
    context: Context, model: str, text: str, chosen: list[str], size: dict[str, Any]
) -> Iterator[Any]:
    def submit() -> Any:
        prompts = prompts_of(text)
        settings = settings_for(model, prompts[0], **size)
        return context.engine.submit(
            "atlas",
            model,
            lambda pipe, job: run_atlas(
                prompts, tuple(chosen), settings, model, context.runs, pipe, job
            ),
        )

    nothing = [gr.skip()] * 11
    for values, shot, job in follow(context, submit):
        if shot is not None and job is not None and shot.state == "done":
            choices = run_choices(context, "atlas", "search")
            listed = gr.update(choices=choices, value=job.result.id)
            yield [*values, *_opened(job.result), listed]
        else:
            yield [*values, *nothing]


def _open(context: Context, run_id: str | None) -> list[Any]:
    """Return the page of a finished run."""
    try:
        return _opened(context.runs.open(run_id or ""))
    except DitToolsError as error:
        return _closed(html.alert(sentence(error)))


def _opened(run: Run) -> list[Any]:
    path = run.path("atlas")
    if path is None:
        return _closed(html.alert("This run holds no atlas."))
    edit = AtlasEdit.start(read_atlas(path), run.id)
    choices = [(atlas_view.range_name(edit, part), part) for part in edit.parts]
    first = edit.parts[0]
    return [
        gr.update(visible=False),
        gr.update(visible=True),
        edit,
        (0, 0),
        gr.update(choices=choices, value=first),
        *_view(edit, (0, 0), first),
    ]


def _closed(said: str) -> list[Any]:
    """Return the page without an atlas, and why."""
    hidden = gr.update(visible=False)
    return [gr.update(value=said, visible=True), hidden, None, (0, 0), *[gr.skip()] * 6]


def _show(edit: AtlasEdit | None, opened: tuple[int, int], part: int) -> list[Any]:
    return [gr.skip()] * 5 if edit is None else _view(edit, opened, part)


def _view(edit: AtlasEdit, opened: tuple[int, int], part: int, said: str = "") -> list[Any]:
    """Return grid, head, summary, the undo button and the remark."""
    return [
        atlas_view.grid(edit, part, opened),
        atlas_view.head(edit, part, opened),
        summary_of(edit),
        gr.update(interactive=bool(edit.edited)),
        said,
    ]


def _place(edit: AtlasEdit | None, part: int, event: gr.EventData) -> tuple[int, int]:
    """Return the head a click names, (0, 0) when it names none; clicks come from the browser."""
    data = getattr(event, "_data", None) or {}
    layer, head = data.get("layer"), data.get("head")
    if edit is None or type(layer) is not int or type(head) is not int:
        return 0, 0
    try:
        edit.index(layer, head, part)
    except DitToolsError:
        return 0, 0
    return layer, head


def _choose(
    edit: AtlasEdit | None,
    opened: tuple[int, int],
    part: int,
    scope: str,
    every: bool,
    event: gr.EventData,
) -> list[Any]:
    candidate = (getattr(event, "_data", None) or {}).get("candidate")
    if edit is None or type(candidate) is not int:
        return [gr.skip()] * 6
    try:
        changed = edit.with_choice(edit.reach(*opened, part, scope, every), candidate)
    except DitToolsError as error:
        return [edit, *_view(edit, opened, part, html.alert(sentence(error)))]
    return [changed, *_view(changed, opened, part)]


def _undo(edit: AtlasEdit | None, opened: tuple[int, int], part: int) -> list[Any]:
    if edit is None:
        return [gr.skip()] * 6
    fresh = edit.restored(sorted(edit.edited))
    return [fresh, *_view(fresh, opened, part)]


def summary_of(edit: AtlasEdit) -> str:
    """Return density, changes and the plan itself, with a link that saves it."""
    try:
        text = plan_text(edit)
    except DitToolsError as error:
        return html.notice(sentence(error))
    rules, changed = len(json.loads(text)["rules"]), len(edit.edited)
    link = base64.b64encode(text.encode()).decode("ascii")
    return (
        '<div class="dt-plan"><p><b>Plan</b>: predicted density '
        f'<output id="atlas-density">{edit.density():.3f}</output>, {_count(rules, "rule")}, '
        f"{_count(changed, 'choice')} changed. "
        f'<a class="dt-button" id="atlas-download" download="plan.json" '
        f'href="data:application/json;base64,{link}">Download the plan</a></p>'
        f"<details><summary>The plan as a file</summary><pre tabindex=0>{escape(text)}</pre>"
        "</details></div>"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def plan_text(edit: AtlasEdit) -> str:
    """Return the plan file of the choices."""
    with tempfile.TemporaryDirectory() as folder:
        return plan_of(edit).save(Path(folder) / "plan.json").read_text(encoding="utf-8")


def _use(context: Context, edit: AtlasEdit | None) -> tuple[Any, str]:
    if edit is None:
        return gr.skip(), html.alert("No atlas is open.")
    try:
        return offer(context, plan_of(edit))
    except DitToolsError as error:
        return gr.skip(), html.alert(sentence(error))
