"""The table of errors a calibration leaves, the problem it poses, and the plan of a choice."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from dittools.plans import ModelFacts, Plan, Rule
from dittools.searching.allocate import Problem
from dittools.searching.candidates import Candidate
from dittools.searching.probe import Sites
from dittools.searching.request import Constraints
from dittools.searching.store import Result


@dataclass(frozen=True)
class Table:
    """Means over prompts and sampled steps.

    Attributes:
        candidates: dense first, densities filled in where they were measured.
        sites: what was looked at.
        error: float64 [L, R, H, C] mean squared error per query, behind the output projection.
        by_branch: the same, [L, R, branches, H, C], 0 where a branch was not seen.
        norm: [L, R, H] mean squared norm of the dense output, alike.
        bands: [L, R, H, bands] attention mass in each band.
        maps: [L, R, H, side, side] rows sum to 1 over a row of the map.
    """

    candidates: list[Candidate]
    sites: Sites
    error: torch.Tensor
    by_branch: torch.Tensor
    norm: torch.Tensor
    bands: torch.Tensor
    maps: torch.Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, step ranges, heads)."""
        return int(self.norm.shape[0]), int(self.norm.shape[1]), int(self.norm.shape[2])

    def densities(self) -> torch.Tensor:
        """Return float64 [C]."""
        return torch.tensor([c.density for c in self.candidates], dtype=torch.float64)

    def range_weight(self) -> torch.Tensor:
        """Return float64 [R]: steps of the run in each range."""
        return torch.tensor(self.sites.range_steps, dtype=torch.float64)


def merge(results: Sequence[Result], candidates: Sequence[Candidate], sites: Sites) -> Table:
    """Return the table of several calibration generations; the order does not matter."""
    total = {name: sum(result[name].double() for result in results) for name in results[0]}
    tensors: dict[str, torch.Tensor] = {n: torch.as_tensor(t) for n, t in total.items()}
    calls = tensors["calls"]  # [L, R, branches]
    each = calls.clamp(min=1)
    every = calls.sum(dim=2).clamp(min=1)
    rows = tensors["bands"].new_tensor(float(len(sites.rows)))
    maps = tensors["maps"]
    return Table(
        [_with_density(c, tensors["density"][:, n]) for n, c in enumerate(candidates)],
        sites,
        tensors["error"].sum(dim=2) / every[..., None, None],
        tensors["error"] / each[..., None, None],
        tensors["norm"].sum(dim=2) / every[..., None],
        tensors["bands"] / (every * rows)[..., None, None],
        maps / maps.sum(dim=-1, keepdim=True).clamp(min=1e-30),
    )


def _with_density(candidate: Candidate, measured: torch.Tensor) -> Candidate:
    """Fill in the density of a candidate that looks at query and key: its mean over calls."""
    if float(measured[1]) == 0:
        return candidate
    density = float(measured[0] / measured[1])
    return replace(candidate, density=density, computed=density)


def flat_weights(table: Table) -> torch.Tensor:
    """Return [L, R]: every layer's relative error counts alike."""
    return 1 / table.norm.sum(dim=2).clamp(min=1e-30)


def problem_of(
    table: Table, weight: torch.Tensor, cost: torch.Tensor, constraints: Constraints
) -> Problem:
    """Return the allocation problem; items run over layers, then ranges, then heads.

    Args:
        table: errors.
        weight: [L, R], harm per squared error of one step.
        cost: [C], cost of a candidate as a share of dense; the total is the mean over the run.
        constraints: layers and heads that stay dense, methods left out, kernels per layer.
    """
    layers, ranges, heads = table.shape
    count = len(table.candidates)
    steps = table.range_weight()
    loss = table.error * (weight * steps)[:, :, None, None]
    share = (steps / (steps.sum() * layers * heads))[None, :, None, None]
    allowed = torch.isfinite(loss)
    loss = torch.where(allowed, loss, 0.0)
    banned = torch.tensor(
        [
            c.method.name in constraints.exclude and c.method.name != "dense"
            for c in table.candidates
        ]
    )
    allowed = allowed & ~banned
    pinned = torch.zeros((layers, heads), dtype=torch.bool)
    for layer in constraints.dense_layers:
        pinned[layer] = True
    for layer, head in constraints.dense_heads:
        pinned[layer, head] = True
    allowed[..., 1:] &= ~pinned[:, None, :, None]
    group = torch.arange(layers * ranges)[:, None].expand(-1, heads)
    return Problem(
        loss.reshape(-1, count),
        (cost * share).expand(layers, ranges, heads, -1).reshape(-1, count),
        group.reshape(-1),
        allowed.reshape(-1, count),
        constraints.distinct,
    )


def reuse_neighbours(
    problem: Problem, choice: torch.Tensor, shape: tuple[int, int, int], share: float, budget: float
) -> torch.Tensor:
    """Return a choice in which layers copy their predecessor where that adds little error.

    A layer copies in a step range when its predicted loss grows by at most `share` of it and the
    budget still holds; methods that choose by looking then choose alike.
    """
    layers, ranges, heads = shape
    choice = choice.clone()
    items = torch.arange(layers * ranges * heads).view(shape)
    for layer in range(1, layers):
        for part in range(ranges):
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
    only: tuple[int, int] | None = None,
) -> Plan:
    """Return the plan of a choice; dense needs no rule.

    Args:
        table: what the choice indexes.
        choice: int64 [L * R * H].
        model: whose plan it is; its site paths are left to the layer numbers.
        only: (layer, range) to act on, all else dense.
    """
    layers, ranges, heads = table.shape
    grid = choice.view(layers, ranges, heads)
    found: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for layer in range(layers):
        runs: dict[tuple[int, int], tuple[int, ...]] = {}
        for part in range(ranges):
            is_other = only is not None and (layer, part) != only
            if is_other or not table.sites.range_steps[part]:
                continue
            for number in sorted(set(grid[layer, part].tolist()) - {0}):
                members = (grid[layer, part] == number).nonzero().flatten().tolist()
                runs[part, number] = tuple(members)
        for parts, number, members_ in _joined(runs):
            found.setdefault((number, members_, parts), []).append(layer)
    ordered = sorted(found.items(), key=lambda item: (item[1], item[0][2], item[0][0]))
    rules = [
        Rule(
            table.candidates[number].method,
            layers=tuple(where),
            heads="all" if len(members) == heads else members,
            steps=_edges(table, parts),
        )
        for (number, members, parts), where in ordered
    ]
    return Plan(tuple(rules), model=replace(model, paths=()))


def _joined(
    runs: dict[tuple[int, int], tuple[int, ...]],
) -> list[tuple[tuple[int, ...], int, tuple[int, ...]]]:
    """Join neighbouring step ranges in which the same heads run the same candidate."""
    out: list[tuple[tuple[int, ...], int, tuple[int, ...]]] = []
    for (part, number), members in sorted(runs.items(), key=lambda item: (item[0][1], item[0][0])):
        if out and out[-1][1:] == (number, members) and out[-1][0][-1] == part - 1:
            out[-1] = ((*out[-1][0], part), number, members)
        else:
            out.append(((part,), number, members))
    return out


def _edges(table: Table, parts: tuple[int, ...]) -> Literal["all"] | tuple[float, float]:
    edges = table.sites.ranges
    first, last = edges[parts[0]], edges[parts[-1] + 1]
    return "all" if (first, last) == (0, 1) else (first, last)
