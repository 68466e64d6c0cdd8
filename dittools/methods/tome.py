"""ToMe: tokens of an image that are alike are merged before attention and copied back after it.

Source: arXiv:2303.17604 and dbolya/tomesd (defaults: half of the tokens, cells of 2 x 2, attention
at the UNet's full resolution only). Differences: query, key and value are merged behind their
projections, which are linear where the authors merge before them, so results agree and the
projections' share of the saving is given up; text tokens are never merged and their rows are dense;
without the input of the block at hand the keys say which tokens are alike, as in the method's first
form (arXiv:2210.09461).
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.methods.base import check_params, param
from dittools.methods.merging import Matching, match, merge, unmerge


@dataclass(frozen=True)
class ToMe:
    """Attention over fewer tokens: the most alike ones stand for each other."""

    name: ClassVar[str] = "tome"
    needs: ClassVar[tuple[str, ...]] = ("features",)
    ratio: float = param(0.5, "the share of tokens that are merged", least=0.0, most=1.0)
    cell: int = param(2, "the side of a cell, in which one token is never merged away", least=1)
    random: bool = param(True, "that token is drawn anew at every call, else it is the first")
    seed: int = param(0, "the start of the random numbers", least=0, most=2**40)
    max_downsample: int = param(
        1, "the coarsest level of a UNet that takes part: 1 is full resolution", least=1
    )

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_params(self)

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Extra keys cannot be merged, and coarser levels of a UNet keep their tokens."""
        return refused(self.name, call, self.max_downsample)

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query."""
        found = matching(call, (self.cell, self.cell), self.random, self.seed)
        count = 0 if found is None else found.most(self.ratio)
        if found is None or count == 0:
            return backend.dense(call)
        merged = merge_call(call, found, count)
        return rebuild(call, unmerge(backend.dense(merged), found, count), backend)


def matching(
    call: AttentionCall, cell: tuple[int, int], random: bool, seed: int
) -> Matching | None:
    """Return which tokens of a call are alike; None when a frame is smaller than a cell."""
    features = call.features
    if features is None:
        features = video_part(call.key, call.grid).flatten(2)
    drawn = ((seed * 1_000_003 + call.layer) * 1_000_003 + call.step) % 2**63 if random else None
    return match(features, call.grid, cell, drawn)


def merge_call(call: AttentionCall, found: Matching, count: int) -> AttentionCall:
    """Return a call over the merged tokens of the grid, with the text's keys behind them."""
    grid = call.grid
    key, value = (
        torch.cat((merge(video_part(t, grid), found, count), text_part(t, grid)), 1)
        for t in (call.key, call.value)
    )
    query = merge(video_part(call.query, grid), found, count)
    tokens = query.shape[1]
    bias = call.additive_mask()
    if bias is not None:  # only text keys are ever dropped or weighed
        plain = bias.new_zeros((*bias.shape[:2], tokens))
        bias = torch.cat((plain, text_part(bias.transpose(1, 2), grid).transpose(1, 2)), 2)
    return replace(
        call,
        query=query,
        key=key,
        value=value,
        grid=TokenGrid(1, 1, tokens),
        key_mask=None,
        key_bias=bias,
        features=None,
    )


def rebuild(call: AttentionCall, video: torch.Tensor, backend: Backend) -> torch.Tensor:
    """Return the whole sequence: the video rows given, the text rows dense."""
    grid = call.grid
    if not grid.text:
        return video
    query = text_part(call.query, grid)
    text = backend.dense(replace(call, query=query, grid=TokenGrid(1, 1, grid.text)))
    before, after = text.split((grid.text_before, grid.text_after), 1)
    return torch.cat((before, video, after), 1)


def refused(name: str, call: AttentionCall, max_downsample: int) -> list[str]:
    """Return why tokens of a call cannot be merged."""
    found = []
    if call.key.shape[1] != call.grid.total:
        found.append(f"{name} cannot merge extra keys")
    elif call.key_mask is not None and not bool(video_part(call.key_mask, call.grid).all()):
        found.append(f"{name} cannot merge video tokens of which some are masked")
    if call.full is not None:
        here = call.grid.height * call.grid.width
        factor = math.sqrt(call.full.height * call.full.width / here)
        if round(factor) > max_downsample:
            found.append(
                f"{name} acts at up to 1/{max_downsample} of the latent resolution, "
                f"this level is at 1/{round(factor)} (max_downsample)"
            )
    return found


def video_part(tensor: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """Return the grid's own tokens of [B, total, ...]."""
    return tensor.narrow(1, grid.text_before, grid.tokens)


def text_part(tensor: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """Return the text tokens of [B, total, ...], those before the grid first."""
    before = tensor.narrow(1, 0, grid.text_before)
    after = tensor.narrow(1, grid.text_before + grid.tokens, grid.text_after)
    return torch.cat((before, after), 1)
