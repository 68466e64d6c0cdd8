"""FlexAttention's form of a block mask: block lists and a mask_mod that reads the bit tiles."""

import torch
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

from dittools.mask import BlockMask


def flex_block_mask(mask: BlockMask) -> FlexBlockMask:
    """Return the same mask for flex_attention, in slot space, [1, H, q_slots, kv_slots].

    Whole blocks go into the full lists, where mask_mod is never asked; blocks with a bit tile, or
    with padding slots of the token order, go into the partial lists.
    """
    keep = mask.keep
    real = _real_slots(mask)
    heads = max(keep.shape[0], 1 if real is None else real.shape[0])
    partial = torch.zeros_like(keep) if mask.tile_index is None else mask.tile_index >= 0
    if real is not None:
        holes = ~real.view(real.shape[0], 1, keep.shape[2], mask.kv_block).all(-1)
        partial = partial | holes
    partial = (partial & keep).expand(heads, -1, -1)
    cut, whole = _listed(partial), _listed(keep.expand(heads, -1, -1) & ~partial)
    return FlexBlockMask.from_kv_blocks(
        *cut,
        *whole,
        BLOCK_SIZE=(mask.q_block, mask.kv_block),
        mask_mod=_MaskMod(mask, real),
        seq_lengths=_slot_lengths(mask),
    )


class _MaskMod:
    """Whether a query slot attends to a key slot, exact to the token; also for whole blocks."""

    def __init__(self, mask: BlockMask, real: torch.Tensor | None) -> None:
        self.q_block, self.kv_block = mask.q_block, mask.kv_block
        self.keep, self.real = mask.keep, real
        self.tile_index, self.tiles = mask.tile_index, mask.tiles

    def __call__(
        self, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor
    ) -> torch.Tensor:
        q_at, kv_at = q // self.q_block, kv // self.kv_block
        head = h if self.keep.shape[0] > 1 else torch.zeros_like(h)
        kept = self.keep[head, q_at, kv_at]
        if self.tiles is not None and self.tile_index is not None:
            tile = self.tile_index[head, q_at, kv_at]
            column = kv % self.kv_block
            byte = self.tiles[tile.clamp(min=0), q % self.q_block, column // 8]
            bit = (byte.int() >> (column % 8).int()) & 1
            kept = kept & ((tile < 0) | (bit == 1))
        if self.real is not None:
            kept = kept & self.real[h if self.real.shape[0] > 1 else torch.zeros_like(h), kv]
        return kept


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return counts int32 [1, H, Q] and indices int32 [1, H, Q, K], kept blocks first."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None], order.int()[None]


def _slot_lengths(mask: BlockMask) -> tuple[int, int]:
    q_len, kv_len = mask.q_tokens or mask.q_slots, mask.kv_tokens or mask.kv_slots
    if mask.order is not None:
        extra = (mask.kv_tokens or mask.order.tokens) - mask.order.tokens
        q_len, kv_len = mask.order.slots, mask.order.slots + extra
    return q_len, kv_len


def _real_slots(mask: BlockMask) -> torch.Tensor | None:
    """Return bool [H or 1, kv_slots], False at padding slots of the order; None without any."""
    if mask.order is None or not mask.order.has_padding:
        return None
    behind = mask.kv_slots - mask.order.slots
    return torch.nn.functional.pad(mask.order.index >= 0, (0, behind), value=True)
