"""What plans cost: kernel times over density and block size, and groups of heads as they run."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from dittools.call import AttentionCall
from dittools.errors import PlanError, UnsupportedCall
from dittools.grid import TokenGrid
from dittools.kernels.auto import resolve
from dittools.methods import Method, build
from dittools.patches.refusals import is_finite
from dittools.pipelines.output import write_text
from dittools.plans.phrase import phrase
from dittools.reading import misfit, read_json
from dittools.searching.groups import (
    GroupCost,
    between,
    clocked,
    kin,
    runnable,
    sizes_to_time,
    time_group,
    typical_call,
)

SHARES = (0.1, 0.25, 0.5, 0.75)  # of blocks visited
DEFAULT_BLOCK = 128  # tokens, where a method does not say
_REPEATS = 5
_SECONDS = 10.0  # that rounds may take together; one is run in any case
_APART = 8  # jobs between two timings of dense attention


_SHAPE = {
    **dict.fromkeys(("basis", "backend", "device"), str),
    **dict.fromkeys(("tokens", "heads", "head_dim"), int),
    "dense_ms": float,
    "sparse_ms": {"*": [[float]]},
    "split_ms?": float,
    "check_ms?": float,
    "dtype?": str,
    "attention_share?": float,
    "seconds?": float,
    "groups?": [dict],
}


def _unusable(content: dict[str, Any]) -> str:
    """Return what cannot be interpolated in a table, "" where all can."""
    if not content["dense_ms"] > 0:
        return "dense calls that take no time"
    for size, points in content["sparse_ms"].items():
        shares = [point[0] for point in points if len(point) == 2]
        rising = all(a < b for a, b in pairwise(shares))
        if len(shares) < max(2, len(points)) or not rising or shares[0] <= 0:
            return f"points of block size {size[:20]!r}"
    return ""


@dataclass(frozen=True)
class CostTable:
    """Times of one backend on one device at one size; `basis` says measured or flops.

    Attributes:
        basis: "measured", or "flops" where a mask costs what its blocks hold and choosing nothing.
        backend, device: what was timed.
        tokens, heads, head_dim: of the calls.
        dense_ms: one dense call.
        sparse_ms: block size -> ((share of blocks visited, ms), ...), rising.
        split_ms: what it takes to part the heads of a call in two and to put results together.
        check_ms: what it takes to look for NaN and infinity before a sparse call.
        groups: methods on groups of heads, timed through their own attend.
        dtype: of the calls.
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
    check_ms: float = 0.0
    groups: tuple[GroupCost, ...] = ()
    dtype: str = ""
    attention_share: float = 0.0
    seconds: float = 0.0

    @property
    def split_ratio(self) -> float:
        """Time to split the heads of a call and join them again, as a share of a dense call."""
        return self.split_ms / self.dense_ms if self.basis == "measured" else 0.0

    @property
    def check_ratio(self) -> float:
        """Time to look for NaN and infinity, as a share of a dense call."""
        return self.check_ms / self.dense_ms if self.basis == "measured" else 0.0

    def group(
        self,
        method: Method,
        heads: int,
        states: Mapping[str, float],
        computed: float | None = None,
    ) -> tuple[float, float] | None:
        """Return time of choosing and of the kernel, as shares of a dense call of all heads.

        Kernel times are carried from the share of blocks that was visited in the timing to
        `computed` along the curve of the block size. A method that was not timed itself goes by its
        nearest kin, which differs in how much it keeps; None where there is none.

        Args:
            method: what runs.
            heads: heads it runs together.
            states: share of the calls in each of STATES.
            computed: share of blocks it visits; None for as many as in the timing.
        """
        costs = self._costs(method, computed)
        if self.basis != "measured" or not costs:
            return None
        block = int(getattr(method, "block_size", DEFAULT_BLOCK))

        def kernel(cost: GroupCost) -> float:
            timed = self.ratio(cost.computed["late"], block)
            carried = self.ratio(computed, block) / timed if computed and timed else 1.0
            return _mean(cost.kernel_ms, states) * carried

        choosing = between(costs, heads, lambda cost: _mean(cost.choosing_ms, states))
        return choosing / self.dense_ms, between(costs, heads, kernel) / self.dense_ms

    def _costs(self, method: Method, computed: float | None) -> list[GroupCost]:
        name, family = phrase(method), kin(method)
        own = [cost for cost in self.groups if cost.method == name]
        if own or computed is None:
            return own
        related = [cost for cost in self.groups if cost.kin == family]
        if not related:
            return []
        near = min(related, key=lambda cost: abs(cost.computed["late"] - computed)).method
        return [cost for cost in related if cost.method == near]

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
        content["sparse_ms"] = {
            str(size): [list(point) for point in points]
            for size, points in sorted(self.sparse_ms.items())
        }
        content["groups"] = list(content["groups"])
        return content

    @staticmethod
    def from_dict(content: dict[str, Any]) -> "CostTable":
        """Return the table of `to_dict`.

        Raises:
            PlanError: a field is missing or of another type.
        """
        if wrong := misfit(content, _SHAPE, "the cost table") or _unusable(content):
            raise PlanError("the cost table is malformed", got=wrong)
        try:
            sparse = {
                int(size): tuple((float(x), float(y)) for x, y in points)
                for size, points in content["sparse_ms"].items()
            }
            groups = tuple(GroupCost.from_dict(part) for part in content.get("groups", ()))
            return CostTable(**{**content, "sparse_ms": sparse, "groups": groups})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError("the cost table is malformed", got=str(error)) from error


def _mean(times: Mapping[str, float], states: Mapping[str, float]) -> float:
    return sum(times[state] * share for state, share in states.items())


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
    groups: Sequence[tuple[Method, int]] = (),
    sample: AttentionCall | None = None,
) -> CostTable:
    """Return kernel times on this device, medians of interleaved runs.

    Falls back to the FLOPs table, which says so in `basis`, when the backend cannot run a mask of
    one of the block sizes.

    Args:
        grid, heads, head_dim: of the calls.
        backend: a named one.
        device, dtype: of the calls.
        blocks: block sizes to time.
        groups: methods, and heads they run together, to time through their own attend.
        sample: a call of the model; None makes up a typical one.
    """
    call = sample or typical_call(grid, heads, head_dim, dtype, device)
    runner = resolve(backend)
    masks: dict[tuple[int, float], Any] = {}
    for block in blocks:
        for share in SHARES:
            method: Any = build("random", {"density": share, "block_size": block})
            masks[block, share] = method.mask(grid).to(device)
    jobs: dict[Any, Callable[[], Any]] = {
        "split": lambda: clocked(lambda: _split(call), device),
        "check": lambda: clocked(lambda: is_finite(call.query, call.key, call.value), device),
    }
    for key, mask in masks.items():
        jobs[key] = partial(clocked, partial(runner.block_sparse, call, mask), device)
    try:
        for job in jobs.values():
            job()  # warms caches
    except UnsupportedCall:
        return flops_table(grid, heads, head_dim)
    timed = runnable(sizes_to_time(groups), call, runner)
    for place, (method, _, part) in enumerate(timed):
        jobs[place] = partial(time_group, method, part, runner)
    found = _rounds(jobs, lambda: clocked(lambda: runner.dense(call), device))
    median = {k: statistics.median(found[k]) for k in ("dense", "split", "check", *masks)}
    sparse = {b: _rising([(masks[b, s].computed, median[b, s]) for s in SHARES]) for b in blocks}
    costs = tuple(_cost(m, size, found[place]) for place, (m, size, _) in enumerate(timed))
    return CostTable(
        basis="measured",
        backend=runner.name,
        device=_device_name(device),
        tokens=grid.total,
        heads=heads,
        head_dim=head_dim,
        dense_ms=median["dense"],
        sparse_ms={b: points for b, points in sparse.items() if len(points) > 1},
        split_ms=median["split"],
        check_ms=median["check"],
        groups=costs,
        dtype=str(dtype).removeprefix("torch."),
    )


def _rounds(jobs: dict[Any, Callable[[], Any]], dense: Callable[[], float]) -> dict[Any, list[Any]]:
    """Return what every job gave in each round; dense attention is timed in between."""
    found: dict[Any, list[Any]] = {key: [] for key in ("dense", *jobs)}
    begun = time.perf_counter()
    for done in range(1, _REPEATS + 1):
        for place, (key, job) in enumerate(jobs.items()):
            if place % _APART == 0:
                found["dense"].append(dense())
            found[key].append(job())
        if (time.perf_counter() - begun) * (done + 1) / done > _SECONDS:
            break
    return found


def _cost(method: Method, heads: int, passes: list[Any]) -> GroupCost:
    """Return the medians of passes through the states of a run."""
    choosing, kernel, computed = (
        {state: statistics.median(one[part][state] for one in passes) for state in passes[0][part]}
        for part in range(3)
    )
    return GroupCost(phrase(method), kin(method), heads, choosing, kernel, computed)


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
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read the cost table {path}: {error}") from error
    return CostTable.from_dict(content)


def save_costs(table: CostTable, path: Path) -> None:
    """Write a table atomically."""
    write_text(path, json.dumps(table.to_dict(), indent=1) + "\n")
