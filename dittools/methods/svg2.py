"""Sparse VideoGen, second version: tokens alike stand together, found by k-means in every head.

Source: arXiv:2505.18875 and svg-project/Sparse-VideoGen. Queries and keys are clustered apart; a
query cluster attends to the key clusters that hold a share of its attention as the centroids
estimate it, each weighed by its size. Centroids are kept from step to step, so later steps need two
rounds only. Every cluster is laid out in whole tiles of its own: pairs are those of the clusters,
exactly. Differences: shorter sequences get fewer clusters, so that a cluster holds about as many
tokens as in the published runs; batches work; centroids of the two guidance passes are told apart;
text queries are dense; dense steps do not cluster; where no centroids are known, most rounds look
at a part of the tokens. Baseline.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask, pack_bits
from dittools.methods.base import attend_exactly, attend_per_item, check_params, param
from dittools.methods.kmeans import Clusters, drawn_tokens, kmeans
from dittools.methods.placing import placed
from dittools.methods.selection import sums_before


@dataclass(frozen=True)
class SVG2:
    """Clusters of queries see the clusters of keys that matter to them."""

    name: ClassVar[str] = "svg2"
    mass: float = param(
        0.9, "the share of its estimated attention every query cluster keeps", above=0.0, most=1.0
    )
    q_clusters: int = param(300, "the most clusters of queries", least=1)
    k_clusters: int = param(1000, "the most clusters of keys", least=1)
    least_queries: int = param(250, "the least mean number of queries in a cluster", least=1)
    least_keys: int = param(75, "the least mean number of keys in a cluster", least=1)
    least_kept: float = param(
        0.1, "the share of key clusters every query cluster keeps at least", least=0.0, most=1.0
    )
    first_rounds: int = param(50, "the rounds of k-means where no centroids are known", least=1)
    first_sample: int = param(
        16, "the tokens per cluster those rounds look at, but for the last ones; 0 for all", least=0
    )
    rounds: int = param(2, "the rounds of k-means from the centroids of the last step", least=1)
    seed: int = param(0, "the start of the random numbers", least=0, most=2**40)
    block_size: int = param(64, "the queries per computed tile", least=8, most=512)
    key_block: int = param(32, "the keys per computed tile", least=8, most=512)

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_params(self)

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Extra keys belong to no cluster."""
        extra = call.key.shape[1] - call.grid.total
        return [f"svg2 has no cluster for {extra} extra keys"] if extra else []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query; the centroids stay in call.memory."""
        if self.mass >= 1:
            return backend.dense(call)
        return attend_per_item(call, lambda item: self._attend_item(item, backend))

    def _attend_item(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        queries, keys = self.clusters(call)
        kept = kept_clusters(queries, keys, call.softmax_scale, self.mass, self.least_kept)
        seen = kept | (queries.sizes == 0)[..., None] | (keys.sizes == 0)[:, None]
        sides = _with_text(queries, call.grid), _with_text(keys, call.grid)
        sizes = self.block_size, self.key_block
        counts = [tiles_of(side[1], size) for side, size in zip(sides, sizes, strict=True)]
        everything, *most = torch.stack((seen.all().long(), *counts)).tolist()  # read at once
        if everything:
            return backend.dense(call)
        rows, columns = (lay_out(*given) for given in zip(sides, sizes, most, strict=True))
        mask = tile_mask(torch.nn.functional.pad(kept, (0, 1, 0, 1), value=True), rows, columns)
        bias = call.additive_mask()
        if bias is not None:
            bias = bias.expand(1, call.head_count, -1).gather(2, columns.token[None])
        laid = AttentionCall(
            _take(call.query, rows),
            _take(call.key, columns),
            _take(call.value, columns),
            TokenGrid(1, 1, rows.token.shape[1]),
            scale=call.scale,
            key_bias=bias,
        )
        out = attend_exactly(laid, backend, mask)
        if out is None:
            return backend.dense(call)
        return _rows(out, rows.slot)

    def clusters(self, call: AttentionCall) -> tuple[Clusters, Clusters]:
        """Return the clusters of the grid's queries and keys of a call of batch 1.

        Starts from the centroids in call.memory and leaves the new ones there.
        """
        grid = call.grid
        video = slice(grid.text_before, grid.text_before + grid.tokens)
        found, kept = [], []
        wide = torch.promote_types(call.query.dtype, torch.float32)
        start = call.memory.get(self._key(call), (None, None))
        limits = (self.q_clusters, self.least_queries), (self.k_clusters, self.least_keys)
        for part, (most, least), known in zip((call.query, call.key), limits, start, strict=True):
            points = part[0, video].transpose(0, 1).to(wide)
            count = max(1, min(most, grid.tokens // least))
            rounds = self.rounds
            if known is None:
                known, rounds = self._first(call, points, count)
            start_at = known.to(wide)
            clusters = kmeans(points, start_at, rounds, of_all_heads=call.of_all_heads)
            found.append(clusters)
            kept.append(clusters.centroids.to(part.dtype))  # half the memory in half precision
        call.memory[self._key(call)] = tuple(kept)
        return found[0], found[1]

    def _first(
        self, call: AttentionCall, points: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, int]:
        """Return centroids to start from and the rounds that all tokens of [H, N, D] still need."""
        drawn = drawn_tokens(points, count, self.seed)
        sample, before = count * self.first_sample, self.first_rounds - self.rounds
        if before < 1 or not 0 < sample < points.shape[1]:
            return drawn, self.first_rounds
        some = drawn_tokens(points, sample, self.seed)
        found = kmeans(some, drawn, before, of_all_heads=call.of_all_heads)
        return found.centroids, self.rounds

    def _key(self, call: AttentionCall) -> str:
        shape = tuple(call.query.shape[1:])
        return f"svg2 {self} {call.grid} {shape} {call.query.dtype} {call.query.device}"


def kept_clusters(
    queries: Clusters, keys: Clusters, scale: float, mass: float, least: float
) -> torch.Tensor:
    """Return bool [H, query clusters, key clusters].

    Key clusters are taken from the heaviest on until they hold more than `mass`; the one that
    crosses it is kept, and so is the share `least` of all clusters.
    """
    scores = queries.centroids @ keys.centroids.transpose(1, 2) * scale
    weight = keys.sizes[:, None] * (scores - scores.amax(-1, keepdim=True)).exp()
    chance = weight / weight.sum(-1, keepdim=True).clamp(min=1e-12)
    ordered, index = chance.sort(dim=-1, descending=True, stable=True)
    wanted = sums_before(ordered) <= mass
    wanted[..., : int(least * keys.sizes.shape[1] + 1e-9)] = True
    wanted[..., 0] = True
    return torch.zeros_like(wanted).scatter_(-1, index, wanted)


class Layout(NamedTuple):
    """Where the tokens of every head stand: group after group, each in whole tiles.

    Attributes:
        token: int64 [H, slots], the token in each slot; 0 in padding slots.
        slot: int64 [H, S], the slot of each token.
        group: int64 [H, tiles], the group of each tile, the number of groups past the last.
        filled: int64 [H, tiles], tokens in each tile; they come first.
        size: slots per tile.
    """

    token: torch.Tensor
    slot: torch.Tensor
    group: torch.Tensor
    filled: torch.Tensor
    size: int


def tiles_of(sizes: torch.Tensor, size: int) -> torch.Tensor:
    """Return int64 []: the tiles of `size` slots that groups [H, groups] of a head take at most."""
    return (-(-sizes // size)).sum(1).max()


def lay_out(clusters: tuple[torch.Tensor, torch.Tensor], size: int, count: int = 0) -> Layout:
    """Return the layout of groups given as labels int64 [H, S] and sizes int64 [H, groups].

    `count` is their `tiles_of` where it is known, which spares a wait.
    """
    labels, sizes = clusters
    heads, tokens = labels.shape
    device = labels.device
    tiles = -(-sizes // size)
    last = tiles.cumsum(1)
    count = count or int(last[:, -1].max())
    order = labels.argsort(dim=1, stable=True)
    ordered = labels.gather(1, order)
    shift = (last - tiles) * size - (sizes.cumsum(1) - sizes)  # slots skipped before each group
    at = torch.arange(tokens, device=device) + shift.gather(1, ordered)
    slot = torch.empty_like(order).scatter_(1, order, at)
    token = order.new_zeros((heads, count * size)).scatter_(1, at, order)
    place = torch.arange(count, device=device).expand(heads, -1).contiguous()
    group = torch.searchsorted(last, place, right=True)
    inside = group.clamp(max=sizes.shape[1] - 1)
    filled = sizes.gather(1, inside) - (place - (last - tiles).gather(1, inside)) * size
    filled = filled.clamp(max=size) * (group < sizes.shape[1])
    return Layout(token, slot, group, filled, size)


def tile_mask(kept: torch.Tensor, rows: Layout, columns: Layout) -> BlockMask:
    """Return the mask over tiles of bool [H, row groups, column groups]; padding is cut out."""
    padded = torch.nn.functional.pad(kept, (0, 1, 0, 1))  # tiles past the last see nothing
    wide = padded.gather(1, rows.group[..., None].expand(-1, -1, padded.shape[2]))
    keep = wide.gather(2, columns.group[:, None].expand(-1, wide.shape[1], -1))
    down, across = rows.filled.int()[..., None], columns.filled.int()[:, None]
    cut = keep & ((down < rows.size) | (across < columns.size))
    index = torch.where(cut, (down - 1) * columns.size + across - 1, -1)
    return BlockMask(
        keep,
        (rows.size, columns.size),
        tile_index=index,
        tiles=placed(_corner_tiles(rows.size, columns.size), keep.device),
        q_tokens=rows.token.shape[1],
        kv_tokens=columns.token.shape[1],
    )


@lru_cache(maxsize=8)
def _corner_tiles(rows: int, columns: int) -> torch.Tensor:
    """Return bit tiles [rows * columns]: tile (r - 1) * columns + c - 1 keeps r rows, c columns."""
    down = torch.arange(rows) < torch.arange(1, rows + 1)[:, None]
    across = pack_bits(torch.arange(columns) < torch.arange(1, columns + 1)[:, None])
    tiles = down[:, None, :, None] * across[None, :, None]
    return tiles.reshape(rows * columns, rows, -1)


def _with_text(clusters: Clusters, grid: TokenGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels [H, total] and sizes [H, K + 1]: the text is one more group, the last."""
    count = clusters.sizes.shape[1]
    before_and_after = (grid.text_before, grid.text_after)
    labels = torch.nn.functional.pad(clusters.labels, before_and_after, value=count)
    return labels, torch.nn.functional.pad(clusters.sizes, (0, 1), value=grid.text)


def _take(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return [1, slots, H, D]: the tokens of [1, S, H, D] in each head's own slots."""
    return _rows(tensor, layout.token)


def _rows(tensor: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Return [1, n, H, D]: of every head of [1, S, H, D], the rows at int64 [H, n]."""
    heads, width = tensor.shape[2:]
    rows = tensor[0].reshape(-1, width)  # place * H + head
    head = torch.arange(heads, device=tensor.device)
    at = place.t() * heads + head
    return rows.index_select(0, at.flatten()).view(1, -1, heads, width)
