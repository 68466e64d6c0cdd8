"""Skipped blocks replaced by their mean key and value, inside the one softmax of the call.

A block of n keys that is not attended takes part as one more key: its mean, with log n added to the
score, so that it weighs as n tokens, and its mean value. These keys follow the sequence's own; the
queries of a block see those of the blocks they skip and no others, by bit tiles.

Source: piecewise pooling as in SVG-EAR (arXiv:2603.08982) and PISA (arXiv:2602.01077).
"""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.mask import BlockMask, pack_bits
from dittools.methods.block_sampling import gather_heads
from dittools.methods.curves import gilbert
from dittools.methods.paro import NAMES, axis_order
from dittools.methods.selection import block_sizes
from dittools.order import TokenOrder


class Runs(NamedTuple):
    """Keys and values of equal blocks, pooled in runs of neighbours.

    Attributes:
        key, value: float32 [H, blocks, runs, D], means; zero where a run holds no token.
        weight: float32 [H or 1, blocks, runs], tokens each stands for, as the call weighs them.
    """

    key: torch.Tensor
    value: torch.Tensor
    weight: torch.Tensor

    def pooled(self) -> "Runs":
        """Return the same with one run per block."""
        total = self.weight.sum(2, keepdim=True)
        share = (self.weight / total.clamp(min=1e-30))[..., None]
        key, value = ((x * share).sum(2, keepdim=True) for x in (self.key, self.value))
        return Runs(key, value, total)


def pool_runs(call: AttentionCall, order: TokenOrder, blocks: int, size: int, run: int) -> Runs:
    """Return the keys and values of the first blocks of a call of batch 1, pooled in runs.

    Args:
        call: key_mask and key_bias weigh its tokens.
        order: slots the blocks are cut from; its padding counts for nothing.
        blocks: blocks of the grid's tokens, which come first.
        size: slots per block.
        run: slots per run, a divisor of size.
    """
    index = order.index[:, : blocks * size]
    real = index >= 0
    token = index.clamp(min=0)
    weight = real.float()
    bias = call.additive_mask()
    if bias is not None:
        line = bias[0].expand(max(bias.shape[1], len(token)), -1)
        weight = weight * line.gather(1, token.expand(len(line), -1)).exp()
    cut = (blocks, size // run, run)
    weight = weight.unflatten(1, cut)
    total = weight.sum(3)
    even = bias is None and call.grid.tokens >= blocks * size  # padding stands at the end
    share = weight / total[..., None].clamp(min=1e-30)
    made = []
    for source in (call.key, call.value):
        rows = gather_heads(source[0], token).unflatten(1, cut)
        wide = torch.promote_types(rows.dtype, torch.float32)
        mean = rows.mean(3, dtype=wide) if even else (rows.to(wide) * share[..., None]).sum(3)
        made.append(mean)
    return Runs(made[0], made[1], total)


def with_pooled_keys(call: AttentionCall, pooled: Runs) -> AttentionCall:
    """Return the call with one more key per block behind its own, biased by the tokens it means."""
    own = call.additive_mask()
    heads = call.head_count
    if own is None:
        own = torch.zeros((1, 1, call.key.shape[1]), device=call.query.device)
    log = pooled.weight[..., 0].log()[None]  # -inf for a block without tokens
    bias = torch.cat((own.expand(1, heads, -1), log.expand(1, heads, -1)), dim=2)
    key, value = (
        torch.cat((old, new[:, :, 0].transpose(0, 1)[None].to(old.dtype)), dim=1)
        for old, new in ((call.key, pooled.key), (call.value, pooled.value))
    )
    return replace(call, key=key, value=value, key_mask=None, key_bias=bias)


def block_mask(
    kept: torch.Tensor,
    grid: TokenGrid,
    order: TokenOrder,
    size: int,
    pooled: bool,
    key_size: int = 0,
) -> BlockMask:
    """Return the mask over all slots: kept blocks, text dense both ways, and pooled keys behind.

    Args:
        kept: bool [H, blocks, key blocks] over the grid's tokens.
        grid: geometry; its text fills the blocks behind.
        order: padded, so that text starts a block.
        size: slots per block.
        pooled: whether one key per block follows, seen by the blocks that skip it.
        key_size: slots per block of keys, a divisor of `size`; 0 for as many.
    """
    heads, blocks, key_blocks = kept.shape
    key_size = key_size or size
    sizes = size if key_size == size else (size, key_size)
    rows, columns = order.slots // size, order.slots // key_size
    behind = -(-key_blocks // key_size) if pooled else 0
    keep = kept.new_zeros((heads, rows, columns + behind))
    keep[:, :blocks, :key_blocks] = kept
    keep[:, blocks:, :columns] = True
    keep[:, :, blocks * size // key_size : columns] = True
    pairs = kept_pairs(kept, grid, size, pooled, key_size)
    total = grid.total
    if not pooled:
        return BlockMask(keep, sizes, order=order, q_tokens=total, kv_tokens=total, pairs=pairs)
    short = behind * key_size - key_blocks
    bits = torch.nn.functional.pad(~kept, (0, short)).unflatten(2, (behind, key_size))
    some = bits.any(-1)
    real = torch.arange(behind * key_size, device=kept.device).view(behind, key_size) < key_blocks
    part = some & ~(bits | ~real).all(-1)
    keep[:, :blocks, columns:] = some
    index = torch.full(keep.shape, -1, dtype=torch.int32, device=kept.device)
    place = part.flatten().cumsum(0, dtype=torch.int32).view(part.shape) - 1
    index[:, :blocks, columns:] = torch.where(part, place, -1)
    tiles = pack_bits(bits[part])[:, None].expand(-1, size, -1).contiguous()
    cut = len(tiles) > 0
    return BlockMask(
        keep,
        sizes,
        tile_index=index if cut else None,
        tiles=tiles if cut else None,
        order=order,
        q_tokens=total,
        kv_tokens=total + key_blocks,
        pairs=pairs,
    )


def kept_pairs(
    kept: torch.Tensor, grid: TokenGrid, size: int, pooled: bool, key_size: int = 0
) -> torch.Tensor:
    """Return float64 [H]: the pairs of `block_mask`, pooled keys and text included."""
    sizes = block_sizes(grid.tokens, size, kept).double()
    each = (kept.double() @ block_sizes(grid.tokens, key_size or size, kept).double()) @ sizes
    text = float(grid.total**2 - grid.tokens**2)
    tail = ((~kept).double().sum(2) @ sizes) if pooled else 0.0
    return each + text + tail


@lru_cache(maxsize=64)
def padded_order(grid: TokenGrid, names: tuple[str, ...], size: int) -> TokenOrder:
    """Return an order per name of the grid's tokens, then the text, each in whole blocks.

    Args:
        grid: geometry.
        names: of `paro.ORDERS`, or "gilbert"; one per head, or one for all.
        size: slots per block.
    """
    rows = []
    for name in names:
        if name == "gilbert":
            rows.append(gilbert(*grid.shape) + grid.text_before)
        else:
            rows.append(axis_order(grid, NAMES.index(name))[: grid.tokens])
    return with_text(torch.stack(rows), grid, size)


def with_text(video: torch.Tensor, grid: TokenGrid, size: int) -> TokenOrder:
    """Return the order of int64 [H, N], the grid's tokens, then the text, each in whole blocks."""
    token = torch.arange(grid.total, device=video.device)
    text = torch.cat((token[: grid.text_before], token[grid.text_before + grid.tokens :]))
    parts = video, text.expand(len(video), -1)
    padded = [torch.nn.functional.pad(p, (0, -p.shape[1] % size), value=-1) for p in parts]
    return TokenOrder(torch.cat(padded, dim=1), grid.total)


def sparse_rows(
    call: AttentionCall,
    rows: torch.Tensor,
    kept: torch.Tensor,
    order: TokenOrder,
    size: int,
    key_size: int = 0,
    keys: TokenOrder | None = None,
) -> torch.Tensor:
    """Return float32 [1, R, H, D]: what `block_mask` would give some queries of the grid.

    Args:
        call: batch 1, pooled keys behind its own or none.
        rows: int64 [R], tokens of the grid.
        kept: bool [H, blocks, key blocks].
        order: slots the blocks are cut from.
        size: slots per block.
        key_size: slots per block of keys; 0 for as many.
        keys: slots the blocks of keys are cut from, if other ones.
    """
    heads, _, blocks = kept.shape
    grid, key_size = call.grid, key_size or size
    slot = order.inverse.expand(heads, -1)  # [H, S], text past the last block
    own = torch.nn.functional.pad(kept, (0, order.slots // key_size - blocks), value=True)
    asked = (slot[:, rows] // size)[..., None].expand(-1, -1, own.shape[2])
    line = own.gather(1, asked)  # [H, R, key blocks]
    slot = slot if keys is None else keys.inverse.expand(heads, -1)
    seen = line.gather(2, (slot // key_size)[:, None].expand(-1, len(rows), -1))  # [H, R, S]
    if call.key.shape[1] > grid.total:
        seen = torch.cat((seen, ~line[..., :blocks]), dim=2)
    query = call.query[0, rows].transpose(0, 1).float() * call.softmax_scale
    scores = query @ call.key[0].permute(1, 2, 0).float()
    bias = call.additive_mask()
    if bias is not None:
        scores = scores + bias[0][:, None]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ call.value[0].transpose(0, 1).float()).transpose(0, 1)[None]
