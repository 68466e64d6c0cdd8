"""The cpu backend, native builds and grouped torch, against attention in double precision."""

import importlib.util
import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import poisoned
import pytest
import torch

from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.grid import TokenGrid
from dittools.kernels import choose, load, native
from dittools.kernels.common import from_slots, to_slots
from dittools.kernels.cpu import CpuBackend
from dittools.kernels.cpu_grouped import grouped_attention
from dittools.mask import BlockMask, pack_bits
from dittools.order import TokenOrder

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATHS = [name for name, needs in native.BUILDS.items() if set(needs) <= native.cpu_features()]
PATHS.append("grouped")
Result = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way the backend can run here, one native build after the other."""
    monkeypatch.setenv("DITTOOLS_NATIVE", "0" if request.param == "grouped" else request.param)
    if request.param != "grouped":
        needs_native()
    return request.param


def needs_native() -> None:
    """Skip where nothing can be built; a kernel that is built but wrong is a failure."""
    if sys.platform != "linux" or native._compiler() is None:
        pytest.skip("no Linux with a C++ compiler")
    assert native.status().available, native.status().reason


@pytest.fixture
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show every output element that is never written."""
    monkeypatch.setattr(
        torch, "empty", lambda size, **options: torch.full(size, float("nan"), **options)
    )


def run(call: AttentionCall, mask: BlockMask) -> Result:
    out, lse = CpuBackend().block_sparse(call, mask, return_lse=True)
    return out, lse


def plain_call(
    tokens: int,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 1,
    heads: int = 2,
    dim: int = 32,
) -> AttentionCall:
    q, k, v = (torch.randn((batch, tokens, heads, dim)).to(dtype) for _ in range(3))
    return AttentionCall(q, k, v, TokenGrid(1, 1, tokens))


def random_order(tokens: int, holes: int, heads: int) -> TokenOrder:
    index = torch.full((heads, tokens + holes), -1)
    for row in index:
        row[torch.randperm(tokens + holes)[:tokens]] = torch.randperm(tokens)
    return TokenOrder(index, tokens)


def random_program(seed: int, dtype: torch.dtype) -> tuple[AttentionCall, BlockMask]:
    """Return any attention program: odd sizes, extra keys, orders, bit tiles, biases, layouts."""
    torch.manual_seed(seed)
    pick = random.Random(seed)
    batch, heads, dim = pick.choice([1, 2]), pick.choice([1, 3]), pick.choice([8, 20, 64, 72, 128])
    tokens, extra = pick.choice([1, 7, 63, 100, 200, 333]), pick.choice([0, 0, 5, 40])
    sizes = pick.choice([8, 16, 24, 64, 128]), pick.choice([8, 16, 40, 64, 128])
    order = None
    holes = pick.choice([0, 17])
    if pick.random() < 0.5:
        order = random_order(tokens, holes, pick.choice([1, heads]))
    slots = tokens if order is None else order.slots
    shape = (pick.choice([1, heads]), -(-slots // sizes[0]), -(-(slots + extra) // sizes[1]))
    keep = torch.rand(shape) < pick.choice([0.15, 0.5, 1.0])
    tile_index = tiles = None
    if pick.random() < 0.6:
        tiles = pack_bits(torch.rand(5, *sizes) < 0.3)
        cut = keep & (torch.rand(shape) < 0.5)
        tile_index = torch.where(cut, torch.randint(0, 5, shape), -1).int()
    mask = BlockMask(
        keep,
        sizes,
        tile_index=tile_index,
        tiles=tiles,
        order=order,
        q_tokens=tokens,
        kv_tokens=tokens + extra,
    )
    lengths = (tokens, tokens + extra, tokens + extra)
    if pick.random() < 0.5:  # [B, H, S, D] in memory
        q, k, v = (torch.randn(batch, heads, n, dim).transpose(1, 2) for n in lengths)
    else:
        q, k, v = (torch.randn(batch, n, heads, dim) for n in lengths)
    call = AttentionCall(
        q.to(dtype),
        k.to(dtype),
        v.to(dtype),
        TokenGrid(1, 1, tokens),
        scale=pick.choice([None, None, 0.3, -0.2]),
        key_bias=torch.randn(pick.choice([1, batch]), pick.choice([1, heads]), tokens + extra)
        if pick.random() < 0.4
        else None,
        key_mask=torch.rand(batch, tokens + extra) < 0.8 if pick.random() < 0.4 else None,
    )
    return call, mask


def exact(call: AttentionCall, mask: BlockMask) -> Result:
    """The specification in double precision."""
    wide = replace(
        call, query=call.query.double(), key=call.key.double(), value=call.value.double()
    )
    out, lse = load("reference").block_sparse(wide, mask, return_lse=True)
    return out, lse


def budget(call: AttentionCall, mask: BlockMask, want: torch.Tensor) -> float:
    """Twice what the same sums lose with weights in the call's dtype, plus one rounding."""
    q, k, v = (t.transpose(1, 2).float() for t in (call.query, call.key, call.value))
    scores = q @ k.transpose(-1, -2) * call.softmax_scale
    bias = call.additive_mask()
    scores = scores if bias is None else scores + bias[:, :, None]
    scores = scores.masked_fill(~mask.to_dense(), float("-inf"))
    weights = torch.softmax(scores, dim=-1).nan_to_num(0).to(call.query.dtype).float()
    low = (weights @ v).to(call.query.dtype).transpose(1, 2).double()
    rounding = torch.finfo(call.query.dtype).eps * float(want.abs().max())
    return 2 * (float((low - want).abs().max()) + rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("nan_filled")
def test_any_program_stays_inside_the_error_budget(path: str, dtype: torch.dtype) -> None:
    for seed in range(40):
        call, mask = random_program(seed, dtype)
        out, lse = run(call, mask)
        want, want_lse = exact(call, mask)
        error = float((out.double() - want).abs().max())
        assert error <= budget(call, mask, want), f"program {seed}"
        kept = want_lse.isfinite()
        assert torch.equal(lse.isfinite(), kept), f"program {seed}"
        assert float((lse - want_lse)[kept].abs().max() if kept.any() else 0) < 1e-4, f"{seed}"


def test_programs_cover_what_they_claim() -> None:
    programs = [random_program(seed, torch.float32) for seed in range(40)]
    calls, masks = zip(*programs, strict=True)
    assert any(mask.order is not None and mask.order.has_padding for mask in masks)
    assert any(mask.tiles is not None for mask in masks)
    assert any(call.key_bias is not None for call in calls)
    assert any(not exact(call, mask)[1].isfinite().all() for call, mask in programs[:10])


def test_grouped_path_equals_reference_without_lse(path: str) -> None:
    if path != "grouped":
        pytest.skip("the native kernel has one path for both")
    for seed in range(40):
        call, mask = random_program(seed, torch.float32)
        out, _ = grouped_attention(to_slots(call, mask), mask, call.softmax_scale)
        want, _ = exact(call, mask)
        assert float((from_slots(out, mask) - want).abs().max()) < 1e-5, f"program {seed}"


def test_large_logits_do_not_overflow(path: str) -> None:
    call = plain_call(130)
    call = replace(call, query=call.query * 300)
    mask = BlockMask.full(130, 130, 64)
    out, lse = run(call, mask)
    want, want_lse = exact(call, mask)
    assert float(((lse - want_lse) / want_lse).abs().max()) < 1e-6
    assert float((out - want).abs().max()) < 2e-3  # scores near 1,500 carry 1e-4 each


def test_running_maximum_is_carried_across_groups(path: str) -> None:
    call = plain_call(2000, heads=1)  # four groups of keys, each with a larger maximum
    call = replace(call, key=call.key * torch.linspace(0.1, 4, 2000)[None, :, None, None])
    mask = BlockMask.full(2000, 2000, 64)
    out, lse = run(call, mask)
    want, want_lse = exact(call, mask)
    assert float((out - want).abs().max()) < 1e-5
    assert float((lse - want_lse).abs().max()) < 1e-5


def test_empty_rows_give_zero_and_minus_infinity(path: str) -> None:
    call = plain_call(96)
    keep = torch.ones((1, 3, 3), dtype=torch.bool)
    keep[0, 1] = False
    out, lse = run(call, BlockMask(keep, 32, q_tokens=96, kv_tokens=96))
    assert torch.equal(out[:, 32:64], torch.zeros_like(out[:, 32:64]))
    assert lse[:, 32:64].isneginf().all()
    assert lse[:, :32].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_query_stays_in_its_row(path: str, dtype: torch.dtype) -> None:
    call = plain_call(100, dtype)
    call.query[0, 37, 1, 3] = float("nan")
    out, _ = run(call, BlockMask.full(100, 100, 32))
    bad = out.isnan().any(-1)
    assert bad.nonzero().tolist() == [[0, 37, 1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_bad_keys_reach_only_the_queries_that_keep_them(
    path: str, dtype: torch.dtype, which: str, poison: float
) -> None:
    dense = torch.rand(1, 100, 100) < 0.6
    mask = BlockMask.from_dense(dense, 32)
    call = plain_call(100, dtype)
    clean, _ = run(call, mask)
    getattr(call, which)[0, 41, 1, :] = poison
    out, _ = run(call, mask)
    bad = ~out.isfinite().all(-1)
    assert not bad[0, :, 0].any()
    if which == "value":
        assert torch.equal(bad[0, :, 1], dense[0, :, 41])
    else:
        assert not bad[0, ~dense[0, :, 41], 1].any()
    untouched = ~dense[0, :, 41]
    near = 4 * torch.finfo(dtype).eps  # a block with a bad value is summed in a pass of its own
    assert torch.allclose(out[0, untouched], clean[0, untouched], atol=near, rtol=near)


def test_bad_keys_behind_a_key_mask_or_a_dropped_block_do_not_reach_the_result(path: str) -> None:
    keep = torch.ones((1, 4, 4), dtype=torch.bool)
    keep[0, :, 2] = False
    mask = BlockMask(keep, 32, q_tokens=128, kv_tokens=128)
    call = plain_call(128)
    key_mask = torch.ones((1, 128), dtype=torch.bool)
    key_mask[0, 10] = False
    call = replace(call, key_mask=key_mask)
    want, plain = run(call, mask)[0], CpuBackend().block_sparse(call, mask)
    for token in (10, 70):
        call.key[0, token], call.value[0, token] = float("nan"), float("nan")
    assert torch.equal(run(call, mask)[0], want)
    assert torch.equal(CpuBackend().block_sparse(call, mask), plain)  # without LSE: another path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_keys_and_values_stay_with_their_keepers_in_any_program(
    path: str, dtype: torch.dtype
) -> None:
    spoilt = clean = 0
    for seed in range(40):
        call, mask = random_program(seed, dtype)
        if call.query.shape[1] > 200:
            continue
        poisoned.poison(call, seed)
        want = poisoned.row_by_row(call, mask)
        for out in (run(call, mask)[0], CpuBackend().block_sparse(call, mask)):
            found = poisoned.disagreement(out, want)
            assert found["spread"] == found["hidden"] == 0, f"{seed}: {found}"
            assert found["error"] < (1e-4 if dtype == torch.float32 else 0.06), f"{seed}: {found}"
        spoilt, clean = spoilt + found["spoilt"], clean + found["clean"]
    assert min(spoilt, clean) > 1000


def test_reference_keeps_bad_keys_and_values_with_their_keepers() -> None:
    for seed in range(40):
        call, mask = random_program(seed, torch.float32)
        if call.query.shape[1] > 200:
            continue
        poisoned.poison(call, seed)
        out = load("reference").block_sparse(call, mask)
        found = poisoned.disagreement(out, poisoned.row_by_row(call, mask))
        assert found["spread"] == found["hidden"] == 0, f"{seed}: {found}"
        assert found["error"] < 1e-4, f"{seed}: {found}"


def test_result_does_not_depend_on_threads(path: str) -> None:
    call, mask = random_program(3, torch.float32)
    one = run(call, mask)
    torch.set_num_threads(2)
    try:
        two = run(call, mask)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


def test_strided_inputs_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_native()
    packed = torch.randn(1, 90, 2, 3 * 32)  # a fused qkv projection
    q, k, v = packed.split(32, dim=-1)
    call = AttentionCall(q, k, v, TokenGrid(1, 1, 90))
    mask = BlockMask.full(90, 90, 32)
    want, _ = exact(call, mask)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("copied"))
    out = CpuBackend().block_sparse(call, replace(mask, _cache={}))
    assert float((out - want).abs().max()) < 1e-5


def test_inputs_whose_last_dimension_is_strided(path: str) -> None:
    call = plain_call(70)
    turned = call.key.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert turned.stride(-1) != 1
    mask = BlockMask.full(70, 70, 32)
    assert torch.equal(run(replace(call, key=turned), mask)[0], run(call, mask)[0])


def test_gradients_take_the_grouped_path() -> None:
    call = plain_call(64, dim=16)
    call.query.requires_grad_(True)
    mask = BlockMask.full(64, 64, 32)
    assert any("gradient" in reason for reason in CpuBackend().not_native(call, mask))
    CpuBackend().block_sparse(call, mask).square().sum().backward()
    got = call.query.grad.clone()
    call.query.grad = None
    load("reference").dense(call).square().sum().backward()
    assert float((got - call.query.grad).abs().max()) < 1e-5


def test_odd_block_sizes_and_doubles_take_the_grouped_path_with_a_reason() -> None:
    call = plain_call(60, torch.float64)
    mask = BlockMask.full(60, 60, 12)
    reasons = " ".join(CpuBackend().not_native(call, mask))
    assert "float64" in reasons
    assert "block is 12" in reasons
    want = load("reference").dense(call)
    assert float((CpuBackend().block_sparse(call, mask) - want).abs().max()) < 1e-12


def test_mask_of_another_size_is_refused_with_both_sizes() -> None:
    mask = BlockMask.full(128, 128, 32)
    with pytest.raises(UnsupportedCall, match=r"4 query blocks of 32.*needs 3"):
        CpuBackend().block_sparse(plain_call(96), mask)
    with pytest.raises(UnsupportedCall, match="cpu: mask has 4 query blocks"):
        choose("cpu", plain_call(96), mask)


def test_auto_is_the_cpu_backend_on_the_cpu() -> None:
    assert choose("auto", plain_call(96)).name == "cpu"


def test_prefers_dense_follows_size_and_share(path: str) -> None:
    def wants_dense(tokens: int, share: float, dtype: torch.dtype = torch.float32) -> bool:
        blocks = -(-tokens // 64)
        keep = torch.rand((2, blocks, blocks)).argsort(-1) < share * blocks
        mask = BlockMask(keep, 64, q_tokens=tokens, kv_tokens=tokens)
        return CpuBackend().prefers_dense(plain_call(tokens, dtype, dim=64), mask)

    assert wants_dense(64, 1)
    assert wants_dense(128, 0.5, torch.bfloat16) or path not in ("amx", "grouped")
    for dtype in DTYPES:
        assert not wants_dense(4096, 0.2, dtype)
    assert wants_dense(4096, 0.6) == (path == "grouped")
    assert wants_dense(1024, 0.2, torch.bfloat16) == (path != "amx" and has_amx())


def has_amx() -> bool:
    return "amx_bf16" in native.cpu_features()


# ---- building and loading ----------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache and a process that has not looked for the kernel yet."""
    monkeypatch.setattr(native, "_LOADED", {})
    monkeypatch.setenv("DITTOOLS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DITTOOLS_NATIVE", raising=False)
    return tmp_path


def serves(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the backend still answers right, by the grouped path."""
    call, mask = plain_call(96), BlockMask.full(96, 96, 32)
    assert CpuBackend().not_native(call, mask)
    return torch.allclose(run(call, mask)[0], load("reference").dense(call), atol=1e-5)


def fake_compiler(folder: Path, body: str) -> str:
    script = folder / "cxx"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return str(script)


def test_failing_compiler_is_named_and_the_grouped_path_serves(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = '[ "$1" = --version ] && exit 0; echo "native.cpp:1: error: no such luck" >&2; exit 1'
    monkeypatch.setenv("CXX", fake_compiler(fresh, body))
    assert not native.status().available
    assert "error: no such luck" in native.status().reason
    assert list((fresh / "cache/native").iterdir()) == []
    assert serves(monkeypatch)


def test_missing_compiler_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in native.status().reason
    assert serves(monkeypatch)


def test_environment_turns_it_off(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITTOOLS_NATIVE", "0")
    assert native.status().reason == "turned off by DITTOOLS_NATIVE=0"
    assert serves(monkeypatch)
    monkeypatch.setenv("DITTOOLS_NATIVE", "avx9000")
    assert "avx9000 is not among" in native.status().reason


def test_wrong_results_of_a_build_are_refused(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = native.SOURCE.read_text().replace("LOG2E = 1.4426950408889634f", "LOG2E = 1.5f")
    (fresh / "native.cpp").write_text(wrong)
    monkeypatch.setattr(native, "SOURCE", fresh / "native.cpp")
    monkeypatch.setenv("DITTOOLS_NATIVE", "generic")
    if native._compiler() is None:
        pytest.skip("no C++ compiler")
    assert "self-test" in native.status().reason
    assert serves(monkeypatch)


def test_library_is_built_once_and_a_damaged_one_again(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITTOOLS_NATIVE", "generic")
    needs_native()
    library = Path(native.status().library)
    assert list((fresh / "cache/native").iterdir()) == [library]
    again, compiled = native._built("generic", native.status().compiler)
    assert (again, compiled) == (library, False)
    other = fresh / "other" / "native" / library.name  # the loader knows the first one by its path
    other.parent.mkdir(parents=True)
    other.write_bytes(b"not a library")
    monkeypatch.setenv("DITTOOLS_CACHE", str(fresh / "other"))
    monkeypatch.setattr(native, "_LOADED", {})
    assert native.status().available
    assert other.stat().st_size > 10_000


def test_unwritable_cache_falls_back_to_a_temporary_folder(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fresh / "file").write_text("")
    monkeypatch.setenv("DITTOOLS_CACHE", str(fresh / "file"))
    folder = native._writable(native.cache_dir())
    assert folder != native.cache_dir()
    assert folder.is_dir()


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DITTOOLS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert native.cache_dir() == Path("/x/dittools/native")
    monkeypatch.setenv("DITTOOLS_CACHE", "/own")
    assert native.cache_dir() == Path("/own/native")


def test_one_openmp_runtime_in_the_process() -> None:
    needs_native()
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = {Path(line.split(maxsplit=5)[-1]).name for line in lines}
    assert len({name for name in mapped if re.match(r"lib(g|i)?omp", name)}) == 1


def test_debug_mode_finds_damaged_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_native()
    call, mask = plain_call(96), BlockMask.full(96, 96, 32)
    monkeypatch.setenv("DITTOOLS_DEBUG", "1")
    CpuBackend().block_sparse(call, mask)
    mask.lists().block[4] = 99
    with pytest.raises(UnsupportedCall, match=r"block is out of range.*0 to 2.*99"):
        CpuBackend().block_sparse(call, mask)
    order = TokenOrder(torch.zeros((1, 96), dtype=torch.int64), 96)
    with pytest.raises(UnsupportedCall, match="not a permutation"):
        CpuBackend().block_sparse(call, replace(mask, order=order, _cache={}))


def test_benchmark_prints_rows_and_checks_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(__file__).parents[1] / "bench" / "kernels.py"
    spec = importlib.util.spec_from_file_location("bench_kernels", file)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    options = ["--tokens=256", "--head-dim=16", "--block=64", "--dtypes=fp32", "--threads=1"]
    options.append("--rounds=1")
    assert bench.main([*options, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["computed"] for row in rows] == [0.25, 0.25, 0.5, 1.0]
    assert all(row["ratio"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 6
    right = CpuBackend.block_sparse
    monkeypatch.setattr(CpuBackend, "block_sparse", lambda self, c, m: right(self, c, m) * 1.01)
    with pytest.raises(SystemExit, match="wrong result"):
        bench.main(options)
