"""CLEAR: image tokens see a disk of image tokens around them, and all text.

Source: arXiv:2412.16112 and Huage001/CLEAR. The published models are fine-tuned for it, so that
dense attention is no substitute there (`fine_tuned`); with stock weights it is an approximation
whose quality the authors do not report. Difference: on video, which
they do not treat, the disk is taken in every frame.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask
from dittools.methods.base import attend_masked, bad_param, check_params, param
from dittools.tiling import offset_mask


@dataclass(frozen=True)
class Clear:
    """A disk of keys around every query; cut, not moved, at the border."""

    name: ClassVar[str] = "clear"
    radius: float = param(
        0.33, "the radius in tokens, or below 1 a share of the longer image side", above=0.0
    )
    down_factor: int = param(
        0,
        "the side of the cells whose mean key and value every image query also sees; 0 for none",
        least=0,
        most=64,
    )
    spatial_weights: tuple[float, ...] = param(
        (), "the weights of one cell in raster order; empty weighs all its tokens alike"
    )
    proportional: bool = param(False, "whether scores grow with the log of the number of keys")
    fine_tuned: bool = param(
        False, "whether the weights were trained for the disk: never dense because that is faster"
    )
    trained_tokens: int = param(4608, "the keys at which 'proportional' changes nothing", least=2)
    block_size: int = param(128, "the tokens per block", least=8, most=1024)

    def __post_init__(self) -> None:
        """Check the parameters against each other."""
        check_params(self)
        if self.spatial_weights and len(self.spatial_weights) != self.down_factor**2:
            expected = f"{self.down_factor**2} numbers, one per token of a cell"
            raise bad_param(self, "spatial_weights", expected=expected)

    def not_supported(self, call: AttentionCall) -> list[str]:
        """The down-sampled variant needs whole cells, as its weights do."""
        d, grid = self.down_factor, call.grid
        if d and (grid.height % d or grid.width % d):
            return [f"clear pools cells of {d} x {d}, the grid is {grid.height} x {grid.width}"]
        if d and call.key.shape[1] > grid.total:
            return ["clear with pooled keys takes no other extra keys"]
        return []

    @property
    def differs_on_purpose(self) -> bool:
        """Whether far from dense attention is no fault."""
        return self.fine_tuned

    def remarks(self) -> list[str]:
        """Say what a report must know: an image the disk covers is changed as well."""
        if not self.proportional:
            return []
        keys = f"{self.trained_tokens:,} keys"
        return [f"clear multiplies the scores by sqrt(log n / log n0), n0 = {keys}, at every size"]

    def mask(self, grid: TokenGrid) -> BlockMask:
        """Return the mask of one grid, pooled keys included, the same for all heads; cached."""
        return clear_mask(grid, self)

    def radius_tokens(self, grid: TokenGrid) -> float:
        """Return the radius on one grid."""
        return self.radius * max(grid.height, grid.width) if self.radius < 1 else self.radius

    def score_factor(self, keys: int) -> float:
        """Return by what `proportional` multiplies the scores of a sequence of so many keys."""
        if not self.proportional:
            return 1.0
        keys *= 10 if self.down_factor else 1  # the authors' factor 10
        return math.sqrt(math.log(keys) / math.log(self.trained_tokens))

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query."""
        if self.proportional:
            factor = self.score_factor(call.key.shape[1])
            call = replace(call, scale=call.softmax_scale * factor)
        mask = self.mask(call.grid).to(call.query.device)
        if not self.down_factor:
            return attend_masked(call, backend, mask, exactly=self.fine_tuned)
        return backend.block_sparse(self._with_pooled(call), mask)

    def _with_pooled(self, call: AttentionCall) -> AttentionCall:
        keys = torch.cat((call.key, self._pool(call.key, call.grid)), dim=1)
        values = torch.cat((call.value, self._pool(call.value, call.grid)), dim=1)
        extra, kept, bias = keys.shape[1] - call.key.shape[1], call.key_mask, call.key_bias
        if kept is not None:
            kept = torch.cat((kept, kept.new_ones((len(kept), extra))), dim=1)
        if bias is not None:
            bias = torch.cat((bias, bias.new_zeros((*bias.shape[:2], extra))), dim=2)
        return replace(call, key=keys, value=values, key_mask=kept, key_bias=bias)

    def _pool(self, tensor: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
        """Return [B, cells, H, D]: the weighted mean of every d x d cell of the grid's tokens."""
        d = self.down_factor
        weights = torch.full((d * d,), 1 / d**2, dtype=torch.float32, device=tensor.device)
        if self.spatial_weights:
            weights = torch.tensor(self.spatial_weights, device=tensor.device)
        cells = tensor[:, grid.text_before : grid.text_before + grid.tokens].unflatten(
            1, (grid.frames, grid.height // d, d, grid.width // d, d)
        )
        pooled = torch.einsum("bfyixjhc,ij->bfyxhc", cells.float(), weights.view(d, d))
        return pooled.flatten(1, 3).to(tensor.dtype)


@lru_cache(maxsize=16)
def clear_mask(grid: TokenGrid, clear: Clear) -> BlockMask:
    """Build the mask of one grid, in spatial tiles as square as block_size allows."""
    y = torch.arange(1 - grid.height, grid.height)[:, None]
    x = torch.arange(1 - grid.width, grid.width)
    radius = clear.radius_tokens(grid)
    allowed = y * y + x * x < radius * radius  # a power would overflow
    cells = 0
    if clear.down_factor:
        cells = grid.tokens // clear.down_factor**2
    elif bool(allowed.all()):
        return BlockMask.full(grid.total, grid.total, clear.block_size)
    return offset_mask(grid, allowed, _tile(grid, clear.block_size), extra=cells)


def _tile(grid: TokenGrid, block_size: int) -> tuple[int, int]:
    """Choose the tile of block_size tokens that pads the image least, then the squarest."""
    shapes = [(h, block_size // h) for h in range(1, block_size + 1) if block_size % h == 0]

    def cost(tile: tuple[int, int]) -> tuple[float, int]:
        padded = -(-grid.height // tile[0]) * -(-grid.width // tile[1]) * block_size
        return round(padded / grid.tokens_per_frame, 1), sum(tile)

    return min(shapes, key=cost)


def clear_pairs(grid: TokenGrid, radius: float, down_factor: int = 0) -> int:
    """Return how many query-key pairs one image keeps: the disks cut at the border, and all text.

    4 * pairs * channels is the attention's cost in FLOPs per layer.
    """
    reach = math.ceil(radius) - 1 if radius > 1 else 0
    pairs = sum(
        max(grid.height - abs(dy), 0) * max(grid.width - abs(dx), 0)
        for dy in range(-reach, reach + 1)
        for dx in range(-reach, reach + 1)
        if dy * dy + dx * dx < radius**2
    )
    pairs *= grid.frames**2
    pairs += grid.text**2 + 2 * grid.text * grid.tokens
    return pairs + (grid.tokens * (grid.tokens // down_factor**2) if down_factor else 0)
