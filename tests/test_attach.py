"""Attaching to a toy Wan pipeline: exact when dense, exact after detaching, honest in between."""

import copy
import io
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import dittools
from dittools.call import AttentionCall
from dittools.errors import AttachError, InputError, PlanError, UnknownMethod, UnsupportedCall
from dittools.kernels import Backend
from dittools.mask import BlockMask
from dittools.methods import build
from dittools.patches import Attachment, attach, detach, install, seam
from dittools.patches.install import root_of
from dittools.patches.refusals import KEEPS_ALL, NOT_FINITE, UNKNOWN_LENGTH
from dittools.patches.seam import is_shadow
from dittools.pipelines import tiny
from dittools.plans import ModelFacts, Plan, Rule

SPARSE = build("random", {"density": 0.4, "block_size": 8})


@dataclass(frozen=True)
class Whole:
    """Runs the sparse path with a mask that keeps everything: must equal dense attention."""

    name: ClassVar[str] = "whole"

    def not_supported(self, call: AttentionCall) -> list[str]:
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        mask = BlockMask.full(call.query.shape[1], call.key.shape[1], 8)
        return backend.block_sparse(call, mask)


@dataclass(frozen=True)
class Spy:
    """Notes every call it is given and runs it dense."""

    name: ClassVar[str] = "spy"
    seen: list[AttentionCall] = field(default_factory=list)

    def not_supported(self, call: AttentionCall) -> list[str]:
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        self.seen.append(call)
        call.memory["calls"] = call.memory.get("calls", 0) + 1
        call.memory.setdefault("counts", []).append(call.memory["calls"])
        return backend.dense(call)


@dataclass(frozen=True)
class Zeros:
    """Returns zeros, so that whatever it runs on leaves a mark."""

    name: ClassVar[str] = "zeros"
    mark: int = 0  # tells two of them apart
    calls: list[int] = field(default_factory=list)

    def not_supported(self, call: AttentionCall) -> list[str]:
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        self.calls.append(call.head_count)
        return torch.zeros_like(call.query)


@dataclass(frozen=True)
class Fussy:
    """Supports nothing, and says so."""

    name: ClassVar[str] = "fussy"
    raises: bool = False

    def not_supported(self, call: AttentionCall) -> list[str]:
        return [] if self.raises else ["fussy wants a larger grid"]

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        raise UnsupportedCall("fussy gave up")


Run = Callable[..., torch.Tensor]


def run(pipe: Any, **changes: Any) -> torch.Tensor:
    """Latents of a short generation, the same every time."""
    arguments = {**tiny.call_arguments("wan"), "output_type": "latent", **changes}
    latents: torch.Tensor = pipe(**arguments, generator=torch.Generator().manual_seed(0)).frames
    return latents


@pytest.fixture(scope="module")
def shared() -> Any:
    return tiny.build("wan")


@pytest.fixture
def pipe(shared: Any) -> Iterator[Any]:
    yield shared
    detach(shared)


@pytest.fixture(scope="module")
def stock(shared: Any) -> torch.Tensor:
    return run(shared)


def traces(denoiser: torch.nn.Module) -> list[str]:
    """Everything attaching could leave behind."""
    left = [name for name, m in denoiser.named_modules() if "_dit_site" in m.__dict__]
    for name, module in denoiser.named_modules():
        processor = getattr(module, "processor", None)
        if processor is not None and "_dit_stock" in type(processor).__dict__:
            left.append(f"{name}.processor")
    left += [str(hook) for hook in denoiser._forward_pre_hooks.values()]
    registry = getattr(denoiser, "_diffusers_hook", None)
    return left + ([] if registry is None else list(registry.hooks))


def test_a_dense_plan_changes_nothing_and_counts_everything(pipe: Any, stock: torch.Tensor) -> None:
    with attach(pipe, "dense") as handle:
        assert torch.equal(run(pipe), stock)
        report = handle.report()
    assert report.calls == {"sparse": 0, "dense": 16, "passed_through": 0}  # 2 layers, 4 steps, CFG
    assert (report.density, report.sparse_density) == (1.0, 1.0)
    assert report.attention_ms > 0
    assert report.grids == ["3x2x3"]
    assert report.fallbacks == {}


def test_detaching_restores_the_same_objects(pipe: Any, stock: torch.Tensor) -> None:
    block = pipe.transformer.blocks[0]
    processor, kind = block.attn1.processor, type(block.attn1.processor)
    keys = list(pipe.transformer.state_dict())
    handle = attach(pipe, SPARSE, backend="reference")
    assert block.attn1.processor is processor
    assert isinstance(processor, kind)
    assert type(processor).__name__ == kind.__name__
    assert list(pipe.transformer.state_dict()) == keys
    assert not torch.equal(run(pipe), stock)
    handle.detach()
    assert type(processor) is kind
    assert traces(pipe.transformer) == []
    assert torch.equal(run(pipe), stock)
    assert not handle.is_attached
    assert seam._current.site is None


def test_a_mask_that_keeps_everything_equals_dense(pipe: Any, stock: torch.Tensor) -> None:
    with attach(pipe, Whole(), backend="reference") as handle:
        torch.testing.assert_close(run(pipe), stock, atol=2e-5, rtol=2e-5)
        assert handle.report().calls["sparse"] == 16


def test_the_schedule_is_kept_to_the_call(pipe: Any) -> None:
    spy = Spy()
    with attach(pipe, spy, dense_steps=0.2, dense_last_steps=1, dense_layers=1):
        run(pipe, num_inference_steps=5)
    for branch in ("cond", "uncond"):
        calls = [(c.step, c.layer) for c in spy.seen if c.branch == branch]
        assert calls == [(1, 1), (2, 1), (3, 1)]  # (5 - 2 steps) * (2 - 1 layers)
    assert len(spy.seen) == 6
    assert {c.steps for c in spy.seen} == {5}


def test_a_class_of_methods_is_no_method(pipe: Any) -> None:
    with pytest.raises(PlanError, match="got the class Radial; try: Radial"):
        attach(pipe, dittools.Radial)  # type: ignore[arg-type]
    assert traces(pipe.transformer) == []


def test_the_report_says_what_methods_remark_on(pipe: Any) -> None:
    with attach(pipe, build("sparge", {"skip": 5.0})) as handle:
        assert any("plain torch finds them" in note for note in handle.report().notes)
    with attach(pipe, build("sparge")) as handle:
        assert handle.report().notes == []


@pytest.mark.parametrize(
    ("method", "plain", "other"),
    [
        ("freeswim", {"attn_temperature": 1.0}, {"native": (30, 52)}),
        ("clear", {"radius": 99.0}, {"radius": 99.0, "proportional": True}),
    ],
)
def test_a_method_that_keeps_every_pair_and_changes_the_scores_says_so(
    pipe: Any, stock: torch.Tensor, method: str, plain: dict[str, Any], other: dict[str, Any]
) -> None:
    for params, is_same in ((plain, True), (other, False)):
        with attach(pipe, build(method, params)) as handle:
            found = run(pipe)
            report = handle.report()
        assert report.calls["sparse"] == 0
        assert torch.equal(found, stock) == is_same
        assert any("the scores" in note for note in report.notes) != is_same


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"dense_steps": 0.25}, "first 25% of the steps"),
        ({"dense_steps": 1, "dense_last_steps": 2}, "first step, last 2 steps"),
        ({"dense_layers": 99}, "first 99 layers"),
        ({}, ""),
    ],
)
def test_the_report_says_what_the_schedule_keeps_dense(
    pipe: Any, schedule: dict[str, Any], words: str
) -> None:
    """A run that is dense by its schedule has no other reason to give."""
    with attach(pipe, Zeros(), recorder=False, **schedule) as handle:
        run(pipe)
        rows = str(handle.report()).splitlines()
    found = [row.split(maxsplit=1)[1] for row in rows if row.startswith("schedule ")]
    assert found == ([f"dense: {words}"] if words else [])


def test_a_run_in_which_nothing_was_sparse_is_logged_once_with_the_reason(
    pipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Who never prints a report still learns why there was no gain."""
    with caplog.at_level(logging.WARNING, "dittools"):
        for plan, how, options in (
            ("dense", {}, {}),
            (SPARSE, {}, {"backend": "reference"}),
            ("radial", {"num_frames": 1}, {"recorder": False}),
        ):
            with attach(pipe, plan, **options):
                run(pipe, **how)
        assert caplog.messages == []
        with attach(pipe, "radial", dense_steps=1):
            for _ in range(2):
                run(pipe, num_frames=1)
    assert caplog.messages == [
        "nothing ran sparse so far: 4 calls: radial needs 2 frames or more, got 1; "
        "the attachment's report() has more"
    ]


def test_a_share_gives_few_step_models_their_dense_step(pipe: Any) -> None:
    spy = Spy()
    with attach(pipe, spy, dense_steps=0.1):
        run(pipe, num_inference_steps=3, guidance_scale=1.0)
    assert sorted({c.step for c in spy.seen}) == [1, 2]
    assert {c.branch for c in spy.seen} == {"cond"}


def test_memory_lives_through_a_run_per_branch_and_not_longer(pipe: Any) -> None:
    spy = Spy()
    with attach(pipe, spy):
        run(pipe)
        first = len(spy.seen)
        run(pipe)
    for calls in (spy.seen[:first], spy.seen[first:]):
        for branch in ("cond", "uncond"):
            mine = [c for c in calls if c.branch == branch and c.layer == 0]
            assert len({id(c.memory) for c in mine}) == 1
            assert mine[0].memory["counts"] == [1, 2, 3, 4]
    assert spy.seen[0].memory is not spy.seen[first].memory


def test_single_step_runs_do_not_share_memory(pipe: Any) -> None:
    spy = Spy()
    with attach(pipe, spy):
        for _ in range(2):
            run(pipe, num_inference_steps=1, guidance_scale=1.0)
    assert [c.memory["counts"] for c in spy.seen if c.layer == 0] == [[1], [1]]


def test_unnamed_calls_are_told_apart_by_order(pipe: Any) -> None:
    spy = Spy()
    latents, text = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 16, 32)
    with attach(pipe, spy):
        pipe.scheduler.set_timesteps(2)
        for _ in range(2):
            pipe.transformer(latents, torch.tensor([900.0]), text)
    assert [c.branch for c in spy.seen if c.layer == 0] == ["cond", "uncond"]


def test_a_denoiser_alone_counts_changes_of_the_timestep(pipe: Any) -> None:
    spy = Spy()
    latents, text = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 16, 32)
    with attach(pipe.transformer, spy, dense_steps=1) as handle:
        for timestep in (900.0, 900.0, 600.0, 300.0, 950.0, 500.0):
            pipe.transformer(latents, torch.tensor([timestep]), text)
        assert [c.step for c in spy.seen if c.layer == 0] == [1, 2, 1]
        assert handle.report().fallbacks == {KEEPS_ALL: 6}
    with attach(pipe.transformer, spy, dense_steps=0.5) as handle:
        pipe.transformer(latents, torch.tensor([900.0]), text)
        assert handle.report().fallbacks == {UNKNOWN_LENGTH: 2}


def test_heads_of_one_layer_may_run_different_methods(pipe: Any, stock: torch.Tensor) -> None:
    zeros = Zeros()
    plan = Plan((Rule(Whole()), Rule(zeros, layers=(0,), heads=(1,))))
    with attach(pipe, plan, backend="reference", recorder=False) as handle:
        mixed = run(pipe)
        layers = handle.report().layers
    assert zeros.calls == [1] * 8
    assert not torch.allclose(mixed, stock, atol=1e-3)
    assert [layer.sparse for layer in layers] == [8, 8]
    with attach(pipe, Plan((Rule(Whole(), heads=(1,)),)), backend="reference"):
        torch.testing.assert_close(run(pipe), stock, atol=2e-5, rtol=2e-5)


def test_two_groups_of_heads_equal_one_method_on_all(pipe: Any) -> None:
    with attach(pipe, Zeros(), recorder=False):
        together = run(pipe)
    one, two = Zeros(mark=1), Zeros(mark=2)
    plan = Plan((Rule(one, heads=(0,)), Rule(two, heads=(1,))))
    with attach(pipe, plan, recorder=False):
        assert torch.equal(run(pipe), together)
    assert (one.calls, two.calls) == ([1] * 16, [1] * 16)


@pytest.mark.parametrize(
    ("method", "reason"),
    [(Fussy(), "fussy wants a larger grid"), (Fussy(raises=True), "fussy gave up")],
)
def test_what_is_not_supported_runs_dense_and_is_named(
    pipe: Any, stock: torch.Tensor, method: Fussy, reason: str
) -> None:
    with attach(pipe, method) as handle:
        assert torch.equal(run(pipe), stock)
        report = handle.report()
    assert report.fallbacks == {reason: 16}
    assert report.fallback_sites[reason] == [
        "transformer.blocks.0.attn1",
        "transformer.blocks.1.attn1",
    ]
    assert f"16 x {reason} (transformer.blocks.0.attn1 and 1 more)" in str(report)


def test_a_named_backend_runs_sparse_and_auto_goes_dense_where_that_is_faster(pipe: Any) -> None:
    with attach(pipe, Whole(), backend="reference") as handle:
        run(pipe)
        assert handle.report().backends == ["reference"]
    with attach(pipe, Whole()) as handle:
        run(pipe)
        report = handle.report()
    assert report.calls["dense"] == 16
    assert list(report.fallbacks) == ["dense is faster at this density"]


def test_density_is_the_mean_over_calls(pipe: Any) -> None:
    with attach(pipe, SPARSE, dense_steps=1, backend="reference") as handle:
        run(pipe)
        report = handle.report()
    kept = SPARSE.mask(dittools.TokenGrid(3, 2, 3), 2, 0).density
    assert report.calls["sparse"] == 12
    assert report.sparse_density == pytest.approx(kept, abs=0.05)
    assert report.density == pytest.approx((12 * report.sparse_density + 4) / 16)
    assert json.loads(json.dumps(report.to_dict()))["density"] == report.density
    handle.reset()
    assert handle.report().calls == {"sparse": 0, "dense": 0, "passed_through": 0}


def test_non_finite_inputs_run_dense_and_are_named(shared: Any) -> None:
    pipe = shared.__class__(**shared.components)
    pipe.transformer = copy.deepcopy(shared.transformer)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipe.transformer.blocks[1].attn1.to_v.bias[0] = float("nan")
    with attach(pipe, SPARSE, backend="reference") as handle:
        run(pipe, num_inference_steps=1, guidance_scale=1.0)
        report = handle.report()
    assert report.fallbacks == {NOT_FINITE: 1}
    assert report.fallback_sites[NOT_FINITE] == ["transformer.blocks.1.attn1"]


def test_one_frame_and_a_second_size_need_no_new_attachment(pipe: Any) -> None:
    sizes: list[dict[str, int]] = [
        {},
        {"height": 48, "width": 80, "num_frames": 13},
        {"num_frames": 1},
        {},
    ]
    with attach(pipe, build("radial", {"block_size": 8}), backend="reference") as handle:
        together = [run(pipe, **size) for size in sizes]
        report = handle.report()
    assert report.grids == ["1x2x3", "3x2x3", "4x3x5"]
    assert report.fallbacks["radial needs 2 frames or more, got 1"] == 16
    for size, made in zip(sizes, together, strict=True):
        with attach(pipe, build("radial", {"block_size": 8}), backend="reference"):
            assert torch.equal(run(pipe, **size), made)


def test_sizes_that_nothing_divides_equal_dense(pipe: Any) -> None:
    size = {"height": 48, "width": 112, "num_frames": 17, "num_inference_steps": 2}  # 5x3x7
    expected = run(pipe, **size)
    with attach(pipe, Whole(), backend="reference"):
        torch.testing.assert_close(run(pipe, **size), expected, atol=2e-5, rtol=2e-5)


def test_batches_equal_dense(pipe: Any) -> None:
    size: dict[str, Any] = {"prompt": ["a red circle", "a"], "num_inference_steps": 2}
    expected = run(pipe, **size)
    with attach(pipe, Whole(), backend="reference"):
        torch.testing.assert_close(run(pipe, **size), expected, atol=2e-5, rtol=2e-5)


def test_attaching_again_replaces_the_plan_and_says_so(
    pipe: Any, stock: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    old = attach(pipe, Zeros())
    with caplog.at_level(logging.WARNING, "dittools"):
        new = attach(pipe, "dense")
    assert "replaced the zeros plan" in caplog.text
    assert new.report().notes == ["replaced the zeros plan attached to transformer"]
    assert torch.equal(run(pipe), stock)
    old.detach()  # of a plan that is no longer there
    assert new.is_attached


def fail(*_: Any) -> None:
    raise RuntimeError("no such luck")


def test_failing_half_way_restores_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.build("wan22")
    before = run(pipe)
    calls: list[int] = []
    follow = install.follow_branch

    def second_fails(denoiser: torch.nn.Module) -> Any:
        calls.append(1)
        return fail() if len(calls) == 2 else follow(denoiser)

    monkeypatch.setattr(install, "follow_branch", second_fails)
    with pytest.raises(AttachError, match="undone: no such luck"):
        attach(pipe, SPARSE)
    assert len(calls) == 2
    for denoiser in (pipe.transformer, pipe.transformer_2):
        assert traces(denoiser) == []
    assert torch.equal(run(pipe), before)


def test_failing_half_way_puts_the_old_plan_back(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = attach(pipe, Zeros())
    marked = run(pipe)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["dittools.patches.attach"], "Attachment", fail)
        with pytest.raises(AttachError, match="undone"):
            attach(pipe, "dense")
    assert root_of(pipe.transformer) in old._roots
    assert torch.equal(run(pipe), marked)


def test_a_copy_stays_attached_and_is_detached_alone(pipe: Any, stock: torch.Tensor) -> None:
    attach(pipe, Zeros())
    marked = run(pipe)
    twin = pipe.__class__(**{**pipe.components, "transformer": copy.deepcopy(pipe.transformer)})
    twin.set_progress_bar_config(disable=True)
    assert is_shadow(type(twin.transformer.blocks[0].attn1.processor))
    assert torch.equal(run(twin), marked)
    detach(twin)
    assert traces(twin.transformer) == []
    assert torch.equal(run(twin), stock)
    assert torch.equal(run(pipe), marked)


def test_a_pickled_model_loads_as_a_stock_one(pipe: Any, stock: torch.Tensor) -> None:
    attach(pipe, Zeros())
    stream = io.BytesIO()
    torch.save(pipe.transformer, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    assert type(loaded.blocks[0].attn1.processor).__module__.startswith("diffusers")
    assert "_dit_stock" not in type(loaded.blocks[0].attn1.processor).__dict__
    twin = pipe.__class__(**{**pipe.components, "transformer": loaded})
    twin.set_progress_bar_config(disable=True)
    assert torch.equal(run(twin), stock)


def test_saving_while_attached_writes_the_stock_weights(
    pipe: Any, stock: torch.Tensor, tmp_path: Path
) -> None:
    attach(pipe, Zeros())
    pipe.transformer.save_pretrained(tmp_path)
    loaded = type(pipe.transformer).from_pretrained(tmp_path)
    twin = pipe.__class__(**{**pipe.components, "transformer": loaded})
    twin.set_progress_bar_config(disable=True)
    assert torch.equal(run(twin), stock)


def test_exchanged_processors_are_taken_up_again(pipe: Any) -> None:
    with attach(pipe, Zeros(), recorder=False) as handle:
        marked = run(pipe)
        kind = type(pipe.transformer.blocks[0].attn1.processor).__mro__[1]
        pipe.transformer.blocks[0].attn1.set_processor(kind())
        assert torch.equal(run(pipe), marked)
        assert handle.report().calls["sparse"] == 32
    assert traces(pipe.transformer) == []


class Stubborn:
    """A processor whose attention goes another way."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states


def test_a_processor_that_cannot_be_intercepted_is_named(shared: Any) -> None:
    pipe = shared.__class__(**shared.components)
    pipe.transformer = copy.deepcopy(shared.transformer)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.blocks[0].attn1.processor = Stubborn()
    with attach(pipe, Zeros()) as handle:
        run(pipe, num_inference_steps=1)
        report = handle.report()
    never = report.coverage["never_fired"]["transformer.blocks.0.attn1"]
    assert "Stubborn cannot be intercepted; undo it with set_attn_processor" in never
    assert report.coverage["fired"] == 1
    assert "never fired" in str(report)
    assert type(pipe.transformer.blocks[0].attn1.processor) is Stubborn


def test_two_pipelines_in_two_threads_do_not_mix(stock: torch.Tensor) -> None:
    pipes = [tiny.build("wan"), tiny.build("wan")]
    spies = [Spy(), Spy()]
    handles = [attach(pipes[0], spies[0]), attach(pipes[1], spies[1], dense_layers=1)]
    expected = [stock, run(pipes[1], num_inference_steps=6)]
    results: list[torch.Tensor | None] = [None, None]
    for spy, handle in zip(spies, handles, strict=True):
        spy.seen.clear()
        handle.reset()

    def work(index: int) -> None:
        results[index] = run(pipes[index], num_inference_steps=(4, 6)[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(results, expected, strict=True):
        assert got is not None
        assert torch.equal(got, want)
    assert [len(spy.seen) for spy in spies] == [16, 12]
    assert [c.step for c in spies[1].seen] == [s for s in range(6) for _ in range(2)]


def test_both_transformers_count_one_run() -> None:
    pipe = tiny.build("wan22")
    spy = Spy()
    with attach(pipe, spy, dense_steps=1) as handle:
        run(pipe)
        report = handle.report()
    assert [c.step for c in spy.seen if c.layer == 0 and c.branch == "cond"] == [1, 2, 3]
    used = {layer.site.split(".")[0] for layer in report.layers if layer.sparse + layer.dense}
    assert used == {"transformer", "transformer_2"}


def test_vace_control_blocks_take_part() -> None:
    pipe = tiny.build("wan_vace")
    with attach(pipe, Zeros(), recorder=False) as handle:
        run(pipe, num_inference_steps=1)
        layers = handle.report().layers
    assert [layer.site.removeprefix("transformer.") for layer in layers] == [
        *(f"blocks.{i}.attn1" for i in range(3)),
        *(f"vace_blocks.{i}.attn1" for i in range(2)),
    ]
    assert all(layer.sparse == 2 for layer in layers)


def test_the_preset_of_the_family_is_used_and_named(pipe: Any) -> None:
    handle = attach(pipe, "radial")
    assert "Wan2.1" in handle.report().preset
    assert handle.plan.schedule.dense_layers == 1
    assert attach(pipe, "radial", dense_steps=0).plan.schedule.dense_first_steps == 0
    assert "no published preset" in attach(pipe, "gna").report().preset


def test_a_plan_file_attaches_by_its_path(pipe: Any, tmp_path: Path) -> None:
    path = Plan.of(SPARSE, dense_first_steps=1).save(tmp_path / "plan.json")
    handle = attach(pipe, str(path), backend="reference")
    run(pipe)
    assert handle.report().calls["sparse"] == 12
    with pytest.raises(PlanError, match="no plan file"):
        attach(pipe, tmp_path / "other.json")


def test_a_plan_for_another_model_leaves_the_old_one_attached(pipe: Any) -> None:
    old = attach(pipe, "dense")
    other = Plan((Rule(SPARSE),), model=ModelFacts("FluxTransformer2DModel", 2, 2, 12))
    with pytest.raises(PlanError, match="made for another model"):
        attach(pipe, other)
    assert old.is_attached


def test_bad_targets_and_names_say_what_would_do(pipe: Any) -> None:
    with pytest.raises(UnknownMethod, match=r"dense, radial"):
        attach(pipe, "radiall")
    with pytest.raises(UnsupportedCall, match="auto"):
        attach(pipe, "dense", backend="gpu")
    with pytest.raises(PlanError, match="a method name"):
        attach(pipe, 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="check_finite is not usable; expected True or False"):
        attach(pipe, "dense", check_finite="no")  # type: ignore[arg-type]
    with pytest.raises(AttachError, match="neither a diffusers pipeline"):
        attach(object(), "dense")
    with pytest.raises(AttachError, match=r"no denoiser.*wan"):
        attach(pipe.vae, "dense")
    assert traces(pipe.transformer) == []


def test_the_attachment_names_itself(pipe: Any) -> None:
    handle = attach(pipe, "dense")
    assert isinstance(handle, Attachment)
    assert repr(handle) == "<Attachment of dense to WanTransformer3DModel>"
