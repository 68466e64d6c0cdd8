"""The Triton kernel: in the interpreter against fp64, compiled without a GPU, and on a device."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.grid import TokenGrid
from dittools.kernels import choose, load
from dittools.kernels.program import block_sparse, build_program, program
from dittools.kernels.reference import ReferenceBackend
from dittools.mask import BlockMask

HERE = Path(__file__).parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(
    not HAS_TRITON, reason="triton is not installed: pip install 'dittools[triton]'"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@lru_cache(maxsize=1)
def case_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("triton_cases", HERE / "triton_cases.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["triton_cases"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


CASES = case_module().cases()


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, object]]:
    """Every case, run in a fresh process: Triton reads TRITON_INTERPRET when it is imported."""
    done = subprocess.run(
        [sys.executable, str(HERE / "triton_cases.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["name"]: row for row in rows}


def assert_within_budget(row: dict[str, object]) -> None:
    assert row["refused"] == []
    assert row["finite"]
    assert row["empty_right"]
    assert row["error"] <= row["budget"], row
    assert row["lse_error"] < 2e-5, row


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_interpreter_stays_within_twice_the_error_of_the_dtype(
    case: object, interpreted: dict[str, dict[str, object]]
) -> None:
    assert_within_budget(interpreted[case.name])  # type: ignore[attr-defined]


EIGHT = case_module().eight_bit_cases()


def assert_rounds_no_more_than_it_must(row: dict[str, object], values: str) -> None:
    assert row["finite"]
    assert row["empty_right"]
    # own: against the same 8-bit numbers, so only weights and sums are rounded; the interpreter
    # cuts bf16 and fp8 off where a device rounds to nearest, which doubles their part
    own, whole = {"half": (8e-3, 0.03), "int8": (1.5e-2, 0.04), "fp8": (0.07, 0.08)}[values]
    assert row["own_error"] < own, row
    assert row["error"] < whole, row
    assert row["lse_error"] < 0.1, row


@needs_triton
@pytest.mark.parametrize(("case", "values"), EIGHT, ids=lambda part: getattr(part, "name", part))
def test_eight_bit_attention_stays_near_exact_with_offset_keys(
    case: object, values: str, interpreted: dict[str, dict[str, object]]
) -> None:
    row = interpreted[f"{case.name}-{values}"]  # type: ignore[attr-defined]
    assert_rounds_no_more_than_it_must(row, values)


WIRED = case_module().wired_cases()


def assert_is_the_specification_but_for_weights(row: dict[str, object]) -> None:
    assert row["refused"] == []
    assert row["finite"]
    assert row["empty_right"]
    assert row["lse_error"] < 2e-5, row  # queries and keys are rounded alike
    # weights have one constant scale here and one per block there
    assert row["error"] < 1.25 * row["reference"], row  # type: ignore[operator]
    assert row["apart"] < 0.008, row


@needs_triton
@pytest.mark.parametrize(("case", "way"), WIRED, ids=lambda part: getattr(part, "name", part))
def test_calls_that_ask_for_few_bits_follow_the_specification(
    case: object, way: str, interpreted: dict[str, dict[str, object]]
) -> None:
    row = interpreted[f"{case.name}-wired-{way}"]  # type: ignore[attr-defined]
    assert row["backend"] == {"int8": "triton_int8_int8", "int8_half": "triton_int8"}[way]
    assert_is_the_specification_but_for_weights(row)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("case", "way"), WIRED, ids=lambda part: getattr(part, "name", part))
def test_calls_that_ask_for_few_bits_follow_the_specification_on_the_device(
    case: object, way: str
) -> None:
    assert_is_the_specification_but_for_weights(case_module().wired(case, way, "cuda"))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("case", "values"), EIGHT, ids=lambda part: getattr(part, "name", part))
def test_eight_bit_attention_stays_near_exact_on_the_device(case: object, values: str) -> None:
    if values == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    assert_rounds_no_more_than_it_must(case_module().quantised(case, values, "cuda"), values)


@needs_triton
def test_nan_query_spoils_its_own_row_only(interpreted: dict[str, dict[str, object]]) -> None:
    assert interpreted["nan-row"]["bad"] == [[0, 5, 1]]


POISONED = case_module().poisoned_cases()


def assert_bad_values_stay_with_their_keepers(row: dict[str, object]) -> None:
    assert row["spread"] == row["hidden"] == 0, row
    assert row["error"] < 0.06, row
    assert row["lse_error"] < 2e-5, row
    assert row["same_lse"], row


@needs_triton
@pytest.mark.parametrize("case", POISONED, ids=lambda case: case.name)
def test_bad_keys_and_values_stay_with_their_keepers(
    case: object, interpreted: dict[str, dict[str, object]]
) -> None:
    row = interpreted[f"{case.name}-poisoned"]  # type: ignore[attr-defined]
    assert min(row["spoilt"], row["clean"]) > 20, row  # type: ignore[type-var, operator]
    assert_bad_values_stay_with_their_keepers(row)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", POISONED, ids=lambda case: case.name)
def test_bad_keys_and_values_stay_with_their_keepers_on_the_device(case: object) -> None:
    assert_bad_values_stay_with_their_keepers(case_module().poisoned_case(case, "cuda"))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_device_stays_within_twice_the_error_of_the_dtype(case: object) -> None:
    assert_within_budget(case_module().check(case, "cuda"))


@pytest.mark.gpu
@needs_gpu
def test_nan_query_spoils_its_own_row_only_on_the_device() -> None:
    assert case_module().nan_row("cuda")["bad"] == [[0, 5, 1]]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(
    shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed"
)
def test_compute_sanitizer_finds_no_access_outside() -> None:
    script = [sys.executable, str(HERE / "triton_cases.py"), "cuda"]
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that every end is guarded
    tool = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    done = subprocess.run([*tool, *script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


COMPILED = [(64, 64, False, False), (128, 128, False, False), (128, 128, True, True)]


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("head_dim", "q_block", "masked", "gather"), COMPILED)
def test_compiles_without_spills_and_within_shared_memory(
    head_dim: int, q_block: int, masked: bool, gather: bool, capability: int
) -> None:
    from dittools.kernels.triton_aot import Variant

    assert_fits(Variant(head_dim, q_block, 64, masked=masked, gather=gather), capability)


@needs_triton
@pytest.mark.parametrize(("quant", "capability"), [("int8", 80), ("int8+fp8", 90)])
def test_eight_bit_variants_compile_without_spills(quant: str, capability: int) -> None:
    from dittools.kernels.triton_aot import Variant

    assert_fits(Variant(128, 128, 64, quant=quant), capability)


@needs_triton
def test_eight_bit_backends_refuse_with_the_reason() -> None:
    call = call_of(dim=16)
    for name in ("triton_int8", "triton_int8_int8", "triton_int8_fp8"):
        reasons = "; ".join(load(name).not_supported(call, half_mask(block=16)))
        assert load(name).name == name
        assert "needs CUDA tensors" in reasons
        assert "head_dim above 16, got 16" in reasons
        assert "takes float16 or bfloat16" in reasons
        assert ("multiple of 32, got 16" in reasons) == (name != "triton_int8")
        assert ("compute capability 8.9" in reasons) == name.endswith("fp8")
        with pytest.raises(UnsupportedCall, match="needs CUDA tensors"):
            load(name).block_sparse(call, half_mask(block=16))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_main_variant_compiles_without_spills(capability: int) -> None:
    from dittools.kernels.triton_aot import main_variants

    for variant in main_variants():
        if variant.quant == "int8+fp8" and capability < 89:
            continue
        assert_fits(variant, capability)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_second_pass_compiles_without_spills(capability: int) -> None:
    from dittools.kernels.triton_aot import Variant

    wide = Variant(128, 128, 64, gather=True, bias=True, masked=True, mend=True)
    assert_fits(wide, capability)


def assert_fits(variant: object, capability: int) -> None:
    from dittools.kernels.triton_aot import SHARED_LIMIT, compile_variant

    used = compile_variant(variant, capability)  # type: ignore[arg-type]
    print(capability, variant, used)
    assert used.spill_bytes == 0
    assert used.shared_kib <= SHARED_LIMIT[capability]  # the compiler accepts more than a block has
    assert used.registers * used.config.num_warps * 32 <= 65536
    if variant.mend:  # type: ignore[attr-defined]
        return  # rows that were spoilt alone: it may take its time
    assert used.async_copies
    wide = variant.dtype != torch.float32  # type: ignore[attr-defined]
    assert used.tensor_core == ("wgmma" if capability == 90 and wide else "mma")


@needs_triton
def test_configured_tiles_that_do_not_divide_their_block_are_refused(tmp_path: Path) -> None:
    from dittools.kernels import triton_config

    table = tmp_path / "tuning.json"
    for tile, problem in ((128, "do not divide"), (48, "no powers of two"), (0, "no powers of")):
        table.write_text(json.dumps({"64/128x64/bfloat16": [128, tile, 4, 2, 0]}))
        with pytest.raises(UnsupportedCall, match=problem):
            triton_config.load_tuning(table)
    table.write_text(json.dumps({"64/128x64/bfloat16": ["wide"]}))
    with pytest.raises(UnsupportedCall, match="malformed"):
        triton_config.load_tuning(table)


@needs_triton
def test_tuning_table_replaces_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dittools.kernels import triton_config

    monkeypatch.setattr(triton_config, "_TUNED", {})
    table = tmp_path / "tuning.json"
    table.write_text(json.dumps({"64/128x64/bfloat16": [64, 32, 4, 2, 0]}))
    monkeypatch.setenv("DITTOOLS_TRITON_TUNING", str(table))
    triton_config._load_once.cache_clear()
    assert triton_config.default_config(50, 128, 64, torch.bfloat16)[:3] == (64, 32, 4)
    assert triton_config.default_config(50, 128, 64, torch.float16)[:2] == (128, 64)


def half_mask(tokens: int = 200, heads: int = 2, block: int = 32) -> BlockMask:
    torch.manual_seed(3)
    return BlockMask.from_dense(torch.rand(heads, tokens, tokens) < 0.5, block)


def call_of(tokens: int = 200, heads: int = 2, dim: int = 16, **more: object) -> AttentionCall:
    q, k, v = torch.randn(3, 1, tokens, heads, dim)
    return AttentionCall(q, k, v, TokenGrid(1, 1, tokens), **more)  # type: ignore[arg-type]


@needs_triton
def test_refuses_what_it_cannot_run_with_the_reason() -> None:
    call, mask = call_of(), half_mask()
    with pytest.raises(UnsupportedCall, match="needs CUDA tensors, got cpu"):
        choose("triton", call, mask)
    reasons = load("triton").not_supported(call_of(scale=-1.0), half_mask(block=24))
    assert any("scale must be positive" in reason for reason in reasons)
    assert any("multiples of 16, got 24 x 24" in reason for reason in reasons)
    wide = load("triton").not_supported(call_of(tokens=100, dim=320), mask)
    assert any("head_dim is at most 256" in reason for reason in wide)
    assert any("blocks of 32" in reason for reason in wide)
    graph = call_of()
    graph.query.requires_grad_()
    assert any("no backward" in reason for reason in load("triton").not_supported(graph, mask))


def test_program_is_built_once_per_mask_and_size() -> None:
    call, mask = call_of(), half_mask()
    assert program(mask, call) is program(mask, call)
    assert program(half_mask(), call) is not program(mask, call)


def test_program_starts_with_whole_heads_and_levels_the_end_with_short_rows() -> None:
    keep = torch.zeros(2, 8, 64, dtype=torch.bool)
    lengths = torch.stack((torch.arange(1, 9), torch.arange(1, 9) * 4))
    for head in range(2):
        for row in range(8):
            keep[head, row, : lengths[head, row]] = True
    mask = BlockMask(keep, 16, q_tokens=128, kv_tokens=1024)
    task = build_program(mask, torch.device("cpu"), 2, 128, 1024).task.long()
    assert sorted(task.tolist()) == list(range(16))
    work = lengths.flatten()[task]
    assert (task[:4] >= 8).all()  # the denser head first
    assert work[:4].tolist() == [32, 28, 24, 20]
    assert work[-3:].tolist() == [3, 2, 1]


def test_program_puts_entries_that_need_a_test_last() -> None:
    mask = BlockMask(torch.ones(1, 3, 3, dtype=torch.bool), 64, q_tokens=150, kv_tokens=150)
    made = build_program(mask, torch.device("cpu"), 4, 150, 150)
    assert made.masked  # the last key block is ragged
    assert made.masked_from.tolist() == [2, 5, 8]
    assert made.block.tolist() == [0, 1, 2] * 3
    assert not build_program(mask, torch.device("cpu"), 4, 192, 192).masked


def test_op_runs_the_program_on_cpu_as_the_reference_does() -> None:
    for case in CASES:
        if case.dtype != "fp32":
            continue
        call, mask = case_module().build(case)
        bias = call.additive_mask()
        out, lse = program(mask, call)(call.query, call.key, call.value, bias, call.scale)
        want, want_lse = ReferenceBackend().block_sparse(call, mask, return_lse=True)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)


def test_op_has_a_correct_fake_and_schema() -> None:
    call, mask = call_of(), half_mask()
    made = program(mask, call)
    args = (call.query, call.key, call.value, *made[:7], None, 0.25, *made[7:12])
    torch.library.opcheck(
        block_sparse,
        args,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_op_stays_one_graph_under_torch_compile(backend: str) -> None:
    call, mask = call_of(), half_mask()
    made = program(mask, call)

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = made(q * 2, k, v)
        return out * lse.exp()[..., None]

    compiled = torch.compile(block, backend=backend, fullgraph=True)
    torch._dynamo.reset()
    got = compiled(call.query, call.key, call.value)
    torch.testing.assert_close(got, block(call.query, call.key, call.value))


@pytest.mark.parametrize(
    ("name", "value"), [("block", 7), ("tile", 10_000), ("task", -1), ("indptr", 10_000)]
)
def test_debug_mode_names_the_list_that_points_outside(
    name: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, mask = call_of(), half_mask()
    made = program(mask, call)
    damaged = getattr(made, name).clone()
    damaged[0] = value
    made = made._replace(**{name: damaged})
    monkeypatch.setenv("DITTOOLS_DEBUG", "1")
    with pytest.raises(UnsupportedCall, match=f"`{name}` points outside"):
        made(call.query, call.key, call.value)


def test_debug_mode_refuses_another_length(monkeypatch: pytest.MonkeyPatch) -> None:
    made = program(half_mask(), call_of())
    longer = call_of(tokens=220)
    monkeypatch.setenv("DITTOOLS_DEBUG", "1")
    with pytest.raises(UnsupportedCall, match="other lengths; expected 200 queries, 200 keys"):
        made(longer.query, longer.key, longer.value)


def test_importing_dittools_leaves_triton_alone() -> None:
    code = "import sys; sys.modules['triton'] = None; import dittools, dittools.kernels.program"
    subprocess.run([sys.executable, "-c", code], check=True)
