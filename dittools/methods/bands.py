"""Block bands around the diagonal, in frame order or in position order, and stripes of key columns.

Shared by the methods that choose among such patterns per head. Text stands behind the grid's tokens
and is dense both ways; densities count the whole map, text included.
"""

import math
from functools import lru_cache

import torch

from dittools.grid import TokenGrid
from dittools.mask import BlockMask, pack_bits
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


def exact_half_width(grid: TokenGrid, density: float, rounding: str) -> int:
    """Return the largest |q - k| the authors' token band keeps, in tokens.

    Args:
        grid: geometry of the sequence.
        density: share of the map to keep, text included.
        rounding: "ceil" to 128 tokens, itself kept (their Wan code), or "floor", itself left out
            (HunyuanVideo).
    """
    width = band_width(density, grid.total, grid.text)
    if rounding == "ceil":
        return math.ceil(width / 128) * 128
    return max(math.floor(width / 128) * 128 - 1, 0)  # a token always sees itself


@lru_cache(maxsize=32)
def exact_band_mask(
    grid: TokenGrid, density: float, block_size: int, by_position: bool, sink: bool, rounding: str
) -> BlockMask:
    """Return the authors' band, exact to the token; arguments as of `band_mask`.

    Source: svg-project/Sparse-VideoGen. What a block keeps depends on its distance to the diagonal,
    unless the edge of the first frame or of the text runs through it; one bit tile per kind.
    """
    half, blocks = exact_half_width(grid, density, rounding), grid.blocks(block_size)
    sunk = grid.tokens_per_frame if sink else 0
    first = torch.arange(blocks) * block_size
    apart = ((first[:, None] - first) // block_size).abs() - half // block_size
    band = torch.where((apart >= -2) & (apart <= 2), first[:, None] - first, 4 * grid.total)
    band[apart > 2] = -4 * grid.total
    kind = _kinds(first, block_size, grid, sunk)
    code = torch.stack((band, kind[:, None].expand_as(band), kind.expand_as(band)), -1)
    codes, number = torch.unique(code.view(-1, 3), dim=0, return_inverse=True)
    place = torch.zeros(len(codes), dtype=torch.long)
    place[number] = torch.arange(len(number))  # any block of each kind stands for all of it
    row = first[place // blocks, None, None] + torch.arange(block_size)[:, None]
    column = first[place % blocks, None, None] + torch.arange(block_size)
    video = grid.tokens
    near = ((row - column).abs() <= half) | (column < sunk) | (row >= video) | (column >= video)
    real = (row < grid.total) & (column < grid.total)
    kept = near & real
    some, whole = kept.flatten(1).any(1), (kept | ~real).flatten(1).all(1)
    cut = some & ~whole
    index = torch.where(cut, cut.cumsum(0) - 1, -1).int()[number].view(1, blocks, blocks)
    return BlockMask(
        some[number].view(1, blocks, blocks),
        block_size,
        tile_index=index if bool(cut.any()) else None,
        tiles=pack_bits(kept[cut]) if bool(cut.any()) else None,
        order=text_last_order(grid, by_position),
        q_tokens=grid.total,
        kv_tokens=grid.total,
    )


def _kinds(first: torch.Tensor, block_size: int, grid: TokenGrid, sunk: int) -> torch.Tensor:
    """Return int64 [blocks]: equal where no edge tells two blocks apart.

    The edges are those of the first frame, of the text and of the sequence.
    """
    edges = torch.tensor([sunk, grid.tokens, grid.total])
    return (
        ((first[:, None] - edges).clamp(-block_size, 0))
        .mul(torch.tensor([1, 4096, 4096**2]))
        .sum(1)
    )


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
