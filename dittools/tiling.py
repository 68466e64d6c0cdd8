"""Masks that factor over the axes of a grid, cut into tiles of frames x height x width tokens."""

from functools import lru_cache
from itertools import product

import torch

from dittools.grid import TokenGrid
from dittools.mask import BlockMask, pack_bits
from dittools.order import TokenOrder


@lru_cache(maxsize=64)
def tile_shape(grid: TokenGrid, block_size: int) -> tuple[int, int, int]:
    """Choose the tile of exactly block_size tokens that pads the grid least, then the most cubic.

    Cubic tiles touch the fewest neighbours; padding costs in every row, so it is weighed first.
    """
    sides = [d for d in range(1, block_size + 1) if block_size % d == 0]

    def cost(tile: tuple[int, int, int]) -> tuple[float, int]:
        padded = 1.0
        for side, edge in zip(grid.shape, tile, strict=True):
            padded *= -(-side // edge) * edge
        return round(padded / grid.tokens, 3), sum(tile)

    shapes = [
        (f, h, block_size // (f * h)) for f, h in product(sides, sides) if block_size % (f * h) == 0
    ]
    return min(shapes, key=cost)


def separable_mask(
    grid: TokenGrid,
    axes: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tile: tuple[int, int, int],
) -> BlockMask:
    """Keep a pair iff every axis keeps it; exact to the token, built from per-axis patterns.

    Text attends to and is attended by everything. The cost is the sum over axes of squared axis
    lengths plus one lookup per pair of tiles; nothing of size tokens x tokens is built.

    Args:
        grid: geometry of the sequence.
        axes: bool [L, L] for frames, height, width; row = query position, column = key position.
        tile: tokens of one block along each axis.
    """
    order = TokenOrder.tiles(grid, tile)
    size = tile[0] * tile[1] * tile[2]
    parts = [_axis_patterns(axis, edge) for axis, edge in zip(axes, tile, strict=True)]
    code = _combine([ids for ids, _ in parts], [len(patterns) for _, patterns in parts])
    table = [patterns for _, patterns in parts]
    some = _combine_flags([p.flatten(1).any(1)[ids] for ids, p in parts])
    every = _combine_flags([p.flatten(1).all(1)[ids] for ids, p in parts])

    grid_blocks, blocks = len(code), order.slots // size
    keep = torch.ones((blocks, blocks), dtype=torch.bool)
    keep[:grid_blocks, :grid_blocks] = some
    index = torch.full((blocks, blocks), -1, dtype=torch.int32)
    partial = some & ~every
    present = torch.zeros(len(table[0]) * len(table[1]) * len(table[2]), dtype=torch.bool)
    present[code[partial]] = True
    codes = present.nonzero().flatten()
    number = torch.full((len(present),), -1, dtype=torch.int32)
    number[codes] = torch.arange(len(codes), dtype=torch.int32)
    index[:grid_blocks, :grid_blocks][partial] = number[code[partial]]
    bits = [pack_bits(_outer(codes, table))]
    outside = torch.ones_like(keep)
    outside[:grid_blocks, :grid_blocks] = False
    valid = (order.index[0] >= 0).view(-1, size)
    bits.append(cut_padding(valid, valid, outside, index, start=len(codes)))
    tiles = torch.cat(bits)
    return BlockMask(
        keep[None],
        size,
        tile_index=index[None] if len(tiles) else None,
        tiles=tiles if len(tiles) else None,
        order=order,
        q_tokens=grid.total,
        kv_tokens=grid.total,
    )


def _axis_patterns(axis: torch.Tensor, edge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids int64 [n, n] of each tile pair's pattern and the patterns bool [u, edge, edge]."""
    length = axis.shape[0]
    count = -(-length // edge)
    padded = axis.new_zeros((count * edge, count * edge))
    padded[:length, :length] = axis
    pairs = padded.view(count, edge, count, edge).transpose(1, 2).reshape(count * count, -1)
    patterns, ids = torch.unique(pairs, dim=0, return_inverse=True)
    return ids.view(count, count), patterns.view(-1, edge, edge)


def _combine(ids: list[torch.Tensor], sizes: list[int]) -> torch.Tensor:
    f, h, w = ids
    code = (f[:, None, None, :, None, None] * sizes[1] + h[None, :, None, None, :, None]) * sizes[2]
    code = code + w[None, None, :, None, None, :]
    blocks = len(f) * len(h) * len(w)
    return code.reshape(blocks, blocks)


def _combine_flags(flags: list[torch.Tensor]) -> torch.Tensor:
    f, h, w = flags
    both = f[:, None, None, :, None, None] & h[None, :, None, None, :, None]
    both = both & w[None, None, :, None, None, :]
    blocks = len(f) * len(h) * len(w)
    return both.reshape(blocks, blocks)


def _outer(codes: torch.Tensor, table: list[torch.Tensor]) -> torch.Tensor:
    """Return bool [n, size, size]: the token pattern of each combined code."""
    f = table[0][codes // (len(table[1]) * len(table[2]))]
    h = table[1][codes // len(table[2]) % len(table[1])]
    w = table[2][codes % len(table[2])]
    bits = f[:, :, None, None, :, None, None] & h[:, None, :, None, None, :, None]
    bits = bits & w[:, None, None, :, None, None, :]
    size = f.shape[1] * h.shape[1] * w.shape[1]
    return bits.reshape(len(codes), size, size)


def cut_padding(
    valid_rows: torch.Tensor,
    valid_columns: torch.Tensor,
    keep: torch.Tensor,
    index: torch.Tensor,
    start: int,
) -> torch.Tensor:
    """Give block pairs outside the grid the bit tiles that leave padding out; return the tiles.

    Args:
        valid_rows: bool [q_blocks, size], the slots that hold a token.
        valid_columns: bool [kv_blocks, size].
        keep: bool [q_blocks, kv_blocks], the pairs to look at, kept whole so far.
        index: int32 like keep, changed in place where a pair is cut.
        start: number of the first tile returned.
    """
    size = valid_rows.shape[1]
    if bool(valid_rows.all()) and bool(valid_columns.all()):
        return torch.zeros((0, size, -(-size // 8)), dtype=torch.uint8)
    kinds, kind = torch.unique(torch.cat((valid_rows, valid_columns)), dim=0, return_inverse=True)
    whole, row, column = kinds.all(1), kind[: len(valid_rows)], kind[len(valid_rows) :]
    cut = keep & ~(whole[row][:, None] & whole[column])
    index[cut] = (start + row[:, None] * len(kinds) + column)[cut].int()
    both = kinds[:, None, :, None] & kinds[None, :, None, :]
    return pack_bits(both.reshape(-1, size, size))


def offset_mask(
    grid: TokenGrid, allowed: torch.Tensor, tile: tuple[int, int], extra: int = 0
) -> BlockMask:
    """Keep a pair iff its spatial offset is allowed, whatever the frames; exact to the token.

    Text attends to and is attended by everything. Offsets repeat from tile to tile, so only one bit
    tile per tile offset and kind of border is built.

    Args:
        grid: geometry of the sequence.
        allowed: bool [2 height - 1, 2 width - 1]; entry (height - 1 + dy, width - 1 + dx) says
            whether a key at (y + dy, x + dx) is seen from (y, x).
        tile: tokens of one block along height and width.
        extra: extra keys behind the sequence, seen by the grid's queries and not by text.
    """
    order = TokenOrder.tiles(grid, (1, *tile))
    size, down, across = tile[0] * tile[1], -(-grid.height // tile[0]), -(-grid.width // tile[1])
    valid = (order.index[0] >= 0).view(-1, size)
    grid_blocks, q_blocks = grid.frames * down * across, len(valid)
    frame_valid = valid[: down * across]
    kinds, kind = torch.unique(frame_valid, dim=0, return_inverse=True)
    codes, number = _offset_codes(allowed, tile, (down, across), kind, len(kinds))
    patterns = _offset_patterns(codes, allowed, tile, (down, across), kinds)
    some, every = patterns.flatten(1).any(1), patterns.flatten(1).all(1)
    cut = some & ~every
    position = torch.where(cut, cut.cumsum(0) - 1, -1).int()[number]  # number -1: out of reach
    position[number < 0] = -1

    kv_blocks = q_blocks + -(-extra // size)
    keep = torch.ones((q_blocks, kv_blocks), dtype=torch.bool)
    keep[grid_blocks:, q_blocks:] = False
    keep[:grid_blocks, :grid_blocks] = (some[number] & (number >= 0)).repeat(
        grid.frames, grid.frames
    )
    index = torch.full((q_blocks, kv_blocks), -1, dtype=torch.int32)
    index[:grid_blocks, :grid_blocks] = position.repeat(grid.frames, grid.frames)
    behind = (torch.arange((kv_blocks - q_blocks) * size) < extra).view(-1, size)
    outside = keep.clone()
    outside[:grid_blocks, :grid_blocks] = False
    borders = cut_padding(valid, torch.cat((valid, behind)), outside, index, int(cut.sum()))
    tiles = torch.cat((pack_bits(patterns[cut]), borders))
    return BlockMask(
        keep[None],
        size,
        tile_index=index[None] if len(tiles) else None,
        tiles=tiles if len(tiles) else None,
        order=order,
        q_tokens=grid.total,
        kv_tokens=grid.total + extra,
    )


def _offset_codes(
    allowed: torch.Tensor,
    tile: tuple[int, int],
    counts: tuple[int, int],
    kind: torch.Tensor,
    kinds: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes int64 [n] of all tile pairs within reach, and each pair's place there or -1.

    A code names the offset between two tiles and the kinds of border they lie on.
    """
    down, across = counts
    y, x = allowed.nonzero(as_tuple=True)
    far_y = int((y - allowed.shape[0] // 2).abs().max()) if len(y) else 0
    far_x = int((x - allowed.shape[1] // 2).abs().max()) if len(x) else 0
    where = torch.arange(down * across)
    dy = (where // across)[None] - (where // across)[:, None]
    dx = (where % across)[None] - (where % across)[:, None]
    near = ((dy.abs() - 1) * tile[0] < far_y) & ((dx.abs() - 1) * tile[1] < far_x)
    code = (dy + down - 1) * (2 * across - 1) + dx + across - 1
    code = code * kinds**2 + kind[:, None] * kinds + kind
    present = torch.zeros((2 * down - 1) * (2 * across - 1) * kinds**2, dtype=torch.bool)
    present[code[near]] = True
    place = torch.where(present, present.cumsum(0) - 1, -1)
    return present.nonzero().flatten(), torch.where(near, place[code], -1)


def _offset_patterns(
    codes: torch.Tensor,
    allowed: torch.Tensor,
    tile: tuple[int, int],
    counts: tuple[int, int],
    kinds: torch.Tensor,
) -> torch.Tensor:
    """Return bool [n, size, size]: the pattern of each (tile offset, kind of rows, of columns)."""
    offset, pair = codes // len(kinds) ** 2, codes % len(kinds) ** 2
    dy = (offset // (2 * counts[1] - 1) - counts[0] + 1) * tile[0]
    dx = (offset % (2 * counts[1] - 1) - counts[1] + 1) * tile[1]
    place = torch.arange(tile[0] * tile[1])
    row, column = place // tile[1], place % tile[1]
    y = dy[:, None, None] + row - row[:, None] + allowed.shape[0] // 2
    x = dx[:, None, None] + column - column[:, None] + allowed.shape[1] // 2
    inside = (y >= 0) & (y < allowed.shape[0]) & (x >= 0) & (x < allowed.shape[1])
    seen = allowed[y.clamp(0, allowed.shape[0] - 1), x.clamp(0, allowed.shape[1] - 1)] & inside
    rows, columns = kinds[pair // len(kinds)], kinds[pair % len(kinds)]
    return seen & rows[:, :, None] & columns[:, None, :]
