"""`dittools bench latency` and `dittools bench compare`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dittools.errors import InputError
from dittools.metrics.results import load_results, reasons_not_comparable

app = typer.Typer(
    help="Measure how fast, and compare measurements.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


@app.command()
def latency(
    model: Annotated[str, typer.Option(help="As for generate.")] = "demo",
    method: Annotated[
        list[str] | None, typer.Option(help="Method; give it several times to compare.")
    ] = None,
    plan: Annotated[list[Path] | None, typer.Option(help="Plan file; several are allowed.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to show.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    repeats: Annotated[int, typer.Option(help="Counted runs of every case.")] = 5,
    warm_up: Annotated[int, typer.Option(help="Uncounted runs of every case.")] = 1,
    backend: Annotated[str, typer.Option(help="Attention backend.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    floors: Annotated[bool, typer.Option(help="Also other seed and random blocks.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/bench"),
    as_json: Json = False,
) -> None:
    """Time dense and accelerated runs in turn, part by part, beside what bounds them.

    Example: dittools bench latency --method gna --method radial --repeats 5
    """
    from dittools.commands.compare_page import parts_plot
    from dittools.commands.latency import Bench, run_latency
    from dittools.commands.terminal import progress
    from dittools.pipelines import load
    from dittools.pipelines.output import check_writable, write_text
    from dittools.pipelines.session import Request, settings_of

    targets = _targets(method, plan)
    settings = settings_of(
        Request(
            model=model,
            prompt=prompt,
            seed=seed,
            steps=steps,
            frames=frames,
            height=height,
            width=width,
        )
    )
    if repeats < 1 or warm_up < 0:
        raise InputError("repeats", expected="1 or more, and a warm-up of 0 or more")
    check_writable(out)
    pipe = load(model, dtype=dtype, device=device)
    pipe.set_progress_bar_config(disable=True)
    bench = Bench(
        model=model,
        settings=settings,
        targets=targets,
        repeats=repeats,
        warm_up=warm_up,
        backend=backend,
        device=device,
        dtype=str(_denoiser(pipe).dtype).removeprefix("torch."),
        floors=floors,
    )
    with progress() as tell:
        results = run_latency(pipe, bench, out, tell)
    write_text(out / "parts.svg", parts_plot(results["cases"]))
    if as_json:
        sys.stdout.write(json.dumps(results, allow_nan=False) + "\n")
    else:
        _print(results, out)


@app.command()
def compare(
    results: Annotated[
        list[Path], typer.Argument(help="results.json of two or more runs, or one.")
    ],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("out/compare.html"),
    as_json: Json = False,
) -> None:
    """Put measurements side by side in one page that needs nothing but itself.

    Example: dittools bench compare out/a/results.json out/b/results.json --out compare.html
    """
    from dittools.commands.compare_page import compare_page
    from dittools.commands.terminal import console
    from dittools.pipelines.output import write_text

    documents = [(path, load_results(path)) for path in results]
    warnings = {
        str(path): reasons_not_comparable(documents[0][1], document)
        for path, document in documents[1:]
    }
    write_text(out, compare_page(documents))
    if as_json:
        sys.stdout.write(json.dumps({"page": str(out), "not_comparable": warnings}) + "\n")
        return
    for name, reasons in warnings.items():
        for reason in reasons:
            console.print(f"not comparable, {name}: {reason}", markup=False, highlight=False)
    console.print(f"page: {out}", markup=False, highlight=False)


def _targets(methods: list[str] | None, plans: list[Path] | None) -> dict[str, Any]:
    from dittools.commands.latency import clip_name
    from dittools.methods import preset
    from dittools.pipelines.session import DEFAULT_METHOD
    from dittools.plans import Plan

    found: dict[str, Any] = {}
    for name in methods or ([] if plans else [DEFAULT_METHOD]):
        preset(name, "")  # an unknown name fails before anything is loaded
        found[name] = name
    found.pop("dense", None)  # always measured
    for path in plans or []:
        taken = {clip_name(name) for name in (*found, "dense")}
        if clip_name(path.stem) in taken:  # its clip and its row would stand for both
            raise InputError(
                "two cases have one name", got=str(path), remedy="another name for the plan file"
            )
        found[path.stem] = Plan.load(path)
    if not found:
        raise InputError("no case to measure beside dense", remedy="--method gna")
    return found


def _denoiser(pipe: Any) -> Any:
    found = getattr(pipe, "transformer", None)
    return found if found is not None else pipe.unet


HEADINGS = (
    "case", "total ms (p20-p80)", "attention", "choosing", "rest of transformer", "text encoder",
    "VAE", "other", "density", "speed-up (p20-p80)", "bound: density / zero", "limit ms",
    "peak MiB", "PSNR dB",
)  # fmt: skip


def table_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the cells of the latency table; bound is Amdahl's at the case's density / at zero."""
    from dittools.commands.latency import PARTS

    rows = []
    for case in results["cases"]:
        total, ratio, peak = case["total_ms"], case["speedup"], case["peak_bytes"]
        # a result without one of the parts, a limit or a peak leaves its cell empty
        parts = [
            f"{case['parts_ms'][name]['median']:.1f}" if name in case["parts_ms"] else ""
            for name in PARTS
        ]
        rows.append(
            (
                case["name"],
                f"{total['median']:.0f} ({total['p20']:.0f}-{total['p80']:.0f})",
                *parts,
                f"{case['density']:.2f}",
                f"{ratio['median']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f})",
                f"{case['bound_at_density']:.2f} / {case['bound']:.2f}",
                "" if case["limit_ms"] is None else f"{case['limit_ms']:.1f}",
                f"{peak / 2**20:.0f}" if peak else "",
                f"{case['fidelity']['psnr_db']:.1f}" if case["fidelity"] else "",
            )
        )
    return rows


def verdicts(results: dict[str, Any]) -> list[str]:
    """Return a sentence for every case that its runs do not show to be faster than dense."""
    found = []
    for case in results["cases"]:
        ratio = case["speedup"]
        spread = f"{ratio['median']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f})"
        if case["name"] == "dense" or ratio["p20"] > 1:
            continue
        if ratio["p80"] < 1:
            found.append(f"{case['name']} is slower than dense here: speed-up {spread}")
        else:
            found.append(f"{case['name']} is not faster than dense beyond the spread: {spread}")
    return found


def _print(results: dict[str, Any], out: Path) -> None:
    from dittools.commands.terminal import console

    columns = table_rows(results)  # a case a column: fifteen columns fit no terminal
    table = Table(*(column[0] for column in [HEADINGS, *columns]))
    for number, heading in enumerate(HEADINGS[1:], 1):
        table.add_row(heading, *(column[number] for column in columns))
    console.print(table)
    for sentence in verdicts(results):
        console.print(sentence, markup=False, highlight=False)
    for name, floor in results["floors"].items():
        console.print(
            f"floor, {name}: PSNR {floor['psnr_db']:.1f} dB, SSIM {floor['ssim']:.3f}",
            markup=False,
            highlight=False,
        )
    peak = results["peak"]
    console.print(
        f"limit: {peak['flops_per_s'] / 1e9:.0f} GFLOP/s and {peak['bytes_per_s'] / 1e9:.1f} GB/s "
        f"measured here ({peak['how']})",
        markup=False,
        highlight=False,
    )
    console.print(f"results: {out / 'results.json'}", markup=False, highlight=False)
