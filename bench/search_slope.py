"""How the cost of calibration grows with heads, candidates and prompts: CPU time per call.

    python bench/search_slope.py --out docs/results/search_slope.json

Times are CPU seconds of one thread, so that other work on the machine does not show. A line is
fitted through each series; the last column says how far the worst point lies off it.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import load
from dittools.pipelines.output import write_text
from dittools.searching.candidates import Candidate, candidates_for
from dittools.searching.probe import Probe, Sites
from dittools.searching.rows import sample_rows

GRID = TokenGrid(8, 12, 12)
HEAD_DIM, ROWS = 64, 128


def seconds(heads: int, candidates: list[Candidate], prompts: int) -> float:
    """Return the least CPU time of three calibrations of one attention call per prompt."""
    best = float("inf")
    shape = (1, GRID.total, heads, HEAD_DIM)
    q, k, v = (torch.randn(shape) for _ in range(3))
    call = AttentionCall(q, k, v, GRID, step=0, steps=1)
    sites = Sites(GRID, 1, heads, (0.0, 1.0), 1, frozenset({0}), sample_rows(GRID.total, ROWS, 0))
    probe = Probe(sites, candidates, [None])
    probe.attend(call, load("cpu"))  # masks are expanded once per generation
    for _ in range(3):
        start = time.process_time()
        for _ in range(prompts):
            probe.attend(replace(call, memory={}), load("cpu"))
        best = min(best, time.process_time() - start)
    return best


def line(xs: list[int], ys: list[float]) -> tuple[float, float, float]:
    """Return slope, intercept and the largest distance from the line as a share of the last y."""
    x, y = torch.tensor(xs, dtype=torch.float64), torch.tensor(ys, dtype=torch.float64)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    base = float(y.mean() - slope * x.mean())
    return slope, base, float((y - slope * x - base).abs().max() / y[-1])


def main() -> None:
    """Print the series and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fixed = candidates_for(GRID, ["gna", "radial", "sta"])
    choosing = candidates_for(GRID, ["metered", "paro", "clustered"])
    series = {
        "heads": ([2, 4, 8, 12], lambda n: seconds(n, fixed[:17], 1)),
        "candidates": ([8, 16, 24, 32], lambda n: seconds(4, fixed[: n + 1], 1)),
        "candidates that choose": ([4, 8, 12, 16], lambda n: seconds(4, _spread(choosing, n), 1)),
        "prompts": ([1, 2, 3, 4], lambda n: seconds(4, fixed[:17], n)),
    }
    content: dict[str, Any] = {"grid": list(GRID.shape), "head_dim": HEAD_DIM, "rows": ROWS}
    for name, (xs, measure) in series.items():
        ys = [measure(n) for n in xs]
        slope, base, off = line(xs, ys)
        content[name] = {
            "x": xs,
            "cpu_s": [round(y, 4) for y in ys],
            "slope_ms": round(slope * 1000, 2),
            "base_ms": round(base * 1000, 2),
            "off_the_line": round(off, 3),
        }
        points = ", ".join(f"{x}: {y:.3f}" for x, y in zip(xs, ys, strict=True))
        print(
            f"{name:<23} {points}  slope {slope * 1000:.1f} ms, base {base * 1000:.1f} ms, "
            f"off the line by {off:.0%}"
        )
    if out is not None:
        write_text(out, json.dumps(content, indent=1) + "\n")


def _spread(candidates: list[Candidate], count: int) -> list[Candidate]:
    """Return dense and so many others in turns of four, so that every length is a like mixture."""
    one = candidates[1::5][:4]
    return [candidates[0], *(one * (count // 4))]


if __name__ == "__main__":
    main()
