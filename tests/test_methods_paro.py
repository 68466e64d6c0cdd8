"""PAROAttention: exact reordering, the metrics' oracle values, calibration, fake quantisation."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dittools.call import AttentionCall
from dittools.errors import InputError, PlanError
from dittools.grid import TokenGrid
from dittools.kernels.cpu import CpuBackend
from dittools.kernels.reference import ReferenceBackend
from dittools.methods.block_sampling import sampled_mass, sampled_slots
from dittools.methods.block_statistics import Statistics, statistics
from dittools.methods.paro import (
    NAMES,
    ORDERS,
    PARO,
    axis_order,
    best_order,
    distinct_orders,
    head_order,
    paper_scores,
)
from dittools.methods.paro_tables import load_tables
from dittools.methods.quantize import fake_quant
from dittools.methods.selection import keep_share

BACKEND = ReferenceBackend()


def call_of(grid: TokenGrid, heads: int = 2, **context: object) -> AttentionCall:
    q, k, v = (torch.randn(1, grid.total, heads, 16) for _ in range(3))
    return AttentionCall(q, k, v, grid, **context)


ODD = [
    TokenGrid(3, 4, 5, 7),
    TokenGrid(1, 5, 6, 0, 9),
    TokenGrid(4, 1, 7),
    TokenGrid(4, 7, 1, 2, 3),
]


@pytest.mark.parametrize("grid", ODD, ids=str)
def test_a_full_mask_is_dense_in_every_order(grid: TokenGrid) -> None:
    assert_full_mask_is_dense(call_of(grid, heads=6))


@pytest.mark.parametrize(("before", "after"), [(226, 0), (0, 226), (512, 0), (0, 512), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_full_mask_is_dense_with_the_text_of_real_models(
    before: int, after: int, dtype: torch.dtype
) -> None:
    grid = TokenGrid(3, 5, 7, before, after)
    assert grid.total % 64
    q, k, v = (torch.randn(1, grid.total, 6, 16).to(dtype) for _ in range(3))
    assert_full_mask_is_dense(AttentionCall(q, k, v, grid), 64)


def assert_full_mask_is_dense(call: AttentionCall, block_size: int = 8) -> None:
    method = PARO(order=NAMES, density=0.999, block_size=block_size)
    mask = method.estimate(call)
    mask.keep.fill_(True)
    atol, rtol = (2e-6, 1e-5) if call.query.dtype == torch.float32 else (8e-3, 1.6e-2)
    for backend in (BACKEND, CpuBackend()):
        torch.testing.assert_close(
            backend.block_sparse(call, mask), BACKEND.dense(call), atol=atol, rtol=rtol
        )
    assert mask.order is not None
    assert mask.order.is_valid()
    assert torch.equal(mask.order.undo(mask.order.apply(call.query)), call.query)


def test_orders_are_numbered_as_in_the_published_plans() -> None:
    assert [ORDERS[n] for n in NAMES] == [
        (0, 1, 2),
        (0, 2, 1),
        (1, 2, 0),
        (1, 0, 2),
        (2, 1, 0),
        (2, 0, 1),
    ]
    raster = torch.arange(24).view(2, 3, 4)
    for i, axes in enumerate(ORDERS.values()):
        assert torch.equal(axis_order(TokenGrid(2, 3, 4), i), raster.permute(axes).reshape(-1))
    for i, back in enumerate((0, 1, 5, 3, 4, 2)):  # 2 and 5 undo each other
        shape = [raster.shape[a] for a in ORDERS[NAMES[i]]]
        moved = raster.permute(ORDERS[NAMES[i]]).reshape(shape).permute(ORDERS[NAMES[back]])
        assert torch.equal(moved, raster)
    image = TokenGrid(1, 5, 7)
    assert len({tuple(axis_order(image, i).tolist()) for i in range(6)}) == 2


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 5, 7), (4, 1, 7), (4, 7, 1), (1, 1, 9)])
def test_orders_that_coincide_are_tried_once(shape: tuple[int, int, int]) -> None:
    grid = TokenGrid(*shape)
    known = [tuple(axis_order(grid, i).tolist()) for i in range(6)]
    distinct = distinct_orders(grid)
    assert [known.index(known[i]) for i in distinct] == list(distinct)  # the first of its kind
    assert len(distinct) == len(set(known)) == {3: 6, 2: 2, 1: 1}[sum(n > 1 for n in shape)]


def metrics(weights: torch.Tensor, grid: TokenGrid, name: str, block: int) -> Statistics:
    """Statistics of a given attention map [N, N] in one order, the direct way."""
    order = axis_order(grid, NAMES.index(name))
    cut = weights[order][:, order].view(-1, block, len(order) // block, block).transpose(1, 2)
    return Statistics(
        cut.sum((2, 3))[None], cut.amax((2, 3))[None], (cut < 1e-3).float().mean((2, 3))[None],
        torch.tensor(float(block * block)),
    )  # fmt: skip


def hard_map(grid: TokenGrid, same: tuple[int, ...]) -> torch.Tensor:
    place = grid.coordinates()[:, list(same)]
    seen = (place[:, None] == place).all(-1).float()
    return seen / seen.sum(1, keepdim=True)


def soft_map(grid: TokenGrid) -> torch.Tensor:
    apart = (grid.coordinates()[:, None] - grid.coordinates()).abs().float()
    return torch.softmax(-(apart * torch.tensor([0.1, 1.0, 1.0])).sum(-1), dim=-1)


TIME, FRAME, ROW, SOFT = "same place", "same frame", "same row", "soft"
TABLE = [  # head, orders, sparse, incoherence, recall at one block per row, 0.2, 0.3, 0.5
    (TIME, "fhw fwh", 1.0, 16.0, (0.0625, 0.1992, 0.3008, 0.5)),
    (TIME, "hwf whf", 0.9375, 1.0, (1, 1, 1, 1)),
    (TIME, "hfw wfh", 0.75, 1.75, (0.25, 0.7969, 1, 1)),
    (FRAME, "fhw fwh", 0.9375, 1.0, (1, 1, 1, 1)),
    (FRAME, "hwf whf", 1.0, 16.0, (0.0625, 0.1992, 0.3008, 0.5)),
    (ROW, "hwf hfw", 0.875, 1.0, (1, 1, 1, 1)),
    (ROW, "fhw fwh whf wfh", 0.0, 8.0, (0.125, 0.2031, 0.2969, 0.5)),
    (SOFT, "fhw fwh", 0.0, 25.59, (0.1047, 0.2985, 0.4269, 0.6437)),
    (SOFT, "hwf whf", 0.6406, 8.883, (0.4682, 0.7925, 0.8866, 0.9677)),
    (SOFT, "hfw wfh", 0.4531, 8.304, (0.3289, 0.6684, 0.8071, 0.9430)),
]
HEADS = {
    TIME: (TokenGrid(16, 4, 4), 16, lambda g: hard_map(g, (1, 2))),
    FRAME: (TokenGrid(16, 4, 4), 16, lambda g: hard_map(g, (0,))),
    ROW: (TokenGrid(8, 8, 8), 64, lambda g: hard_map(g, (1,))),
    SOFT: (TokenGrid(16, 8, 8), 64, soft_map),
}


@pytest.mark.parametrize(("head", "names", "sparse", "incoherence", "recall"), TABLE)
def test_metrics_have_their_oracle_values(
    head: str, names: str, sparse: float, incoherence: float, recall: tuple[float, ...]
) -> None:
    grid, block, make = HEADS[head]
    weights = make(grid)
    for name in names.split():
        found = metrics(weights, grid, name, block)
        blocks = grid.tokens // block
        assert float(found.sparse()) == pytest.approx(sparse, abs=5e-5)
        assert float(found.incoherence()) == pytest.approx(incoherence, rel=5e-4)
        got = [float(found.recall(d)) for d in (1 / blocks, 0.2, 0.3, 0.5)]
        assert got == pytest.approx(recall, abs=5e-5)


def test_recall_and_the_papers_score_disagree_on_the_soft_head() -> None:
    grid, block, make = HEADS[SOFT]
    found = [metrics(make(grid), grid, name, block) for name in NAMES]
    assert NAMES[best_order(torch.stack([f.recall(0.3) for f in found]))[0]] == "hwf"
    only_quant = paper_scores(
        torch.stack([f.sparse() for f in found]), torch.stack([f.incoherence() for f in found]), 0.0
    )
    assert NAMES[int(only_quant[:, 0].argmin())] == "hfw"


@pytest.mark.parametrize("tokens", [64, 75])
def test_streamed_statistics_equal_the_whole_map(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dittools.methods.block_statistics._CHUNK", 1000)
    q, k = torch.randn(80, 2, 16) * 3, torch.randn(80, 2, 16)
    found = statistics(q, k, tokens, 16, 0.25)
    for rows in (2, 16):
        sampled = statistics(q, k, tokens, 16, 0.25, rows).mass
        own = torch.arange(80)[None]
        torch.testing.assert_close(sampled_mass(q, k, own, tokens, 16, 0.25, rows=rows), sampled)
    weights = torch.softmax(torch.einsum("qhd,khd->hqk", q, k) * 0.25, -1)[:, :tokens, :tokens]
    blocks = -(-tokens // 16)
    for i in range(blocks):
        for j in range(blocks):
            part = weights[:, i * 16 : i * 16 + 16, j * 16 : j * 16 + 16]
            torch.testing.assert_close(found.mass[:, i, j], part.sum((1, 2)))
            torch.testing.assert_close(found.peak[:, i, j], part.amax((1, 2)))
            torch.testing.assert_close(found.small[:, i, j], (part < 1e-3).float().mean((1, 2)))


def test_the_threshold_hits_the_target_to_one_block() -> None:
    mass = torch.rand(5, 9, 9) ** 4
    for density in (0.2, 0.3, 0.55):
        kept = keep_share(mass, density)
        assert int(kept.sum()) == round(density * 405)
        assert float(mass[kept].min()) >= float(mass[~kept].max())
        assert (
            keep_share(mass, density, per_head=True).sum((1, 2)).tolist()
            == [round(density * 81)] * 5
        )
    recalls = [
        float(Statistics(mass, mass, mass, mass).recall(d).mean()) for d in (0.1, 0.2, 0.5, 1)
    ]
    assert all(a < b for a, b in pairwise(recalls))


def local_heads(grid: TokenGrid, sharp: float = 12.0) -> AttentionCall:
    """Head 0 looks along time, head 1 along its row, head 2 inside its frame."""
    place = grid.coordinates()
    keys = (place[:, 1] * grid.width + place[:, 2], place[:, 1] * grid.height, place[:, 0])
    query = torch.zeros(1, grid.total, 3, 64)
    for head, group in enumerate(keys):
        query[0, torch.arange(grid.total), head, group] = sharp
    return AttentionCall(query, query, torch.randn(1, grid.total, 3, 64), grid)


def test_online_orders_and_masks_follow_the_heads() -> None:
    grid = TokenGrid(16, 8, 8)
    call = local_heads(grid)
    method = PARO(density=0.15, block_size=16)
    orders = [NAMES[i] for i in method._orders(call)]
    assert (orders[0][-1], orders[1][0], orders[2][0]) == ("f", "h", "f")
    out, dense = method.attend(call, BACKEND), BACKEND.dense(call)
    assert float((out - dense).abs().max()) < 1e-3
    worse = PARO(density=0.15, block_size=16, order="fhw").attend(call, BACKEND)
    assert float((worse - dense).abs().max()) > 0.1
    k, v = torch.randn(1, 64, 2, 8), torch.randn(1, 64, 2, 8)
    uniform = AttentionCall(torch.zeros(1, 64, 2, 8), k, v, TokenGrid(4, 4, 4))
    assert PARO(block_size=8)._orders(uniform) == [0, 0]


@pytest.mark.parametrize("grid", ODD, ids=str)
def test_masked_attention_is_sdpa_under_the_expanded_mask(grid: TokenGrid) -> None:
    call = call_of(grid, heads=3)
    mask = PARO(density=0.3, block_size=8, order=("hwf", "fwh", "wfh")).estimate(call)
    allowed = mask.to_dense()
    assert allowed.any(-1).all()  # no query is left without a key
    assert not allowed.all()
    q, k, v = (t.transpose(1, 2) for t in (call.query, call.key, call.value))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed[None])
    for backend in (BACKEND, CpuBackend()):
        got = backend.block_sparse(call, mask)
        torch.testing.assert_close(got, want.transpose(1, 2), atol=2e-6, rtol=1e-5)


def test_the_estimate_looks_at_few_pairs_and_finds_most_of_the_mass() -> None:
    grid = TokenGrid(16, 8, 8)
    call = local_heads(grid, sharp=3.0)
    method = PARO(density=0.2, block_size=16, order=("hwf", "hfw", "fhw"))
    index = head_order(grid, [2, 3, 0]).index
    true = sampled_mass(call.query[0], call.key[0], index, 1024, 16, 0.125, rows=16)
    kept = method.estimate(call).keep
    best = keep_share(true, float(kept.float().mean()))
    assert float(true[kept].sum()) > 0.97 * float(true[best].sum())
    sampled = sampled_slots(32768, 64, 4, 32)
    assert len(sampled) == 128
    rows = sampled[::4] // 64  # the sampled blocks fall into no step of a frame of 16 blocks
    assert len(set((rows % 16).tolist())) > 8


def test_masked_out_text_keys_take_no_mass_away() -> None:
    q, k = torch.randn(40, 2, 8), torch.randn(40, 2, 8)
    dropped = torch.zeros(1, 40)
    dropped[:, 32:] = float("-inf")
    own = torch.arange(40)[None]
    got = sampled_mass(q, k, own, 32, 8, 0.35, rows=2, run=2, bias=dropped)
    torch.testing.assert_close(got.sum(-1), torch.full((2, 4), 2.0))
    without = sampled_mass(q[:32], k[:32], own[:, :32], 32, 8, 0.35, rows=2, run=2)
    torch.testing.assert_close(got, without)


def test_heads_remember_for_themselves_under_equal_methods() -> None:
    """Rules may give the same method other heads at another step; orders must not move along."""
    grid, memory = TokenGrid(16, 8, 8), {}
    method = PARO(density=0.15, block_size=16)
    for step, heads in ((0, (0, 1)), (5, (0, 1)), (6, (1, 2))):
        call = replace(local_heads(grid), step=step, steps=8, memory=memory)
        part = call.heads(heads)
        assert part.head_index == heads
        method.attend(part, BACKEND)
    fresh = replace(call, memory={}).heads((1, 2))
    got = method.attend(call.heads((1, 2)), BACKEND)
    assert torch.equal(got, method.attend(fresh, BACKEND))
    assert call.heads((0, 1)).heads((1,)).head_index == (1,)


def test_masks_are_estimated_anew_until_half_way_and_shared_after() -> None:
    grid, memory = TokenGrid(4, 8, 8), {}
    method = PARO(density=0.3, block_size=16)

    def keep(step: int) -> torch.Tensor:
        method.attend(call_of(grid, step=step, steps=8, memory=memory), BACKEND)
        return next(iter(memory.values()))["mask"].keep

    first, second, half, last = keep(0), keep(1), keep(4), keep(7)
    assert not torch.equal(first, second)
    assert not torch.equal(second, half)
    assert torch.equal(half, last)


def test_density_one_is_dense_and_text_stays() -> None:
    call = call_of(TokenGrid(3, 6, 6, 5, 4))
    assert torch.equal(PARO(density=1.0).attend(call, BACKEND), BACKEND.dense(call))
    out = PARO(density=0.2, block_size=8).attend(call, BACKEND)
    dense = BACKEND.dense(call)
    torch.testing.assert_close(out[:, :5], dense[:, :5], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(out[:, -4:], dense[:, -4:], atol=2e-6, rtol=1e-5)
    assert not torch.allclose(out, dense, atol=1e-2)


def test_broken_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="paro tables cannot be read"):
        load_tables(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not a file")
    with pytest.raises(PlanError, match="are damaged"):
        load_tables(tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=r"paro: order .* 'auto', or one of fhw"):
        PARO(order="ffw")


def test_masks_pack_to_one_bit_per_block() -> None:
    kib = {(13, 30, 45): 9.23, (21, 45, 80): 170.6}  # CogVideoX-5B and Wan 14B 720p, per head
    for shape, size in kib.items():
        blocks = -(-TokenGrid(*shape).tokens // 64)
        assert -(-(blocks**2) // 8) / 1024 == pytest.approx(size, rel=2e-3)


def test_block_groups_beat_row_groups_only_after_reordering() -> None:
    grid = TokenGrid(16, 8, 8)
    weights, value = soft_map(grid), torch.randn(1024, 64)

    def error(name: str, bits: int, rows: int, columns: int) -> float:
        order = axis_order(grid, NAMES.index(name))
        p, v = weights[order][:, order], value[order]
        exact = p @ v
        return float((fake_quant(p, bits, rows, columns) @ v - exact).norm() / exact.norm())

    assert error("fhw", 8, 1, 0) == pytest.approx(0.0183, rel=0.05)
    assert error("hwf", 8, 1, 0) == pytest.approx(error("fhw", 8, 1, 0), rel=1e-3)
    assert error("fhw", 8, 64, 64) == pytest.approx(0.0197, rel=0.05)
    assert error("hwf", 8, 64, 64) == pytest.approx(0.0093, rel=0.05)
    assert error("hfw", 8, 64, 64) == pytest.approx(0.0109, rel=0.05)
    assert error("fhw", 4, 1, 0) == pytest.approx(0.207, rel=0.05)
    assert error("fhw", 4, 64, 64) == pytest.approx(0.222, rel=0.05)
    assert error("hwf", 4, 64, 64) == pytest.approx(0.174, rel=0.05)
    falling = [error("hwf", bits, 64, 64) for bits in (3, 4, 6, 8, 12)]
    assert falling == sorted(falling, reverse=True)


def test_head_orders_stack() -> None:
    order = head_order(TokenGrid(2, 3, 4, 1, 1), [0, 2])
    assert order.index.shape == (2, 26)
    assert order.index[0, :3].tolist() == [1, 2, 3]
    assert order.index[:, -2:].tolist() == [[0, 25], [0, 25]]
