"""Clustered attention: what its publications' formulas imply, part by part and together."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels.auto import AutoBackend
from dittools.kernels.reference import ReferenceBackend
from dittools.mask import BlockMask
from dittools.methods.cluster_layout import Groups, key_tiles
from dittools.methods.clustered import Clustered
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
