"""Probe rows: a few queries attended exactly, which tell how far a sparse result is from dense.

64 rows of N cost 64 / N of a dense call and give an unbiased estimate of its squared error,
whatever the method was. Rows are drawn at random: picked ones (near group means) would flatter.
"""

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend

_CHUNK = 2**24  # scores held at a time


def probe_rows(tokens: int, count: int, seed: int) -> torch.Tensor:
    """Return int64 [min(count, tokens)], ascending: one query drawn from each of equal runs.

    The same seed gives the same rows. Drawn on the CPU, so that no device waits.
    """
    count = min(count, tokens)
    edges = torch.arange(count + 1) * tokens // max(count, 1)
    draw = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return edges[:-1] + (draw * (edges[1:] - edges[:-1])).long()


def exact_rows(call: AttentionCall, rows: torch.Tensor) -> torch.Tensor:
    """Return float [B, R, H, D]: dense attention of some queries over all keys of the call.

    Computed in float32 at least, key_mask and key_bias included; a query without keys gets zero.

    Args:
        call: any call; keys may be more than queries.
        rows: int64 [R], on any device.
    """
    wide = torch.promote_types(call.query.dtype, torch.float32)
    query = call.query[:, rows.to(call.query.device)].to(wide).transpose(1, 2) * call.softmax_scale
    batch, heads, count, width = query.shape
    bias = call.additive_mask()
    out = query.new_empty(batch, heads, count, width)
    step = max(1, _CHUNK // (count * call.key.shape[1]))  # heads at a time
    for item in range(batch):
        line = None if bias is None else bias[min(item, len(bias) - 1)].to(wide)
        for first in range(0, heads, step):
            some = slice(first, first + step)
            key = call.key[item, :, some].permute(1, 2, 0).to(wide)
            scores = query[item, some] @ key
            if line is not None:
                scores += (line if len(line) == 1 else line[some])[:, None]
                empty = scores.amax(-1, keepdim=True) == float("-inf")
                weights = scores.softmax(-1).masked_fill_(empty, 0)
            else:
                weights = scores.softmax(-1)
            out[item, some] = weights @ call.value[item, :, some].transpose(0, 1).to(wide)
    return out.transpose(1, 2)


def rows_by_backend(call: AttentionCall, backend: Backend, rows: torch.Tensor) -> torch.Tensor:
    """Return [B, R, H, D]: some queries over all keys, run and counted by the backend."""
    asked = AttentionCall(
        call.query.index_select(1, rows),
        call.key,
        call.value,
        TokenGrid(1, 1, len(rows)),
        scale=call.scale,
        key_mask=call.key_mask,
        key_bias=call.key_bias,
    )
    return backend.dense(asked)


def squared_error(found: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [H] twice: |found - exact|^2 and |exact|^2 of rows [B, R, H, D], all rows together."""
    apart = (found.to(exact.dtype) - exact).square().sum(dim=(0, 1, 3))
    return apart, exact.square().sum(dim=(0, 1, 3))


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Return float [H]: |found - exact| / |exact| of rows [B, R, H, D], batch and rows together.

    NaN where a head's rows are not finite; 0 where both are zero.
    """
    apart, size = squared_error(found, exact)
    ratio = (apart / size).sqrt()
    return torch.where((apart == 0) & (size == 0), torch.zeros_like(ratio), ratio)
