"""What content-dependent methods share: pooled blocks, top-k and mass selection, dense text."""

from functools import lru_cache

import torch
import torch.nn.functional as F

from dittools.grid import TokenGrid
from dittools.mask import BlockMask
from dittools.methods.placing import placed
from dittools.order import TokenOrder


@lru_cache(maxsize=64)
def text_blocks(grid: TokenGrid, block_size: int) -> torch.Tensor:
    """Return bool [blocks]: the blocks that hold a text token."""
    blocks = torch.zeros(grid.blocks(block_size), dtype=torch.bool)
    if grid.text_before:
        blocks[: -(-grid.text_before // block_size)] = True
    if grid.text_after:
        blocks[(grid.total - grid.text_after) // block_size :] = True
    return blocks


def block_means(tensor: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return float32 [B, H, blocks, D]: mean token of every block of [B, S, H, D].

    A ragged last block is divided by the tokens it really holds.
    """
    batch, tokens, heads, width = tensor.shape
    whole = tokens // block_size * block_size
    parts = []
    if whole:
        cut = tensor[:, :whole].reshape(batch, -1, block_size, heads, width)
        parts.append(cut.mean(dim=2, dtype=torch.float32))
    if whole < tokens:
        parts.append(tensor[:, whole:].mean(dim=1, dtype=torch.float32)[:, None])
    return torch.cat(parts, dim=1).transpose(1, 2)


def keep_top(scores: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Return bool like scores [..., Q, K]: the `count` best entries of each row, ties to the left.

    Args:
        scores: any float; +inf is always first.
        count: one number, or int64 broadcastable to [..., Q].
    """
    columns = scores.shape[-1]
    if isinstance(count, int):
        count = min(max(count, 0), columns)
        least = _kth_largest(scores, count)
        if least is not None:
            kept = scores >= least
            if int(kept.count_nonzero()) == count * (scores.numel() // columns):
                return kept  # no ties, all are numbers
        best = scores.topk(count, dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    taken = torch.arange(columns, device=scores.device) < count[..., None]
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(-1, order, taken.expand_as(order))


def _kth_largest(scores: torch.Tensor, count: int) -> torch.Tensor | None:
    """Return [..., 1], the `count`-th largest of each row; None where `topk` is no slower.

    NumPy's partial sort of short rows is measured at a fifth of the time of `topk` on AVX-512.
    """
    wide = scores.dtype in (torch.float32, torch.float64)
    if scores.device.type != "cpu" or not wide or not 0 < count < scores.shape[-1]:
        return None
    try:
        import numpy as np
    except ImportError:  # torch alone is enough for `import dittools`
        return None
    place = scores.shape[-1] - count
    ordered = np.partition(scores.detach().numpy(), place, axis=-1)
    return torch.from_numpy(ordered[..., place : place + 1])


def mass_counts(mass: torch.Tensor, share: float) -> torch.Tensor:
    """Return int64 [..., Q]: how many of a row's largest entries stay within `share` of its sum.

    This is #{cumulative sum <= share}; methods differ in what they add to it. Rows must sum to 1.
    """
    ordered = mass.sort(dim=-1, descending=True).values
    return (ordered.cumsum(dim=-1) <= share).sum(dim=-1)


def sums_before(ordered: torch.Tensor) -> torch.Tensor:
    """Return [..., n]: the sum of all entries before each, as it stands one place earlier.

    Taking an entry off its own cumulative sum would round it, and a share that is reached exactly
    would count as passed.
    """
    return F.pad(ordered.cumsum(dim=-1)[..., :-1], (1, 0))


def row_mask(
    keep: torch.Tensor, grid: TokenGrid, block_size: int, order: TokenOrder | None = None
) -> BlockMask:
    """Return the mask of bool [H or 1, blocks, blocks] over the whole sequence, text dense.

    Blocks that hold text are kept as rows and as columns, and so is the diagonal. `keep` is
    changed in place.
    """
    text = placed(text_blocks(grid, block_size), keep.device)
    keep |= text | text[:, None]
    keep.diagonal(dim1=-2, dim2=-1).fill_(True)
    return BlockMask(keep, block_size, order=order, q_tokens=grid.total, kv_tokens=grid.total)


def pad_tokens(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    """Return [B, S + pad, H, D] with zeros behind, S + pad a multiple of `multiple`."""
    short = -tensor.shape[1] % multiple
    return F.pad(tensor, (0, 0, 0, 0, 0, short)) if short else tensor


def keep_share(
    mass: torch.Tensor, density: float, per_head: bool = False, items: int = 1
) -> torch.Tensor:
    """Return bool like mass [H, Q, K]: the heaviest blocks, exactly round(density * size) of them.

    Args:
        mass: non-negative.
        density: mean share kept.
        per_head: every head keeps that share; otherwise one threshold serves all heads, so that
            concentrated ones keep fewer.
        items: clips whose heads follow one another; none sets the threshold of another.
    """
    flat = mass.flatten(1) if per_head else mass.reshape(items, -1)
    count = max(1, round(density * flat.shape[1]))
    if count >= flat.shape[1]:
        return torch.ones_like(mass, dtype=torch.bool)
    if flat.device.type == "cpu":
        least = flat.kthvalue(flat.shape[1] - count + 1, dim=1, keepdim=True).values
    else:  # there kthvalue leaves a row of millions to one block of threads
        least = flat.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    kept, ties = flat > least, flat == least
    short = count - kept.sum(1, keepdim=True)
    kept |= ties & (ties.cumsum(1) <= short)  # the leftmost of equal blocks
    return kept.view_as(mass)


def block_sizes(tokens: int, block_size: int, like: torch.Tensor) -> torch.Tensor:
    """Return int64 [blocks]: the tokens each block really holds, on the device of `like`."""
    start = torch.arange(0, tokens, block_size, device=like.device)
    return (tokens - start).clamp(max=block_size)


def slot_means(tensor: torch.Tensor, tokens: int, block_size: int) -> torch.Tensor:
    """Return float32 (64 for 64) [H, blocks, D]: the mean of every block of the first slots.

    Args:
        tensor: [1, slots, H, D] in slot order, zeros in padding slots.
        tokens: tokens in the first slots.
        block_size: slots per block.
    """
    sizes = block_sizes(tokens, block_size, tensor)
    cut = tensor[0, : len(sizes) * block_size].unflatten(0, (len(sizes), block_size))
    wide = torch.promote_types(tensor.dtype, torch.float32)
    means: torch.Tensor = cut.sum(1, dtype=wide) / sizes[:, None, None]
    return means.transpose(0, 1)
