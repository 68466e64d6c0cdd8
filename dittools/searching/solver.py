"""From a budget to a plan: the table, the weights and the constraints behind one function."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from dittools.plans import ModelFacts, Plan
from dittools.searching.allocate import Unreachable, allocate, within_memory
from dittools.searching.candidates import Candidate, is_chooser
from dittools.searching.cost import DEFAULT_BLOCK, CostTable
from dittools.searching.pricing import state_shares
from dittools.searching.request import Constraints
from dittools.searching.table import Table, plan_of, problem_of, reuse_neighbours
from dittools.searching.weigh import to_db


@dataclass(frozen=True)
class Solution:
    """One allocation.

    Attributes:
        plan: its rules.
        choice: int64 [L * P * H], candidate per item.
        density: predicted share of pairs over the run.
        executed: predicted share of pairs that kernels work through, which a density is asked of.
        cost: predicted attention time as a share of dense.
        loss: predicted mean squared pixel error, up to the scale of the weights.
    """

    plan: Plan
    choice: torch.Tensor
    density: float
    executed: float
    cost: float
    loss: float


@dataclass(frozen=True)
class Solver:
    """Solves for any budget.

    Attributes:
        table: errors of all candidates.
        weight: [L, P, H].
        costs: kernel times.
        constraints: what the plan must keep to.
        model: whose plan it is.
        by_time: whether the budget counts attention time instead of pairs worked through.
    """

    table: Table
    weight: torch.Tensor
    costs: CostTable
    constraints: Constraints
    model: ModelFacts
    by_time: bool = False

    def times(self) -> torch.Tensor:
        """Return float64 [L, P, H, C]: time of a candidate as a share of dense, per head."""
        return self._prices[0]

    @cached_property
    def _prices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What a candidate takes for each head [L, P, H, C], and for being used at all [P, C]."""
        found = [self._price(n, c) for n, c in enumerate(self.table.candidates)]
        return torch.stack([f[0] for f in found], -1), torch.stack([f[1] for f in found], -1)

    def _price(self, number: int, candidate: Candidate) -> tuple[torch.Tensor, torch.Tensor]:
        share = self.table.computed[..., number]
        using = torch.zeros(share.shape[1], dtype=share.dtype)
        if candidate.method.name == "dense":
            return torch.ones_like(share), using
        block = int(getattr(candidate.method, "block_size", DEFAULT_BLOCK))
        if not is_chooser(candidate):
            return share.clone().apply_(
                lambda x: self.costs.ratio(x, block) + self.costs.check_ratio
            ), using
        times = torch.empty_like(share)
        for part in range(share.shape[1]):
            lines = {
                x: self._line(candidate, part, x) for x in _near(share[:, part]).unique().tolist()
            }
            times[:, part] = _near(share[:, part]).apply_(lambda x, known=lines: known[x][0])
            using[part] = sum(line[1] for line in lines.values()) / len(lines)
        return times, using

    def _line(self, candidate: Candidate, part: int, computed: float) -> tuple[float, float]:
        """Return what a head takes, next to dense, and what a group takes besides.

        A group is taken to begin anew in every range of steps.
        """
        method, heads = candidate.method, self.model.heads
        sites = self.table.sites
        inside = [s for s in range(sites.steps) if sites.range_of(s) == self.table.part(part)[0]]
        states = state_shares(inside or [0], max(sites.steps, 1))
        timed = [self.costs.group(method, size, states, computed) for size in sorted({1, heads})]
        if None in timed:
            block = int(getattr(method, "block_size", DEFAULT_BLOCK))
            return self.costs.ratio(computed, block) + self.costs.check_ratio, 0.0
        one, every = (sum(pair) for pair in (timed[0], timed[-1]) if pair is not None)
        slope = (every - one) / (heads - 1) if heads > 1 else every
        if not 0 < slope <= every / heads:  # more heads cost more than in proportion
            slope = every / heads
        return slope * heads + self.costs.check_ratio, max(every - slope * heads, 0.0)

    def openings(self) -> torch.Tensor | None:
        """Return float64 [L * P]: what one more method in a layer at one time takes."""
        if not self.costs.split_ratio:
            return None
        layers = self.table.shape[0]
        steps = self.table.range_weight()
        share = self.costs.split_ratio * steps / (steps.sum() * layers)
        return share.repeat(layers)

    def uses(self) -> torch.Tensor | None:
        """Return float64 [L * P, C]: what a candidate takes for however many heads of a layer."""
        if not bool(self._prices[1].any()):
            return None
        layers = self.table.shape[0]
        steps = self.table.range_weight()
        return (self._prices[1] * (steps / (steps.sum() * layers))[:, None]).repeat(layers, 1)

    def prices(self) -> torch.Tensor:
        """Return float64 [L, P, H, C]: what the budget counts, of a candidate all heads use."""
        if not self.by_time:
            return self.table.executed()
        times, using = self._prices
        return times + using[None, :, None] / self.table.shape[2]

    def solve(self, budget: float) -> Solution:
        """Return the best plan that works through at most the budget of pairs (or of time).

        Raises:
            Unreachable: the cheapest plan costs more.
        """
        by_pairs = problem_of(self.table, self.weight, self.table.executed(), self.constraints)
        kept = problem_of(self.table, self.weight, self.table.density, self.constraints)
        by_time = problem_of(self.table, self.weight, self.times(), self.constraints)
        by_time = replace(by_time, opening=self.openings(), using=self.uses())
        problem = by_time if self.by_time else by_pairs
        if self.constraints.mask_bytes:
            sizes = [c.mask_bytes for c in self.table.candidates]
            choice = within_memory(problem, budget, sizes, self.constraints.mask_bytes)
        else:
            choice = allocate(problem, budget)
        if self.constraints.reuse:
            shape = self.table.shape
            choice = reuse_neighbours(problem, choice, shape, self.constraints.reuse, budget)
        plan = plan_of(self.table, choice, self.model)
        return Solution(
            plan,
            choice,
            kept.total_cost(choice),
            by_pairs.total_cost(choice),
            by_time.total_cost(choice),
            problem.total_loss(choice),
        )

    def reachable(self, budget: float) -> float:
        """Return the budget, or what the cheapest plan costs where that is more."""
        try:
            self.solve(budget)
        except Unreachable as error:
            return error.least
        return budget

    def frontier(self, budgets: Sequence[float]) -> list[Solution]:
        """Return the solutions of the budgets that can be met."""
        found = []
        for budget in budgets:
            try:
                found.append(self.solve(budget))
            except Unreachable:
                continue
        return found

    def single(self, number: int) -> Solution:
        """Return one candidate on every layer, head and step."""
        layers, parts, heads = self.table.shape
        choice = torch.full((layers * parts * heads,), number, dtype=torch.int64)
        free = problem_of(self.table, self.weight, self.table.density, Constraints())
        pairs = problem_of(self.table, self.weight, self.table.executed(), Constraints())
        timed = problem_of(self.table, self.weight, self.times(), Constraints())
        timed = replace(timed, using=self.uses())
        return Solution(
            Plan.of(self.table.candidates[number].method),
            choice,
            free.total_cost(choice),
            pairs.total_cost(choice),
            timed.total_cost(choice),
            free.total_loss(choice),
        )


def _near(share: torch.Tensor) -> torch.Tensor:
    """Return shares rounded to thousandths, so that few differ."""
    return (share.nan_to_num(1.0) * 1000).round() / 1000


@dataclass(frozen=True)
class Predictor:
    """Predicted PSNR of a loss: the sum of isolated errors, rescaled by one joint run.

    Attributes:
        offset_db: what the joint run was better than the sum said; errors are not additive.
    """

    offset_db: float

    @staticmethod
    def fitted(loss: float, psnr_db: float) -> "Predictor":
        """Return the predictor that is right about one measured plan."""
        return Predictor(psnr_db - to_db(loss))

    def psnr_db(self, loss: float) -> float:
        """Return the predicted PSNR, capped at 120."""
        return min(to_db(loss) + self.offset_db, 120.0) if loss > 0 else 120.0
