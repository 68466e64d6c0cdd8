"""Calibrated PARO: orders, masks of a promised density, the plan file, and its run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dittools.call import AttentionCall
from dittools.errors import InputError, PlanError
from dittools.grid import TokenGrid
from dittools.kernels.reference import ReferenceBackend
from dittools.mask import unpack_bits
from dittools.methods.block_statistics import statistics
from dittools.methods.oracle import OracleTopK
from dittools.methods.paro import NAMES, PARO, axis_order, table_mask
from dittools.methods.paro_calibrate import (
    BlockMasses,
    OrderScores,
    best_orders,
    bins_of,
    tables_of,
)
from dittools.methods.paro_tables import ParoTables, load_tables
from dittools.patches import attach
from dittools.pipelines.generate import generate
from dittools.pipelines.load import load as load_pipeline
from dittools.plans import Plan
from dittools.plans.plan import ModelFacts
from dittools.searching.calibrate_paro import Choices, calibrate, cost_of, request_of
from dittools.searching.scout import Facts

BACKEND = ReferenceBackend()


def local_heads(grid: TokenGrid, **context: Any) -> AttentionCall:
    """Head 0 looks along time, head 1 along its row, head 2 inside its frame."""
    place = grid.coordinates().clamp(min=0)
    keys = (place[:, 1] * grid.width + place[:, 2], place[:, 1] * grid.height, place[:, 0])
    query = torch.zeros(1, grid.total, 3, 64)
    for head, group in enumerate(keys):
        query[0, torch.arange(grid.total), head, group] = 12.0
    return AttentionCall(query, query, torch.randn(1, grid.total, 3, 64), grid, **context)


def calibrated(grid: TokenGrid, density: float, steps: int = 4) -> ParoTables:
    scores = OrderScores(density, [0, 2], block_size=16)
    bins = bins_of(steps)
    for layer in range(2):
        for step in range(steps):
            scores.attend(local_heads(grid, layer=layer, step=step), BACKEND)
    means = torch.stack([scores.sums[layer] / scores.maps[layer] for layer in range(2)])
    orders = best_orders(means, "recall")
    masses = BlockMasses(grid, orders, bins, range(steps), block_size=16)
    for layer in range(2):
        for step in range(steps):
            masses.attend(local_heads(grid, layer=layer, step=step), BACKEND)
    mass = masses.mass / masses.maps[:, :, None, None, None]
    weights = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    return tables_of(grid, 16, orders, mass, bins, density, weights)


def test_collectors_run_dense_and_add_up_the_true_maps() -> None:
    grid = TokenGrid(8, 4, 4, 0, 5)
    call = local_heads(grid, step=1)
    orders = torch.tensor([[2, 3, 0]])
    masses = BlockMasses(grid, orders, [0, 1, 1], [1], block_size=16)
    assert torch.equal(masses.attend(call, BACKEND), BACKEND.dense(call))
    for head, order in enumerate(orders[0].tolist()):
        at = axis_order(grid, order)
        true = statistics(call.query[0, at], call.key[0, at], 128, 16, 0.125).mass[head]
        torch.testing.assert_close(masses.mass[1, 0, head], true)
    assert not masses.mass[0].any()
    masses.attend(replace(call, step=2), BACKEND)  # a step nobody looks at
    assert masses.maps.tolist() == [[0.0], [1.0]]
    assert masses.not_supported(local_heads(TokenGrid(4, 4, 4))) != []


def test_padded_text_takes_no_mass_of_the_maps_away() -> None:
    """Keys the model drops, and would look at most of all, count as if they were not there."""
    grid, bare = TokenGrid(4, 4, 4, 0, 6), TokenGrid(4, 4, 4, 0, 2)
    q, k, v = (torch.randn(2, grid.total, 3, 16) for _ in range(3))
    k[:, bare.total :] = 9 * q[:, : grid.total - bare.total]
    keep = torch.arange(grid.total) < bare.total
    padded = AttentionCall(q, k, v, grid, key_mask=keep[None])
    biased = replace(padded, key_mask=None, key_bias=torch.where(keep, 0.0, -torch.inf)[None, None])
    short = AttentionCall(*(x[:, : bare.total] for x in (q, k, v)), bare)
    orders = torch.tensor([[2, 0, 5]])

    def looked_at(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        scores = OrderScores(0.3, [0], block_size=16)
        masses = BlockMasses(call.grid, orders, [0], [0], block_size=16)
        for probe in (scores, masses):
            probe.attend(call, BACKEND)
        return scores.sums[0], masses.mass

    for call in (padded, biased):
        torch.testing.assert_close(looked_at(call), looked_at(short))
        best = OracleTopK(density=0.4, block_size=16)
        got, want = best.attend(call, BACKEND), best.attend(short, BACKEND)
        torch.testing.assert_close(got[:, : bare.total], want)


@pytest.mark.parametrize("metric", ["recall", "paper"])
def test_orders_follow_the_heads_by_either_score(metric: str) -> None:
    scores = OrderScores(0.2, [0], block_size=16)
    scores.attend(local_heads(TokenGrid(16, 8, 8)), BACKEND)
    names = [NAMES[i] for i in best_orders(scores.sums[0][None], metric)[0].tolist()]
    assert (names[0][-1], names[1][0], names[2][0]) == ("f", "h", "f")
    image = OrderScores(0.2, [0], block_size=16)
    image.attend(local_heads(TokenGrid(1, 8, 8)), BACKEND)
    assert set(best_orders(image.sums[0][None], metric).flatten().tolist()) <= {0, 1}


def test_steps_share_masks_as_in_the_paper_or_in_equal_parts() -> None:
    assert bins_of(6) == [0, 1, 2, 3, 3, 3]
    assert bins_of(5) == [0, 1, 2, 3, 3]
    assert bins_of(1) == [0]
    assert bins_of(8, masks=4) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert bins_of(3, masks=9) == [0, 1, 2]


@pytest.mark.parametrize("grid", [TokenGrid(8, 4, 4), TokenGrid(8, 5, 5, 3, 4)], ids=str)
@pytest.mark.parametrize("density", [0.3, 0.4, 0.61])
def test_the_bisection_hits_the_density_of_the_run_to_one_block(
    grid: TokenGrid, density: float
) -> None:
    blocks, bins = -(-grid.tokens // 16), [0, 1, 2, 2, 2]
    mass = torch.rand(3, 2, 3, blocks, blocks) ** 4
    mass[2, 1] = 0.25  # equal masses, too
    weights = torch.tensor([[1.0, 0.0], [1.0, 1.0], [3.0, 3.0]], dtype=torch.float64)
    args = (grid, 16, torch.zeros((2, 3), dtype=torch.long), mass, bins, density, weights)

    def run_density(tables: ParoTables) -> float:
        total = 0.0
        for step, bin_ in enumerate(bins):
            for layer in range(2):
                call = local_heads(grid, layer=layer, step=step, steps=5)
                total += table_mask(tables, call).density * bool(weights[bin_, layer])
        return total / float(weights.sum())

    whole = grid.blocks(16) ** 2
    assert run_density(tables_of(*args)) == pytest.approx(density, abs=3.01 / (9 * 3 * whole))
    for bin_ in range(3):
        tables = tables_of(*args, per_head=True)
        kept = tables.mask(0, bin_).sum((1, 2))
        assert bool((kept == kept[0]).all())
    assert run_density(tables) == pytest.approx(density, abs=0.51 / whole)


def test_a_density_below_text_and_diagonal_is_refused() -> None:
    grid = TokenGrid(4, 4, 4, 0, 40)
    weights = torch.ones((1, 1), dtype=torch.float64)
    mass, orders = torch.rand(1, 1, 2, 4, 4), torch.zeros((1, 2), dtype=torch.long)
    with pytest.raises(InputError, match=r"too low .* at least 0\.7"):
        tables_of(grid, 16, orders, mass, [0], 0.5, weights)


def test_tables_survive_both_files_and_drive_the_method(tmp_path: Path) -> None:
    grid = TokenGrid(8, 4, 4, 0, 5)
    tables = calibrated(grid, 0.5)
    assert tables.packed.shape == (3, 2, 3, 8)  # 64 blocks, one bit each
    assert tables.bin_of_step == (0, 1, 2, 2)
    assert [tables.index(s, 8) for s in range(8)] == [0, 0, 1, 1, 2, 2, 2, 2]  # another step count
    assert tables.index(0, 0) == 0
    path = tmp_path / "tables.safetensors"
    tables.save(path)
    Plan.of(PARO(tables=tables)).save(tmp_path / "plan.json")
    stored = Plan.load(tmp_path / "plan.json").rules[0].method
    assert isinstance(stored, PARO)
    assert isinstance(stored.tables, ParoTables)
    call = local_heads(grid, layer=1, step=3, steps=4)
    outputs = []
    for method in (PARO(tables=tables), PARO(tables=str(path)), stored):
        assert method.not_supported(call) == []
        outputs.append(method.attend(call, BACKEND))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert float((outputs[0] - BACKEND.dense(call))[:, :128].abs().max()) < 0.05
    assert load_tables(path).orders.tolist() == tables.orders.tolist()
    part = PARO(tables=tables).attend(call.heads((2, 0)), BACKEND)  # rules for some heads
    torch.testing.assert_close(part, outputs[0][:, :, [2, 0]])
    other = local_heads(TokenGrid(8, 4, 5, 0, 5), layer=2)
    grid_reason, layer_reason = stored.not_supported(other)
    assert grid_reason.startswith("paro tables are for TokenGrid(frames=8, height=4, width=4")
    assert layer_reason == "paro tables have 2 layers, the call is layer 2"
    broken = {**tables.to_param(), "block_size": 32}
    with pytest.raises(PlanError, match="do not fit their grid"):
        PARO(tables=broken)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="malformed; got paro tables lacks"):
        PARO(tables={"grid": [1, 1, 1]})  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [(0, 0), (0, 2), (3, 30), (17, 0)])
def test_tables_serve_prompts_of_any_length(text: tuple[int, int]) -> None:
    """Masks are of the video alone: text is whole however long, as where padding is cut off."""
    tables = calibrated(TokenGrid(8, 4, 4, 0, 5), 0.4)
    grid = TokenGrid(8, 4, 4, *text)
    q, k, v = (torch.randn(1, grid.total, 3, 16) for _ in range(3))
    call = AttentionCall(q, k, v, grid, layer=1, step=2, steps=4)
    method = PARO(block_size=16, tables=tables)
    assert method.not_supported(call) == []
    kept = unpack_bits(tables.packed[2, 1], 64).view(3, 8, 8) | torch.eye(8, dtype=torch.bool)
    video = kept.repeat_interleave(16, 1).repeat_interleave(16, 2)
    whole = torch.ones(3, grid.total, grid.total, dtype=torch.bool)
    for head, order in enumerate(tables.orders[1].tolist()):
        at = axis_order(grid, order)[:128]
        whole[head, at[:, None], at] = video[head]
    want = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=whole[None]
    )
    got = method.attend(call, BACKEND)
    torch.testing.assert_close(got, want.transpose(1, 2), atol=1e-5, rtol=1e-5)
    masses = BlockMasses(TokenGrid(8, 4, 4, 0, 5), tables.orders, [0], [2], block_size=16)
    assert masses.not_supported(call) == []
    masses.attend(call, BACKEND)
    assert masses.maps[0, 1] == 1


def test_masks_of_many_text_lengths_do_not_pile_up() -> None:
    tables = calibrated(TokenGrid(8, 4, 4, 0, 5), 0.5)
    for length in range(40):
        call = local_heads(TokenGrid(8, 4, 4, 0, length), layer=1, step=3, steps=4)
        mask = table_mask(tables, call)
        assert table_mask(tables, call) is mask
    assert len(tables.cache) == 4 * 2 * 3


def test_the_price_of_large_models_is_known_beforehand() -> None:
    """Sizes of the packed masks as the method's description gives them, per head and in all."""
    for shape, layers, heads, steps, kib, gib in (
        ((13, 30, 45), 42, 48, 30, 9.23, 0.55 / 2),  # half of the steps have a mask of their own
        ((21, 45, 80), 40, 40, 50, 170.6, 13.0 / 2),
    ):
        grid = TokenGrid(*shape)
        model = ModelFacts("Any", layers, heads, 64)
        facts = Facts(model, grid, steps, ("cond",), 1.0, 0.0, 1.0, torch.float32)
        request = request_of(object(), ["a", "b"], Choices(0.3), {"steps": steps})
        found = cost_of(request, Choices(0.3), facts)
        each = found.mask_bytes / (found.masks * layers * heads)
        assert each / 1024 == pytest.approx(kib, rel=2e-3)
        assert found.masks == steps // 2 + 1
        assert found.mask_bytes / 2**30 == pytest.approx(gib, rel=0.12)
        four = cost_of(request, Choices(0.3, masks=4), facts)
        assert four.masks == 4
        assert four.memory_bytes < found.memory_bytes
        assert found.generations == {"for orders": 1, "for masks": 1, "to verify": 2}


def test_a_plan_is_made_once_runs_at_its_density_and_starts_anew(tmp_path: Path) -> None:
    pipe = load_pipeline("tiny/wan")
    pipe.set_progress_bar_config(disable=True)
    sizes = {"height": 64, "width": 64, "frames": 13, "steps": 4, "guidance": 1.0}
    choices = Choices(0.5, block_size=8, rows=0, held_out=1)
    out, seen = tmp_path / "plan.json", []
    request = request_of(pipe, ["one", "two"], choices, sizes)

    def make(path: Path, work: Path) -> Plan:
        return calibrate(
            pipe, ["one", "two"], choices, out=path, work=work,
            progress=lambda what, done, total: seen.append(what), **sizes,
        )  # fmt: skip

    plan = make(out, tmp_path / "work")
    assert plan.measured["density"] == pytest.approx(0.5, abs=2e-3)
    assert plan.measured["psnr_db"] > 10
    assert plan.measured["held_out"] == ["two"]
    assert dict.fromkeys(seen) == dict.fromkeys(
        ["choosing orders", "adding up masses", "verifying"]
    )
    finished = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "work").iterdir()}
    assert len(finished) == 2
    make(tmp_path / "again.json", tmp_path / "work")  # goes on from what is there
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "work").iterdir()} == finished
    first, second = (tmp_path / f"{name}.safetensors" for name in ("plan", "again"))
    assert first.read_bytes() == second.read_bytes()
    loaded = Plan.load(out)
    tables = loaded.rules[0].method.tables  # type: ignore[attr-defined]
    side = json.loads(out.read_text())["provenance"]["mask_bytes"]
    assert (
        side == tables.packed.numel() == tables.packed[..., 0].numel() * -(-(tables.blocks**2) // 8)
    )
    with attach(pipe, loaded, backend="cpu") as handle:
        clips = [generate(pipe, request.held_out[0]).frames for _ in range(2)]
        report = handle.report()
    assert report.fallbacks == {}
    assert report.sparse_density == pytest.approx(0.5, abs=2e-3)
    assert (clips[0] == clips[1]).all()  # the second video starts at the first mask again
    with attach(pipe, loaded, backend="cpu") as handle:
        generate(pipe, replace(request.held_out[0], steps=6))
        assert handle.report().fallbacks == {}
