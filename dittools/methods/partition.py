"""Ways to put the queries and the keys of every head into groups, each with labels of its own.

    kmeans    tokens alike: Euclidean k-means (SVG2, arXiv:2505.18875, and SVG-EAR, 2603.08982)
    response  keys that queries answer alike, then queries that keys answer alike: k-means in the
              metrics M_K = E[q q^T] and M_Q = cov(key means) / D (SparsePR, arXiv:2608.18484)
    profile   the same by turns and by angle: a key's profile is its scores with the query means
              (SVOO, arXiv:2603.18636)
    split     equal sizes, by cuts along principal axes (ClusterAttention, arXiv:2608.26965)

The profile of a key k has the length of the query means QC, but the nearest one needs no profile:
(k QC^T) . (c QC^T) = k M c^T with M = QC^T QC, a D x D matrix, so the mean c alone is turned.
"""

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dittools.call import AttentionCall
from dittools.methods.kmeans import (
    EXACTLY,
    Clusters,
    cluster_sums,
    drawn_tokens,
    kmeans,
    most_alike,
    sampled_start,
)

PARTITIONS = {
    "kmeans": "tokens alike",
    "response": "tokens that get alike answers",
    "profile": "tokens alike in their scores with the other side",
    "split": "equal sizes",
}
KEY_RANK, QUERY_RANK = 48, 64  # directions SparsePR keeps of each metric
METRIC_ROWS = 2048  # queries its key metric is estimated from
SPLIT_SAMPLE = 128  # members ClusterAttention looks at to choose an axis
_PLAIN, _FAR = 24, 120  # exponents whose products of four fit float32; exponents a unit may have


class Effort(NamedTuple):
    """How long groups are sought.

    Attributes:
        first: rounds where nothing is known.
        later: rounds from the means of an earlier step.
        sample: tokens per group the first rounds look at, but for the last `later`; 0 for all.
        seed: start of the random numbers.
    """

    first: int
    later: int
    sample: int
    seed: int


Means = tuple[torch.Tensor, torch.Tensor]  # of queries and of keys, [H, groups, D]


def kmeans_labels(
    query: torch.Tensor, key: torch.Tensor, counts: tuple[int, int], start: Means | None, by: Effort
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64 [H, N] of queries and of keys: groups of tokens alike.

    Args:
        query, key: float32 or float64 [H, N, D].
        counts: groups of queries, of keys.
        start: means of an earlier step.
        by: rounds.
    """
    known: tuple[torch.Tensor | None, ...] = start or (None, None)
    found = [
        _kmeans(points, count, mean, by).labels
        for points, count, mean in zip((query, key), counts, known, strict=True)
    ]
    return found[0], found[1]


def _kmeans(points: torch.Tensor, count: int, start: torch.Tensor | None, by: Effort) -> Clusters:
    if start is not None:
        return kmeans(points, start, by.later, EXACTLY)
    sample, before = count * by.sample, by.first - by.later
    if before < 1 or not 0 < sample < points.shape[1]:
        return kmeans(points, drawn_tokens(points, count, by.seed), by.first, EXACTLY)
    return kmeans(points, sampled_start(points, count, by.seed, before, sample), by.later, EXACTLY)


def response_labels(
    query: torch.Tensor, key: torch.Tensor, counts: tuple[int, int], start: Means | None, by: Effort
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64 [H, N] of queries and of keys: groups that get alike answers, in one pass.

    Arguments as for `kmeans_labels`.
    """
    units = _unit(query), _unit(key)
    query, key = query * units[0], key * units[1]
    if start is not None:
        start = start[0] * units[0], start[1] * units[1]
    tokens = query.shape[1]
    rows = torch.linspace(0, tokens - 1, min(METRIC_ROWS, tokens), device=query.device)
    seen = query.index_select(1, rows.round().long())
    factor = metric_factor(seen.transpose(1, 2) @ seen / len(rows), KEY_RANK)
    known = None if start is None else start[1] @ factor
    keys = _kmeans(key @ factor, counts[1], known, by).labels
    sums, sizes = cluster_sums(key, keys, counts[1])
    there = (sizes > 0)[..., None].to(sums.dtype)
    number = there.sum(1, keepdim=True)
    means = sums / sizes.clamp(min=1)[..., None]
    apart = (means - means.sum(1, keepdim=True) / number) * there
    metric = apart.transpose(1, 2) @ apart / (number * key.shape[2])
    factor = metric_factor(metric, QUERY_RANK)
    known = None if start is None else _even_rows(start[0] @ factor)
    return _kmeans(_even_rows(query @ factor), counts[0], known, by).labels, keys


def _unit(points: torch.Tensor) -> torch.Tensor:
    """Return a power of two [H, 1, 1] that brings numbers whose squares do not fit within reach.

    Most numbers stay as they are; no product below depends on the unit.
    """
    exponent = torch.frexp(points.abs().amax((1, 2), keepdim=True)).exponent
    exponent = torch.where(exponent.abs() > _PLAIN, exponent, 0).clamp(-_FAR, _FAR)
    return torch.ldexp(torch.ones_like(points[:, :1, :1]), -exponent)


def grid_points(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys of the grid's tokens, float32 or float64 [H, N, D], all finite.

    Args:
        call: of batch 1; NaN and infinity become zeros, so that groups are made in any case.
    """
    video = slice(call.grid.text_before, call.grid.text_before + call.grid.tokens)
    wide = torch.promote_types(call.query.dtype, torch.float32)
    query, key = (
        x[0, video].transpose(0, 1).to(wide).nan_to_num(0.0, 0.0, 0.0).contiguous()
        for x in (call.query, call.key)
    )
    return query, key


def metric_factor(metric: torch.Tensor, rank: int) -> torch.Tensor:
    """Return F [H, D, min(rank, D)] with F F^T the metric [H, D, D] up to scale, at that rank."""
    values, axes = torch.linalg.eigh((metric + metric.transpose(1, 2)) / 2)
    values, axes = values[:, -rank:].clamp(min=0), axes[:, :, -rank:]
    scale = (values / values.mean(1, keepdim=True).clamp(min=1e-12)).sqrt()
    factor: torch.Tensor = axes * scale[:, None]
    return factor


def _even_rows(features: torch.Tensor) -> torch.Tensor:
    size = features.square().mean(2, keepdim=True).sqrt()
    return features / size.clamp(min=1e-6)


def profile_labels(
    query: torch.Tensor, key: torch.Tensor, counts: tuple[int, int], start: Means | None, by: Effort
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64 [H, N] of queries and of keys: groups of tokens with scores of alike shape.

    Keys are put to the mean whose profile of scores with the query means has the least angle to
    theirs, then queries against the new key means; so many rounds. Arguments as for
    `kmeans_labels`.
    """
    before = by.first - by.later
    if start is None:
        start = _drawn(query, key, counts, by.seed)
        some = (counts[0] * by.sample, counts[1] * by.sample)
        if before < 1 or not 0 < max(some) < query.shape[1]:
            return _profile_rounds(query, key, start, by.first)[:2]
        start = _profile_rounds(*_drawn(query, key, some, by.seed), start, before)[2]
    return _profile_rounds(query, key, start, by.later)[:2]


def _drawn(query: torch.Tensor, key: torch.Tensor, counts: tuple[int, int], seed: int) -> Means:
    return drawn_tokens(query, counts[0], seed), drawn_tokens(key, counts[1], seed)


def _profile_rounds(
    query: torch.Tensor, key: torch.Tensor, means: Means, rounds: int
) -> tuple[torch.Tensor, torch.Tensor, Means]:
    """Return the labels of queries and of keys after so many rounds, and the means."""
    centre, other = means
    for _ in range(rounds):
        keys = nearest_profile(key, other, centre)
        other = _moved(key, keys, other)
        queries = nearest_profile(query, centre, other)
        centre = _moved(query, queries, centre)
    return queries, keys, (centre, other)


def nearest_profile(
    points: torch.Tensor, means: torch.Tensor, others: torch.Tensor
) -> torch.Tensor:
    """Return int64 [H, N]: the mean whose scores with `others` are most parallel to a point's.

    Args:
        points: [H, N, D].
        means: [H, groups, D], of the points.
        others: [H, n, D], means of the other side; scores with them are the profile.
    """
    turned = means @ (others.transpose(1, 2) @ others)
    length = (turned * means).sum(2, keepdim=True).clamp(min=0).sqrt()
    return most_alike(points, turned / length.clamp(min=1e-8))


def _moved(points: torch.Tensor, labels: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    sums, sizes = cluster_sums(points, labels, means.shape[1])
    found = sums / sizes.clamp(min=1)[..., None].to(sums.dtype)
    return torch.where(sizes[..., None] > 0, found, means)


def split_labels(
    query: torch.Tensor, key: torch.Tensor, sizes: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64 [H, N] of queries and of keys: groups of equal size, but for one.

    Keys are looked at in the metric of the queries, queries by the direction of their answers to
    the keys, both along principal axes.

    Args:
        query, key: float32 or float64 [H, N, D].
        sizes: queries per group, keys per group.
    """
    queries = F.normalize(_answers(query, key - key.mean(1, keepdim=True)), dim=2)
    queries = _principal(queries - queries.mean(1, keepdim=True))
    return equal_split(queries, sizes[0]), equal_split(key_points(query, key), sizes[1])


def key_points(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return [H, N, D]: keys in the metric of the queries, along principal axes.

    Args:
        query, key: float32 or float64 [H, N, D].
    """
    return _principal(_answers(key - key.mean(1, keepdim=True), query))


def _answers(points: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return [H, N, D] with |x - y|^2 the mean squared difference of scores with others."""
    points, others = points * _unit(points), others * _unit(others)
    moment = others.transpose(1, 2) @ others / others.shape[1]
    values, axes = torch.linalg.eigh(moment)
    turned: torch.Tensor = points @ (axes * values.clamp(min=0).sqrt()[:, None])
    return turned


def _principal(points: torch.Tensor) -> torch.Tensor:
    """Return centred points along their principal axes, each pointing to its largest entry."""
    axes = torch.linalg.eigh(points.transpose(1, 2) @ points).eigenvectors
    largest = axes.abs().argmax(1, keepdim=True)
    turned: torch.Tensor = points @ (axes * axes.gather(1, largest).sign())
    return turned


def equal_split(points: torch.Tensor, size: int) -> torch.Tensor:
    """Return int64 [H, N]: groups of `size` tokens but for one, by cuts along coordinate axes.

    Args:
        points: float [H, N, D].
        size: tokens per group.
    """
    order = split_order(points, size)
    last = split_levels(points.shape[1], size)[1]
    label = torch.repeat_interleave(torch.tensor(last, device=points.device)).expand_as(order)
    return torch.empty_like(label).scatter_(1, order, label)


def split_order(points: torch.Tensor, size: int, leaf: int = 0) -> torch.Tensor:
    """Return int64 [H, N]: the tokens, group by group of `size` but for one.

    A part is cut along the axis in which it varies most, at the multiple of `size` nearest its
    middle, until none is larger. Sizes depend on N alone, so that all parts of all heads are cut
    at once, level by level. With `leaf`, groups are cut on in the same way down to that, so that
    tokens that stand side by side in a group are alike.

    Args:
        points: float [H, N, D].
        size: tokens per group.
        leaf: tokens per part of a group; 0 cuts no group.
    """
    heads, tokens, width = points.shape
    rows = points.reshape(-1, width)
    first = torch.arange(heads, device=points.device)[:, None] * tokens
    order = torch.arange(tokens, device=points.device).expand(heads, -1)
    for cut in _cuts(tokens, size, leaf, points.device):
        some = rows.index_select(0, (order[:, cut.seen.flatten()] + first).flatten())
        some = some.view(heads, *cut.seen.shape, width) * cut.real
        mean = some.sum(2, keepdim=True) / cut.number
        axis = ((some - mean).square() * cut.real).sum(2).argmax(2)  # [H, parts]
        value = points.reshape(-1).take((order + first) * width + axis[:, cut.part])
        value = value.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=-float("inf"))
        value = F.pad(value, (0, 1), value=float("inf"))[:, cut.slot]  # [H, parts, longest]
        place = value.argsort(dim=2, stable=True) + cut.start[:, None]
        order = order.gather(1, place.flatten(1)[:, cut.back])
    return order


class _Cut(NamedTuple):
    """One level of cuts, the same for all heads: int64 but for `real` and `number`.

    Attributes:
        seen: [parts, n], slots of the members an axis is chosen by.
        real: float [parts, n, 1], 0 where a part has fewer.
        number: float [parts, 1, 1], members looked at.
        part: [N], of each slot.
        start: [parts], first slots.
        slot: [parts, longest], slots of each part; N where it has no more.
        back: [N], where each slot stands among these.
    """

    seen: torch.Tensor
    real: torch.Tensor
    number: torch.Tensor
    part: torch.Tensor
    start: torch.Tensor
    slot: torch.Tensor
    back: torch.Tensor


@lru_cache(maxsize=4)
def _cuts(tokens: int, size: int, leaf: int, device: torch.device) -> list[_Cut]:
    found = []
    for starts, sizes in split_levels(tokens, size, leaf)[0]:
        start, length = torch.tensor(starts), torch.tensor(sizes)
        seen = length.clamp(max=SPLIT_SAMPLE)[:, None]
        place = torch.arange(min(SPLIT_SAMPLE, max(sizes)))
        at = torch.minimum((2 * place + 1) * length[:, None] // (2 * seen), length[:, None] - 1)
        part, within = torch.repeat_interleave(length), torch.arange(max(sizes))
        slot = start[:, None] + within
        slot = torch.where(within < length[:, None], slot, tokens)
        back = part * max(sizes) + torch.arange(tokens) - start[part]
        real = (place < seen).float()[..., None]
        cut = _Cut(start[:, None] + at, real, seen[..., None].float(), part, start, slot, back)
        found.append(_Cut(*(x.to(device) for x in cut)))
    return found


@lru_cache(maxsize=64)
def split_levels(
    tokens: int, size: int, leaf: int = 0
) -> tuple[list[tuple[list[int], list[int]]], list[int]]:
    """Return the first slots and sizes of the parts to cut at each level, and the final sizes."""
    levels, sizes, leaf = [], [tokens], leaf or size
    while max(sizes) > leaf:
        levels.append(([0, *accumulate(sizes[:-1])], sizes))
        cut: list[int] = []
        for length in sizes:
            unit = size if length > size else leaf
            left = (length + unit) // (2 * unit) * unit
            cut += [length] if length <= leaf else [left, length - left]
        sizes = cut
    return levels, sizes
