"""Time of block-sparse attention on the CPU over dense SDPA of the same dtype in the same run.

    python bench/kernels.py                              # 4,096 tokens, 2 heads, D 64, block 128
    python bench/kernels.py --tokens 8192 --head-dim 64,128 --threads 2 --json ratios.json
    python bench/kernels.py --grid                       # what `prefers_dense` chooses, all sizes

Every round times dense and each density one after the other, so that whatever else the machine does
hits all of them alike; a row is the median of the paired ratios. Nothing is timed before its result
was compared with the same attention in double precision. With one thread the clock counts CPU time,
with more it is the wall clock.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import dittools
from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend, load, native
from dittools.mask import BlockMask

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECKED_TOKENS = 1024  # of a case; enough for every code path, and double precision stays quick
COLUMNS = "dtype tokens heads head_dim block density computed path ratio p20 p80 dense_ms error"


def main(argv: list[str] | None = None) -> int:
    """Print one row per case and density; return 1 when a result is wrong."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    backend = load(args.backend)
    rows = []
    say(f"# {describe(args)}")
    say("  ".join(f"{name:>8}" for name in COLUMNS.split()))
    for dtype in args.dtypes:
        for tokens in args.tokens:
            for dim in args.head_dim:
                case = make_case(tokens, args.heads, dim, DTYPES[dtype])
                for block in args.block:
                    rows += run_case(backend, case, block, args, dtype)
    slow = [row for row in rows if row["path"] != "dense" and row["ratio"] > 1.03]
    if args.grid:
        say(f"# {len(rows)} rows, {len(slow)} of the chosen paths above 1.03 of dense")
    if args.json:
        Path(args.json).write_text(json.dumps({"run": describe(args), "rows": rows}, indent=1))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options; --grid widens the defaults."""

    def numbers(kind: Callable[[str], object]) -> Callable[[str], list[object]]:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=numbers(int))
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=numbers(int))
    parser.add_argument("--block", type=numbers(int))
    parser.add_argument("--dtypes", type=numbers(str), help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--densities", type=numbers(float))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7, help="at least 7 for a number to keep")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--grid", action="store_true", help="let prefers_dense choose, many sizes")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    args = parser.parse_args(argv)
    wide = args.grid
    args.tokens = args.tokens or ([128, 256, 512, 1024, 2048, 4096] if wide else [4096])
    args.head_dim = args.head_dim or ([64, 128] if wide else [64])
    args.block = args.block or ([64, 128] if wide else [128])
    args.dtypes = args.dtypes or ["fp32", "bf16"]
    args.densities = args.densities or [0.1, 0.25, 0.5, *([0.75, 0.9] if wide else []), 1]
    unknown = set(args.dtypes) - set(DTYPES)
    if unknown:
        parser.error(f"unknown dtype {', '.join(sorted(unknown))}; expected {', '.join(DTYPES)}")
    return args


def make_case(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> AttentionCall:
    """Return a call on random normal data, [1, tokens, heads, dim]."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((1, tokens, heads, dim), generator=random).to(dtype) for _ in range(3))
    return AttentionCall(q, k, v, TokenGrid(1, 1, tokens))


def random_mask(heads: int, tokens: int, block: int, density: float) -> BlockMask:
    """Return a mask that keeps the same number of random blocks in every row."""
    random = torch.Generator().manual_seed(1)
    blocks = -(-tokens // block)
    kept = max(1, round(density * blocks))
    best = torch.rand((heads, blocks, blocks), generator=random).topk(kept, dim=-1).indices
    keep = torch.zeros((heads, blocks, blocks), dtype=torch.bool).scatter_(2, best, True)
    return BlockMask(keep, block, q_tokens=tokens, kv_tokens=tokens)


def run_case(
    backend: Backend, call: AttentionCall, block: int, args: argparse.Namespace, dtype: str
) -> list[dict[str, object]]:
    """Check, then time every density of one case; print and return its rows."""
    tokens, heads, dim = call.query.shape[1:]
    masks = [random_mask(heads, tokens, block, density) for density in args.densities]
    error = check(backend, call, block)
    dense_times: list[float] = []
    times: list[list[float]] = [[] for _ in masks]
    clock = time.process_time if args.threads == 1 else time.perf_counter
    goes_dense = [args.grid and backend.prefers_dense(call, mask) for mask in masks]
    for turn in range(args.rounds + 2):
        spent = timed(clock, lambda: backend.dense(call))
        if turn > 1:
            dense_times.append(spent)
        for mask, skip, own in zip(masks, goes_dense, times, strict=True):
            if skip:
                continue
            spent = timed(clock, lambda mask=mask: backend.block_sparse(call, mask))
            if turn > 1:
                own.append(spent / dense_times[-1])
    rows = []
    for density, mask, skip, own in zip(args.densities, masks, goes_dense, times, strict=True):
        path = "dense" if skip else path_of(backend, call, mask)
        low, middle, high = (1.0, 1.0, 1.0) if skip else spread(own)
        dense_ms = statistics.median(dense_times) * 1e3
        values = (dtype, tokens, heads, dim, block, density, mask.computed, path)
        row = dict(zip(COLUMNS.split(), (*values, middle, low, high, dense_ms, error), strict=True))
        say("  ".join(f"{x:8.3g}" if isinstance(x, float) else f"{x:>8}" for x in row.values()))
        rows.append(row)
    return rows


def timed(clock: Callable[[], float], action: Callable[[], object]) -> float:
    """Return the seconds of one call, at least 2 ms of repetitions behind it."""
    start = clock()
    count = 0
    while count == 0 or clock() - start < 0.002:
        action()
        count += 1
    return (clock() - start) / count


def spread(ratios: list[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile."""
    ordered = sorted(ratios)
    last = len(ordered) - 1
    return ordered[round(0.2 * last)], statistics.median(ordered), ordered[round(0.8 * last)]


def path_of(backend: Backend, call: AttentionCall, mask: BlockMask) -> str:
    """Return the code path the cpu backend takes, the backend's name for others."""
    why_not = getattr(backend, "not_native", None)
    if why_not is None:
        return backend.name
    return "grouped" if why_not(call, mask) else "native"


def check(backend: Backend, call: AttentionCall, block: int) -> float:
    """Return the largest error against double precision; stop when it is out of budget.

    Budget: twice the error dense SDPA itself makes in this dtype, plus one rounding of the output.
    """
    tokens = min(call.query.shape[1], CHECKED_TOKENS)
    q, k, v = (t[:, :tokens] for t in (call.query, call.key, call.value))
    small = AttentionCall(q, k, v, TokenGrid(1, 1, tokens))
    mask = random_mask(small.head_count, tokens, block, 0.4)
    allowed = mask.to_dense()[:, :tokens, :tokens]
    a, b, c = (t.transpose(1, 2) for t in (q, k, v))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    exact = sdpa(a.double(), b.double(), c.double(), attn_mask=allowed).transpose(1, 2)
    plain = sdpa(a, b, c, attn_mask=allowed).transpose(1, 2)
    rounding = torch.finfo(q.dtype).eps * float(exact.abs().max())
    budget = 2 * float((plain.double() - exact).abs().max()) + rounding
    got = backend.block_sparse(small, mask)
    error = float((got.double() - exact).abs().max())
    if not error <= budget:
        sys.exit(f"wrong result: error {error:.3g}, budget {budget:.3g} for {tuple(q.shape)}")
    return error


def describe(args: argparse.Namespace) -> str:
    """Return one line: versions, threads, instruction set."""
    return (
        f"dittools {dittools.__version__}, torch {torch.__version__}, {platform.machine()}, "
        f"{args.threads} thread(s), backend {args.backend}, native build "
        f"{native.status().build or 'none: ' + native.status().reason}, {args.rounds} rounds"
    )


def say(line: str) -> None:
    """Print at once, also into a pipe."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
