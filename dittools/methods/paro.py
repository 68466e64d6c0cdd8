"""PAROAttention: each head's tokens in the axis order it attends in, then the heavy blocks.

Source: arXiv:2506.16054; the authors publish kernels, not the calibration. This project's choices:
orders are picked by the attention mass their heaviest blocks hold (the paper's two metrics are
there as well), and one threshold over all heads sets the mean density. With `tables` from a
`ParoCalibrator` orders and masks are static, as in the paper; without, the order is chosen at the
first sparse step of a site and the mask is estimated from sampled queries, anew at every step of
the first half of the run. Applied after RoPE; text stands behind the grid's tokens and is dense.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask
from dittools.methods.base import attend_masked, attend_per_item, bad_param, check_params, param
from dittools.methods.block_statistics import mass_recall, sampled_mass, statistics
from dittools.methods.paro_tables import ParoTables, load_tables
from dittools.methods.selection import keep_share, row_mask
from dittools.order import TokenOrder

# the six orders, outermost axis first, as permutations of (frames, height, width)
ORDERS = {
    "fhw": (0, 1, 2),
    "fwh": (0, 2, 1),
    "hwf": (1, 2, 0),
    "hfw": (1, 0, 2),
    "whf": (2, 1, 0),
    "wfh": (2, 0, 1),
}
NAMES = tuple(ORDERS)


@dataclass(frozen=True)
class PARO:
    """An axis order per head, and the key blocks that are heavy in that order."""

    name: ClassVar[str] = "paro"
    density: float = param(0.3, "the mean share of blocks kept", above=0.0, most=1.0)
    order: str | tuple[str, ...] = param(
        "auto", "the axis order of all heads, or one per head; 'auto' chooses it from the attention"
    )
    block_size: int = param(64, "the tokens per block", least=8, most=1024)
    rows: int = param(2, "the queries per block that stand for it in the estimate", least=1)
    per_head: bool = param(False, "whether every head keeps the same share")
    tables: str = param("", "the file of calibrated orders and masks; empty estimates them")

    def __post_init__(self) -> None:
        """Check the order names."""
        check_params(self)
        names = self.order if isinstance(self.order, tuple) else (self.order,)
        if not names or any(n not in ORDERS and (n != "auto" or len(names) > 1) for n in names):
            expected = f"'auto', or one of {', '.join(ORDERS)}, once or per head"
            raise bad_param(self, "order", expected=expected)

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Lists of orders and calibrated tables must fit the call."""
        reasons = []
        if isinstance(self.order, tuple) and len(self.order) != call.head_count:
            reasons.append(f"paro lists {len(self.order)} orders for {call.head_count} heads")
        if self.tables:
            reasons += load_tables(self.tables).misfit(call.grid, call.layer, call.head_count)
        return reasons

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query."""
        if self.tables:
            mask = _table_mask(load_tables(self.tables), call)
            return attend_masked(call, backend, mask.to(call.query.device))
        if self.density >= 1:
            return backend.dense(call)
        return attend_per_item(call, lambda item: self._attend_item(item, backend))

    def _attend_item(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        key = f"paro {self} {call.grid} {call.head_count}"
        stored: dict[str, BlockMask] = call.memory.setdefault(key, {})
        late = call.steps > 0 and 2 * call.step >= call.steps
        if "mask" not in stored or not (late and "late" in stored):
            order = stored["mask"].order if "mask" in stored else None
            stored["mask"] = self.estimate(call, order)
            if late:
                stored["late"] = stored["mask"]  # the second half of the run shares one mask
        return attend_masked(call, backend, stored["mask"])

    def estimate(self, call: AttentionCall, order: TokenOrder | None = None) -> BlockMask:
        """Return the mask of a call of batch 1 from sampled queries; chooses the order if None."""
        device = call.query.device
        if order is None:
            order = head_order(call.grid, self._orders(call)).to(device)
        grid = replace(call.grid, text_before=0, text_after=call.grid.text)
        query, key = order.apply(call.query)[0], order.apply(call.key)[0]
        args = (grid.tokens, self.block_size, call.softmax_scale, self.rows)
        mass = sampled_mass(query, key, *args)
        blocks = grid.blocks(self.block_size)
        keep = torch.zeros((call.head_count, blocks, blocks), dtype=torch.bool, device=device)
        video = mass.shape[1]
        keep[:, :video, :video] = keep_share(mass, self.density, self.per_head)
        return row_mask(keep, grid, self.block_size, order)

    def _orders(self, call: AttentionCall) -> list[int]:
        if isinstance(self.order, tuple):
            return [NAMES.index(n) for n in self.order]
        if self.order != "auto":
            return [NAMES.index(self.order)] * call.head_count
        recalls = []
        for name in NAMES:
            order = head_order(call.grid, [NAMES.index(name)]).to(call.query.device)
            query, key = order.apply(call.query)[0], order.apply(call.key)[0]
            args = (call.grid.tokens, self.block_size, call.softmax_scale, self.rows)
            recalls.append(mass_recall(sampled_mass(query, key, *args), self.density))
        return best_order(torch.stack(recalls))


def best_order(recalls: torch.Tensor) -> list[int]:
    """Return the order of most recall per head from [6, H]; ties, to 1e-4, go to the first."""
    near = recalls >= recalls.max(dim=0).values - 1e-4
    found: list[int] = near.int().argmax(dim=0).tolist()
    return found


@lru_cache(maxsize=128)
def axis_order(grid: TokenGrid, order: int) -> torch.Tensor:
    """Return int64 [total]: the grid's tokens in one of the six orders, then all text."""
    token = torch.arange(grid.total)
    video = token[grid.text_before : grid.text_before + grid.tokens].view(grid.shape)
    text = torch.cat((token[: grid.text_before], token[grid.text_before + grid.tokens :]))
    return torch.cat((video.permute(ORDERS[NAMES[order]]).reshape(-1), text))


def head_order(grid: TokenGrid, orders: list[int]) -> TokenOrder:
    """Return the order of every head as one permutation [H, total]."""
    return TokenOrder(torch.stack([axis_order(grid, order) for order in orders]), grid.total)


def paper_scores(sparse: torch.Tensor, incoherence: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return the paper's score of each order from [6, H] metrics; the least is best.

    The published sign would reward maps without empty blocks, so 1 - sparse is used.
    """
    full = 1 - sparse
    share = full / full.sum(0).clamp(min=1e-12)
    return alpha * share + (1 - alpha) * incoherence / incoherence.sum(0)


@lru_cache(maxsize=256)
def _table_entry(tables: ParoTables, grid: TokenGrid, layer: int, index: int) -> BlockMask:
    order = head_order(grid, tables.orders[layer].tolist())
    behind = replace(grid, text_before=0, text_after=grid.text)
    return row_mask(tables.mask(layer, index), behind, tables.block_size, order)


def _table_mask(tables: ParoTables, call: AttentionCall) -> BlockMask:
    return _table_entry(tables, call.grid, call.layer, tables.index(call.step, call.steps))


class ParoCalibrator:
    """A method that runs dense and gathers what `tables` needs; attach it for one or two prompts.

    Masks are kept per bin of the run's steps: one per step of the first half, one for the rest, as
    the paper does, when `bins` is None.
    """

    name: ClassVar[str] = "paro_calibrate"

    def __init__(
        self, block_size: int = 64, bins: int | None = None, rows: int | None = None
    ) -> None:
        """Start empty; `rows` samples queries per block to save time."""
        self.block_size, self.bins, self.rows = block_size, bins, rows
        self._mass: dict[tuple[int, int], torch.Tensor] = {}
        self._grid: TokenGrid | None = None
        self._steps = 0

    def not_supported(self, call: AttentionCall) -> list[str]:
        """One calibration is for one grid."""
        if self._grid not in (None, call.grid):
            return [f"this calibration is for {self._grid}, the call has {call.grid}"]
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return dense attention; adds the block mass of all six orders to the totals."""
        self._grid, self._steps = call.grid, max(call.steps, call.step + 1, self._steps)
        for item in range(call.query.shape[0]):
            for order in range(len(NAMES)):
                where = axis_order(call.grid, order).to(call.query.device)
                found = statistics(
                    call.query[item, where],
                    call.key[item, where],
                    call.grid.tokens,
                    self.block_size,
                    call.softmax_scale,
                    self.rows,
                )
                self._add(call, order, found.mass.cpu())
        return backend.dense(call)

    def _add(self, call: AttentionCall, order: int, mass: torch.Tensor) -> None:
        site = (call.step, call.layer)
        if site not in self._mass:
            self._mass[site] = torch.zeros((len(NAMES), *mass.shape))
        self._mass[site][order] += mass

    def tables(self, density: float, per_head: bool = False) -> ParoTables:
        """Return orders per (layer, head) and masks whose mean density is the one asked for."""
        layers = sorted({layer for _, layer in self._mass})
        steps = sorted({step for step, _ in self._mass})
        half = [s for s in steps if 2 * s < self._steps]
        bins = self.bins or len(half) + (len(half) < len(steps))
        of_step = {s: min(int(i * bins / len(steps)), bins - 1) for i, s in enumerate(steps)}
        if self.bins is None:
            of_step = {s: min(i, bins - 1) for i, s in enumerate(steps)}
        orders, kept = [], []
        for layer in layers:
            total = torch.stack([self._mass[s, layer] for s in steps]).sum(0)
            recalls = [mass_recall(m, density) for m in total]
            best = torch.tensor(best_order(torch.stack(recalls)))
            orders.append(best)
            heads = torch.arange(len(best))
            binned = [
                torch.stack(
                    [self._mass[s, layer][best, heads] for s in steps if of_step[s] == b]
                ).sum(0)
                for b in range(bins)
            ]
            kept.append(torch.stack([m / m.sum((1, 2), keepdim=True) for m in binned]))
        mass = torch.stack(kept, dim=1)  # [bins, layers, H, blocks, blocks]
        flat = mass.flatten(0, 2)
        masks = keep_share(flat, density, per_head).view_as(mass)
        return ParoTables.pack(
            self._grid or TokenGrid(1, 1, 1),
            self.block_size,
            torch.stack(orders),
            masks,
            layers,
            [of_step[s] for s in steps],
        )
