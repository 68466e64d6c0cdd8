"""PAROAttention: exact reordering, the metrics' oracle values, calibration, fake quantisation."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dittools.call import AttentionCall
from dittools.errors import InputError, PlanError
from dittools.grid import TokenGrid
from dittools.kernels.reference import ReferenceBackend
from dittools.methods.block_statistics import Statistics, sampled_mass, statistics
from dittools.methods.paro import (
    NAMES,
    ORDERS,
    PARO,
    ParoCalibrator,
    axis_order,
    best_order,
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
    call = call_of(grid, heads=6)
    method = PARO(order=NAMES, density=0.999, block_size=8)
    mask = method.estimate(call)
    mask.keep.fill_(True)
    torch.testing.assert_close(
        BACKEND.block_sparse(call, mask), BACKEND.dense(call), atol=2e-6, rtol=1e-5
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
        torch.testing.assert_close(sampled_mass(q, k, tokens, 16, 0.25, rows), sampled)
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


def test_calibrated_tables_survive_a_file_and_drive_the_method(tmp_path: Path) -> None:
    grid, calibrator = TokenGrid(8, 4, 4, 0, 5), ParoCalibrator(block_size=16)
    plain = TokenGrid(8, 4, 4)
    for step in range(4):
        for layer in range(2):
            source = local_heads(plain)
            pad = torch.zeros(1, 5, 3, 64)
            parts = (torch.cat((x, pad), 1) for x in (source.query, source.key, source.value))
            call = AttentionCall(*parts, grid, layer=layer, step=step, steps=4)
            assert torch.equal(calibrator.attend(call, BACKEND), BACKEND.dense(call))
    tables = calibrator.tables(0.3)
    assert tables.packed.shape == (
        3,
        2,
        3,
        8,
    )  # two steps, then one shared mask; 64 blocks, 1 bit each
    assert tables.bin_of_step == (0, 1, 2, 2)
    assert [tables.index(s, 8) for s in range(8)] == [0, 0, 1, 1, 2, 2, 2, 2]
    path = tmp_path / "tables.safetensors"
    tables.save(path)
    loaded = load_tables(path)
    assert torch.equal(loaded.orders, tables.orders)
    for layer in range(2):
        for index in range(3):
            assert torch.equal(loaded.mask(layer, index), tables.mask(layer, index))
    kept = sum(int(loaded.mask(layer, i).sum()) for layer in range(2) for i in range(3))
    assert kept == round(0.3 * 3 * 2 * 3 * 64)
    method = PARO(density=0.3, tables=str(path))
    out = method.attend(call, BACKEND)
    assert float((out - BACKEND.dense(call))[:, :128].abs().max()) < 0.05
    assert method.not_supported(call) == []
    other = call_of(TokenGrid(8, 4, 5, 0, 5), heads=3, layer=2)
    grid_reason, layer_reason = method.not_supported(other)
    assert grid_reason.startswith("paro tables are for TokenGrid(frames=8, height=4, width=4")
    assert layer_reason == "paro tables have 2 layers, the call is layer 2"


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
