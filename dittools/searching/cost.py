"""What a mask costs: kernel times measured over tokens, head_dim, density and block size."""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dittools.call import AttentionCall
from dittools.errors import PlanError, UnsupportedCall
from dittools.grid import TokenGrid
from dittools.kernels.auto import resolve
from dittools.mask import BlockMask
from dittools.methods import Method, build
from dittools.pipelines.output import write_text

SHARES = (0.1, 0.25, 0.5, 0.75)  # of blocks visited
_REPEATS = 5


@dataclass(frozen=True)
class CostTable:
    """Times of one backend on one device at one size; `basis` says measured or flops.

    Attributes:
        basis: "measured", or "flops" where a mask costs what its blocks hold.
        backend, device: what was timed.
        tokens, heads, head_dim: of the calls.
        dense_ms: one dense call.
        sparse_ms: block size -> ((share of blocks visited, ms), ...), rising.
        split_ms: what it takes to part the heads of a call in two and to put results together.
        choosing_ms: method name -> time of a call its choice takes, for methods that look at query
            and key.
        attention_share: part of a dense generation spent in attention; 0 when not measured.
        seconds: wall time of a dense generation; 0 when not measured.
    """

    basis: str
    backend: str
    device: str
    tokens: int
    heads: int
    head_dim: int
    dense_ms: float
    sparse_ms: dict[int, tuple[tuple[float, float], ...]]
    split_ms: float = 0.0
    choosing_ms: dict[str, float] = field(default_factory=dict)
    attention_share: float = 0.0
    seconds: float = 0.0

    @property
    def split_ratio(self) -> float:
        """Time to split the heads of a call and join them again, as a share of a dense call."""
        return self.split_ms / self.dense_ms if self.basis == "measured" else 0.0

    def choosing(self, method: str) -> float:
        """Return what a method's choice takes, as a share of a dense call of the same heads."""
        if self.basis != "measured":
            return 0.0
        return self.choosing_ms.get(method, 0.0) / self.dense_ms

    def ratio(self, computed: float, block: int) -> float:
        """Return the time of a mask as a share of a dense call of the same heads.

        Between measured shares it is interpolated, outside of them continued along the line; a
        block size that was not timed takes the nearest one.
        """
        if computed <= 0:
            return 0.0
        if self.basis == "flops" or not self.sparse_ms:
            return computed
        nearest = min(self.sparse_ms, key=lambda size: (abs(size - block), size))
        points = self.sparse_ms[nearest]
        place = sum(share < computed for share, _ in points[1:-1])
        (x0, y0), (x1, y1) = points[place], points[place + 1]
        line = y0 + (y1 - y0) * (computed - x0) / (x1 - x0)
        return max(line, points[0][1] * computed / points[0][0] * 0.5) / self.dense_ms

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        content = asdict(self)
        content["sparse_ms"] = {str(k): v for k, v in sorted(self.sparse_ms.items())}
        return content

    @staticmethod
    def from_dict(content: dict[str, Any]) -> "CostTable":
        """Return the table of `to_dict`.

        Raises:
            PlanError: a field is missing or of another type.
        """
        try:
            sparse = {
                int(size): tuple((float(x), float(y)) for x, y in points)
                for size, points in content["sparse_ms"].items()
            }
            return CostTable(**{**content, "sparse_ms": sparse})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError("the cost table is malformed", got=str(error)) from error


def flops_table(grid: TokenGrid, heads: int, head_dim: int) -> CostTable:
    """Return the table in which time is proportional to the blocks visited."""
    return CostTable("flops", "", "", grid.total, heads, head_dim, 1.0, {})


def measure_costs(
    grid: TokenGrid,
    heads: int,
    head_dim: int,
    *,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    blocks: tuple[int, ...],
    choosing: Sequence[Method] = (),
) -> CostTable:
    """Return kernel times on this device, medians of interleaved runs on random inputs.

    Falls back to the FLOPs table, which says so in `basis`, when the backend cannot run a mask of
    one of the block sizes.

    Args:
        grid, heads, head_dim: of the calls.
        backend: a named one.
        device, dtype: of the calls.
        blocks: block sizes to time.
        choosing: methods that look at query and key; what that takes is timed too.
    """
    shape = (1, grid.total, heads, head_dim)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    call = AttentionCall(q, k, v, grid)
    runner = resolve(backend)
    masks: dict[tuple[int, float], BlockMask] = {}
    for block in blocks:
        for share in SHARES:
            method = build("random", {"density": share, "block_size": block})
            masks[block, share] = method.mask(grid).to(device)  # type: ignore[attr-defined]
    times: dict[Any, list[float]] = {
        key: [] for key in ("dense", "split", *masks, *(m.name for m in choosing))
    }
    try:
        for _ in range(_REPEATS + 1):
            times["dense"].append(_time(lambda: runner.dense(call), device))
            times["split"].append(_time(lambda: _split(call), device))
            for key, mask in masks.items():
                times[key].append(_time(lambda m=mask: runner.block_sparse(call, m), device))
            for method in choosing:
                times[method.name].append(_time(lambda m=method: _choose(m, call), device))
    except UnsupportedCall:
        return flops_table(grid, heads, head_dim)
    median = {key: statistics.median(values[1:]) for key, values in times.items()}
    sparse = {b: _rising([(masks[b, s].computed, median[b, s]) for s in SHARES]) for b in blocks}
    return CostTable(
        "measured",
        runner.name,
        _device_name(device),
        grid.total,
        heads,
        head_dim,
        median["dense"],
        {b: points for b, points in sparse.items() if len(points) > 1},
        median["split"],
        {m.name: median[m.name] for m in choosing},
    )


class _Nothing:
    """A backend that computes nothing: what a method takes on it is its choosing."""

    name = "nothing"

    def not_supported(self, call: AttentionCall, mask: BlockMask | None = None) -> list[str]:
        return []

    def prefers_dense(self, call: AttentionCall, mask: BlockMask) -> bool:
        return False

    def dense(self, call: AttentionCall) -> torch.Tensor:
        return torch.zeros_like(call.query)

    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool = False
    ) -> Any:
        out = torch.zeros_like(call.query)
        return (out, out[..., 0].float()) if return_lse else out


def _choose(method: Method, call: AttentionCall) -> None:
    fresh = replace(call, memory={})
    if not method.not_supported(fresh):
        method.attend(fresh, _Nothing())


def _split(call: AttentionCall) -> torch.Tensor:
    """Copy the heads of a call into two parts, and one tensor of each into a whole."""
    middle = max(1, call.head_count // 2)
    out = torch.empty_like(call.query)
    for heads in (list(range(middle)), list(range(middle, call.head_count))):
        if heads:
            where = torch.tensor(heads, device=out.device)
            out.index_copy_(2, where, call.heads(heads).query)
    return out


def _rising(points: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Drop points whose share does not rise: small grids round two shares to one."""
    out: list[tuple[float, float]] = []
    for share, ms in points:
        if not out or share > out[-1][0] + 1e-9:
            out.append((share, ms))
    return tuple(out)


def _time(run: Any, device: torch.device) -> float:
    """Return milliseconds of one run, the device drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1000


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def load_costs(path: Path) -> CostTable:
    """Return the table of a file.

    Raises:
        PlanError: missing or malformed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read the cost table {path}: {error}") from error
    return CostTable.from_dict(content)


def save_costs(table: CostTable, path: Path) -> None:
    """Write a table atomically."""
    write_text(path, json.dumps(table.to_dict(), indent=1) + "\n")
