"""`dittools search`: from prompts and a target to a plan with its price and its proof."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dittools.errors import InputError

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


def search(
    prompts: Annotated[Path, typer.Option(help="UTF-8 file, one prompt a line.")],
    model: Annotated[str, typer.Option(help="As for generate.")] = "demo",
    target_density: Annotated[
        float | None, typer.Option(help="Share of query-key pairs over the whole run.")
    ] = None,
    min_psnr: Annotated[
        float | None, typer.Option(help="dB against dense, mean over held-out prompts.")
    ] = None,
    target_speedup: Annotated[
        float | None, typer.Option(help="Speed-up of a whole generation.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Method to search over; several are allowed.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Method to leave out.")] = None,
    budget: Annotated[str, typer.Option(help="quick, standard or thorough.")] = "standard",
    dense_layers: Annotated[str, typer.Option(help="Layers kept dense, e.g. 0,5.")] = "",
    dense_heads: Annotated[str, typer.Option(help="Heads kept dense, e.g. 0:2,3:1.")] = "",
    kernels_per_layer: Annotated[
        int, typer.Option(help="Most kernels in a layer at one time, 0 for any number.", min=0)
    ] = 0,
    mask_mib: Annotated[float, typer.Option(help="Memory of all masks, 0 for any.", min=0)] = 0,
    reuse: Annotated[
        float, typer.Option(help="A layer copies the one before it at this share more error.")
    ] = 0.0,
    carry: Annotated[
        float | None, typer.Option(help="Carry errors over layers in calibration: the penalty.")
    ] = None,
    sensitivity: Annotated[
        str, typer.Option(help="perturbation, or gradient: a backward pass through the sampler.")
    ] = "perturbation",
    seed: Annotated[int, typer.Option(help="Seed of the first prompt's noise.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    backend: Annotated[str, typer.Option(help="Attention backend.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    work: Annotated[Path | None, typer.Option(help="Folder of finished work.")] = None,
    out: Annotated[Path, typer.Option(help="Plan file.")] = Path("out/search/plan.json"),
    objective: Annotated[
        str, typer.Option(help="plan, or guidance: the heads to perturb (HeadHunter).")
    ] = "plan",
    scorer: Annotated[
        str,
        typer.Option(
            help="guidance: demo, clip=DIR, pickscore=DIR, aesthetic=DIR, module:function."
        ),
    ] = "demo",
    rounds: Annotated[int, typer.Option(help="guidance: greedy rounds.")] = 1,
    top_k: Annotated[int, typer.Option(help="guidance: heads added per round.")] = 3,
    scale: Annotated[float, typer.Option(help="guidance: its weight.")] = 3.0,
    u: Annotated[float, typer.Option(help="guidance: strength, 0 to 1.")] = 1.0,
    mode: Annotated[str, typer.Option(help="guidance: joint or image.")] = "joint",
    heads: Annotated[str, typer.Option(help="guidance: the pool, e.g. L0,L3H1; all.")] = "",
    atlas: Annotated[
        bool, typer.Option(help="guidance: join the head atlas in the report.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it will cost: forwards, time, memory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Search the plan that meets one target, verify it on held-out prompts, and write it.

    Every second prompt is held out. A killed search goes on where it was.

    Example: dittools search --prompts prompts.txt --target-density 0.4 --out plan.json

    Heads for guidance: dittools search --objective guidance --prompts prompts.txt --steps 4

    On several GPUs: accelerate launch -m dittools search --prompts prompts.txt --min-psnr 28

    On several processes without one: torchrun --nproc_per_node 2 -m dittools search ...
    """
    from dittools.searching.api import make_request
    from dittools.searching.request import Constraints
    from dittools.searching.store import read_prompts

    if objective not in ("plan", "guidance"):
        raise InputError("unknown objective", expected="plan or guidance", got=repr(objective))
    if objective == "guidance":
        from dittools.commands import search_guidance

        if dry_run:
            raise InputError("--dry-run belongs to the search of a plan")
        search_guidance.run(
            search_guidance.Wanted(scorer, rounds, top_k, scale, u, mode, heads, atlas),
            prompts,
            model,
            dtype,
            device,
            {
                "steps": steps,
                "frames": frames,
                "height": height,
                "width": width,
                "guidance": guidance,
                "seed": seed,
            },
            backend,
            out,
            work,
            as_json,
        )
        return
    texts = read_prompts(prompts)
    limits = Constraints(
        dense_layers=_numbers("--dense-layers", dense_layers),
        dense_heads=pairs(dense_heads),
        exclude=tuple(exclude or ()),
        distinct=kernels_per_layer,
        mask_bytes=int(mask_mib * 2**20),
        reuse=reuse,
    )
    wanted: dict[str, Any] = {
        "target_density": target_density,
        "min_psnr": min_psnr,
        "target_speedup": target_speedup,
        "methods": tuple(method or ()),
        "budget": budget,
        "constraints": limits,
        "carry": carry,
        "sensitivity": sensitivity,
    }
    sizes = {"steps": steps, "frames": frames, "height": height, "width": width}
    given: dict[str, Any] = {**sizes, "guidance": guidance, "seed": seed}
    make_request(object(), texts, **wanted, **{**given, "steps": steps or 1})  # before loading
    pipe, settings = _load(model, dtype, device, given)
    if dry_run:
        _print_estimate(pipe, make_request(pipe, texts, **wanted, **settings), as_json)
        return
    _search(pipe, texts, wanted, settings, backend, out, work, as_json)


def _load(model: str, dtype: str, device: str, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline and the settings with the model's defaults filled in."""
    from dittools.pipelines import load
    from dittools.pipelines.session import Request as Generation
    from dittools.pipelines.session import settings_of

    settings = settings_of(Generation(model=model, prompt="any", **given)).to_dict()
    settings.pop("prompt")
    pipe = load(model, dtype=dtype, device=device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, settings


def _search(
    pipe: Any,
    prompts: list[str],
    wanted: dict[str, Any],
    settings: dict[str, Any],
    backend: str,
    out: Path,
    work: Path | None,
    as_json: bool,
) -> None:
    from dittools.commands.terminal import console, progress
    from dittools.pipelines.ranks import finish, is_main
    from dittools.searching.api import search as run_search

    with progress() as step:
        result = run_search(
            pipe, prompts, **wanted, **settings, backend=backend, out=out, work=work, progress=step
        )
    main = is_main()
    finish()
    if not main:
        return
    if as_json:
        content = {
            "met": result.met,
            "remark": result.remark,
            "chosen": result.frontier["chosen"],
            "files": {name: str(path) for name, path in result.files.items()},
        }
        sys.stdout.write(json.dumps(content) + "\n")
        return
    chosen = result.frontier["chosen"]
    console.print(
        f"density {chosen['density']:.3f}, {chosen['psnr_db']:.2f} dB on held-out prompts "
        f"(predicted {chosen['predicted_db']:.2f}); target "
        f"{'met' if result.met else 'not met'}: {result.remark}",
        markup=False,
        highlight=False,
    )
    for name, path in result.files.items():
        console.print(f"{name}: {path}", markup=False, highlight=False, soft_wrap=True)


def _print_estimate(pipe: Any, request: Any, as_json: bool) -> None:
    from dittools.commands.terminal import console
    from dittools.searching.estimate import estimate

    found = estimate(pipe, request)
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict()) + "\n")
    else:
        console.print(str(found), markup=False, highlight=False)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Read 0,3,5."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise InputError(
            f"{option} is not usable", expected="numbers such as 0,5", got=repr(text)
        ) from error


def pairs(text: str) -> tuple[tuple[int, int], ...]:
    """Read 0:2,3:1 as (layer, head) pairs."""
    pairs = []
    for part in text.split(",") if text.strip() else ():
        numbers = _numbers("--dense-heads", part.replace(":", ","))
        if len(numbers) != 2:
            raise InputError(
                "--dense-heads is not usable", expected="layer:head, e.g. 0:2", got=repr(part)
            )
        pairs.append((numbers[0], numbers[1]))
    return tuple(pairs)
