"""Where each token of a sequence sits: a frames x height x width raster with text around it."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from dittools.errors import InputError


class Segments(NamedTuple):
    """Runs of tokens that share one block and one frame; text runs have frame -1.

    Attributes:
        block: [n] block that holds the run.
        frame: [n] frame of the run, -1 for text.
        first: [n] in-frame raster position of its first token.
        last: [n] in-frame raster position of its last token, inclusive.
    """

    block: torch.Tensor
    frame: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor


@dataclass(frozen=True)
class TokenGrid:
    """Token geometry of one sequence, in raster order frames -> height -> width.

    The sequence is [text_before, frames * height * width, text_after]. Hashable, so it keys caches.
    """

    frames: int
    height: int
    width: int
    text_before: int = 0
    text_after: int = 0

    def __post_init__(self) -> None:
        """Refuse empty grids and negative text lengths."""
        for name, least in (
            ("frames", 1),
            ("height", 1),
            ("width", 1),
            ("text_before", 0),
            ("text_after", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(
                    f"TokenGrid {name} is not usable",
                    expected=f"a whole number of at least {least}",
                    got=repr(value),
                )

    @property
    def tokens_per_frame(self) -> int:
        """Grid tokens of one frame."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Grid tokens, text not counted."""
        return self.frames * self.height * self.width

    @property
    def text(self) -> int:
        """Text tokens, before and after."""
        return self.text_before + self.text_after

    @property
    def total(self) -> int:
        """Length of the sequence, text included."""
        return self.tokens + self.text

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width)."""
        return self.frames, self.height, self.width

    def blocks(self, block_size: int) -> int:
        """Blocks of block_size tokens that cover the sequence; the last may be ragged."""
        return -(-self.total // block_size)

    def coordinates(self) -> torch.Tensor:
        """Return [total, 3] int64 (frame, row, column) per token; text tokens are (-1, -1, -1)."""
        return _coordinates(self)

    def segments(self, block_size: int) -> Segments:
        """Cut the sequence at every block and frame border; O(blocks + frames) runs."""
        return _segments(self, block_size)


@lru_cache(maxsize=16)
def _coordinates(grid: TokenGrid) -> torch.Tensor:
    raster = torch.arange(grid.tokens)
    frame, inside = raster // grid.tokens_per_frame, raster % grid.tokens_per_frame
    places = torch.stack((frame, inside // grid.width, inside % grid.width), dim=1)
    before = places.new_full((grid.text_before, 3), -1)
    return torch.cat((before, places, places.new_full((grid.text_after, 3), -1)))


@lru_cache(maxsize=16)
def _segments(grid: TokenGrid, block_size: int) -> Segments:
    starts_of_frames = grid.text_before + torch.arange(grid.frames + 1) * grid.tokens_per_frame
    cuts = torch.cat((torch.arange(0, grid.total, block_size), starts_of_frames, torch.tensor([0])))
    start = torch.unique(cuts[cuts < grid.total])
    end = torch.cat((start[1:], torch.tensor([grid.total]))) - 1
    place = start - grid.text_before
    is_text = (place < 0) | (place >= grid.tokens)
    frame = torch.where(is_text, -1, place // grid.tokens_per_frame)
    first = torch.where(is_text, 0, place % grid.tokens_per_frame)
    return Segments(start // block_size, frame, first, first + end - start)
