"""Choosing one candidate per head and step range: least predicted error within a budget."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dittools.errors import InputError


class Unreachable(InputError):
    """A budget below the cheapest choice; `least` is that choice's cost."""

    least: float = 0.0


_HALVINGS = 80  # of the multiplier's logarithm: finer than any two slopes can differ


@dataclass(frozen=True)
class Problem:
    """One choice per item; float64 throughout.

    Attributes:
        loss: [I, C] predicted harm of each candidate at each item.
        cost: [I, C] what it costs; the total over items is bounded by the budget.
        group: int64 [I], items of one group run in one layer at one time.
        allowed: bool [I, C]; every item must keep one.
        distinct: most candidates one group may use; 0 for any number.
        opening: [G] cost of every candidate a group uses beyond its first; None for none.
        using: [G, C] cost of a candidate that a group uses, for however many items; None for none.
        together: bool [C], candidates that all items of a group take or none: what one keeps
            depends on the others. None where there are none.
    """

    loss: torch.Tensor
    cost: torch.Tensor
    group: torch.Tensor
    allowed: torch.Tensor
    distinct: int = 0
    opening: torch.Tensor | None = None
    using: torch.Tensor | None = None
    together: torch.Tensor | None = None

    def total_cost(self, choice: torch.Tensor) -> float:
        """Return the cost of a choice, what its further candidates per group take included."""
        cost = float(self.cost.gather(1, choice[:, None]).sum())
        if self.opening is None and self.using is None:
            return cost
        return cost + float(self.extra_cost(choice).sum())

    def used(self, choice: torch.Tensor) -> torch.Tensor:
        """Return bool [G, C]: the candidates each group runs."""
        used = torch.zeros((int(self.group.max()) + 1, self.cost.shape[1]), dtype=torch.bool)
        used[self.group, choice] = True
        return used

    def extra_cost(self, choice: torch.Tensor) -> torch.Tensor:
        """Return float64 [G]: what a group's candidates cost besides its items."""
        used = self.used(choice)
        extra = torch.zeros(len(used), dtype=self.cost.dtype)
        if self.opening is not None:
            extra += self.opening * (used.sum(dim=1) - 1).clamp(min=0)
        if self.using is not None:
            extra += (self.using * used).sum(dim=1)
        return extra

    @property
    def is_grouped(self) -> bool:
        """Whether what an item may use, or pays, depends on the others of its group."""
        return bool(self.distinct) or self.opening is not None or self.using is not None

    def total_loss(self, choice: torch.Tensor) -> float:
        """Return the predicted harm of a choice."""
        return float(self.loss.gather(1, choice[:, None]).sum())


def allocate(problem: Problem, budget: float) -> torch.Tensor:
    """Return int64 [I]: the choice of least loss whose cost stays within the budget.

    One Lagrange multiplier trades loss against cost for all items at once, which is optimal on the
    lower convex hull; what it leaves of the budget is then spent on the steepest single steps.

    Raises:
        Unreachable: even the cheapest choice costs more; says what is reachable.
    """
    cheapest = _at(problem, float("inf"))
    least = problem.total_cost(cheapest)
    if least > budget * (1 + 1e-9):
        error = Unreachable(
            "the target is out of reach",
            expected=f"a budget of at least {least:.4g} with these methods and constraints",
            got=f"{budget:.4g}",
            remedy="more methods, fewer pinned layers, or a looser target",
        )
        error.least = least
        raise error
    free = _at(problem, 0.0)
    if problem.total_cost(free) <= budget:
        return free
    low, high = -60.0, 60.0  # log2 of the multiplier, in units of loss over cost
    unit = float(problem.loss.max().clamp(min=1e-300)) / float(problem.cost.max())
    best = cheapest
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        choice = _at(problem, unit * 2.0**middle)
        if problem.total_cost(choice) <= budget:
            best, high = choice, middle
        else:
            low = middle
    return _spend_rest(problem, best, budget)


def _at(problem: Problem, multiplier: float) -> torch.Tensor:
    """Return the best choice at one price; infinity means cost alone, ties go to less cost."""
    if multiplier == float("inf"):
        price = problem.cost + problem.loss * 1e-12 / problem.loss.max().clamp(min=1e-300)
        multiplier = 1.0
    else:
        price = problem.loss + multiplier * problem.cost
    price = price.masked_fill(~problem.allowed, float("inf"))
    if problem.together is None:
        return _apart(problem, price, multiplier)
    alone = price.masked_fill(problem.together, float("inf"))
    choice = _apart(problem, alone, multiplier)
    return _joined(problem, price, alone, choice, multiplier)


def _apart(problem: Problem, price: torch.Tensor, multiplier: float) -> torch.Tensor:
    """Return the best choice of every item for itself."""
    if not problem.is_grouped:
        return price.argmin(dim=1)
    choice = torch.empty(len(price), dtype=torch.int64)
    for group in problem.group.unique().tolist():
        members = (problem.group == group).nonzero().flatten()
        extra = 0.0 if problem.opening is None else multiplier * float(problem.opening[group])
        using = None if problem.using is None else multiplier * problem.using[group]
        choice[members] = _few(price[members], problem.distinct or len(members), extra, using)
    return choice


def _joined(
    problem: Problem,
    price: torch.Tensor,
    alone: torch.Tensor,
    choice: torch.Tensor,
    multiplier: float,
) -> torch.Tensor:
    """Return a choice in which groups take one candidate together where that is better."""
    assert problem.together is not None
    which = problem.together.nonzero().flatten()
    paid = multiplier * problem.extra_cost(choice)
    every = torch.zeros((len(paid), len(which)), dtype=price.dtype)
    if problem.using is not None:
        every = multiplier * problem.using[:, which]
    paid = paid.index_add(0, problem.group, alone.gather(1, choice[:, None])[:, 0])
    every = every.index_add(0, problem.group, price[:, which])
    best = every.min(dim=1)
    better = (best.values < paid)[problem.group]
    return torch.where(better, which[best.indices][problem.group], choice)


def _few(
    price: torch.Tensor, distinct: int, opening: float = 0.0, using: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the best choice of a group that uses at most so many candidates, found greedily.

    Every candidate after the first must save more than `opening` and what using it takes.

    Args:
        price: [I, C].
        distinct: most candidates.
        opening: price of every candidate beyond the first.
        using: [C], price of a candidate for however many items; None for none.
    """
    fee = torch.zeros_like(price[0]) if using is None else using
    chosen: list[int] = []
    best = torch.full((len(price),), float("inf"), dtype=price.dtype)
    for _ in range(min(distinct, price.shape[1])):
        total = torch.minimum(best[:, None], price).sum(dim=0) + fee
        total[chosen] = float("inf")
        pick = int(total.argmin())
        if chosen and float(best.sum() - total[pick]) <= opening:
            break
        chosen.append(pick)
        best = torch.minimum(best, price[:, pick])
    part = price[:, chosen]
    return torch.tensor(chosen)[part.argmin(dim=1)]


def _spend_rest(problem: Problem, choice: torch.Tensor, budget: float) -> torch.Tensor:
    """Take single steps of the largest gain per cost while they fit the budget."""
    choice = choice.clone()
    items = torch.arange(len(choice))
    for _ in range(len(choice) * 4):
        slack = budget - problem.total_cost(choice)
        allowed = problem.allowed
        if problem.is_grouped:  # what the item's group runs already
            allowed = allowed & problem.used(choice)[problem.group]
        if problem.together is not None:  # whole groups move there and back, no single item
            allowed = allowed & ~problem.together & ~problem.together[choice][:, None]
        gain = problem.loss[items, choice][:, None] - problem.loss
        extra = problem.cost - problem.cost[items, choice][:, None]
        fits = allowed & (gain > 0) & (extra <= slack + 1e-12)
        if not bool(fits.any()):
            break
        slope = torch.where(fits, gain / extra.clamp(min=1e-12), -1.0)
        at = int(slope.argmax())
        choice[at // slope.shape[1]] = at % slope.shape[1]
    return choice


def within_memory(
    problem: Problem, budget: float, mask_bytes: Sequence[int], limit: int
) -> torch.Tensor:
    """Return the choice of `allocate` whose distinct masks together fit a memory limit.

    While they do not, the mask is given up whose heads lose least per byte freed.

    Raises:
        InputError: the budget cannot be kept within the memory.
    """
    allowed = problem.allowed.clone()
    while True:
        current = replace(problem, allowed=allowed)
        choice = allocate(current, budget)
        used = [int(c) for c in choice.unique()]
        if sum(mask_bytes[c] for c in used) <= limit:
            return choice
        users = {c: (choice == c).sum().item() / mask_bytes[c] for c in used if mask_bytes[c]}
        allowed[:, min(users, key=lambda c: (users[c], c))] = False
        if not bool(allowed.any(dim=1).all()):
            raise InputError(
                "no plan fits the mask memory", got=f"{limit} bytes", remedy="a larger limit"
            )
