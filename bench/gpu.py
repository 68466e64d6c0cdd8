"""Time of block-sparse attention on a CUDA device, against dense SDPA, the ideal and peers.

    python bench/gpu.py                   # everything, under 8 minutes; what `make bench-gpu` runs
    python bench/gpu.py --tokens 32760 --head-dim 128 --heads 24
    python bench/gpu.py --tune            # time tile shapes first and keep the fastest of each

Every result is compared with exact attention on sampled query blocks before it is timed. A ratio is
time over the time of the fastest dense SDPA backend at the same shape; ideal is density times that
time. Results go to bench/results/<gpu>-<date>.json with the versions of everything involved.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import dittools
from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend, load
from dittools.kernels.common import dense_attention
from dittools.kernels.flex import FlexBackend
from dittools.mask import BlockMask
from dittools.methods import build
from dittools.order import TokenOrder

GRIDS = {  # tokens: frames x height x width of the latent grid after patching
    8192: TokenGrid(8, 32, 32),
    32760: TokenGrid(21, 30, 52),  # Wan, 480p, 81 frames
    75600: TokenGrid(21, 45, 80),  # Wan, 720p, 81 frames
    118800: TokenGrid(33, 45, 80),  # HunyuanVideo, 720p, 129 frames
}
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
KINDS = ("random", "radial", "gna", "paro")
BLOCK = 128
DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
PEERS = ("sage", "sparge", "natten", "flash")
BUDGET_S = 450.0
COLUMNS = "tokens heads head_dim kind density backend ms tflops dense ideal error"


@dataclass(frozen=True)
class Case:
    """One shape and mask."""

    tokens: int
    heads: int
    head_dim: int
    kind: str
    density: float  # asked for; geometric masks have their own

    @property
    def with_flex(self) -> bool:
        """Whether FlexAttention is timed too; every shape costs a compilation of many seconds."""
        return self.heads == 24 and self.head_dim == 128 and self.tokens < 100_000


def cases(
    tokens: list[int] | None = None, heads: list[int] | None = None, dims: list[int] | None = None
) -> list[Case]:
    """Return every case; the shape that matters most first, in case the time runs out."""
    shapes = itertools.product(tokens or list(GRIDS), heads or [12, 24], dims or [64, 128])
    ordered = sorted(shapes, key=lambda s: (s[0] != 32760, s[1] != 24, s[2] != 128, s[0]))
    masks = [("random", d) for d in DENSITIES] + [("radial", 0.0), ("gna", 0.0), ("paro", 0.3)]
    return [Case(*shape, *mask) for shape in ordered for mask in masks]


def make_mask(case: Case) -> BlockMask:
    """Return the mask of a case, made on the CPU as a method would."""
    grid = GRIDS[case.tokens]
    if case.kind in ("radial", "gna"):
        method: Any = build(case.kind)
        made: BlockMask = method.mask(grid)
        return made
    random = torch.Generator().manual_seed(case.heads)
    blocks = -(-grid.total // BLOCK)
    kept = max(1, round(case.density * blocks))
    best = torch.rand((case.heads, blocks, blocks), generator=random).topk(kept, dim=-1).indices
    keep = torch.zeros((case.heads, blocks, blocks), dtype=torch.bool).scatter_(2, best, True)
    order = axis_orders(grid, case.heads) if case.kind == "paro" else None
    return BlockMask(keep, BLOCK, order=order, q_tokens=grid.total, kv_tokens=grid.total)


def axis_orders(grid: TokenGrid, heads: int) -> TokenOrder:
    """Return one of the six axis orders per head, in turn."""
    raster = torch.arange(grid.tokens).view(grid.shape)
    orders = [raster.permute(axes).flatten() for axes in itertools.permutations(range(3))]
    return TokenOrder(torch.stack([orders[h % 6] for h in range(heads)]), grid.total)


def sampled_error(call: AttentionCall, mask: BlockMask, out: torch.Tensor, count: int = 4) -> float:
    """Return the largest error of some query blocks against exact attention in fp32.

    Bounded by the size of the values: an error above 0.03 in bf16 is a wrong result.
    """
    mask, worst = mask.to(call.query.device), 0.0
    blocks = int(mask.keep.shape[1])
    for turn in range(count):
        head = turn * 7 % call.head_count
        block = (blocks - 1) * turn // max(1, count - 1)
        slots = torch.arange(mask.q_slots if mask.order is None else mask.order.slots)
        token = slots.to(call.query.device)
        if mask.order is not None:
            token = mask.order.index[min(head, mask.order.index.shape[0] - 1)]
        kept = mask.rows(min(head, mask.keep.shape[0] - 1), block)[:, : len(token)]
        here = token[block * mask.q_block : (block + 1) * mask.q_block]
        if mask.order is None:
            here, kept = here[here < call.query.shape[1]], kept[:, : call.key.shape[1]]
            token = token[: call.key.shape[1]]
        real = here >= 0
        q, kept = call.query[0, here[real], head].float(), kept[: len(here)][real]
        k, v = (t[0, token.clamp(min=0), head].float() for t in (call.key, call.value))
        score = q @ k.T * call.softmax_scale
        score = score.masked_fill(~kept | (token < 0), float("-inf"))
        exact = score.softmax(-1).nan_to_num() @ v
        worst = max(worst, float((out[0, here[real], head].float() - exact).abs().max()))
    return worst


def time_ms(run: Callable[[], object], budget_s: float = 0.25) -> list[float]:
    """Return p20, p50, p80 of the time on the device, after two runs to warm up."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 5 or (len(times) < 50 and time.perf_counter() - started < budget_s):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    times.sort()
    return [times[len(times) // 5], statistics.median(times), times[len(times) * 4 // 5]]


def dense_times(call: AttentionCall) -> dict[str, float | str]:
    """Return the median of every dense SDPA backend, or why one cannot run."""
    found: dict[str, float | str] = {}
    for name, kind in DENSE.items():
        try:
            with sdpa_kernel(kind):
                found[name] = time_ms(lambda: dense_attention(call))[1]
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0]
    return found


def launch_errors() -> tuple[type[Exception], ...]:
    """Return what Triton raises where a device has too little for a launch: no RuntimeError."""
    try:
        from triton.runtime.errors import OutOfResources
    except ImportError:
        return ()
    return (OutOfResources,)


def backends(case: Case) -> Iterator[tuple[str, Backend]]:
    """Yield what is timed on a case: the kernel, FlexAttention, and every peer."""
    yield "triton", load("triton")
    if case.with_flex:
        yield "flex", FlexBackend(compiled=True)
    for name in PEERS:
        yield name, load(name)


def run_case(case: Case, call: AttentionCall, dense_ms: float) -> list[dict[str, Any]]:
    """Check, then time every backend that takes the case; refusals become rows without a time."""
    mask = make_mask(case)
    on_device = mask.to(call.query.device)
    density, rows = mask.density, []
    for name, backend in backends(case):
        row: dict[str, Any] = {**asdict(case), "density": density, "computed": mask.computed}
        row |= {"backend": name}
        rows.append(row)
        reasons = backend.not_supported(call, on_device)
        if reasons:
            row["refused"] = ", ".join(reasons)
            continue
        torch.cuda.reset_peak_memory_stats()
        before, started = torch.cuda.memory_allocated(), time.perf_counter()
        try:
            out = backend.block_sparse(call, on_device)
            torch.cuda.synchronize()
        except (RuntimeError, UnsupportedCall, *launch_errors()) as error:
            row["failed"] = str(error).splitlines()[0]
            continue
        row["first_call_ms"] = 1e3 * (time.perf_counter() - started)
        row["extra_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        row["error"] = sampled_error(call, on_device, out)
        row["wrong"] = row["error"] > (0.03 if name in ("triton", "flex") else 0.3)
        if not row["wrong"]:
            times = time_ms(lambda run=backend: run.block_sparse(call, on_device))
            row |= derived(case, density, times, dense_ms)
    return rows


def derived(case: Case, density: float, times: list[float], dense_ms: float) -> dict[str, float]:
    """Return times, TFLOP/s of the kept work, and the ratios to dense and to the ideal."""
    work = 4.0 * case.tokens**2 * case.head_dim * case.heads * density
    return {
        "p20_ms": times[0],
        "ms": times[1],
        "p80_ms": times[2],
        "tflops": work / times[1] / 1e9,
        "dense": times[1] / dense_ms,
        "ideal": times[1] / (density * dense_ms),
    }


def make_call(case: Case) -> AttentionCall:
    """Return random normal tensors of a case, bf16 [1, tokens, heads, head_dim]."""
    torch.manual_seed(0)
    shape = (1, case.tokens, case.heads, case.head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return AttentionCall(q, k, v, GRIDS[case.tokens])


def tune() -> dict[str, list[int]]:
    """Time tile shapes on one mask and return the fastest of each (head size, block) as a table."""
    from dittools.kernels.program import program
    from dittools.kernels.triton_block_sparse import launch
    from dittools.kernels.triton_config import (
        Config,
        capability_of,
        default_config,
        tuning_key,
    )

    table: dict[str, list[int]] = {}
    for dim, block in itertools.product((64, 128), (64, 128)):
        call = make_call(Case(32760, 24, dim, "random", 0.2))
        blocks = -(-32760 // block)
        mask = BlockMask(
            torch.rand(1, blocks, blocks) < 0.2, block, q_tokens=32760, kv_tokens=32760
        )
        made = program(mask, call)
        usual = default_config(
            dim,
            block,
            block,
            torch.bfloat16,
            masked=made.masked,
            capability=capability_of(call.query.device),
        )
        tried = {usual} | {
            Config(m, n, warps, stages)
            for m, n, warps, stages in itertools.product((64, 128), (32, 64), (4, 8), (2, 3, 4))
            if block % m == 0 and block % n == 0
        }
        times: dict[Config, float] = {}
        for config in tried:
            args = (call.query, call.key, call.value, made, None, call.softmax_scale, config)
            try:
                times[config] = time_ms(lambda args=args: launch(*args), budget_s=0.05)[1]
            except (RuntimeError, *launch_errors()) as error:  # too little shared memory
                say(f"# {config} at {dim}: {str(error).splitlines()[0]}")
        best = min(times, key=lambda config: times[config])
        table[tuning_key(dim, block, block, torch.bfloat16)] = list(best)
        say(f"# D {dim} block {block}: {best} {times[best]:.3f} ms, default {times[usual]:.3f} ms")
    return table


def versions() -> dict[str, str]:
    """Return what the numbers depend on."""
    found = {"dittools": dittools.__version__, "python": sys.version.split()[0]}
    found |= {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    packages = ("triton", "sageattention", "spas_sage_attn", "natten", "flash_attn")
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return the timed rows as aligned text; refusals and failures follow, each said once."""
    lines = ["  ".join(f"{name:>8}" for name in COLUMNS.split())]
    notes: dict[str, int] = {}
    for row in rows:
        if "ms" in row:
            cells = [row[name] for name in COLUMNS.split()]
            lines.append("  ".join(f"{_cell(cell):>8}" for cell in cells))
        else:
            why = row.get("refused") or row.get("failed") or f"wrong by {row.get('error')}"
            note = f"# {row['backend']}: {why}"
            notes[note] = notes.get(note, 0) + 1
    return "\n".join([*lines, *(f"{note} ({count} cases)" for note, count in notes.items())])


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(path: Path, result: dict[str, Any]) -> None:
    """Write JSON so that the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def say(text: str) -> None:
    """Print one line at once, so that a cut run leaves what it had."""
    print(text, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=numbers, help=f"of {', '.join(map(str, GRIDS))}")
    parser.add_argument("--heads", type=numbers)
    parser.add_argument("--head-dim", type=numbers)
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds")
    parser.add_argument("--tune", action="store_true", help="pick tile shapes first, and keep them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    unknown = set(args.tokens or []) - set(GRIDS)
    if unknown:
        parser.error(
            f"unknown token count {sorted(unknown)}; expected one of {', '.join(map(str, GRIDS))}"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """Run; return 1 when a result is wrong, 2 when there is no CUDA device."""
    args = parse(argv)
    if not torch.cuda.is_available():
        print(
            "bench/gpu.py needs a CUDA device and found none; `make bench` times the CPU kernels",
            file=sys.stderr,
        )
        return 2
    started, rows, skipped = time.perf_counter(), [], 0
    stem = f"{torch.cuda.get_device_name().replace(' ', '-')}-{datetime.date.today()}"
    result: dict[str, Any] = {"versions": versions(), "dense": {}, "rows": rows}
    if args.tune:
        from dittools.kernels.triton_config import load_tuning

        tuned = args.out / f"tuning-{stem}.json"
        write(tuned, tune())
        load_tuning(tuned)
    call, shape, dense_ms = None, None, 0.0
    for case in cases(args.tokens, args.heads, args.head_dim):
        if time.perf_counter() - started > args.budget:
            skipped += 1
            continue
        if shape != (case.tokens, case.heads, case.head_dim):
            shape, call = (case.tokens, case.heads, case.head_dim), make_call(case)
            dense = dense_times(call)
            result["dense"]["x".join(map(str, shape))] = dense
            dense_ms = min(ms for ms in dense.values() if isinstance(ms, float))
            say(f"# {shape}: dense " + ", ".join(f"{n} {_cell(ms)}" for n, ms in dense.items()))
        assert call is not None
        rows += run_case(case, call, dense_ms)
        write(args.out / f"{stem}.json", {**result, "skipped": skipped})
    write(args.out / f"{stem}.json", {**result, "skipped": skipped})
    say(table(rows))
    say(
        f"# {len(rows)} rows in {time.perf_counter() - started:.0f} s, "
        f"{skipped} cases left out for time"
    )
    return int(any(row.get("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
