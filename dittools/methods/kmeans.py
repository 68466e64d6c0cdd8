"""k-means of many heads at once: assign every token to its nearest centroid, move the centroids.

Source: the Euclidean k-means of svg-project/Sparse-VideoGen. Differences: the first centroids are
drawn from a generator of our own, without repeats, the same tokens for every head.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from dittools.methods.placing import label_counts, sent

# token-centroid distances of one head held at a time, on a CPU those that fit its cache, elsewhere
_DISTANCES = {True: 2**17, False: 2**22}
_MANY = 4  # rounds from which on searches are remembered
_FEW = 0.7  # share of moved centroids up to which the others are passed over
_GROUP = 16  # centroids whose distances are first compared with each other
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
    return points.index_select(1, sent(picked, points.device))


@torch.no_grad()
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
    found: Found | None = None
    changed: torch.Tensor | None = None
    for done in range(1, iterations + 1):
        if iterations < _MANY:
            labels = nearest(points, centroids)
        else:
            found = search(points, centroids, found, changed)
            labels = found.labels
        sums, sizes = cluster_sums(points, labels, centroids.shape[1])
        means = sums / sizes.clamp(min=1)[..., None].to(sums.dtype)
        moved = torch.where(sizes[..., None] > 0, means, centroids)
        shift = of_all_heads((moved - centroids).norm(dim=-1).amax(-1)).max()
        changed, centroids = (moved != centroids).any(-1), moved
        if done < iterations and float(shift) < tolerance:
            break
    return Clusters(labels, sizes, centroids, done)


class Found(NamedTuple):
    """What a search for the nearest centroids found, to be remembered for the next one.

    Attributes:
        labels: int64 [H, N], the nearest centroid of each point.
        least: [H, N], its distance as `nearest_two` gives it.
        others: [H, N], no other centroid is nearer than this.
    """

    labels: torch.Tensor
    least: torch.Tensor
    others: torch.Tensor


def search(
    points: torch.Tensor,
    centroids: torch.Tensor,
    before: Found | None,
    changed: torch.Tensor | None,
) -> Found:
    """Return what `nearest` finds, looking only at what may have changed since the last search.

    A centroid that stands where it stood is no nearer than the second nearest was. So where a point
    is nearer to its own centroid, or to one that moved, than that, the answer is among these. The
    other points are compared with all centroids.

    Args:
        points: [H, N, D].
        centroids: [H, K, D].
        before: of the last search among the same points; None for the first.
        changed: bool [H, K], the centroids that moved since.
    """
    if before is None or changed is None:
        return Found(*nearest_two(points, centroids))
    some = _marked(changed)
    if some.shape[1] > _FEW * centroids.shape[1]:
        return Found(*nearest_two(points, centroids))
    if some.shape[1] == 0:
        return before
    index, least, next_ = nearest_two(points, _picked(centroids, some))
    index = some.gather(1, index)
    looked = torch.zeros_like(changed).scatter_(1, some, True).gather(1, before.labels)
    own = before.least.masked_fill(looked, float("inf"))
    stays = (own < least) | ((own == least) & (before.labels < index))
    found = Found(
        torch.where(stays, before.labels, index),
        torch.minimum(own, least),
        torch.minimum(torch.minimum(before.others, next_), torch.maximum(own, least)),
    )
    unsure = _marked(~(found.least < before.others))
    if unsure.shape[1]:
        again = nearest_two(_picked(points, unsure), centroids)
        for target, source in zip(found, again, strict=True):
            target.scatter_(1, unsure, source)
    return found


def _marked(chosen: torch.Tensor) -> torch.Tensor:
    """Return int64 [H, n]: the true places of bool [H, N] in order, filled up with others."""
    most = int(chosen.sum(1).max())
    return (
        chosen.to(torch.uint8)
        .sort(dim=1, descending=True, stable=True)
        .indices[:, :most]
        .sort(1)
        .values
    )


def _picked(rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Return [H, n, D]: of [H, N, D], the rows at int64 [H, n]."""
    return rows.gather(1, place[..., None].expand(-1, -1, rows.shape[2]))


def nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return int64 [H, N]: the centroid nearest to each point, in pieces of bounded size.

    Args:
        points: [H, N, D], strided as it likes.
        centroids: [H, K, D], float32 or float64.
    """
    return nearest_two(points, centroids, False)[0]


@torch.no_grad()
def nearest_two(
    points: torch.Tensor, centroids: torch.Tensor, second: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return [H, N] three times: the nearest centroid, its distance, that of the second nearest.

    Distances are |x - c|^2 / 2 less |x|^2 / 2. Points stand along rows and centroids in groups, so
    that the least of a group comes from elementwise minima; with its members side by side it is
    then found in a column, and of equal ones the first, as in a search through all of them.

    Args:
        points: [H, N, D], strided as it likes.
        centroids: [H, K, D], float32 or float64.
        second: whether the second nearest is asked for; otherwise its distance is the nearest's.
    """
    (heads, tokens, width), count = points.shape, centroids.shape[1]
    group = _GROUP if count > 2 * _GROUP else 1
    rows = -(-count // group) * group
    # c.x with one more channel, in which x is 1 and c is half its squared length
    turned = centroids.new_zeros((heads, rows, width + 1))
    turned[:, :count, :width] = -centroids
    turned[:, :count, width] = centroids.square().sum(-1) / 2
    turned[:, count:, width] = float("inf")
    step = min(tokens, max(1, _DISTANCES[points.device.type == "cpu"] // rows))
    index = torch.empty((heads, tokens), dtype=torch.long, device=points.device)
    least, next_ = (centroids.new_empty((heads, tokens)) for _ in range(2))
    wide, room = centroids.new_ones((heads, step, width + 1)), heads * rows * step
    held = centroids.new_empty(room)
    for first in range(0, tokens, step):
        part = slice(first, min(first + step, tokens))
        size = part.stop - first
        wide[:, :size, :width] = points[:, part]
        distance = held[: heads * rows * size].view(heads, rows, size)
        torch.bmm(turned, wide[:, :size].transpose(1, 2), out=distance)
        if group == 1:
            best = distance.min(1, keepdim=True)
            index[:, part], least[:, part] = best.indices[:, 0], best.values[:, 0]
            if second:
                next_[:, part] = distance.scatter_(1, best.indices, float("inf")).amin(1)
            continue
        groups = distance.view(heads, -1, group, size)
        of_groups = groups.amin(2)
        best = of_groups.min(1, keepdim=True)
        place = best.indices[:, :, None].expand(-1, -1, group, -1)
        inside = groups.gather(1, place)[:, 0]
        within = inside.min(1, keepdim=True)
        torch.add(within.indices[:, 0], best.indices[:, 0], alpha=group, out=index[:, part])
        least[:, part] = within.values[:, 0]
        if second:
            of_groups.scatter_(1, best.indices, float("inf"))
            inside.scatter_(1, within.indices, float("inf"))
            next_[:, part] = torch.minimum(of_groups.amin(1), inside.amin(1))
    index.clamp_(max=count - 1)  # a point that is no number
    return index, least, next_ if second else least


def cluster_sums(
    points: torch.Tensor, labels: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum [H, count, D] and the int64 number [H, count] of the points of each label."""
    heads, _, width = points.shape
    flat = labels + torch.arange(heads, device=labels.device)[:, None] * count
    if points.device.type == "cpu" and points.transpose(0, 1).is_contiguous():
        flat, rows = flat.t().flatten(), points.transpose(0, 1).reshape(-1, width)
    else:
        flat, rows = flat.flatten(), points.reshape(-1, width)
    sizes = label_counts(flat, heads * count)
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
    sums: torch.Tensor = torch.segment_reduce(ordered, "sum", lengths=sizes, axis=0, unsafe=True)
    return sums


def most_alike(points: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Return int64 [H, N]: the direction of [H, K, D] with the largest product with each point."""
    turned = directions.transpose(1, 2).contiguous()
    step = max(1, _DISTANCES[points.device.type == "cpu"] // directions.shape[1])
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
