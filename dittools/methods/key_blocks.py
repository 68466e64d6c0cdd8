"""Attention of queries over the blocks of keys each of them chose, one by one, in one launch.

Queries are copied once per chosen block, so that those of one block stand together, and the parts
of a query are merged by log-sum-exp: exact per token whatever the tiles.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask

# elements of copied queries held at a time, on a CPU or elsewhere; what is freed below 32 MiB is
# used again by glibc, above it every page is mapped anew
_COPIES = {True: 7 * 2**20, False: 2**27}


class KeyBlocks:
    """The keys of one call laid out by block, every block padded to whole tiles, the text last."""

    def __init__(self, call: AttentionCall, block: torch.Tensor, tile: int) -> None:
        """Lay out the keys.

        Args:
            call: batch 1.
            block: int64 [grid.tokens] on the CPU, the block of every token of the grid.
            tile: tokens per computed tile.
        """
        self.call, self.tile = call, tile
        device = call.query.device
        self.first_row = call.grid.text_before
        self.counts, self.owner, token, slot, by_block = _stand(block, call.grid, tile, device)
        self.key, self.value = (x.index_select(1, token) for x in (call.key, call.value))
        bias = call.additive_mask()
        heads = 1 if bias is None else bias.shape[1]
        self.bias = torch.full((1, heads, len(token)), float("-inf"), device=device)
        self.bias[0, :, slot] = 0.0 if bias is None else bias[0][:, by_block].float()

    def attend(self, backend: Backend, member: torch.Tensor) -> torch.Tensor:
        """Return float [1, S, H, D] of the grid's queries over the groups each of them chose.

        As many heads at a time as there is room for, or a part of the queries of one.

        Args:
            backend: runs the launches.
            member: bool [H, groups, S], the queries that chose each group; each chose some.
        """
        (heads, _, tokens), width = member.shape, self.call.query.shape[3]
        room = max(1, _COPIES[member.device.type == "cpu"] // width)
        chosen = int(member.count_nonzero())
        copies = -(-chosen // heads)  # of a head
        some, pieces = max(1, room // copies), -(-copies // room)
        if some >= heads and pieces == 1:
            return self._attend_some(backend, member, 0, 0, chosen)[None]
        wide = torch.promote_types(self.call.query.dtype, torch.float32)
        out = torch.empty((1, tokens, heads, width), dtype=wide, device=member.device)
        part = -(-tokens // pieces)
        for head in range(0, heads, some):
            for token in range(0, tokens, part):
                of, queries = slice(head, head + some), slice(token, token + part)
                some_of = member[of, :, queries].contiguous()
                chosen = int(some_of.count_nonzero())
                out[0, queries, of] = self._attend_some(backend, some_of, head, token, chosen)
        return out

    def _attend_some(
        self,
        backend: Backend,
        member: torch.Tensor,
        first_head: int,
        first_token: int,
        count: int,
    ) -> torch.Tensor:
        """Return float [S, H, D] of the heads and queries that `member` is about.

        It holds `count` true entries.
        """
        (heads, groups, tokens), device, tile = member.shape, member.device, self.tile
        if device.type == "cuda":  # where the number is known nothing is waited for
            chosen = torch.nonzero_static(member.flatten(), size=count).flatten()
        else:
            chosen = member.flatten().nonzero().flatten()  # group after group
        edge = torch.arange(heads * groups + 1, device=device) * tokens
        first = torch.searchsorted(chosen, edge)
        sizes = first.diff()
        tiles = -(-sizes // tile).view(heads, groups)
        ends = tiles.cumsum(1)
        rank_of = member.cumsum(1, dtype=torch.uint8 if groups < 256 else torch.int16)
        q_tiles, most = torch.stack((ends[:, -1].max(), rank_of[:, -1].max().long())).tolist()

        def each(of_group: torch.Tensor, plus: torch.Tensor) -> torch.Tensor:
            return of_group.flatten().repeat_interleave(sizes, output_size=len(chosen)).add_(plus)

        head = torch.arange(heads, device=device)[:, None].expand(-1, groups)
        rank = torch.arange(len(chosen), device=device)
        slot = each((ends - tiles + head * q_tiles) * tile - first[:-1].view(heads, -1), rank)
        token = each(-edge[:-1], chosen)
        # rows are those of call.query, token after token
        offset = self.first_row + first_token
        many = self.call.query.shape[2]
        row = each(offset * many + first_head + head, token * many)
        source = row.new_zeros(heads * q_tiles * tile)  # a hole holds any row
        source.scatter_(0, slot, row)
        query = self.call.query.reshape(-1, self.call.query.shape[3]).index_select(0, source)
        query = query.view(1, heads, q_tiles * tile, -1).transpose(1, 2)
        place = torch.arange(q_tiles, device=device).expand(heads, -1).contiguous()
        of_tile = torch.searchsorted(ends, place, right=True)  # past the last tile: no group
        keep = of_tile[..., None] == self.owner
        pairs = (sizes.view(heads, groups) * self.counts).double().sum(1)
        out, lse = self._run(backend, query, keep, pairs, first_head)
        at = slot if heads == 1 else each(head - head * q_tiles * tile * heads, slot * heads)
        query_at = token if heads == 1 else each(head, token * heads)
        parts = _parts(rank_of, most, chosen, query_at, at)
        return _merge(out, lse, parts).view(tokens, heads, -1)

    def _run(
        self,
        backend: Backend,
        query: torch.Tensor,
        keep: torch.Tensor,
        pairs: torch.Tensor,
        first_head: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        some = slice(first_head, first_head + query.shape[2])
        call = AttentionCall(
            query,
            self.key[:, :, some],
            self.value[:, :, some],
            TokenGrid(1, 1, query.shape[1]),
            scale=self.call.scale,
            key_bias=self.bias if self.bias.shape[1] == 1 else self.bias[:, some],
        )
        q_len, k_len = query.shape[1], self.key.shape[1]
        mask = BlockMask(keep, self.tile, q_tokens=q_len, kv_tokens=k_len, pairs=pairs)
        return backend.block_sparse(call, mask, return_lse=True)


class _Stand(NamedTuple):
    """Where the keys of a grid stand in tiles; see `KeyBlocks`."""

    counts: torch.Tensor  # int64 [groups], keys of each
    owner: torch.Tensor  # int64 [tiles], the group of each
    token: torch.Tensor  # int64 [slots], 0 where there is none
    slot: torch.Tensor  # int64 [grid.total], of the tokens as in by_block
    by_block: torch.Tensor  # int64 [grid.total], group after group


@lru_cache(maxsize=16)
def _stand(block: torch.Tensor, grid: TokenGrid, tile: int, device: torch.device) -> _Stand:
    """Lay the keys out on the CPU and bring that to a device; the same for every call of a size."""
    blocks = int(block.max()) + 1
    group = torch.full((grid.total,), blocks)
    group[grid.text_before : grid.text_before + grid.tokens] = block
    groups = blocks + (grid.text > 0)
    counts = torch.bincount(group, minlength=groups)
    tiles = -(-counts // tile)
    start = (tiles.cumsum(0) - tiles) * tile
    by_block = group.argsort(stable=True)
    ordered = group[by_block]
    rank = torch.arange(grid.total) - (counts.cumsum(0) - counts)[ordered]
    owner = torch.arange(groups).repeat_interleave(tiles)
    slot = start[ordered] + rank
    token = slot.new_zeros(len(owner) * tile).scatter_(0, slot, by_block)
    return _Stand(*(t.to(device) for t in (counts, owner, token, slot, by_block)))


def _parts(
    rank: torch.Tensor, most: int, chosen: torch.Tensor, query: torch.Tensor, at: torch.Tensor
) -> torch.Tensor:
    """Return int64 [S * H, most]: the rows of each query's parts, -1 for none.

    Args:
        rank: [H, groups, S], the groups a query chose so far.
        most: the largest of them.
        chosen: int64 [n], the places of its true entries.
        query: int64 [n], token * H + head of each.
        at: int64 [n], the row of each.
    """
    heads, _, tokens = rank.shape
    parts = at.new_full((tokens * heads * most,), -1)
    parts.scatter_(0, query * most + (rank.flatten()[chosen] - 1), at)
    return parts.view(-1, most)


def _merge(out: torch.Tensor, lse: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """Return [n, D]: the parts of every query, weighed by what each holds of its softmax.

    Args:
        out: [1, slots, H, D].
        lse: log-sum-exp [1, slots, H].
        parts: int64 [n, most], the rows of each query's parts, slot * H + head; -1 for none.
    """
    wide = torch.promote_types(out.dtype, torch.float32)
    rows = parts.clamp(min=0)
    part = lse.reshape(-1).to(wide)[rows].masked_fill_(parts < 0, float("-inf"))
    merged: torch.Tensor = torch.nn.functional.embedding_bag(
        rows,
        out.reshape(-1, out.shape[3]).to(wide),
        per_sample_weights=torch.softmax(part, dim=1),
        mode="sum",
    )
    return merged
