"""What blocks of metered attention are cut from, and how a call runs in them.

Queries keep their axis order. Keys stand in the same one, or in groups of alike ones: tokens side
by side often ask for the same keys, but those need not stand side by side. Equal parts by cuts
along principal axes (ClusterAttention, arXiv:2608.26965) hold keys of alike answers: skipped ones
are closer to their mean, kept ones worth more. This project's: keys are cut on within a block, so
that its runs are tight; and cuts last ever longer, as the picture settles.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask
from dittools.methods.base import attend_exactly
from dittools.methods.block_sampling import gather_heads, run_length
from dittools.methods.compensation import Runs, block_mask, pool_runs, sparse_rows, with_text
from dittools.methods.partition import grid_points, key_points, split_order
from dittools.order import TokenOrder

KEYS = {
    "order": "cut along the order of the queries",
    "alike": "made of keys that are alike",
}
_AXES = 32  # principal ones that keys are cut along, those of most variance
_RUNS = {"order": 8, "alike": 16}  # per block, that its keys are judged by


class Blocks(NamedTuple):
    """What blocks are cut from.

    Attributes:
        order: slots of queries, the text in blocks of its own.
        keys: slots of keys if they have other ones, the text likewise.
        size: queries per block.
        key_size: keys per block, a divisor of size.
    """

    order: TokenOrder
    keys: TokenOrder | None
    size: int
    key_size: int

    def runs(self, call: AttentionCall) -> Runs:
        """Return the keys and values of every block of keys, pooled in runs."""
        count = -(-call.grid.tokens // self.key_size)
        order = self.order if self.keys is None else self.keys
        return pool_runs(call, order, count, self.key_size, self.run)

    @property
    def run(self) -> int:
        """Keys per run."""
        return keys_per_run(self.key_size, self.keys is not None)

    def of_heads(self, which: torch.Tensor) -> "Blocks":
        """Return those of some heads, int64 [n]."""

        def some(order: TokenOrder) -> TokenOrder:
            if len(order.index) == 1:
                return order
            return TokenOrder(order.index.index_select(0, which), order.tokens)

        keys = None if self.keys is None else some(self.keys)
        return self._replace(order=some(self.order), keys=keys)

    def mask(self, kept: torch.Tensor, grid: TokenGrid, pooled: bool) -> BlockMask:
        """Return the mask of bool [H, blocks, key blocks], as `block_mask` makes it."""
        mask = block_mask(kept, grid, self.order, self.size, pooled, self.key_size)
        if self.keys is None:
            return mask
        slots = self.order.slots, self.keys.slots + mask.kv_tokens - grid.total
        return replace(mask, order=None, q_tokens=slots[0], kv_tokens=slots[1], _cache={})

    def attend(self, made: AttentionCall, backend: Backend, mask: BlockMask) -> torch.Tensor | None:
        """Return [1, S, H, D]: a call, pooled keys behind its own, run by its `mask`.

        None where dense attention is faster.
        """
        if self.keys is None:
            return attend_exactly(made, backend, mask)
        out = attend_exactly(self._laid(made, self.keys), backend, mask)
        if out is None:
            return None
        return gather_heads(out[0], self.order.inverse).transpose(0, 1)[None]

    def _laid(self, made: AttentionCall, keys: TokenOrder) -> AttentionCall:
        """Return the call with queries and keys in slots; a bias leaves out padding."""
        heads, length = made.head_count, made.key.shape[1]
        behind = torch.arange(keys.tokens, length, device=keys.index.device)
        token = torch.cat((keys.index, behind.expand(len(keys.index), -1)), dim=1)
        hole, token = token < 0, token.clamp(min=0)
        bias = made.additive_mask()
        if bias is None:
            bias = torch.zeros((1, 1, length), device=made.query.device)
        bias = bias[0].expand(heads, -1).gather(1, token.expand(heads, -1))
        bias = bias.masked_fill(hole, float("-inf"))[None]
        query, key, value = (
            gather_heads(x[0], where).transpose(0, 1)[None]
            for x, where in (
                (made.query, self.order.index.clamp(min=0)),
                (made.key, token),
                (made.value, token),
            )
        )
        if keys.has_padding:  # a weight of 0 lets NaN through
            value = value.masked_fill(hole.t()[None, :, :, None], 0)
        return AttentionCall(
            query,
            key,
            value,
            TokenGrid(1, 1, self.order.slots),
            scale=made.scale,
            key_bias=bias,
            quantize=made.quantize,
        )

    def rows(self, made: AttentionCall, rows: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Return float32 [1, R, H, D]: what `attend` would give some queries of the grid."""
        return sparse_rows(made, rows, kept, self.order, self.size, self.key_size, self.keys)


def keys_per_run(size: int, alike: bool) -> int:
    """Return how many of a block of `size` keys are pooled to judge what the block is worth."""
    return run_length(size, _RUNS["alike" if alike else "order"])


def cut_lasts(cut: int, step: int) -> bool:
    """Whether groups made at one step still serve at another: new ones are at 0, 2, 6, 14 ..."""
    return cut <= step < 2 * cut + 2


def alike_keys(call: AttentionCall, size: int) -> torch.Tensor:
    """Return int32 [H, N]: tokens from the grid's first on, in groups of `size` but for one.

    Args:
        call: of batch 1.
        size: keys per group.
    """
    points = key_points(*grid_points(call))[..., -_AXES:].contiguous()
    return split_order(points, size, max(2, keys_per_run(size, True))).int()


def alike_order(alike: torch.Tensor, grid: TokenGrid, size: int) -> TokenOrder:
    """Return the slots of keys, groups as `alike_keys` has them, text and all in whole blocks."""
    return with_text(alike.long() + grid.text_before, grid, size)
