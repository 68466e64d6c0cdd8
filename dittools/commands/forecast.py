"""`dittools forecast`: what a plan promises before anything is generated."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dittools.errors import InputError

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


def forecast(
    model: Annotated[
        str, typer.Option(help="As for generate, or a denoiser's config.json.")
    ] = "demo",
    plan: Annotated[Path | None, typer.Option(help="Plan file.")] = None,
    method: Annotated[str | None, typer.Option(help="Method, instead of a plan.")] = None,
    param: Annotated[
        list[str] | None, typer.Option("--set", help="Method parameter, e.g. --set decay=0.5.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    cost: Annotated[Path | None, typer.Option(help="cost.json of an earlier search.")] = None,
    backend: Annotated[str, typer.Option(help="Attention backend.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    ranks: Annotated[
        int, typer.Option(min=1, help="Show the work of each of so many Ulysses ranks.")
    ] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Write the plan with losing layers left dense.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the options and the plan, measure nothing.")
    ] = False,
    gna_window: Annotated[
        str | None,
        typer.Option(help="List strides that cut no tile for this window, e.g. 18,24,24."),
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="With --gna-window: frames,height,width in tokens.")
    ] = None,
    gna_tile: Annotated[str, typer.Option(help="With --gna-window: key tile in tokens.")] = "2,8,8",
    gna_tile_q: Annotated[
        str, typer.Option(help="With --gna-window: query tile in tokens.")
    ] = "4,8,8",
    gna_text: Annotated[int, typer.Option(min=0, help="With --gna-window: text tokens.")] = 0,
    as_json: Json = False,
) -> None:
    """Predict density, attention share, Amdahl's bound and speed-up of a plan, layer by layer.

    Example: dittools forecast --plan plan.json

    Example: dittools forecast --model config.json --method radial --frames 81 --height 720
    --width 1280

    Example: dittools forecast --grid 30,48,80 --gna-window 18,24,24
    """
    if gna_window is not None:
        if plan is not None or method is not None:
            raise InputError(
                "strides are found without a plan", remedy="leave --plan, --method out"
            )
        from dittools.commands.strides import show_strides

        show_strides(grid, gna_window, gna_tile_q, gna_tile, gna_text, as_json)
        return
    from dittools.commands.terminal import console, pairs
    from dittools.methods import build
    from dittools.plans import Plan
    from dittools.searching.cost import load_costs
    from dittools.searching.forecast import forecast as run_forecast

    if (plan is None) == (method is None):
        raise InputError("a forecast needs one plan", expected="--plan or --method")
    if plan is not None and param:
        raise InputError("--set belongs to a method", remedy="change the plan file instead")
    chosen: Any = Plan.load(plan) if plan is not None else build(str(method), pairs(param or []))
    costs = None if cost is None else load_costs(cost)
    if dry_run:
        console.print("options and plan are usable", markup=False, highlight=False)
        return
    sizes = {"steps": steps, "frames": frames, "height": height, "width": width}
    subject: Any = model
    if not model.endswith(".json"):
        from dittools.commands.search import _load

        subject, known = _load(model, dtype, device, {**sizes, "seed": 0})
        sizes = {name: known[name] for name in (*sizes, "guidance")}
    found = run_forecast(subject, chosen, **sizes, backend=backend, costs=costs, ranks=ranks)  # type: ignore[arg-type]
    if out is not None:
        found.plan.save(out)
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict()) + "\n")
    else:
        console.print(str(found), markup=False, highlight=False)
