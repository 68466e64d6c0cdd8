"""Radial attention: the further apart two frames are, the narrower the band between them.

Source: arXiv:2506.19852 and the authors' radial_attn/attn_mask.py, which differ; this is the mask
of the code. Half widths are decay * P / 2**floor(log2 d) tokens (P = largest power of two in a
frame), never below one block; once P / 2**floor(log2 d) falls under 128, only every 2nd, 4th, ...
distance stays. A block is kept when more than 60 % of the columns the band touches hold more than a
third of its rows.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask
from dittools.methods.base import attend_by_grid, check_params, param
from dittools.order import TokenOrder

_THIN = 128  # tokens; the authors thin out distances below this width, whatever the block size


@dataclass(frozen=True)
class Radial:
    """Bands around the diagonal that narrow as two frames move apart."""

    name: ClassVar[str] = "radial"
    decay: float = param(
        0.2,
        "the factor on every band from frame distance 2 on; lower is sparser",
        above=0.0,
        most=64.0,
    )
    block_size: int = param(128, "the tokens per block", least=8, most=1024)
    sink: bool = param(True, "whether every query sees the whole first frame")
    first_distance: str = param(
        "t", "the half width between neighbouring frames: all tokens or half", choices=("t", "t/2")
    )
    safe: bool = param(
        True,
        "whether every token sees itself and its own frame, which the authors' rounding can cut",
    )

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_params(self)

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Only video has a distance between frames."""
        return [] if call.grid.frames > 1 else ["radial needs 2 frames or more, got 1"]

    def mask(self, grid: TokenGrid) -> BlockMask:
        """Return the mask of one grid, the same for all heads; cached."""
        return radial_mask(grid, self)

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query."""
        return attend_by_grid(self, call, backend)


def half_widths(frames: int, tokens_per_frame: int, radial: Radial) -> torch.Tensor:
    """Return int64 [frames]: the half width at each frame distance, -1 where pairs are dropped."""
    power = 2 ** (tokens_per_frame.bit_length() - 1)
    widths = [tokens_per_frame]
    for distance in range(1, frames):
        width = power / 2 ** (distance.bit_length() - 1)
        if width < _THIN and distance % int(_THIN / width):
            widths.append(-1)
        elif distance == 1:
            widths.append(tokens_per_frame // (1 if radial.first_distance == "t" else 2))
        else:
            widths.append(int(max(radial.decay * width, radial.block_size)))
    return torch.tensor(widths)


@lru_cache(maxsize=32)
def radial_mask(grid: TokenGrid, radial: Radial) -> BlockMask:
    """Build the mask of one grid from interval lengths; no token pair is ever enumerated.

    Text stands behind the grid's tokens (leading text is moved there and back); its blocks, and the
    block it shares with the last frame, are dense both ways.
    """
    size, per_frame = radial.block_size, grid.tokens_per_frame
    blocks = grid.blocks(size)
    keep = torch.zeros((blocks, blocks), dtype=torch.bool)
    widths = half_widths(grid.frames, per_frame, radial)
    frame = torch.arange(grid.frames)
    block = torch.arange(-(-per_frame // size) + 1)  # blocks one frame can reach
    by_majority = block < len(block) - 1  # the authors drop what spills into one block more
    first_block = frame * per_frame // size
    low = (block * size - (frame * per_frame % size)[:, None]).clamp(min=0)  # [frames, block]
    high = ((block + 1) * size - 1 - (frame * per_frame % size)[:, None]).clamp(max=per_frame - 1)
    place = (first_block[:, None] + block).clamp(max=blocks - 1)
    inside = (first_block[:, None] + block < blocks) & (low <= high)
    for query_frame in range(grid.frames):
        width = widths[(frame - query_frame).abs()]
        if radial.sink:
            width[0] = per_frame
        rows = (low[query_frame][:, None], high[query_frame][:, None])
        kept = _majority(rows, (low[:, None], high[:, None]), width[:, None, None], size)
        kept &= by_majority[:, None] & by_majority
        if radial.safe:
            kept[query_frame] |= by_majority  # columns; the diagonal is added below
        kept &= (
            inside[query_frame][:, None] & inside[:, None]
        )  # [key frame, row block, column block]
        key_frame, row, column = kept.nonzero(as_tuple=True)
        keep[place[query_frame][row], place[key_frame, column]] = True
    keep[grid.tokens // size :] = True
    keep[:, grid.tokens // size :] = True
    if radial.safe:
        keep.fill_diagonal_(True)
    order = _text_last(grid) if grid.text_before else None
    return BlockMask(keep[None], size, order=order, q_tokens=grid.total, kv_tokens=grid.total)


def _majority(
    rows: tuple[torch.Tensor, torch.Tensor],
    columns: tuple[torch.Tensor, torch.Tensor],
    width: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """Whether over 60 % of the touched columns hold more than a third of a block in kept rows.

    The kept rows of column l run from max(rows[0], l - width) to min(rows[1], l + width), so the
    columns with at least n of them form an interval.
    """

    def columns_with(least: int) -> torch.Tensor:
        first = torch.maximum(columns[0], rows[0] - width + least - 1)
        last = torch.minimum(columns[1], rows[1] + width + 1 - least)
        possible = (rows[1] - rows[0] + 1 >= least) & (2 * width + 1 >= least)
        return (last - first + 1).clamp(min=0) * possible

    return 5 * columns_with(size // 3 + 1) > 3 * columns_with(1)


def _text_last(grid: TokenGrid) -> TokenOrder:
    """Move leading text behind the grid's tokens, so that frames start at a block border."""
    token = torch.arange(grid.total)
    start, end = grid.text_before, grid.text_before + grid.tokens
    return TokenOrder(torch.cat((token[start:end], token[:start], token[end:]))[None], grid.total)
