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

    def blended(self, flat: torch.Tensor, share: float) -> torch.Tensor:
        """Return a weight between flat (0) and measured (1), geometrically, equal in the mean.

        Args:
            flat: [L, P, H], of a table whose parts may be split by branch.
            share: of the measured weight.
        """
        weight = self.weight
        if flat.shape[1] != weight.shape[1]:
            both = self.by_branch
            if both is None:
                both = weight[:, :, None].expand(-1, -1, 2, -1)
            weight = both.flatten(1, 2)
        scale = float((weight.log() - flat.log()).mean())
        return (share * weight.log() + (1 - share) * (flat.log() + scale)).exp()


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
    """Return weights from one generation per (layer, range), sparse there alone.

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
    _, ranges, heads = table.shape
    steps = table.range_weight()
    at = [(layer, part) for layer in layers for part in range(ranges) if steps[part]]
    plans = [plan_of(table, choice, model, only=place) for place in at]
    kept = [n for n, plan in enumerate(plans) if plan.rules]
    scores = bench.score_all("measuring sensitivity", [plans[n] for n in kept], settings)
    flat = 1 / table.norm.sum(dim=2).clamp(min=1e-30)
    weight = torch.full_like(flat, float("nan"))
    predicted = _predicted(table, choice)
    for n, score in zip(kept, scores, strict=True):
        layer, part = at[n]
        harm = sum(score.mean_square) / len(score.mean_square)
        error = float(predicted[layer, part]) * float(steps[part])
        if harm > _LEAST and error > 0:
            weight[layer, part] = harm / error
    filled = _filled(weight, flat)
    return Sensitivity(filled[..., None].expand(-1, -1, heads).contiguous(), layers)


def _predicted(table: Table, choice: torch.Tensor) -> torch.Tensor:
    """Return [L, R]: squared error of one step, summed over heads."""
    index = choice.view(table.shape)[..., None]
    return table.error.gather(3, index)[..., 0].sum(dim=2)


def _filled(weight: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """Fill gaps: over layers by interpolating the ratio to flat weights, then by the mean ratio."""
    ratio = (weight / flat).log()
    known = ~torch.isnan(ratio)
    mean = float(ratio[known].mean()) if bool(known.any()) else 0.0
    out = ratio.clone()
    for part in range(ratio.shape[1]):
        have = known[:, part].nonzero().flatten().tolist()
        for layer in range(ratio.shape[0]):
            if not known[layer, part]:
                out[layer, part] = _between(ratio[:, part], have, layer, mean)
    return flat * out.exp()


def _between(column: torch.Tensor, have: list[int], layer: int, mean: float) -> float:
    if not have:
        return mean
    below = max((h for h in have if h < layer), default=have[0])
    above = min((h for h in have if h > layer), default=have[-1])
    if below == above:
        return float(column[below])
    share = min(max((layer - below) / (above - below), 0.0), 1.0)
    return float(column[below]) * (1 - share) + float(column[above]) * share


def to_db(mean_square: float) -> float:
    """Return PSNR in dB of a mean squared pixel error, capped at 120."""
    return min(-10 * math.log10(max(mean_square, 1e-12)), 120.0)
