"""How wrong the output would be if a block of keys were pooled, or dropped, for a block of queries.

The value-aware score of SVG-EAR (arXiv:2603.08982): with s_t the score of key t and c that of the
mean key of its block of n,

    E = sum_t |e^(s_t) v_t - e^c v_mean|^2
      = sum_t e^(2 s_t) |v_t|^2 - 2 e^c sum_t e^(s_t) (v_t . v_mean) + n e^(2 c) |v_mean|^2,

from cached |v_t|^2 and v_t . v_mean, so no product with values is needed. Where the block would be
dropped instead, its own weight counts: sum_t e^(2 s_t) |v_t|^2. Two things are this project's: a
few queries of a block are looked at one by one instead of their mean, which hides what single ones
attend to, and keys and values enter as means of short runs; and E is divided by the squared
softmax denominator, which makes rows and heads comparable: one threshold can serve all of them.
"""

import torch

from dittools.methods.compensation import Runs

_TILE = {"cpu": 2**18, "cuda": 2**25}  # scores held at a time: a CPU's second-level cache


def pooling_error(
    query: torch.Tensor, runs: Runs, text: torch.Tensor, scale: float, each: int, pooled: bool
) -> torch.Tensor:
    """Return float32 [H, query blocks, blocks]: mean squared error of single outputs, estimated.

    Args:
        query: [H, query blocks * each, D], the queries that stand for each block.
        runs: keys and values of every block.
        text: float32 [H, query blocks * each], log-sum-exp of the scores of keys that always stay.
        scale: factor on the scores.
        each: queries per block.
        pooled: whether blocks are replaced by their mean; dropped if not.
    """
    heads, blocks, count, width = runs.key.shape
    mean = runs.pooled()
    # products in the dtype of the call, which has units of its own for half precision
    query = query * scale
    columns = runs.key.permute(0, 3, 1, 2).reshape(heads, width, blocks * count).to(query.dtype)
    middle = mean.key[:, :, 0].transpose(1, 2).to(query.dtype)
    log = runs.weight.log().flatten(1)[:, None]  # [H or 1, 1, blocks * count]
    power = runs.value.square().sum(3) / runs.weight.clamp(min=1e-30)  # e^s holds the weight once
    along = (runs.value * mean.value).sum(3)
    far = (mean.value[:, :, 0].square().sum(2) * mean.weight[..., 0])[:, None]
    out = text.new_empty(heads, query.shape[1] // each, blocks)
    tile = _TILE.get(query.device.type, _TILE["cuda"])
    step = each * max(1, tile // (heads * each * blocks * count))
    for first in range(0, query.shape[1], step):
        part = query[:, first : first + step]
        scores = (part @ columns).float().add_(log)
        peak = scores.amax(-1, keepdim=True).clamp(min=-1e30)
        peak = torch.maximum(peak, text[:, first : first + step, None])
        weight = scores.sub_(peak).exp_().unflatten(2, (blocks, count))
        total = weight.sum((2, 3)) + (text[:, first : first + step] - peak[..., 0]).exp()
        if pooled:
            near = ((part @ middle).float() - peak).clamp(max=40).exp()
            both = (weight * along[:, None]).sum(3)
            found = (weight * weight).mul_(power[:, None]).sum(3)
            found += near * (near * far - 2 * both)
        else:
            found = (weight * weight).mul_(power[:, None]).sum(3)
        found = found.clamp(min=0) / total.square()[..., None].clamp(min=1e-30)
        out[:, first // each : (first + step) // each] = found.unflatten(1, (-1, each)).mean(2)
    return out
