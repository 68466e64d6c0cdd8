"""Time released configs on a GPU, or one block and the embedded model on a CPU.

    python bench/latency.py                  what this machine can run, at most 9 minutes
    python bench/latency.py --only flux      cases whose name holds a text
    python bench/latency.py --shrunk         every config with one layer, to try the script out

A case that has its file in bench/results is not run again; --fresh measures everything anew.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from configs import CPU_BLOCK, RELEASED, Case

from dittools import attach
from dittools.commands.bench import HEADINGS, table_rows
from dittools.commands.compare_page import parts_plot
from dittools.commands.latency import Bench, plan_checksum, run_latency
from dittools.methods import METHODS
from dittools.metrics.latency import (
    PartTimer,
    PeakMemory,
    Sample,
    amdahl,
    interleaved,
    speedup,
    summary,
)
from dittools.metrics.results import new_results, write_atomic
from dittools.metrics.work import WorkCounter, probe

RESULTS = Path(__file__).parent / "results"


def measure(case: Case, device: str, repeats: int, warm_up: int) -> dict[str, Any]:
    """Return the results of one forward of a case, dense and with each of its methods in turn."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model, inputs = case.build(device, dtype), case.inputs(case, device, dtype)
    last: dict[str, tuple[dict[str, Any], str]] = {}

    def run(name: str) -> Sample:
        timer = PartTimer({"transformer": [(model, "forward")]}, device)
        # a single forward tells no number of steps: keep nothing dense but what the method keeps
        with (
            attach(model, name, dense_steps=0, dense_last_steps=0, dense_layers=0) as handle,
            timer.running(),
            PeakMemory(device) as memory,
            torch.no_grad(),
        ):
            model(**inputs)
            total = timer.milliseconds()["transformer"]
            report = handle.report().to_dict()
            last[name] = report, plan_checksum(handle.plan)
        attention, choosing = report["attention_ms"], report["choosing_ms"]
        parts = {
            "attention": attention - choosing,
            "choosing": choosing,
            "rest of transformer": max(total - attention, 0.0),
            "text encoder": 0.0,
            "vae": 0.0,
            "other": 0.0,
        }
        return Sample(total, parts, memory.bytes)

    with torch.no_grad(), WorkCounter(lambda: "transformer") as counter:
        model(**inputs)
    work, peak = counter.work, probe(device, dtype)
    names = ["dense", *(name for name in case.methods if name in METHODS)]
    samples = interleaved(
        {name: (lambda n=name: run(n)) for name in names}, repeats=repeats, warm_up=warm_up
    )
    share = min(
        summary(samples["dense"])["parts_ms"]["attention"]["median"]
        / summary(samples["dense"])["total_ms"]["median"],
        1.0,
    )
    rows = []
    for name in names:
        report, digest = last[name]
        density = report["density"]
        rows.append(
            {
                "name": name,
                "method": name,
                "plan_checksum": digest,
                "density": density,
                "sparse_density": report["sparse_density"],
                "report": {key: value for key, value in report.items() if key != "layers"},
                **summary(samples[name]),
                "speedup": speedup(samples["dense"], samples[name]).to_dict(),
                "flops": work.flops(density),
                "bytes": work.traffic(),
                "limit_ms": peak.limit_ms(work.flops(density), work.traffic()),
                "bound": amdahl(share),
                "bound_at_density": amdahl(share, min(density, 1.0)),
                "fidelity": None,
                "prompt_score": None,
                "clip": "",
            }
        )
    settings = {
        "model": case.name,
        "notes": case.notes,
        "tokens": case.tokens,
        "seed": 0,
        "steps": 1,
        "frames": case.frames,
        "height": case.height,
        "width": case.width,
        "warm_up": warm_up,
        "repeats": repeats,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return new_results(settings, rows, peak=peak.to_dict(), work=work.to_dict(), floors={})


def show(results: dict[str, Any]) -> None:
    """Print one case as a table, a method a column."""
    print(f"\n{results['run']['model']}: {results['run'].get('notes', '')}")
    columns = [HEADINGS, *table_rows(results)]
    widths = [max(len(cell) for cell in column) + 2 for column in columns]
    for cells in zip(*columns, strict=True):
        print("".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)))


def demo(repeats: int, warm_up: int, folder: Path) -> dict[str, Any]:
    """Return the results of the embedded model, whole clips with fidelity and floors."""
    from dittools.pipelines import load
    from dittools.pipelines.demo import DEMO_DEFAULTS
    from dittools.pipelines.generate import Settings

    pipe = load("demo")
    pipe.set_progress_bar_config(disable=True)
    targets = {name: name for name in ("gna", "radial") if name in METHODS}
    bench = Bench("demo", Settings(**DEMO_DEFAULTS), targets, repeats, warm_up)
    return run_latency(pipe, bench, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=9.0, help="start no case after this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--shrunk", action="store_true", help="one layer, few tokens, any device")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = list(RELEASED) if device == "cuda" else [CPU_BLOCK]
    if options.shrunk:
        cases = [case.shrunk() for case in RELEASED]
    names = [case.name for case in cases] + ([] if options.shrunk or device == "cuda" else ["demo"])
    todo = {case.name: case for case in cases}
    start, left = time.perf_counter(), []
    for name in names:
        if options.only not in name:
            continue
        path = options.out / f"{name}.json"
        if path.exists() and not options.fresh:
            show(json.loads(path.read_text(encoding="utf-8")))
            continue
        if time.perf_counter() - start > options.minutes * 60:
            left.append(name)
            continue
        try:
            if name == "demo":
                results = demo(options.repeats, options.warm_up, options.out / "demo")
            else:
                results = measure(todo[name], device, options.repeats, options.warm_up)
        except torch.cuda.OutOfMemoryError as error:
            print(f"\n{name}: not measured, {str(error).splitlines()[0]}")
            torch.cuda.empty_cache()
            continue
        write_atomic(path, json.dumps(results, indent=1, allow_nan=False))
        write_atomic(path.with_suffix(".svg"), parts_plot(results["cases"]))
        show(results)
        if device == "cuda":
            torch.cuda.empty_cache()
    if left:
        print(f"\nout of time, not measured: {', '.join(left)}; run again to go on")


if __name__ == "__main__":
    main()
