"""Which rank runs which heads, so that ranks of one context-parallel group have equal work.

Ulysses gives every rank the same number of heads and all tokens. Heads of a plan differ in density,
and an exchange waits for the slowest rank, so heads are dealt out by their work: heaviest first to
the lightest rank with room, then the exchange of two heads that helps most, until none does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from dittools.errors import DitToolsError, InputError
from dittools.grid import TokenGrid
from dittools.methods import GridMethod, Method
from dittools.plans.phrase import phrase
from dittools.plans.plan import HeadRule, Plan

GOOD_ENOUGH = 0.01  # of the mean: heads in order stay, as dealing them out costs a copy
EVEN = 1.1  # of the mean: what the slowest rank should stay within
Owners = tuple[int, ...]  # rank of every head


@dataclass(frozen=True)
class Balance:
    """The kept work of ranks.

    Attributes:
        ranks: of the context-parallel group.
        work: of each rank, 1 for dense attention of an even share of the heads; mean over layers
            and steps.
        slowest: of the slowest rank over the mean, summed over layers and steps: every attention
            waits for its own slowest rank.
        worst: the same in the worst layer.
        in_order: `slowest` without dealing heads out.
        is_even: whether ranks have equal numbers of heads, which plain Ulysses asks for.
    """

    ranks: int
    work: tuple[float, ...]
    slowest: float
    worst: float
    in_order: float
    is_even: bool = True

    def __str__(self) -> str:
        """Return one line."""
        work = " ".join(f"{share:.3f}" for share in self.work)
        uneven = "" if self.is_even else " (needs ulysses_anything)"
        return (
            f"{self.ranks}{uneven}, kept work {work}; slowest {self.slowest - 1:.1%} above the mean"
            f" ({self.worst - 1:.1%} in the worst layer, {self.in_order - 1:.1%} with heads in"
            f" order){'' if self.slowest <= EVEN else '; too few heads on a rank to even them out'}"
        )


def capacities(heads: int, ranks: int) -> tuple[int, ...]:
    """Return how many heads each rank runs: equal, or as diffusers' Ulysses Anything pads them.

    Raises:
        InputError: a rank would be left without heads.
    """
    each = -(-heads // max(ranks, 1))
    last = heads - each * (ranks - 1)
    if heads < 1 or ranks < 1 or last < 1:
        raise InputError(
            f"{heads} heads cannot be spread over {ranks} ranks",
            remedy=f"a degree that divides {heads}",
        )
    return (each,) * (ranks - 1) + (last,)


def in_order(heads: int, ranks: int) -> Owners:
    """Return the owners of heads dealt out as they stand."""
    return tuple(r for r, count in enumerate(capacities(heads, ranks)) for _ in range(count))


@lru_cache(maxsize=1024)
def assign(phases: tuple[tuple[float, tuple[float, ...]], ...], ranks: int) -> Owners:
    """Return the rank of every head; every rank gets its capacity, its heads in any order.

    Args:
        phases: (weight, work of every head): parts of a run in which heads work differently. What
            is made small is the weighted sum of each phase's slowest rank.
        ranks: of the group.
    Raises:
        InputError: a rank would be left without heads.
    """
    heads = len(phases[0][1])
    plain = in_order(heads, ranks)
    if ranks == 1 or slowest(phases, plain, ranks) <= 1 + GOOD_ENOUGH:
        return plain
    owners = _swapped(phases, _dealt(phases, ranks), ranks)
    better = slowest(phases, owners, ranks) < slowest(phases, plain, ranks) - 1e-9
    return tuple(owners) if better else plain


def slowest(phases: Sequence[tuple[float, Sequence[float]]], owners: Owners, ranks: int) -> float:
    """Return the time of the slowest rank over that of the mean, at least 1."""
    loads = [_loads(work, owners, ranks) for _, work in phases]
    top = sum(weight * max(load) for (weight, _), load in zip(phases, loads, strict=True))
    mean = sum(weight * sum(load) for (weight, _), load in zip(phases, loads, strict=True)) / ranks
    return top / mean if mean > 0 else 1.0


def head_work(
    rules: Sequence[HeadRule],
    grid: TokenGrid,
    heads: int,
    known: Mapping[str, Sequence[float]] | None = None,
) -> tuple[float, ...]:
    """Return the share of blocks each head visits, as far as can be told before the run.

    A mask of the grid is counted; a method that chooses in the run counts as what was measured of
    it, else as the density it is asked for, else as dense.

    Args:
        rules: of one layer and step.
        grid: of the call.
        heads: of the site.
        known: phrase of a method to its measured (density, computed share).
    """
    work = [1.0] * heads
    for members, method in rules:
        shares = _shares(method, grid, len(members), known or {})
        for head, share in zip(members, shares, strict=True):
            work[head] = share
    return tuple(work)


def plan_balance(
    plan: Plan,
    grid: TokenGrid,
    *,
    layers: int,
    heads: int,
    steps: int,
    ranks: int,
    paths: Sequence[str] = (),
) -> Balance:
    """Return how a plan's kept work falls on the ranks of a context-parallel group.

    Heads are dealt out as a run deals them: for each layer (and guidance branch, where the plan
    tells them apart) once for all steps.

    Args:
        plan: to judge.
        grid: of the main attention.
        layers, heads, steps: of the run.
        ranks: of the group.
        paths: module path of every layer, where known.
    Raises:
        InputError: a rank would be left without heads.
    """
    capacities(heads, ranks)
    known = plan.measured.get("densities", {})
    total, top, plain, worst = [0.0] * ranks, 0.0, 0.0, 1.0
    for layer in range(layers):
        path = paths[layer] if layer < len(paths) else ""
        for branch in ("cond", "uncond") if plan.needs_branch else ("",):
            phases: dict[tuple[float, ...], float] = {}
            for step in range(steps):
                rules = plan.rules_for(layer, path, step, steps, heads, branch)
                work = head_work(rules, grid, heads, known)
                phases[work] = phases.get(work, 0.0) + 1
            parts = tuple((weight, work) for work, weight in phases.items())
            owners = assign(parts, ranks)
            mean = sum(weight * sum(work) for weight, work in parts) / ranks
            found = slowest(parts, owners, ranks)
            top, worst = top + found * mean, max(worst, found)
            plain += slowest(parts, in_order(heads, ranks), ranks) * mean
            for weight, work in parts:
                loads = _loads([weight * share for share in work], owners, ranks)
                total = [a + b for a, b in zip(total, loads, strict=True)]
    mean, is_even = sum(total) / ranks, heads % ranks == 0
    dense = layers * steps * heads / ranks * (2 if plan.needs_branch else 1)
    shares = tuple(load / dense for load in total)
    if not mean:
        return Balance(ranks, shares, 1.0, 1.0, 1.0, is_even)
    return Balance(ranks, shares, top / mean, worst, plain / mean, is_even)


def _shares(
    method: Method,
    grid: TokenGrid,
    count: int,
    known: Mapping[str, Sequence[float]],
) -> list[float]:
    mode = getattr(method, "mode", "")
    if isinstance(mode, tuple) and len(mode) == count:
        return [_mode_share(method, one, grid) for one in mode]
    if method.name == "dense" or mode in ("full", "skip"):
        return [0.0 if mode == "skip" else 1.0] * count
    if isinstance(method, GridMethod) and mode != "auto" and not isinstance(mode, tuple):
        return [_grid_share(method, grid)] * count
    if known and phrase(method) in known:
        return [float(known[phrase(method)][1])] * count
    nominal = getattr(method, "density", None)
    return [float(nominal) if isinstance(nominal, float) else 1.0] * count


def _mode_share(method: Method, mode: str, grid: TokenGrid) -> float:
    if mode in ("full", "skip"):
        return float(mode == "full")
    return float(method.mask(grid, mode).computed)  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _grid_share(method: GridMethod, grid: TokenGrid) -> float:
    try:
        return method.mask(grid).computed
    except DitToolsError:  # this grid is not for the method: its call runs dense and says why
        return 1.0


def _loads(work: Sequence[float], owners: Sequence[int], ranks: int) -> list[float]:
    loads = [0.0] * ranks
    for head, rank in enumerate(owners):
        loads[rank] += work[head]
    return loads


def _dealt(phases: Sequence[tuple[float, Sequence[float]]], ranks: int) -> list[int]:
    """Return owners by total work, heaviest head first to the lightest rank with room."""
    heads = len(phases[0][1])
    room = list(capacities(heads, ranks))
    total = [sum(weight * work[head] for weight, work in phases) for head in range(heads)]
    loads, owners = [0.0] * ranks, [0] * heads
    for head in sorted(range(heads), key=lambda h: (-total[h], h)):
        rank = min((r for r in range(ranks) if room[r]), key=lambda r: (loads[r], r))
        owners[head], room[rank] = rank, room[rank] - 1
        loads[rank] += total[head]
    return owners


def _swapped(
    phases: Sequence[tuple[float, Sequence[float]]], owners: list[int], ranks: int
) -> Owners:
    """Return owners after the exchanges of two heads that make the slowest ranks faster."""
    loads = [_loads(work, owners, ranks) for _, work in phases]
    for _ in range(4 * len(owners)):
        gain, pair = 1e-9, None
        for one, other in _pairs(phases, loads, owners):
            found = _gain(phases, loads, owners, one, other)
            if found > gain:
                gain, pair = found, (one, other)
        if pair is None:
            break
        one, other = pair
        for (_, work), load in zip(phases, loads, strict=True):
            apart = work[one] - work[other]
            load[owners[one]] -= apart
            load[owners[other]] += apart
        owners[one], owners[other] = owners[other], owners[one]
    return tuple(owners)


def _pairs(
    phases: Sequence[tuple[float, Sequence[float]]],
    loads: Sequence[Sequence[float]],
    owners: Sequence[int],
) -> list[tuple[int, int]]:
    """Return pairs of heads of which one is with a rank that is the slowest of some phase."""
    slow = {max(range(len(load)), key=lambda r: load[r]) for load in loads}
    mine = [head for head, rank in enumerate(owners) if rank in slow]
    return [(a, b) for a in mine for b, rank in enumerate(owners) if rank != owners[a]]


def _gain(
    phases: Sequence[tuple[float, Sequence[float]]],
    loads: Sequence[Sequence[float]],
    owners: Sequence[int],
    one: int,
    other: int,
) -> float:
    """Return by how much the phases' slowest ranks get faster when two heads change places.

    The spread of the loads breaks ties, so that one of several slowest ranks can be helped.
    """
    gain = 0.0
    for (weight, work), load in zip(phases, loads, strict=True):
        apart = work[one] - work[other]
        a, b = owners[one], owners[other]
        after = list(load)
        after[a], after[b] = load[a] - apart, load[b] + apart
        spread = load[a] ** 2 + load[b] ** 2 - after[a] ** 2 - after[b] ** 2
        gain += weight * (max(load) - max(after) + 1e-6 * spread)
    return gain
