"""Sparse VideoGen, first version: each head is spatial or temporal, decided at every call.

Source: arXiv:2502.01776 and svg-project/Sparse-VideoGen. A few sampled queries are run in full and
under two block bands, one in frame order and one in position order; the nearer one is used.
With `band` "ceil" or "floor" the
bands are the authors', exact to the token; else whole blocks, as near to the density as these come.
Differences: queries are sampled over the whole clip (the authors' code samples its first 10,000
tokens) and are tested under the bands that are then run (it tests a fixed width). Baseline.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask, unpack_bits
from dittools.methods.bands import band_mask, exact_band_mask
from dittools.methods.base import attend_masked, attend_per_item, check_params, param
from dittools.methods.placing import sent


@dataclass(frozen=True)
class SVG:
    """A band of near frames or a band of near positions, per head and call."""

    name: ClassVar[str] = "svg"
    density: float = param(0.3, "the share of blocks each band keeps", above=0.0, most=1.0)
    rows: int = param(64, "the queries tried under both bands", least=1)
    sink: bool = param(
        True, "whether every query also sees the first slots of the order, as many as a frame has"
    )
    band: str = param(
        "blocks",
        "the edge of the band: whole blocks, or exact to the token, its width rounded to 128 "
        "tokens up ('ceil', the authors on Wan) or down ('floor', on HunyuanVideo)",
        choices=("blocks", "ceil", "floor"),
    )
    block_size: int = param(128, "the tokens per block", least=8, most=1024)

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_params(self)

    def not_supported(self, call: AttentionCall) -> list[str]:
        """The bands hold the sequence's own keys only."""
        extra = call.key.shape[1] - call.grid.total
        return [f"svg has no band for {extra} extra keys"] if extra else []

    def masks(self, grid: TokenGrid) -> tuple[BlockMask, BlockMask]:
        """Return the spatial (frame order) and the temporal (position order) mask; cached."""
        args = (grid, self.density, self.block_size)
        if self.band != "blocks":
            exact = (self.sink, self.band)
            return exact_band_mask(*args, False, *exact), exact_band_mask(*args, True, *exact)
        return band_mask(*args, False, self.sink), band_mask(*args, True, self.sink)

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D]; the heads of one kind run as one launch."""
        return attend_per_item(call, lambda item: self._attend_item(item, backend))

    def _attend_item(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        device = call.query.device
        spatial, temporal = (mask.to(device) for mask in self.masks(call.grid))
        kind = self.temporal_heads(call)
        out = torch.empty_like(call.query)
        for mask, heads in ((spatial, ~kind), (temporal, kind)):
            index = heads.nonzero().flatten()
            if len(index):
                part = attend_masked(call.heads(index.tolist()), backend, mask)
                out.index_copy_(2, sent(index, device), part)
        return out

    def temporal_heads(self, call: AttentionCall) -> torch.Tensor:
        """Return bool [H]: heads whose sampled queries lose less under the temporal band."""
        grid = call.grid
        rows = min(self.rows, grid.tokens)
        device = call.query.device
        odd = 2 * torch.arange(rows, device=device) + 1
        picked = grid.text_before + odd * grid.tokens // (2 * rows)
        query = call.query[0, picked].transpose(0, 1).float() * call.softmax_scale
        scores = query @ call.key[0].permute(1, 2, 0).float()  # [H, rows, S]
        bias = call.additive_mask()
        if bias is not None:
            scores = scores + bias[0][:, None]
        value = call.value[0].transpose(0, 1).float()
        full = torch.softmax(scores, dim=-1) @ value
        losses = []
        for mask in self.masks(grid):
            seen = _rows_of(mask.to(device), picked)
            out = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ value
            losses.append((out - full).square().mean(dim=(1, 2)))
        return (losses[1] < losses[0]).cpu()


def _rows_of(mask: BlockMask, tokens: torch.Tensor) -> torch.Tensor:
    """Return bool [n, S]: the keys each of n queries sees under a mask."""
    slot = tokens if mask.order is None else mask.order.inverse[0, tokens]
    block = slot // mask.q_block
    kept = mask.keep[0, block].repeat_interleave(mask.kv_block, dim=1)
    if mask.tiles is not None and mask.tile_index is not None:
        tile = mask.tile_index[0, block].long()  # [n, key blocks]
        bits = unpack_bits(
            mask.tiles[tile.clamp(min=0), (slot % mask.q_block)[:, None]], mask.kv_block
        )
        kept &= (bits | (tile < 0)[..., None]).flatten(1)
    total = mask.kv_tokens
    return kept[:, :total] if mask.order is None else kept[:, mask.order.inverse[0]]
