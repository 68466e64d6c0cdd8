"""Find out whether a mask is a window on every axis of its grid, and prove it by rebuilding it."""

from itertools import product
from typing import NamedTuple

import torch

from dittools.grid import TokenGrid
from dittools.mask import BlockMask
from dittools.order import TokenOrder
from dittools.tiling import separable_mask


class Windows(NamedTuple):
    """A neighborhood over the axes that are longer than one token.

    Attributes:
        axes: tokens per axis.
        window: keys every query sees per axis, at least 2.
        stride: queries per axis that share one window.
    """

    axes: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]


def windows_of(mask: BlockMask, grid: TokenGrid) -> Windows | str:
    """Return the windows a mask stands for, or one sentence why it stands for none.

    Windows are read off one query per position of each axis; the mask built from them must then
    equal the given one in every block and bit, so nothing that merely looks like a window passes.
    """
    if grid.text:
        return "natten takes no text tokens beside the grid"
    if mask.keep.shape[0] != 1:
        return "natten takes one window for all heads and this mask has one per head"
    mask = mask.to(torch.device("cpu"))
    tile = _tile_of(mask, grid)
    if tile is None:
        return "natten needs a window mask and this one is not cut into tiles of the grid"
    axes = [_axis(mask, grid, axis) for axis in range(3)]
    found: list[tuple[int, int, int]] = []
    for kept in axes:
        length, window = len(kept), int(kept[0].sum())
        stride = next((s for s in range(1, window + 1) if _is(kept, window, s)), None)
        if stride is None or (length > 1 and window < 2):
            return "natten needs windows of 2 tokens or more, without dilation or causality"
        found.append((length, window, stride))
    again = separable_mask(grid, (axes[0], axes[1], axes[2]), tile)
    if not _same(mask, again):
        return "natten needs a box of keys around every query and this mask is not one"
    long = [axis for axis in found if axis[0] > 1] or found[-1:]
    return Windows(*(tuple(axis[part] for axis in long) for part in range(3)))


def axis_window(length: int, window: int, stride: int) -> torch.Tensor:
    """Return bool [length, length]: the keys (columns) each query of one axis sees.

    Source: arXiv:2504.16922; the window of a stride group is centred on its leader, moved inward.
    """
    place = torch.arange(length)
    leader = (place // stride * stride + stride // 2).clamp(max=length - 1)
    start = (leader - window // 2).clamp(min=0, max=length - window)[:, None]
    return (place >= start) & (place < start + window)


def _is(kept: torch.Tensor, window: int, stride: int) -> bool:
    return torch.equal(kept, axis_window(len(kept), window, stride))


def _tile_of(mask: BlockMask, grid: TokenGrid) -> tuple[int, int, int] | None:
    """The tile whose order is the mask's own."""
    size = mask.q_block
    if mask.order is None or mask.kv_block != size or mask.order.index.shape[0] != 1:
        return None
    sides = [side for side in range(1, size + 1) if size % side == 0]
    for f, h in product(sides, sides):
        if size % (f * h):
            continue
        order = TokenOrder.tiles(grid, (f, h, size // (f * h)))
        if torch.equal(order.index, mask.order.index):
            return f, h, size // (f * h)
    return None


def _axis(mask: BlockMask, grid: TokenGrid, axis: int) -> torch.Tensor:
    """The keys each position of an axis sees along it, bool [length, length]."""
    assert mask.order is not None
    inverse = mask.order.inverse[0]
    step = (grid.height * grid.width, grid.width, 1)[axis]
    rows = []
    for place in range(grid.shape[axis]):
        slot = int(inverse[place * step])
        row = mask.rows(0, slot // mask.q_block)[slot % mask.q_block]
        box = row[inverse].view(grid.shape)
        rows.append(box.transpose(0, axis).flatten(1).any(1))
    return torch.stack(rows)


def _same(one: BlockMask, other: BlockMask) -> bool:
    if not torch.equal(one.keep, other.keep) or (one.tiles is None) != (other.tiles is None):
        return False
    if one.tiles is None or other.tiles is None:
        return True
    assert one.tile_index is not None
    assert other.tile_index is not None
    mine, theirs = one.tile_index, other.tile_index
    cut = one.keep & (theirs >= 0)
    if not torch.equal(one.keep & (mine >= 0), cut):
        return False
    pairs = torch.unique(torch.stack((mine[cut], theirs[cut])).long(), dim=1)
    return torch.equal(one.tiles[pairs[0]], other.tiles[pairs[1]])
