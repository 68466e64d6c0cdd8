"""A new method in about 30 lines: every query sees its own frame and every n-th other frame."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

import dittools
from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask


@dataclass(frozen=True)
class EveryNthFrame:
    """Parameters, as a plan would store them."""

    name: ClassVar[str] = "every_nth_frame"
    n: int = 3
    block_size: int = 64  # tokens

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Say why a call cannot run; it then runs dense and the report names it."""
        return [] if call.grid.frames > 1 else ["every_nth_frame needs 2 frames or more, got 1"]

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D]."""
        return backend.block_sparse(call, frame_mask(call.grid, self))


@lru_cache(maxsize=16)
def frame_mask(grid: TokenGrid, method: EveryNthFrame) -> BlockMask:
    """Keep a block when any of its frame pairs is n, 2n, 3n ... frames apart."""
    runs = grid.segments(method.block_size)  # runs of tokens inside one block and one frame
    apart = (runs.frame[:, None] - runs.frame).abs()
    return BlockMask.from_segments(grid, runs, apart % method.n == 0, method.block_size)


if __name__ == "__main__":
    pipe = dittools.pipelines.load("demo")
    size = {"height": 96, "width": 96, "num_frames": 11}  # the demo model makes one frame more
    prompt = "a red circle moving left over a blue striped background"
    with dittools.attach(pipe, EveryNthFrame(n=3), dense_steps=0.25) as handle:
        pipe(prompt, num_inference_steps=12, guidance_scale=4.0, **size)
        print(handle.report())
