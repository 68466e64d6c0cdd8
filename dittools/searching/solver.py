"""From a budget to a plan: the table, the weights and the constraints behind one function."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dittools.plans import ModelFacts, Plan
from dittools.searching.allocate import Unreachable, allocate, within_memory
from dittools.searching.candidates import Candidate
from dittools.searching.cost import CostTable
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
        cost: predicted attention time as a share of dense.
        loss: predicted mean squared pixel error, up to the scale of the weights.
    """

    plan: Plan
    choice: torch.Tensor
    density: float
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
        by_time: whether the budget counts attention time instead of density.
    """

    table: Table
    weight: torch.Tensor
    costs: CostTable
    constraints: Constraints
    model: ModelFacts
    by_time: bool = False

    def times(self) -> torch.Tensor:
        """Return float64 [L, P, H, C]: time of a candidate as a share of dense."""
        return torch.stack([self._time(n, c) for n, c in enumerate(self.table.candidates)], dim=-1)

    def _time(self, number: int, candidate: Candidate) -> torch.Tensor:
        share = self.table.computed[..., number]
        if candidate.method.name == "dense":
            return torch.ones_like(share)
        block = int(getattr(candidate.method, "block_size", 128))
        choosing = self.costs.choosing(candidate.method.name)
        return share.clone().apply_(lambda x: self.costs.ratio(x, block) + choosing)

    def openings(self) -> torch.Tensor | None:
        """Return float64 [L * P]: what one more method in a layer at one time takes."""
        if not self.costs.split_ratio:
            return None
        layers = self.table.shape[0]
        steps = self.table.range_weight()
        share = self.costs.split_ratio * steps / (steps.sum() * layers)
        return share.repeat(layers)

    def solve(self, budget: float) -> Solution:
        """Return the best plan whose density (or time share) is at most the budget.

        Raises:
            Unreachable: the cheapest plan costs more.
        """
        by_density = problem_of(self.table, self.weight, self.table.density, self.constraints)
        by_time = problem_of(self.table, self.weight, self.times(), self.constraints)
        by_time = replace(by_time, opening=self.openings())
        problem = by_time if self.by_time else by_density
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
            by_density.total_cost(choice),
            by_time.total_cost(choice),
            problem.total_loss(choice),
        )

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
        timed = problem_of(self.table, self.weight, self.times(), Constraints())
        return Solution(
            Plan.of(self.table.candidates[number].method),
            choice,
            free.total_cost(choice),
            timed.total_cost(choice),
            free.total_loss(choice),
        )


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
