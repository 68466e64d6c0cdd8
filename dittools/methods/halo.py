"""Masks of a band of rows of an image: what a rank needs that holds these rows and no others.

GNA and CLEAR look a few rows up and down, so a rank that holds a band of an image needs the keys
and values of a halo of rows around it, and of all text, and nothing else.
Source of the idea: arXiv:2412.16112 (CLEAR), section on several GPUs; its text tokens average what
ranks make of them, here they are merged exactly.
"""

import math
from dataclasses import replace
from functools import lru_cache

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.mask import BlockMask
from dittools.methods.base import Method
from dittools.methods.clear import Clear, clear_mask
from dittools.methods.gna import GNA, axis_patterns, gna_sides
from dittools.tiling import separable_mask

Banded = GNA | Clear
Range = tuple[int, int]  # first, and one behind the last


def band_refusal(method: Method, grid: TokenGrid) -> str:
    """Return why a method cannot run on bands of rows, "" when it can."""
    if not isinstance(method, (GNA, Clear)):
        return f"{method.name} looks at the whole image; gna and clear look at rows nearby"
    if isinstance(method, Clear) and method.down_factor:
        return "clear with pooled keys looks at the whole image"
    if grid.frames > 1:
        return "a video is cut into frames, not into rows"
    return ""


@lru_cache(maxsize=256)
def key_rows(method: Banded, grid: TokenGrid, rows: Range) -> Range:
    """Return the rows whose keys the queries of some rows see, those rows included."""
    first, behind = rows
    if isinstance(method, Clear):
        reach = max(math.ceil(method.radius_tokens(grid)) - 1, 0)
        return max(first - reach, 0), min(behind + reach, grid.height)
    seen = axis_patterns(grid, method)[1][first:behind].any(0).nonzero().flatten()
    return min(first, int(seen[0])), max(behind, int(seen[-1]) + 1)


@lru_cache(maxsize=64)
def band_mask(method: Banded, grid: TokenGrid, rows: Range, own: Range) -> BlockMask:
    """Return the mask over all text and some rows, exact for the queries of some of its tokens.

    Args:
        method: gna or clear.
        grid: of the whole image.
        rows: that are there: those of `key_rows` or more.
        own: image tokens whose queries count, in raster order of the whole image; blocks of others
            are left out.
    """
    first, behind = rows
    local = replace(grid, height=behind - first)
    if isinstance(method, Clear):
        mask = clear_mask(local, replace(method, radius=max(method.radius_tokens(grid), 1.0)))
    else:
        frames, down, across = axis_patterns(grid, method)
        axes = (frames, down[first:behind, first:behind], across)
        mask = separable_mask(local, axes, gna_sides(grid, method))
    shift = local.text_before - first * grid.width
    token = torch.arange(mask.q_slots) if mask.order is None else mask.order.index[0]
    wanted = (token >= own[0] + shift) & (token < own[1] + shift)
    wanted = torch.nn.functional.pad(wanted, (0, mask.q_slots - len(wanted)))
    blocks = wanted.view(-1, mask.q_block).any(1)
    return replace(mask, keep=mask.keep & blocks[None, :, None], _cache={})


def band_scale(
    method: Banded, call: AttentionCall, scale: float | None, keys: int
) -> AttentionCall:
    """Return a call with the factor on its scores that a sequence of so many keys gets."""
    call = replace(call, scale=scale)
    if isinstance(method, Clear) and method.proportional:
        return replace(call, scale=call.softmax_scale * method.score_factor(keys))
    return call
