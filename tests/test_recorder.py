"""The flight recorder: faults of sparse attention are seen, named, and answered by dense."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from toys import SPARSE, generate

from dittools.call import AttentionCall
from dittools.cli import main
from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.kernels import Backend, load
from dittools.mask import BlockMask
from dittools.methods import build
from dittools.methods.base import tell
from dittools.patches import Attachment, Recorder, Report, attach, detach
from dittools.patches.recorder import (
    BLIND,
    BROKEN,
    FAR,
    HELD,
    HOPELESS,
    IDLE,
    REST_DENSE,
    UNREPAIRED,
)
from dittools.patches.refusals import NOT_FINITE
from dittools.patches.rescue import _in_pieces
from dittools.patches.runtime import Moment
from dittools.patches.sites import ORIGINALS, SeamCall
from dittools.pipelines import tiny
from dittools.plans import Plan, Rule

SITES = ["transformer.blocks.0.attn1", "transformer.blocks.1.attn1"]


@dataclass(frozen=True)
class Talker:
    """Runs sparse, and has something to say of every call."""

    name: ClassVar[str] = "talker"

    def not_supported(self, call: AttentionCall) -> list[str]:
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        tell(backend, "talker ran a head dense")
        return SPARSE.attend(call, backend)


@pytest.fixture(scope="module")
def shared() -> Any:
    return tiny.build("wan")


@pytest.fixture
def pipe(shared: Any) -> Iterator[Any]:
    yield shared
    detach(shared)


@pytest.fixture(scope="module")
def stock(shared: Any) -> torch.Tensor:
    return generate(shared, "wan")


def test_what_a_method_tells_of_a_call_reaches_the_report(pipe: Any) -> None:
    with attach(pipe, Talker(), backend="reference") as handle:
        generate(pipe, "wan")
        report = handle.report()
    assert report.calls["sparse"] == 16
    assert report.fallbacks == {"talker ran a head dense": 16}
    assert report.fallback_sites == {"talker ran a head dense": SITES}


@dataclass(frozen=True)
class Faulty:
    """Exact attention, but for one fault in one head at some steps of one layer."""

    name: ClassVar[str] = "faulty"
    fault: str = "nan"
    layer: int = 1
    head: int = 1
    step: int = 1
    calls: list[int] = field(default_factory=list)  # steps at which it ran at the layer

    def not_supported(self, call: AttentionCall) -> list[str]:
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        keep = torch.ones(call.head_count, 3, 3, dtype=torch.bool)
        mine = call.layer == self.layer
        if mine:
            self.calls.append(call.step)
        hit = mine and call.step >= self.step
        if hit and self.fault in ("runtime", "memory", "interrupt", "input"):
            raise FAULTS[self.fault]
        if hit and self.fault == "mask":
            keep[self.head] = torch.eye(3, dtype=torch.bool)[[1, 2, 0]]  # the wrong blocks
        if hit and self.fault == "row":
            keep[self.head, 1] = False
        out = load("reference").block_sparse(call, BlockMask(keep, 6))
        tell_of_work(backend)
        if hit and self.fault == "nan":
            out[:, 3, self.head, 2] = float("nan")
        if hit and self.fault == "logits":
            q, k, v = (t[:, :, self.head].half() for t in (call.query, call.key, call.value))
            scores = (1e4 * q) @ (1e4 * k).transpose(1, 2)  # past 65504: infinite
            out[:, :, self.head] = scores.softmax(-1).float() @ v.float()
        if hit and self.fault == "scale":
            out[:, :, self.head] *= 20
        shorter = {"length": out[:, 1:], "heads": out[:, :, :1], "none": None, "pair": (out, 0)}
        if hit and self.fault in shorter:
            return cast(torch.Tensor, shorter[self.fault])
        return out.double() if hit and self.fault == "double" else out


FAULTS: dict[str, BaseException] = {
    "runtime": RuntimeError("the kernel\nfailed"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "interrupt": KeyboardInterrupt(),
    "input": InputError("this is the user's to mend"),
}


def tell_of_work(backend: Backend) -> None:
    """Let the meter know that the call was sparse: the mask ran on a backend of its own."""
    cast(Any, backend).was_sparse = True


def of(report: Report) -> list[tuple[int, tuple[int, ...], int, str]]:
    """Return layer, heads, step and reason of every incident."""
    return [(i.layer, i.heads, i.step, i.reason) for i in report.incidents]


def faulty_run(
    pipe: Any,
    fault: str,
    recorder: bool | Recorder = True,
    layer: int = 1,
    **changes: Any,
) -> tuple[torch.Tensor, Report, Faulty]:
    method = Faulty(fault, layer)
    with attach(pipe, method, backend="reference", recorder=recorder) as handle:
        return generate(pipe, "wan", **changes), handle.report(), method


@pytest.mark.parametrize(
    ("fault", "reason", "settings"),
    [
        ("nan", BROKEN, Recorder()),
        ("logits", BROKEN, Recorder()),
        ("mask", FAR, Recorder(every=1, limit=0.5)),
        ("row", IDLE, Recorder(every=1)),
    ],
)
def test_a_head_in_trouble_is_mended_and_stays_dense(
    pipe: Any, stock: torch.Tensor, fault: str, reason: str, settings: Recorder
) -> None:
    broken, blind, _ = faulty_run(pipe, fault, recorder=False)
    assert not torch.allclose(broken, stock, atol=1e-3)
    assert blind.incidents == []
    latents, report, method = faulty_run(pipe, fault, settings)
    torch.testing.assert_close(latents, stock, atol=2e-5, rtol=2e-5)
    assert of(report) == [(1, (1,), 1, reason)]
    assert method.calls == [0, 0, 1, 1, 2, 2, 3, 3]  # the other head still runs sparse
    assert report.fallbacks == {HELD: 6}
    assert report.incidents[0].site == SITES[1]
    assert report.incidents[0].outcome == REST_DENSE
    assert "layer 1, head 1, step 1" in str(report)
    assert reason in str(report)


@pytest.mark.parametrize("mode", ["skip", ("skip", "stripe")])
def test_heads_that_the_plan_leaves_out_stay_out(pipe: Any, mode: Any) -> None:
    method = build("sparse_vdit", {"mode": mode, "density": 0.4, "block_size": 8})
    with attach(pipe, method, recorder=Recorder(every=1), backend="cpu") as handle:
        generate(pipe, "wan")
        report = handle.report()
    assert not report.incidents
    assert HELD not in report.fallbacks
    assert report.density < 0.4


def test_heads_that_a_method_chose_to_leave_out_stay_out(pipe: Any) -> None:
    settings = {"skip": True, "penalty": 9.0, "threshold": 99.0, "density": 0.4, "block_size": 8}
    method = build("sparse_vdit", settings)
    with attach(pipe, method, recorder=Recorder(every=1, limit=0.5), backend="cpu") as handle:
        generate(pipe, "wan")
        report = handle.report()
    assert not report.incidents
    assert HELD not in report.fallbacks
    assert report.density < 0.3


@pytest.mark.parametrize("each_call", [True, False])
def test_methods_that_mean_to_differ_from_dense_may(pipe: Any, each_call: bool) -> None:
    window = {"native": (1, 1), "attn_temperature": 1.0, "block_size": 8}
    disk = {"radius": 1.0, "block_size": 8}
    for name, params, is_meant in (
        ("freeswim", window, True),
        ("clear", {**disk, "fine_tuned": True}, True),
        ("clear", disk, False),
    ):
        settings = Recorder(every=1, limit=0.01, each_call=each_call)
        with attach(pipe, build(name, params), recorder=settings, backend="cpu") as handle:
            generate(pipe, "wan")
            report = handle.report()
        assert (report.calls["sparse"] == 16) == is_meant
        assert (FAR in {incident.reason for incident in report.incidents}) != is_meant
        if is_meant:
            assert report.error is not None  # told all the same
            assert report.error > 0.1


def test_a_jump_in_size_is_looked_into_at_once(pipe: Any, stock: torch.Tensor) -> None:
    method = Faulty("scale", step=3)  # the turn of the layer was step 0
    for drift, heads in ((4.0, [(1,)]), (1e6, [])):
        settings = Recorder(limit=0.5, drift=drift)
        with attach(pipe, method, backend="reference", recorder=settings) as handle:
            latents = generate(pipe, "wan")
            assert [heads for _, heads, _, _ in of(handle.report())] == heads
        assert torch.allclose(latents, stock, atol=2e-5) == bool(heads)


def test_the_mended_call_is_the_stock_one_bit_for_bit(pipe: Any) -> None:
    call = Call()
    with attach(pipe, Faulty("nan", step=0), backend="reference") as handle:
        found = call.through(handle)
        assert len(handle.report().incidents) == 1
    assert torch.equal(found[:, :, 1], call.stock[:, :, 1])
    with attach(pipe, Faulty("nothing"), backend="reference") as handle:
        assert torch.equal(found[:, :, 0], call.through(handle)[:, :, 0])


def test_every_run_starts_with_all_heads_sparse(pipe: Any) -> None:
    with attach(pipe, Faulty("nan"), backend="reference") as handle:
        generate(pipe, "wan")
        generate(pipe, "wan")
        assert of(handle.report()) == [(1, (1,), 1, BROKEN)] * 2
        handle.reset()
        assert handle.report().incidents == []


@pytest.mark.parametrize(("fault", "name"), [("runtime", "RuntimeError"), ("memory", "OutOfMem")])
def test_a_kernel_that_raises_is_replaced_by_dense(
    pipe: Any, stock: torch.Tensor, fault: str, name: str
) -> None:
    latents, report, method = faulty_run(pipe, fault)
    torch.testing.assert_close(latents, stock, atol=2e-5, rtol=2e-5)
    ((layer, heads, step, reason),) = of(report)
    assert (layer, heads, step) == (1, (0, 1), 1)
    assert reason.startswith(name)
    assert "\n" not in reason
    assert method.calls == [0, 0, 1]  # never again in this run
    assert report.layers[1].dense == 6
    assert report.fallbacks == {HELD: 6}


@pytest.mark.parametrize(
    ("fault", "got"),
    [
        ("length", "[1, 17, 2, 12]"),
        ("heads", "[1, 18, 1, 12]"),
        ("none", "NoneType"),
        ("pair", "tuple"),
    ],
)
@pytest.mark.parametrize("recorder", [Recorder(), Recorder(each_call=False), False])
def test_a_result_of_another_shape_is_a_fault_of_the_kernel(
    pipe: Any, stock: torch.Tensor, fault: str, got: str, recorder: bool | Recorder
) -> None:
    if not recorder:
        with pytest.raises(RuntimeError, match=re.escape(got)):
            faulty_run(pipe, fault, recorder)
        return
    latents, report, method = faulty_run(pipe, fault, recorder)
    torch.testing.assert_close(latents, stock, atol=2e-5, rtol=2e-5)
    ((layer, heads, step, reason),) = of(report)
    assert (layer, heads, step) == (1, (0, 1), 1)
    assert got in reason
    assert method.calls == [0, 0, 1]


def test_a_result_of_another_dtype_goes_out_in_that_of_the_query(pipe: Any) -> None:
    call = Call()
    with attach(pipe, Faulty("double", step=0), backend="reference") as handle:
        found = call.through(handle)
    assert found.dtype == call.stock.dtype


def test_the_cause_is_named_before_what_follows_from_it(pipe: Any) -> None:
    _, report, _ = faulty_run(pipe, "nan", Recorder(each_call=False), layer=0)
    assert [(layer, reason.split(" (")[0]) for layer, _, _, reason in of(report)] == [
        (0, BROKEN),
        (1, NOT_FINITE),
    ]


@pytest.mark.parametrize("fault", ["interrupt", "input"])
def test_what_is_not_a_fault_of_the_kernel_is_raised(
    pipe: Any, stock: torch.Tensor, fault: str
) -> None:
    handle = attach(pipe, Faulty(fault), backend="reference")
    with pytest.raises(type(FAULTS[fault])):
        generate(pipe, "wan")
    assert handle.report().incidents == []
    handle.detach()
    assert torch.equal(generate(pipe, "wan"), stock)


def test_without_the_recorder_errors_pass_and_detaching_is_exact(
    pipe: Any, stock: torch.Tensor
) -> None:
    handle = attach(pipe, Faulty("runtime"), backend="reference", recorder=False)
    with pytest.raises(RuntimeError, match="kernel"):
        generate(pipe, "wan")
    handle.detach()
    assert torch.equal(generate(pipe, "wan"), stock)


class Memory:
    """A stock attention that has memory for a few queries only."""

    def __init__(self, room: int) -> None:
        self.room, self.asked = room, list[int]()

    def __call__(self, query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        self.asked.append(query.shape[1])
        if query.shape[1] > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        out: torch.Tensor = dispatch_attention_fn(query, *rest, **options)
        return out


class Call:
    """One attention call of the second layer, with a stock function that can be exchanged."""

    def __init__(self, tokens: int = 18) -> None:
        draw = torch.Generator().manual_seed(3)
        self.tensors = [torch.randn(1, tokens, 2, 16, generator=draw) for _ in range(3)]
        self.stock = self.run(Memory(tokens))

    def run(self, function: Any) -> torch.Tensor:
        out: torch.Tensor = function(*self.tensors)
        return out

    def through(self, handle: Attachment, function: Any = None, **place: Any) -> torch.Tensor:
        """Return what the attachment makes of it."""
        (root,) = handle._roots
        number = ORIGINALS.add(function or Memory(10**6), heads_first=False)
        root.moment = Moment(None, "", **{"step": 0, "steps": 4, "branch": "cond", **place})
        query, key, value = self.tensors
        call = SeamCall(query, key, value, {}, number)
        tally = handle.runtime.tally(root.sites[1])
        grid = TokenGrid(1, 1, self.tensors[0].shape[1])
        rules = handle.plan.rules_for(1, root.sites[1].name, root.moment.step, 4, 2, "cond")
        return root._sparse_call(root.sites[1], call, grid, rules, root.moment, tally)


def test_dense_attention_in_pieces_where_memory_is_short(pipe: Any) -> None:
    call, stock = Call(), Memory(room=3)
    with attach(pipe, Faulty("memory", step=0), backend="reference") as handle:
        found = call.through(handle, stock)
        report = handle.report()
    torch.testing.assert_close(found, call.stock)
    assert stock.asked == [18, 3, 3, 3, 3, 3, 3]
    assert report.incidents[0].outcome == f"{REST_DENSE}, in 8 pieces"
    assert report.incidents[0].reason.startswith("OutOfMemoryError: CUDA out of memory")


def test_when_even_pieces_do_not_fit_the_first_error_is_raised(
    pipe: Any, stock: torch.Tensor
) -> None:
    call, none = Call(), Memory(room=0)
    handle = attach(pipe, Faulty("memory", step=0), backend="reference")
    with pytest.raises(torch.OutOfMemoryError, match="2 GiB"):
        call.through(handle, none)
    assert none.asked == [18, 3, 1]
    handle.detach()
    assert torch.equal(generate(pipe, "wan"), stock)


def test_pieces_take_their_rows_of_a_mask() -> None:
    q, k, v = torch.randn(3, 1, 2, 30, 16)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    number = ORIGINALS.add(sdpa, heads_first=True)
    for shape in ((1, 1, 30, 30), (1, 1, 1, 30), (30, 30)):
        mask = torch.randn(shape)
        call = SeamCall(q, k, v, {"attn_mask": mask}, number)
        want = sdpa(q, k, v, attn_mask=mask)
        torch.testing.assert_close(_in_pieces(call, 8), want)


@pytest.mark.parametrize("check_finite", [True, False])
def test_nan_in_a_value_is_named_once_and_not_mended(pipe: Any, check_finite: bool) -> None:
    block = pipe.transformer.blocks[1].attn1.to_v
    method = Faulty("nothing")
    with attach(pipe, method, backend="reference", check_finite=check_finite) as handle:
        with torch.no_grad():
            kept = block.bias[20].item()  # 32 channels, 16 a head
            block.bias[20] = float("nan")
        try:
            generate(pipe, "wan")
        finally:
            with torch.no_grad():
                block.bias[20] = kept
        report = handle.report()
    first, *more = report.incidents
    assert (first.layer, first.heads, first.step) == (1, (1,), 0)
    assert first.outcome == UNREPAIRED
    if check_finite:
        assert first.reason == f"{NOT_FINITE} (value)"
        assert more == []
        assert method.calls == []
    else:
        assert first.reason == HOPELESS
        assert len(more) <= 3  # NaN spreads to the other heads and the other layer, named once each
        assert HELD not in report.fallbacks or report.fallbacks[HELD] < 8
    json.dumps(report.to_dict(), allow_nan=False)


def test_once_per_forward_the_next_calls_are_mended(pipe: Any) -> None:
    latents, report, _ = faulty_run(pipe, "nan", Recorder(each_call=False))
    assert of(report)[0] == (1, (1,), 1, BROKEN)
    # suspected at step 1, the turn of the layer, and looked into at step 2
    latents, report, _ = faulty_run(pipe, "mask", Recorder(every=2, limit=0.5, each_call=False))
    assert of(report) == [(1, (1,), 2, FAR)]
    latents, report, _ = faulty_run(pipe, "row", Recorder(every=2, each_call=False))
    assert of(report) == [(1, (1,), 2, IDLE)]
    assert latents.isfinite().all()


def test_without_memory_for_looking_the_run_goes_on(
    pipe: Any, stock: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("dittools.patches.flight.exact_rows", none)
    latents, report, _ = faulty_run(pipe, "nothing")
    torch.testing.assert_close(latents, stock, atol=2e-5, rtol=2e-5)
    assert {(i.layer, i.reason, i.outcome) for i in report.incidents} == {
        (0, BLIND, UNREPAIRED),
        (1, BLIND, UNREPAIRED),
    }
    assert report.error is None


@pytest.mark.parametrize("each_call", [True, False])
def test_looking_changes_nothing(pipe: Any, each_call: bool) -> None:
    plan = Plan((Rule(SPARSE), Rule(build("gna"), heads=(1,))))
    with attach(pipe, plan, backend="reference", recorder=False) as handle:
        plain = generate(pipe, "wan")
        assert (handle.report().error, handle.report().recorder_ms) == (None, 0.0)
    settings = Recorder(every=1, limit=1e9, each_call=each_call)
    with attach(pipe, plan, backend="reference", recorder=settings) as handle:
        before = torch.get_rng_state()
        assert torch.equal(generate(pipe, "wan"), plain)
        assert torch.equal(torch.get_rng_state(), before)
        report = handle.report()
    assert report.recorder_ms > 0
    assert sorted(report.errors) == SITES
    assert list(report.errors[SITES[0]]) == [0, 1, 2, 3]
    assert report.error is not None
    assert f"{report.error:.3f} of dense" in str(report)


def test_the_error_of_a_call_is_estimated_from_some_rows(pipe: Any) -> None:
    call = Call(tokens=600)
    method = build("random", {"density": 0.4, "block_size": 20})
    with attach(pipe, method, backend="reference", recorder=Recorder(every=1, rows=64)) as handle:
        found = call.through(handle)
        estimate = handle.report().error
    true = float((found - call.stock).norm() / call.stock.norm())
    assert estimate == pytest.approx(true, rel=0.1)
    assert estimate != true
    with attach(pipe, method, backend="reference", recorder=Recorder(every=1, rows=600)) as handle:
        call.through(handle)
        assert handle.report().error == pytest.approx(true, rel=1e-5)
        assert handle.report().layers[1].error == handle.report().error


@pytest.mark.parametrize(("steps", "every"), [(1, 8), (4, 8), (8, 4)])
def test_every_layer_and_branch_is_sampled_in_a_run(pipe: Any, steps: int, every: int) -> None:
    settings = Recorder(every=every)
    keywords: dict[str, Any] = {"backend": "reference", "recorder": settings}
    with attach(pipe, SPARSE, **keywords) as handle:
        generate(pipe, "wan", num_inference_steps=steps)
        errors = handle.report().errors
    assert sorted(errors) == SITES
    assert sum(map(len, errors.values())) == max(2, 2 * steps // every)
    with attach(pipe, SPARSE, dense_last_steps=0.5, **keywords) as handle:
        generate(pipe, "wan", num_inference_steps=2 * steps)
        assert sorted(handle.report().errors) == SITES


def test_held_heads_count_as_dense(pipe: Any) -> None:
    plan = Plan((Rule(SPARSE), Rule(Faulty("runtime", layer=0, step=0), layers=(0,), heads=(1,))))
    with attach(pipe, plan, backend="reference") as handle:
        generate(pipe, "wan")
        one, two = handle.report().layers
    assert of(handle.report())[0][1] == (1,)
    assert one.sparse == two.sparse == 8
    assert one.density == pytest.approx((1 + two.density) / 2, abs=0.1)


def test_inside_a_compiled_model(pipe: Any, stock: torch.Tensor) -> None:
    whole = pipe.transformer
    try:
        with attach(pipe, Faulty("nan"), backend="reference") as handle:
            pipe.transformer = torch.compile(whole, backend="eager", fullgraph=True)
            latents = generate(pipe, "wan")
            assert of(handle.report()) == [(1, (1,), 1, BROKEN)]
    finally:
        pipe.transformer = whole
        torch._dynamo.reset()
    torch.testing.assert_close(latents, stock, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "settings",
    [{"every": 0}, {"rows": 2.5}, {"limit": float("nan")}, {"drift": 0.5}, {"each_call": "no"}],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"recorder: {next(iter(settings))} is not usable"):
        Recorder(**settings)


def test_anything_else_for_a_recorder_is_refused(pipe: Any) -> None:
    with pytest.raises(InputError, match="expected True, False or a Recorder; got 'on'"):
        attach(pipe, "gna", recorder=cast(Any, "on"))


@pytest.mark.parametrize("flags", [[], ["--no-recorder"], ["--compare", "--repeats", "1"]])
def test_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    size = ["--steps", "2", "--frames", "5", "--height", "32", "--width", "32"]
    wanted = ["generate", "--model", "tiny/wan", "--method", "gna", "--backend", "reference"]
    with pytest.raises(SystemExit, match="0"):
        main([*wanted, "--dense-steps", "0", *size, *flags, "--out", str(tmp_path)])
    text = " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "report.json").read_text())["accelerated"]["report"]
    assert ("of dense" in text) == ("--no-recorder" not in flags)
    assert (report["error"] is None) == ("--no-recorder" in flags)
