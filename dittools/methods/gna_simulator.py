"""Analytical cost of neighborhood attention on a tiled kernel, before anything is run.

Source: arXiv:2504.16922, rebuilt from its tables (the authors' simulator is not released). Each
query tile visits the key tiles between the smallest start and the largest end of its windows.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil, prod

from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.methods.gna import axis_pattern, window_tokens

Sides = tuple[int, int, int]


@dataclass(frozen=True)
class Simulation:
    """What one window and stride cost on one grid.

    Attributes:
        window, stride: tokens per axis, resolved and clipped to the grid.
        visited: key tiles the busiest query tile visits, text tiles not counted.
        visited_mean: the same, mean over query tiles.
        total: key tiles of the grid.
        extra: key tiles of the text.
        perfect: no visited tile holds a dropped pair, so the saved FLOPs are saved time.
        flop_speedup: dense pairs over kept pairs, text keys included.
    """

    window: Sides
    stride: Sides
    visited: int
    visited_mean: float
    total: int
    extra: int
    perfect: bool
    flop_speedup: float

    @property
    def speedup(self) -> float:
        """Attention time of dense over this, by the busiest query tile, as the paper counts."""
        return (self.total + self.extra) / (self.visited + self.extra)

    @property
    def mean_speedup(self) -> float:
        """Attention time of dense over this, by the mean query tile."""
        return (self.total + self.extra) / (self.visited_mean + self.extra)

    def end_to_end(self, attention_share: float, dense_share: float = 0.0) -> float:
        """Return the whole run's speed-up when attention takes `attention_share` of it.

        Args:
            attention_share: share of the dense run's time spent in this attention.
            dense_share: share of the steps that stay dense.
        """
        share = attention_share * (1 - dense_share)
        return 1 / (1 - share + share / self.speedup)


def gna_simulate(
    grid: TokenGrid,
    window: tuple[int | float | str, ...],
    stride: Sides,
    tile_q: Sides,
    tile_kv: Sides,
    dynamic: bool = False,
) -> Simulation:
    """Return what a window and stride cost when queries and keys are cut into these tiles.

    Args:
        grid: its text tokens count as extra keys.
        window: per axis tokens, a share, or "full".
        stride: per axis tokens, clipped to the window.
        tile_q: query tile per axis.
        tile_kv: key tile per axis.
        dynamic: key tiles start at the window instead of at multiples of the tile.
    """
    for name, sides in (("stride", stride), ("tile_q", tile_q), ("tile_kv", tile_kv)):
        if len(sides) != 3 or min(sides) < 1:
            raise InputError(
                f"gna simulator: {name} is not usable",
                expected="three whole numbers of at least 1",
                got=repr(sides),
            )
    size = [window_tokens(w, length) for w, length in zip(window, grid.shape, strict=True)]
    step = [min(s, w) for s, w in zip(stride, size, strict=True)]
    worst, mean, perfect = 1, 1.0, True
    for axis in range(3):
        counts, axis_perfect = _axis_visits(
            grid.shape[axis], size[axis], step[axis], tile_q[axis], tile_kv[axis], dynamic
        )
        worst *= max(counts)
        mean *= sum(counts) / len(counts)
        perfect &= axis_perfect
    pairs = prod(size) + grid.text
    return Simulation(
        window=(size[0], size[1], size[2]),
        stride=(step[0], step[1], step[2]),
        visited=worst,
        visited_mean=mean,
        total=prod(ceil(side / edge) for side, edge in zip(grid.shape, tile_kv, strict=True)),
        extra=ceil(grid.text / prod(tile_kv)),
        perfect=perfect,
        flop_speedup=grid.total / pairs,
    )


@lru_cache(maxsize=4096)
def _axis_visits(
    length: int, window: int, stride: int, tile_q: int, tile_kv: int, dynamic: bool
) -> tuple[tuple[int, ...], bool]:
    """Return the key tiles each query tile of one axis visits, and whether none of them is cut."""
    seen = axis_pattern(length, window, stride)
    starts = seen.int().argmax(dim=1).tolist()
    counts, perfect = [], True
    for first in range(0, length, tile_q):
        tile = starts[first : first + tile_q]
        low, high = min(tile), max(tile) + window
        counts.append(
            ceil((high - low) / tile_kv) if dynamic else ceil(high / tile_kv) - low // tile_kv
        )
        begins_whole = dynamic or low % tile_kv == 0
        length_whole = (high - low if dynamic else high) % tile_kv == 0
        perfect &= low == max(tile) and begins_whole and (length_whole or high == length)
    return tuple(counts), perfect


def perfect_strides(
    grid: TokenGrid,
    window: tuple[int | float | str, ...],
    tile_q: Sides,
    tile_kv: Sides,
) -> list[Simulation]:
    """Return the strides at which no tile is cut, the smallest (most overlap) first."""
    size = [window_tokens(w, length) for w, length in zip(window, grid.shape, strict=True)]
    fits = []
    for axis, tokens in enumerate(size):
        args = (tile_q[axis], tile_kv[axis], False)
        steps = range(1, tokens + 1) if tokens < grid.shape[axis] else (1,)
        fits.append([s for s in steps if _axis_visits(grid.shape[axis], tokens, s, *args)[1]])
    strides = product(fits[0], fits[1], fits[2])
    found = [gna_simulate(grid, window, stride, tile_q, tile_kv) for stride in strides]
    return sorted(found, key=lambda simulation: (prod(simulation.stride), simulation.stride))
