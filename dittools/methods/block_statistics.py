"""Attention maps summed up block by block, streamed: what calibration and oracles look at."""

from dataclasses import dataclass

import torch

from dittools.methods.block_sampling import sampled_slots
from dittools.methods.placing import label_counts, sent

_CHUNK = 2**24  # attention weights held at a time


@dataclass
class Statistics:
    """What the choice of orders and masks needs to know of attention maps, block by block.

    Attributes:
        mass: float32 [H, blocks, blocks], sum of the attention weights over each block.
        peak: the same shape, largest weight.
        small: the same shape, share of the weights below `eps`.
        area: query-key pairs per block, [blocks, blocks].
    """

    mass: torch.Tensor
    peak: torch.Tensor
    small: torch.Tensor
    area: torch.Tensor

    def recall(self, density: float) -> torch.Tensor:
        """Return [H]: the share of the mass in the heaviest blocks at a density."""
        return mass_recall(self.mass, density)

    def sparse(self, sigma: float = 0.9) -> torch.Tensor:
        """Return [H]: the share of blocks in which at least sigma of the weights are small."""
        return (self.small >= sigma - 1e-6).float().mean(dim=(1, 2))

    def incoherence(self) -> torch.Tensor:
        """Return [H]: mean over blocks of largest over mean weight, 1 for empty blocks."""
        ratio = self.peak * self.area / self.mass.clamp(min=1e-30)
        return torch.where(self.mass > 0, ratio, torch.ones_like(ratio)).mean(dim=(1, 2))


def statistics(
    query: torch.Tensor,
    key: torch.Tensor,
    tokens: int,
    block_size: int,
    scale: float,
    rows: int | None = None,
    eps: float = 1e-3,
    bias: torch.Tensor | None = None,
) -> Statistics:
    """Return the block statistics of softmax(scale * query key^T), streamed, never a whole map.

    Args:
        query: [S, H, D] in the order to judge, text behind; blocks cover the first `tokens`.
        key: [S, H, D].
        tokens: grid tokens.
        block_size: tokens.
        scale: factor on the scores.
        rows: sampled queries per block, evenly spaced; None takes all.
        eps: weight below which an entry counts as small.
        bias: float [H or 1, S] added to the scores of each key, -inf for padded text.
    """
    heads, blocks = query.shape[1], -(-tokens // block_size)
    sizes = torch.full((blocks,), block_size, device=query.device)
    sizes[-1] = tokens - (blocks - 1) * block_size
    picked = sampled_slots(tokens, block_size, rows or block_size)
    picked = sent(picked, query.device)
    owner = picked // block_size
    k = key.transpose(0, 1).float()
    out = [torch.zeros((heads, blocks, blocks), device=query.device) for _ in range(3)]
    step = max(1, _CHUNK // (heads * key.shape[0]))
    for first in range(0, len(picked), step):
        part = picked[first : first + step]
        q = query[part].transpose(0, 1).float() * scale
        scores = q @ k.transpose(1, 2)
        if bias is not None:
            scores = scores + bias[:, None]
        weights = torch.softmax(scores, dim=-1)[..., :tokens]
        short = blocks * block_size - tokens
        cut = torch.nn.functional.pad(weights, (0, short)).unflatten(2, (blocks, block_size))
        where = owner[first : first + step]
        out[0].index_add_(1, where, cut.sum(-1))
        at = where[None, :, None].expand(heads, -1, blocks)
        out[1].scatter_reduce_(1, at, cut.amax(-1), "amax")
        out[2].index_add_(1, where, (cut < eps).sum(-1).float() - _pads(sizes, block_size))
    counts = label_counts(owner, blocks)  # sampled queries per block
    area = (counts[:, None] * sizes).float()
    return Statistics(out[0], out[1], out[2] / area, area)


def mass_recall(mass: torch.Tensor, density: float) -> torch.Tensor:
    """Return [H]: the share of the mass in the heaviest blocks at a density."""
    flat = mass.flatten(1)
    count = max(1, round(density * flat.shape[1]))
    return flat.topk(count, dim=1).values.sum(1) / flat.sum(1).clamp(min=1e-30)


def _pads(sizes: torch.Tensor, block_size: int) -> torch.Tensor:
    return (block_size - sizes).float()
