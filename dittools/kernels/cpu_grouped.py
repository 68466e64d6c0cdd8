"""Block-sparse attention in plain torch: kept blocks gathered by exact count, then SDPA.

Serves where the native kernel cannot be built. Rows (one head, one query block) that keep equally
many key blocks share one SDPA call, so nothing is padded and no mask is needed for whole blocks;
rows with a cut block, or with the ragged last block, are grouped apart and carry an additive mask.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from dittools.kernels.common import Slots, weigh
from dittools.mask import BlockMask, unpack_bits

GATHER_BYTES = 2 << 20  # of keys per SDPA call; larger buffers leave the L2 cache (1.4-2x slower)


class Group(NamedTuple):
    """Rows of one exact block count.

    Attributes:
        rows: int64 [g], head * q_blocks + query block.
        blocks: int64 [g, n], head * kv_blocks + key block.
        tiles: int64 [g, n] rows of `BlockMask.tiles`, -1 for whole blocks; None when all are whole.
        ragged: whether some row keeps the incomplete last key block.
    """

    rows: torch.Tensor
    blocks: torch.Tensor
    tiles: torch.Tensor | None
    ragged: bool


_PLANS: WeakKeyDictionary[BlockMask, dict[tuple[int, int], list[Group]]] = WeakKeyDictionary()


def grouped_attention(
    slots: Slots, mask: BlockMask, scale: float, *, need_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return [B, H, S, D] in slot space and, when asked for, the log-sum-exp [B, H, S] in fp32.

    A query that keeps nothing gets 0 and -inf. Values and keys that are not finite reach only the
    queries that keep them.
    """
    batch, heads, q_len, dim = slots.query.shape
    k_len = slots.key.shape[2]
    plan = _plan(mask, heads, k_len)
    line = _key_line(slots, mask, k_len)
    key, value = (_blocked(t, mask.kv_block, mask.keep.shape[2]) for t in (slots.key, slots.value))
    if slots.bias is not None and line is not None:
        dropped = line.isneginf()[..., None]
        flat = (batch, heads, mask.kv_slots, dim)
        key, value = (t.view(flat).masked_fill(dropped, 0).view(t.shape) for t in (key, value))
    query = _blocked(slots.query, mask.q_block, mask.keep.shape[1])
    exact = need_lse or (
        mask.tiles is not None and not bool(key.isfinite().all() & value.isfinite().all())
    )
    out = torch.zeros_like(query)
    lse = query.new_full((*query.shape[:2], mask.q_block), float("-inf"), dtype=torch.float32)
    for group in plan:
        per_row = batch * group.blocks.shape[1] * mask.kv_block * dim * key.element_size()
        step = max(1, GATHER_BYTES // per_row)
        for start in range(0, len(group.rows), step):
            part = slice(start, start + step)
            rows = group.rows[part]
            add = _additive(group, part, mask, line, heads, always=slots.bias is not None)
            o, sums = _attend(
                query.index_select(1, rows).view(batch, len(rows), mask.q_block, dim),
                _gather(key, group.blocks[part], dim),
                _gather(value, group.blocks[part], dim),
                add,
                scale,
                exact,
            )
            out = out.index_copy(1, rows, o.reshape(batch, len(rows), -1))
            if need_lse and sums is not None:
                lse.index_copy_(1, rows, sums)
    shape = (batch, heads, mask.q_slots)
    result = out.view(*shape, dim)[:, :, :q_len]
    return result, lse.view(shape)[:, :, :q_len] if need_lse else None


def _plan(mask: BlockMask, heads: int, k_len: int) -> list[Group]:
    plans = _PLANS.setdefault(mask, {})
    if (heads, k_len) not in plans:
        plans[heads, k_len] = _make_plan(mask, heads, k_len)
    return plans[heads, k_len]


def _make_plan(mask: BlockMask, heads: int, k_len: int) -> list[Group]:
    """Sort the rows by (count, needs a mask); one group per distinct pair."""
    lists = mask.lists()
    mask_heads, q_blocks, kv_blocks = mask.keep.shape
    counts = lists.indptr.diff().long()
    cut = (lists.full_end < lists.indptr[1:]).long()
    if k_len < mask.kv_slots:
        cut |= mask.keep[:, :, -1].flatten().long()
    head = torch.arange(mask_heads).repeat_interleave(q_blocks)
    groups = []
    for pair in torch.unique(counts * 2 + cut).tolist():
        count, needs_mask = pair // 2, pair % 2
        if count == 0:
            continue
        rows = (counts * 2 + cut == pair).nonzero().flatten()
        entries = lists.indptr[rows].long()[:, None] + torch.arange(count)
        blocks = lists.block[entries].long() + head[rows][:, None] * kv_blocks
        tiles = lists.tile[entries].long() if needs_mask else None
        if tiles is not None and bool((tiles < 0).all()):
            tiles = None
        if mask_heads < heads:  # one pattern for all heads: the same rows of every head
            shift = torch.arange(heads)[:, None, None]
            rows = (rows + shift[..., 0] * q_blocks).flatten()
            blocks = (blocks + shift * kv_blocks).flatten(0, 1)
            tiles = None if tiles is None else tiles.repeat(heads, 1)
        groups.append(Group(rows, blocks, tiles, bool(needs_mask) and k_len < mask.kv_slots))
    return groups


def _key_line(slots: Slots, mask: BlockMask, k_len: int) -> torch.Tensor | None:
    """Return float32 [B or 1, H or 1, kv_slots]: the key bias, -inf past the last key."""
    if slots.bias is None and k_len == mask.kv_slots:
        return None
    bias = slots.bias if slots.bias is not None else torch.zeros((1, 1, k_len))
    return F.pad(bias, (0, mask.kv_slots - k_len), value=float("-inf"))


def _blocked(tensor: torch.Tensor, size: int, blocks: int) -> torch.Tensor:
    """Return [B, H * blocks, size * D], zero-padded to whole blocks."""
    batch, heads, length, dim = tensor.shape
    padded = F.pad(tensor, (0, 0, 0, blocks * size - length)).contiguous()
    return padded.view(batch, heads * blocks, size * dim)


def _gather(tensor: torch.Tensor, blocks: torch.Tensor, dim: int) -> torch.Tensor:
    """Return [B, g, n * block, D] of the listed blocks."""
    picked = tensor.index_select(1, blocks.flatten())
    return picked.view(tensor.shape[0], blocks.shape[0], -1, dim)


def _additive(
    group: Group,
    part: slice,
    mask: BlockMask,
    line: torch.Tensor | None,
    heads: int,
    always: bool,
) -> torch.Tensor | None:
    """Return the additive mask float32 [B or 1, g, q_block or 1, keys] of some rows, or None."""
    blocks = group.blocks[part]
    add = None
    if line is not None and (always or group.ragged):
        cut = line.expand(-1, heads, -1).reshape(line.shape[0], -1, mask.kv_block)
        add = cut[:, blocks.flatten()].view(line.shape[0], len(blocks), 1, -1)
    if group.tiles is not None and mask.tiles is not None:
        tile = group.tiles[part]
        bits = unpack_bits(mask.tiles[tile.clamp(min=0)], mask.kv_block)
        kept = (bits | (tile < 0)[..., None, None]).transpose(1, 2).flatten(2)
        base = torch.zeros((), dtype=torch.float32) if add is None else add
        add = torch.where(kept[None], base, float("-inf"))
    return add


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    add: torch.Tensor | None,
    scale: float,
    exact: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend densely inside one group; `exact` spells the sums out, with LSE and NaN kept apart."""
    if not exact:
        bias = None if add is None else add.to(q.dtype).expand(*q.shape[:3], k.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        if add is not None:
            out = out.masked_fill(add.isneginf().all(-1, keepdim=True), 0)
        return out, None
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    if add is not None:
        scores = (scores + add).masked_fill(add.isneginf(), float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    empty = lse.isneginf()[..., None]
    weights = torch.softmax(scores, dim=-1).masked_fill(empty, 0)
    kept = weights.new_ones(1, dtype=torch.bool) if add is None else ~add.isneginf()
    return weigh(weights, v.to(wide), kept).to(q.dtype), lse.float()
