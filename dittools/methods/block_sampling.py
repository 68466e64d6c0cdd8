"""Attention mass per block from a few queries and pooled keys: what a mask is chosen by online.

Of every block of queries some rows stand for all; of every block of keys the means of short runs
do. With all rows and runs of one key it is the exact mass. Scores are reduced tile by tile while
they are in the cache, and block after block by log-sum-exp, so nothing of size N x N exists.

Source: this project. Mean keys in place of keys are SpargeAttention's idea (arXiv:2502.18137).
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from dittools.methods.placing import label_counts

_TILE = {"cpu": 2**18, "cuda": 2**25}  # scores held at a time: a CPU's second-level cache
_GOLDEN = 0.6180339887498949


class PooledKeys(NamedTuple):
    """Keys in runs, laid out so that a block's runs are reduced by whole rows.

    Attributes:
        runs: [H, D, runs per block, blocks], mean keys.
        weight: float32 [H or 1, runs per block, blocks], log of the keys a run stands for.
        rest: [H, D, R], keys past the grid's tokens, as they are; they only take mass away.
        rest_weight: float32 [H or 1, R].
    """

    runs: torch.Tensor
    weight: torch.Tensor
    rest: torch.Tensor
    rest_weight: torch.Tensor


def sampled_slots(
    tokens: int, block_size: int, rows: int, blocks: int = 0, turn: int = 0
) -> torch.Tensor:
    """Return int64 [n]: the slots that stand for their blocks, `rows` of each, amid equal parts.

    Args:
        tokens: slots in all.
        block_size: slots per block.
        rows: slots per block; all of a block that has no more.
        blocks: take only so many blocks, spread by the golden ratio, which falls into no step with
            rows or frames; 0 takes all.
        turn: takes other slots, as `slots_amid` says.
    """
    starts = torch.arange(0, tokens, block_size)
    if 0 < blocks < len(starts):
        spread = (torch.arange(1, blocks + 1, dtype=torch.float64) * _GOLDEN).frac() * len(starts)
        starts = starts[torch.unique(spread.long())]
    if rows >= block_size:
        picked = (starts[:, None] + torch.arange(block_size)).flatten()
        return picked[picked < tokens]
    sizes = (tokens - starts).clamp(max=block_size)
    picked = (starts[:, None] + slots_amid(sizes, rows, turn)).flatten()
    return picked[torch.cat((picked.new_ones(1), picked.diff())) > 0]  # short blocks repeat some


@lru_cache(maxsize=32)
def _owned_slots(
    tokens: int, block_size: int, rows: int, blocks: int, turn: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return `sampled_slots`, the block each belongs to, counted through, and how many there are.

    Layers of one step ask for the same.
    """
    slots = sampled_slots(tokens, block_size, rows, blocks, turn)
    owner = torch.unique_consecutive(slots // block_size, return_inverse=True)[1]
    return slots.to(device), owner.to(device), int(owner[-1]) + 1


def slots_amid(sizes: torch.Tensor, rows: int, turn: int = 0) -> torch.Tensor:
    """Return int64 [blocks, rows]: a slot of each of `rows` equal parts of every block, ascending.

    It is the middle one at first; with every turn another one, which golden steps soon spread over
    the part. Blocks of fewer slots than rows repeat some.

    Args:
        sizes: int64 [blocks], slots of each block.
        rows: parts per block.
        turn: from 0.
    """
    if turn == 0:
        return (2 * torch.arange(rows) + 1) * sizes[:, None] // (2 * rows)
    within = torch.arange(rows) + (0.5 + turn * _GOLDEN) % 1
    return (within.double() * sizes[:, None] / rows).long()


def gather_heads(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return [H, n, D]: tokens index [H or 1, n] of [S, H, D], row by row, no index per channel."""
    heads = tensor.shape[1]
    flat = tensor.reshape(-1, tensor.shape[2])
    where = index * heads + torch.arange(heads, device=index.device)[:, None]
    return flat.index_select(0, where.flatten()).view(heads, -1, tensor.shape[2])


def pool_keys(
    key: torch.Tensor,
    index: torch.Tensor,
    tokens: int,
    block_size: int,
    run: int,
    bias: torch.Tensor | None = None,
) -> PooledKeys:
    """Return the mean keys of runs of `run` slots, and how much each stands for.

    Args:
        key: [S, H, D].
        index: int64 [H or 1, S], the token of each slot; keys past the index stay behind it.
        tokens: slots that blocks cover.
        block_size: slots per block.
        run: slots per run, a divisor of block_size.
        bias: float [H or 1, S], added to the scaled scores; -inf drops a key.
    """
    heads, width = key.shape[1:]
    blocks, each = -(-tokens // block_size), block_size // run
    if index.shape[1] < key.shape[0]:
        extra = torch.arange(index.shape[1], key.shape[0], device=index.device)
        index = torch.cat((index, extra.expand(index.shape[0], -1)), dim=1)
    ordered = gather_heads(key, index)
    weight, rest = _weights(index, tokens, blocks * each, run, bias)
    short = blocks * block_size - tokens
    grid = ordered[:, :tokens]
    grid = torch.nn.functional.pad(grid, (0, 0, 0, short)) if short else grid
    mean = grid.reshape(heads, -1, run, width)
    if bias is None and not short:
        mean = mean.mean(2)
    else:  # only over the keys that count
        slot = torch.arange(blocks * block_size, device=key.device)
        real = (slot < tokens)[None]
        if bias is not None:
            line = bias.expand(max(len(bias), len(index)), -1)
            line = line.gather(1, index.expand(len(line), -1))[:, :tokens] > float("-inf")
            real = torch.nn.functional.pad(line, (0, short))
        real = real.view(len(real), -1, run, 1).to(grid.dtype)
        mean = (mean * real).sum(2) / real.sum(2).clamp(min=1)
    runs = mean.view(heads, blocks, each, width).permute(0, 3, 2, 1).contiguous()
    log = weight.view(len(weight), blocks, each).transpose(1, 2).contiguous()
    return PooledKeys(runs, log, ordered[:, tokens:].transpose(1, 2), rest)


def _weights(
    index: torch.Tensor, tokens: int, count: int, run: int, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 [H or 1, runs], the log of the keys per run, and [H or 1, R] past the runs."""
    if bias is None:
        first = torch.arange(count, device=index.device) * run
        real = (tokens - first).clamp(min=0, max=run).float()
        return real.log()[None], torch.zeros((1, index.shape[1] - tokens), device=index.device)
    line = bias.float().expand(max(len(bias), len(index)), -1)
    line = line.gather(1, index.expand(len(line), -1))
    short = count * run - tokens
    padded = torch.nn.functional.pad(line[:, :tokens], (0, short), value=float("-inf"))
    return padded.view(len(line), count, run).logsumexp(2), line[:, tokens:]


def block_shares(query: torch.Tensor, keys: PooledKeys, scale: float) -> torch.Tensor:
    """Return float32 [H, R, blocks]: the attention mass of every query in every key block.

    Args:
        query: [H, R, D].
        keys: of the same heads and dtype.
        scale: factor on the scores.
    """
    heads, rows, width = query.shape
    each, blocks = keys.runs.shape[2:]
    query = query * scale
    logs = torch.empty((heads, rows, blocks), device=query.device)
    tile = _TILE.get(query.device.type, _TILE["cuda"])
    step = max(1, min(rows, 64 if query.device.type == "cpu" else 1024))
    wide = max(1, tile // (heads * step * each))
    for start in range(0, blocks, wide):
        part = keys.runs[..., start : start + wide].reshape(heads, width, -1)
        weight = keys.weight[:, None, :, start : start + wide]
        for first in range(0, rows, step):
            scores = (query[:, first : first + step] @ part).float()
            scores = scores.unflatten(2, (each, -1)).add_(weight)
            most = scores.amax(2).clamp_(min=-1e30)
            total = scores.sub_(most[:, :, None]).exp_().sum(2)
            logs[:, first : first + step, start : start + wide] = total.log_().add_(most)
    most = logs.amax(-1, keepdim=True)
    behind = (query @ keys.rest).float() + keys.rest_weight[:, None]
    if behind.shape[-1]:
        most = torch.maximum(most, behind.amax(-1, keepdim=True))
    most = most.clamp(min=-1e30)
    shares = logs.sub_(most).exp_()
    total = shares.sum(-1, keepdim=True) + (behind - most).exp().sum(-1, keepdim=True)
    return shares.div_(total.clamp(min=1e-30))


def sampled_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    index: torch.Tensor,
    tokens: int,
    block_size: int,
    scale: float,
    *,
    rows: int,
    run: int = 1,
    blocks: int = 0,
    turn: int = 0,
    key_block: int = 0,
    key_index: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return float32 [H, query blocks, key blocks]: the mass of each, summed over its samples.

    Args:
        query: [S, H, D].
        key: [S or more, H, D].
        index: int64 [H or 1, S], the token of each slot.
        tokens: slots that blocks cover, the first ones.
        block_size: slots per block.
        scale: factor on the scores.
        rows: queries per block, evenly spaced.
        run: keys that are pooled, a divisor of the keys per block; 1 pools none.
        blocks: query blocks looked at, 0 for all.
        turn: looks at other queries, as `slots_amid` says.
        key_block: slots per block of keys; 0 for block_size.
        key_index: the token of each slot of keys, if other ones.
        bias: float [H or 1, S or more] added to the scaled scores.
    """
    slots, owner, owners = _owned_slots(tokens, block_size, rows, blocks, turn, query.device)
    keys = pool_keys(
        key, index if key_index is None else key_index, tokens, key_block or block_size, run, bias
    )
    shares = block_shares(gather_heads(query, index[:, slots]), keys, scale)
    if shares.device.type == "cpu":
        mass = shares.new_zeros((shares.shape[0], owners, shares.shape[2]))
        return mass.index_add_(1, owner, shares)
    sizes = label_counts(owner, owners)  # adding on a GPU would go in the order threads run
    lengths = sizes.expand(len(shares), -1).contiguous()
    return torch.segment_reduce(shares, "sum", lengths=lengths, axis=1, unsafe=True)


def run_length(block_size: int, runs: int = 8) -> int:
    """Return the keys per run that make about `runs` runs a block: a divisor of block_size."""
    most = max(1, block_size // runs)
    return max(n for n in range(1, most + 1) if block_size % n == 0)
