"""What PAROAttention's calibrated tables are made of: order scores and block masses of true maps.

Two passes over the same prompts keep memory bounded: the first one adds up three numbers per layer,
head and order, the second one the block masses of the chosen orders alone. Maps are streamed, one
head and some query rows at a time.

Source: arXiv:2506.16054, whose calibration is not published. Differences: scores are averaged over
the maps looked at rather than taken of the averaged map, which would need six masses per head; the
paper's block metrics are an option, attention mass in the heaviest blocks is the default.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from dittools.call import AttentionCall
from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.methods.block_statistics import Statistics, statistics
from dittools.methods.paro import NAMES, axis_order, best_order, distinct_orders, paper_scores
from dittools.methods.paro_tables import ParoTables
from dittools.methods.selection import row_mask

METRICS = ("recall", "sparse", "incoherence")


class OrderScores:
    """A method that runs dense and scores all orders of every head; `orders` picks the best."""

    name: ClassVar[str] = "paro_orders"

    def __init__(
        self, density: float, steps: Sequence[int], block_size: int = 64, rows: int | None = None
    ) -> None:
        """Start empty.

        Args:
            density: share of blocks whose mass counts as recalled.
            steps: steps looked at.
            block_size: tokens.
            rows: queries per block, None for all.
        """
        self.density, self.steps, self.block_size, self.rows = density, set(steps), block_size, rows
        self.sums: dict[int, torch.Tensor] = {}  # layer -> float64 [metrics, orders, heads]
        self.maps: dict[int, int] = {}  # layer -> maps added up

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Every call can be looked at."""
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return dense attention."""
        if call.step in self.steps:
            maps = self.maps.get(call.layer, 0)
            self.maps[call.layer] = maps + call.query.shape[0]
            found = torch.zeros((len(METRICS), len(NAMES), call.head_count), dtype=torch.float64)
            for order in distinct_orders(call.grid):
                for item in range(call.query.shape[0]):
                    for head in range(call.head_count):
                        found[:, order, head] += self._score(call, item, head, order)
            self.sums[call.layer] = self.sums.get(call.layer, 0) + found
        return backend.dense(call)

    def _score(self, call: AttentionCall, item: int, head: int, order: int) -> torch.Tensor:
        found = _map_of(call, item, head, order, self.block_size, self.rows)
        scores = (found.recall(self.density), found.sparse(), found.incoherence())
        return torch.cat(scores).double().cpu()


def best_orders(scores: torch.Tensor, metric: str, alpha: float = 0.5) -> torch.Tensor:
    """Return int64 [layers, heads]: the best order by "recall", or by the "paper"'s score.

    Args:
        scores: float64 [layers, metrics, orders, heads], means; 0 for orders that do not differ.
        metric: "recall" or "paper".
        alpha: weight of near-empty blocks in the paper's score, which it does not report.
    """
    chosen = []
    for layer in scores:
        known = [o for o in range(len(NAMES)) if bool((layer[2, o] > 0).all())]  # always above 0
        part = layer[:, known]
        if metric == "recall":
            best = best_order(part[0])
        else:
            best = best_order(-paper_scores(part[1], part[2], alpha))
        chosen.append(torch.tensor([known[place] for place in best]))
    return torch.stack(chosen)


class BlockMasses:
    """A method that runs dense and adds up block masses in given orders, per bin of steps."""

    name: ClassVar[str] = "paro_masses"

    def __init__(
        self,
        grid: TokenGrid,
        orders: torch.Tensor,
        bin_of_step: Sequence[int],
        steps: Sequence[int],
        block_size: int = 64,
        rows: int | None = None,
    ) -> None:
        """Make room for float32 [bins, layers, heads, blocks, blocks].

        Args:
            grid: of the calls that count.
            orders: int64 [layers, heads].
            bin_of_step: bin of every step of the run.
            steps: steps looked at.
            block_size: tokens.
            rows: queries per block, None for all.
        """
        self.grid, self.orders, self.bin_of_step = grid, orders, list(bin_of_step)
        self.steps, self.block_size, self.rows = set(steps), block_size, rows
        blocks = -(-grid.tokens // block_size)
        bins = max(self.bin_of_step) + 1
        self.mass = torch.zeros((bins, *orders.shape, blocks, blocks))
        self.maps = torch.zeros((bins, orders.shape[0]))

    def not_supported(self, call: AttentionCall) -> list[str]:
        """One calibration is for one grid; prompts may differ in length."""
        fits = call.grid.shape == self.grid.shape
        return [] if fits else [f"the calibration is for {self.grid}"]

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return dense attention."""
        if call.step in self.steps:
            where = (self.bin_of_step[min(call.step, len(self.bin_of_step) - 1)], call.layer)
            self.maps[where] += call.query.shape[0]
            for head, order in enumerate(self.orders[call.layer].tolist()):
                for item in range(call.query.shape[0]):
                    found = _map_of(call, item, head, order, self.block_size, self.rows)
                    self.mass[where[0], where[1], head] += found.mass[0].cpu()
        return backend.dense(call)


def _map_of(
    call: AttentionCall, item: int, head: int, order: int, block_size: int, rows: int | None
) -> Statistics:
    """Return the statistics of one map as the model has it: keys it drops take no mass."""
    where = axis_order(call.grid, order).to(call.query.device)
    bias = call.additive_mask()
    if bias is not None:
        bias = bias[min(item, len(bias) - 1), min(head, bias.shape[1] - 1), where][None]
    return statistics(
        call.query[item, where, head : head + 1],
        call.key[item, where, head : head + 1],
        call.grid.tokens,
        block_size,
        call.softmax_scale,
        rows,
        bias=bias,
    )


def bins_of(steps: int, masks: int = 0) -> list[int]:
    """Return the bin of every step: `masks` equal ones, or by 0 the paper's sharing.

    The paper keeps an own mask for every step of the first half and shares one over the second.
    """
    if masks:
        return [step * min(masks, steps) // steps for step in range(steps)]
    own = (steps + 1) // 2
    return [min(step, own) for step in range(steps)]


def tables_of(
    grid: TokenGrid,
    block_size: int,
    orders: torch.Tensor,
    mass: torch.Tensor,
    bin_of_step: Sequence[int],
    density: float,
    weights: torch.Tensor,
    per_head: bool = False,
) -> ParoTables:
    """Return tables whose masks have a mean density as they run, text and diagonal included.

    Args:
        grid: of the calls.
        block_size: tokens.
        orders: int64 [layers, heads].
        mass: float32 [bins, layers, heads, blocks, blocks], not negative.
        bin_of_step: bin of every step.
        density: mean share of all blocks kept, weighted.
        weights: float64 [bins, layers], how often a mask runs.
        per_head: every mask keeps the same share; else one threshold serves all.
    Raises:
        InputError: text and diagonal alone exceed the density.
    """
    behind = TokenGrid(*grid.shape, 0, grid.text)
    whole = grid.blocks(block_size)
    forced = row_mask(torch.zeros((1, whole, whole), dtype=torch.bool), behind, block_size).keep[0]
    budget = density * whole**2 - int(forced.sum())  # blocks per head beside the forced ones
    if budget < 0:
        raise InputError(
            "the density is too low for this size",
            expected=f"at least {int(forced.sum()) / whole**2:.4f}, what text and diagonal take",
            got=f"{density:g} of the masked calls",
        )
    blocks = mass.shape[-1]
    free = ~forced[:blocks, :blocks]
    ranked = mass[..., free]  # [bins, layers, heads, n]
    if per_head:
        count = min(round(budget), ranked.shape[-1])
        order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        picked = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, order, True)
    else:
        picked = _above_threshold(ranked, weights, budget * float(weights.sum()) * mass.shape[2])
    keep = torch.zeros(mass.shape, dtype=torch.bool)
    keep[..., free] = picked
    keep |= forced[:blocks, :blocks]
    layers = list(range(len(orders)))
    return ParoTables.pack(grid, block_size, orders, keep, layers, list(bin_of_step))


def _above_threshold(ranked: torch.Tensor, weights: torch.Tensor, budget: float) -> torch.Tensor:
    """Return bool like [bins, layers, heads, n]: the heaviest entries whose weights sum to budget.

    Bisection on the bit patterns of the masses, which order numbers of one sign as integers do;
    entries that equal the threshold are taken from the left while they fit.
    """
    bits = ranked.contiguous().view(torch.int32)
    low, high = -1, 2**31 - 1  # more than the budget lies above low, no more above high

    def above(level: int) -> float:
        return float(((bits > level).sum(dim=(2, 3)).double() * weights).sum())

    if above(low) <= budget:
        return torch.ones_like(ranked, dtype=torch.bool)
    while high - low > 1:
        middle = (low + high) // 2
        if above(middle) <= budget:
            high = middle
        else:
            low = middle
    kept, left = bits > high, budget - above(high)
    for bin_, layer in weights.nonzero().tolist():
        ties = (bits[bin_, layer] == high).flatten().nonzero().flatten()
        ties = ties[: int((left + 1e-6) // float(weights[bin_, layer]))]
        kept[bin_, layer].view(-1)[ties] = True
        left -= len(ties) * float(weights[bin_, layer])
    return kept
