"""VMoBA: every query token picks a few key blocks by the product with each block's mean key.

Source: arXiv:2506.23858 and KwaiVGI/VMoBA. The shape of the blocks cycles over the layers: whole
frames, spatial tiles through all frames, boxes. Untrained models take the paper's local top-k; its
global threshold rule is for trained ones. Exact per token: a query is computed once per chosen
block, among the queries that chose it too, and its parts are merged by log-sum-exp. Differences:
grids that the blocks do not divide get shorter blocks at the end; nothing chosen beyond the own
block means the own block, not dense; where all scores are equal a threshold keeps everything; of
two blocks a local threshold keeps both, where ties in the released code can leave one; text keys
are always seen, text queries dense.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.methods.base import attend_masked, attend_per_item, bad_param, check_params, param
from dittools.methods.key_blocks import KeyBlocks
from dittools.methods.kmeans import sorted_sums
from dittools.methods.placing import label_counts, placed
from dittools.methods.selection import block_means, keep_top, row_mask, sums_before
from dittools.order import TokenOrder

_GATE_SCORES = 2**25
_CACHED_SCORES = 2**17  # those that a CPU holds at a time where queries choose alone
KINDS = ("temporal", "spatial", "box")
_PUBLISHED: dict[tuple[int, int, int], dict[str, tuple[int, int, int]]] = {
    (21, 30, 52): {"temporal": (3, 30, 52), "spatial": (21, 5, 13), "box": (7, 5, 13)},
    (21, 45, 80): {"temporal": (3, 45, 80), "spatial": (21, 9, 10), "box": (7, 15, 20)},
    (24, 36, 64): {"temporal": (3, 36, 64), "spatial": (24, 6, 8), "box": (8, 12, 8)},
    (36, 30, 52): {"temporal": (3, 30, 52), "spatial": (36, 5, 13), "box": (12, 10, 13)},
}
_LEAST_TOKENS = 32  # per block, where the sizes are picked
_GOALS: dict[str, tuple[int, ...]] = {
    "temporal": (8, 1, 1),
    "spatial": (1, 5, 5),
    "box": (3, 4, 4),
}  # blocks per axis


@dataclass(frozen=True)
class VMoBA:
    """Each query token attends to its own block and the blocks that suit it best."""

    name: ClassVar[str] = "vmoba"
    top_k: int | float = param(
        0.25, "the blocks per query, the own one counted; below 1 a share of the blocks"
    )
    rule: str = param(
        "local_top_k",
        "whether queries choose alone (local) or compete within a head (global), by count or score",
        choices=("local_top_k", "global_top_k", "local_threshold", "global_threshold"),
    )
    threshold: float = param(
        0.25, "the share of the scores to collect, for the threshold rules", least=0.0, most=1.0
    )
    temporal: int = param(0, "the frames of a temporal block; 0 makes about 8 blocks", least=0)
    spatial: tuple[int, ...] = param(
        (), "the height and width of a spatial block; empty picks them"
    )
    box: tuple[int, ...] = param((), "the frames, height and width of a box; empty picks them")
    pooled: bool = param(
        False, "whether the queries of one tile choose together, which is coarser and faster"
    )
    block_size: int = param(64, "the tokens per computed tile", least=8, most=1024)

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_params(self)
        k = self.top_k
        is_share = isinstance(k, float) and 0 < k <= 1
        if not is_share and (isinstance(k, (bool, float)) or not isinstance(k, int) or k < 1):
            raise bad_param(self, "top_k", expected="blocks of at least 1, or a share up to 1.0")
        for name, length in (("spatial", 2), ("box", 3)):
            sides = getattr(self, name)
            if sides and (len(sides) != length or not all(type(s) is int and s > 0 for s in sides)):
                raise bad_param(self, name, expected=f"{length} whole numbers of at least 1")

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Extra keys belong to no block."""
        extra = call.key.shape[1] - call.grid.total
        return [f"vmoba has no block for {extra} extra keys"] if extra else []

    def partition(self, grid: TokenGrid, layer: int) -> torch.Tensor:
        """Return int64 [grid.tokens]: the block of every grid token on this layer."""
        return partition(grid, block_sides(grid, self, KINDS[layer % 3]))

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query."""
        block = self.partition(call.grid, call.layer)
        count = int(block.max()) + 1
        share = isinstance(self.top_k, float)
        k = max(1, round(self.top_k * count)) if share else int(self.top_k)
        everything = "top_k" in self.rule and k >= count
        if count == 1 or everything or ("threshold" in self.rule and self.threshold >= 1):
            return backend.dense(call)
        run = _attend_tiles if self.pooled else _attend_tokens
        return attend_per_item(call, lambda item: run(item, backend, self, block, k))


def block_sides(grid: TokenGrid, method: VMoBA, kind: str) -> tuple[int, int, int]:
    """Return the block (frames, height, width) of one kind: given, or near the published counts.

    Sides that divide the axis are preferred, as the published ones do.
    """
    given = {
        "temporal": (method.temporal, grid.height, grid.width) if method.temporal else (),
        "spatial": (grid.frames, *method.spatial) if method.spatial else (),
        "box": method.box,
    }[kind]
    given = given or _PUBLISHED.get(grid.shape, {}).get(kind, ())
    if given:
        f, h, w = (min(side, length) for side, length in zip(given, grid.shape, strict=True))
        return f, h, w
    goals = _GOALS[kind]
    while grid.tokens < _LEAST_TOKENS * math.prod(goals) and max(goals) > 1:
        goals = tuple(max(goal - 1, 1) for goal in goals)  # small grids get fewer blocks
    sides = []
    for length, goal in zip(grid.shape, goals, strict=True):
        fits = [
            s for s in range(1, length + 1) if length % s == 0 and goal <= length / s < 2 * goal
        ]
        sides.append(max(fits) if fits else -(-length // goal))
    return sides[0], sides[1], sides[2]


@lru_cache(maxsize=64)
def partition(grid: TokenGrid, sides: tuple[int, int, int]) -> torch.Tensor:
    """Return int64 [grid.tokens]: block ids in raster order of the blocks, ragged at the end."""
    place = torch.arange(grid.tokens)
    frame, rest = place // grid.tokens_per_frame, place % grid.tokens_per_frame
    down, across = (-(-n // s) for n, s in zip(grid.shape[1:], sides[1:], strict=True))
    row = (frame // sides[0]) * down + rest // grid.width // sides[1]
    return row * across + rest % grid.width // sides[2]


def block_keys(key: torch.Tensor, block: torch.Tensor, count: int = 0) -> torch.Tensor:
    """Return float32 [H, D, blocks]: the mean key of every block of [S, H, D], S in blocks [S].

    `count` is their number, 0 looks it up.
    """
    count = count or int(block.max()) + 1
    sizes, rows = label_counts(block, count), key.float().flatten(1)
    if key.device.type == "cpu":
        sums = rows.new_zeros((count, rows.shape[1])).index_add_(0, block, rows)
    else:
        sums = sorted_sums(rows, block, sizes)
    return (sums / sizes[:, None]).view(count, *key.shape[1:]).permute(1, 2, 0)


def select(
    scores: torch.Tensor, own: torch.Tensor, rule: str, top_k: int, threshold: float
) -> torch.Tensor:
    """Return bool [H, S, blocks]: the blocks every query keeps, its own among them.

    Args:
        scores: float [H, S, blocks].
        own: int64 [S], the block each query lies in.
        rule: one of VMoBA's rules.
        top_k: blocks per query, the own one counted; a global rule keeps top_k * S per head.
        threshold: share of the min-max normalised scores to collect, own blocks first. The block
            that reaches it is kept, and at least one is.
    """
    heads, tokens, blocks = scores.shape
    is_own = torch.nn.functional.one_hot(own, scores.shape[2]).bool().expand_as(scores)
    flat, mine = scores, is_own
    if rule.startswith("global"):
        flat, mine = (x.transpose(1, 2).reshape(heads, 1, -1) for x in (scores, is_own))
        top_k *= tokens
    if rule.endswith("top_k"):
        kept = keep_top(flat.masked_fill(mine, float("inf")), top_k)
        return _per_query(kept, blocks, tokens) if rule.startswith("global") else kept
    low = flat.amin(-1, keepdim=True)
    span = flat.amax(-1, keepdim=True) - low
    norm = (flat - low) / torch.where(span <= 1e-6, torch.ones_like(span), span)
    total = norm.sum(-1, keepdim=True) + 1e-6
    need = (threshold - (norm * mine).sum(-1, keepdim=True) / total).clamp(min=0)
    order = norm.masked_fill(mine, -1).argsort(dim=-1, descending=True, stable=True)
    others = (norm * ~mine).gather(-1, order)
    before = sums_before(others) / total
    wanted = before < need
    wanted[..., 0] = True
    kept = torch.zeros_like(mine).scatter(-1, order, wanted) | mine
    return _per_query(kept, blocks, tokens) if rule.startswith("global") else kept


def _per_query(kept: torch.Tensor, blocks: int, tokens: int) -> torch.Tensor:
    """Bring a global choice [H, 1, blocks * S], ties to the first block, back to [H, S, blocks]."""
    return kept.view(-1, blocks, tokens).transpose(1, 2)


def _video(grid: TokenGrid) -> slice:
    return slice(grid.text_before, grid.text_before + grid.tokens)


def members(
    query: torch.Tensor, means: torch.Tensor, own: torch.Tensor, method: VMoBA, top_k: int
) -> torch.Tensor:
    """Return bool [H, blocks, S]: the queries that keep each block.

    Args:
        query: [S, H, D].
        means: float32 [H, D, blocks].
        own: int64 [S], the block each query lies in.
        method: the rule and its threshold.
        top_k: blocks per query, the own one counted.
    """
    tokens, heads, _ = query.shape
    count = means.shape[2]
    found = torch.empty((heads, count, tokens), dtype=torch.bool, device=query.device)
    on_cpu = query.device.type == "cpu"
    if method.rule == "local_top_k":  # queries choose alone: a few at a time
        chunk = max(1, (_CACHED_SCORES if on_cpu else _GATE_SCORES) // (heads * count))
        for first in range(0, tokens, chunk):
            part = slice(first, first + chunk)
            scores = query[part].transpose(0, 1).float() @ means
            mine = own[None, part, None].expand(heads, -1, 1)
            scores.scatter_(-1, mine, float("inf"))
            found[:, :, part] = keep_top(scores, top_k).transpose(1, 2)
        return found
    chunk = max(1, _GATE_SCORES // (tokens * count))
    for first in range(0, heads, chunk):
        some = slice(first, first + chunk)
        scores = query[:, some].transpose(0, 1).float() @ means[some]
        kept = select(scores, own, method.rule, top_k, method.threshold)
        found[some] = kept.transpose(1, 2)
    return found


def _attend_tokens(
    call: AttentionCall, backend: Backend, method: VMoBA, block: torch.Tensor, top_k: int
) -> torch.Tensor:
    """Run every query once per block it chose, and merge the parts."""
    on = placed(block, call.query.device)
    video = _video(call.grid)
    means = block_keys(call.key[0, video], on, int(block.max()) + 1)
    kept = members(call.query[0, video], means, on, method, top_k)
    if call.grid.text:  # one more block, which every query sees
        kept = torch.nn.functional.pad(kept, (0, 0, 0, 1), value=True)
    merged = KeyBlocks(call, block, method.block_size).attend(backend, kept)
    return _with_text_rows(call, backend, merged.to(call.query.dtype))


def _with_text_rows(call: AttentionCall, backend: Backend, video: torch.Tensor) -> torch.Tensor:
    """Put dense text rows around [1, grid.tokens, H, D]."""
    grid = call.grid
    if not grid.text:
        return video
    rows = torch.cat(
        (call.query[:, : grid.text_before], call.query[:, grid.text_before + grid.tokens :]), dim=1
    )
    text = backend.dense(replace(call, query=rows, grid=TokenGrid(1, 1, grid.text)))
    return torch.cat((text[:, : grid.text_before], video, text[:, grid.text_before :]), dim=1)


def _attend_tiles(
    call: AttentionCall, backend: Backend, method: VMoBA, block: torch.Tensor, top_k: int
) -> torch.Tensor:
    """Run the pooled variant: tiles of tokens in block order choose together, as one block mask.

    The mean query of a tile stands for its tokens; a key tile is computed when it holds a token of
    a chosen block.
    """
    grid, tile, device = call.grid, method.block_size, call.query.device
    order, count = _block_order(grid, block, device), int(block.max()) + 1
    query, key = order.apply(call.query), order.apply(call.key)
    block = placed(block, device).sort().values
    means = block_keys(key[0, : grid.tokens], block, count)
    pooled = block_means(query[:, : grid.tokens], tile)[0]  # [H, tiles, D]
    tiles = pooled.shape[1]
    own = block[(torch.arange(tiles, device=device) * tile + tile // 2).clamp(max=grid.tokens - 1)]
    kept = select(pooled @ means, own, method.rule, top_k, method.threshold)
    holds = torch.zeros((means.shape[2], tiles), device=device)
    holds[block, torch.arange(grid.tokens, device=device) // tile] = 1
    blocks = grid.blocks(tile)
    keep = torch.zeros((call.head_count, blocks, blocks), dtype=torch.bool, device=device)
    keep[:, :tiles, :tiles] = kept.float() @ holds > 0
    return attend_masked(call, backend, row_mask(keep, _text_behind(grid), tile, order))


def _text_behind(grid: TokenGrid) -> TokenGrid:
    return replace(grid, text_before=0, text_after=grid.text)


@lru_cache(maxsize=16)
def _block_order(grid: TokenGrid, block: torch.Tensor, device: torch.device) -> TokenOrder:
    """Return the order block by block, then text, on a device."""
    token = torch.arange(grid.total)
    video = _video(grid)
    index = torch.cat(
        (token[video][block.argsort(stable=True)], token[: video.start], token[video.stop :])
    )
    return TokenOrder(index[None], grid.total).to(device)
