"""Forecast against measured time of plans on the embedded model: dense and sparse in turn.

    python bench/forecast_check.py                                  six plans
    python bench/forecast_check.py plan.json psa:block_size=32      these
    python bench/forecast_check.py --cpu-time --out docs/results/forecast.json

The plan that runs is the forecast's, layers in which it would lose left dense; with --as-given it
is the plan as it is. Wall time needs an idle machine; --cpu-time counts the CPU time of one thread
instead, in forecast and run alike, which other load disturbs less.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from dittools.commands.terminal import pairs
from dittools.methods import build
from dittools.patches import attach
from dittools.pipelines import load
from dittools.pipelines.demo import DEMO_DEFAULTS
from dittools.pipelines.generate import Settings, generate
from dittools.plans import Plan
from dittools.searching.forecast import Forecast, forecast

ROOT = Path(__file__).resolve().parents[1]
SIZES = {key: DEMO_DEFAULTS[key] for key in ("height", "width", "frames", "steps", "guidance")}
PLANS = (
    str(ROOT / "dittools/plans/presets/demo.json"),
    str(ROOT / "docs/plans/demo-0.4.json"),
    str(ROOT / "docs/plans/demo-0.4-fast.json"),
    "psa:block_size=32",
    "svg2:block_size=32,key_block=16,least_queries=32,least_keys=16",
    "vmoba:block_size=32",
)


def plan_of(text: str) -> Plan:
    """Return the plan of a file, or of a method and its parameters."""
    if text.endswith(".json"):
        return Plan.load(text)
    name, _, given = text.partition(":")
    return Plan.of(build(name, pairs(given.split(",") if given else [])))


def compare(pipe: Any, text: str, repeats: int, as_given: bool) -> dict[str, Any]:
    """Return forecast and measured seconds and speed-up, medians of runs in turn."""
    plan = plan_of(text)
    promised: Forecast = forecast(pipe, plan, backend="cpu", **SIZES)
    share = promised.speedup_as_given if as_given else promised.speedup
    runs = plan if as_given else promised.plan
    layers = [n.density for n in promised.layers]
    expected_density = sum(layers) / len(layers) if as_given else promised.density
    settings = Settings("a red circle moving left over a blue background", **SIZES)
    seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
    density = 1.0
    for turn in range(repeats + 1):
        found = {"dense": generate(pipe, settings).seconds}
        with attach(pipe, runs, backend="cpu") as handle:
            found["sparse"] = generate(pipe, settings).seconds
            density = handle.report().to_dict()["density"]
        for name, spent in found.items():
            seconds[name] += [spent] if turn else []
    dense, sparse = (statistics.median(s) for s in seconds.values())
    expected = (promised.dense_seconds or 0.0) / share
    return {
        "plan": Path(text).name,
        "forecast_seconds": expected,
        "measured_seconds": sparse,
        "seconds_error": expected / sparse - 1,
        "forecast_speedup": share,
        "measured_speedup": dense / sparse,
        "speedup_error": share * sparse / dense - 1,
        "forecast_dense_seconds": promised.dense_seconds,
        "measured_dense_seconds": dense,
        "forecast_density": expected_density,
        "measured_density": density,
        "attention_share": promised.attention_share,
        "left_dense": [] if as_given else list(promised.losing),
        "not_known": list(promised.unknown),
    }


def main() -> None:
    """Print one line per plan, and write them all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("plans", nargs="*", help="plan files, or methods as name:key=value,...")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--as-given", action="store_true", help="run losing layers sparse too")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args()
    if given.cpu_time:
        torch.set_num_threads(1)
        time.perf_counter = time.thread_time
    pipe = load("demo")
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for text in given.plans or PLANS:
        row = compare(pipe, text, given.repeats, given.as_given)
        rows.append(row)
        print(
            f"{row['plan']}: forecast {row['forecast_seconds']:.2f} s, "
            f"measured {row['measured_seconds']:.2f} s ({row['seconds_error']:+.1%}); "
            f"speed-up {row['forecast_speedup']:.2f} and {row['measured_speedup']:.2f} "
            f"({row['speedup_error']:+.1%}); density {row['forecast_density']:.3f} and "
            f"{row['measured_density']:.3f}; left dense {row['left_dense']}",
            flush=True,
        )
    if given.out is not None:
        clock = "CPU time of one thread" if given.cpu_time else "wall time"
        facts = {
            "clock": clock,
            "threads": torch.get_num_threads(),
            "repeats": given.repeats,
            "as_given": given.as_given,
            "load_average": round(os.getloadavg()[0], 2),
            "sizes": SIZES,
        }
        given.out.write_text(json.dumps({**facts, "plans": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
