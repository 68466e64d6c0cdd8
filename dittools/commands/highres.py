"""`dittools highres`: an image far larger than the model was trained on."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dittools.commands.terminal import Json, console, errors, progress


def highres(
    height: Annotated[int, typer.Option(help="Pixels wanted; any size.")],
    width: Annotated[int, typer.Option(help="Pixels wanted; any size.")],
    prompt: Annotated[str, typer.Option(help="What to show.")],
    model: Annotated[
        str, typer.Option(help="tiny/flux, a diffusers folder or a hub id of Flux.1.")
    ] = "tiny/flux",
    native_height: Annotated[int | None, typer.Option(help="Pixels of the base image.")] = None,
    native_width: Annotated[int | None, typer.Option(help="Pixels of the base image.")] = None,
    radius: Annotated[
        float, typer.Option(help="Of the disk, in tokens, or below 1 a share of the longer side.")
    ] = 32.0,
    down_factor: Annotated[
        int, typer.Option(help="Side of the cells whose mean every image token sees; 0: none.")
    ] = 0,
    weights: Annotated[
        Path | None, typer.Option(help="Published CLEAR weights, a safetensors file.")
    ] = None,
    plan: Annotated[str | None, typer.Option(help="Method or plan file, instead of CLEAR.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the schedule, at every size.")] = 20,
    strength: Annotated[float, typer.Option(help="Share of them run at each larger size.")] = 0.7,
    guidance: Annotated[float, typer.Option(help="At the larger sizes.")] = 7.5,
    base_guidance: Annotated[float, typer.Option(help="Of the base image.")] = 3.5,
    ntk_factor: Annotated[float, typer.Option(help="On the base of the rotary embedding.")] = 10.0,
    growth: Annotated[float, typer.Option(help="Most that a side grows at once.")] = 2.0,
    at_once: Annotated[
        bool, typer.Option("--at-once", help="One rung, whatever the size.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    backend: Annotated[str, typer.Option(help="Attention backend.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/highres"),
    as_json: Json = False,
) -> None:
    """Make a base image at the training size, then enlarge it rung by rung with CLEAR.

    Example: dittools highres --model tiny/flux --prompt "a red circle" --height 64 --width 96
    """
    from dittools.pipelines import highres as climb
    from dittools.pipelines import load
    from dittools.pipelines.output import check_writable, write_clip, write_text
    from dittools.pipelines.rungs import Recipe

    recipe = Recipe(steps, strength, guidance, ntk_factor, growth=None if at_once else growth)
    check_writable(out)
    pipe = load(model, dtype=dtype, device=device)
    pipe.set_progress_bar_config(disable=True)
    with progress() as step:
        made = climb(
            pipe,
            prompt,
            height=height,
            width=width,
            native_height=native_height,
            native_width=native_width,
            radius=radius,
            down_factor=down_factor,
            weights=weights,
            plan=plan,
            recipe=recipe,
            base_steps=steps,
            base_guidance=base_guidance,
            seed=seed,
            backend=backend,
            note=lambda text: errors.print(text, markup=False, highlight=False),
            progress=step,
        )
    report: dict[str, Any] = {**made.report, "model": model}
    files = {
        f"{image.shape[0]}x{image.shape[1]}": write_clip(out / f"rung{n}.png", image[None], 1)
        for n, image in enumerate(made.rungs[:-1])
    }
    files["image"] = write_clip(out / "image.png", made.image[None], 1)
    files["report"] = out / "report.json"
    write_text(files["report"], json.dumps(report, indent=1))
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
        return
    console.print(str(made.reports[-1]), markup=False, highlight=False)
    for name, path in files.items():
        console.print(f"{name}: {path}", markup=False, highlight=False, soft_wrap=True)
