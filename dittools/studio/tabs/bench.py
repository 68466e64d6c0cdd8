"""Dense and accelerated runs in turn, timed part by part."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from dittools.errors import DitToolsError
from dittools.pipelines.demo import DEFAULT_PROMPT
from dittools.studio import html
from dittools.studio.context import Context
from dittools.studio.latency_job import (
    BenchOrder,
    methods_to_measure,
    results_of,
    run_bench,
    shown_table,
)
from dittools.studio.plots import parts_figure, speed_figure
from dittools.studio.runs import Run
from dittools.studio.sizes import prompts_of, settings_for
from dittools.studio.tabs.jobs import (
    controls,
    follow,
    on_tab_select,
    run_choices,
    sentence,
    size_fields,
)

EMPTY = "Nothing is measured yet. Choose methods and press Measure, or open a finished benchmark."
NOTE = (
    "Milliseconds are medians, with the 20th to 80th percentile. Bound is Amdahl's: the most that "
    "is possible at the measured density, and if attention took no time at all. Limit is the least "
    "time for the counted work at the rates measured on this machine."
)


def build(context: Context) -> None:
    """Put the tab's components on the page."""
    prompt = gr.Textbox(
        DEFAULT_PROMPT, label="Prompt", lines=1, max_lines=4, elem_id="bench-prompt"
    )
    methods = gr.CheckboxGroup(
        methods_to_measure(),
        value=["gna"],
        label="Measure beside dense",
        elem_id="bench-methods",
    )
    with gr.Row():
        plan = gr.Checkbox(
            False,
            label="and the plan for the next generation",
            info="the one chosen in another tab, if there is one",
            min_width=240,
            elem_id="bench-with-plan",
        )
        floors = gr.Checkbox(
            False,
            label="and the floors",
            info="another seed, random blocks",
            min_width=240,
            elem_id="bench-floors",
        )
        repeats = gr.Number(
            3, label="Repeats", precision=0, minimum=1, min_width=110, elem_id="bench-repeats"
        )
        warm_up = gr.Number(
            1, label="Warm-up", precision=0, minimum=0, min_width=110, elem_id="bench-warm-up"
        )
    sizes = size_fields("bench")
    job = controls("Measure", "bench")
    blank = gr.HTML(html.empty(EMPTY), elem_id="bench-empty")
    saved = gr.Dropdown(
        run_choices(context, "bench"),
        value=None,
        label="Or open a finished benchmark",
        elem_id="bench-saved",
    )
    with gr.Column(visible=False) as panel:
        table = gr.HTML(elem_id="bench-table")
        with gr.Row():
            parts = gr.Plot(label="Where the time goes", elem_id="bench-parts")
            speed = gr.Plot(label="Speed and quality", elem_id="bench-speed")
        with gr.Row():
            as_json = gr.DownloadButton("Download JSON", elem_id="bench-json")
            as_csv = gr.DownloadButton("Download CSV", elem_id="bench-csv")
    page = [blank, panel, table, parts, speed, as_json, as_csv]

    def start(
        model: str,
        text: str,
        chosen: list[str],
        with_plan: bool,
        offered: str,
        with_floors: bool,
        count: float,
        uncounted: float,
        *size: Any,
    ) -> Iterator[Any]:
        def submit() -> Any:
            order = BenchOrder(
                prompts_of(text)[0],
                tuple(chosen),
                _offered(with_plan, offered),
                int(count or 0),
                int(uncounted or 0),
                settings_for(model, prompts_of(text)[0], **sizes.read(size)),
                with_floors,
            )
            order.targets()  # a damaged plan is named before the queue
            return context.engine.submit(
                "benchmark",
                model,
                lambda pipe, job: run_bench(order, model, context.runs, pipe, job),
            )

        yield from _run(context, submit)

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    job.start.click(
        start,
        [
            *(context.model, prompt, methods, plan, context.plan, floors, repeats, warm_up),
            *sizes.inputs,
        ],
        [*job.outputs, *page, saved],
        **quiet,
    )
    saved.input(lambda run: _open(context, run), saved, page, **quiet)
    on_tab_select(lambda: gr.update(choices=run_choices(context, "bench")), None, saved)


def _offered(wanted: bool, plan: str) -> str:
    from dittools.errors import InputError

    if wanted and not plan:
        raise InputError(
            "no plan is chosen for the next generation", remedy="one from the atlas or a search"
        )
    return plan if wanted else ""


def _run(context: Context, submit: Any) -> Iterator[Any]:
    for values, shot, job in follow(context, submit):
        if shot is not None and job is not None and shot.state == "done":
            listed = gr.update(choices=run_choices(context, "bench"), value=job.result.id)
            yield [*values, *_opened(job.result), listed]
        else:
            yield [*values, *[gr.skip()] * 8]


def _open(context: Context, run_id: str | None) -> list[Any]:
    try:
        return _opened(context.runs.open(run_id or ""))
    except DitToolsError as error:
        alert = gr.update(value=html.alert(sentence(error)), visible=True)
        return [alert, gr.update(visible=False), *[gr.skip()] * 5]


def _opened(run: Run) -> list[Any]:
    """Return the page of a finished benchmark."""
    results = results_of(run)
    headings, rows = shown_table(results)
    return [
        gr.update(visible=False),
        gr.update(visible=True),
        html.table(headings, rows) + _floors(results) + f'<p class="dt-quiet">{NOTE}</p>',
        parts_figure(results["cases"]),
        speed_figure(results["cases"]),
        str(run.path("results")),
        str(run.path("table")),
    ]


def _floors(results: dict[str, Any]) -> str:
    rows = [
        (name, f"{floor['psnr_db']:.1f}", f"{floor['ssim']:.3f}")
        for name, floor in results.get("floors", {}).items()
    ]
    return html.table(("floor", "PSNR dB", "SSIM"), rows) if rows else ""
