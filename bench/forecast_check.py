"""Forecast against measured time of plans on the embedded model: dense and sparse in turn.

    python bench/forecast_check.py dittools/plans/presets/demo.json --repeats 5

Wall time: run it on an idle machine. The plan that runs is the forecast's, layers in which it would
lose left dense.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from dittools.patches import attach
from dittools.pipelines import load
from dittools.pipelines.demo import DEMO_DEFAULTS
from dittools.pipelines.generate import Settings, generate
from dittools.plans import Plan
from dittools.searching.forecast import forecast

SIZES = {key: DEMO_DEFAULTS[key] for key in ("height", "width", "frames", "steps", "guidance")}


def speed(pipe: Any, plan: Plan, repeats: int) -> dict[str, float]:
    """Return forecast and measured speed-up and seconds, medians of runs in turn."""
    promised = forecast(pipe, plan, backend="cpu", **SIZES)
    settings = Settings("a red circle moving left over a blue background", **SIZES)
    seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(repeats + 1):
        seconds["dense"].append(generate(pipe, settings).seconds)
        with attach(pipe, promised.plan, backend="cpu"):
            seconds["sparse"].append(generate(pipe, settings).seconds)
    dense, sparse = (statistics.median(s[1:]) for s in seconds.values())
    return {
        "forecast_speedup": promised.speedup,
        "measured_speedup": dense / sparse,
        "forecast_seconds": promised.seconds or 0.0,
        "measured_seconds": sparse,
        "attention_share": promised.attention_share,
        "layers_left_dense": float(len(promised.losing)),
    }


def main() -> None:
    """Print one line per plan."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("plans", type=Path, nargs="+")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    pipe = load("demo")
    pipe.set_progress_bar_config(disable=True)
    for path in given.plans:
        found = speed(pipe, Plan.load(path), given.repeats)
        print(f"{path}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()))


if __name__ == "__main__":
    main()
