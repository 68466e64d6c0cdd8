"""The GPU benchmark, as far as it can be checked without a GPU: cases, exactness check, table."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import load
from dittools.kernels.reference import ReferenceBackend
from dittools.mask import BlockMask
from dittools.order import TokenOrder
from dittools.tiling import separable_mask


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    path = Path(__file__).parent.parent / "bench" / "gpu.py"
    spec = importlib.util.spec_from_file_location("bench_gpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module
    spec.loader.exec_module(module)
    return module


def test_cases_cover_every_shape_density_and_mask(gpu: ModuleType) -> None:
    cases = gpu.cases()
    shapes = {(c.tokens, c.heads, c.head_dim) for c in cases}
    assert shapes == {
        (n, h, d) for n in (8192, 32760, 75600, 118800) for h in (12, 24) for d in (64, 128)
    }
    assert {c.kind for c in cases} == set(gpu.KINDS)
    assert {c.density for c in cases if c.kind == "random"} == {0.05, 0.1, 0.2, 0.3, 0.5, 1.0}
    assert len(cases) == len(set(cases)) == 16 * 9
    assert (cases[0].tokens, cases[0].heads, cases[0].head_dim) == (32760, 24, 128)
    assert len(gpu.cases([8192], [12], [64])) == 9


def test_grids_hold_the_tokens_they_are_named_by(gpu: ModuleType) -> None:
    assert all(grid.total == tokens for tokens, grid in gpu.GRIDS.items())


@pytest.mark.parametrize("kind", ["random", "radial", "gna", "paro"])
def test_masks_fit_their_case(gpu: ModuleType, kind: str) -> None:
    case = gpu.Case(8192, 12, 64, kind, 0.3)
    mask = gpu.make_mask(case)
    assert mask.q_block == mask.kv_block == 128
    if kind in ("random", "paro"):
        assert abs(mask.density - 0.3) < 0.01
    assert 0.02 < mask.density < 0.9
    assert (mask.order is not None and mask.order.index.shape[0] == 12) == (kind == "paro")
    if mask.order is not None:
        assert mask.order.is_valid()


def masks(grid: TokenGrid) -> list[BlockMask]:
    axes = [torch.eye(n, dtype=torch.bool) | (torch.rand(n, n) < 0.5) for n in grid.shape]
    order = TokenOrder(torch.stack([torch.randperm(grid.total) for _ in range(2)]), grid.total)
    plain = BlockMask(torch.rand(2, 6, 6) < 0.6, 32, q_tokens=grid.total, kv_tokens=grid.total)
    shuffled = BlockMask(plain.keep, 32, order=order, q_tokens=grid.total, kv_tokens=grid.total)
    return [plain, shuffled, separable_mask(grid, (axes[0], axes[1], axes[2]), (1, 4, 8))]


@pytest.mark.parametrize("which", range(3))
def test_exactness_check_passes_right_results_and_catches_wrong_ones(
    gpu: ModuleType, which: int
) -> None:
    grid = TokenGrid(3, 6, 9)
    q, k, v = torch.randn(3, 1, grid.total, 2, 16)
    call, mask = AttentionCall(q, k, v, grid), masks(grid)[which]
    out = ReferenceBackend().block_sparse(call, mask)
    assert gpu.sampled_error(call, mask, out, count=8) < 1e-5
    assert gpu.sampled_error(call, mask, out + 0.1, count=8) > 0.09
    dropped = BlockMask(
        mask.keep.roll(1, 2), mask.block_size, order=mask.order, q_tokens=grid.total
    )
    other = ReferenceBackend().block_sparse(call, dropped)
    assert gpu.sampled_error(call, mask, other, count=8) > 0.09


def test_derived_numbers_follow_their_definitions(gpu: ModuleType) -> None:
    case = gpu.Case(8192, 12, 64, "random", 0.5)
    row = gpu.derived(case, 0.5, [0.9, 1.0, 1.1], 4.0)
    assert row["dense"] == 0.25
    assert row["ideal"] == 0.5
    assert row["tflops"] == pytest.approx(4 * 8192**2 * 64 * 12 * 0.5 / 1e-3 / 1e12)


def test_table_aligns_times_and_says_each_refusal_once(gpu: ModuleType) -> None:
    case = gpu.Case(8192, 12, 64, "random", 0.5)
    shape = {"tokens": 8192, "heads": 12, "head_dim": 64, "kind": "random", "density": 0.5}
    timed = {**shape, "backend": "triton", "error": 1e-3, **gpu.derived(case, 0.5, [1.0] * 3, 4.0)}
    refused = {**shape, "backend": "sage", "refused": "sageattention is not installed"}
    lines = gpu.table([timed, refused, refused]).splitlines()
    assert len(lines) == 3
    assert len(lines[0]) == len(lines[1])
    assert lines[2] == "# sage: sageattention is not installed (2 cases)"


def test_results_are_written_whole_or_not_at_all(gpu: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "results" / "card.json"
    gpu.write(target, {"rows": [1]})
    with pytest.raises(TypeError):
        gpu.write(target, {"rows": [object()]})
    assert json.loads(target.read_text()) == {"rows": [1]}
    assert [path.name for path in target.parent.iterdir()] == ["card.json"]


class Wrong(ReferenceBackend):
    def block_sparse(self, call: AttentionCall, mask: BlockMask, **more: bool) -> torch.Tensor:  # type: ignore[override]
        out = super().block_sparse(call, mask)
        assert isinstance(out, torch.Tensor)
        return out + 1


def test_a_whole_run_checks_times_refuses_and_reports(
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    grid = TokenGrid(2, 8, 16)
    monkeypatch.setattr(gpu, "GRIDS", {256: grid})
    named = (("triton", ReferenceBackend()), ("flex", Wrong()), ("sage", load("sage")))
    monkeypatch.setattr(gpu, "backends", lambda case: iter(named))
    monkeypatch.setattr(gpu, "time_ms", lambda run, budget_s=0.0: run() is None or [1.0, 2.0, 3.0])
    monkeypatch.setattr(gpu, "dense_times", lambda call: {"cudnn": 8.0, "flash": "no such kernel"})
    q, k, v = torch.randn(3, 1, 256, 2, 16)
    monkeypatch.setattr(gpu, "make_call", lambda case: AttentionCall(q, k, v, grid))
    for name, value in {
        "is_available": True,
        "get_device_name": "Some Card",
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 0,
        "max_memory_allocated": 2**20,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    options = ["--tokens", "256", "--heads", "2", "--head-dim", "16", "--out", str(tmp_path)]
    assert gpu.main(options) == 1  # one backend is wrong
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("Some-Card-")
    result = json.loads(path.read_text())
    assert result["dense"] == {"256x2x16": {"cudnn": 8.0, "flash": "no such kernel"}}
    assert result["versions"]["gpu"] == "Some Card"
    assert len(result["rows"]) == 9 * 3
    right = [row for row in result["rows"] if row["backend"] == "triton"]
    assert all(row["dense"] == 0.25 and row["error"] < 1e-5 for row in right)
    assert all("ms" not in row and row["wrong"] for row in result["rows"][1::3])
    assert all("is not installed" in row["refused"] for row in result["rows"][2::3])
    assert gpu.main([*options, "--budget", "-1"]) == 0
    assert "0 rows in 0 s, 9 cases left out for time" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_device_it_says_so_and_returns_2(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_unknown_sizes_are_refused_with_the_known_ones(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--tokens", "777"])
    assert stopped.value.code == 2
    assert "expected one of 8192, 32760" in capsys.readouterr().err
