"""Dense and accelerated generation of one prompt."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from dittools.errors import DitToolsError
from dittools.pipelines.generate import Settings, generate
from dittools.studio import html
from dittools.studio.context import Context
from dittools.studio.engine import Job


def build(context: Context) -> None:
    """Put the tab's components on the page."""
    prompt = gr.Textbox("a red circle moving left", label="Prompt")
    start = gr.Button("Generate", variant="primary")
    status = gr.HTML()

    def run(model: str, text: str) -> Iterator[str]:
        def work(pipe: Any, job: Job) -> None:
            settings = Settings(text, steps=4, frames=4, height=64, width=64)
            generate(pipe, settings, lambda done, total: job("dense", done, total))

        try:
            job = context.engine.submit(text, model, work)
        except DitToolsError as error:
            yield html.alert(str(error))
            return
        for shot in context.engine.watch(job):
            yield html.progress(shot) or html.notice("done")

    start.click(run, [context.model, prompt], status)
