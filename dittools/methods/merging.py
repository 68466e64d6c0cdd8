"""Token merging: which tokens of an image are alike, and averaging them and copying them back.

Source: arXiv:2303.17604 and dbolya/tomesd. In every cell of a frame one token is a destination, all
others are sources. A source goes with its most alike destination, the most alike sources first.
Differences: likeness is worked out in pieces, so that nothing of size N x N is held; the random
choice follows from a seed, the layer and the step, and is the same for every row of a batch.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from dittools.grid import TokenGrid
from dittools.methods.placing import sent

_PIECE = 1 << 23  # likeness scores held at a time


class Matching(NamedTuple):
    """Sources by how alike they are to a destination.

    Attributes:
        sources: int64 [n], token indices.
        destinations: int64 [m], token indices.
        ranked: int64 [B, n], positions in `sources`, the most alike first.
        target: int64 [B, n], position in `destinations` of each ranked source.
    """

    sources: torch.Tensor
    destinations: torch.Tensor
    ranked: torch.Tensor
    target: torch.Tensor

    def most(self, share: float) -> int:
        """Return how many sources are merged when a share of all tokens is wanted."""
        tokens = len(self.sources) + len(self.destinations)
        return min(len(self.sources), int(tokens * share))


def match(
    features: torch.Tensor, grid: TokenGrid, cell: tuple[int, int], seed: int | None
) -> Matching | None:
    """Return the matching of the tokens of a grid; None when a frame is smaller than a cell.

    Args:
        features: [B, grid.tokens, C], what likeness (the cosine) is measured on.
        grid: geometry; frames are cut into cells one by one, text does not take part.
        cell: (height, width) in tokens; left-over rows and columns are sources only.
        seed: of the choice within each cell; None takes each cell's first token.
    """
    split = _split(grid.shape, cell, seed)
    if split is None:
        return None
    sources, destinations = (sent(part, features.device) for part in split)
    wide = torch.promote_types(features.dtype, torch.float32)
    unit = torch.nn.functional.normalize(features.to(wide), dim=-1)
    ours, theirs = unit[:, sources], unit[:, destinations].transpose(1, 2)
    rows = max(1, _PIECE // max(1, len(features) * len(destinations)))
    found = [(piece @ theirs).max(-1) for piece in ours.split(rows, dim=1)]
    if not found:  # every token is a destination
        empty = sources.expand(len(features), 0)
        return Matching(sources, destinations, empty, empty)
    likeness = torch.cat([best.values for best in found], 1)
    nearest = torch.cat([best.indices for best in found], 1)
    ranked = likeness.argsort(dim=1, descending=True, stable=True)
    return Matching(sources, destinations, ranked, nearest.gather(1, ranked))


@lru_cache(maxsize=64)
def _split(
    shape: tuple[int, int, int], cell: tuple[int, int], seed: int | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return token indices of the sources and of the destinations, both in raster order."""
    frames, height, width = shape
    down, across = height // cell[0], width // cell[1]
    if down == 0 or across == 0:
        return None
    size = (frames, down, across)
    if seed is None:
        inside = torch.zeros(size, dtype=torch.int64)
    else:
        random = torch.Generator().manual_seed(seed)
        inside = torch.randint(cell[0] * cell[1], size, generator=random)
    y = torch.arange(down)[:, None] * cell[0] + inside // cell[1]
    x = torch.arange(across) * cell[1] + inside % cell[1]
    frame = torch.arange(frames)[:, None, None] * height * width
    is_source = torch.ones(frames * height * width, dtype=torch.bool)
    is_source[(frame + y * width + x).flatten()] = False
    return is_source.nonzero().flatten(), (~is_source).nonzero().flatten()


def merge(tokens: torch.Tensor, found: Matching, count: int) -> torch.Tensor:
    """Return [B, N - count, ...]: the sources that are left, then the destinations.

    The `count` most alike sources are averaged into their destinations, itself included.
    """
    shape = tokens.shape
    flat = tokens.flatten(2)
    ours = _take(flat[:, found.sources], found.ranked)
    target = found.target[:, :count]
    wide = torch.promote_types(flat.dtype, torch.float32)
    sums = flat[:, found.destinations].to(wide)
    sums = sums.scatter_add(1, _spread(target, flat.shape[2]), ours[:, :count].to(wide))
    counts = torch.ones(sums.shape[:2], dtype=wide, device=flat.device)
    counts = counts.scatter_add(1, target, torch.ones_like(target, dtype=wide))
    merged = (sums / counts[..., None]).to(flat.dtype)
    return torch.cat((ours[:, count:], merged), 1).view(shape[0], -1, *shape[2:])


def unmerge(tokens: torch.Tensor, found: Matching, count: int) -> torch.Tensor:
    """Return [B, N, ...]: every merged token gets what its destination has."""
    shape = tokens.shape
    flat = tokens.flatten(2)
    width, left = flat.shape[2], len(found.sources) - count
    theirs = flat[:, left:]
    out = flat.new_empty((shape[0], len(found.sources) + len(found.destinations), width))
    out[:, found.destinations] = theirs
    ours = torch.cat((_take(theirs, found.target[:, :count]), flat[:, :left]), 1)
    where = found.sources[found.ranked]
    out.scatter_(1, _spread(where, width), ours)
    return out.view(shape[0], -1, *shape[2:])


def _take(flat: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return flat.gather(1, _spread(index, flat.shape[2]))


def _spread(index: torch.Tensor, width: int) -> torch.Tensor:
    return index[..., None].expand(-1, -1, width)
