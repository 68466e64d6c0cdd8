"""Exact rows of a block mask and exact attention for a few queries, without an N x N object."""

import torch

from dittools.mask import BlockMask, unpack_bits

_TINY = 1e-20  # a sum of weights below this has lost its digits


def mask_rows(mask: BlockMask, rows: torch.Tensor) -> torch.Tensor:
    """Return bool [H or 1, R, keys]: the keys that some queries keep, in the sequence's order.

    On the device of the mask.

    Args:
        mask: over the sequence; keys beyond it follow in their own order.
        rows: int64 [R], query tokens.
    """
    tokens = mask.kv_tokens or (mask.order.tokens if mask.order else mask.kv_slots)
    device = mask.keep.device
    order, rows = None if mask.order is None else mask.order.to(device), rows.to(device)
    heads = max(mask.keep.shape[0], 1 if order is None else order.index.shape[0])
    head = torch.arange(heads, device=device)[:, None]
    slot = rows[None] if order is None else order.inverse[:, rows]
    slot = slot.expand(heads, -1)
    block, inside = slot // mask.q_block, slot % mask.q_block
    shared = head.clamp(max=mask.keep.shape[0] - 1)
    kept = mask.keep[shared, block].repeat_interleave(mask.kv_block, dim=2)
    if mask.tiles is not None and mask.tile_index is not None:
        index = mask.tile_index[shared, block]  # [heads, R, key blocks]
        bytes_ = mask.tiles[index.clamp(min=0).long(), inside[..., None]]
        bits = unpack_bits(bytes_.flatten(0, 1), mask.kv_block).unflatten(0, bytes_.shape[:2])
        kept &= (bits | (index < 0)[..., None]).flatten(2)
    if order is None:
        return kept[..., :tokens]
    extra = order.slots + torch.arange(tokens - order.tokens, device=device)
    place = torch.cat((order.inverse, extra.expand(len(order.inverse), -1)), dim=1)
    return kept.gather(2, place.expand(heads, -1)[:, None].expand(-1, kept.shape[1], -1))


def sample_rows(tokens: int, count: int, seed: int) -> torch.Tensor:
    """Return int64 [R], ascending: one query drawn from each of `count` equal runs of tokens."""
    count = min(count, tokens)
    edges = torch.arange(count + 1) * tokens // count
    draw = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return edges[:-1] + (draw * (edges[1:] - edges[:-1])).long()


def weights(
    query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 [H, R, N] exp(score - row maximum), not yet normalised, and the maxima."""
    scores = (query * scale) @ key.transpose(1, 2)
    if bias is not None:
        scores = scores + bias
    peak = scores.amax(dim=-1, keepdim=True)
    return (scores - peak).exp_(), peak


def masked_output(weight: torch.Tensor, kept: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return float32 [H, R, D]: attention of the rows over the kept keys only.

    Args:
        weight: [H, R, N] as `weights` gives it.
        kept: bool [H or 1, R, N].
        value: [H, N, D].
    """
    part = weight * kept
    total = part.sum(dim=-1, keepdim=True)
    out = part @ value / total.clamp(min=_TINY)
    lost = total < _TINY
    if bool(lost.any()):  # the kept keys all lie far below the row's best one
        log = weight.clamp(min=1e-38).log().masked_fill(~kept, float("-inf"))
        again = torch.nan_to_num(log.softmax(dim=-1)) @ value
        out = torch.where(lost, again, out)
    return out
