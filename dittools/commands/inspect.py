"""`dittools inspect`: the head atlas of a model as one HTML page."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dittools.errors import InputError

Json = Annotated[bool, typer.Option("--json", help="Print the atlas as JSON, for machines.")]


def inspect(
    model: Annotated[str, typer.Option(help="As for generate.")] = "demo",
    prompts: Annotated[Path | None, typer.Option(help="UTF-8 file, one prompt a line.")] = None,
    prompt: Annotated[str, typer.Option(help="One prompt, instead of a file.")] = (
        "a red circle moving left over a blue striped background"
    ),
    plan: Annotated[Path | None, typer.Option(help="Show the choices of this plan.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Candidates of this method; several are allowed.")
    ] = None,
    budget: Annotated[str, typer.Option(help="quick, standard or thorough.")] = "quick",
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    backend: Annotated[str, typer.Option(help="Attention backend.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="The page.")] = Path("out/atlas.html"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the options, generate nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw what every head looks at, and what each candidate would do to it; choose and export.

    Example: dittools inspect --model demo --plan plan.json --out atlas.html
    """
    from dittools.commands.search import _load
    from dittools.commands.terminal import console, progress
    from dittools.pipelines.output import check_writable, disk_errors, write_text
    from dittools.plans import Plan
    from dittools.searching.inspect import atlas, atlas_page, work_beside
    from dittools.searching.store import ROOM, read_prompts

    texts = [prompt] if prompts is None else read_prompts(prompts)
    chosen = None if plan is None else Plan.load(plan)
    if out.is_dir():
        raise InputError(
            f"{out} is a folder", expected="the file of the page", remedy="another --out"
        )
    check_writable(out.parent)
    if dry_run:
        console.print("options and plan are usable", markup=False, highlight=False)
        return
    given: dict[str, Any] = {"steps": steps, "frames": frames, "height": height, "width": width}
    pipe, settings = _load(model, dtype, device, {**given, "guidance": guidance, "seed": seed})
    with progress() as step:
        found = atlas(
            pipe,
            texts,
            plan=chosen,
            methods=tuple(method or ()),
            budget=budget,
            backend=backend,
            work=work_beside(out),
            progress=step,
            **settings,
        )
    with disk_errors(f"cannot write {out}", ROOM):
        write_text(out, atlas_page(found))
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        console.print(f"atlas: {out}", markup=False, highlight=False, soft_wrap=True)
