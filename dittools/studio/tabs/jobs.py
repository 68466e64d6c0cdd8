"""What the tabs that run long jobs share: following a job, its buttons, and the size fields."""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from dittools.errors import DitToolsError
from dittools.pipelines.output import atomic
from dittools.plans import Plan
from dittools.studio import html
from dittools.studio.context import Context
from dittools.studio.engine import Job, Snapshot

PLANS = "plans"  # below the run folder: plans offered to the next generation


@dataclass(frozen=True)
class Controls:
    """Start, stop and status of one kind of job on one page; `job` is the page's own."""

    job: Any
    start: Any
    stop: Any
    status: Any

    @property
    def outputs(self) -> list[Any]:
        """Components that `follow` fills, in its order."""
        return [self.job, self.start, self.stop, self.status]


def controls(words: str, name: str) -> Controls:
    """Put a start button, a stop button and a status line on the page.

    Args:
        words: on the start button.
        name: prefix of their element ids.
    """
    job = gr.State(None)
    with gr.Row():
        start = gr.Button(words, variant="primary", elem_id=f"{name}-start")
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id=f"{name}-stop")
    status = gr.HTML(elem_id=f"{name}-status")
    stop.click(_stop, job, [stop, status], queue=False, show_progress="hidden")
    return Controls(job, start, stop, status)


def _stop(job: Job | None) -> tuple[Any, str]:
    if job is not None:
        job.cancel()
    return gr.update(interactive=False), html.notice("Stopping before the next step.")


def follow(
    context: Context, submit: Callable[[], Job]
) -> Iterator[tuple[list[Any], Snapshot | None, Job | None]]:
    """Yield (values for `Controls.outputs`, snapshot, job) until the job is finished.

    An order that is refused yields once, with its reason and no snapshot.
    """
    try:
        job = submit()
    except DitToolsError as error:
        yield [None, *idle(), html.alert(sentence(error))], None, None
        return
    for shot in context.engine.watch(job):
        if shot.is_finished:
            yield [None, *idle(), html.progress(shot)], shot, job
        else:
            stop = gr.update(interactive=not job.is_stopping)
            yield [job, gr.update(interactive=False), stop, html.progress(shot)], shot, job


def idle() -> list[Any]:
    """Return the buttons as they are while nothing runs."""
    return [gr.update(interactive=True), gr.update(interactive=False)]


def sentence(error: DitToolsError) -> str:
    """Return an error as a sentence that starts and ends like one."""
    return html.sentence(str(error))


@dataclass(frozen=True)
class SizeFields:
    """Number fields; an empty one takes the model's default."""

    fields: dict[str, Any]

    @property
    def inputs(self) -> list[Any]:
        """Components in the order `read` takes their values."""
        return list(self.fields.values())

    def read(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """Return keyword arguments of `sizes.settings_for`."""
        return dict(zip(self.fields, values, strict=True))


def optional_number(label: str, value: float | None = None, **options: Any) -> Any:
    """Put a field on the page that holds a number or nothing; `sizes.number` reads it.

    It is a text field because gr.Number turns an empty value into 0 when it appears.
    """
    text = "" if value is None else f"{value:g}"
    known = {"placeholder": "model's own", "max_lines": 1, **options}
    return gr.Textbox(text, label=label, elem_classes="dt-number", **known)


def size_fields(name: str) -> SizeFields:
    """Put the fields for size, steps and seed on the page, folded away."""
    with gr.Accordion("Size, steps and seed", open=False, elem_id=f"{name}-size"), gr.Row():
        fields = {
            key: optional_number(
                label, 0 if key == "seed" else None, min_width=110, elem_id=f"{name}-{key}"
            )
            for key, label in (
                ("seed", "Seed"),
                ("steps", "Steps"),
                ("frames", "Frames"),
                ("height", "Height, pixels"),
                ("width", "Width, pixels"),
            )
        }
    return SizeFields(fields)


def offer(context: Context, plan: Plan) -> tuple[str, str]:
    """Return (path for `Context.plan`, what to tell the person).

    Each offer is a file of its own, so that later edits do not change what was offered and the
    same plan can be offered twice.

    Raises:
        PlanError, InputError: the file cannot be written.
    """
    path = context.runs.root / PLANS / secrets.token_hex(8) / "plan.json"
    with atomic(path) as room:  # makes the folder, or says why it cannot
        room.write_bytes(b"")
    words = "The next generation uses this plan. Open the Generate tab to run it."
    return str(plan.save(path)), html.notice(words)


def on_tab_select(handler: Callable[..., Any], inputs: Any, outputs: Any) -> None:
    """Run a handler whenever the tab being built is opened, for instance to list new runs."""
    tab = gr.context.Context.block
    if isinstance(tab, gr.Tab):
        tab.select(handler, inputs, outputs, show_progress="hidden")


def run_choices(context: Context, *kinds: str) -> list[tuple[str, str]]:
    """Return (what a person reads, run id) of the finished runs of some kinds, newest first."""
    return [
        (f"{run.created[:16].replace('T', ' ')} · {run.kind} · {run.title[:80]}", run.id)
        for run in context.runs.entries()
        if run.kind in kinds
    ]
