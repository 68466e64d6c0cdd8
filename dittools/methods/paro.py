"""PAROAttention: each head's tokens in the axis order it attends in, then the heavy blocks.

Source: arXiv:2506.16054; the authors publish kernels, not the calibration. This project's choices:
orders are picked by the attention mass their heaviest blocks hold (the paper's two metrics are
there as well), and one threshold over all heads sets the mean density. With `tables` from
`dittools calibrate` orders and masks are static, as in the paper, and serve prompts of any length,
since masks are of the grid's tokens alone; without, the order is chosen at the first sparse step of
a site and the mask is estimated from sampled queries and pooled keys, anew at every step of the
first half of the run. Applied after RoPE; text stands behind the grid's tokens and is dense. The
published plans put text first and keep the ragged last block row and column whole; here a ragged
block is ranked like any other and computed at its true length. `quantize` rounds in groups of one
block after the reordering; see `kernels/quantised.py` for the arithmetic.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch

from dittools.call import QUANTIZE, AttentionCall
from dittools.errors import UnsupportedCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask
from dittools.methods.base import attend_masked, attend_per_item, bad_param, check_params, param
from dittools.methods.block_sampling import run_length, sampled_mass
from dittools.methods.block_statistics import mass_recall
from dittools.methods.paro_tables import ParoTables, load_tables
from dittools.methods.placing import placed
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
ORDER_BLOCKS = 32  # query blocks that the choice of an order looks at
TEXTS_KEPT = 4  # lengths of text whose calibrated masks are kept per layer and head


@dataclass(frozen=True)
class PARO:
    """An axis order per head, and the key blocks that are heavy in that order."""

    name: ClassVar[str] = "paro"
    density: float = param(0.3, "the mean share of blocks kept", above=0.0, most=1.0)
    order: str | tuple[str, ...] = param(
        "auto", "the axis order of all heads, or one per head; 'auto' chooses it from the attention"
    )
    block_size: int = param(64, "the tokens per block", least=8, most=1024)
    rows: int = param(4, "the queries per block that stand for it in the estimate", least=1)
    per_head: bool = param(False, "whether every head keeps the same share")
    tables: str | ParoTables = param(  # noqa: RUF009
        "", "the calibrated orders and masks, or their file; empty estimates them"
    )
    quantize: str = param(
        "none", "the bits of query-key and weight-value products", choices=tuple(QUANTIZE)
    )

    def __post_init__(self) -> None:
        """Read tables as a plan holds them, and check the order names."""
        if isinstance(self.tables, dict):
            object.__setattr__(self, "tables", ParoTables.of_param(self.tables))
        if not isinstance(self.tables, (str, ParoTables)):
            raise bad_param(self, "tables", expected="a file name or calibrated tables")
        check_params(self)
        names = self.order if isinstance(self.order, tuple) else (self.order,)
        if not names or any(n not in ORDERS and (n != "auto" or len(names) > 1) for n in names):
            expected = f"'auto', or one of {', '.join(ORDERS)}, once or per head"
            raise bad_param(self, "order", expected=expected)

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Lists of orders and calibrated tables must fit the call."""
        reasons = []
        if isinstance(self.order, tuple) and len(self.order) != call.method_heads:
            reasons.append(f"paro lists {len(self.order)} orders for {call.method_heads} heads")
        if self.tables:
            reasons += self._loaded().misfit(call)
        return reasons

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query."""
        if self.quantize != "none":
            call = replace(call, quantize=self.quantize)
        if self.tables:
            return self._run(call, backend, table_mask(self._loaded(), call))
        if self.density >= 1 and self.quantize == "none":
            return backend.dense(call)
        return attend_per_item(call, lambda item: self._attend_item(item, backend))

    def _loaded(self) -> ParoTables:
        return load_tables(self.tables) if isinstance(self.tables, str) else self.tables

    def _run(self, call: AttentionCall, backend: Backend, mask: BlockMask) -> torch.Tensor:
        """Run a mask; few-bit products are never traded for exact ones without a word."""
        if self.quantize == "none":
            return attend_masked(call, backend, mask)
        reasons = backend.not_supported(call, mask)
        if reasons:
            raise UnsupportedCall(
                f"paro with quantize={self.quantize} cannot run on backend {backend.name}",
                got=", ".join(reasons),
            )
        return backend.block_sparse(call, mask)

    def _attend_item(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        key = f"paro {self} {call.grid} {call.head_count}"
        stored: dict[str, BlockMask] = call.memory.setdefault(key, {})
        late = call.steps > 0 and 2 * call.step >= call.steps
        if "mask" not in stored or not (late and "late" in stored):
            order = stored["mask"].order if "mask" in stored else None
            stored["mask"] = self.estimate(call, order)
            if late:
                stored["late"] = stored["mask"]  # the second half of the run shares one mask
        return self._run(call, backend, stored["mask"])

    def estimate(self, call: AttentionCall, order: TokenOrder | None = None) -> BlockMask:
        """Return the mask of a call of batch 1 from sampled queries; chooses the order if None."""
        device = call.query.device
        if order is None:
            order = head_order(call.grid, self._orders(call)).to(device)
        grid = replace(call.grid, text_before=0, text_after=call.grid.text)
        mass = self._mass(call, order.index)
        blocks = grid.blocks(self.block_size)
        keep = torch.zeros((call.head_count, blocks, blocks), dtype=torch.bool, device=device)
        video = mass.shape[1]
        if self.per_head:
            keep[:, :video, :video] = keep_share(mass, self.density, True)
        else:  # one threshold for all heads, those of other processes too
            kept = keep_share(call.of_all_heads(mass), self.density, items=call.items)
            keep[:, :video, :video] = kept if call.peers is None else kept[list(call.places)]
        return row_mask(keep, grid, self.block_size, order)

    def _orders(self, call: AttentionCall) -> list[int]:
        if isinstance(self.order, tuple):
            names = self.order  # places past them belong to further items of a batch
            return [NAMES.index(names[place % len(names)]) for place in call.places]
        if self.order != "auto":
            return [NAMES.index(self.order)] * call.head_count
        distinct = distinct_orders(call.grid)
        if len(distinct) == 1:
            return [0] * call.head_count
        recalls = []
        for number in distinct:
            index = placed(axis_order(call.grid, number), call.query.device)[None]
            recalls.append(mass_recall(self._mass(call, index, ORDER_BLOCKS), self.density))
        return [distinct[place] for place in best_order(torch.stack(recalls))]

    def _mass(self, call: AttentionCall, index: torch.Tensor, blocks: int = 0) -> torch.Tensor:
        """Return the estimated mass of every block, `blocks` rows of blocks of it."""
        bias = call.additive_mask()
        return sampled_mass(
            call.query[0],
            call.key[0],
            index,
            call.grid.tokens,
            self.block_size,
            call.softmax_scale,
            rows=self.rows,
            run=run_length(self.block_size),
            blocks=blocks,
            bias=None if bias is None else bias[0],
        )


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


@lru_cache(maxsize=128)
def distinct_orders(grid: TokenGrid) -> tuple[int, ...]:
    """Return the orders that differ on a grid, the first of those that coincide; identity first."""
    seen: dict[tuple[int, ...], int] = {}
    for number, axes in enumerate(ORDERS.values()):  # axes of one place do not count
        seen.setdefault(tuple(axis for axis in axes if grid.shape[axis] > 1), number)
    return tuple(seen.values())


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


def table_mask(tables: ParoTables, call: AttentionCall) -> BlockMask:
    """Return the calibrated mask of a call's layer, step and heads, on its device.

    Those in use are kept with the tables, so both guidance branches share one; branches and rows
    whose text differs in length have one each.
    """
    heads = call.head_index or tuple(range(call.head_count))
    index = tables.index(call.step, call.steps)
    site = (call.layer, heads, call.query.device, call.grid)
    known = tables.cache.get(site)
    if known is None or known[0] != index:
        keep, chosen = tables.mask(call.layer, index, call.grid), tables.orders[call.layer]
        order = head_order(call.grid, chosen[list(heads)].tolist())
        behind = replace(call.grid, text_before=0, text_after=call.grid.text)
        made = row_mask(keep[list(heads)], behind, tables.block_size, order)
        tables.cache.pop(site, None)  # the newest last
        while len(tables.cache) >= TEXTS_KEPT * tables.orders.numel():
            del tables.cache[next(iter(tables.cache))]
        known = tables.cache[site] = (index, made.to(call.query.device))
    return known[1]
