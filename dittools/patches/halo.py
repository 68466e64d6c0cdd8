"""Halo exchange: a rank keeps its band of an image and fetches the rows around it, nothing else.

Instead of giving every rank all tokens of some heads, ranks stay with their own tokens and all
heads. Keys and values of the rows around a band, and all text, come from the ranks that have them.
Text attends to the whole image: every rank lets all of the text attend to its own tokens, and the
parts are merged by their log-sum-exps, which is exact. Heads need not divide by the ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import choose
from dittools.mask import BlockMask
from dittools.methods import Method
from dittools.methods.halo import Banded, Range, band_mask, band_refusal, band_scale, key_rows
from dittools.patches.refusals import finite_flag
from dittools.patches.runtime import Runtime, Tally
from dittools.patches.sites import SeamCall
from dittools.patches.split import Link, Split
from dittools.plans.plan import HeadRule

_TEXT_BLOCK = 128


@dataclass(frozen=True)
class Bands:
    """Which tokens of an image each rank has, and which rows each needs.

    Attributes:
        grid: of the whole image.
        text: lengths of the ranks' pieces of the text.
        own: image tokens of each rank, in raster order.
        rows: rows each rank needs, its own included.
    """

    grid: TokenGrid
    text: tuple[int, ...]
    own: tuple[Range, ...]
    rows: tuple[Range, ...]

    def needed(self, rank: int) -> Range:
        """Image tokens a rank needs."""
        first, behind = self.rows[rank]
        return first * self.grid.width, behind * self.grid.width

    def overlap(self, owner: int, rank: int) -> Range:
        """Image tokens of one rank that another needs; empty when the second is not the larger."""
        (start, end), (first, behind) = self.own[owner], self.needed(rank)
        return max(start, first), min(end, behind)


def halo_refusal(call: SeamCall, split: Split, rules: Sequence[HeadRule]) -> str:
    """Return why a call cannot run on bands, "" when it can; the same on every rank."""
    grid = split.grids[0]
    if len(split.grids) > 1:
        return "rows of the batch have texts of different length"
    if call.options.get("attn_mask") is not None:
        return "the call has an attention mask"
    if grid.text_before and grid.text_after:
        return "text stands on both sides of the image"
    if grid.tokens < split.ranks:
        return "there are more ranks than image tokens"
    found = (band_refusal(method, grid) for _, method in rules)
    return next((reason for reason in found if reason), "")


def find_bands(split: Split, methods: Sequence[Method]) -> Bands:
    """Return the bands of a call whose methods have no `band_refusal`."""
    grid = split.grids[0]
    text, own, rows, start = [], [], [], 0
    for rank in range(split.ranks):
        count = split.piece(grid.tokens, rank)
        own.append((start, start + count))
        text.append(split.piece(grid.text, rank))
        mine = (start // grid.width, -(-(start + count) // grid.width))
        seen = [key_rows(cast(Banded, method), grid, mine) for method in methods]
        rows.append((min(first for first, _ in seen), max(behind for _, behind in seen)))
        start += count
    return Bands(grid, tuple(text), tuple(own), tuple(rows))


def attend_halo(
    runtime: Runtime,
    call: SeamCall,
    bands: Bands,
    link: Link,
    rules: Sequence[HeadRule],
    tally: Tally,
) -> torch.Tensor | None:
    """Return [B, S_local, H, D]: attention of this rank's tokens, all heads.

    None on all ranks where one of them has inputs that are not finite.

    Args:
        runtime: backend and counts.
        call: this rank's tokens, without a `halo_refusal`.
        bands: of all ranks.
        link: the ranks.
        rules: which method runs which heads.
        tally: gets the counts.
    """
    tensors = (call.query, call.key, call.value)
    if runtime.check_finite and not link.agree(finite_flag(*tensors)):
        return None
    count, is_first = bands.text[link.rank], bool(bands.grid.text_before)
    sizes = [count, call.query.shape[1] - count]
    own = [t.split(sizes if is_first else sizes[::-1], 1) for t in tensors]
    told, seen = ([pair[at] for pair in own] for at in ((0, 1) if is_first else (1, 0)))
    words = link.gather_tokens(torch.cat(told), bands.text).chunk(3) if bands.grid.text else told
    near = exchange_rows(torch.cat(seen[1:]), bands, link).chunk(2)
    work = _Work(runtime, bands, link.rank, call.options.get("scale"))
    image = torch.empty_like(seen[0], memory_format=torch.contiguous_format)
    text = torch.empty(words[0].shape, dtype=torch.float32, device=image.device)
    lse = torch.empty(words[0].shape[:3], dtype=torch.float32, device=image.device)
    with runtime.sparse_calls.running(image.device):
        for heads, method in rules:
            at = torch.tensor(heads, device=image.device)

            def some(*parts: torch.Tensor, at: torch.Tensor = at) -> list[torch.Tensor]:
                return [part.index_select(2, at) for part in parts]

            one = cast(Banded, method)
            image.index_copy_(2, at, work.image(one, *some(seen[0], *words[1:], *near)))
            if bands.grid.text:
                found = work.text(one, *some(words[0], *told[1:], *seen[1:]))
                text.index_copy_(2, at, found[0].float())
                lse.index_copy_(2, at, found[1].float())
    work.note(rules, tally)
    if not bands.grid.text:
        return image
    merged = merge_text(text, lse, bands, link).to(image.dtype)
    return torch.cat((merged, image) if is_first else (image, merged), 1)


class _Work:
    """The attention of one rank's band."""

    def __init__(self, runtime: Runtime, bands: Bands, rank: int, scale: float | None) -> None:
        """Remember what all groups of heads share."""
        self.runtime, self.bands, self.rank, self.scale = runtime, bands, rank, scale
        self.used: set[str] = set()

    def image(
        self,
        method: Banded,
        query: torch.Tensor,
        told_key: torch.Tensor,
        told_value: torch.Tensor,
        near_key: torch.Tensor,
        near_value: torch.Tensor,
    ) -> torch.Tensor:
        """Return [B, own, H, D]: own image tokens attend to the rows around and to all text."""
        bands, rows = self.bands, self.bands.rows[self.rank]
        own, first = bands.own[self.rank], bands.needed(self.rank)[0]
        mask = band_mask(method, bands.grid, rows, own).to(query.device)
        pairs = ((told_key, near_key), (told_value, near_value))
        ahead = bool(bands.grid.text_before)
        key, value = (torch.cat(pair if ahead else pair[::-1], 1) for pair in pairs)
        start = bands.grid.text_before + own[0] - first
        whole = torch.zeros_like(key)  # rows around ask nothing; their blocks are left out
        whole[:, start : start + query.shape[1]] = query
        grid = TokenGrid(
            1, rows[1] - rows[0], bands.grid.width, bands.grid.text_before, bands.grid.text_after
        )
        out = self._run(method, AttentionCall(whole, key, value, grid), mask, lse=False)
        return cast(torch.Tensor, out)[:, start : start + query.shape[1]]

    def text(
        self,
        method: Banded,
        query: torch.Tensor,
        told_key: torch.Tensor,
        told_value: torch.Tensor,
        own_key: torch.Tensor,
        own_value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [B, text, H, D] and [B, text, H]: all text attends to this rank's tokens."""
        key, value = torch.cat((told_key, own_key), 1), torch.cat((told_value, own_value), 1)
        call = AttentionCall(query, key, value, TokenGrid(1, 1, query.shape[1]))
        mask = BlockMask.full(query.shape[1], key.shape[1], _TEXT_BLOCK).to(query.device)
        return cast(tuple[torch.Tensor, torch.Tensor], self._run(method, call, mask, lse=True))

    def _run(self, method: Banded, call: AttentionCall, mask: BlockMask, lse: bool) -> Any:
        call = band_scale(method, call, self.scale, self.bands.grid.total)
        backend = self.runtime.backend
        chosen = choose("auto", call, mask) if backend.name == "auto" else backend
        self.used.add(chosen.name)
        with self.runtime.backend_work.running(call.query.device):
            return chosen.block_sparse(call, mask, return_lse=lse)

    def note(self, rules: Sequence[HeadRule], tally: Tally) -> None:
        """Count the call, with the density of the whole image's masks."""
        heads = sum(len(members) for members, _ in rules)
        tally.sparse += 1
        for members, method in rules:
            mask = cast(Banded, method).mask(self.bands.grid)
            tally.sparse_density = tally.sparse_density + mask.density * len(members) / heads
        self.runtime.used |= self.used


def exchange_rows(own: torch.Tensor, bands: Bands, link: Link) -> torch.Tensor:
    """Return [B, needed, ...] of the [B, own, ...] each rank has; a collective call."""
    dist: Any = torch.distributed
    first, behind = bands.needed(link.rank)
    start = bands.own[link.rank][0]
    out = own.new_empty((own.shape[0], behind - first, *own.shape[2:]))
    asked, arriving = [], []
    for rank in range(link.ranks):
        low, high = bands.overlap(link.rank, rank)
        from_low, from_high = bands.overlap(rank, link.rank)
        if rank == link.rank:
            out[:, low - first : high - first] = own[:, low - start : high - start]
            continue
        peer = dist.get_global_rank(link.group, rank)
        if low < high:
            sent = own[:, low - start : high - start].contiguous()
            asked.append(dist.P2POp(dist.isend, sent, peer, link.group))
        if from_low < from_high:
            part = own.new_empty((own.shape[0], from_high - from_low, *own.shape[2:]))
            asked.append(dist.P2POp(dist.irecv, part, peer, link.group))
            arriving.append((from_low - first, part))
    for work in dist.batch_isend_irecv(asked) if asked else ():
        work.wait()
    for place, part in arriving:
        out[:, place : place + part.shape[1]] = part
    return out


def merge_text(text: torch.Tensor, lse: torch.Tensor, bands: Bands, link: Link) -> torch.Tensor:
    """Return [B, own text, H, D]: each rank's part of the text over the tokens of all ranks.

    Args:
        text: fp32 [B, text, H, D], all text over this rank's tokens.
        lse: fp32 [B, text, H], its log-sum-exp.
        bands: of all ranks.
        link: the ranks; a collective call.
    """
    dist: Any = torch.distributed
    both = torch.cat((text, lse[..., None]), -1)
    pieces = [piece.contiguous() for piece in both.split(list(bands.text), 1)]
    parts = [torch.empty_like(pieces[link.rank]) for _ in pieces]
    parts[link.rank] = pieces[link.rank]
    asked = []
    for rank, piece in enumerate(pieces):
        if rank == link.rank:
            continue
        peer = dist.get_global_rank(link.group, rank)
        if piece.numel():
            asked.append(dist.P2POp(dist.isend, piece, peer, link.group))
        if parts[rank].numel():
            asked.append(dist.P2POp(dist.irecv, parts[rank], peer, link.group))
    for work in dist.batch_isend_irecv(asked) if asked else ():
        work.wait()
    found = torch.stack(parts)
    weight = torch.softmax(found[..., -1:], 0)
    return (weight * found[..., :-1]).sum(0)
