"""How near the flight recorder's error is to the true one, and what the recorder costs.

    nice python bench/meter_check.py [--prompts 1] [--out docs/results/meter.json]

The embedded model generates without guidance, so that every (layer, step) is one call. A method
that passes on another's result measures each call against dense attention over all its rows; the
recorder estimates the same from few rows. Told are, over all calls, the median and the 90 %
quantile of |estimate / true - 1|, and the bias, the mean of estimate / true - 1; "run" compares the
two root mean squares over the run, which is the number a report shows.

The cost is the recorder's share of the denoiser's CPU time, in the model's usual generation with
the recorder's own settings; CPU time of one thread, which other load disturbs least.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from dittools.call import AttentionCall
from dittools.kernels import Backend
from dittools.kernels.common import dense_attention
from dittools.methods import Method, build
from dittools.patches import Recorder, attach
from dittools.pipelines import load
from dittools.pipelines.demo import DEMO_DEFAULTS, PROMPTS
from dittools.pipelines.generate import Settings, generate

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "paro .2": ("paro", {"density": 0.2}),
    "paro .3": ("paro", {"density": 0.3}),
    "metered .2": ("metered", {"density": 0.2}),
    "metered .3": ("metered", {"density": 0.3}),
    # shares of the blocks that add up to .2 and .3 of the work
    "psa .2": ("psa", {"rule": "topk", "ends": (0.1, 0.2, 0.3, 0.5), "block_size": 64}),
    "psa .3": ("psa", {"rule": "topk", "ends": (0.15, 0.3, 0.45, 0.75), "block_size": 64}),
}
COSTLY = ("paro .2", "metered .2", "psa .2")
BLIND = 1e9  # no error is trouble
TARGET = 0.1  # median of |estimate / true - 1| with 64 rows


@dataclass(frozen=True)
class Checked:
    """Runs a method and notes how far each of its calls is from dense attention."""

    name: ClassVar[str] = "checked"
    inner: Method
    true: dict[tuple[int, int], float] = field(default_factory=dict, hash=False, compare=False)

    def not_supported(self, call: AttentionCall) -> list[str]:
        """What the method says."""
        return self.inner.not_supported(call)

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return what the method makes of the call."""
        out = self.inner.attend(call, backend)
        dense = dense_attention(call).double()
        apart = (out.double() - dense).norm() / dense.norm()
        key = (call.layer, call.step)
        if key in self.true:
            raise RuntimeError(f"layer and step {key} made two calls")
        self.true[key] = float(apart)
        return out


class CpuWatch:
    """A stopwatch of the recorder that counts CPU time."""

    total_ms = 0.0

    @contextmanager
    def running(self, _: torch.device) -> Iterator[None]:
        """Count the time of the block."""
        start = time.process_time()
        yield
        self.total_ms += (time.process_time() - start) * 1000


def errors(pipe: Any, method: Method, rows: int, prompt: str) -> list[tuple[float, float]]:
    """Return (estimate, true error) of every call of one generation."""
    checked = Checked(method)
    settings = Settings(**{**DEMO_DEFAULTS, "prompt": prompt, "guidance": 1.0})
    recorder = Recorder(every=1, rows=rows, limit=BLIND)
    with attach(pipe, checked, backend="cpu", recorder=recorder) as handle:
        generate(pipe, settings)
        report = handle.report()
    layers = {layer.site: layer.layer for layer in report.layers}
    found = {
        (layers[site], step): error
        for site, by_step in report.errors.items()
        for step, error in by_step.items()
    }
    if found.keys() != checked.true.keys():
        raise RuntimeError("the recorder and the check saw different calls")
    return [(found[key], checked.true[key]) for key in sorted(found)]


def agreement(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Return how near estimates are to true errors."""
    ratios = [estimate / true - 1 for estimate, true in pairs]
    sizes = sorted(map(abs, ratios))
    whole = [math.sqrt(sum(pair[i] ** 2 for pair in pairs) / len(pairs)) for i in (0, 1)]
    return {
        "calls": len(pairs),
        "median": round(statistics.median(sizes), 4),
        "q90": round(sizes[int(0.9 * (len(sizes) - 1))], 4),
        "bias": round(statistics.mean(ratios), 4),
        "run_estimate": round(whole[0], 4),
        "run_true": round(whole[1], 4),
    }


def cost(pipe: Any, method: Method) -> dict[str, float]:
    """Return the CPU time of the recorder and of the denoiser in one generation."""
    spent, start = [0.0], [0.0]

    def before(*_: Any) -> None:
        start[0] = time.process_time()

    def after(*_: Any) -> None:
        spent[0] += (time.process_time() - start[0]) * 1000

    with attach(pipe, method, backend="cpu") as handle:
        watch: Any = CpuWatch()
        assert handle.runtime.flight is not None
        handle.runtime.flight.watch = watch
        hooks = [
            pipe.transformer.register_forward_pre_hook(before, prepend=True),
            pipe.transformer.register_forward_hook(after),
        ]
        try:
            generate(pipe, Settings(**DEMO_DEFAULTS))
        finally:
            for hook in hooks:
                hook.remove()
        calls = handle.report().calls["sparse"]
    share = watch.total_ms / spent[0]
    return {
        "recorder_ms": round(watch.total_ms, 1),
        "denoiser_ms": round(spent[0]),
        "share": round(share, 4),
        "sparse_calls": calls,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="of every cost")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load("demo")
    pipe.set_progress_bar_config(disable=True)
    names = args.cases.split(",")
    found: dict[str, Any] = {"settings": dict(DEMO_DEFAULTS), "agreement": {}, "cost": {}}
    for rows in (64, Recorder().rows):
        every: list[tuple[float, float]] = []
        by_case = found["agreement"].setdefault(f"{rows} rows", {})
        for name in names:
            pairs = []
            for prompt in PROMPTS[: args.prompts]:
                pairs += errors(pipe, build(CASES[name][0], CASES[name][1]), rows, prompt)
            by_case[name] = agreement(pairs)
            every += pairs
            print(f"{rows} rows, {name}: {by_case[name]}", flush=True)
        by_case["all"] = {k: v for k, v in agreement(every).items() if not k.startswith("run")}
        print(f"{rows} rows, all: {by_case['all']}", flush=True)
    for name in (name for name in names if name in COSTLY):
        runs = [cost(pipe, build(CASES[name][0], CASES[name][1])) for _ in range(args.repeats)]
        found["cost"][name] = sorted(runs, key=lambda run: run["share"])[len(runs) // 2]
        print(f"cost, {name}: {found['cost'][name]}", flush=True)
    median = found["agreement"]["64 rows"]["all"]["median"]
    verdict = "within" if median <= TARGET else "OVER"
    print(f"median with 64 rows {median:.3f}, {verdict} the target of {TARGET}")
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
