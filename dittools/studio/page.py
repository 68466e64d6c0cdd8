"""The page around the tabs: model field, theme, and how it is served."""

import os
import sys
from importlib.resources import files
from typing import Any

import gradio as gr

import dittools
from dittools.errors import InputError
from dittools.kernels import native
from dittools.studio.context import Context
from dittools.studio.engine import Engine, Job
from dittools.studio.runs import RunStore
from dittools.studio.settings import StudioSettings
from dittools.studio.tabs import TABS

UPLOAD_LIMIT = "64mb"  # of one uploaded file; what reads it sets a lower limit
KEPT_UPLOADS = (3600, 86400)  # seconds: looked at every hour, gone after a day
MOST_LISTENERS = 32  # handlers that may wait for the engine at once; the engine runs one job


def build(settings: StudioSettings, engine: Engine | None = None) -> gr.Blocks:
    """Return the studio's page, not yet served.

    Args:
        settings: how it is started.
        engine: to run jobs on; None makes one.
    Raises:
        InputError: the run folder cannot be made.
    """
    runs = RunStore(settings.runs)
    engine = engine or Engine(settings.device, settings.dtype)
    with gr.Blocks(
        title="dittools studio",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=KEPT_UPLOADS,
    ) as page:
        with gr.Row(elem_id="dt-head"):
            gr.HTML(_header(engine), elem_id="dt-brand")
            model = gr.Dropdown(
                ["demo"],
                value="demo",
                label="Model",
                info="demo, a local diffusers folder, or a hub id",
                allow_custom_value=True,
                elem_id="dt-model",
                scale=0,
                min_width=280,
            )
        context = Context(engine, runs, settings, model, gr.State(""))
        with gr.Tabs(elem_id="dt-tabs"):
            for name, tab in TABS:
                with gr.Tab(name, id=name.lower()):
                    tab(context)
    page.queue(default_concurrency_limit=MOST_LISTENERS, max_size=4 * MOST_LISTENERS)
    return page


def launch(
    settings: StudioSettings, engine: Engine | None = None, *, block: bool = True
) -> gr.Blocks:
    """Serve the studio and return its page.

    Args:
        settings: how it is started.
        engine: to run jobs on; None makes one and loads the embedded model into it.
        block: stay until the server is stopped; otherwise `page.close()` stops it.
    Raises:
        InputError: the run folder cannot be made, or the address cannot be listened on.
    """
    root = RunStore(settings.runs).root
    # uploads and caches stay below the run folder, the only one that is served
    os.environ["GRADIO_TEMP_DIR"] = str(root / ".uploads")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if engine is None:
        engine = Engine(settings.device, settings.dtype)
        engine.submit("getting ready", "demo", _get_ready)
    page = build(settings, engine)
    try:
        page.launch(
            server_name=settings.host,
            server_port=settings.port or None,
            share=settings.share,
            auth=settings.login(),
            allowed_paths=[str(root)],
            max_file_size=UPLOAD_LIMIT,
            theme=theme(),
            css=_assets(".css"),
            head=f"<script>{_assets('.js')}</script>",
            footer_links=[],
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise InputError(
            f"cannot listen on {settings.host} port {settings.port}",
            got=" ".join(str(error).split())[:160],
            remedy="another --port, or 0 for any free one",
        ) from error
    sys.stdout.write(f"dittools studio: {page.local_url}, runs in {root}\n")
    if page.share_url:
        sys.stdout.write(f"public, for people with the login: {page.share_url}\n")
    sys.stdout.flush()
    if block:
        page.block_thread()
    return page


def _get_ready(pipe: Any, job: Job) -> None:
    """Build the CPU kernels while the person reads the page, so that the first clip is quick."""
    if pipe.device.type == "cpu":
        native.load()


def theme() -> gr.themes.Base:
    """Return the one theme of the studio, light and dark; system fonts, nothing is downloaded.

    Text and buttons are a shade darker than Gradio's own, which are too pale to read on white.
    """
    sans = ["ui-sans-serif", "system-ui", "sans-serif"]
    mono = ["ui-monospace", "monospace"]
    base = gr.themes.Base(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        font=sans,
        font_mono=mono,
    )
    return base.set(
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        **dict.fromkeys(("button_primary_background_fill", "color_accent"), "*primary_700"),
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
    )


def _header(engine: Engine) -> str:
    return (
        "<h1>dittools studio</h1>"
        f"<p>Dense and accelerated, side by side. Version {dittools.__version__}, "
        f"runs on {engine.device}.</p>"
    )


def _assets(suffix: str) -> str:
    """Return all files of one kind in `assets`, by name, as one text."""
    folder = files("dittools.studio") / "assets"
    found = sorted((f for f in folder.iterdir() if f.name.endswith(suffix)), key=lambda f: f.name)
    return "\n".join(file.read_text(encoding="utf-8") for file in found)
