"""Random blocks at a given density: the floor every sparse method has to beat.

A fair floor keeps as many blocks as asked for in every row, the diagonal among them, and draws anew
for every head and layer; it is the same again for the same seed.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask
from dittools.methods.base import attend_masked, check_params, param
from dittools.methods.selection import keep_top, row_mask, text_blocks


@dataclass(frozen=True)
class RandomBlocks:
    """Key blocks drawn by lot, the same number for every query block."""

    name: ClassVar[str] = "random"
    density: float = param(0.25, "the share of blocks kept", above=0.0, most=1.0)
    seed: int = param(0, "the start of the random numbers", least=0, most=2**40)
    block_size: int = param(128, "the tokens per block", least=8, most=1024)

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_params(self)

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Every call fits."""
        return []

    def mask(self, grid: TokenGrid, heads: int = 1, layer: int = 0) -> BlockMask:
        """Return the mask of one grid and layer, one draw per head; cached."""
        return random_mask(grid, self, heads, layer)

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query."""
        mask = self.mask(call.grid, call.method_heads, call.layer)
        if call.peers is not None:
            mask = mask.heads(list(call.places))
        mask = mask.to(call.query.device)
        return attend_masked(call, backend, mask)


@lru_cache(maxsize=64)
def random_mask(grid: TokenGrid, method: RandomBlocks, heads: int, layer: int) -> BlockMask:
    """Draw the mask: text blocks and the diagonal first, the rest of each row by lot.

    Rows without text share what dense text rows leave of density * blocks ** 2, to within one block
    of each other; where text and diagonal alone are more than that, they are kept all the same.
    """
    blocks = grid.blocks(method.block_size)
    text = text_blocks(grid, method.block_size)
    generator = torch.Generator().manual_seed(method.seed * 1_000_003 + layer)
    scores = torch.rand((heads, blocks, blocks), generator=generator)
    scores.masked_fill_(torch.eye(blocks, dtype=torch.bool) | text, 2.0)
    rows = blocks - int(text.sum())
    budget = max(round(method.density * blocks * blocks) - (blocks - rows) * blocks, 0)
    counts = torch.full((blocks,), blocks)
    if rows:
        steps = torch.arange(rows + 1) * budget // rows
        counts[~text] = steps[1:] - steps[:-1]
    counts = counts.clamp(min=int(text.sum()) + 1, max=blocks)
    return row_mask(keep_top(scores, counts.expand(heads, -1)), grid, method.block_size)
