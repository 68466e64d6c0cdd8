"""How the cost of calibration grows with heads, candidates and prompts: CPU time per call.

    python bench/search_slope.py

Times are CPU seconds of one thread, so that other work on the machine does not show. A line is
fitted through each series; the last column says how far the worst point lies off it.
"""

import time
from dataclasses import replace

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import load
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
    """Print the three series."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    every = candidates_for(GRID, ["gna", "radial", "sta"])
    series = {
        "heads": ([2, 4, 8, 12], lambda n: seconds(n, every[:17], 1)),
        "candidates": ([8, 16, 24, 32], lambda n: seconds(4, every[: n + 1], 1)),
        "prompts": ([1, 2, 3, 4], lambda n: seconds(4, every[:17], n)),
    }
    for name, (xs, measure) in series.items():
        ys = [measure(n) for n in xs]
        slope, base, off = line(xs, ys)
        points = ", ".join(f"{x}: {y:.3f}" for x, y in zip(xs, ys, strict=True))
        print(
            f"{name:<11} {points}  slope {slope * 1000:.1f} ms, base {base * 1000:.1f} ms, "
            f"off the line by {off:.0%}"
        )


if __name__ == "__main__":
    main()
