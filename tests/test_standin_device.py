"""What a CUDA device would refuse or wait for, found without one; see `standin`."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from standin import CUDA, Device, Mixed, StandIn, Wait, move
from toys import build_toy, generate

from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend, choose, load
from dittools.kernels.auto import resolve
from dittools.kernels.program import build_program
from dittools.mask import BlockMask
from dittools.methods import METHODS, build
from dittools.methods.placing import label_counts, placed
from dittools.methods.selection import row_mask
from dittools.metrics.latency import PartTimer
from dittools.patches import attach
from dittools.patches.flight import put_heads
from dittools.patches.groups import _note
from dittools.patches.meter import Meter
from dittools.patches.perturb import select_heads
from dittools.patches.runtime import Tally
from dittools.patches.sites import ORIGINALS, SeamCall
from dittools.patches.timing import Stopwatch
from dittools.searching.candidates import Candidate, measured
from dittools.searching.probe import Probe, Sites
from dittools.searching.rows import sample_rows

HERE = Path(__file__).parent
S = {"block_size": 16}
GROUPS = {"block_size": 16, "key_block": 16, "least_queries": 8, "least_keys": 8}
# method, parameters, waits of a first call, of later ones; a Triton kernel takes blocks of 16.
# What is left, where one wait reads the number of kept blocks, without which there are no lists:
#   a choice that splits heads (svg), tries modes out (sparse_vdit) or orders (paro, metered);
#   whether everything is kept (svg2, clustered, psa): dense attention is bit-equal there;
#   the tiles of groups (svg2, clustered; vmoba's parts): the length of the next call;
#   k-means that may stop (svg2, clustered, metered over alike keys, which cut anew at times);
#   the number of bit tiles, and probe rows that are not finite (metered, clustered).
CASES: list[tuple[str, dict[str, Any], int, int]] = [
    ("dense", {}, 0, 0),
    ("radial", S, 8, 0),
    ("gna", {"window": (3, 4, 4), "block_size": 16}, 18, 0),
    ("sta", {"window": (3, 3, 3), "tile": (1, 2, 8)}, 18, 0),
    ("clear", {"radius": 3, "block_size": 16}, 18, 0),
    ("sparse_vdit", {"mode": ("diagonal", "full", "stripe"), "block_size": 16}, 30, 0),
    ("sparse_vdit", S, 30, 0),
    ("paro", {"block_size": 16, "density": 0.3}, 24, 1),
    ("vmoba", S, 12, 3),
    ("vmoba", {"block_size": 16, "pooled": True}, 12, 1),
    ("rectified", S, 8, 1),
    ("psa", {}, 10, 2),
    ("svg", S, 24, 1),
    ("svg2", {**GROUPS, "mass": 0.5}, 80, 4),
    ("sparge", S, 8, 1),
    ("freeswim", {}, 10, 0),
    ("agent", {}, 4, 0),
    ("tome", {}, 0, 0),
    ("clustered", {**GROUPS, "probes": 8}, 90, 7),
    ("metered", {"block_size": 16, "probes": 16}, 24, 3),
    ("metered", {"block_size": 32, "probes": 16, "keys": "alike", "rows": 8}, 90, 5),
    ("random", S, 12, 0),
    ("oracle", S, 8, 1),
]
FORMS = [  # grid, dtype, clips, weights of keys
    (TokenGrid(4, 6, 8), torch.float32, 1, ""),
    (TokenGrid(5, 7, 9, text_before=3, text_after=7), torch.bfloat16, 2, "mask"),
    (TokenGrid(1, 8, 12, text_after=5), torch.float32, 1, "bias"),
]


def call_of(
    grid: TokenGrid, dtype: torch.dtype = torch.float32, batch: int = 1, weights: str = ""
) -> AttentionCall:
    q, k, v = (torch.randn(batch, grid.total, 3, 32).to(dtype) for _ in range(3))
    mask = torch.ones(batch, grid.total, dtype=torch.bool)
    mask[:, -3:] = False
    own = slice(grid.text_before, grid.text_before + grid.tokens)
    return AttentionCall(
        q,
        k,
        v,
        grid,
        steps=8,
        key_mask=mask if weights == "mask" else None,
        key_bias=torch.randn(1, 3, grid.total) if weights == "bias" else None,
        features=torch.randn(batch, grid.tokens, 16).to(dtype),
        unrotated=q[:, own],
    )


def there(call: AttentionCall) -> AttentionCall:
    """The same call on the device."""
    names = ("query", "key", "value", "key_mask", "key_bias", "features", "unrotated")
    tensors = {name: getattr(call, name) for name in names}
    moved = {name: t if t is None else t.to(CUDA) for name, t in tensors.items()}
    return replace(call, **moved, memory={})


class OneDevice:
    """A backend that looks at where the masks it is given stand."""

    def __init__(self, backend: Backend) -> None:
        self.inner, self.name = backend, backend.name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def block_sparse(self, call: AttentionCall, mask: BlockMask, **options: Any) -> Any:
        parts = [mask.keep, mask.tiles, mask.tile_index, mask.order and mask.order.index]
        places = {t.device for t in parts if t is not None}
        assert places == {call.query.device}, f"{self.name}: a mask in pieces on {places}"
        return self.inner.block_sparse(call, mask, **options)


def attended(
    name: str, params: dict[str, Any], call: AttentionCall, backend: str, device: Device | None
) -> tuple[list[torch.Tensor], list[Counter[Wait]]]:
    """Return the outputs of three steps in a row, and what was waited for in each."""
    method, runner = build(name, params), resolve(backend)
    outputs, waits = [], []
    for step in range(3):
        here = replace(call, step=step)
        meter = Meter(runner, here, lambda here=here: runner.dense(here), Stopwatch())
        if device is not None:
            device.counted()
            meter._backend = OneDevice(runner)  # type: ignore[assignment]
        outputs.append(method.attend(here, meter))
        meter.density(here)
        waits.append(Counter() if device is None else device.counted())
    return outputs, waits


def test_the_cases_are_all_methods() -> None:
    assert {name for name, *_ in CASES} == set(METHODS)


@pytest.mark.parametrize(("grid", "dtype", "batch", "weights"), FORMS)
@pytest.mark.parametrize(("name", "params", "first", "later"), CASES)
def test_methods_do_on_the_device_what_they_do_on_the_cpu(
    name: str,
    params: dict[str, Any],
    first: int,
    later: int,
    grid: TokenGrid,
    dtype: torch.dtype,
    batch: int,
    weights: str,
) -> None:
    call = call_of(grid, dtype, batch, weights)
    if refused := build(name, params).not_supported(call):
        pytest.skip(refused[0])
    want, _ = attended(name, params, replace(call, memory={}), "cpu", None)
    with Device() as device:
        got, waits = attended(name, params, there(call), "triton", device)
    limit = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.03}
    for one, other in zip(got, want, strict=True):
        assert one.device == CUDA
        torch.testing.assert_close(one.inner, other, **limit)  # type: ignore[attr-defined]
    assert sum(waits[0].values()) <= first, waits[0]
    for seen in waits[1:]:
        assert sum(seen.values()) <= later, seen


@pytest.mark.parametrize("name", ["gna", "paro", "svg2"])
def test_the_specification_runs_on_the_device(name: str) -> None:
    params = next(params for known, params, *_ in CASES if known == name)
    call = call_of(TokenGrid(2, 5, 7, text_after=3))
    want, _ = attended(name, params, replace(call, memory={}), "reference", None)
    with Device() as device:
        got, _ = attended(name, params, there(call), "reference", device)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.inner, other)  # type: ignore[attr-defined]


def test_a_new_mask_costs_one_wait_and_a_known_one_none() -> None:
    keep = torch.rand(3, 12, 12) < 0.5
    grid = TokenGrid(1, 12, 15)  # a ragged tail
    call = call_of(grid)
    want = build_program(row_mask(keep.clone(), grid, 16), CUDA_FREE, 3, 180, 180)
    with Device() as device:
        mask = row_mask(keep.to(CUDA), grid, 16)
        device.counted()
        assert 0 < mask.computed < 1
        assert not mask.is_whole
        made = build_program(mask, CUDA, 3, 180, 180)
        waits = device.counted()
        load("triton").block_sparse(there(call), mask)
        device.counted()
        load("triton").block_sparse(there(call), mask)
        again = device.counted()
    assert sum(waits.values()) == 1, waits
    moved = sum(
        1
        for t in (call.query, call.key, call.value, call.features, call.unrotated)
        if t is not None
    )
    assert sum(again.values()) == moved, again  # the call's own tensors, by `there`
    for name, part in made._asdict().items():
        other = getattr(want, name)
        same = torch.equal(part.inner, other) if isinstance(part, StandIn) else part == other
        assert same, name


CUDA_FREE = torch.device("cpu")


def test_copies_of_masks_and_tables_are_made_once() -> None:
    mask = build("gna").mask(TokenGrid(4, 6, 8))  # type: ignore[attr-defined]
    table = torch.arange(5)
    with Device() as device:
        assert mask.to(CUDA) is mask.to(CUDA)
        assert placed(table, CUDA) is placed(table, CUDA)
        device.counted()
        assert mask.to(CUDA).computed == mask.computed
        assert not device.counted()
        counts = label_counts(torch.tensor([2, 0, 2], device=CUDA), 4)
        device.counted()
        assert counts.tolist() == [1, 0, 2, 0]


def test_auto_takes_the_kernel_and_never_the_specification_where_dense_will_do() -> None:
    call = call_of(TokenGrid(2, 8, 16))
    small = BlockMask(torch.rand(3, 32, 32) < 0.2, 8, q_tokens=256, kv_tokens=256)
    large = BlockMask(torch.rand(3, 16, 16) < 0.2, 16, q_tokens=256, kv_tokens=256)
    auto = resolve("auto")
    with Device():
        asked = there(call)
        assert choose("auto", asked, large.to(CUDA)).name == "triton"
        assert not auto.prefers_dense(asked, large.to(CUDA))
        assert choose("auto", asked, small.to(CUDA)).name == "reference"  # blocks of 8
        assert auto.prefers_dense(asked, small.to(CUDA))
        assert not load("reference").prefers_dense(asked, small.to(CUDA))
        few = replace(asked, quantize="int4")  # dense would not round
        assert not auto.prefers_dense(few, small.to(CUDA))


def test_flex_gets_its_lists_and_bias_on_the_device() -> None:
    grid = TokenGrid(3, 5, 7, text_after=3)
    mask = build("gna", {"window": (3, 3, 3), "block_size": 16}).mask(grid)  # type: ignore[attr-defined]
    flex: Any = load("flex")
    with Device() as device:
        call = there(call_of(grid, weights="bias"))
        made = flex._flex_mask(mask, call)
        device.counted()
        assert flex._flex_mask(mask, call) is made
        assert not device.counted()
        assert {made.kv_indices.device, made.full_kv_indices.device} == {CUDA}
        zero = torch.zeros((), dtype=torch.long, device=CUDA)
        kept = made.mask_mod(zero, zero, torch.arange(16, device=CUDA), zero)
        assert kept.device == CUDA


LARGE: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2}


@pytest.mark.parametrize("name", ["gna", "metered"])
def test_a_pipeline_gives_the_same_picture(name: str) -> None:
    params = next(params for known, params, *_ in CASES if known == name)
    method = build(name, params)
    pipe = build_toy("wan")
    with attach(pipe, method, backend="cpu", dense_steps=0):
        want = generate(pipe, "wan", **LARGE)
    with Device() as device:
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                move(part)
        with attach(pipe, method, backend="triton", dense_steps=0) as handle:
            device.counted()
            got = generate(pipe, "wan", **LARGE)
            waits = device.counted()
            report = handle.report()
    assert not report.incidents
    assert report.density < 1
    latents = got.inner if isinstance(got, StandIn) else got
    torch.testing.assert_close(latents, want, rtol=1e-3, atol=1e-3)
    calls = sum(count for wait, count in waits.items() if wait.where.startswith("patches/refusals"))
    inside = {w: n for w, n in waits.items() if w.where.startswith("patches/")}
    # inputs are looked at before each call, what the recorder saw is read once per forward
    forwards = sum(n for w, n in inside.items() if w.where.startswith("patches/flight"))
    assert calls + forwards == sum(inside.values()), inside
    assert 0 < forwards < calls


@pytest.mark.parametrize(
    "method",
    [
        build("gna", {"window": (3, 3, 3), "block_size": 16}),
        build("paro", {"block_size": 16, "density": 0.3}),
        build("vmoba", {"block_size": 16, "pooled": True}),
        build("metered", {"block_size": 16, "probes": 16}),
        build("svg2", {**GROUPS, "mass": 0.5}),
    ],
    ids=lambda method: method.name,
)
def test_the_probe_of_a_search_measures_the_same(method: Any) -> None:
    grid = TokenGrid(4, 6, 8, text_after=5)
    candidate = measured(method, grid)
    assert candidate is not None
    candidates = [Candidate(build("dense"), None, 1.0, 1.0, 0), candidate]
    sites = Sites(grid, 1, 3, (0, 1), 2, frozenset((0, 1)), sample_rows(grid.total, 40, 0))
    gains = [torch.randn(3, 32, 32)]
    call = call_of(grid)

    def probed(call: AttentionCall, backend: str) -> dict[str, torch.Tensor]:
        probe = Probe(sites, candidates, gains, carry=0.1)
        for step in range(2):
            probe.attend(replace(call, step=step, steps=2), resolve(backend))
        return probe.results()

    want = probed(replace(call, memory={}), "cpu")
    with Device():
        got = probed(there(call), "triton")
    for name, numbers in want.items():
        torch.testing.assert_close(got[name], numbers, msg=name)


@pytest.fixture(scope="module")
def launches() -> list[dict[str, Any]]:
    """Launches in Triton's interpreter, which is chosen when Triton is imported."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(HERE / "standin_triton.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_launch_on_the_device_of_their_tensors(launches: list[dict[str, Any]]) -> None:
    for row in launches:
        assert row["refused"] == []
        assert row["device"] == "cuda:1"
        assert row["launched"], row["name"]
        assert set(row["launched"]) == {1}, "launched on the current device, cuda:0"
        assert row["waits"] == {}, row


def test_launches_give_what_the_specification_gives(launches: list[dict[str, Any]]) -> None:
    for row in launches:
        assert row["apart"] < (0.01 if "int8" in row["name"] else 5e-4), row
        assert row["lse_error"] < 2e-5, row


def test_a_program_that_sets_tf32_by_its_newer_name_can_launch() -> None:
    pytest.importorskip("triton")
    from dittools.kernels.triton_block_sparse import constants
    from dittools.kernels.triton_config import default_config

    query = torch.zeros(1, 32, 3, 32)
    made = build_program(BlockMask.full(32, 32, 16), CUDA_FREE, 3, 32, 32)
    config = default_config(32, 16, 16, torch.float32)
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        for name, wanted in (("tf32", "tf32"), ("ieee", "tf32x3")):
            settings.fp32_precision = name
            assert constants(made, query, config, bias=False)["PRECISION"] == wanted
    finally:
        settings.fp32_precision = before


@pytest.mark.parametrize("weights", ["mask", "bias"])
def test_weights_of_keys_on_another_device_are_refused_by_name(weights: str) -> None:
    call = call_of(TokenGrid(1, 4, 4), weights=weights)
    with Device():
        moved = {name: getattr(call, name).to(CUDA) for name in ("query", "key", "value")}
        with pytest.raises(UnsupportedCall, match=f"key_{weights} .*expected cuda:0; got cpu"):
            replace(call, **moved)


def test_heads_are_picked_without_a_wait() -> None:
    whole = call_of(TokenGrid(1, 4, 4))
    with Device() as device:
        call = there(whole)
        device.counted()
        part = call.heads([2, 0])
        number = ORIGINALS.add(torch.nn.functional.scaled_dot_product_attention, heads_first=False)
        some = select_heads(SeamCall(call.query, call.key, call.value, {}, number), (0, 2))
        put = put_heads(call.query, (0,), call.query[:, :, 1:2])
        assert not device.counted()
        assert torch.equal(part.key.inner, whole.key[:, :, [2, 0]])  # type: ignore[attr-defined]
        assert torch.equal(put.inner[:, :, 0], whole.query[:, :, 1])  # type: ignore[attr-defined]
        assert torch.equal(some.value.inner, whole.value[:, :, [0, 2]])  # type: ignore[attr-defined]


def test_parts_are_timed_on_the_device_they_run_on() -> None:
    module = torch.nn.Identity()
    with Device() as device:
        timer = PartTimer({"part": [(module, "forward")]}, "cuda:1")
        with timer.running():
            module(torch.zeros(1))
        events = timer._spans["part"][0]
        assert {event.stream for event in events} == {torch.device("cuda:1")}
        timer.milliseconds()
        assert [wait.kind for wait in device.counted()] == ["all of cuda:1"]


def test_a_model_that_moved_adds_its_densities_where_it_is() -> None:
    runtime: Any = SimpleNamespace(used=set())
    tally = Tally()
    with Device() as device:
        for place in ("cuda:0", "cuda:1", "cuda:1"):
            share = torch.tensor(0.25, device=place)
            meter: Any = SimpleNamespace(
                density=lambda whole, share=share: share,
                declined=False,
                was_sparse=True,
                used=set(),
            )
            _note(runtime, meter, call_of(TokenGrid(1, 2, 2)), tally, quiet=False)
        device.counted()
        assert float(tally.sparse_density) == 0.75


def test_tiles_of_consumer_blackwell_are_those_that_do_not_spill() -> None:
    pytest.importorskip("triton")
    from dittools.kernels.triton_config import default_config

    def rows(capability: int, **more: bool) -> int:
        asked = default_config(128, 128, 64, torch.bfloat16, capability=capability, **more)
        return asked.tile_m

    assert [rows(c) for c in (80, 89, 90, 100, 120)] == [64, 64, 128, 128, 64]
    assert rows(120, masked=False) == 128


def test_what_a_launch_is_refused_for_is_caught_where_launches_are_timed() -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    spec = importlib.util.spec_from_file_location("bench_gpu", HERE.parent / "bench" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert errors.OutOfResources in module.launch_errors()
    assert not issubclass(errors.OutOfResources, RuntimeError)


def test_the_device_refuses_what_cuda_refuses() -> None:
    with Device() as device:
        there, here = torch.ones(2, 3, device=CUDA), torch.ones(2, 3)
        for wrong in (
            lambda: there + here,
            lambda: torch.cat((there, here)),
            lambda: here[torch.zeros(1, dtype=torch.long, device=CUDA)],
            lambda: there.masked_fill(here > 0, 0),
            lambda: there.long() @ there.long().t(),
            lambda: there + torch.ones(2, 3, device="cuda:1"),
            lambda: torch.randn(2, generator=torch.Generator(), device=CUDA),
        ):
            with pytest.raises(Mixed):
                wrong()
        device.counted()
        assert (there + torch.tensor(1.0)).device == CUDA  # 0-d numbers may come from anywhere
        there[:, 0] = 2
        there.to(CUDA, torch.float64).add_(1).sum()
        assert not device.counted()
        assert float(there.sum()) == 8
        assert there[there > 1].tolist() == [2, 2]
        assert there[:, torch.tensor([0])].shape == (2, 1)
        here.to(CUDA, non_blocking=True)
        assert len(here.to(CUDA)) == 2
        kinds = Counter(wait.kind for wait in device.counted().elements())
    assert kinds == {
        "_local_scalar_dense": 1,
        "bool index": 1,
        "to the host": 1,
        "to the device": 2,
    }
