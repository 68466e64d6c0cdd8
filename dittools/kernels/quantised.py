"""Attention in few-bit products, rounded and multiplied back in plain torch: the specification.

Source: arXiv:2506.16054. Queries are rounded per block of rows, keys per block, weights per block
pair (64 x 64 at its setting) by their largest entry, values per channel; all symmetric, with
scale = largest / (2 ** (bits - 1) - 1). Weights are exp(score - row maximum), so at most 1, and
the denominators are sums of unrounded ones. Keys are not smoothed. Dropped pairs are left out
before the softmax. Differences: the authors' demo kernel scales queries per 32 rows, rounds weights
by a constant 1/127 against the running row maximum (the Triton kernel here does that too) and runs
values in half precision ("int8_half"); FP8 values are this project's addition.
"""

import torch

from dittools.call import AttentionCall
from dittools.kernels.common import Slots, from_slots, to_slots
from dittools.mask import BlockMask, unpack_bits

FP8_MAX = 448.0  # of float8_e4m3fn
_BITS = {"int8": (8, 8), "int8_fp8": (8, 0), "int8_half": (8, 0), "int4": (4, 4)}


def round_blocks(tensor: torch.Tensor, block: int, bits: int) -> torch.Tensor:
    """Return [B, H, S, D] rounded symmetrically, one scale per run of `block` rows."""
    short = -tensor.shape[2] % block
    cut = torch.nn.functional.pad(tensor, (0, 0, 0, short)).unflatten(2, (-1, block))
    rounded = _rounded(cut, cut.abs().amax(dim=(3, 4), keepdim=True), bits)
    return rounded.flatten(2, 3)[:, :, : tensor.shape[2]]


def _rounded(tensor: torch.Tensor, most: torch.Tensor, bits: int) -> torch.Tensor:
    levels = 2 ** (bits - 1) - 1
    scale = torch.where(most > 0, most / levels, torch.ones_like(most))
    return (tensor / scale).round().clamp(-levels, levels) * scale


def round_values(value: torch.Tensor, quantize: str) -> torch.Tensor:
    """Return [B, H, S, D] rounded per channel as `quantize` says: integers, FP8, or not at all."""
    bits = _BITS[quantize][1]
    most = value.abs().amax(dim=2, keepdim=True)
    if bits:
        return _rounded(value, most, bits)
    if quantize == "int8_half":
        return value
    scale = torch.where(most > 0, most / FP8_MAX, torch.ones_like(most))
    return (value / scale).to(torch.float8_e4m3fn).to(value.dtype) * scale


def _round_weights(weights: torch.Tensor, block: int, quantize: str) -> torch.Tensor:
    """Return [B, rows, n] rounded per block of columns, all rows together; the end is ragged."""
    bits = _BITS[quantize][1]
    if bits:
        short = -weights.shape[2] % block
        cut = torch.nn.functional.pad(weights, (0, short)).unflatten(2, (-1, block))
        most = cut.amax(dim=(1, 3), keepdim=True)
        return _rounded(cut, most, bits).flatten(2)[..., : weights.shape[2]]
    if quantize == "int8_half":
        return weights
    return (weights * FP8_MAX).to(torch.float8_e4m3fn).to(weights.dtype) / FP8_MAX


def quantised_attention(call: AttentionCall, mask: BlockMask) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [B, S, H, D] in the dtype of call.query and the log-sum-exp float [B, S, H].

    Args:
        call: with `quantize` other than "none".
        mask: covers the call's slots; groups are its blocks.
    """
    mask = mask.to(call.query.device)
    wide = torch.promote_types(call.query.dtype, torch.float32)
    slots = to_slots(call, mask)
    bits = _BITS[call.quantize][0]
    query = round_blocks(slots.query.to(wide), mask.q_block, bits) * call.softmax_scale
    key = round_blocks(slots.key.to(wide), mask.kv_block, bits)
    value = round_values(slots.value.to(wide), call.quantize)
    rounded = Slots(query, key, value, slots.bias)
    out = torch.zeros(query.shape, dtype=wide, device=query.device)
    lse = torch.full(query.shape[:3], float("-inf"), dtype=wide, device=query.device)
    for head in range(query.shape[1]):
        for q_block in range(mask.keep.shape[1]):
            rows = slice(q_block * mask.q_block, (q_block + 1) * mask.q_block)
            part = _attend_rows(rounded, mask, head, q_block, call.quantize)
            if part is not None:
                out[:, head, rows], lse[:, head, rows] = part
    result = from_slots(out.to(call.query.dtype), mask)
    return result, from_slots(lse[..., None], mask)[..., 0]


def _attend_rows(
    slots: Slots, mask: BlockMask, head: int, q_block: int, quantize: str
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return [B, rows, D] and [B, rows] of one block of queries; None when it keeps nothing."""
    columns, kept = kept_columns(mask, head, q_block, slots.key.shape[2])
    q = slots.query[:, head, q_block * mask.q_block : (q_block + 1) * mask.q_block]
    if not len(columns):
        return None
    scores = q @ slots.key[:, head, columns].transpose(1, 2)
    if slots.bias is not None:
        line = slots.bias[:, min(head, slots.bias.shape[1] - 1), columns]
        scores = scores + line[:, None].to(scores.dtype)
    scores = scores.masked_fill(~kept[: q.shape[1]], float("-inf"))
    most = scores.amax(-1, keepdim=True)
    weights = (scores - most.clamp(min=-1e30)).exp()
    total = weights.sum(-1)
    product = _round_weights(weights, mask.kv_block, quantize) @ slots.value[:, head, columns]
    return product / total.clamp(min=1e-30)[..., None], total.log() + most[..., 0]


def kept_columns(
    mask: BlockMask, head: int, q_block: int, key_slots: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the key slots of a row's kept blocks, int64 [n], and bool [q_block, n]."""
    head = min(head, mask.keep.shape[0] - 1)
    blocks = mask.keep[head, q_block].nonzero().flatten()
    inside = torch.arange(mask.kv_block, device=blocks.device)
    columns = (blocks[:, None] * mask.kv_block + inside).flatten()
    kept = torch.ones(
        (mask.q_block, len(blocks), mask.kv_block), dtype=torch.bool, device=blocks.device
    )
    if mask.tiles is not None and mask.tile_index is not None:
        tile = mask.tile_index[head, q_block, blocks].long()
        bits = unpack_bits(mask.tiles[tile.clamp(min=0)], mask.kv_block)
        kept &= bits.transpose(0, 1) | (tile < 0)[:, None]
    real = columns < key_slots
    return columns[real], kept.flatten(1)[:, real]
