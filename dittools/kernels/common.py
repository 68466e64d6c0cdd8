"""What every backend does before and after its kernel: order, layout, key bias, dense attention."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.mask import BlockMask


class Slots(NamedTuple):
    """The tensors of a call in slot space, [B, H, slots, D] views without a copy where possible."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None  # float32 [B or 1, H or 1, key slots]; -inf drops a key


def to_slots(call: AttentionCall, mask: BlockMask) -> Slots:
    """Apply the mask's token order to a call; padding slots get zeros and the bias -inf."""
    check_fit(call, mask)
    order, bias = mask.order, call.additive_mask()
    if order is None:
        q, k, v = (t.transpose(1, 2) for t in (call.query, call.key, call.value))
        return Slots(q, k, v, bias)
    q, k, v = (order.apply(t).transpose(1, 2) for t in (call.query, call.key, call.value))
    if bias is not None:
        heads = max(bias.shape[1], order.index.shape[0])
        column = bias.transpose(1, 2)[..., None].expand(-1, -1, heads, -1)  # [B, S_k, H, 1]
        bias = order.apply(column)[..., 0].transpose(1, 2)
    if order.has_padding:
        holes = torch.zeros((1, order.index.shape[0], k.shape[2]), device=k.device)
        holes[0, :, : order.slots].masked_fill_(order.to(k.device).index < 0, float("-inf"))
        bias = holes if bias is None else bias + holes
    return Slots(q, k, v, bias)


def from_slots(out: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """Bring [B, H, slots, D] back to [B, S, H, D] in the sequence's own order."""
    out = out.transpose(1, 2)
    return out if mask.order is None else mask.order.undo(out)


def check_fit(call: AttentionCall, mask: BlockMask) -> None:
    """Raise when a mask was made for another length or head count."""
    reasons = misfit(call, mask)
    if reasons:
        raise UnsupportedCall("the mask does not fit the call", got=", ".join(reasons))


def misfit(call: AttentionCall, mask: BlockMask) -> list[str]:
    """Say why a mask does not fit a call; empty when it does."""
    reasons = []
    heads = call.head_count
    if mask.keep.shape[0] not in (1, heads):
        reasons.append(f"mask has {mask.keep.shape[0]} heads, call has {heads}")
    order = mask.order
    if order is not None and order.index.shape[0] not in (1, heads):
        reasons.append(f"token order has {order.index.shape[0]} heads, call has {heads}")
    q_len, k_len = call.query.shape[1], call.key.shape[1]
    if order is not None:
        if order.tokens != q_len:
            reasons.append(f"token order covers {order.tokens} tokens, call has {q_len}")
        if k_len < order.tokens:
            reasons.append(f"token order covers {order.tokens} tokens, call has {k_len} keys")
        q_len, k_len = order.slots, k_len - order.tokens + order.slots
    for name, length, size, blocks in (
        ("query", q_len, mask.q_block, mask.keep.shape[1]),
        ("key", k_len, mask.kv_block, mask.keep.shape[2]),
    ):
        if -(-length // size) != blocks:
            reasons.append(
                f"mask has {blocks} {name} blocks of {size}, call needs {-(-length // size)}"
            )
    return reasons


def weigh(weights: torch.Tensor, value: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return weights @ value where NaN and inf reach only the rows that keep their key.

    A weight of 0 does not shut them out: 0 * NaN is NaN.

    Args:
        weights: [..., rows, keys], 0 where dropped.
        value: [..., keys, D], in the dtype of the weights.
        kept: bool, broadcasts to the shape of the weights.
    """
    bad = ~value.isfinite()
    if not bool(bad.any()):
        return weights @ value
    out = weights @ value.masked_fill(bad, 0)
    seen = kept.expand(weights.shape).to(value.dtype)
    for is_kind, kind in (
        (value.isposinf(), float("inf")),
        (value.isneginf(), float("-inf")),
        (value.isnan(), float("nan")),
    ):
        touched = seen @ is_kind.to(value.dtype) > 0
        out = out + torch.zeros_like(out).masked_fill(touched, kind)  # inf and -inf make NaN
    return out


def exact_only(name: str, call: AttentionCall) -> list[str]:
    """Refuse calls that ask for few-bit products, for backends that have none."""
    if call.quantize == "none":
        return []
    return [f"{name} has no products in few bits, the call asks for {call.quantize}"]


def dense_attention(call: AttentionCall) -> torch.Tensor:
    """Return [B, S, H, D]: SDPA over all keys, honouring key_mask and key_bias."""
    q, k, v = (t.transpose(1, 2) for t in (call.query, call.key, call.value))
    bias = call.additive_mask()
    if bias is not None:
        bias = bias[:, :, None].to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=call.scale).transpose(1, 2)
