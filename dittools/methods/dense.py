"""Full attention under the same protocol as everything else: the yardstick and safe default."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask


@dataclass(frozen=True)
class Dense:
    """Attend to everything; has no parameters."""

    name: ClassVar[str] = "dense"

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Every call can run dense."""
        return []

    def mask(self, grid: TokenGrid) -> BlockMask:
        """Return the mask that keeps everything, in blocks of 128 tokens."""
        return BlockMask.full(grid.total, grid.total, 128)

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D]: attention over all keys."""
        return backend.dense(call)
