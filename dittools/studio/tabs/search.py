"""Say what you want; watch the frontier grow; take the plan."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from dittools.errors import DitToolsError
from dittools.methods import METHODS
from dittools.pipelines.demo import PROMPTS
from dittools.plans import Plan
from dittools.studio import html
from dittools.studio.context import Context
from dittools.studio.engine import Snapshot
from dittools.studio.live_search import (
    TARGETS,
    SearchOrder,
    methods_to_search,
    read_frontier,
    run_search,
)
from dittools.studio.plots import frontier_figure
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

DEFAULTS = {"density": 0.4, "PSNR": 28.0, "speed-up": 1.3}
BUDGETS = {
    "quick: a few minutes of the model's time": "quick",
    "standard": "standard",
    "thorough: surest, and slow": "thorough",
}
EMPTY = (
    "No search is open. Say what you want and press Search: the plot fills as plans are measured. "
    "A search that is stopped goes on where it was when the same one is started again."
)
_PARTS = ("curve", "singles", "trials")


def build(context: Context) -> None:
    """Put the tab's components on the page."""
    with gr.Row():
        target = gr.Radio(list(TARGETS), value="density", label="I want", elem_id="search-target")
        value = gr.Number(
            DEFAULTS["density"], label=_unit("density"), minimum=0, elem_id="search-value"
        )
        budget = gr.Dropdown(
            list(BUDGETS.items()), value="quick", label="Effort", elem_id="search-budget"
        )
    prompts = gr.Textbox(
        "\n".join(PROMPTS),
        label="Prompts, one a line",
        info="Every second one is held out and judges the plan.",
        lines=4,
        max_lines=12,
        elem_id="search-prompts",
    )
    methods = gr.CheckboxGroup(
        methods_to_search(METHODS),
        value=["gna", "radial", "sparse_vdit"],
        label="Methods",
        info="A plan may use all that are chosen; none chosen takes all.",
        elem_id="search-methods",
    )
    sizes = size_fields("search")
    job = controls("Search", "search")
    blank = gr.HTML(html.empty(EMPTY), elem_id="search-empty")
    saved = gr.Dropdown(
        run_choices(context, "search"),
        value=None,
        label="Or open a finished search",
        elem_id="search-saved",
    )
    with gr.Column(visible=False) as panel:
        plot = gr.Plot(label="Speed and quality", elem_id="search-plot")
        outcome = gr.HTML(elem_id="search-outcome")
        with gr.Row():
            plan = gr.DownloadButton("Download plan", interactive=False, elem_id="search-plan")
            tensors = gr.DownloadButton("Download its tensors", visible=False)
            report = gr.DownloadButton(
                "Download report", interactive=False, elem_id="search-report"
            )
            use = gr.Button("Use in the next generation", interactive=False, elem_id="search-use")
        said = gr.HTML(elem_id="search-said")
    page = [blank, panel, plot, outcome, plan, tensors, report, use, said]

    def start(
        model: str, what: str, goal: float, effort: str, text: str, chosen: list[str], *size: Any
    ) -> Iterator[Any]:
        def submit() -> Any:
            order = order_of(model, what, goal, effort, text, chosen, sizes.read(size))
            return context.engine.submit(
                "search",
                model,
                lambda pipe, job: run_search(order, model, context.runs, pipe, job),
            )

        yield from _run(context, submit, (what, goal))

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    job.start.click(
        start,
        [context.model, target, value, budget, prompts, methods, *sizes.inputs],
        [*job.outputs, *page, saved],
        **quiet,
    )
    target.input(
        lambda what: gr.update(value=DEFAULTS[what], label=_unit(what)), target, value, **quiet
    )
    saved.input(lambda run: _open(context, run), saved, page, **quiet)
    use.click(lambda run: _use(context, run), saved, [context.plan, said], **quiet)
    on_tab_select(lambda: gr.update(choices=run_choices(context, "search")), None, saved)


def order_of(
    model: str,
    target: str,
    value: float | None,
    budget: str,
    text: str,
    methods: list[str],
    size: dict[str, Any],
) -> SearchOrder:
    """Return the checked order of the fields.

    Raises:
        InputError: a field holds something no search can use.
    """
    prompts = prompts_of(text)
    settings = [settings_for(model, prompt, **size) for prompt in prompts]  # every one is checked
    return SearchOrder(prompts, target, value or 0.0, tuple(methods), budget, settings[0])


def _run(context: Context, submit: Any, target: tuple[str, float]) -> Iterator[Any]:
    shown: tuple[int, ...] = ()
    for values, shot, job in follow(context, submit):
        if shot is None or job is None:
            yield [*values, *[gr.skip()] * 10]
        elif shot.state == "done":
            listed = gr.update(choices=run_choices(context, "search"), value=job.result.id)
            yield [*values, *_opened(job.result), listed]
        else:
            known = tuple(len(shot.posted.get(name, ())) for name in _PARTS)
            yield [*values, *_growing(shot, known != shown, target), gr.skip()]
            shown = known


def _growing(shot: Snapshot, is_new: bool, target: tuple[str, float]) -> list[Any]:
    """Return the page while a search runs; the plot is drawn anew only when it has new points."""
    off = gr.update(interactive=False)
    rest = [off, gr.update(visible=False), off, off, ""]
    points = {name: shot.posted[name] for name in _PARTS if name in shot.posted}
    if not points:
        words = "The plot appears once the candidates are measured and weighed."
        waiting = html.empty(_estimate(shot.posted.get("estimate")) + words)
        return [gr.update(value=waiting, visible=True), gr.update(visible=False), *[gr.skip()] * 7]
    figure = frontier_figure(points, target) if is_new else gr.skip()
    return [gr.update(visible=False), gr.update(visible=True), figure, _trials(points), *rest]


def _estimate(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    count = sum(found["generations"].values())
    return (
        f"{found['candidates']} candidates, at most {count} generations, about "
        f"{html.duration(found['seconds'])} and {found['memory_bytes'] / 2**20:.0f} MiB. "
    )


def _trials(points: dict[str, Any]) -> str:
    """Return the plans generated so far, as a table."""
    rows = [
        (f"{number}", f"{t['density']:.3f}", f"{t['psnr_db']:.2f}", f"{t['predicted_db']:.2f}")
        for number, t in enumerate(points.get("trials", []), 1)
    ]
    headings = ("plan", "density", "PSNR dB, held out", "predicted")
    return html.table(headings, rows) if rows else ""


def _open(context: Context, run_id: str | None) -> list[Any]:
    try:
        return _opened(context.runs.open(run_id or ""))
    except DitToolsError as error:
        alert = gr.update(value=html.alert(sentence(error)), visible=True)
        return [alert, gr.update(visible=False), *[gr.skip()] * 7]


def _opened(run: Run) -> list[Any]:
    """Return the page of a finished search."""
    frontier, plan, report = (run.path(name) for name in ("frontier", "plan", "report"))
    if frontier is None or plan is None or report is None:
        return [
            gr.update(value=html.alert("This run holds no search."), visible=True),
            gr.update(visible=False),
            *[gr.skip()] * 7,
        ]
    points, facts = read_frontier(frontier), run.facts
    side = run.path("tensors")
    return [
        gr.update(visible=False),
        gr.update(visible=True),
        frontier_figure(points, (facts["target"], facts["value"])),
        _verdict(facts) + _trials(points),
        gr.update(value=str(plan), interactive=True),
        gr.update(value=None if side is None else str(side), visible=side is not None),
        gr.update(value=str(report), interactive=True),
        gr.update(interactive=True),
        "",
    ]


def _verdict(facts: dict[str, Any]) -> str:
    chosen, state = facts["chosen"], "met" if facts["met"] else "not met"
    return html.notice(
        f"Target {facts['target']} {facts['value']:g} {state}, {facts['remark']}. The plan has "
        f"density {chosen['density']:.3f} and {chosen['psnr_db']:.2f} dB on held-out prompts "
        f"({chosen['predicted_db']:.2f} dB were predicted)."
    )


def _use(context: Context, run_id: str | None) -> tuple[Any, str]:
    try:
        plan = context.runs.open(run_id or "").path("plan")
        if plan is None:
            return gr.skip(), html.alert("This run holds no plan.")
        return offer(context, Plan.load(plan))
    except DitToolsError as error:
        return gr.skip(), html.alert(sentence(error))


def _unit(target: str) -> str:
    words = TARGETS[target][1]
    return words[:1].upper() + words[1:]
