"""Attention masks as diffusers passes them, brought to one flag per key, or a reason why not."""

from typing import NamedTuple

import torch


class KeyMask(NamedTuple):
    """What a mask says about the keys.

    Attributes:
        keep: bool [B, S], None when every key is kept.
        reason: why the mask cannot be used, "" when it can.
    """

    keep: torch.Tensor | None
    reason: str = ""


def key_mask(mask: torch.Tensor | None, batch: int, tokens: int, pairwise: bool) -> KeyMask:
    """Return the mask as flags over keys.

    Args:
        mask: bool or additive; [B, S], [B, 1, 1, S] or, where `pairwise` allows it, [B, 1, S, S].
        batch: rows of the query.
        tokens: length of the sequence.
        pairwise: a bool [B, 1, S, S] mask is an outer product of valid tokens, so that its first
            row, a row of the always valid grid, holds the valid keys.
    """
    if mask is None:
        return KeyMask(None)
    if mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2] == 1:
        rows = mask[:, 0, 0]
    elif mask.dim() == 2 and mask.shape[-1] == tokens and mask.shape[0] in (1, batch):
        rows = mask
    elif mask.dim() == 4 and pairwise and mask.dtype == torch.bool and mask.shape[1] == 1:
        rows = mask[:, 0, 0]
    else:
        return KeyMask(None, f"a mask of shape {_shape(mask)} differs from query to query")
    if rows.shape[-1] != tokens or rows.shape[0] not in (1, batch):
        return KeyMask(None, f"a mask of shape {_shape(mask)} does not fit {tokens} keys")
    if rows.dtype != torch.bool:
        kept, dropped = rows == 0, rows <= -1e4
        if not bool((kept | dropped).all()):
            return KeyMask(None, "an additive mask weighs keys instead of dropping them")
        rows = kept
    if bool(rows.all()):
        return KeyMask(None)
    return KeyMask(rows.expand(batch, tokens))


def _shape(mask: torch.Tensor) -> str:
    return "x".join(str(side) for side in mask.shape)
