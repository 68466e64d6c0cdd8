"""SVG2: k-means, the choice of clusters, layouts in tiles, memory from step to step."""

import math
from dataclasses import replace

import pytest
import torch

from dittools.call import AttentionCall
from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.kernels.auto import AutoBackend
from dittools.kernels.reference import ReferenceBackend
from dittools.mask import BlockMask
from dittools.methods import preset
from dittools.methods.kmeans import (
    _DISTANCES,
    Clusters,
    cluster_sums,
    drawn_tokens,
    kmeans,
    nearest,
    nearest_two,
    sorted_sums,
)
from dittools.methods.svg2 import SVG2, kept_clusters, lay_out
from dittools.patches.meter import Meter
from dittools.patches.timing import Stopwatch

SMALL = {"least_queries": 24, "least_keys": 9, "block_size": 16, "key_block": 8}
GRIDS = [TokenGrid(4, 6, 7), TokenGrid(3, 7, 9, 5, 6), TokenGrid(1, 9, 11, 3, 0)]


def random_call(grid: TokenGrid, batch: int = 1, heads: int = 3) -> AttentionCall:
    return AttentionCall(*(torch.randn(batch, grid.total, heads, 16) for _ in range(3)), grid)


class Recorder(ReferenceBackend):
    """The reference, which also keeps the masks it was given."""

    def __init__(self) -> None:
        self.masks: list[BlockMask] = []

    def block_sparse(self, call: AttentionCall, mask: BlockMask, *, return_lse: bool = False):
        self.masks.append(mask)
        return super().block_sparse(call, mask, return_lse=return_lse)


def pairs_by_definition(call: AttentionCall, method: SVG2) -> torch.Tensor:
    """bool [H, S, S]: the kept cluster pairs spread to their tokens; text dense."""
    grid = call.grid
    queries, keys = method.clusters(replace(call, memory={}))
    kept = kept_clusters(queries, keys, call.softmax_scale, method.mass, method.least_kept)
    video = slice(grid.text_before, grid.text_before + grid.tokens)
    allowed = torch.ones((call.head_count, grid.total, grid.total), dtype=torch.bool)
    for head in range(call.head_count):
        pairs = kept[head][queries.labels[head]][:, keys.labels[head]]
        allowed[head, video, video] = pairs
    return allowed


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("mass", [0.4, 0.8])
def test_is_the_masked_softmax_over_kept_cluster_pairs(grid: TokenGrid, mass: float) -> None:
    call, method = random_call(grid), SVG2(mass=mass, **SMALL)
    allowed = pairs_by_definition(call, method)
    assert 0.1 < float(allowed.float().mean()) < 0.95
    backend = Recorder()
    out = method.attend(call, backend)
    q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed[None])
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=3e-6, rtol=1e-5)
    mask = backend.masks[0]
    found = mask.head_density() * mask.q_tokens * mask.kv_tokens
    assert found.tolist() == pytest.approx(allowed.sum((1, 2)).tolist(), rel=1e-9)


def test_the_report_counts_the_kept_pairs_and_the_fast_kernel_agrees() -> None:
    grid = TokenGrid(6, 12, 12, 0, 9)
    call, method = random_call(grid), SVG2(mass=0.4, **SMALL)
    exact = method.attend(replace(call, memory={}), ReferenceBackend())
    backend = AutoBackend()
    meter = Meter(backend, call, lambda: backend.dense(call), Stopwatch())
    torch.testing.assert_close(method.attend(call, meter), exact, atol=3e-6, rtol=1e-5)
    assert meter.was_sparse
    share = pairs_by_definition(call, method).double().mean()
    assert float(meter.density(call)) == pytest.approx(float(share), rel=1e-6)


def test_the_heaviest_clusters_are_kept_until_their_sum_passes_the_mass() -> None:
    chance = torch.tensor([0.15, 0.5, 0.05, 0.3], dtype=torch.float64)
    sizes = torch.tensor([[3, 10, 1, 6]])
    keys = Clusters(sizes[:, :0], sizes, torch.eye(4, dtype=torch.float64)[None], 1)
    # scores that, weighed by the sizes, give exactly these chances
    query = (chance / sizes[0]).log()[None, None]
    queries = Clusters(sizes[:, :0], sizes[:, :1], query, 1)

    def kept(mass: float, least: float = 0.0) -> list[int]:
        return kept_clusters(queries, keys, 1.0, mass, least)[0, 0].nonzero().flatten().tolist()

    assert [kept(p) for p in (0.49, 0.51, 0.9, 0.96)] == [[1], [1, 3], [0, 1, 3], [0, 1, 2, 3]]
    assert kept(0.1, least=0.75) == [0, 1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_that_is_the_mass_exactly_has_not_passed_it(dtype: torch.dtype) -> None:
    """Cumulative > p removes what follows: p = 1/2 of (1/2, 3/10, ...) keeps two."""
    sizes = torch.tensor([[10, 6, 3, 1]])
    keys = Clusters(sizes[:, :0], sizes, torch.zeros(1, 4, 2, dtype=dtype), 1)
    queries = Clusters(sizes[:, :0], sizes[:, :1], torch.zeros(1, 1, 2, dtype=dtype), 1)
    counts = [int(kept_clusters(queries, keys, 1.0, p, 0.0).sum()) for p in (0.49, 0.5, 0.9, 0.96)]
    assert counts == [1, 2, 3, 4]
    for count in (6, 10, 12):  # equal shares: p = i shares keeps one more
        alike = torch.zeros(1, count, 2, dtype=dtype)
        even = Clusters(sizes[:, :0], torch.full((1, count), 7), alike, 1)
        reached = torch.full((count,), 1 / count, dtype=dtype).cumsum(0)
        for place in range(count - 1):
            kept = kept_clusters(queries, even, 1.0, float(reached[place]), 0.0)
            assert int(kept.sum()) == place + 2


def test_weighing_by_size_is_the_true_mass_when_clusters_are_constant() -> None:
    q, centres = torch.randn(1, 1, 8, dtype=torch.float64), torch.randn(1, 5, 8).double()
    sizes = torch.tensor([[1, 9, 4, 2, 7]])
    tokens = centres[0].repeat_interleave(sizes[0], dim=0)
    weights = torch.softmax(q[0] @ tokens.t() * 0.3, dim=-1)[0]
    mass = torch.stack([part.sum() for part in weights.split(sizes[0].tolist())])
    keys, queries = Clusters(sizes, sizes, centres, 1), Clusters(sizes, sizes[:, :1], q, 1)
    order = mass.argsort(descending=True)
    for count in range(1, 5):  # just under what `count` clusters hold: exactly those are kept
        kept = kept_clusters(queries, keys, 0.3, float(mass[order[:count]].sum()) - 1e-9, 0.0)
        assert kept[0, 0].nonzero().flatten().tolist() == sorted(order[:count].tolist())


def test_kmeans_finds_separate_clusters_and_its_means_are_means() -> None:
    centre = torch.randn(2, 6, 8) * 20
    true = torch.arange(120) % 6
    points = centre[:, true] + torch.randn(2, 120, 8) * 0.1
    found = kmeans(points, points[:, :6], 50)
    assert torch.equal(found.labels, true.expand(2, -1))
    assert found.sizes.tolist() == [[20] * 6] * 2
    assert found.iterations == 2  # the second round changes nothing
    for cluster in range(6):
        mean = points[:, true == cluster].mean(1)
        torch.testing.assert_close(found.centroids[:, cluster], mean)


def test_each_round_assigns_to_the_nearest_and_lowers_the_spread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points, start = torch.randn(2, 200, 6), torch.randn(2, 11, 6)
    distance = torch.cdist(points, start)
    assert torch.equal(nearest(points, start), distance.argmin(-1))
    monkeypatch.setitem(_DISTANCES, True, 64)
    assert torch.equal(nearest(points, start), distance.argmin(-1))

    def spread(rounds: int) -> float:
        found = kmeans(points, start, rounds)
        held = found.centroids.gather(1, found.labels[..., None].expand(-1, -1, 6))
        return float((points - held).square().sum())

    spreads = [spread(rounds) for rounds in (1, 2, 4, 8)]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[0] > spreads[-1]


@pytest.mark.parametrize("kind", ["apart", "walk", "ties", "equal"])
def test_remembered_searches_find_what_full_ones_do(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    points = torch.randn(3, 600, 4, dtype=torch.float64)
    points = {"walk": points.cumsum(1), "ties": points.round()}.get(kind, points)
    start = drawn_tokens(points, 60, 1)
    if kind == "equal":
        start[:, 1] = start[:, 0]
    seen = []
    monkeypatch.setattr(
        "dittools.methods.kmeans.nearest_two",
        lambda x, c, second=True: seen.append(x.shape[1] * c.shape[1]) or nearest_two(x, c, second),
    )
    found = kmeans(points, start, 40)
    assert found.iterations > 4
    assert min(seen) < 600 * 60 / 4  # late rounds look at few pairs
    monkeypatch.setattr("dittools.methods.kmeans._MANY", 99)
    whole = kmeans(points, start, 40)
    assert torch.equal(found.labels, whole.labels)
    assert torch.equal(found.sizes, whole.sizes)
    assert found.iterations == whole.iterations


def test_points_that_are_no_numbers_still_have_a_label() -> None:
    points = torch.randn(2, 90, 8)
    points[0, 3], points[1, 5] = float("inf"), float("nan")
    assert kmeans(points, points[:, 6:56], 6).labels.amax() < 50


def test_an_empty_cluster_stays_where_it_was() -> None:
    points = torch.randn(1, 30, 4)
    start = torch.cat((points[:, :2], torch.full((1, 1, 4), 100.0)), dim=1)
    found = kmeans(points, start, 3)
    assert found.sizes[0, 2] == 0
    assert torch.equal(found.centroids[0, 2], start[0, 2])
    labels = torch.randint(0, 5, (2, 50))
    labels[labels == 3] = 2
    rows = torch.randn(2, 50, 4)
    sums, sizes = cluster_sums(rows, labels, 5)
    flat = (labels + torch.tensor([[0], [5]])).flatten()
    repeatable = sorted_sums(rows.reshape(-1, 4), flat, sizes.flatten())
    torch.testing.assert_close(repeatable.view(2, 5, 4), sums)
    assert sizes[:, 3].tolist() == [0, 0]


def test_a_layout_holds_every_token_once_group_after_group() -> None:
    labels = torch.randint(0, 5, (2, 61))
    labels[0, labels[0] == 1] = 4
    sizes = torch.stack([torch.bincount(row, minlength=6) for row in labels])
    found = lay_out((labels, sizes), 8)
    assert torch.equal(found.token.gather(1, found.slot), torch.arange(61).expand(2, -1))
    assert found.filled.sum(1).tolist() == [61, 61]
    tiles = [sum(math.ceil(s / 8) for s in row) for row in sizes.tolist()]
    assert found.token.shape[1] == max(tiles) * 8
    for head in range(2):
        assert len(found.slot[head].unique()) == 61
        assert torch.equal(found.group[head, found.slot[head] // 8], labels[head])
        assert bool((found.slot[head] % 8 < found.filled[head, found.slot[head] // 8]).all())


def test_whole_mass_is_dense_and_padded_text_stays_out() -> None:
    grid = TokenGrid(4, 6, 7, 0, 8)
    call = random_call(grid, batch=2)
    backend = ReferenceBackend()
    assert torch.equal(SVG2(mass=1.0).attend(call, backend), backend.dense(call))
    kept = torch.ones((2, grid.total), dtype=torch.bool)
    kept[:, -5:] = False
    value = call.value.clone()
    value[:, -5:] = 1e4
    method = SVG2(mass=0.5, **SMALL)
    clean, spoilt = (
        method.attend(replace(call, value=v, key_mask=kept, memory={}), backend)
        for v in (call.value, value)
    )
    assert torch.equal(clean, spoilt)


def test_items_of_a_batch_do_not_know_each_other() -> None:
    call, method = random_call(GRIDS[1], batch=2), SVG2(mass=0.5, **SMALL)
    both = method.attend(call, ReferenceBackend())
    parts = (x[1:] for x in (call.query, call.key, call.value))
    alone = method.attend(AttentionCall(*parts, GRIDS[1]), ReferenceBackend())
    torch.testing.assert_close(both[1:], alone, atol=1e-6, rtol=0)


def test_centroids_are_kept_per_memory_and_refined_in_two_rounds() -> None:
    grid = TokenGrid(5, 9, 8)
    params = {"mass": 0.5, "first_sample": 0, **SMALL}
    call, method = random_call(grid), SVG2(first_rounds=3, **params)
    first = method.clusters(call)
    assert first[0].iterations == 3
    again = method.clusters(call)
    assert again[0].iterations == 2
    by_hand = kmeans(call.key[0].transpose(0, 1), first[1].centroids, 2)
    assert torch.equal(again[1].labels, by_hand.labels)
    torch.testing.assert_close(again[1].centroids, by_hand.centroids)
    other = TokenGrid(5, 8, 9)  # as many tokens, another shape
    assert method.clusters(replace(call, grid=other))[0].iterations == 3
    assert method.clusters(replace(call, memory={}))[0].iterations == 3
    assert SVG2(first_rounds=4, **params).clusters(call)[0].iterations == 4


def test_first_rounds_look_at_a_part_and_end_on_all_tokens() -> None:
    call = random_call(TokenGrid(8, 12, 12), heads=2)
    params = {"mass": 0.5, "first_rounds": 12, "least_queries": 96, "least_keys": 64}
    queries, keys = SVG2(first_sample=4, **params).clusters(replace(call, memory={}))
    points = call.key[0].transpose(0, 1)
    drawn = drawn_tokens(points, 18, 0)
    start = kmeans(drawn_tokens(points, 72, 0), drawn, 10).centroids
    by_hand = kmeans(points, start, 2)
    assert torch.equal(keys.labels, by_hand.labels)
    assert queries.sizes.sum(1).tolist() == keys.sizes.sum(1).tolist() == [1152, 1152]
    for every in (0, 64):
        _, whole = SVG2(first_sample=every, **params).clusters(replace(call, memory={}))
        assert torch.equal(whole.labels, kmeans(points, drawn, 12).labels)


def test_seeds_repeat_and_leave_the_global_numbers_alone() -> None:
    points = torch.randn(2, 90, 4)
    state = torch.get_rng_state()
    assert torch.equal(drawn_tokens(points, 9, 5), drawn_tokens(points, 9, 5))
    assert not torch.equal(drawn_tokens(points, 9, 5), drawn_tokens(points, 9, 6))
    assert len(drawn_tokens(points, 90, 0)[0].unique(dim=0)) == 90
    assert torch.equal(torch.get_rng_state(), state)


def test_large_half_precision_inputs_stay_finite() -> None:
    grid = TokenGrid(4, 8, 8, 0, 5)
    q, k, v = ((torch.randn(1, grid.total, 2, 8) * 40).bfloat16() for _ in range(3))
    call = AttentionCall(q, k, v, grid)
    out = SVG2(**SMALL).attend(call, ReferenceBackend())
    assert out.dtype == torch.bfloat16
    assert bool(out.isfinite().all())
    stored = next(iter(call.memory.values()))
    assert {part.dtype for part in stored} == {torch.bfloat16}


def test_published_sizes_get_the_published_clusters() -> None:
    wan, hunyuan = preset("svg2", "wan"), preset("svg2", "hunyuan_video")
    assert (wan.dense_steps, wan.dense_layers) == (0.2, 1)
    assert (hunyuan.dense_steps, hunyuan.dense_layers) == (0.1, 1)
    for method, tokens, expected in (
        (wan.method, 21 * 45 * 80, (300, 1000)),
        (hunyuan.method, 33 * 45 * 80, (400, 1000)),
        (wan.method, 21 * 30 * 52, (131, 436)),
    ):
        assert isinstance(method, SVG2)
        assert (method.mass, method.least_kept, method.first_rounds, method.rounds) == (
            0.9, 0.1, 50, 2,
        )  # fmt: skip
        counts = (
            min(method.q_clusters, tokens // method.least_queries),
            min(method.k_clusters, tokens // method.least_keys),
        )
        assert counts == expected


@pytest.mark.parametrize("params", [{"mass": 0.0}, {"rounds": 0}, {"least_kept": 1.5}])
def test_bad_parameters_are_refused_by_name(params: dict) -> None:
    with pytest.raises(InputError, match=f"svg2: {next(iter(params))} is not usable; expected"):
        SVG2(**params)
