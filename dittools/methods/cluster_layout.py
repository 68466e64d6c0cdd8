"""Groups of queries and keys laid out in tiles, and the mask that runs them, pooled keys behind.

Every group takes whole tiles of its own; what a tile has too many is left out by a bias of -inf.
The mean keys of all groups follow the keys themselves, biased by the log of what they stand for;
the queries of a group see those of the groups they skip, by bit tiles.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.mask import BlockMask, pack_bits
from dittools.methods.block_sampling import gather_heads
from dittools.methods.kmeans import cluster_sums
from dittools.methods.svg2 import Layout, lay_out, tiles_of


class Groups(NamedTuple):
    """The groups of the grid's queries and keys in every head.

    Attributes:
        query_labels, key_labels: int64 [H, N].
        queries, keys: int64 [H, groups], tokens in each; some may be empty.
        query, key, value: float32 or float64 [H, groups, D], means, keys as the call weighs them.
        weight: float [H, key groups], what each weighs: the tokens of it, biases counted in.
    """

    query_labels: torch.Tensor
    key_labels: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    weight: torch.Tensor


class KeyTiles(NamedTuple):
    """All keys of a call, each group in tiles of its own, the text as the last group.

    Attributes:
        layout: where they stand.
        key, value: [H, slots, D].
        bias: float32 [H, slots], of the call; -inf in padding.
    """

    layout: Layout
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor


class Laid(NamedTuple):
    """A call and its mask in tiles.

    Attributes:
        call: of padded length, pooled keys behind its own if asked for.
        mask: of the tiles.
        slot: int64 [H, S], where the output of each token stands.
    """

    call: AttentionCall
    mask: BlockMask
    slot: torch.Tensor


def group_means(
    call: AttentionCall, labels: tuple[torch.Tensor, torch.Tensor], counts: tuple[int, int]
) -> Groups:
    """Return the groups of a call of batch 1 by the labels of its queries and its keys.

    Args:
        call: key_mask and key_bias weigh its keys.
        labels: int64 [H, N] each, of the grid's tokens.
        counts: groups of queries and of keys.
    """
    grid = call.grid
    video = slice(grid.text_before, grid.text_before + grid.tokens)
    wide = torch.promote_types(call.query.dtype, torch.float32)
    query, key, value = (
        x[0, video].transpose(0, 1).to(wide) for x in (call.query, call.key, call.value)
    )
    sums, queries = cluster_sums(query, labels[0], counts[0])
    query = sums / queries.clamp(min=1)[..., None]
    bias = call.additive_mask()
    if bias is None:
        sums, keys = cluster_sums(key, labels[1], counts[1])
        weight = keys.to(wide)
        values = cluster_sums(value, labels[1], counts[1])[0]
    else:
        each = bias[0, :, video].exp().to(wide).expand(len(key), -1)[..., None]
        key, value = (torch.where(each > 0, x * each, 0.0) for x in (key, value))
        sums, keys = cluster_sums(key, labels[1], counts[1])
        weight = cluster_sums(each.contiguous(), labels[1], counts[1])[0][..., 0]
        values = cluster_sums(value, labels[1], counts[1])[0]
    share = torch.where(weight > 0, weight, 1.0)[..., None]
    return Groups(*labels, queries, keys, query, sums / share, values / share, weight)


def tile_counts(groups: Groups, grid: TokenGrid, block_size: int, key_block: int) -> list[int]:
    """Return the most tiles that the queries and the keys of a head take, text included."""
    pairs = (groups.queries, block_size), (groups.keys, key_block)
    counts: list[int] = torch.stack(
        [tiles_of(F.pad(sizes, (0, 1), value=grid.text), size) for sizes, size in pairs]
    ).tolist()  # read at once
    return counts


def key_tiles(call: AttentionCall, groups: Groups, size: int, count: int = 0) -> KeyTiles:
    """Return the keys of a call of batch 1 in tiles of `size` slots, `count` if that is known."""
    layout = _tiles(groups.key_labels, groups.keys, call.grid, size, count)
    real = torch.arange(size, device=call.query.device) < layout.filled[..., None]
    bias = torch.zeros(layout.token.shape, device=call.query.device)
    own = call.additive_mask()
    if own is not None:
        bias = own[0].expand(call.head_count, -1).gather(1, layout.token)
    bias = bias.masked_fill(~real.flatten(1), float("-inf"))
    key, value = (gather_heads(x[0], layout.token) for x in (call.key, call.value))
    return KeyTiles(layout, key, value, bias)


def _tiles(
    labels: torch.Tensor, sizes: torch.Tensor, grid: TokenGrid, size: int, count: int
) -> Layout:
    text = F.pad(labels, (grid.text_before, grid.text_after), value=sizes.shape[1])
    return lay_out((text, F.pad(sizes, (0, 1), value=grid.text)), size, count)


def laid_out(
    call: AttentionCall,
    groups: Groups,
    tiles: KeyTiles,
    kept: torch.Tensor,
    block_size: int,
    pooled: bool,
    count: int = 0,
) -> Laid:
    """Return the call in tiles and its mask.

    Args:
        call: batch 1.
        groups: of its tokens.
        tiles: its keys.
        kept: bool [H, query groups, key groups], exact; text is so both ways.
        block_size: queries per tile.
        pooled: whether the groups that are not kept enter as their means.
        count: tiles of queries if that is known.
    """
    rows = _tiles(groups.query_labels, groups.queries, call.grid, block_size, count)
    query, (key, value, bias) = gather_heads(call.query[0], rows.token), tiles[1:]
    if pooled:
        key = torch.cat((key, groups.key.to(key.dtype)), dim=1)
        value = torch.cat((value, groups.value.to(value.dtype)), dim=1)
        bias = torch.cat((bias, groups.weight.log().to(bias.dtype)), dim=1)
    made = AttentionCall(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        TokenGrid(1, 1, rows.token.shape[1]),
        scale=call.scale,
        key_bias=bias[None],
        quantize=call.quantize,
    )
    skipped = ~kept & (groups.weight > 0)[:, None] if pooled else None
    mask = _mask(kept, skipped, rows, tiles.layout, _pairs(groups, kept, skipped, call.grid))
    return Laid(made, mask, rows.slot)


def _pairs(
    groups: Groups, kept: torch.Tensor, skipped: torch.Tensor | None, grid: TokenGrid
) -> torch.Tensor:
    """Return float64 [H]: pairs of queries with keys, pooled ones counted."""
    queries, keys = groups.queries.double(), groups.keys.double()
    each = (kept.double() @ keys[..., None])[..., 0]
    if skipped is not None:
        each = each + skipped.double().sum(2)
    return (each * queries).sum(1) + float(grid.total**2 - grid.tokens**2)


def _mask(
    kept: torch.Tensor,
    skipped: torch.Tensor | None,
    rows: Layout,
    columns: Layout,
    pairs: torch.Tensor,
) -> BlockMask:
    groups = kept.shape[2]
    seen = F.pad(F.pad(kept, (0, 1, 0, 1), value=True), (0, 1, 0, 1))  # text, then tiles of nothing
    wide = seen.gather(1, rows.group[..., None].expand(-1, -1, seen.shape[2]))
    keep = wide.gather(2, columns.group[:, None].expand(-1, wide.shape[1], -1))
    q_tokens, kv_tokens = rows.token.shape[1], columns.token.shape[1]
    if skipped is None:
        return BlockMask(
            keep, (rows.size, columns.size), q_tokens=q_tokens, kv_tokens=kv_tokens, pairs=pairs
        )
    size = columns.size
    behind = -(-groups // size)
    bits = F.pad(skipped, (0, behind * size - groups)).unflatten(2, (behind, size))
    real = (torch.arange(behind * size, device=kept.device) < groups).view(behind, size)
    some, cut = bits.any(-1), (bits != real).any(-1) & bits.any(-1)
    place = torch.where(cut, cut.flatten().cumsum(0, dtype=torch.int32).view(cut.shape) - 1, -1)
    index = F.pad(place, (0, 0, 0, 2), value=-1)  # the text sees no pooled keys
    some = F.pad(some, (0, 0, 0, 2))
    at = rows.group[..., None].expand(-1, -1, behind)
    index = F.pad(index.gather(1, at), (keep.shape[2], 0), value=-1).int()
    keep = torch.cat((keep, some.gather(1, at)), dim=2)
    tiles = pack_bits(bits[cut])[:, None].expand(-1, rows.size, -1).contiguous()
    whole = not len(tiles)
    return BlockMask(
        keep,
        (rows.size, size),
        tile_index=None if whole else index,
        tiles=None if whole else tiles,
        q_tokens=q_tokens,
        kv_tokens=kv_tokens + groups,
        pairs=pairs,
    )
