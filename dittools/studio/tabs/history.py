"""The runs on disk."""

import gradio as gr

from dittools.studio import html
from dittools.studio.context import Context


def build(context: Context) -> None:
    """Put the tab's components on the page."""
    shown = gr.HTML(html.empty("No run yet. Generate a clip and it will be kept here."))
    again = gr.Button("Refresh")

    def rows() -> str:
        found = [(run.created, run.kind, run.title) for run in context.runs.entries()]
        return html.table(("when", "kind", "what"), found)

    again.click(rows, None, shown)
