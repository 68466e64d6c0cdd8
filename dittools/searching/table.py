"""The table of errors a calibration leaves, the problem it poses, and the plan of a choice."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from dittools.plans import ModelFacts, Plan, Rule
from dittools.searching.allocate import Problem
from dittools.searching.candidates import Candidate
from dittools.searching.probe import BRANCHES, Sites
from dittools.searching.request import Constraints
from dittools.searching.store import Result

Branch = Literal["all", "cond", "uncond"]
# mean share of pairs worked through between which candidates of a first look are compared
_LEAST_SPENT, _MOST_SPENT = 0.03, 0.95


@dataclass(frozen=True)
class Table:
    """Means over prompts and sampled steps, by part: a step range, of one branch when split.

    Attributes:
        candidates: dense first, densities filled in where they were measured.
        sites: what was looked at.
        error: float64 [L, P, H, C] mean squared error per query, behind the output projection.
        by_branch: the same, [L, R, branches, H, C], 0 where a branch was not seen.
        norm: [L, P, H] mean squared norm of the dense output, alike.
        bands: [L, R, H, bands] attention mass in each band.
        maps: [L, R, H, side, side] rows sum to 1 over a row of the map.
        density: [L, P, H, C] share of pairs kept; heads of one method may keep different shares.
        computed: [L, P, H, C] share of blocks visited.
        active: bool [C], candidates a plan may use; the others lost in a first, shorter look.
        branches: ("all",), or the branches that parts are split into.
        results: what was measured, to split by.
    """

    candidates: list[Candidate]
    sites: Sites
    error: torch.Tensor
    by_branch: torch.Tensor
    norm: torch.Tensor
    bands: torch.Tensor
    maps: torch.Tensor
    density: torch.Tensor
    computed: torch.Tensor
    active: torch.Tensor
    branches: tuple[Branch, ...] = ("all",)
    results: tuple[Result, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, parts, heads)."""
        return int(self.norm.shape[0]), int(self.norm.shape[1]), int(self.norm.shape[2])

    def part(self, number: int) -> tuple[int, Branch]:
        """Return step range and branch of a part."""
        return number // len(self.branches), self.branches[number % len(self.branches)]

    def densities(self) -> torch.Tensor:
        """Return float64 [C]: means over heads and parts."""
        return torch.tensor([c.density for c in self.candidates], dtype=torch.float64)

    def executed(self) -> torch.Tensor:
        """Return float64 [L, P, H, C]: share of pairs worked through, no less than those kept.

        Kernels work through whole blocks: one of which few pairs are kept costs what it holds.
        """
        return torch.maximum(self.density, self.computed)

    def range_weight(self) -> torch.Tensor:
        """Return float64 [P]: steps of the run in each part, a step of one branch counting half."""
        return _steps(self.sites, len(self.branches))

    def seen(self) -> torch.Tensor:
        """Return bool [L, P]: where something was measured; a part without steps never is."""
        return self.norm.sum(dim=2) > 0

    def joint(self) -> "Table | None":
        """Return the table in which all heads of a layer keep to one method; None without any."""
        together = torch.tensor([c.together for c in self.candidates])
        if not bool((together & self.active).any()):
            return None
        dense = torch.tensor([c.method.name == "dense" for c in self.candidates])
        return replace(self, active=self.active & (together | dense))

    def split(self) -> "Table | None":
        """Return the table whose parts are step ranges of one branch; None without two branches."""
        seen = [
            b for n, b in enumerate(BRANCHES) if bool((_sum(self.results, "calls")[:, :, n]).any())
        ]
        if len(self.branches) > 1 or set(seen) != {"cond", "uncond"}:
            return None
        return _table(self.results, self.candidates, self.sites, self.active, split=True)


def merge(
    results: Sequence[Result],
    candidates: Sequence[Candidate],
    sites: Sites,
    scouted: Table | None = None,
    active: Sequence[int] | None = None,
) -> Table:
    """Return the table of several calibration generations; the order does not matter.

    Args:
        results: of the probe.
        candidates: dense first.
        sites: what was looked at.
        scouted: an earlier table of all candidates, from fewer rows and steps.
        active: candidates that were measured; the others keep what was scouted.
    """
    chosen = torch.ones(len(candidates), dtype=torch.bool)
    if active is not None:
        chosen[:] = False
        chosen[[0, *active]] = True
    found = _table(tuple(results), list(candidates), sites, chosen, split=False)
    if scouted is None:
        return found
    error, density, computed = (
        torch.where(chosen, getattr(found, n), getattr(scouted, n))
        for n in ("error", "density", "computed")
    )
    both = [
        m if a else s for m, s, a in zip(found.candidates, scouted.candidates, chosen, strict=True)
    ]
    by_branch = torch.where(chosen, found.by_branch, scouted.by_branch)
    return replace(
        found, candidates=both, error=error, density=density, computed=computed, by_branch=by_branch
    )


def _sum(results: Sequence[Result], name: str) -> torch.Tensor:
    return torch.stack([result[name].double() for result in results]).sum(dim=0)


def _table(
    results: tuple[Result, ...],
    candidates: list[Candidate],
    sites: Sites,
    active: torch.Tensor,
    split: bool,
) -> Table:
    names = ("error", "norm", "calls", "density", "computed", "bands", "maps")
    sums = {name: _sum(results, name) for name in names}
    calls = sums["calls"]  # [L, R, branches]
    every = calls.sum(dim=2).clamp(min=1)
    branches: tuple[Branch, ...] = ("cond", "uncond") if split else ("all",)

    def mean(name: str) -> torch.Tensor:
        total = sums[name]
        if not split:
            return total.sum(dim=2) / _like(every, total[:, :, 0])
        where = [BRANCHES.index(b) for b in branches]
        return (total / _like(calls.clamp(min=1), total))[:, :, where].flatten(1, 2)

    rows = float(len(sites.rows))
    maps = sums["maps"]
    density, computed = mean("density"), mean("computed")
    density[..., 0], computed[..., 0] = 1.0, 1.0
    known = (mean("norm").sum(dim=2) > 0) * _steps(sites, len(branches))
    over = [_over_run(t, known) for t in (density, computed)]
    return Table(
        [_with_density(c, float(over[0][n]), float(over[1][n])) for n, c in enumerate(candidates)],
        sites,
        mean("error"),
        sums["error"] / _like(calls.clamp(min=1), sums["error"]),
        mean("norm"),
        sums["bands"] / (every * rows)[..., None, None],
        maps / maps.sum(dim=-1, keepdim=True).clamp(min=1e-30),
        density,
        computed,
        active,
        branches,
        results,
    )


def _like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return a tensor with ones appended to its shape."""
    return tensor.view(*tensor.shape, *[1] * (other.dim() - tensor.dim()))


def _steps(sites: Sites, branches: int) -> torch.Tensor:
    """Return float64 [P]: steps of the run in each part, a step of one branch counting half."""
    steps = torch.tensor(sites.range_steps, dtype=torch.float64)
    return steps.repeat_interleave(branches) / branches


def _over_run(share: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return [C]: the mean of [L, P, H, C] over heads and, by weights [L, P], over the run."""
    total = (share.mean(dim=2) * weight[..., None]).sum(dim=(0, 1))
    return total / weight.sum().clamp(min=1e-30)


def _with_density(candidate: Candidate, density: float, computed: float) -> Candidate:
    """Fill in the density of a candidate that looks at query and key: its mean over the run."""
    if candidate.mask is not None or candidate.method.name == "dense":
        return candidate
    return replace(candidate, density=density, computed=computed)


def flat_weights(table: Table) -> torch.Tensor:
    """Return [L, P, H]: every layer's relative error counts alike."""
    layer = 1 / table.norm.sum(dim=2).clamp(min=1e-30)
    return layer[..., None].expand(table.shape).contiguous()


def problem_of(
    table: Table, weight: torch.Tensor, cost: torch.Tensor, constraints: Constraints
) -> Problem:
    """Return the allocation problem; items run over layers, then parts, then heads.

    Args:
        table: errors.
        weight: [L, P, H], harm per squared error of one step.
        cost: [L, P, H, C] as a share of dense; the total is the mean over the run.
        constraints: layers and heads that stay dense, methods left out, kernels per layer.
    """
    layers, parts, heads = table.shape
    count = len(table.candidates)
    steps = table.range_weight()
    loss = table.error * weight[..., None] * steps[:, None, None]
    share = (steps / (steps.sum() * layers * heads))[None, :, None, None]
    allowed = torch.isfinite(loss)
    loss = torch.where(allowed, loss, 0.0)
    banned = torch.tensor(
        [
            c.method.name in constraints.exclude and c.method.name != "dense"
            for c in table.candidates
        ]
    )
    allowed = allowed & ~banned & table.active
    pinned = torch.zeros((layers, heads), dtype=torch.bool)
    for layer in constraints.dense_layers:
        pinned[layer] = True
    for layer, head in constraints.dense_heads:
        pinned[layer, head] = True
    allowed[..., 1:] &= ~pinned[:, None, :, None]
    allowed[..., 1:] &= table.seen()[..., None, None]  # of what was not looked at nothing is known
    group = torch.arange(layers * parts)[:, None].expand(-1, heads)
    together = torch.tensor([c.together for c in table.candidates])
    return Problem(
        loss.reshape(-1, count),
        (cost * share).reshape(-1, count),
        group.reshape(-1),
        allowed.reshape(-1, count),
        constraints.distinct,
        together=together if bool(together.any()) else None,
    )


def survivors(table: Table, cost: torch.Tensor | None = None, most: int = 30) -> list[int]:
    """Return the candidates that would be first or second choice of some head at some price.

    Of those that heads use together, the first choice of some layer counts for all its heads.

    Prices run from that at which hardly anything is worth its cost to that at which nearly all
    heads are dense; a candidate that is only ever second counts half. The cheapest one that can run
    everywhere always stays: it decides what can be reached.

    Args:
        table: of a first look.
        cost: [L, P, H, C] of each candidate, as a share of dense; by default the share of pairs
            worked through.
        most: the number kept; those chosen most often stay.
    """
    seen = table.seen().flatten()
    loss = (table.error * flat_weights(table)[..., None]).flatten(0, 1)[seen].flatten(0, 1)
    cost = (table.executed() if cost is None else cost).flatten(0, 1)[seen].flatten(0, 1)
    loss = torch.where(torch.isfinite(loss), loss, float("inf"))
    votes = torch.zeros(loss.shape[1], dtype=torch.int64)
    heads = table.shape[2]
    together = torch.tensor([c.together for c in table.candidates]).nonzero().flatten()
    finite = loss[:, 1:][torch.isfinite(loss[:, 1:])]
    if not len(finite):  # nothing was looked at, or nothing can run
        return []
    typical = float(finite.median().clamp(min=1e-30))
    for halves in range(-40, 41):
        price = loss + typical * 2.0 ** (halves / 2) * cost
        best = price.topk(min(2, price.shape[1]), dim=1, largest=False).indices
        spent = float(cost.gather(1, best[:, :1]).mean())
        if not _LEAST_SPENT <= spent <= _MOST_SPENT:
            continue
        for place, weight in enumerate((2, 1)[: best.shape[1]]):
            votes += weight * torch.bincount(best[:, place], minlength=len(votes))
        if len(together):
            every = price[:, together].unflatten(0, (-1, heads)).sum(dim=1)
            chosen = together[every.argmin(dim=1)][every.isfinite().any(dim=1)]
            votes += 2 * heads * torch.bincount(chosen, minlength=len(votes))
    ranked = [int(n) for n in votes.argsort(descending=True, stable=True) if votes[n] and n]
    least = cost.mean(dim=0).masked_fill(~torch.isfinite(loss).all(dim=0), float("inf"))
    cheapest = int(least.argmin())
    ranked = [cheapest] * (cheapest > 0) + [n for n in ranked if n != cheapest]
    return sorted(ranked[:most])


def reuse_neighbours(
    problem: Problem, choice: torch.Tensor, shape: tuple[int, int, int], share: float, budget: float
) -> torch.Tensor:
    """Return a choice in which layers copy their predecessor where that adds little error.

    A layer copies in a step range when its predicted loss grows by at most `share` of it and the
    budget still holds; methods that choose by looking then choose alike.
    """
    layers, parts, heads = shape
    choice = choice.clone()
    items = torch.arange(layers * parts * heads).view(shape)
    for layer in range(1, layers):
        for part in range(parts):
            mine, theirs = items[layer, part], items[layer - 1, part]
            copied = choice[theirs]
            if torch.equal(copied, choice[mine]) or not bool(problem.allowed[mine, copied].all()):
                continue
            now, then = problem.loss[mine, choice[mine]].sum(), problem.loss[mine, copied].sum()
            changed = choice.clone()
            changed[mine] = copied
            if then <= now * (1 + share) and problem.total_cost(changed) <= budget:
                choice = changed
    return choice


def plan_of(
    table: Table,
    choice: torch.Tensor,
    model: ModelFacts,
    only: tuple[int | None, int | None] = (None, None),
) -> Plan:
    """Return the plan of a choice; dense needs no rule.

    Args:
        table: what the choice indexes.
        choice: int64 [L * P * H].
        model: whose plan it is; its site paths are left to the layer numbers.
        only: (layer, part) to act on, all else dense; None for all of them.
    """
    layers, parts, heads = table.shape
    grid = choice.view(layers, parts, heads)
    found: dict[tuple[int, tuple[int, ...], tuple[int, ...], Branch], list[int]] = {}
    for layer in range(layers):
        runs: dict[tuple[int, int, Branch], tuple[int, ...]] = {}
        for part in range(parts):
            is_other = only[0] not in (None, layer) or only[1] not in (None, part)
            span, branch = table.part(part)
            if is_other or not table.sites.range_steps[span]:
                continue
            for number in sorted(set(grid[layer, part].tolist()) - {0}):
                members = (grid[layer, part] == number).nonzero().flatten().tolist()
                runs[span, number, branch] = tuple(members)
        for spans, number, members_, branch in _joined(_both(runs)):
            found.setdefault((number, members_, spans, branch), []).append(layer)
    ordered = sorted(found.items(), key=lambda item: (item[1], item[0][2], item[0][3], item[0][0]))
    rules = [
        Rule(
            table.candidates[number].method,
            layers=tuple(where),
            heads="all" if len(members) == heads else members,
            steps=_edges(table, spans),
            branch=branch,
        )
        for (number, members, spans, branch), where in ordered
    ]
    return Plan(tuple(rules), model=replace(model, paths=()))


def _both(
    runs: dict[tuple[int, int, Branch], tuple[int, ...]],
) -> dict[tuple[int, int, Branch], tuple[int, ...]]:
    """Join the branches of a step range in which the same heads run the same candidate."""
    out = dict(runs)
    for (span, number, branch), members in runs.items():
        if branch == "cond" and runs.get((span, number, "uncond")) == members:
            del out[span, number, "cond"], out[span, number, "uncond"]
            out[span, number, "all"] = members
    return out


def _joined(
    runs: dict[tuple[int, int, Branch], tuple[int, ...]],
) -> list[tuple[tuple[int, ...], int, tuple[int, ...], Branch]]:
    """Join neighbouring step ranges in which the same heads run the same candidate."""
    out: list[tuple[tuple[int, ...], int, tuple[int, ...], Branch]] = []
    last: dict[tuple[int, tuple[int, ...], Branch], int] = {}
    for (span, number, branch), members in sorted(runs.items()):
        at = last.get((number, members, branch), -1)
        if at >= 0 and out[at][0][-1] == span - 1:
            out[at] = ((*out[at][0], span), number, members, branch)
            continue
        last[number, members, branch] = len(out)
        out.append(((span,), number, members, branch))
    return out


def _edges(table: Table, spans: tuple[int, ...]) -> Literal["all"] | tuple[float, float]:
    edges = table.sites.ranges
    first, last = edges[spans[0]], edges[spans[-1] + 1]
    return "all" if (first, last) == (0, 1) else (first, last)
