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
from dittools.methods.kmeans import cluster_sums

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
    # runs of a block stand `blocks` apart: whole rows are added up, not a few neighbours
    columns = runs.key.permute(0, 3, 2, 1).reshape(heads, width, count * blocks).to(query.dtype)
    middle = mean.key[:, :, 0].transpose(1, 2).to(query.dtype)
    log = runs.weight.log().transpose(1, 2).flatten(1)[:, None]  # [H or 1, 1, count * blocks]
    power = runs.value.square().sum(3) / runs.weight.clamp(min=1e-30)  # e^s holds the weight once
    power = power.transpose(1, 2).contiguous()[:, None]  # [H, 1, count, blocks]
    along = (runs.value * mean.value).sum(3).transpose(1, 2).contiguous()[:, None]
    far = (mean.value[:, :, 0].square().sum(2) * mean.weight[..., 0])[:, None]
    out = text.new_empty(heads, query.shape[1] // each, blocks)
    tile = _TILE.get(query.device.type, _TILE["cuda"])
    step = each * max(1, tile // (heads * each * blocks * count))
    for first in range(0, query.shape[1], step):
        part = query[:, first : first + step]
        scores = (part @ columns).float().add_(log)
        peak = scores.amax(-1, keepdim=True).clamp(min=-1e30)
        peak = torch.maximum(peak, text[:, first : first + step, None])
        weight = scores.sub_(peak).exp_()
        total = weight.sum(2) + (text[:, first : first + step] - peak[..., 0]).exp()
        weight = weight.unflatten(2, (count, blocks))
        if pooled:
            near = ((part @ middle).float() - peak).clamp(max=40).exp()
            both = (weight * along).sum(2)
            found = weight.square_().mul_(power).sum(2)
            found += near * (near * far - 2 * both)
        else:
            found = weight.square_().mul_(power).sum(2)
        found = found.clamp(min=0) / total.square()[..., None].clamp(min=1e-30)
        out[:, first // each : (first + step) // each] = found.unflatten(1, (-1, each)).mean(2)
    return out


def group_error(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log: torch.Tensor,
    owner: torch.Tensor,
    means: tuple[torch.Tensor, torch.Tensor] | None,
    groups: int,
) -> torch.Tensor:
    """Return float32 [H, Q, groups]: E for single queries and groups of keys of any size.

    In units of each query's own, so only groups of one query compare.

    Args:
        query: [H, Q, D], scaled.
        key: [H, D, tiles * size], in tiles that each hold keys of one group.
        value: [H, tiles * size, D].
        log: float32 [H or 1, tiles * size], log of the tokens a key weighs as; -inf for none.
        owner: int64 [H, tiles], the group of each tile; from `groups` on it is of no interest.
        means: mean keys and values [H, groups, D] that would stand in; None for nothing.
        groups: groups of keys.
    """
    heads, tiles = owner.shape
    size = key.shape[2] // tiles
    wide = value.float()
    power = wide.square().sum(2)  # e^s holds the weight
    owner = owner.clamp(max=groups)
    if means is not None:
        mean_value = torch.nn.functional.pad(means[1].float(), (0, 0, 0, 1))
        own = mean_value.gather(1, owner[..., None].expand(-1, -1, wide.shape[2]))
        weight = log.exp()
        along = (wide.unflatten(1, (tiles, size)) * own[:, :, None]).sum(3).flatten(1) * weight
        square = weight.square().expand(heads, -1).reshape(heads, tiles, size).sum(2)
        square = cluster_sums(square[..., None], owner, groups + 1)[0][:, :groups, 0]
        far = (means[1].float().square().sum(2) * square)[:, None]
        middle = means[0].transpose(1, 2).to(query.dtype)
    out = wide.new_empty(heads, query.shape[1], groups)
    tile = _TILE.get(query.device.type, _TILE["cuda"])
    step = max(1, tile // (heads * tiles * size))
    for first in range(0, query.shape[1], step):
        part = query[:, first : first + step]
        scores = (part @ key).float().add_(log[:, None])
        peak = scores.amax(-1, keepdim=True).clamp(min=-1e30)
        weights = scores.sub_(peak).exp_()
        near = None
        sums = [(weights * weights).mul_(power[:, None])]
        if means is not None:
            sums.append(weights * along[:, None])
            near = ((part @ middle).float() - peak).clamp(max=40).exp()
        by_tile = torch.cat(sums, dim=1).unflatten(2, (tiles, size)).sum(3).transpose(1, 2)
        by_group = cluster_sums(by_tile.contiguous(), owner, groups + 1)[0][:, :groups]
        found = by_group.transpose(1, 2)
        if near is not None:
            found, cross = found.chunk(2, dim=1)
            found = found - 2 * near * cross + near * near * far
        out[:, first : first + step] = found.clamp(min=0)
    return out
