"""Pyramid sparse attention: important key blocks in full, less important ones pooled by 2, 4 or 8.

Source: arXiv:2512.04025 and ziplab/Pyramid-Sparse-Attention. A pooled key gets the bias ln(tokens
it stands for), which makes it weigh as that many tokens. Pooled keys are extra keys of the call,
and one ordinary launch runs all levels. Levels are assigned as
in the authors' code; differences: the importance is sampled at fixed offsets instead of random
ones, one block at least is full, ragged ends are pooled and compared with true counts, and text
keys are full and text queries dense.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dittools.call import AttentionCall
from dittools.kernels import Backend
from dittools.methods.base import attend_per_item, bad_param, check_params, halvings, param
from dittools.methods.curves import placed_order
from dittools.methods.pyramid import FACTORS, attend_levels
from dittools.order import TokenOrder

# sampled scores held at a time, on a CPU or elsewhere; in a cache they are read back for free
_CHUNK = {True: 2**18, False: 2**20}
_ROWS = 128  # sampled queries that make a product efficient
_SLACK = 1e-6  # of the importance, by which the authors' code lets a block pass an end


@dataclass(frozen=True)
class PSA:
    """Every key block at full resolution, pooled by 2, 4 or 8, or not at all."""

    name: ClassVar[str] = "psa"
    rule: str = param(
        "threshold",
        "whether levels end at shares of the importance or of the blocks",
        choices=("threshold", "topk"),
    )
    ends: tuple[float, ...] = param(
        (0.5, 0.6, 0.7, 0.8), "where the levels 1, 1/2, 1/4 and 1/8 end, never falling"
    )
    block_size: int = param(128, "the tokens per query block", least=16, most=1024)
    key_block: int = param(
        0, "the tokens per key block, a divisor of block_size; 0 takes block_size", least=0
    )
    sample: int = param(4, "every how many tokens of a block are looked at", least=1)
    similarity: tuple[float, ...] = param(
        (), "the cosines that neighbouring keys need for pooling by 2, 4 and 8; empty does not ask"
    )
    curve: str = param("gilbert", "the order blocks are cut from", choices=("gilbert", "raster"))
    tile: int = param(32, "the hardware tile level sizes are rounded to", least=1)

    def __post_init__(self) -> None:
        """Check the level ends."""
        check_params(self)
        shares = all(isinstance(e, (int, float)) and 0 <= e <= 1 for e in self.ends)
        if len(self.ends) != 4 or not shares or list(self.ends) != sorted(self.ends):
            raise bad_param(self, "ends", expected="four shares from 0 to 1, never falling")
        if self.similarity and len(self.similarity) != 3:
            raise bad_param(self, "similarity", expected="three cosines, or none")
        if self.block_size % 8:
            raise bad_param(self, "block_size", expected="a multiple of 8")
        key = self.key_block or self.block_size
        if key % 8 or key < 16 or self.block_size % key:
            raise bad_param(
                self,
                "key_block",
                expected=f"a multiple of 8 from 16 that divides {self.block_size}",
            )

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Extra keys belong to no block."""
        extra = call.key.shape[1] - call.grid.total
        return [f"psa has no block for {extra} extra keys"] if extra else []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query."""
        return attend_per_item(call, lambda item: self._attend_item(item, backend))

    def _attend_item(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        order = placed_order(call.grid, self.block_size, self.curve, call.query.device)
        levels = self.levels(call, order)
        if bool((levels == 1).all()):
            return backend.dense(call)
        return attend_levels(
            call, backend, levels, order, self.block_size, key_block=self.key_block
        )

    def levels(self, call: AttentionCall, order: TokenOrder) -> torch.Tensor:
        """Return int64 [H, query blocks, key blocks]: each pair's pooling factor, 0 to skip."""
        grid, size, keys = call.grid, self.block_size, self.key_block or self.block_size
        importance = block_importance(
            call.query, call.key, grid.tokens, size, self.sample, call.softmax_scale, order, keys
        )
        found = assign_levels(importance, self.rule, self.ends, keys, self.tile)
        if self.similarity:
            cap = similarity_cap(order.apply(call.key), grid.tokens, keys, self.similarity)
            found = torch.minimum(found, cap[:, None])
        return found


@torch.no_grad()
def block_importance(
    query: torch.Tensor,
    key: torch.Tensor,
    tokens: int,
    size: int,
    sample: int,
    scale: float,
    order: TokenOrder | None = None,
    key_block: int = 0,
) -> torch.Tensor:
    """Return float32 [H, query blocks, key blocks], rows sum to 1: each pair's largest score.

    Scores are sampled and enter as exp(score - largest score of the query), the authors' choice.
    Products are taken in the dtype of the call.

    Args:
        query: [1, S, H, D].
        key: [1, S, H, D].
        tokens: grid tokens, which fill the first slots.
        size: tokens per query block.
        sample: every how many tokens are looked at.
        scale: factor on the scores, above 0.
        order: slots the blocks are cut from, one for all heads; None takes the tokens as they are.
        key_block: tokens per key block; 0 takes size.
    """
    heads = query.shape[2]
    asked, seen = (
        _sampled(tokens, edge, sample, order, query.device) for edge in (size, key_block or size)
    )
    (blocks, each), (columns, several) = asked.shape, seen.shape
    before, after = halvings(scale)
    rows = (query[0, asked.flatten()] * before).transpose(0, 1).contiguous()
    # keys stand sample after sample, so that a maximum over one block's goes along whole rows
    keys = key[0, seen.t().flatten()].permute(1, 2, 0).contiguous()
    out = torch.empty((heads, blocks, columns), device=query.device)
    room = _CHUNK[query.device.type == "cpu"] // columns
    step = max(1, _ROWS // each)  # query blocks at a time, of `some` heads against `part` samples
    part = min(several, max(1, room // (step * each)))
    some = min(heads, max(1, room // (step * each * part)))
    step = max(step, room // (some * part * each))
    for head in range(0, heads, some):
        of = slice(head, head + some)
        for first in range(0, blocks, step):
            asking = rows[of, first * each : (first + step) * each]
            best = _best(asking, keys[of], columns, part).to(out.dtype)
            best -= best.amax(-1, keepdim=True)
            out[of, first : first + step] = best.unflatten(1, (-1, each)).amax(2)
    out = (out * after).exp_()  # a maximum of exponentials is that of the largest score
    return out / out.sum(-1, keepdim=True)


def _best(rows: torch.Tensor, keys: torch.Tensor, columns: int, part: int) -> torch.Tensor:
    """Return [H, n, columns]: the largest score of rows [H, n, D] in each of the key blocks.

    Args:
        rows: [H, n, D].
        keys: [H, D, samples * columns].
        columns: key blocks.
        part: samples of a block at a time.
    """
    best = rows.new_full((*rows.shape[:2], columns), float("-inf"))
    room = rows.new_empty(best.numel() * part)
    for some in keys.split(part * columns, dim=2):
        samples = some.shape[2] // columns
        held = room[: best.numel() * samples].view(*rows.shape[:2], samples * columns)
        torch.bmm(rows, some, out=held)
        torch.maximum(best, held.unflatten(2, (samples, columns)).amax(2), out=best)
    return best


def _sampled(
    tokens: int, size: int, sample: int, order: TokenOrder | None, device: torch.device
) -> torch.Tensor:
    """Return int64 [blocks, samples]: the tokens of every block that are looked at."""
    slot = torch.arange(0, tokens, size, device=device)[:, None]
    slot = slot + torch.arange(0, size, sample, device=device)
    slot = torch.where(slot < tokens, slot, slot[:, :1])  # a repeat changes no maximum
    return slot if order is None else order.index[0, slot]


def assign_levels(
    importance: torch.Tensor, rule: str, ends: tuple[float, ...], size: int, tile: int = 32
) -> torch.Tensor:
    """Return int64 like importance [..., blocks]: pooling factors, 0 for blocks left out.

    Blocks are taken from the most important on. By threshold, the block that crosses an end still
    belongs to its level, and a level no block ends in stays empty; by topk, ends are shares of the
    blocks. The full level holds at least 6 % of the blocks plus one (one block by topk). Pooled
    levels are rounded up to whole tiles, or down where the blocks run out, as in the authors' code;
    a level that ends at 1 leaves no block out.

    Args:
        importance: non-negative.
        rule: "threshold" or "topk".
        ends: ends of levels 1, 1/2, 1/4, 1/8.
        size: tokens per key block.
        tile: tokens per tile.
    """
    blocks = importance.shape[-1]
    value, order = importance.sort(dim=-1, descending=True, stable=True)
    reached = value.double().cumsum(-1)
    rank = torch.arange(blocks, device=importance.device)
    ranked = torch.zeros_like(order)
    start = torch.zeros((*importance.shape[:-1], 1), dtype=torch.long, device=importance.device)
    for factor, end in zip(FACTORS, ends, strict=True):
        if rule == "topk":
            stop = torch.full_like(start, int(blocks * end))
            least = 1
        else:
            within = (reached <= (end + _SLACK) * reached[..., -1:]).sum(-1, keepdim=True)
            stop = torch.where(within > 0, within + 1, 0)
            least = int(0.06 * blocks) + 1
        if factor == 1:
            stop = stop.clamp(min=least)
        multiple = -(-factor // max(size // tile, 1))
        count = (stop - start).clamp(min=0)
        stop = (start + -(-count // multiple) * multiple).clamp(max=blocks)
        if end < 1:
            stop = torch.minimum(stop, start + (blocks - start) // multiple * multiple)
        ranked = torch.where((rank >= start) & (rank < stop), factor, ranked)
        start = torch.maximum(start, stop)
    return torch.zeros_like(ranked).scatter_(-1, order, ranked)


def similarity_cap(
    key: torch.Tensor, tokens: int, size: int, thresholds: tuple[float, ...]
) -> torch.Tensor:
    """Return int64 [H, blocks]: the coarsest pooling whose first and last keys are alike enough.

    Args:
        key: [1, slots, H, D] in slot order.
        tokens: grid tokens, which fill the first slots; groups past them do not count.
        size: slots per block.
        thresholds: least mean cosines for pooling by 2, 4 and 8.
    """
    blocks = -(-tokens // size)
    slot = torch.arange(blocks * size, device=key.device)
    unit = torch.nn.functional.normalize(key[0].float(), dim=-1)
    cut = unit.index_select(0, slot.clamp(max=tokens - 1)).unflatten(0, (blocks, size))
    real = (slot < tokens).view(blocks, size)
    cap = torch.ones((key.shape[2], blocks), dtype=torch.long, device=key.device)
    for factor, least in zip(FACTORS[1:], thresholds, strict=True):
        group = cut.unflatten(1, (size // factor, factor))
        counts = real[:, ::factor]  # groups that hold a token
        alike = (group[:, :, 0] * group[:, :, -1]).sum(-1) * counts[..., None]
        alike = (alike.sum(1) / counts.sum(1, keepdim=True)).t()  # [H, blocks]
        cap = torch.where(alike > least, factor, cap)
    return cap
