"""Calls with NaN and inf in some keys and values, and what is right for them, query by query."""

import torch

from dittools.call import AttentionCall
from dittools.mask import BlockMask

KINDS = (float("nan"), float("inf"), float("-inf"))


def poison(call: AttentionCall, seed: int) -> None:
    """Put NaN into one key, and NaN, inf and -inf into single entries of a few values."""
    draw = torch.Generator().manual_seed(seed)

    def below(most: int) -> int:
        return int(torch.randint(most, (1,), generator=draw))

    batch, keys, heads, dim = call.value.shape
    call.key[below(batch), below(keys), below(heads), below(dim)] = float("nan")
    for kind in KINDS:
        call.value[below(batch), below(keys), below(heads), below(dim)] = kind
    call.value[below(batch), below(keys), below(heads)] = float("nan")


def row_by_row(call: AttentionCall, mask: BlockMask) -> torch.Tensor:
    """Return float64 [B, S, H, D]: every query sees a tensor that holds its kept keys alone."""
    keep, bias = mask.to_dense(), call.additive_mask()
    out = torch.zeros(call.query.shape, dtype=torch.float64)
    for b, q, h in torch.cartesian_prod(*(torch.arange(n) for n in call.query.shape[:3])).tolist():
        kept = keep[min(h, keep.shape[0] - 1), q]
        line = torch.zeros(len(kept))
        if bias is not None:
            line = bias[min(b, bias.shape[0] - 1), min(h, bias.shape[1] - 1)]
            kept = kept & ~line.isneginf()
        if kept.any():
            key, value = call.key[b, kept, h].double(), call.value[b, kept, h].double()
            scores = key @ call.query[b, q, h].double() * call.softmax_scale + line[kept]
            out[b, q, h] = torch.softmax(scores, dim=0) @ value
    return out


def disagreement(out: torch.Tensor, want: torch.Tensor) -> dict[str, object]:
    """Return where `out` is finite otherwise than `want`, and the largest error elsewhere."""
    finite = want.isfinite()
    return {
        "spoilt": int((~finite).sum()),
        "clean": int(finite.sum()),
        "spread": int((finite & ~out.isfinite()).sum()),
        "hidden": int((~finite & out.isfinite()).sum()),
        "error": float((out.double() - want).where(finite & out.isfinite(), 0.0).abs().max()),
    }
