"""SpargeAttn's block selection: pooled scores decide, unless a block's tokens are too unlike.

Source: arXiv:2502.18137 and thu-ml/SpargeAttn, its first stage. Query blocks of 128 and key blocks
of 64 are pooled by their means; a key block whose tokens are unlike is always kept and left out of
the ranking, a query block whose tokens are unlike keeps its whole row. The second stage (skipping
inside the kernel) and INT8 are not part of it. Baseline.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dittools.call import AttentionCall
from dittools.kernels import Backend
from dittools.mask import BlockMask
from dittools.methods.base import attend_masked, attend_per_item, check_params, param
from dittools.methods.curves import placed_order
from dittools.methods.selection import keep_top, mass_counts, slot_means
from dittools.order import TokenOrder


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
        -0.1, "the mean cosine below which a block counts as unlike", least=-1.0, most=1.0
    )
    block_size: int = param(128, "the tokens per query block, twice those per key block", least=8)
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

    def _attend_item(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        order = placed_order(call.grid, self.block_size, self.curve, call.query.device)
        return attend_masked(call, backend, self.select(call, order))

    def select(self, call: AttentionCall, order: TokenOrder) -> BlockMask:
        """Return the mask of a call of batch 1."""
        tokens, size, half = call.grid.tokens, self.block_size, self.block_size // 2
        query, key = order.apply(call.query), order.apply(call.key)
        q, k = slot_means(query, tokens, size), slot_means(key, tokens, half)
        q_alike = self_similarity(query, tokens, size) >= self.similarity  # [H, q_blocks]
        k_alike = self_similarity(key, tokens, half) >= self.similarity
        scores = q @ k.transpose(1, 2) * call.softmax_scale
        scores = scores.masked_fill(~k_alike[:, None], float("-inf"))
        chance = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # no ranked key block: all are kept
        if self.mass:
            counts = mass_counts(chance, self.mass).clamp(min=1)
            kept = keep_top(chance, counts)
        else:
            kept = keep_top(chance, max(1, round(self.density * k.shape[1])))
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
