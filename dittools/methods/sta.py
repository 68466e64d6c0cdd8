"""Sliding tile attention: a window that moves by whole tiles, so that no block is cut.

Source: arXiv:2502.04507 and hao-ai-lab/FastVideo. It equals generalized neighborhood attention with
a window of an odd number of tiles and a stride of one tile, and is lowered to that mask: on axes
that are no whole number of tiles, which the authors refuse, the last window moves inward by tokens
and keeps its size. Per-head windows from an offline search are several rules of one plan.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask
from dittools.methods.base import attend_by_grid, bad_param, check_params, param
from dittools.methods.gna import GNA, gna_mask

_PUBLISHED_TILE = (6, 8, 8)  # 384 tokens


@dataclass(frozen=True)
class STA:
    """A window of whole tiles around the tile of the query."""

    name: ClassVar[str] = "sta"
    window: tuple[int, int, int] = param(
        (3, 3, 3), "the window in tiles, per axis; even numbers act as the next odd one"
    )
    tile: tuple[int, int, int] | None = param(
        None, "the tile in tokens, per axis; None halves (6, 8, 8) until 4 tiles fit"
    )
    block_size: int = param(128, "the tokens per computed block", least=8, most=1024)

    def __post_init__(self) -> None:
        """Check both triples."""
        check_params(self)
        for name in ("window", "tile"):
            value = getattr(self, name)
            is_triple = isinstance(value, tuple) and len(value) == 3
            if name == "tile" and value is None:
                continue
            if not is_triple or not all(type(v) is int and v >= 1 for v in value):
                raise bad_param(self, name, expected="three whole numbers of at least 1")

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Every grid fits: the window is clipped to it."""
        return []

    def as_gna(self, grid: TokenGrid) -> GNA:
        """Return the neighborhood attention with the same mask on this grid."""
        tile = self.tile or sta_tile(grid)
        window = []
        for tiles, edge, length in zip(self.window, tile, grid.shape, strict=True):
            covers = tiles >= -(-length // edge)
            window.append("full" if covers else min((tiles // 2 * 2 + 1) * edge, length))
        return GNA(window=tuple(window), stride=tile, block_size=self.block_size)

    def mask(self, grid: TokenGrid) -> BlockMask:
        """Return the mask of one grid, the same for all heads; cached."""
        return gna_mask(grid, self.as_gna(grid))

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query."""
        return attend_by_grid(self, call, backend)


@lru_cache(maxsize=64)
def sta_tile(grid: TokenGrid) -> tuple[int, int, int]:
    """Return the published tile, halved along each axis that holds fewer than 4 of it."""
    sides = []
    for length, edge in zip(grid.shape, _PUBLISHED_TILE, strict=True):
        while edge > 1 and -(-length // edge) < 4:
            edge //= 2
        sides.append(edge)
    return sides[0], sides[1], sides[2]
