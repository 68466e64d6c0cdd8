"""Generalized neighborhood attention: a box of keys around every query, shared by stride groups.

Source: arXiv:2504.16922 and NATTEN (csrc/include/natten/cuda/reference/mask.hpp). The axes are
independent, so the mask is a product of per-axis patterns; it is lowered exactly, with bit tiles
where a tile is cut. Text is attended by, and attends to, everything. Difference: what NATTEN
refuses is cut to what fits, a window to its axis, or to its interleaved part of a dilated one, and
a stride to its window.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, ClassVar

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask
from dittools.methods.base import attend_by_grid, bad_param, check_params, param
from dittools.tiling import separable_mask

Sides = tuple[int, int, int]
Axes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

MOST_TILE_TOKENS = 4096


@dataclass(frozen=True)
class GNA:
    """Each query sees a box of keys; queries of one stride group see the same box.

    Every parameter is one value or one per axis (frames, height, width).
    """

    name: ClassVar[str] = "gna"
    window: int | float | str | tuple[int | float | str, ...] = param(
        ("full", 0.5, 0.5),
        "the box: tokens, or a share of the axis between 0 and 1, or 'full' (also 0)",
    )
    stride: int | str | tuple[int | str, ...] = param(
        "tile", "the tokens that share one box; 'tile' follows the compute tile"
    )
    dilation: int | tuple[int, ...] = param(1, "the step between the keys of a box, in tokens")
    causal: bool | tuple[bool, ...] = param(False, "whether an axis only looks back")
    tile: int | tuple[int, ...] | None = param(
        None, "the tokens of one block per axis; None picks the cheapest"
    )
    block_size: int = param(128, "the tokens per block when the tile is picked", least=8, most=1024)

    def __post_init__(self) -> None:
        """Check every entry of every axis."""
        check_params(self)
        for name, fits, expected in _ENTRIES:
            value = getattr(self, name)
            entries = value if isinstance(value, tuple) else (value,) * 3
            missing = name == "tile" and isinstance(value, tuple) and None in value
            if len(entries) != 3 or missing or not all(fits(entry) for entry in entries):
                raise bad_param(self, name, expected=f"{expected}, once or per axis")
        sides = self.tile if isinstance(self.tile, tuple) else (self.tile or 1,) * 3
        if math.prod(sides) > MOST_TILE_TOKENS:
            raise bad_param(self, "tile", expected=f"at most {MOST_TILE_TOKENS} tokens in a tile")

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Every grid fits: a window longer than an axis covers it."""
        return []

    def mask(self, grid: TokenGrid) -> BlockMask:
        """Return the mask of one grid, exact to the token, the same for all heads; cached."""
        return gna_mask(grid, self)

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query."""
        return attend_by_grid(self, call, backend)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_window(value: Any) -> bool:
    is_share = isinstance(value, float) and 0 < value <= 1
    return value == "full" or is_share or _is_count(value) or (value == 0 and type(value) is int)


_ENTRIES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("window", _is_window, "tokens (0 = all), a share up to 1.0, or 'full'"),
    ("stride", lambda v: v == "tile" or _is_count(v), "tokens of at least 1, or 'tile'"),
    ("dilation", _is_count, "tokens of at least 1"),
    ("causal", lambda v: isinstance(v, bool), "true or false"),
    ("tile", lambda v: v is None or _is_count(v), "tokens of at least 1, or nothing"),
)


def axis_pattern(
    length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False
) -> torch.Tensor:
    """Return bool [length, length]: which keys (columns) each query (rows) of one axis sees.

    The window is centred on the leader of the query's stride group and moved inward at both ends.
    Dilation splits the axis into interleaved groups, each an axis of its own.
    """
    place = torch.arange(length)
    group, inner = place % dilation, place // dilation
    lengths = (length - group + dilation - 1) // dilation
    size = lengths.clamp(max=window)
    step = size.clamp(max=stride)
    offset = step - 1 if causal else step // 2
    leader = torch.minimum(step * (inner // step) + offset, lengths - 1)
    if causal:
        start, end = (leader - size + 1).clamp(min=0), inner + 1
    else:
        start = torch.minimum((leader - size // 2).clamp(min=0), lengths - size)
        end = start + size
    seen = (inner >= start[:, None]) & (inner < end[:, None])
    return seen & (group == group[:, None])


def window_tokens(entry: Any, length: int) -> int:
    """Resolve one window entry on an axis: 'full', a share, or tokens clipped to the axis."""
    if entry in ("full", 0):
        return length
    tokens = max(1, round(entry * length)) if isinstance(entry, float) else int(entry)
    return min(tokens, length)


def _axis(gna: GNA, grid: TokenGrid, axis: int, edge: int) -> torch.Tensor:
    def side(value: Any) -> Any:
        return value[axis] if isinstance(value, tuple) else value

    length, stride = grid.shape[axis], side(gna.stride)
    return axis_pattern(
        length,
        window_tokens(side(gna.window), length),
        edge if stride == "tile" else stride,
        min(side(gna.dilation), length),
        side(gna.causal),
    )


def gna_tile(grid: TokenGrid, gna: GNA) -> Sides:
    """Return the tile with the fewest visited tile pairs among those of block_size tokens.

    Ties go to the tile that cuts the fewest pairs, then to the most cubic one.
    """
    edges = [edge for edge in range(1, gna.block_size + 1) if gna.block_size % edge == 0]
    counts = [{e: _visits(_axis(gna, grid, axis, e), e) for e in edges} for axis in range(3)]

    def cost(tile: Sides) -> tuple[int, int, int]:
        visited = whole = blocks = 1
        for axis, edge in enumerate(tile):
            some, every = counts[axis][edge]
            visited, whole = visited * some, whole * every
            blocks *= -(-grid.shape[axis] // edge)
        text = -(-grid.text // gna.block_size)
        return visited + text * (2 * blocks + text), visited - whole, sum(tile)

    tiles = [
        (f, h, gna.block_size // (f * h))
        for f, h in product(edges, edges)
        if gna.block_size % (f * h) == 0
    ]
    return min(tiles, key=cost)


def _visits(axis: torch.Tensor, edge: int) -> tuple[int, int]:
    """Return how many pairs of runs of `edge` tokens are visited, and how many are kept whole."""
    length, count = len(axis), -(-len(axis) // edge)
    padded = axis.new_zeros((count * edge, count * edge))
    padded[:length, :length] = axis
    pairs = padded.view(count, edge, count, edge)
    return int(pairs.any(3).any(1).sum()), int(pairs.all(3).all(1).sum())


@lru_cache(maxsize=64)
def gna_sides(grid: TokenGrid, gna: GNA) -> Sides:
    """Return the tile in use: the one given, or the one picked for the grid."""
    tile = gna_tile(grid, gna) if gna.tile is None else gna.tile
    return (tile[0], tile[1], tile[2]) if isinstance(tile, tuple) else (tile,) * 3


def axis_patterns(grid: TokenGrid, gna: GNA) -> Axes:
    """Return bool [L, L] per axis: which keys (columns) each query (rows) sees."""
    sides = gna_sides(grid, gna)
    return (
        _axis(gna, grid, 0, sides[0]),
        _axis(gna, grid, 1, sides[1]),
        _axis(gna, grid, 2, sides[2]),
    )


@lru_cache(maxsize=32)
def gna_mask(grid: TokenGrid, gna: GNA) -> BlockMask:
    """Build the mask of one grid from one pattern per axis."""
    axes = axis_patterns(grid, gna)
    if all(bool(axis.all()) for axis in axes):
        return BlockMask.full(grid.total, grid.total, gna.block_size)
    return separable_mask(grid, axes, gna_sides(grid, gna))
