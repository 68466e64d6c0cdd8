"""The candidates a search chooses from: every method at several densities, checked on the grid."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.mask import BlockMask
from dittools.methods import METHODS, GridMethod, Method, build
from dittools.plans.phrase import phrase as phrase
from dittools.searching.ladders import ladders_for

DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75)
FEW_DENSITIES = (0.1, 0.25, 0.5)  # of methods that take long to choose
# of those that share out a layer's blocks themselves
JOINT_DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.65)
# always there; a floor and a ceiling no plan should run; and for sizes beyond the training size
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
        together: whether all heads of a layer use it or none: what one keeps depends on the others.
    """

    method: Method
    mask: BlockMask | None
    density: float
    computed: float
    mask_bytes: int
    together: bool = False

    @property
    def name(self) -> str:
        """Method and the parameters that differ from its defaults, one readable phrase."""
        return phrase(self.method)


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
        for method, together in _variants(name, grid):
            candidate = measured(method, grid)
            if candidate is not None and not _is_known(candidate, seen):
                found.append(replace(candidate, together=together))
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


def _variants(name: str, grid: TokenGrid) -> Iterable[tuple[Method, bool]]:
    """Return the methods of one name over the ladder of densities, and if heads use it together."""
    found = ladders_for(name, grid)
    for ladder in found:
        if ladder.joint or not ladder.alone:
            some = FEW_DENSITIES if ladder.few else DENSITIES
            for density in JOINT_DENSITIES if ladder.joint else some:
                yield ladder.make(density), ladder.alone
    if name == "sparse_vdit":
        yield build(name, {"mode": "skip"}), False
    if not found:
        yield build(name), False


def is_chooser(candidate: Candidate) -> bool:
    """Whether a candidate looks at query and key, so that its density shows only in a run."""
    plain = candidate.method.name == "dense" or getattr(candidate.method, "mode", "") == "skip"
    return candidate.mask is None and not plain


def without(candidates: list[Candidate], excluded: Sequence[str]) -> list[Candidate]:
    """Return the candidates but those of the excluded methods; dense always stays."""
    return [c for c in candidates if c.method.name == "dense" or c.method.name not in excluded]
