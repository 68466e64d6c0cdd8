"""Block bands around the diagonal, in frame order or in position order, and stripes of key columns.

Shared by the methods that choose among such patterns per head. Text stands behind the grid's tokens
and is dense both ways; densities count the whole map, text included.
"""

import math
from functools import lru_cache

import torch

from dittools.grid import TokenGrid
from dittools.mask import BlockMask
from dittools.order import TokenOrder


@lru_cache(maxsize=32)
def text_last_order(grid: TokenGrid, by_position: bool = False) -> TokenOrder | None:
    """Return the order frames -> positions (or positions -> frames), then text; None if it is so.

    Args:
        grid: geometry of the sequence.
        by_position: the tokens of one place in all frames stand together.
    """
    token = torch.arange(grid.total)
    video = token[grid.text_before : grid.text_before + grid.tokens]
    if by_position:
        video = video.view(grid.frames, -1).t().reshape(-1)
    text = torch.cat((token[: grid.text_before], token[grid.text_before + grid.tokens :]))
    index = torch.cat((video, text))
    return None if torch.equal(index, token) else TokenOrder(index[None], grid.total)


def band_width(density: float, tokens: int, text: int = 0) -> float:
    """Return the width w in tokens at which |q - k| < w keeps `density` of the map.

    Source: svg-project/Sparse-VideoGen; text columns and rows are taken out of the budget first.
    """
    video_share = max(density - 2 * text / tokens, 0.0)
    return tokens * (1 - math.sqrt(1 - min(video_share, 1.0)))


def band_density(blocks: int, half: int) -> float:
    """Return the share of blocks with |row - column| <= half."""
    half = min(half, blocks - 1)
    return (blocks * (2 * half + 1) - half * (half + 1)) / blocks**2


@lru_cache(maxsize=32)
def band_mask(
    grid: TokenGrid, density: float, block_size: int, by_position: bool, sink: bool
) -> BlockMask:
    """Return the block band whose density, text and sink included, is nearest to the one asked for.

    Args:
        grid: geometry of the sequence.
        density: share of blocks to keep.
        block_size: tokens.
        by_position: band in position order: every frame pair, same and near positions.
        sink: every query also sees the first frame; in position order the first slots, as many as
            a frame holds, which is what the authors' one mask for both orders means.
    """
    forced = _forced(grid, block_size, sink)
    row = torch.arange(len(forced))
    apart = (row[:, None] - row).abs()
    counts = torch.bincount(apart[~forced], minlength=len(forced)).cumsum(0) + forced.sum()
    half = int((counts - density * forced.numel()).abs().argmin())
    return _mask(grid, forced | (apart <= half), block_size, by_position)


@lru_cache(maxsize=32)
def stripe_mask(
    grid: TokenGrid, density: float, block_size: int, stripes: tuple[float, ...]
) -> BlockMask:
    """Return text, first frame, diagonal and as many more key columns as the density allows.

    Args:
        grid: geometry of the sequence.
        density: share of blocks to keep; the fixed parts stay even when they are more.
        block_size: tokens.
        stripes: columns as shares of the grid's tokens, the most important first; evenly spaced
            columns when empty.
    """
    forced = _forced(grid, block_size, True)
    blocks, video = len(forced), -(-grid.tokens // block_size)
    keep = forced | torch.eye(blocks, dtype=torch.bool)
    free = (~forced.all(0)).nonzero().flatten()
    per_column = max(int((~keep)[:, free].sum(0).max()) if len(free) else 1, 1)
    count = round(max(density * keep.numel() - float(keep.sum()), 0) / per_column)
    if stripes:
        wanted = (torch.tensor(stripes, dtype=torch.float64) * video).long().clamp(0, video - 1)
        chosen = wanted[:count]
    else:
        chosen = free[
            torch.arange(min(count, len(free))) * len(free) // max(min(count, len(free)), 1)
        ]
    keep[:, chosen] = True
    return _mask(grid, keep, block_size, False)


def _forced(grid: TokenGrid, block_size: int, sink: bool) -> torch.Tensor:
    """Return bool [blocks, blocks]: text rows and columns, and a first frame's worth of columns."""
    blocks = grid.blocks(block_size)
    forced = torch.zeros((blocks, blocks), dtype=torch.bool)
    if grid.text:
        forced[grid.tokens // block_size :] = True
        forced[:, grid.tokens // block_size :] = True
    if sink:
        forced[:, : -(-grid.tokens_per_frame // block_size)] = True
    return forced


def _mask(grid: TokenGrid, keep: torch.Tensor, block_size: int, by_position: bool) -> BlockMask:
    return BlockMask(
        keep[None],
        block_size,
        order=text_last_order(grid, by_position),
        q_tokens=grid.total,
        kv_tokens=grid.total,
    )
