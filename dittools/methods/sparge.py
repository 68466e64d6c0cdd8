"""SpargeAttn's block selection: pooled scores decide, unless a block's tokens are too unlike.

Source: arXiv:2502.18137 and thu-ml/SpargeAttn. Query blocks of 128 and key blocks of 64 are pooled
by their means; a key block whose tokens are unlike is always kept and left out of the ranking, a
query block whose tokens are unlike keeps its whole row. The second stage, off by default, leaves
out what lies far below the running maximum. The authors' kernel finds that as it goes; here plain
torch finds it beforehand at the price of the scores, to study its effect, not for speed.
Differences: the second stage looks at every tile (their kernel spares the last two), text queries
are dense, a ragged last block is compared by the tokens it has (in their kernel 0 / 0 makes it
unlike, hence kept), and products stay in the dtype of the call (theirs are INT8 and FP8). The paper
compares the tokens of a block as they are; the authors' entry points take the mean key off all keys
first, which pooled scores do not notice but likeness does: `centred` does so too. Baseline.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from dittools.call import AttentionCall
from dittools.kernels import Backend
from dittools.kernels.common import to_slots
from dittools.mask import BlockMask
from dittools.methods.base import attend_masked, attend_per_item, check_params, param
from dittools.methods.curves import placed_order
from dittools.methods.selection import keep_top, mass_counts, slot_means
from dittools.order import TokenOrder

_QUERIES = 32  # that one warp of the authors' kernel works on
_SCORES = 2**22  # held at a time


@dataclass(frozen=True)
class Sparge:
    """Key blocks by pooled score, blocks of unlike tokens kept whole."""

    name: ClassVar[str] = "sparge"
    density: float = param(0.5, "the share of key blocks every row keeps", above=0.0, most=1.0)
    mass: float = param(
        0.0,
        "the pooled probability to stay within instead of a density; 0 for none",
        least=0.0,
        most=1.0,
    )
    similarity: float = param(
        -0.1, "the mean cosine up to which a block counts as unlike", least=-1.0, most=1.0
    )
    centred: bool = param(
        False, "whether keys are compared without their mean, as the authors' kernels do"
    )
    skip: float = param(
        0.0,
        "the powers of two below their running maxima at which scores are left out, a key block "
        "for 32 queries at a time; 50 in the authors' kernel, 0 for never",
        least=0.0,
    )
    block_size: int = param(
        128, "the tokens per query block, twice those per key block", least=8, most=1024
    )
    curve: str = param("gilbert", "the order blocks are cut from", choices=("gilbert", "raster"))

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_params(self)

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Extra keys belong to no block."""
        extra = call.key.shape[1] - call.grid.total
        reasons = [f"sparge has no block for {extra} extra keys"] if extra else []
        return reasons + (["sparge needs an even block size"] if self.block_size % 2 else [])

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query."""
        return attend_per_item(call, lambda item: self._attend_item(item, backend))

    def remarks(self) -> list[str]:
        """Say what a report must know of how this method runs."""
        if not self.skip:
            return []
        return ["sparge: no kernel skips tiles as it goes; plain torch finds them at dense cost"]

    def _attend_item(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        order = placed_order(call.grid, self.block_size, self.curve, call.query.device)
        mask = self.select(call, order)
        if self.skip:
            mask = skip_far_below(call, mask, self.skip)
        return attend_masked(call, backend, mask)

    def select(self, call: AttentionCall, order: TokenOrder) -> BlockMask:
        """Return the mask of a call of batch 1."""
        tokens, size, half = call.grid.tokens, self.block_size, self.block_size // 2
        query, key = order.apply(call.query), order.apply(call.key)
        q, k = slot_means(query, tokens, size), slot_means(key, tokens, half)
        q_alike = self_similarity(query, tokens, size) > self.similarity  # [H, q_blocks]
        if self.centred:
            start = call.grid.text_before
            mean = call.key[:, start : start + tokens].mean(1, keepdim=True, dtype=torch.float32)
            key = order.apply(call.key - mean.to(call.key.dtype))
        k_alike = self_similarity(key, tokens, half) > self.similarity
        scores = q @ k.transpose(1, 2) * call.softmax_scale
        scores = scores.masked_fill(~k_alike[:, None], float("-inf"))
        chance = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # no ranked key block: all are kept
        if self.mass:
            counts = mass_counts(chance, self.mass).clamp(min=1)
            kept = keep_top(chance, counts)
        else:
            kept = keep_top(chance, max(1, int(self.density * k.shape[1] + 1e-9)))
        kept = kept | ~k_alike[:, None] | ~q_alike[..., None]
        keep = torch.ones(
            (len(kept), order.slots // size, order.slots // half),
            dtype=torch.bool,
            device=kept.device,
        )
        rows, columns = kept.shape[1:]
        keep[:, :rows, :columns] = kept
        keep[:, :rows, columns : 2 * rows] = False  # all padding
        total = call.grid.total
        return BlockMask(keep, (size, half), order=order, q_tokens=total, kv_tokens=total)


def skip_far_below(call: AttentionCall, mask: BlockMask, powers: float) -> BlockMask:
    """Return the mask without what the second stage leaves out, in rows of up to 32 queries.

    Key blocks are met in order; one is left out for a group of queries when for each of them its
    largest score lies at least `powers` powers of two below the largest met before. Neither values
    nor softmax sums count it then. Text queries keep everything.

    Args:
        call: batch 1.
        mask: whole blocks over an order shared by all heads.
        powers: above 0.
    """
    slots = to_slots(call, mask)
    group = _QUERIES if mask.q_block % _QUERIES == 0 else mask.q_block
    queries = slots.query[0].float() * (call.softmax_scale / math.log(2))
    keys = slots.key[0].float().transpose(1, 2)
    keep = mask.keep.repeat_interleave(mask.q_block // group, dim=1).clone()
    order = mask.order or TokenOrder.identity(call.grid.total)
    real = torch.nn.functional.pad(order.to(keep.device).index[0] >= 0, (0, mask.q_slots))
    video = -(-call.grid.tokens // mask.q_block) * mask.q_block  # slots; text stands behind
    step = max(1, _SCORES // (keys.shape[0] * keys.shape[2] * group)) * group
    for first in range(0, video, step):
        rows = slice(first, min(first + step, video))
        scores = queries[:, rows] @ keys
        if slots.bias is not None:
            scores = scores + slots.bias[0][:, None] / math.log(2)
        part = keep[:, rows.start // group : rows.stop // group]
        best = scores.unflatten(2, (-1, mask.kv_block)).amax(-1)  # [H, rows, key blocks]
        best = best.masked_fill(~part.repeat_interleave(group, dim=1), float("-inf"))
        before = torch.nn.functional.pad(best.cummax(-1).values[..., :-1], (1, 0), value=-math.inf)
        near = (best > before - powers) & real[rows, None]
        part &= near.unflatten(1, (-1, group)).any(2)
    return replace(mask, keep=keep, block_size=(group, mask.kv_block), _cache={})


def self_similarity(tensor: torch.Tensor, tokens: int, block_size: int) -> torch.Tensor:
    """Return [H, blocks]: mean cosine of all token pairs of a block, themselves included.

    That is the squared length of the mean unit vector, no pair is formed.

    Args:
        tensor: [1, slots, H, D] in slot order, zeros in padding slots.
        tokens: tokens in the first slots.
        block_size: slots per block.
    """
    unit = torch.nn.functional.normalize(tensor.float(), dim=-1)
    return slot_means(unit, tokens, block_size).square().sum(-1)
