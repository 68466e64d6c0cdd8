"""Forecast against measured time of plans on the embedded model: dense and sparse in turn.

    python bench/forecast_check.py                                  the plans and methods below
    python bench/forecast_check.py plan.json psa:block_size=32      these
    python bench/forecast_check.py --cpu-time --out docs/results/forecast.json

Every turn generates dense once and with every plan once; forecasts are made between the turns, each
from timings of its own. The plan that runs is the forecast's, layers in which it would lose left
dense; with --as-given it is the plan as it is. Wall time needs an idle machine; --cpu-time counts
the CPU time of one thread instead, in forecast and run alike, which other load disturbs less.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
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
FILES = (
    ROOT / "dittools/plans/presets/demo.json",
    *sorted((ROOT / "docs/plans").glob("*.json")),
)
METHODS = (
    "psa:block_size=32",
    "svg2:block_size=32,key_block=16,least_queries=32,least_keys=16",
    "vmoba:top_k=0.3,block_size=32",
    "paro:density=0.3,block_size=32",
    "metered:density=0.3,block_size=32",
    "sparge:density=0.3,block_size=32",
)
PROMPT = "a red circle moving left over a blue background"


def plan_of(text: str) -> Plan:
    """Return the plan of a file, or of a method and its parameters."""
    if text.endswith(".json"):
        return Plan.load(text)
    name, _, given = text.partition(":")
    return Plan.of(build(name, pairs(given.split(",") if given else [])))


class Check:
    """One plan: what was forecast, and what its generations took."""

    def __init__(self, text: str) -> None:
        """Read the plan; nothing runs."""
        self.text, self.plan = text, plan_of(text)
        self.promised: Forecast | None = None
        self.seconds: list[float] = []
        self.density = 1.0

    def forecast(self, pipe: Any) -> None:
        """Make the forecast."""
        self.promised = forecast(pipe, self.plan, backend="cpu", **SIZES)

    def generate(self, pipe: Any, as_given: bool) -> None:
        """Time one generation with the plan the forecast leaves."""
        assert self.promised is not None
        runs = self.plan if as_given else self.promised.plan
        with attach(pipe, runs, backend="cpu") as handle:
            self.seconds.append(generate(pipe, Settings(PROMPT, **SIZES)).seconds)
            self.density = handle.report().to_dict()["density"]

    def row(self, dense: float, as_given: bool) -> dict[str, Any]:
        """Return forecast and measured seconds and speed-up.

        Args:
            dense: median seconds of the dense generations.
            as_given: whether losing layers ran sparse.
        """
        found = self.promised
        assert found is not None
        share = found.speedup_as_given if as_given else found.speedup
        layers = [n.density for n in found.layers]
        sparse = statistics.median(self.seconds)
        expected = (found.dense_seconds or 0.0) / share
        return {
            "plan": Path(self.text).name,
            "forecast_seconds": expected,
            "measured_seconds": sparse,
            "measured_seconds_each": self.seconds,
            "seconds_error": expected / sparse - 1,
            "forecast_speedup": share,
            "measured_speedup": dense / sparse,
            "speedup_error": share * sparse / dense - 1,
            "forecast_dense_seconds": found.dense_seconds,
            "measured_dense_seconds": dense,
            "forecast_density": sum(layers) / len(layers) if as_given else found.density,
            "measured_density": self.density,
            "attention_share": found.attention_share,
            "left_dense": [] if as_given else list(found.losing),
            "not_known": list(found.unknown),
        }


def measure(
    pipe: Any,
    texts: list[str],
    repeats: int,
    as_given: bool,
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Return a row per plan, from turns in which everything is generated once.

    Args:
        pipe: the embedded model.
        texts: plan files, or methods with their parameters.
        repeats: turns.
        as_given: whether losing layers run sparse.
        keep: gets the rows known so far, so that a run that is stopped leaves them.
    """
    checks = [Check(text) for text in texts]
    dense: list[float] = []
    generate(pipe, Settings(PROMPT, **{**SIZES, "steps": 2}))  # warms caches
    for _ in range(repeats):
        dense.append(generate(pipe, Settings(PROMPT, **SIZES)).seconds)
        for check in checks:
            if check.promised is None:
                check.forecast(pipe)
            check.generate(pipe, as_given)
            print(line(check.row(statistics.median(dense), as_given)), flush=True)
            keep([c.row(statistics.median(dense), as_given) for c in checks if c.seconds])
    return [check.row(statistics.median(dense), as_given) for check in checks]


def line(row: dict[str, Any]) -> str:
    """Return a row as one line of text."""
    return (
        f"{row['plan']}: forecast {row['forecast_seconds']:.2f} s, "
        f"measured {row['measured_seconds']:.2f} s ({row['seconds_error']:+.1%}); "
        f"speed-up {row['forecast_speedup']:.2f} and {row['measured_speedup']:.2f} "
        f"({row['speedup_error']:+.1%}); density {row['forecast_density']:.3f} and "
        f"{row['measured_density']:.3f}; left dense {row['left_dense']}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    found = [
        "| plan | forecast s | measured s | difference | speed-up forecast | measured | apart |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    found += [
        f"| {row['plan']} | {row['forecast_seconds']:.2f} | {row['measured_seconds']:.2f} | "
        f"{row['seconds_error']:+.1%} | {row['forecast_speedup']:.2f} | "
        f"{row['measured_speedup']:.2f} | {row['speedup_error']:+.1%} |"
        for row in rows
    ]
    return "\n".join(found)


def main() -> None:
    """Print one line per generation and a table, and write them all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("plans", nargs="*", help="plan files, or methods as name:key=value,...")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--as-given", action="store_true", help="run losing layers sparse too")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args()
    if given.cpu_time:
        torch.set_num_threads(1)
        time.perf_counter = time.thread_time
    pipe = load("demo")
    pipe.set_progress_bar_config(disable=True)
    texts = given.plans or [*map(str, FILES), *METHODS]
    facts = {
        "clock": "CPU time of one thread" if given.cpu_time else "wall time",
        "threads": torch.get_num_threads(),
        "repeats": given.repeats,
        "as_given": given.as_given,
        "sizes": SIZES,
    }

    def keep(rows: list[dict[str, Any]]) -> None:
        if given.out is not None:
            load_average = round(os.getloadavg()[0], 2)
            content = {**facts, "load_average": load_average, "plans": rows}
            given.out.write_text(json.dumps(content, indent=1) + "\n")

    print(table(measure(pipe, texts, given.repeats, given.as_given, keep)))


if __name__ == "__main__":
    main()
