"""Rectified sparse attention: block-sparse attention, then the mass of dropped blocks put back.

Source: arXiv:2511.19835 and BienLuky/Rectified-SpaAttn. Pooled queries and keys give every key
block a probability (text keys one by one, visual ones times the tokens they stand for). Kept blocks
are attended exactly and scaled by the mass that is not compensated; dropped blocks whose estimated
gain beats the estimated pooling error are added as probability times mean value. Differences:
ragged last blocks use true counts; the authors' int((1 - drop) * blocks) loses one block to
rounding at 0.8.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask
from dittools.methods.base import attend_exactly, attend_per_item, check_params, param
from dittools.methods.curves import neighbour_blocks, placed_order
from dittools.methods.placing import placed
from dittools.methods.selection import block_sizes, keep_top, mass_counts, slot_means
from dittools.order import TokenOrder

CURVES = {"gilbert": "gilbert_along_width", "raster": "raster"}  # the authors fix the axis order


@dataclass(frozen=True)
class Rectified:
    """Block-sparse attention corrected by what the pooled attention says was dropped."""

    name: ClassVar[str] = "rectified"
    density: float = param(0.2, "the share of key blocks every row keeps", least=0.0, most=1.0)
    mass: float = param(
        0.3, "the share of the pooled probability every row keeps at least", least=0.0, most=1.0
    )
    block_size: int = param(128, "the tokens per block", least=1, most=1024)
    neighbours: bool = param(True, "whether blocks that touch in space or time are always kept")
    first_frame: bool = param(
        False,
        "whether the first blocks, as many as one frame fills, always see each other, as for Wan",
    )
    compensate: bool = param(True, "whether dropped blocks are added by their mean value")
    text_ranks: bool = param(
        True,
        "whether text takes part in the ranking and can use up a slot, as in the authors' code",
    )
    curve: str = param("gilbert", "the order blocks are cut from", choices=tuple(CURVES))

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_params(self)

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Extra keys have no place in the pooled estimate."""
        extra = call.key.shape[1] - call.grid.total
        return [f"rectified cannot rank {extra} extra keys"] if extra else []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query."""
        return attend_per_item(call, lambda item: self._attend_item(item, backend))

    def _attend_item(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        order = placed_order(call.grid, self.block_size, CURVES[self.curve], call.query.device)
        chosen = rectified_blocks(call, self, order)
        mask = _mask(call.grid, self, chosen.kept, order)
        if mask.is_whole:
            return backend.dense(call)
        out = attend_exactly(call, backend, mask)
        if out is None:
            return backend.dense(call)
        values = slot_means(order.apply(call.value), call.grid.tokens, self.block_size)
        added = (chosen.probability * chosen.compensated) @ values  # [H, blocks, D]
        video = slice(call.grid.text_before, call.grid.text_before + call.grid.tokens)
        block = order.inverse[0, video] // self.block_size
        factor = chosen.factor.t()[block][..., None]  # [tokens, H, 1]
        fixed = factor * out[0, video].to(factor.dtype) + added.transpose(0, 1)[block]
        out[0, video] = fixed.to(out.dtype)
        return out


class Rectification(NamedTuple):
    """What one call keeps and puts back, over the blocks of the grid's tokens.

    Attributes:
        probability: [H, blocks, blocks], share of every key block in the pooled attention.
        text: [H, blocks], share of the text.
        kept: bool [H, blocks, blocks].
        compensated: bool, dropped blocks added by their mean value.
        factor: [H, blocks], what kept keys count for; 1 - the compensated share.
    """

    probability: torch.Tensor
    text: torch.Tensor
    kept: torch.Tensor
    compensated: torch.Tensor
    factor: torch.Tensor


def rectified_blocks(call: AttentionCall, method: Rectified, order: TokenOrder) -> Rectification:
    """Return what a call of batch 1 keeps, compensates and by how much kept keys are scaled."""
    grid, size = call.grid, method.block_size
    query, key = order.apply(call.query), order.apply(call.key)
    q, k = slot_means(query, grid.tokens, size), slot_means(key, grid.tokens, size)
    raw = q @ k.transpose(1, 2)  # [H, blocks, blocks]
    sizes = block_sizes(grid.tokens, size, raw)
    text_at = order.index[0, -(-grid.tokens // size) * size :][: grid.text]
    texts = (q @ call.key[0, text_at].to(q.dtype).permute(1, 2, 0)) * call.softmax_scale
    bias = call.additive_mask()
    if bias is not None:
        texts = texts + bias[0][:, None, text_at].to(q.dtype)
    weights = torch.softmax(torch.cat((raw * call.softmax_scale, texts), dim=-1), dim=-1)
    mass, text = weights[..., : len(sizes)] * sizes, weights[..., len(sizes) :].sum(-1)
    whole = mass.sum(-1) + text
    probability, text = mass / whole[..., None], text / whole
    kept = _rank(probability, text, method)
    if method.neighbours:
        kept = kept | placed(neighbour_blocks(grid, size, CURVES[method.curve]), kept.device)
    if method.first_frame:
        first = first_frame_blocks(grid, size)
        kept[:, :first, :first] = True
    compensated = torch.zeros_like(kept)
    if method.compensate:
        spread_q = _deviation(query, q, grid, size)
        spread_k = _deviation(key, k, grid, size)
        error = (spread_q @ k.transpose(1, 2)).abs() + (q @ spread_k.transpose(1, 2)).abs()
        compensated = ~kept & (raw.abs() > error)
    factor = 1 - (probability * compensated).sum(-1)
    return Rectification(probability, text, kept, compensated, factor)


def first_frame_blocks(grid: TokenGrid, block_size: int) -> int:
    """Return the whole blocks per frame, 28 for Wan 720p: the authors' count, which rounds down."""
    return -(-grid.tokens // block_size) // grid.frames


def _rank(probability: torch.Tensor, text: torch.Tensor, method: Rectified) -> torch.Tensor:
    """Return bool like probability: the best blocks by count and mass, text ranked beside."""
    blocks = probability.shape[-1]
    ranked = probability
    if method.text_ranks:
        ranked = torch.cat((probability, text[..., None]), dim=-1)
    else:
        ranked = ranked / ranked.sum(-1, keepdim=True)
    top_k = int(method.density * blocks + 1e-9)
    counts = (mass_counts(ranked, method.mass) + 1).clamp(min=top_k, max=ranked.shape[-1])
    if method.density >= 1:
        counts.fill_(ranked.shape[-1])
    return keep_top(ranked, counts)[..., :blocks]


def _deviation(
    tensor: torch.Tensor, mean: torch.Tensor, grid: TokenGrid, size: int
) -> torch.Tensor:
    """Return [H, blocks, D]: mean absolute deviation of every block from its mean."""
    blocks = mean.shape[1]
    cut = tensor[0, : blocks * size].unflatten(0, (blocks, size)).to(mean.dtype)
    apart = (cut - mean.transpose(0, 1)[:, None]).abs()
    sizes = block_sizes(grid.tokens, size, tensor)
    real = torch.arange(size, device=tensor.device) < sizes[:, None]
    total: torch.Tensor = (apart * real[..., None, None]).sum(1)
    return (total / sizes[:, None, None]).transpose(0, 1)


def _mask(grid: TokenGrid, method: Rectified, kept: torch.Tensor, order: TokenOrder) -> BlockMask:
    """Return the mask over all slots: kept blocks, and text dense both ways."""
    blocks, video = order.slots // method.block_size, kept.shape[1]
    keep = torch.ones((len(kept), blocks, blocks), dtype=torch.bool, device=kept.device)
    keep[:, :video, :video] = kept
    return BlockMask(
        keep, method.block_size, order=order, q_tokens=grid.total, kv_tokens=grid.total
    )
