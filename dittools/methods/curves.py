"""Token orders that keep neighbours in space and time close: the generalised Hilbert curve.

Source: the recursive construction of jakubcerveny/gilbert (any box, not only powers of two).
Blocks cut from such an order are compact boxes, so their mean token means something.
"""

from functools import lru_cache

import torch

from dittools.grid import TokenGrid
from dittools.order import TokenOrder

Vector = tuple[int, int, int]


def _add(*vectors: Vector) -> Vector:
    x, y, z = (sum(part) for part in zip(*vectors, strict=True))
    return x, y, z


def _neg(vector: Vector) -> Vector:
    return -vector[0], -vector[1], -vector[2]


def _length(vector: Vector) -> int:
    return abs(vector[0] + vector[1] + vector[2])


def _unit(vector: Vector) -> Vector:
    x, y, z = ((v > 0) - (v < 0) for v in vector)
    return x, y, z


def _half(vector: Vector) -> Vector:
    """Return half an axis vector, rounded so that longer axes split into an even first part."""
    x, y, z = (v // 2 for v in vector)
    half = (x, y, z)
    odd = _length(half) % 2 and _length(vector) > 2
    return _add(half, _unit(vector)) if odd else half


def _split(
    at: Vector, a: Vector, b: Vector, c: Vector
) -> list[tuple[Vector, Vector, Vector, Vector]]:
    """Return the boxes (corner, axes) a box is walked in, in order; a is the main direction."""
    w, h, d = _length(a), _length(b), _length(c)
    a2, b2, c2 = _half(a), _half(b), _half(c)
    rest_a, rest_b, rest_c = _add(a, _neg(a2)), _add(b, _neg(b2)), _add(c, _neg(c2))
    end_a, end_c = _add(a, _neg(_unit(a))), _add(c, _neg(_unit(c)))
    end_b2, end_c2 = _add(b2, _neg(_unit(b))), _add(c2, _neg(_unit(c)))
    if 2 * w > 3 * h and 2 * w > 3 * d:
        return [(at, a2, b, c), (_add(at, a2), rest_a, b, c)]
    if 3 * h > 4 * d:
        return [
            (at, b2, c, a2),
            (_add(at, b2), a, rest_b, c),
            (_add(at, end_a, end_b2), _neg(b2), c, _neg(rest_a)),
        ]
    if 3 * d > 4 * h:
        return [
            (at, c2, a2, b),
            (_add(at, c2), a, b, rest_c),
            (_add(at, end_a, end_c2), _neg(c2), _neg(rest_a), b),
        ]
    return [
        (at, b2, c2, a2),
        (_add(at, b2), c, a2, rest_b),
        (_add(at, end_b2, end_c), a, _neg(b2), _neg(rest_c)),
        (_add(at, end_a, b2, end_c), _neg(c), _neg(rest_a), rest_b),
        (_add(at, end_a, end_b2), _neg(b2), c2, _neg(rest_a)),
    ]


@lru_cache(maxsize=16)
def gilbert(frames: int, height: int, width: int, along_width: bool = False) -> torch.Tensor:
    """Return int64 [frames * height * width]: raster tokens along the curve, axes (w, h, t).

    Its main direction is the longest axis, or with `along_width` always the width: the two agree
    where nothing is longer than the width.
    """
    sides: list[Vector] = [(width, 0, 0), (0, height, 0), (0, 0, frames)]
    longest = max(range(3), key=lambda axis: (_length(sides[axis]), -axis))
    longest = 0 if along_width else longest
    axes = [sides[longest], *(side for i, side in enumerate(sides) if i != longest)]
    pending = [((0, 0, 0), axes[0], axes[1], axes[2])]
    places: list[Vector] = []
    while pending:
        at, *box = pending.pop()
        if min(_length(axis) for axis in box) == 0:
            continue  # halving an axis of one token leaves one part empty
        long = [axis for axis in box if _length(axis) > 1]
        if len(long) > 1:
            pending.extend(reversed(_split(at, box[0], box[1], box[2])))
            continue
        line = long[0] if long else box[0]
        step = _unit(line)
        for _ in range(_length(line)):
            places.append(at)
            at = _add(at, step)
    x, y, z = torch.tensor(places).unbind(1)
    return (z * height + y) * width + x


@lru_cache(maxsize=32)
def block_order(grid: TokenGrid, block_size: int, curve: str = "gilbert") -> TokenOrder:
    """Return the grid's tokens along a curve, then text, each padded to whole blocks.

    Args:
        grid: geometry of the sequence.
        block_size: tokens.
        curve: "gilbert", "gilbert_along_width" or "raster".
    """
    if curve == "raster":
        video = torch.arange(grid.tokens)
    else:
        video = gilbert(*grid.shape, along_width=curve == "gilbert_along_width")
    video = video + grid.text_before
    token = torch.arange(grid.total)
    text = torch.cat((token[: grid.text_before], token[grid.text_before + grid.tokens :]))
    parts = [torch.nn.functional.pad(p, (0, -len(p) % block_size), value=-1) for p in (video, text)]
    return TokenOrder(torch.cat(parts)[None], grid.total)


@lru_cache(maxsize=32)
def placed_order(grid: TokenGrid, block_size: int, curve: str, device: torch.device) -> TokenOrder:
    """Return `block_order` on a device, moved there once."""
    return block_order(grid, block_size, curve).to(device)


@lru_cache(maxsize=32)
def neighbour_blocks(grid: TokenGrid, block_size: int, curve: str = "gilbert") -> torch.Tensor:
    """Return bool [blocks, blocks]: whether tokens of two blocks touch, corners included."""
    order = block_order(grid, block_size, curve)
    blocks = -(-grid.tokens // block_size)
    video = slice(grid.text_before, grid.text_before + grid.tokens)
    block = (order.inverse[0, video] // block_size).view(grid.shape)
    near = torch.eye(blocks, dtype=torch.bool)
    for shift in torch.cartesian_prod(*[torch.arange(-1, 2)] * 3).tolist():
        here = tuple(
            slice(max(s, 0), n + min(s, 0)) for s, n in zip(shift, grid.shape, strict=True)
        )
        there = tuple(
            slice(max(-s, 0), n + min(-s, 0)) for s, n in zip(shift, grid.shape, strict=True)
        )
        near[block[here].flatten(), block[there].flatten()] = True
    return near
