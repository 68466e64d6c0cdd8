"""`dittools calibrate`: from prompts and a density to a plan with static masks."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dittools.commands.terminal import Json, console, count_or_share, progress
from dittools.errors import InputError


def calibrate(
    prompts: Annotated[Path, typer.Option(help="UTF-8 file, one prompt a line.")],
    target_density: Annotated[
        float, typer.Option(help="Share of query-key pairs over the whole run.")
    ],
    model: Annotated[str, typer.Option(help="As for generate.")] = "demo",
    method: Annotated[str, typer.Option(help="Method to calibrate; paro is the one.")] = "paro",
    orders: Annotated[
        str, typer.Option(help="recall, or paper for the paper's block metrics.")
    ] = "recall",
    masks: Annotated[
        int, typer.Option(help="Masks over the run; 0: one per step of the first half, then one.")
    ] = 0,
    rows: Annotated[int, typer.Option(help="Queries per block looked at, 0 for all.")] = 16,
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 64,
    per_head: Annotated[
        bool, typer.Option("--per-head", help="Every head keeps the same share.")
    ] = False,
    held_out: Annotated[int, typer.Option(help="Prompts to verify on, 0 for none.")] = 2,
    dense_steps: Annotated[
        float | None, typer.Option(help="First steps kept dense: a count, or a share below 1.")
    ] = None,
    dense_layers: Annotated[int, typer.Option(help="First layers kept dense.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt's noise.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    backend: Annotated[str, typer.Option(help="Attention backend.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    work: Annotated[Path | None, typer.Option(help="Folder of finished generations.")] = None,
    out: Annotated[Path, typer.Option(help="Plan file.")] = Path("out/calibrate/plan.json"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it takes: generations, memory, masks.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Choose token orders and static masks for PAROAttention from a few prompts, and verify them.

    Every second prompt is held out. A killed calibration goes on where it was.

    Example: dittools calibrate --prompts prompts.txt --target-density 0.4 --out plan.json
    """
    from dittools.commands.search import _load
    from dittools.searching import calibrate_paro as calibrating
    from dittools.searching.store import read_prompts

    if method != "paro":
        raise InputError("this method has nothing to calibrate", expected="paro", got=method)
    texts = read_prompts(prompts)
    choices = calibrating.Choices(
        target_density=target_density,
        orders=orders,
        masks=masks,
        rows=rows,
        per_head=per_head,
        block_size=block_size,
        dense_steps=count_or_share(dense_steps) or 0,
        dense_layers=dense_layers,
        held_out=held_out,
    )
    sizes = {"steps": steps, "frames": frames, "height": height, "width": width}
    given: dict[str, Any] = {**sizes, "guidance": guidance, "seed": seed}
    calibrating.request_of(object(), texts, choices, {**given, "steps": steps or 1})
    pipe, settings = _load(model, dtype, device, given)
    if dry_run:
        request = calibrating.request_of(pipe, texts, choices, settings)
        takes = calibrating.cost(pipe, request, choices)
        _print(json.dumps(takes.to_dict()) if as_json else str(takes), as_json)
        return
    with progress() as step:
        plan = calibrating.calibrate(
            pipe, texts, choices, backend=backend, out=out, work=work, progress=step, **settings
        )
    content = {**plan.provenance, "measured": dict(plan.measured), "plan": str(out)}
    if as_json:
        _print(json.dumps(content), as_json)
        return
    found = plan.measured
    proof = f"{found['psnr_db']:.2f} dB on held-out prompts, " if found else "not verified, "
    density = found["density"] if found else target_density
    _print(f"density {density:.3f}, {proof}plan: {out}", as_json)


def _print(text: str, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(text + "\n")
    else:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
