"""What the papers' formulas imply, method by method, where no other test says it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from toys import generate

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels.reference import ReferenceBackend
from dittools.mask import BlockMask
from dittools.methods import Method, build
from dittools.methods.agent import Agent
from dittools.methods.bands import band_density
from dittools.methods.clear import Clear, clear_pairs
from dittools.methods.gna import GNA
from dittools.methods.radial import Radial
from dittools.methods.sparse_vdit import SparseVDiT
from dittools.patches import attach
from dittools.patches.meter import Meter
from dittools.patches.timing import Stopwatch
from dittools.pipelines import tiny

BACKEND = ReferenceBackend()


def call_of(grid: TokenGrid, heads: int = 2, batch: int = 1) -> AttentionCall:
    q, k, v = (torch.randn(batch, grid.total, heads, 16) for _ in range(3))
    return AttentionCall(q, k, v, grid, steps=10, unrotated=None)


def told_density(method: Method, call: AttentionCall) -> float:
    """The density a report would show of one call."""
    meter = Meter(BACKEND, call, lambda: BACKEND.dense(call), Stopwatch())
    method.attend(call, meter)
    return float(meter.density(call))


FULL = TokenGrid(4, 8, 8)  # 16 blocks of 16 tokens
CLOSED = [  # method, grid, the share of pairs its description promises
    ("random", {"density": 0.25, "block_size": 16}, FULL, 0.25),
    ("paro", {"density": 0.3, "block_size": 16}, FULL, None),  # the diagonal comes on top
    ("sparge", {"density": 0.25, "block_size": 16}, FULL, 4 / 16),
    ("rectified", {"density": 0.25, "mass": 0.0, "neighbours": False, "block_size": 16},
     FULL, 4 / 16),
    ("psa", {"rule": "topk", "ends": (0.25, 0.5, 0.75, 1.0), "block_size": 16, "tile": 2},
     FULL, (4 + 4 / 2 + 4 / 4 + 4 / 8) / 16),
    ("psa", {"rule": "topk", "ends": (0.25, 0.5, 0.75, 1.0), "block_size": 64, "key_block": 16,
             "tile": 2}, FULL, (4 + 4 / 2 + 4 / 4 + 4 / 8) / 16),
    ("vmoba", {"top_k": 2, "temporal": 1, "block_size": 16}, FULL, 2 / 4),
    ("vmoba", {"top_k": 2, "temporal": 1, "pooled": True, "block_size": 16}, FULL, 2 / 4),
    ("sparse_vdit", {"mode": ("full", "skip"), "block_size": 16}, FULL, 1 / 2),
    ("sparse_vdit", {"mode": ("diagonal", "full"), "density": 0.3, "block_size": 16},
     FULL, (band_density(16, 2) + 1) / 2),
    ("svg", {"density": 0.3, "sink": False, "block_size": 16}, FULL, band_density(16, 2)),
    ("agent", {"cell": (1, 4, 4), "early": 1.0}, FULL, 2 * 16 / 256),
    ("agent", {"agents": "matched", "cell": (1, 4, 4), "early": 1.0, "ratio": 0.4},
     TokenGrid(1, 16, 16), 2 * (256 - 102) * 16 / 256**2),
    ("tome", {"ratio": 0.5}, TokenGrid(1, 16, 16), 0.25),
    ("oracle", {"density": 0.25, "block_size": 16}, FULL, None),
    ("svg2", {"mass": 1.0, "block_size": 16}, FULL, 1.0),
    ("radial", {"block_size": 16}, FULL, None),
    ("clear", {"radius": 3, "block_size": 16}, TokenGrid(1, 16, 16),
     clear_pairs(TokenGrid(1, 16, 16), 3) / 256**2),
    ("gna", {"window": (3, 3, 5), "stride": 1, "block_size": 16}, FULL, 3 * 3 * 5 / 256),
    ("sta", {"window": (3, 3, 1), "tile": (1, 2, 8)}, FULL, 3 / 4 * 3 / 4),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "params", "grid", "share"), CLOSED, ids=lambda part: part if type(part) is str else ""
)
def test_the_density_told_is_the_closed_form(
    name: str, params: dict[str, Any], grid: TokenGrid, share: float | None
) -> None:
    """And, of whatever was launched, the share of pairs that was really kept."""
    call = call_of(grid)
    call = replace(call, features=torch.randn(1, grid.tokens, 16), unrotated=call.query, layer=0)
    method = build(name, params)
    told = told_density(method, call)
    kept: list[float] = []

    class Counting(ReferenceBackend):
        def dense(self, asked: AttentionCall) -> torch.Tensor:
            kept.append(asked.query.shape[1] * asked.key.shape[1] * asked.head_count)
            return super().dense(asked)

        def block_sparse(self, asked: AttentionCall, mask: BlockMask, **options: Any) -> Any:
            pairs = mask.to_dense()
            if asked.key_bias is not None:  # keys left out by a bias of -inf are not counted
                pairs = pairs & (asked.key_bias[0, :, None] > float("-inf"))
            kept.append(float(pairs.double().mean(0).sum()) * asked.head_count)
            return super().block_sparse(asked, mask, **options)

    method.attend(replace(call, memory={}), Counting())
    if name != "vmoba":  # its launches hold padded copies of queries, which are not counted
        assert told == pytest.approx(sum(kept) / (2 * grid.total**2), rel=1e-9)
    if share is not None:
        assert told == pytest.approx(share, rel=1e-9)
    assert 0 < told <= 1


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("radius", [1, 2, 3])
def test_a_band_of_rows_needs_a_halo_of_one_row_less_than_the_radius(
    ranks: int, radius: int
) -> None:
    """CLEAR over several devices: image rows exactly, text rows by merging log-sum-exps."""
    grid = TokenGrid(1, 32, 6, text_before=5)
    call = call_of(grid)
    mask = Clear(radius=radius, block_size=16).mask(grid)
    whole, dense = Clear(radius=radius, block_size=16).attend(call, BACKEND), mask.to_dense()[0]
    rows, text = grid.height // ranks, torch.arange(grid.text_before)
    scores = torch.einsum("qhd,khd->hqk", call.query[0], call.key[0]) * call.softmax_scale
    parts, sums = [], []
    for rank in range(ranks):
        low = max(rank * rows - (radius - 1), 0)
        high = min((rank + 1) * rows + radius - 1, grid.height)
        keys = torch.cat((text, 5 + torch.arange(low * 6, high * 6)))
        queries = 5 + torch.arange(rank * rows * 6, (rank + 1) * rows * 6)
        seen = scores[:, queries][:, :, keys].masked_fill(~dense[queries][:, keys], float("-inf"))
        out = torch.einsum("hqk,khd->qhd", seen.softmax(-1), call.value[0, keys])
        torch.testing.assert_close(out, whole[0, queries], atol=2e-6, rtol=1e-5)
        own = torch.cat((text if rank == 0 else text[:0], queries))  # text keys on one rank only
        part = scores[:, text][:, :, own]
        parts.append(torch.einsum("hqk,khd->hqd", part.softmax(-1), call.value[0, own]))
        sums.append(part.logsumexp(-1))
    weight = torch.stack(sums).softmax(0)[..., None]
    merged = (torch.stack(parts) * weight).sum(0).transpose(0, 1)
    torch.testing.assert_close(merged, whole[0, text], atol=2e-6, rtol=1e-5)
    if radius > 1:  # the halo's outermost row is really seen
        band = 5 + rows * 6
        assert bool(dense[band, band - (radius - 1) * 6 : band - (radius - 2) * 6].any())


def test_neighbourhoods_at_their_extremes() -> None:
    for sides, window, options in (
        ((2, 2, 2), (2, 2, 2), {}),
        ((1, 6, 8), (1, 3, 4), {"dilation": (1, 2, 2)}),  # window times dilation is the axis
        ((1, 7, 11), (1, 3, 4), {"stride": (1, 3, 4)}),  # blocked attention
        ((3, 7, 5), (3, 4, 3), {"stride": (1, 2, 2)}),
    ):
        grid = TokenGrid(*sides)
        dense = GNA(window=window, block_size=16, **{"stride": 1, **options}).mask(grid).to_dense()
        kept = window[0] * window[1] * window[2]
        assert set(dense[0].sum(-1).tolist()) == {kept}
    plain = GNA(window=(1, 3, 4), stride=1, block_size=16)
    full = GNA(window=("full", 3, 4), stride=1, block_size=16)
    assert torch.equal(
        plain.mask(TokenGrid(1, 7, 9)).to_dense(), full.mask(TokenGrid(1, 7, 9)).to_dense()
    )


def test_in_tile_masking_changes_nothing_where_no_tile_is_cut() -> None:
    grid = TokenGrid(4, 8, 16)
    method = GNA(window=(4, 4, 8), stride=(1, 4, 8), tile=(1, 4, 8), block_size=32)
    call, mask = call_of(grid), method.mask(grid)
    assert mask.computed == pytest.approx(mask.density)
    bare = replace(mask, tiles=None, tile_index=None)
    assert torch.equal(method.attend(call, BACKEND), BACKEND.block_sparse(call, bare))


def test_agents_follow_a_permutation_of_the_queries_that_keeps_their_cells() -> None:
    """Cells of frames: queries of one frame change places, agents stay, outputs move along."""
    grid = TokenGrid(2, 4, 4)
    call = call_of(grid)
    method = Agent(early=1.0, cell=(1, 4, 4), agents="pooled")
    order = torch.cat((torch.randperm(16), 16 + torch.randperm(16)))
    moved = replace(call, query=call.query[:, order])
    out, other = method.attend(call, BACKEND), method.attend(moved, BACKEND)
    assert not torch.allclose(out, BACKEND.dense(call), atol=1e-2)
    out, other = (x - method.shortcut * call.value for x in (out, other))
    torch.testing.assert_close(other, out[:, order], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        SparseVDiT(mode="multi_diagonal", density=0.4, block_size=16),
        SparseVDiT(mode="stripe", density=0.4, block_size=16),
        Radial(block_size=16),
        Clear(radius=3, block_size=16),
    ],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("text", [(0, 0), (0, 7), (6, 0), (0, 33)])
def test_a_batch_of_both_branches_is_two_calls(method: Method, text: tuple[int, int]) -> None:
    call = call_of(TokenGrid(4, 5, 7, *text), batch=2)
    out = method.attend(call, BACKEND)
    for item in range(2):
        part = slice(item, item + 1)
        alone = replace(
            call, query=call.query[part], key=call.key[part], value=call.value[part], memory={}
        )
        torch.testing.assert_close(out[part], method.attend(alone, BACKEND), atol=2e-6, rtol=1e-5)


def test_radial_runs_in_every_sparse_step_and_layer_of_both_branches() -> None:
    """(steps - dense steps) x (layers - dense layers) calls per branch, cross-attention aside."""
    pipe = tiny.build("wan")
    pipe.set_progress_bar_config(disable=True)
    method = Radial(decay=0.1, block_size=16)
    with attach(pipe, method, dense_steps=1, dense_layers=1, backend="reference") as handle:
        generate(pipe, "wan", num_inference_steps=3)
        report = handle.report()
    layers = len(report.layers)
    sparse_or_whole = report.calls["sparse"] + sum(report.fallbacks.values())
    assert sparse_or_whole == (3 - 1) * (layers - 1) * 2
    assert report.calls["passed_through"] == 0


CHOOSING = {
    "clustered": {"density": 0.3},
    "metered": {"density": 0.3, "block_size": 16, "probes": 16},
    "paro": {"density": 0.3, "block_size": 16},
    "psa": {"block_size": 16},
    "rectified": {"block_size": 16},
    "sparge": {"density": 0.3, "block_size": 16},
    "svg2": {},
    "vmoba": {"block_size": 16},
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shift", [128.0, -512.0])
@pytest.mark.parametrize("name", CHOOSING)
def test_a_bias_of_all_keys_is_none_however_large(name: str, shift: float, batch: int) -> None:
    torch.manual_seed(5)
    grid = TokenGrid(3, 7, 9, 0, 6)
    q, k, v = torch.randn(3, batch, grid.total, 2, 32).unbind()
    own = torch.randint(-8, 8, (batch, 2, grid.total)) / 4  # the sum rounds nothing
    masked = torch.rand(batch, grid.total) > 0.1
    call = AttentionCall(q, k, v, grid, key_bias=own, key_mask=masked, steps=10, step=4)
    method, backend = build(name, CHOOSING[name]), ReferenceBackend()
    assert not method.not_supported(call)
    found = [
        method.attend(replace(call, key_bias=own + more, memory={}), backend)
        for more in (0.0, shift)
    ]
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=1e-4)
