"""The ceiling of block selection: the heaviest blocks of the true attention map, row by row.

It computes the whole map to know which part to keep, so it saves nothing; a method is judged by how
close it comes at the same density. Reference only.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dittools.call import AttentionCall
from dittools.kernels import Backend
from dittools.methods.bands import text_last_order
from dittools.methods.base import attend_masked, attend_per_item, check_params, param
from dittools.methods.block_statistics import statistics
from dittools.methods.selection import keep_share, keep_top, mass_counts, row_mask


@dataclass(frozen=True)
class OracleTopK:
    """The key blocks that hold the most attention mass; knows it by computing all of it."""

    name: ClassVar[str] = "oracle"
    density: float = param(0.25, "the share of blocks kept", above=0.0, most=1.0)
    mass: float = param(
        0.0,
        "the share of its attention every row keeps at least, instead of a density; 0 for none",
        least=0.0,
        most=1.0,
    )
    block_size: int = param(128, "the tokens per block", least=8, most=1024)
    per_row: bool = param(
        True, "whether every row keeps the same number; otherwise one threshold serves all heads"
    )

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_params(self)

    def not_supported(self, call: AttentionCall) -> list[str]:
        """The map is that of the sequence's own keys."""
        extra = call.key.shape[1] - call.grid.total
        return [f"oracle does not rank {extra} extra keys"] if extra else []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query."""
        return attend_per_item(call, lambda item: self._attend_item(item, backend))

    def _attend_item(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        grid, size = call.grid, self.block_size
        order = text_last_order(grid)
        order = None if order is None else order.to(call.query.device)
        query, key = (x if order is None else order.apply(x) for x in (call.query, call.key))
        bias = call.additive_mask()
        if bias is not None:
            bias = bias[0] if order is None else bias[0][:, order.index[0]]
        mass = statistics(query[0], key[0], grid.tokens, size, call.softmax_scale, bias=bias).mass
        if self.mass:
            share = mass / mass.sum(-1, keepdim=True)
            kept = keep_top(mass, (mass_counts(share, self.mass) + 1).clamp(max=mass.shape[2]))
        elif self.per_row:
            kept = keep_top(mass, max(1, round(self.density * mass.shape[2])))
        else:
            kept = keep_share(mass, self.density)
        behind = type(grid)(*grid.shape, 0, grid.text)
        blocks, video = grid.blocks(size), mass.shape[1]
        keep = torch.zeros((len(kept), blocks, blocks), dtype=torch.bool, device=kept.device)
        keep[:, :video, :video] = kept
        return attend_masked(call, backend, row_mask(keep, behind, size, order))
