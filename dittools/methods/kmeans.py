"""k-means of many heads at once: assign every token to its nearest centroid, move the centroids.

Source: the Euclidean k-means of svg-project/Sparse-VideoGen. Differences: the first centroids are
drawn from a generator of our own, without repeats, the same tokens for every head.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

_DISTANCES = 2**17  # token-centroid distances of one head held at a time; fits a cache
EXACTLY = 1e-30  # as a tolerance: stop when further rounds would change nothing, in any head


class Clusters(NamedTuple):
    """A partition of the tokens of every head.

    Attributes:
        labels: int64 [H, N], the cluster of each token.
        sizes: int64 [H, K], tokens per cluster; some may be empty.
        centroids: [H, K, D], mean of each cluster; an empty one keeps where it was.
        iterations: rounds that were run.
    """

    labels: torch.Tensor
    sizes: torch.Tensor
    centroids: torch.Tensor
    iterations: int


def drawn_tokens(points: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Return [H, count, D]: tokens of [H, N, D] drawn by lot, the same places in every head.

    More of them are the same and others.
    """
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(points.shape[1], generator=generator)[:count].sort().values
    return points.index_select(1, picked.to(points.device))


def kmeans(
    points: torch.Tensor,
    centroids: torch.Tensor,
    iterations: int,
    tolerance: float = 1e-4,
    of_all_heads: Callable[[torch.Tensor], torch.Tensor] = lambda shift: shift,
) -> Clusters:
    """Return the clusters after so many rounds, or when no centroid moves by `tolerance` any more.

    Args:
        points: float32 or float64 [H, N, D].
        centroids: [H, K, D] to start from.
        iterations: rounds of assigning and moving, at least 1.
        tolerance: Euclidean distance.
        of_all_heads: takes float [H] to those of all heads, where other processes hold some.
    """
    for done in range(1, iterations + 1):
        labels = nearest(points, centroids)
        sums, sizes = cluster_sums(points, labels, centroids.shape[1])
        means = sums / sizes.clamp(min=1)[..., None].to(sums.dtype)
        moved = torch.where(sizes[..., None] > 0, means, centroids)
        shift = of_all_heads((moved - centroids).norm(dim=-1).amax(-1)).max()
        centroids = moved
        if done < iterations and float(shift) < tolerance:
            break
    return Clusters(labels, sizes, centroids, done)


def nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return int64 [H, N]: the centroid nearest to each point, in pieces of bounded size."""
    count = centroids.shape[1]
    half = centroids.square().sum(-1)[:, None] / 2  # |x - c|^2 / 2 less |x|^2 / 2
    turned = centroids.transpose(1, 2).contiguous()
    step = max(1, _DISTANCES // count)
    found = []
    for part in points.split(step, dim=1):
        # min is measured to run at twice the speed of argmin on a CPU
        found.append(torch.baddbmm(half, part, turned, alpha=-1).min(-1).indices)
    return torch.cat(found, dim=1)


def cluster_sums(
    points: torch.Tensor, labels: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum [H, count, D] and the int64 number [H, count] of the points of each label."""
    heads, _, width = points.shape
    flat = (labels + torch.arange(heads, device=labels.device)[:, None] * count).flatten()
    sizes = torch.bincount(flat, minlength=heads * count)
    rows = points.reshape(-1, width)
    if points.device.type == "cpu":
        sums = rows.new_zeros((heads * count, width)).index_add_(0, flat, rows)
    else:
        sums = sorted_sums(rows, flat, sizes)
    return sums.view(heads, count, width), sizes.view(heads, count)


def sorted_sums(rows: torch.Tensor, labels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Return [labels, D]: the sums of rows of one label, the same bits every time on a GPU.

    Adding rows one by one would go in the order threads happen to run.
    """
    ordered = rows.index_select(0, labels.argsort(stable=True))
    sums: torch.Tensor = torch.segment_reduce(ordered, "sum", lengths=sizes, axis=0)
    return sums


def most_alike(points: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Return int64 [H, N]: the direction of [H, K, D] with the largest product with each point."""
    turned = directions.transpose(1, 2).contiguous()
    step = max(1, _DISTANCES // directions.shape[1])
    found = [torch.bmm(part, turned).neg_().min(-1).indices for part in points.split(step, dim=1)]
    return torch.cat(found, dim=1)


def sampled_start(
    points: torch.Tensor, count: int, seed: int, before: int, sample: int
) -> torch.Tensor:
    """Return [H, count, D]: centroids to start from, after rounds over a sample of the tokens.

    Args:
        points: float32 or float64 [H, N, D].
        count: centroids.
        seed: start of the random numbers.
        before: rounds over the sample; none leaves the tokens that were drawn.
        sample: tokens in the sample.
    """
    drawn = drawn_tokens(points, count, seed)
    if before < 1 or not count <= sample:
        return drawn
    return kmeans(drawn_tokens(points, sample, seed), drawn, before, EXACTLY).centroids
