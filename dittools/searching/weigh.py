"""How much an error at one layer and step range matters in the end: perturbed generations.

`gradient` finds the same by a backward pass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dittools.pipelines.generate import Settings
from dittools.plans import ModelFacts
from dittools.searching.measure import Bench
from dittools.searching.table import Table, plan_of

_LEAST = 1e-12  # mean squared pixel error below which a perturbation did nothing
_ROUNDS = 50  # of fitting layers and ranges in turn; converges in a few


@dataclass(frozen=True)
class Sensitivity:
    """Harm per predicted error.

    Attributes:
        weight: float64 [L, R, H], mean squared pixel error per squared attention error of one step,
            up to a common factor.
        measured: layers that were looked at; the others are interpolated.
        by_branch: [L, R, 2, H] of the cond and the uncond branch, where they were told apart.
    """

    weight: torch.Tensor
    measured: tuple[int, ...]
    by_branch: torch.Tensor | None = None

    def blended(self, flat: torch.Tensor, shares: tuple[float, float]) -> torch.Tensor:
        """Return a weight between flat (0) and measured (1), geometrically, equal in the mean.

        How parts of a run differ is blended apart from how layers and heads do: what an error does
        early in a run grows faster than its square, once the clip takes another course.

        Args:
            flat: [L, P, H], of a table whose parts may be split by branch.
            shares: of what was measured between layers and heads, and between parts of the run.
        """
        weight = self.weight
        if flat.shape[1] != weight.shape[1]:
            both = self.by_branch
            if both is None:
                both = weight[:, :, None].expand(-1, -1, 2, -1)
            weight = both.flatten(1, 2)
        ratio = weight.log() - flat.log()
        mean = ratio.mean()
        parts = ratio.mean(dim=(0, 2), keepdim=True) - mean
        within, over = shares
        return flat * (mean + within * (ratio - mean - parts) + over * parts).exp()


def sampled_layers(layers: int, count: int, pinned: Sequence[int]) -> tuple[int, ...]:
    """Return the layers to perturb: spread over the depth, first and last among them."""
    free = [layer for layer in range(layers) if layer not in pinned] or list(range(layers))
    count = min(count, len(free))
    if count == 1:
        return (free[len(free) // 2],)
    return tuple(free[round(i * (len(free) - 1) / (count - 1))] for i in range(count))


def measure_sensitivity(
    bench: Bench,
    table: Table,
    choice: torch.Tensor,
    model: ModelFacts,
    settings: Sequence[Settings],
    layers: tuple[int, ...],
) -> Sensitivity:
    """Return weights from generations that are sparse in one step range, or one layer, alone.

    A weight is the product of one of the layer and one of the range: they are fitted to what the
    generations came to, so that cost grows with layers plus ranges, not with their product.

    The perturbation is the first plan's own approximation, so that the weight holds for errors of
    the size and shape a plan makes; noise of the same energy moves a sampler differently.

    Args:
        bench: generates.
        table: errors.
        choice: the first plan.
        model: of the plans.
        settings: generations, the mean over them counts.
        layers: layers to perturb.
    """
    count, ranges, heads = table.shape
    steps = table.range_weight()
    at: list[tuple[int | None, int | None]] = [(None, r) for r in range(ranges) if steps[r]]
    at += [(layer, None) for layer in layers]
    plans = [plan_of(table, choice, model, only=place) for place in at]
    kept = [n for n, plan in enumerate(plans) if plan.rules]
    scores = bench.score_all("measuring sensitivity", [plans[n] for n in kept], settings)
    by_range, by_layer = torch.zeros(ranges).double(), torch.zeros(count).double()
    for n, score in zip(kept, scores, strict=True):
        harm = sum(score.mean_square) / len(score.mean_square)
        layer, part = at[n]
        harms, place = (by_range, part) if layer is None else (by_layer, layer)
        harms[place or 0] = harm if harm > _LEAST else 0.0
    flat = 1 / table.norm.sum(dim=2).clamp(min=1e-30)
    error = _predicted(table, choice) * flat * steps
    weight = flat * factors(error, by_layer, by_range)
    return Sensitivity(weight[..., None].expand(-1, -1, heads).contiguous(), layers)


def factors(error: torch.Tensor, by_layer: torch.Tensor, by_range: torch.Tensor) -> torch.Tensor:
    """Return float64 [L, R]: one factor per layer times one per range, positive.

    Summed over the layers, the errors so weighted are the harm of a range, and the other way round.
    Layers and ranges whose harm is not known lie between their neighbours, in logarithms.

    Args:
        error: float64 [L, R] squared errors as they are.
        by_layer: [L] harm of each layer on all ranges; 0 where not known.
        by_range: [R] harm of each range on all layers; 0 where not known.
    """
    layer, part = torch.ones_like(by_layer), torch.ones_like(by_range)
    for _ in range(_ROUNDS):
        layer = _filled(by_layer / (error @ part))
        layer = layer / layer.log().mean().exp()  # the scale is that of the ranges
        part = _filled(by_range / (layer @ error))
    return layer[:, None] * part


def _predicted(table: Table, choice: torch.Tensor) -> torch.Tensor:
    """Return [L, R]: squared error of one step, summed over heads."""
    index = choice.view(table.shape)[..., None]
    return table.error.gather(3, index)[..., 0].sum(dim=2)


def _filled(ratio: torch.Tensor) -> torch.Tensor:
    """Return ratios whose gaps, and what is no positive number, lie between their neighbours."""
    known = ratio.isfinite() & (ratio > 0)
    have = known.nonzero().flatten().tolist()
    logs = torch.where(known, ratio, 1.0).log()
    return torch.stack(
        [logs[n] if known[n] else _between(logs, have, n) for n in range(len(logs))]
    ).exp()


def _between(column: torch.Tensor, have: list[int], layer: int) -> torch.Tensor:
    if not have:
        return torch.zeros_like(column[0])
    below = max((h for h in have if h < layer), default=have[0])
    above = min((h for h in have if h > layer), default=have[-1])
    if below == above:
        return column[below]
    share = min(max((layer - below) / (above - below), 0.0), 1.0)
    return column[below] * (1 - share) + column[above] * share


def to_db(mean_square: float) -> float:
    """Return PSNR in dB of a mean squared pixel error, capped at 120."""
    return min(-10 * math.log10(max(mean_square, 1e-12)), 120.0)
