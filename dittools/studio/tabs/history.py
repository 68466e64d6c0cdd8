"""The runs on disk: they survive a restart, and open as they were."""

import json
from html import escape
from typing import Any

import gradio as gr

from dittools.errors import DitToolsError
from dittools.studio import generation, html, result
from dittools.studio.context import Context
from dittools.studio.runs import Run
from dittools.studio.tabs.jobs import on_tab_select, run_choices, sentence

KINDS = ("generate", "search", "atlas", "vote", "bench")
START = html.empty(
    "Choose a run above. Whatever is generated, searched or measured is listed there, also after "
    "a restart."
)


def build(context: Context) -> None:
    """Put the tab's components on the page."""
    with gr.Row(elem_classes="dt-pick"):
        picked = gr.Dropdown(
            run_choices(context, *KINDS), value=None, label="Run", elem_id="history-run", scale=5
        )
        again = gr.Button("Refresh", scale=1, min_width=110, elem_id="history-refresh")
    heading = gr.HTML(START, elem_id="history-heading")
    player = gr.HTML(elem_id="history-player")
    details = gr.HTML(elem_id="history-details")

    def refresh() -> Any:
        # never the value: this may arrive after the next choice was made
        return gr.update(choices=run_choices(context, *KINDS))

    def show(run_id: str | None) -> tuple[str, str, str]:
        if not run_id:
            return START, "", ""
        try:
            run = context.runs.open(run_id)
            return _heading(context, run), *_view(run)
        except DitToolsError as error:
            return html.alert(sentence(error)), "", ""

    again.click(refresh, None, picked, show_progress="hidden")
    on_tab_select(refresh, None, picked)
    picked.change(show, picked, [heading, player, details], show_progress="hidden")


def _heading(context: Context, run: Run) -> str:
    when = run.created[:16].replace("T", " ")
    problems = context.runs.verify(run)
    damaged = html.alert(f"This run is not whole: {'; '.join(problems)}.") if problems else ""
    return f'<h2 class="dt-title">{escape(run.title)}</h2><p>{when} UTC, {run.kind}</p>{damaged}'


def _view(run: Run) -> tuple[str, str]:
    """Return player and details; runs of other kinds show their facts and files."""
    try:
        if run.kind == generation.KIND:
            return result.view(run)
    except (KeyError, TypeError, ValueError) as error:
        return "", html.alert(f"This run cannot be shown: its run.json lacks {error}.")
    rows = [(name, _short(value)) for name, value in run.facts.items()]
    return "", html.table(("fact", "value"), rows) + result.downloads(run)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else text[:300] + " ..."
