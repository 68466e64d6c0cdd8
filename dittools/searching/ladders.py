"""Ladders: the variants of each method from sparse to dense, for searches and for the scoreboard.

A ladder aims at a density. Where the mask depends on the grid alone it hits the nearest one that
the method can make; where it depends on query and key, what comes out is measured.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import product
from typing import Any

from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.methods import METHODS, Method, build
from dittools.methods.base import block_for

_HALVINGS = 12  # of a knob's range; masks of blocks change in steps far coarser than that
_PYRAMID = (0.6, 0.2, 0.1, 0.1)  # of the work, on keys at full, half, quarter and eighth resolution


@dataclass(frozen=True)
class Ladder:
    """One way to make a method as sparse as asked for.

    Attributes:
        method: name in METHODS.
        label: what tells it from the method's other ladders.
        make: density in (0, 1) -> the method that aims at it.
        fixed: whether the method's mask depends on the grid alone.
        alone: whether what a head keeps depends on the heads beside it, so that only a method that
            runs all heads of a layer can use it, not a search that chooses per head.
        few: whether a search should try few densities, as choosing takes long.
        joint: whether a search that chooses per head may still let all heads of a layer use it.
    """

    method: str
    label: str
    make: Callable[[float], Method]
    fixed: bool = False
    alone: bool = False
    few: bool = False
    joint: bool = False


def ladders_for(name: str, grid: TokenGrid) -> list[Ladder]:
    """Return the ladders of one method on a grid; none where it has no density of its own."""
    return _MAKERS.get(name, _by_density)(name, grid)


def nearest(methods: list[Method], grid: TokenGrid, density: float) -> Method:
    """Return the method whose mask on the grid is nearest in density; ties go to the first."""
    return min(methods, key=lambda m: round(abs(mask_share(m, grid) - density), 6))


@lru_cache(maxsize=4096)
def mask_share(method: Any, grid: TokenGrid) -> float:
    """Return the density of a method whose mask depends on the grid alone."""
    return float(method.mask(grid).density)


def _solved(make: Callable[[float], Method], grid: TokenGrid, low: float, high: float) -> Any:
    """Return density -> method for a knob along which the density rises from `low` to `high`."""

    def at(density: float) -> Method:
        left, right = low, high
        for _ in range(_HALVINGS):
            middle = (left * right) ** 0.5
            if mask_share(make(middle), grid) <= density:
                left = middle
            else:
                right = middle
        return nearest([make(left), make(right)], grid, density)

    return at


def _gna(name: str, grid: TokenGrid) -> list[Ladder]:
    """Boxes that are long in time, in space, along one axis, or in none."""
    block = block_for(grid)
    stride: int | str = "tile" if grid.total >= 8192 else 1
    shapes: dict[str, Callable[[float], tuple[Any, Any, Any]]] = {
        "near places of all frames": lambda s: ("full", s, s),
        "near frames": lambda s: (s, "full", "full"),
        "near in all": lambda s: (s, s, s),
        "near rows": lambda s: ("full", s, "full"),
        "near columns": lambda s: ("full", "full", s),
    }

    def ladder(label: str, shape: Callable[[float], tuple[Any, Any, Any]]) -> Ladder:
        axes = [i for i, entry in enumerate(shape(0.5)) if entry != "full"]

        def make(density: float) -> Method:
            side = density ** (1 / len(axes))
            sides = _near_sides(side, [grid.shape[i] for i in axes])
            tokens = min(sides, key=lambda s: round(abs(_share(s, grid, axes) - density), 6))
            window: list[Any] = ["full"] * 3
            for i, size in zip(axes, tokens, strict=True):
                window[i] = round(size / grid.shape[i], 4)
            given = {"window": tuple(window), "stride": stride, "block_size": block}
            return build(name, given)

        return Ladder(name, label, make, fixed=True)

    return [
        ladder(label, shape)
        for label, shape in shapes.items()
        if all(grid.shape[i] > 1 for i, entry in enumerate(shape(0.5)) if entry != "full")
    ]


def _near_sides(side: float, lengths: list[int]) -> list[tuple[int, ...]]:
    """Return window sizes next to a share of each axis."""
    around = [sorted({min(max(round(side * n) + d, 1), n) for d in (-1, 0, 1)}) for n in lengths]
    return list(product(*around))


def _share(sides: tuple[int, ...], grid: TokenGrid, axes: list[int]) -> float:
    return math.prod(s / grid.shape[i] for s, i in zip(sides, axes, strict=True))


def _radial(name: str, grid: TokenGrid) -> list[Ladder]:
    if grid.frames < 2:
        return []
    block = max(8, min(block_for(grid), 128))

    def ladder(sink: bool) -> Ladder:
        def make(decay: float) -> Method:
            given = {"decay": round(decay, 4), "sink": sink, "block_size": block}
            return build(name, given)

        label = "with the first frame" if sink else "without the first frame"
        return Ladder(name, label, _solved(make, grid, 0.02, 16.0), fixed=True)

    return [ladder(True), ladder(False)]


def _sta(name: str, grid: TokenGrid) -> list[Ladder]:
    from dittools.methods.sta import sta_tile

    block = block_for(grid)
    counts = [-(-n // tile) for n, tile in zip(grid.shape, sta_tile(grid), strict=True)]
    odd = [list(range(1, count + 2, 2)) for count in counts]
    windows: list[Any] = [build(name, {"window": w, "block_size": block}) for w in product(*odd)]
    kinds: dict[str, Callable[[Any], bool]] = {
        "short in time": lambda w: w[0] / counts[0] <= min(w[1] / counts[1], w[2] / counts[2]),
        "long in time": lambda w: w[0] / counts[0] > min(w[1] / counts[1], w[2] / counts[2]),
    }

    def ladder(label: str, chosen: list[Method]) -> Ladder:
        return Ladder(name, label, lambda d: nearest(chosen, grid, d), fixed=True)

    made = {k: [m for m in windows if fits(m.window)] for k, fits in kinds.items()}
    return [ladder(label, chosen) for label, chosen in made.items() if chosen]


def _sparse_vdit(name: str, grid: TokenGrid) -> list[Ladder]:
    block = block_for(grid)
    modes = ["diagonal", "stripe"] + (["multi_diagonal"] if grid.frames > 1 else [])

    def ladder(mode: str) -> Ladder:
        def make(density: float) -> Method:
            given = {"mode": mode, "density": round(density, 4), "block_size": block}
            return build(name, given)

        return Ladder(name, mode, make, fixed=True)

    def chosen(density: float) -> Method:
        return build(name, {"density": round(density, 4), "block_size": block})

    return [*(ladder(mode) for mode in modes), Ladder(name, "chosen per head", chosen, alone=True)]


def _clear(name: str, grid: TokenGrid) -> list[Ladder]:
    block = block_for(grid)
    longest = float(max(grid.height, grid.width))

    def make(radius: float) -> Method:
        return build(name, {"radius": round(radius, 4), "block_size": block})

    if longest < 3:
        return []
    return [Ladder(name, "disk", _solved(make, grid, 1.0, 1.5 * longest), fixed=True)]


def _psa(name: str, grid: TokenGrid) -> list[Ladder]:
    """By blocks, so that a density can be aimed at, and by shares of the importance."""
    block = max(16, block_for(grid))

    def by_blocks(density: float) -> Method:
        ends, reached = [], 0.0
        for factor, share in zip((1, 2, 4, 8), _PYRAMID, strict=True):
            reached = min(reached + share * density * factor, 1.0)
            ends.append(round(reached, 4))
        return build(name, {"rule": "topk", "ends": tuple(ends), "block_size": block})

    def all_blocks(density: float) -> Method:
        # every block is seen at an eighth at least; what is left of the work goes to the best
        left = max(density - 0.125, 0.0) / 0.875
        ends = (round(0.7 * left, 4), round(min(1.1 * left, 1.0), 4))
        full = (*ends, round(min(1.5 * left, 1.0), 4), 1.0)
        return build(name, {"rule": "topk", "ends": full, "block_size": block})

    def by_mass(density: float) -> Method:
        ends = tuple(round(1 - (1 - end) ** (2.5 * density), 4) for end in (0.5, 0.6, 0.7, 0.8))
        return build(name, {"rule": "threshold", "ends": ends, "block_size": block})

    found = [Ladder(name, "by blocks", by_blocks), Ladder(name, "by importance", by_mass)]
    return [*found, Ladder(name, "no block left out", all_blocks)]


def _vmoba(name: str, grid: TokenGrid) -> list[Ladder]:
    block = block_for(grid)

    def ladder(label: str, extra: dict[str, Any]) -> Ladder:
        def make(density: float) -> Method:
            given = {"top_k": round(density, 4), "block_size": block, **extra}
            return build(name, given)

        return Ladder(name, label, make, few=True)

    return [ladder("per token", {}), ladder("per tile", {"pooled": True})]


def _rectified(name: str, grid: TokenGrid) -> list[Ladder]:
    block = block_for(grid)

    def ladder(label: str, extra: dict[str, Any]) -> Ladder:
        def make(density: float) -> Method:
            given = {"density": round(density, 4), "block_size": block, **extra}
            return build(name, given)

        return Ladder(name, label, make)

    plain = {"mass": 0.0, "neighbours": False}
    return [ladder("with neighbours", {"mass": 0.0}), ladder("by rank alone", plain)]


def _paro(name: str, grid: TokenGrid) -> list[Ladder]:
    block = block_for(grid)

    def ladder(label: str, per_head: bool) -> Ladder:
        def make(density: float) -> Method:
            given = {"density": round(density, 4), "block_size": block, "per_head": per_head}
            return build(name, given)

        return Ladder(name, label, make, alone=not per_head)

    return [ladder("each head alike", True), ladder("one threshold", False)]


def _metered(name: str, grid: TokenGrid) -> list[Ladder]:
    """Skipped blocks pooled, with and without rows that mend the rest; by head or all together."""
    block = block_for(grid)
    alike = {"keys": "alike", "key_block": max(8, block // 2), "rows": 8}

    def ladder(label: str, per_head: bool, **more: Any) -> Ladder:
        def make(density: float) -> Method:
            given = {"per_head": per_head, "block_size": block, **more}
            return build(name, {"density": round(density, 4), **given})

        joint = not per_head and "keys" in more
        return Ladder(name, label, make, alone=not per_head, few=True, joint=joint)

    pooled = {"mode": "pooled", "probes": 0}  # probes would only look
    return [
        ladder("pooled, each head alike", True, **pooled),
        ladder("mended, each head alike", True),
        ladder("mended, alike keys, each head alike", True, **alike),
        ladder("pooled, one threshold", False, **pooled),
        ladder("mended, one threshold", False),
        ladder("mended, alike keys, one threshold", False, **alike),
    ]


def _svg(name: str, grid: TokenGrid) -> list[Ladder]:
    block = block_for(grid)

    def ladder(sink: bool) -> Ladder:
        def make(density: float) -> Method:
            given = {"density": round(density, 4), "sink": sink, "block_size": block}
            return build(name, given)

        return Ladder(name, "with the first frame" if sink else "without the first frame", make)

    return [ladder(False), ladder(True)]


def _svg2(name: str, grid: TokenGrid) -> list[Ladder]:
    """Clusters as large as the blocks of other methods; the mass kept sets the density."""
    block = block_for(grid)

    def make(density: float) -> Method:
        given = {
            "mass": round(min(max(density, 0.01) ** 0.5, 0.99), 4),
            "least_kept": round(min(0.1, density / 2), 4),
            "least_queries": block,
            "least_keys": max(block // 2, 1),
            "block_size": block,
            "key_block": max(block // 2, 8),
        }
        return build(name, given)

    return [Ladder(name, "", make, few=True)]


def _clustered(name: str, grid: TokenGrid) -> list[Ladder]:
    """Groups as large as the blocks of other methods: of alike response, or of equal size."""
    block = block_for(grid)

    def ladder(partition: str, label: str) -> Ladder:
        def make(density: float) -> Method:
            given = {
                "partition": partition,
                "density": round(density, 4),
                "least_queries": block,
                "least_keys": max(block // 2, 8),
                "block_size": block,
                "key_block": max(block // 2, 8),
            }
            return build(name, given)

        return Ladder(name, label, make, few=True)

    return [ladder("profile", "alike in response"), ladder("split", "of equal size")]


def _by_density(name: str, grid: TokenGrid) -> list[Ladder]:
    """Any method with a density of its own, its other parameters at their defaults."""
    known = {f.name for f in fields(METHODS[name])}
    if "density" not in known:
        return []

    def make(density: float) -> Method:
        given: dict[str, Any] = {"density": round(density, 4)}
        if "block_size" not in known:
            return build(name, given)
        try:
            return build(name, {**given, "block_size": block_for(grid)})
        except InputError:  # a block size this method does not offer: its own default instead
            return build(name, given)

    return [Ladder(name, "", make)]


_MAKERS: dict[str, Callable[[str, TokenGrid], list[Ladder]]] = {
    "gna": _gna,
    "radial": _radial,
    "sta": _sta,
    "sparse_vdit": _sparse_vdit,
    "clear": _clear,
    "psa": _psa,
    "vmoba": _vmoba,
    "rectified": _rectified,
    "paro": _paro,
    "metered": _metered,
    "svg": _svg,
    "svg2": _svg2,
    "clustered": _clustered,
}
