"""Attention of queries over the blocks of keys each of them chose, one by one, in one launch.

Queries are copied once per chosen block, so that those of one block stand together, and the parts
of a query are merged by log-sum-exp: exact per token whatever the tiles.
"""

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask


class KeyBlocks:
    """The keys of one call laid out by block, every block padded to whole tiles, the text last."""

    def __init__(self, call: AttentionCall, block: torch.Tensor, tile: int) -> None:
        """Lay out the keys.

        Args:
            call: batch 1.
            block: int64 [grid.tokens], the block of every token of the grid.
            tile: tokens per computed tile.
        """
        self.call, self.tile = call, tile
        grid, device = call.grid, call.query.device
        video = slice(grid.text_before, grid.text_before + grid.tokens)
        group = torch.full((grid.total,), int(block.max()) + 1, device=device)
        group[video] = block
        self.groups = int(block.max()) + 1 + (grid.text > 0)
        self.counts = counts = torch.bincount(group, minlength=self.groups)
        tiles = -(-counts // tile)
        start = (tiles.cumsum(0) - tiles) * tile
        by_block = group.argsort(stable=True)
        ordered = group[by_block]
        rank = torch.arange(grid.total, device=device) - (counts.cumsum(0) - counts)[ordered]
        self.owner = torch.arange(self.groups, device=device).repeat_interleave(tiles)
        slots = len(self.owner) * tile
        slot = start[ordered] + rank
        token = slot.new_full((slots,), 0).scatter_(0, slot, by_block)
        self.key, self.value = (x.index_select(1, token) for x in (call.key, call.value))
        bias = call.additive_mask()
        heads = 1 if bias is None else bias.shape[1]
        self.bias = torch.full((1, heads, slots), float("-inf"), device=device)
        self.bias[0, :, slot] = 0.0 if bias is None else bias[0][:, by_block].float()
        video_rows = call.query[0, video].transpose(0, 1)
        padded = torch.nn.functional.pad(video_rows, (0, 0, 0, 1))  # the last row is a hole
        self.rows = padded.reshape(-1, call.query.shape[3])

    def attend(self, backend: Backend, choice: torch.Tensor, first_head: int) -> torch.Tensor:
        """Return float [H, S, D] of the grid's queries over the groups each of them chose.

        Args:
            backend: runs the one launch.
            choice: int64 [H, S, most], groups without repeats; `groups` for none.
            first_head: head of the call that the first row of `choice` is.
        """
        heads, tokens, most = choice.shape
        tile, device = self.tile, choice.device
        chosen = choice.transpose(1, 2)  # [H, most, S]
        member = torch.zeros((heads, self.groups + 1, tokens), dtype=torch.uint8, device=device)
        member.scatter_(1, chosen, 1)
        rank = member.cumsum(2, dtype=torch.int32)  # place of each query within a group, from 1
        members = rank[:, : self.groups, -1].long()
        tiles = -(-members // tile)
        ends = tiles.cumsum(1)
        q_tiles = int(ends[:, -1].max())
        start = torch.nn.functional.pad((ends - tiles) * tile, (0, 1), value=q_tiles * tile)
        slot = start.gather(1, chosen.flatten(1)) + rank.gather(1, chosen).flatten(1) - 1
        slot.clamp_(max=q_tiles * tile)  # all that chose none share one slot, which is dropped
        token = torch.full((heads, q_tiles * tile + 1), tokens, device=device)
        token.scatter_(1, slot, torch.arange(tokens, device=device).repeat(most).expand(heads, -1))
        head = torch.arange(first_head, first_head + heads, device=device)[:, None]
        query = self.rows.index_select(0, (token[:, :-1] + head * (tokens + 1)).flatten())
        query = query.view(1, heads, q_tiles * tile, -1).transpose(1, 2)
        place = torch.arange(q_tiles, device=device).expand(heads, -1).contiguous()
        of_tile = torch.searchsorted(ends, place, right=True)  # past the last tile: no group
        keep = of_tile[..., None] == self.owner
        pairs = (members * self.counts).double().sum(1)
        out, lse = self._run(backend, query, keep, pairs, first_head)
        return _merge(out, lse, slot.view(heads, most, tokens))

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


def _merge(out: torch.Tensor, lse: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Return [H, S, D]: the parts of every query, weighed by what each holds of its softmax.

    Args:
        out: [1, slots, H, D].
        lse: log-sum-exp [1, slots, H].
        slot: int64 [H, most, S], the slots of each query's parts; `slots` for none.
    """
    heads, most, tokens = slot.shape
    slots, wide = out.shape[1], torch.promote_types(out.dtype, torch.float32)
    rows = slot.clamp(max=slots - 1) * heads
    rows += torch.arange(heads, device=slot.device)[:, None, None]
    part = lse.reshape(-1).to(wide)[rows].masked_fill_(slot >= slots, float("-inf"))
    weight = torch.softmax(part, dim=1).transpose(1, 2).reshape(-1, most)
    merged: torch.Tensor = torch.nn.functional.embedding_bag(
        rows.transpose(1, 2).reshape(-1, most),
        out.reshape(-1, out.shape[3]).to(wide),
        per_sample_weights=weight,
        mode="sum",
    )
    return merged.view(heads, tokens, -1)
