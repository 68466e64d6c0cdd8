"""`dittools freeswim`: a clip far larger than the model was trained on."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dittools.commands.terminal import Json, console, errors, progress


def freeswim(
    height: Annotated[int, typer.Option(help="Pixels wanted; any size.")],
    width: Annotated[int, typer.Option(help="Pixels wanted; any size.")],
    model: Annotated[
        str, typer.Option(help="demo, tiny/<family>, a diffusers folder or a hub id.")
    ] = "demo",
    prompt: Annotated[str | None, typer.Option(help="What to show.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    native_height: Annotated[
        int | None, typer.Option(help="Pixels the model was trained on, if it does not say.")
    ] = None,
    native_width: Annotated[
        int | None, typer.Option(help="Pixels the model was trained on, if it does not say.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="override, or window: cheaper, but it repeats content.")
    ] = "override",
    strength: Annotated[
        float, typer.Option(help="Share of the steps that run at the target size.")
    ] = 0.7,
    cache_interval: Annotated[
        int, typer.Option(help="Steps between refreshes of the text attention.")
    ] = 2,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Refresh it in every pass, the slow original.")
    ] = False,
    cache_device: Annotated[
        str | None, typer.Option(help="Where the text attention waits, e.g. cpu.")
    ] = None,
    flow_shift: Annotated[
        float | None, typer.Option(help="Of the schedule at the target size.")
    ] = None,
    attn_temperature: Annotated[
        float | None, typer.Option(help="Factor on self-attention scores; published by default.")
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="Method or plan file for the second lane.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the clip.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None,
    backend: Annotated[str, typer.Option(help="Attention backend.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/freeswim"),
    as_json: Json = False,
) -> None:
    """Generate at the training size, enlarge, and refine at the size wanted.

    Example: dittools freeswim --prompt "a red circle moving left" --height 192 --width 192
    """
    from dittools.pipelines import freeswim as refine
    from dittools.pipelines import load
    from dittools.pipelines.output import check_writable, write_clip, write_text
    from dittools.pipelines.session import FPS, Request, settings_of

    asked = Request(
        model=model,
        prompt=prompt,
        negative_prompt=negative_prompt,
        seed=seed,
        steps=steps,
        frames=frames,
        height=native_height,
        width=native_width,
        guidance=guidance,
    )
    settings = settings_of(asked)  # a model's own defaults, the training size among them
    check_writable(out)
    pipe = load(model, dtype=dtype, device=device)
    pipe.set_progress_bar_config(disable=True)
    with progress() as step:
        made = refine(
            pipe,
            settings.prompt,
            height=height,
            width=width,
            native_height=settings.height,
            native_width=settings.width,
            frames=settings.frames,
            steps=settings.steps,
            strength=strength,
            flow_shift=flow_shift,
            cache_interval=None if no_cache else cache_interval,
            mode=mode,
            plan=plan,
            negative_prompt=settings.negative_prompt,
            guidance=settings.guidance,
            seed=settings.seed,
            attn_temperature=attn_temperature,
            cache_device=cache_device,
            backend=backend,
            note=lambda text: errors.print(text, markup=False, highlight=False),
            progress=step,
        )
    report: dict[str, Any] = {**made.report, "model": model}
    files = {
        "clip": write_clip(out / "clip.mp4", made.frames, FPS),
        "native clip": write_clip(out / "native.mp4", made.native, FPS),
        "report": out / "report.json",
    }
    write_text(files["report"], json.dumps(report, indent=1))
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
        return
    for name, lane in made.lanes.items():
        console.print(f"{name} lane", markup=False, highlight=False)
        console.print(str(lane), markup=False, highlight=False)
    for name, path in files.items():
        console.print(f"{name}: {path}", markup=False, highlight=False, soft_wrap=True)
