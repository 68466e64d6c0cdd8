"""The ranks of a context-parallel group: what they tell each other, and who has which tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from dittools.errors import UnsupportedCall
from dittools.grid import TokenGrid
from dittools.patches.adapters import Layout
from dittools.patches.refusals import UNKNOWN_SPLIT


@dataclass(frozen=True, eq=False)
class Link:
    """The ranks of one context-parallel group, and what they tell each other.

    Attributes:
        group: its process group.
        rank, ranks: place in it and size of it.
    """

    group: Any
    rank: int
    ranks: int

    def agree(self, flag: torch.Tensor) -> bool:
        """Whether a bool holds on every rank; waits for the device."""
        found = flag.to(torch.int32).reshape(1)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN, self.group)
        return bool(found)

    def gather_tokens(self, tensor: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Return [B, sum(counts), ...] of the [B, counts[rank], ...] each rank has."""
        most = max(counts)
        padded = tensor.new_zeros((tensor.shape[0], most, *tensor.shape[2:]))
        padded[:, : tensor.shape[1]] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(parts, padded, self.group)
        return torch.cat([p[:, :count] for p, count in zip(parts, counts, strict=True)], 1)

    def gather_heads(self, tensor: torch.Tensor, owners: Sequence[int]) -> torch.Tensor:
        """Return [len(owners), ...] of the [own, ...] each rank has that owns one of these heads.

        Between those ranks alone, as the others run no such method.
        """
        dist: Any = torch.distributed
        mine = tensor.contiguous()
        parts = {
            rank: mine
            if rank == self.rank
            else mine.new_empty((owners.count(rank), *mine.shape[1:]))
            for rank in sorted(set(owners))
        }
        parts[self.rank] = mine
        asked = []
        for rank, part in parts.items():
            if rank != self.rank:
                peer = dist.get_global_rank(self.group, rank)
                asked.append(dist.P2POp(dist.isend, mine, peer, self.group))
                asked.append(dist.P2POp(dist.irecv, part, peer, self.group))
        for work in dist.batch_isend_irecv(asked) if asked else ():
            work.wait()
        by_rank = torch.cat(list(parts.values()))
        place = sorted(range(len(owners)), key=lambda head: (owners[head], head))
        return torch.empty_like(by_rank).index_copy_(
            0, torch.tensor(place, device=by_rank.device), by_rank
        )


@dataclass(frozen=True)
class Split:
    """How the tokens of a sequence are spread over ranks.

    Attributes:
        grids: geometry of the whole sequence: one for all rows, or one per row.
        streams: lengths of its parts, each of which is cut into as many pieces as there are ranks.
        ranks: how many.
    """

    grids: tuple[TokenGrid, ...]
    streams: tuple[int, ...]
    ranks: int

    def piece(self, tokens: int, rank: int) -> int:
        """Tokens of one rank out of one stream."""
        return piece(tokens, rank, self.ranks)

    def local(self, rank: int) -> int:
        """Tokens of one rank."""
        return sum(piece(stream, rank, self.ranks) for stream in self.streams)

    @property
    def is_in_order(self) -> bool:
        """Whether the pieces of all ranks, one after the other, are the sequence."""
        return sum(stream > 0 for stream in self.streams) < 2

    def true_order(self, tensor: torch.Tensor, axis: int = 1) -> torch.Tensor:
        """Return a tensor whose tokens stand rank after rank in the order of the sequence."""
        if self.is_in_order:
            return tensor
        return tensor.index_select(axis, _places(self, tensor.device)[0])

    def rank_order(self, tensor: torch.Tensor) -> torch.Tensor:
        """Undo `true_order` along axis 1."""
        if self.is_in_order:
            return tensor
        return tensor.index_select(1, _places(self, tensor.device)[1])


def piece(tokens: int, rank: int, ranks: int) -> int:
    """Return the length of a rank's piece of a stream; the first ranks take what is over."""
    return tokens // ranks + (rank < tokens % ranks)


@lru_cache(maxsize=32)
def _places(split: Split, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64 [S] twice: where each token of the sequence stands rank by rank, and back."""
    pieces, start = {}, 0
    for rank in range(split.ranks):
        for number, stream in enumerate(split.streams):
            length = piece(stream, rank, split.ranks)
            pieces[number, rank] = torch.arange(start, start + length)
            start += length
    found = torch.cat([pieces[key] for key in sorted(pieces)])
    return found.to(device), found.argsort().to(device)


def find_split(layout: Layout | None, path: str, tokens: int, link: Link) -> Split | None:
    """Return how a call's sequence is spread, None when no sequence of the site fits it.

    Args:
        layout: of the forward.
        path: of the site.
        tokens: of this rank's piece.
        link: the ranks.
    Raises:
        UnsupportedCall: one fits, but nobody wrote down how its text is split.
    """
    if layout is None:
        return None
    rows = layout.rows
    grids = next((g for pattern, g in layout.by_path if re.fullmatch(pattern, path)), layout.grids)
    for grid in (*grids, *rows[:1]):
        total = max(g.total for g in rows) if grid in rows else grid.total
        streams = layout.streams if sum(layout.streams) == total else (total,)
        split = Split(rows if grid in rows else (grid,), streams, link.ranks)
        if split.local(link.rank) == tokens:
            if grid.text and streams == (total,):
                raise UnsupportedCall(UNKNOWN_SPLIT)
            return split
    return None
