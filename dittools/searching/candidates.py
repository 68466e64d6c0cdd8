"""The candidates a search chooses from: every method at several densities, checked on the grid."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.mask import BlockMask
from dittools.methods import METHODS, GridMethod, Method, build, to_params

DENSITIES = (0.08, 0.15, 0.25, 0.4, 0.6)
# always there; a floor and a ceiling no plan should run; a window that changes the picture
NEVER = ("dense", "random", "oracle", "freeswim")


@dataclass(frozen=True)
class Candidate:
    """One method with its parameters, and what it costs on one grid.

    Attributes:
        method: what a plan's rule would run.
        mask: its mask, None when that depends on query and key.
        density: share of query-key pairs kept; a nominal 1 until it is measured.
        computed: share of blocks visited.
        mask_bytes: memory of the mask.
    """

    method: Method
    mask: BlockMask | None
    density: float
    computed: float
    mask_bytes: int

    @property
    def name(self) -> str:
        """Method and the parameters that differ from its defaults, one readable phrase."""
        kind: Any = type(self.method)
        defaults = {f.name: f.default for f in fields(kind)}
        changed = {
            name: value
            for name, value in to_params(self.method).items()
            if _differs(getattr(self.method, name), defaults.get(name))
        }
        inside = ", ".join(f"{k}={_short(v)}" for k, v in changed.items())
        return f"{self.method.name}({inside})"


def _differs(value: Any, default: Any) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(default, torch.Tensor):
        return True
    return bool(value != default)


def _short(value: Any) -> str:
    return json.dumps(value, default=lambda v: f"tensor {tuple(getattr(v, 'shape', ()))}")


def block_for(grid: TokenGrid) -> int:
    """Return tokens per block: 128, smaller where a sequence would be cut into fewer than 32."""
    size = 128
    while size > 8 and grid.total < 32 * size:
        size //= 2
    return size


def candidates_for(grid: TokenGrid, methods: Sequence[str] = ()) -> list[Candidate]:
    """Return dense first, then every candidate of the methods, without repeats.

    Args:
        grid: geometry of the sequence; masks are made for it, parameters stay relative to it.
        methods: names in METHODS; empty takes all that suit a search.
    Raises:
        InputError: a name that is no method, or none is left.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise InputError(
            "unknown method in the search",
            expected=", ".join(n for n in METHODS if n not in NEVER),
            got=", ".join(unknown),
        )
    names = [n for n in (methods or METHODS) if n not in NEVER]
    if not names:
        raise InputError("no method is left to search over", remedy="name one in methods")
    found = [Candidate(build("dense"), None, 1.0, 1.0, 0)]
    seen: set[str] = set()
    for name in names:
        for method in _variants(name, grid):
            candidate = measured(method, grid)
            if candidate is not None and not _is_known(candidate, seen):
                found.append(candidate)
    return found


def measured(method: Method, grid: TokenGrid) -> Candidate | None:
    """Return the candidate of a method on a grid; None when it keeps everything there."""
    if not isinstance(method, GridMethod) or method.name == "random":
        return Candidate(method, None, 1.0, 1.0, 0)
    if getattr(method, "mode", "") in ("skip", "full", "auto"):
        return Candidate(method, None, 1.0, 1.0, 0)
    mask = method.mask(grid)
    density = mask.density
    if density > 0.999:
        return None
    return Candidate(method, mask, density, mask.computed, mask_bytes(mask))


def mask_bytes(mask: BlockMask) -> int:
    """Return the memory a mask holds, its order and bit tiles included."""
    parts = (mask.keep, mask.tile_index, mask.tiles, mask.order and mask.order.index)
    return sum(t.numel() * t.element_size() for t in parts if isinstance(t, torch.Tensor))


def _is_known(candidate: Candidate, seen: set[str]) -> bool:
    """Whether a method with the same parameters is there already; notes it if not."""
    known = candidate.name in seen
    seen.add(candidate.name)
    return known


def _variants(name: str, grid: TokenGrid) -> Iterable[Method]:
    """Return the methods of one name over the ladder of densities."""
    return _LADDERS.get(name, _by_fields)(name, grid)


def _gna(name: str, grid: TokenGrid) -> list[Method]:
    """Boxes that are long in time, in space, along one axis, or in none."""
    block = block_for(grid)
    stride: int | str = "tile" if grid.total >= 8192 else 1
    made = []
    for density in DENSITIES:
        side, cube = density ** (1 / 2), density ** (1 / 3)
        boxes: list[tuple[Any, Any, Any]] = [
            ("full", side, side),
            (density, "full", "full"),
            (cube, cube, cube),
            ("full", density, "full"),
            ("full", "full", density),
        ]
        made += [
            build(
                name,
                {"window": tuple(_rounded(b) for b in box), "stride": stride, "block_size": block},
            )
            for box in boxes
        ]
    return [m for m in made if not _is_degenerate(m, grid)]


def _is_degenerate(method: Any, grid: TokenGrid) -> bool:
    """Whether a window share rounds to the whole axis, which another box says more plainly."""
    pairs = zip(method.window, grid.shape, strict=True)
    return any(isinstance(w, float) and round(w * n) >= n > 1 for w, n in pairs)


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _radial(name: str, grid: TokenGrid) -> list[Method]:
    if grid.frames < 2:
        return []
    block = max(8, min(block_for(grid), 128))
    return [
        build(name, {"decay": decay, "sink": sink, "block_size": block})
        for decay in (0.1, 0.2, 0.5, 1.0, 2.0)
        for sink in (True, False)
    ]


def _sta(name: str, grid: TokenGrid) -> list[Method]:
    block = block_for(grid)
    windows = [
        (1, 3, 3),
        (3, 3, 3),
        (3, 1, 1),
        (9, 1, 1),
        (9, 3, 3),
        (9, 9, 1),
        (9, 1, 9),
        (3, 9, 9),
    ]
    return [build(name, {"window": w, "block_size": block}) for w in windows]


def _sparse_vdit(name: str, grid: TokenGrid) -> list[Method]:
    block = block_for(grid)
    modes = ["diagonal", "stripe"] + (["multi_diagonal"] if grid.frames > 1 else [])
    made = [
        build(name, {"mode": mode, "density": density, "block_size": block})
        for mode in modes
        for density in DENSITIES
    ]
    return [*made, build(name, {"mode": "skip"})]


def _by_fields(name: str, grid: TokenGrid) -> list[Method]:
    """Any other method: its defaults, and the ladder where it has a density of its own."""
    kind = METHODS[name]
    known = {f.name for f in fields(kind)}
    base: dict[str, Any] = {}
    if "block_size" in known:
        base["block_size"] = block_for(grid)
    if "per_head" in known:
        base["per_head"] = True  # a head's share must not depend on which heads run beside it
    if "density" not in known:
        return _built(name, [base])
    return _built(name, [{**base, "density": density} for density in DENSITIES])


def _built(name: str, settings: list[dict[str, Any]]) -> list[Method]:
    """Return the methods whose settings the method accepts."""
    made = []
    for params in settings:
        try:
            made.append(build(name, params))
        except InputError:  # a block size this method does not offer: its own default instead
            made.append(build(name, {k: v for k, v in params.items() if k != "block_size"}))
    return made


_LADDERS: dict[str, Callable[[str, TokenGrid], Iterable[Method]]] = {
    "gna": _gna,
    "radial": _radial,
    "sta": _sta,
    "sparse_vdit": _sparse_vdit,
}


def without(candidates: list[Candidate], excluded: Sequence[str]) -> list[Candidate]:
    """Return the candidates but those of the excluded methods; dense always stays."""
    return [c for c in candidates if c.method.name == "dense" or c.method.name not in excluded]


def with_cost(candidate: Candidate, density: float, computed: float) -> Candidate:
    """Return a candidate whose density was only found while it ran."""
    return replace(candidate, density=density, computed=computed)
