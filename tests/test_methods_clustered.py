"""Clustered attention: what its publications' formulas imply, part by part and together."""

import copy
import warnings
from dataclasses import replace
from math import ceil
from typing import Any

import pytest
import torch

from dittools.call import AttentionCall
from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.kernels.auto import AutoBackend
from dittools.kernels.reference import ReferenceBackend
from dittools.mask import BlockMask
from dittools.methods import build, preset
from dittools.methods.cluster_layout import Groups, group_means, key_tiles, laid_out
from dittools.methods.cluster_mending import group_rows, mend
from dittools.methods.clustered import Clustered
from dittools.methods.kmeans import cluster_sums, drawn_tokens
from dittools.methods.mass_profile import floors, mass_density
from dittools.methods.partition import (
    Effort,
    equal_split,
    metric_factor,
    nearest_profile,
    profile_labels,
    split_order,
)
from dittools.methods.repair import fit_repair
from dittools.patches.meter import Meter
from dittools.patches.timing import Stopwatch

BACKEND = ReferenceBackend()
SMALL: dict[str, Any] = {
    "least_queries": 24,
    "least_keys": 9,
    "block_size": 16,
    "key_block": 8,
    "probes": 0,
}
GRIDS = [TokenGrid(4, 6, 7), TokenGrid(3, 7, 9, 5, 6), TokenGrid(1, 9, 11, 3, 0)]
PARTITIONS = ["kmeans", "response", "profile", "split"]


def random_call(
    grid: TokenGrid, batch: int = 1, heads: int = 3, width: int = 16, **how: Any
) -> AttentionCall:
    q, k, v = (torch.randn(batch, grid.total, heads, width) for _ in range(3))
    return AttentionCall(q, k, v, grid, **how)


class Recorder(ReferenceBackend):
    """The reference, which also keeps the masks it was given."""

    def __init__(self) -> None:
        self.masks: list[BlockMask] = []

    def block_sparse(self, call: AttentionCall, mask: BlockMask, *, return_lse: bool = False):
        self.masks.append(mask)
        return super().block_sparse(call, mask, return_lse=return_lse)


def chosen(method: Clustered, call: AttentionCall) -> tuple[Groups, torch.Tensor]:
    """The groups and bool [H, query groups, key groups] of a first call."""
    fresh = replace(call, memory={})
    groups = method.groups(fresh)
    return groups, method.kept(fresh, groups, key_tiles(call, groups, method.key_block))


def by_definition(
    call: AttentionCall, groups: Groups, kept: torch.Tensor, pooled: bool
) -> torch.Tensor:
    """[1, S, H, D] in float64: one softmax over exact keys and the means of skipped groups."""
    grid = call.grid
    video = slice(grid.text_before, grid.text_before + grid.tokens)
    q, k, v = (x[0].transpose(0, 1).double() for x in (call.query, call.key, call.value))
    bias = torch.zeros(len(q), grid.total, dtype=torch.float64)
    own = call.additive_mask()
    if own is not None:
        bias = bias + own[0].double()
    out = torch.empty_like(q)
    for head in range(len(q)):
        ql, kl = groups.query_labels[head], groups.key_labels[head]
        scores = q[head] @ k[head].t() * call.softmax_scale + bias[head]
        seen = torch.ones(grid.total, grid.total, dtype=torch.bool)
        seen[video, video] = kept[head][ql][:, kl]
        scores = scores.masked_fill(~seen, float("-inf"))
        value = v[head]
        if pooled:
            means, values, weights = [], [], []
            for group in range(kept.shape[2]):
                each = bias[head, video][kl == group].exp()
                total = each.sum()
                means.append((each[:, None] * k[head, video][kl == group]).sum(0) / total)
                values.append((each[:, None] * v[head, video][kl == group]).sum(0) / total)
                weights.append(total)
            count = torch.stack(weights)
            behind = q[head] @ torch.stack(means).nan_to_num().t() * call.softmax_scale
            skipped = torch.zeros(grid.total, len(count), dtype=torch.bool)
            skipped[video] = ~kept[head][ql] & (count > 0)
            behind = (behind + count.log()).masked_fill(~skipped, float("-inf"))
            scores = torch.cat((scores, behind), dim=1)
            value = torch.cat((value, torch.stack(values).nan_to_num()))
        out[head] = scores.softmax(-1) @ value
    return out.transpose(0, 1)[None].float()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("skipped", ["pooled", "drop"])
def test_is_one_softmax_over_kept_groups_and_the_means_of_others(
    grid: TokenGrid, partition: str, skipped: str
) -> None:
    call = random_call(grid)
    method = Clustered(partition=partition, density=0.4, skipped=skipped, **SMALL)
    groups, kept = chosen(method, call)
    assert 0.1 < float(kept.float().mean()) < 0.9
    backend = Recorder()
    out = method.attend(call, backend)
    expected = by_definition(call, groups, kept, skipped == "pooled")
    torch.testing.assert_close(out, expected, atol=3e-6, rtol=1e-5)
    text = torch.ones(grid.total, dtype=torch.bool)
    text[grid.text_before : grid.total - grid.text_after] = False
    torch.testing.assert_close(out[:, text], BACKEND.dense(call)[:, text], atol=3e-6, rtol=1e-5)


def test_the_report_counts_the_pairs_and_the_fast_kernel_agrees() -> None:
    grid = TokenGrid(6, 12, 12, 0, 9)
    call, method = random_call(grid), Clustered(density=0.3, **SMALL)
    exact = method.attend(replace(call, memory={}), BACKEND)
    backend = AutoBackend()
    meter = Meter(backend, call, lambda: backend.dense(call), Stopwatch())
    torch.testing.assert_close(method.attend(call, meter), exact, atol=3e-6, rtol=1e-5)
    assert meter.was_sparse
    groups, kept = chosen(method, call)
    pairs = grid.total**2 - grid.tokens**2
    whole = 0.0
    for head in range(3):
        tokens = kept[head][groups.query_labels[head]]
        exactly = tokens[:, groups.key_labels[head]].sum()
        means = (~tokens & (groups.keys[head] > 0)).sum()
        whole += pairs + int(exactly) + int(means)
    assert float(meter.density(call)) == pytest.approx(whole / 3 / grid.total**2, rel=1e-6)


@pytest.mark.parametrize("skipped", ["pooled", "drop"])
@pytest.mark.parametrize("text", [(0, 0), (0, 7)])
def test_everything_exact_is_dense(skipped: str, text: tuple[int, int]) -> None:
    call = random_call(TokenGrid(3, 7, 9, *text))
    for given in ({"density": 1.0}, {"mass": 1.0}, {"least_kept": 1.0}):
        out = Clustered(skipped=skipped, **{**SMALL, **given}).attend(call, BACKEND)
        torch.testing.assert_close(out, BACKEND.dense(call), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.6])
def test_keys_equal_within_each_group_lose_nothing_at_any_density(density: float) -> None:
    """Values may differ: their mean is what equal keys weigh them to."""
    grid = TokenGrid(3, 8, 10, 0, 4)
    kinds = torch.randn(1, 24, 3, 16) * 2
    call = random_call(grid)
    place = torch.randperm(grid.total) % 24
    call = replace(call, key=kinds[:, place])
    method = Clustered(density=density, k_clusters=24, **{**SMALL, "least_keys": 10})
    state: dict[str, Any] = {}
    # start from the kinds themselves, so that the groups are theirs
    method.attend(replace(call, memory=state), BACKEND)
    for held in state.values():
        held["means"] = (held["means"][0], kinds[0].transpose(0, 1).contiguous())
    out = method.attend(replace(call, memory=state, step=1), BACKEND)
    torch.testing.assert_close(out, BACKEND.dense(call), atol=5e-6, rtol=1e-4)


def laid_run(
    call: AttentionCall, groups: Groups, kept: torch.Tensor, pooled: bool = True
) -> torch.Tensor:
    """Groups and a choice given, through the layout and back."""
    laid = laid_out(call, groups, key_tiles(call, groups, 8), kept, 16, pooled)
    out = BACKEND.block_sparse(laid.call, laid.mask)
    return out.gather(1, laid.slot.t()[None, :, :, None].expand_as(call.query))


def drawn_groups(call: AttentionCall, counts: tuple[int, int] = (7, 15)) -> Groups:
    labels = [torch.randint(0, n, (call.head_count, call.grid.tokens)) for n in counts]
    return group_means(call, (labels[0], labels[1]), counts)


@pytest.mark.parametrize("text", [(0, 0), (4, 9)])
def test_none_exact_is_attention_over_the_means_and_all_exact_is_dense(
    text: tuple[int, int],
) -> None:
    call = random_call(TokenGrid(3, 7, 9, *text))
    groups = drawn_groups(call)
    none = torch.zeros(3, 7, 15, dtype=torch.bool)
    out = laid_run(call, groups, none)
    torch.testing.assert_close(out, by_definition(call, groups, none, True), atol=3e-6, rtol=1e-5)
    if not sum(text):
        q = call.query[0].transpose(0, 1)
        scores = q @ groups.key.transpose(1, 2) * call.softmax_scale
        weights = (scores + groups.keys.float().log()[:, None]).softmax(-1)
        expected = (weights @ groups.value).transpose(0, 1)[None]
        torch.testing.assert_close(out, expected, atol=3e-6, rtol=1e-5)
    for pooled in (True, False):  # the round trip through the tiles of any labels
        whole = laid_run(call, groups, ~none, pooled)
        torch.testing.assert_close(whole, BACKEND.dense(call), atol=3e-6, rtol=1e-5)


def test_an_empty_group_weighs_nothing() -> None:
    call = random_call(TokenGrid(3, 7, 9, 0, 5))
    labels = torch.randint(0, 15, (3, 189)).masked_fill_(torch.rand(3, 189) < 0.2, 3)
    labels[:, :40] = 14
    labels[labels == 6] = 2  # nobody is left in 6
    groups = group_means(call, (torch.randint(0, 7, (3, 189)), labels), (7, 15))
    assert bool((groups.keys[:, 6] == 0).all())
    kept = torch.rand(3, 7, 15) < 0.3
    kept[:, :, 6] = False
    out = laid_run(call, groups, kept)
    torch.testing.assert_close(out, by_definition(call, groups, kept, True), atol=3e-6, rtol=1e-5)
    parts = {name: getattr(groups, name) for name in ("keys", "key", "value", "weight")}
    without = groups._replace(
        key_labels=labels - (labels > 6).long(),
        **{name: torch.cat((x[:, :6], x[:, 7:]), 1) for name, x in parts.items()},
    )
    fewer = torch.cat((kept[..., :6], kept[..., 7:]), dim=2)
    torch.testing.assert_close(laid_run(call, without, fewer), out, atol=3e-6, rtol=1e-5)


def test_a_group_split_into_two_of_equal_means_changes_nothing() -> None:
    call = random_call(TokenGrid(2, 8, 10))
    half = [x[:, :80] for x in (call.key, call.value)]
    call = replace(call, key=torch.cat((half[0],) * 2, 1), value=torch.cat((half[1],) * 2, 1))
    labels = torch.randint(0, 9, (3, 80)).repeat(1, 2)
    queries = torch.randint(0, 6, (3, 160))
    kept = torch.rand(3, 6, 9) < 0.4
    kept[:, 0, 4], kept[:, 1, 4] = True, False
    whole = laid_run(call, group_means(call, (queries, labels), (6, 9)), kept)
    labels = labels.clone()
    labels[:, 80:][labels[:, 80:] == 4] = 9
    parts = group_means(call, (queries, labels), (6, 10))
    torch.testing.assert_close(parts.key[:, 4], parts.key[:, 9])
    torch.testing.assert_close(
        laid_run(call, parts, torch.cat((kept, kept[..., 4:5]), 2)), whole, atol=3e-6, rtol=1e-5
    )


def test_dropped_and_biased_keys_weigh_as_the_call_says() -> None:
    grid = TokenGrid(3, 7, 9, 2, 6)
    call = random_call(grid)
    mask = torch.rand(1, grid.total) > 0.2
    mask[:, -4:] = False  # padded text
    bias = torch.randn(1, 3, grid.total)
    call = replace(call, key_mask=mask, key_bias=bias)
    method = Clustered(density=0.3, **SMALL)
    groups, kept = chosen(method, call)
    out = method.attend(call, BACKEND)
    torch.testing.assert_close(out, by_definition(call, groups, kept, True), atol=5e-6, rtol=1e-4)
    wild = [torch.where(mask[..., None, None], x, 1e4) for x in (call.key, call.value)]
    wild = replace(call, key=wild[0], value=wild[1], memory={})
    same = laid_run(wild, group_means(wild, groups[:2], kept.shape[1:]), kept)
    torch.testing.assert_close(same, laid_run(call, groups, kept), atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("score", ["error", "weight", "mass"])
@pytest.mark.parametrize(
    "budget",
    [
        {"density": 0.3},
        {"density": 0.3, "probes": 20},
        {"mass": 0.6, "least_budget": 0.2},
        {"mass": 0.1, "least_budget": 0.4},
    ],
    ids=str,
)
def test_exact_groups_fill_the_budget_and_pass_it_by_one_group_at_most(
    score: str, budget: dict[str, Any]
) -> None:
    call = random_call(TokenGrid(4, 8, 9))
    method = Clustered(score=score, least_kept=0.1, **{**SMALL, **budget})
    groups, kept = chosen(method, call)
    sizes = groups.keys[:, None].expand_as(kept)
    spent = (sizes * kept).sum(-1)
    scores = groups.query @ groups.key.transpose(1, 2) * call.softmax_scale
    chance = (scores + groups.keys.float().log()[:, None]).softmax(-1)
    order = chance.argsort(-1, descending=True)
    count = kept.shape[2]
    assert bool(kept.gather(-1, order[..., : max(1, int(0.1 * count))]).all())
    allowed = torch.full_like(spent, ceil(0.3 * 288) - budget.get("probes", 0))
    if "mass" in budget:
        before = chance.gather(-1, order).cumsum(-1) - chance.gather(-1, order)
        wanted = before <= budget["mass"]
        wanted[..., : int(budget["least_budget"] * count)] = True
        allowed = (sizes.gather(-1, order) * wanted).sum(-1)
    assert bool((spent >= allowed).all())
    assert bool((spent - sizes.masked_fill(~kept, 0).amax(-1) < allowed).all())
    assert not bool(kept.all())
    if score == "mass":  # the choice of SVG2, no group but the heaviest
        assert torch.equal(spent, allowed) or "density" in budget
        place = order.argsort(-1)
        assert bool((place.masked_fill(~kept, -1).amax(-1) + 1 == kept.sum(-1)).all())


def test_the_error_score_is_its_formula_for_every_pair_of_groups() -> None:
    call = random_call(TokenGrid(2, 7, 9, 0, 5))
    bias = torch.randn(1, 3, call.grid.total)
    for made in (call, replace(call, key_bias=bias)):
        groups = drawn_groups(made)
        line = torch.zeros(3, 126) if made is call else bias[0, :, :126]
        k, v = (x[0, :126].transpose(0, 1).double() for x in (made.key, made.value))
        q = groups.query.double() * made.softmax_scale
        weight = line.double().exp()
        exact = (q @ k.transpose(1, 2)).exp() * weight[:, None]
        own = groups.key_labels
        far = (q @ groups.key.double().transpose(1, 2)).exp()
        for score in ("error", "weight"):
            method = Clustered(score=score, **SMALL)
            found = method._worth(made, groups, key_tiles(made, groups, 8)) * groups.keys[:, None]
            expected = torch.zeros(3, 7, 15, dtype=torch.float64)
            for head in range(3):
                for group in range(15):
                    at = own[head] == group
                    each = exact[head][:, at, None] * v[head][at]
                    if score == "error":
                        mean = groups.value[head, group].double()
                        each = (
                            each - (far[head][:, group, None] * weight[head][at])[..., None] * mean
                        )
                    expected[head, :, group] = each.square().sum((1, 2))
            ratio = found.double() / expected
            scale = ratio.median(-1, keepdim=True).values  # each query has units of its own
            torch.testing.assert_close(found.double(), expected * scale, atol=0.0, rtol=2e-4)


def test_profiles_written_out_and_their_short_form_give_the_same_labels() -> None:
    for width, scale in ((16, 1.0), (64, 30.0)):
        points, others = torch.randn(2, 400, width) * scale, torch.randn(2, 37, width)
        means = drawn_tokens(points, 21, 0)
        profile, centre = (x.double() @ others.double().mT for x in (points, means))
        wanted = (profile @ torch.nn.functional.normalize(centre, dim=-1).mT).argmax(-1)
        assert torch.equal(nearest_profile(points, means, others), wanted)


def test_profile_rounds_are_those_of_the_paper() -> None:
    query, key = torch.randn(2, 300, 16), torch.randn(2, 300, 16)
    found = profile_labels(query, key, (9, 20), None, Effort(2, 2, 0, 0))
    for head in range(2):
        sides = [(query[head], drawn_tokens(query, 9, 0)[head])]
        sides.append((key[head], drawn_tokens(key, 20, 0)[head]))
        labels: list[torch.Tensor] = [torch.empty(0)] * 2
        for _ in range(2):
            for side in (1, 0):  # keys first
                points, means = sides[side]
                far = sides[1 - side][1]
                profile, centre = points @ far.t(), means @ far.t()
                near = torch.nn.functional.normalize(centre, dim=-1)
                labels[side] = (profile @ near.t()).argmax(-1)
                moved = [
                    points[labels[side] == n].mean(0) if (labels[side] == n).any() else means[n]
                    for n in range(len(means))
                ]
                sides[side] = (points, torch.stack(moved))
        assert torch.equal(found[0][head], labels[0])
        assert torch.equal(found[1][head], labels[1])


def test_profiles_are_sought_in_a_sample_first() -> None:
    query, key = torch.randn(2, 300, 16), torch.randn(2, 300, 16)
    some = [drawn_tokens(x, n * 10, 3) for x, n in ((query, 9), (key, 20))]
    start = (drawn_tokens(query, 9, 3), drawn_tokens(key, 20, 3))
    labels = profile_labels(some[0], some[1], (9, 20), start, Effort(9, 4, 0, 3))
    means = []
    for points, own, old in zip(some, labels, start, strict=True):
        sums, sizes = cluster_sums(points, own, old.shape[1])
        means.append(torch.where(sizes[..., None] > 0, sums / sizes[..., None], old))
    wanted = profile_labels(query, key, (9, 20), (means[0], means[1]), Effort(6, 2, 10, 3))
    found = profile_labels(query, key, (9, 20), None, Effort(6, 2, 10, 3))
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_a_metric_factor_gives_the_distances_of_the_responses() -> None:
    """At full rank, distances of k F are those of the scores with all queries, up to scale."""
    query, key = torch.randn(1, 500, 8) * torch.linspace(0.2, 3, 8), torch.randn(1, 40, 8)
    factor = metric_factor(query.mT @ query / 500, 48)
    apart = torch.cdist(key @ factor, key @ factor)
    wanted = torch.cdist(key @ query.mT, key @ query.mT)
    ratio = (apart / wanted)[0][torch.ones(40, 40).triu(1) > 0]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=0.0)
    assert metric_factor(query.mT @ query, 3).shape == (1, 8, 3)


def split_alone(points: torch.Tensor, members: list[int], size: int) -> list[list[int]]:
    """The recursion as it is told, one part at a time, all members looked at."""
    if len(members) <= size:
        return [members]
    axis = points[members].var(0, unbiased=False).argmax()
    ordered = sorted(members, key=lambda i: float(points[i, axis]))
    cut = (len(members) + size) // (2 * size) * size
    return split_alone(points, ordered[:cut], size) + split_alone(points, ordered[cut:], size)


@pytest.mark.parametrize(("tokens", "size"), [(120, 16), (64, 16), (97, 8), (5, 8), (127, 128)])
def test_equal_parts_are_those_of_the_recursion(tokens: int, size: int) -> None:
    points = torch.randn(3, tokens, 6)
    labels = equal_split(points, size)
    for head in range(3):
        for group, members in enumerate(split_alone(points[head], list(range(tokens)), size)):
            assert (labels[head] == group).nonzero().flatten().tolist() == sorted(members)
    sizes = torch.bincount(labels[0])
    assert (sizes != size).sum() <= 1


@pytest.mark.parametrize(("tokens", "size", "leaf"), [(120, 16, 4), (97, 8, 2), (5, 8, 2)])
def test_equal_parts_are_cut_on_into_leaves_side_by_side(tokens: int, size: int, leaf: int) -> None:
    points = torch.randn(3, tokens, 6)
    points[0, 3] = float("nan")  # no permutation is lost to one
    order, labels = split_order(points, size, leaf), equal_split(points, size)
    assert torch.equal(order.sort(1).values, torch.arange(tokens).expand(3, -1))
    assert (labels.gather(1, order).diff(dim=1) >= 0).all()
    for head in (1, 2):
        start = 0
        for part in split_alone(points[head], list(range(tokens)), size):
            for members in split_alone(points[head], part, leaf):
                found = order[head, start : start + len(members)].tolist()
                assert sorted(found) == sorted(members)
                start += len(members)


def test_large_equal_parts_are_cut_by_a_sample_of_their_members() -> None:
    points = torch.randn(2, 3000, 4) * torch.tensor([1.0, 5.0, 1.0, 1.0])
    labels = equal_split(points, 128)
    assert torch.bincount(labels[0]).tolist() == [128] * 23 + [56]
    low = points[0, labels[0] < 12, 1]  # the first cut is along the widest axis, amid the tokens
    assert float(low.max()) <= float(points[0, labels[0] >= 12, 1].min())


def test_mass_density_of_rows_that_are_known() -> None:
    spread = torch.zeros(200, 2, 8)
    assert mass_density(spread, spread, 1.0).tolist() == pytest.approx([0.95, 0.95])
    sharp = torch.eye(200)[:, None].expand(200, 2, 200)
    assert mass_density(sharp, sharp, 1e3).tolist() == pytest.approx([1 / 200] * 2)
    query, key = torch.randn(60, 2, 8), torch.randn(90, 2, 8)
    weights = (query.transpose(0, 1) @ key.permute(1, 2, 0)).softmax(-1)
    held = weights.sort(-1, descending=True).values.cumsum(-1)
    wanted = ((held < 0.9).sum(-1) + 1).double().mean(1) / 90
    torch.testing.assert_close(mass_density(query, key, 1.0, mass=0.9), wanted)
    assert floors(torch.tensor([[0.02, 0.3], [0.17, 0.1]]), 0.1, 0.2) == (0.17, 0.2)


@pytest.mark.parametrize("choice", ["random", "groups"])
@pytest.mark.parametrize("text", [(0, 0), (5, 4)])
def test_probe_rows_are_exact_and_text_is_left_alone(choice: str, text: tuple[int, int]) -> None:
    call = random_call(TokenGrid(3, 7, 9, *text), layer=2, step=3)
    method = Clustered(density=0.3, probe_choice=choice, **{**SMALL, "probes": 20})
    out, dense = method.attend(call, BACKEND), BACKEND.dense(call)
    same = (out - dense).abs().amax((0, 3)) < 3e-6  # [S, H]
    video = same[text[0] : text[0] + 189]
    assert video.sum(0).tolist() == [20] * 3
    assert bool(same[: text[0]].all())
    assert bool(same[text[0] + 189 :].all())
    if choice == "groups":
        groups = method.groups(replace(call, memory={}))
        rows, weight = group_rows(call, groups, 20)
        assert bool(video.gather(0, rows.t()).all())
        assert weight.sum(1).tolist() == pytest.approx([189.0] * 3)  # all groups are seen


def test_probes_of_groups_stand_nearest_the_means_of_the_largest() -> None:
    call = random_call(TokenGrid(3, 7, 9, 4, 0))
    groups = drawn_groups(call, (12, 5))
    rows, weight = group_rows(call, groups, 8)
    for head in range(3):
        sizes, label = groups.queries[head], groups.query_labels[head]
        assert (
            label[rows[head]].tolist() == sizes.argsort(descending=True, stable=True)[:8].tolist()
        )
        assert weight[head].tolist() == sizes[label[rows[head]]].tolist()
        for row in rows[head].tolist():
            far = (call.query[0, 4:, head] - groups.query[head, label[row]]).norm(dim=-1)
            assert int(far.masked_fill(label != label[row], 1e9).argmin()) == row


def mended(call: AttentionCall, out: torch.Tensor, **how: Any) -> torch.Tensor:
    given: dict[str, Any] = {"probes": 24, "ridge": 0.1, "rank": 4, "gated": True, "of_query": True}
    given.update(how)
    out = out.clone()
    mend(call, BACKEND, out, given.pop("groups", None), **given)
    return out


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("by_groups", [True, False])
def test_a_constant_error_is_taken_off_whole_and_no_error_changes_nothing(
    gated: bool, by_groups: bool
) -> None:
    call = random_call(TokenGrid(3, 7, 9, 3, 4))
    groups = drawn_groups(call, (9, 9)) if by_groups else None
    dense = BACKEND.dense(call)
    shift = torch.zeros_like(dense)
    shift[:, 3:-4] = torch.randn(1, 1, 3, 16)
    found = mended(call, dense + shift, gated=gated, groups=groups)
    torch.testing.assert_close(found, dense, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(mended(call, dense, gated=gated), dense, atol=2e-6, rtol=1e-5)


def test_a_weighted_repair_is_the_papers_ridge_regression() -> None:
    """Written out in the primal: weighted standardising, ridge .1, the raw residual's axes."""
    found, exact = torch.randn(1, 64, 2, 16), torch.randn(1, 64, 2, 16)
    exact = exact + found @ torch.randn(16, 16) * 0.3
    weight = torch.rand(2, 64) * 5 + 0.1
    fit = fit_repair(found, exact, ridge=0.1 / 64, rank=5, gated=False, weight=weight)
    out = torch.randn(1, 30, 2, 16)
    made = out.clone()
    fit.apply(made, slice(0, 30))
    for head in range(2):
        x, r = found[0, :, head].double(), (exact - found)[0, :, head].double()
        w = (weight[head] / weight[head].mean()).double()[:, None]
        mean, shift = (w * x).sum(0) / w.sum(), (w * r).sum(0) / w.sum()
        spread = ((w * (x - mean) ** 2).sum(0) / w.sum()).sqrt()
        z, apart = (x - mean) / spread, r - shift
        slope = torch.linalg.solve(z.t() @ (w * z) + 0.1 * torch.eye(16), z.t() @ (w * apart))
        axes = torch.linalg.svd(w.sqrt() * apart, full_matrices=False).Vh[:5]
        fix = ((out[0, :, head].double() - mean) / spread) @ slope @ axes.t() @ axes + shift
        expected = (out[0, :, head].double() + fix).float()
        torch.testing.assert_close(made[0, :, head], expected, atol=1e-4, rtol=1e-3)
    equal = fit_repair(found, exact, weight=torch.full((2, 64), 3.0))
    plain = fit_repair(found, exact)
    torch.testing.assert_close(equal.gate, plain.gate, atol=1e-2, rtol=0.0)
    torch.testing.assert_close(equal.before, plain.before)


def test_groups_last_as_long_as_they_should_and_means_are_fresh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[bool] = []
    true = Clustered._labels

    def counted(self: Clustered, call: AttentionCall, means: Any) -> Any:
        found.append(means is not None)
        return true(self, call, means)

    monkeypatch.setattr(Clustered, "_labels", counted)
    call = random_call(TokenGrid(3, 7, 9))
    for partition, given, wanted in (
        ("kmeans", {"every": 4, "settle": 0.2}, [0, 1, 5, 9]),
        ("split", {"every": 3}, [0, 3, 6, 9]),
        ("profile", {}, list(range(10))),
    ):
        state: dict[str, Any] = {}
        method = Clustered(partition=partition, density=0.3, **SMALL, **given)
        asked = []
        for step in range(10):
            before = len(found)
            now = replace(
                call,
                key=torch.randn_like(call.key),
                value=torch.randn_like(call.value),
                step=step,
                steps=10,
                memory=state,
            )
            groups = method.groups(replace(now, memory=copy.deepcopy(state)))
            del found[before:]
            out = method.attend(now, BACKEND)
            asked += [step] * (len(found) - before)
            for mean, part in ((groups.key, now.key), (groups.value, now.value)):
                at = groups.key_labels[1] == 3
                torch.testing.assert_close(mean[1, 3], part[0, at, 1].mean(0))
            kept = method.kept(now, groups, key_tiles(now, groups, 8))
            wanted_out = by_definition(now, groups, kept, True)
            torch.testing.assert_close(out, wanted_out, atol=3e-6, rtol=1e-5)
        assert asked == wanted
        assert found[0] is False
        assert all(found[1:]) or partition == "split"
        found.clear()


@pytest.mark.parametrize("every", [1, 3])
def test_the_same_step_again_and_another_run_give_the_same_groups(every: int) -> None:
    call = random_call(TokenGrid(4, 8, 9))
    method = Clustered(density=0.3, every=every, **SMALL)
    first = method.attend(call, BACKEND)
    assert torch.equal(method.attend(call, BACKEND), first)
    later = method.attend(replace(call, step=every), BACKEND)
    assert not torch.equal(later, first)
    assert torch.equal(method.attend(call, BACKEND), first)


@pytest.mark.parametrize("name", ["clustered", "svg_ear", "sparse_pr", "svoo", "cluster_attention"])
def test_a_broken_head_breaks_no_other_and_items_of_a_batch_are_apart(name: str) -> None:
    grid = TokenGrid(2, 7, 9, 0, 6)
    few = {**SMALL, "probes": 16 if name in ("clustered", "sparse_pr") else 0}
    method = build(name, few)
    call = random_call(grid, batch=2)
    out = method.attend(replace(call, memory={}), BACKEND)
    assert not torch.allclose(out, BACKEND.dense(call), atol=1e-3)
    for item in range(2):
        part = slice(item, item + 1)
        alone = replace(
            call, query=call.query[part], key=call.key[part], value=call.value[part], memory={}
        )
        torch.testing.assert_close(out[part], method.attend(alone, BACKEND), atol=2e-5, rtol=1e-4)
    for broken in ("query", "key", "value"):
        wild = getattr(call, broken).clone()
        wild[1, 17, 2] = float("nan")
        bad = replace(call, **{broken: wild}, memory={})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [method.attend(replace(bad, step=step), BACKEND) for step in (0, 1)]
        healthy = [method.attend(replace(call, step=step), BACKEND) for step in (0, 1)]
        call.memory.clear()
        for one, other in zip(found, healthy, strict=True):
            torch.testing.assert_close(one[:, :, :2], other[:, :, :2], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(one[0], other[0], atol=2e-5, rtol=1e-4)
        assert bool(found[0][1, :, 2].isnan().any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["clustered", "svg_ear", "sparse_pr", "svoo", "cluster_attention"])
def test_half_precision_stays_near(name: str, dtype: torch.dtype) -> None:
    call = random_call(TokenGrid(4, 8, 9, 0, 6), width=64)
    half = replace(
        call, **{n: getattr(call, n).to(dtype) for n in ("query", "key", "value")}, memory={}
    )
    method = build(name, {**SMALL, "density": 0.6, "mass": 0.0})
    out = method.attend(half, BACKEND)
    assert out.dtype == dtype
    assert bool(out.isfinite().all())
    gap = (out.float() - BACKEND.dense(call)).norm() / BACKEND.dense(call).norm()
    assert float(gap) < 1.0


def test_floors_are_each_heads_own() -> None:
    call = random_call(TokenGrid(4, 8, 9), batch=2)
    shares = (0.0, 0.4, 0.8)
    method = Clustered(least_kept=shares, density=0.01, **SMALL)
    assert method.not_supported(call) == []
    backend = Recorder()
    method.attend(call, backend)
    one = chosen(method, replace(random_call(TokenGrid(4, 8, 9)), memory={}))[1]
    counts = one.sum(-1).float().mean(-1) / one.shape[2]
    for share, found in zip(shares, counts.tolist(), strict=True):
        assert found == pytest.approx(max(share, 1 / one.shape[2]), abs=1 / one.shape[2])
    density = backend.masks[0].head_density().view(2, 3)  # items, heads
    assert bool((density.diff(dim=1) > 0).all())
    assert "lists 3 floors for 2 heads" in method.not_supported(call.heads([0, 1]))[0]


def test_what_cannot_be_is_refused_with_a_reason() -> None:
    with pytest.raises(InputError, match=r"least_kept .* numbers from 0 to 1"):
        Clustered(least_kept=(0.1, 1.2))
    with pytest.raises(InputError, match=r"probes .* at least 8"):
        Clustered(probes=5)
    call = random_call(TokenGrid(1, 5, 9))
    assert Clustered().not_supported(call) == [
        "clustered needs more tokens than probes (64), got 45"
    ]
    longer = [torch.cat((x, x[:, :3]), 1) for x in (call.key, call.value)]
    extra = replace(call, key=longer[0], value=longer[1])
    assert "3 extra keys" in Clustered(probes=0).not_supported(extra)[0]


def test_combinations_are_the_published_numbers() -> None:
    ear = build("svg_ear")
    assert isinstance(ear, Clustered)
    assert (ear.q_clusters, ear.k_clusters, ear.first_rounds, ear.rounds) == (300, 1000, 50, 2)
    assert (ear.mass, ear.least_kept, ear.least_budget) == (0.9, 0.1, 0.2)
    assert (ear.partition, ear.score, ear.skipped, ear.probes) == ("kmeans", "error", "pooled", 0)
    mend = build("sparse_pr")
    assert isinstance(mend, Clustered)
    assert (mend.density, mend.probes, mend.rank, mend.first_rounds) == (0.22, 64, 16, 25)
    assert (mend.learn, mend.gated, mend.probe_choice) == ("output", False, "groups")
    assert (mend.partition, mend.score, mend.skipped) == ("response", "error", "drop")
    assert mend.ridge * mend.probes == pytest.approx(0.1)
    wan = preset("svoo", "Wan2.1")
    assert (wan.dense_steps * 50, wan.dense_layers) == (10, 1)
    svoo = wan.method
    assert isinstance(svoo, Clustered)
    assert (svoo.q_clusters, svoo.k_clusters, svoo.least_kept) == (256, 1024, 0.15)
    assert (svoo.partition, svoo.skipped, svoo.first_rounds) == ("profile", "drop", 2)
    equal = build("cluster_attention", {"density": 0.3})
    assert isinstance(equal, Clustered)
    assert (equal.least_queries, equal.least_keys, equal.density) == (64, 128, 0.3)
    assert (equal.partition, equal.skipped, equal.score) == ("split", "pooled", "mass")
    assert "no published preset" in preset("svg_ear", "ltx").source
    assert preset("svg_ear", "ltx").method == ear


def test_groups_are_fewer_where_tokens_are_few() -> None:
    for grid, queries, keys in (
        (TokenGrid(21, 45, 80), 300, 1000),  # 75600 tokens: as published
        (TokenGrid(3, 20, 20), 4, 16),
        (TokenGrid(1, 4, 4), 1, 1),
    ):
        call = random_call(TokenGrid(1, 1, 1))
        object.__setattr__(call, "grid", grid)
        assert Clustered()._counts(call) == (queries, keys)
