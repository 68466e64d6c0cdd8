"""Runs one after another, in turns and side by side leave nothing behind and do not mix."""

import gc
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from toys import SPARSE, generate

from dittools.methods import build
from dittools.patches import attach
from dittools.pipelines import tiny
from dittools.plans import Plan, Rule

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def soak_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.delitem(sys.modules, "soak", raising=False)
    import soak

    kept = {"tiny/wan": ("radial", "svg2"), "tiny/flux": ("clear",)}
    methods = {name: {m: soak.METHODS[name][m] for m in own} for name, own in kept.items()}
    monkeypatch.setattr(soak, "METHODS", methods)
    monkeypatch.setattr(soak, "SIZES", {name: soak.SIZES[name][:2] for name in methods})
    return soak


def test_repeated_runs_give_the_first_results_and_leak_nothing(soak_script: ModuleType) -> None:
    soak = soak_script.Soak(["tiny/wan", "tiny/flux"])
    alive: dict[int, int] = {}

    def note(done: int, reading: Any) -> None:
        if done in (12, 24):
            alive[done] = tensor_bytes()

    found = soak_script.long_run(soak, 24, note)
    assert found["jobs"] == 6
    assert found["jobs_without_sparse_calls"] == 0
    assert found["differing"] == 0
    assert found["files"][1] <= found["files"][0]
    assert found["threads"][1] <= found["threads"][0]
    assert 0 < alive[24] <= alive[12]  # what other tests left may go meanwhile


def tensor_bytes() -> int:
    """Return what all tensors of this process hold, once those nobody can reach are gone.

    Compiling leaves tensors of other types, which hold nothing and may have no size.
    """
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    found = (one for one in gc.get_objects() if type(one) in kinds)
    return sum(one.nbytes for one in found if not torch._is_functional_tensor(one))


def test_two_threads_give_what_each_gives_alone(soak_script: ModuleType) -> None:
    soak = soak_script.Soak(["tiny/wan", "tiny/flux"])
    found = soak_script.side_by_side(soak, ("tiny/wan", "tiny/flux"), 4)
    assert found["differing"] == 0
    assert found["failed"] == []


def test_the_figures_see_a_difference_a_leak_and_a_failure(
    soak_script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the process holds is made up: the real thing moves with what else runs in it."""
    results, runs = iter(range(1000)), iter(range(1000))

    def differing(self: Any, job: Any, pipe: Any = None) -> torch.Tensor:
        self.sparse[job] = 0
        return torch.tensor(next(results))

    def leaky() -> Any:  # 1 MB, a file and a thread a run
        run = next(runs)
        return soak_script.Reading(200.0 + run, 20 + run, 2 + run)

    monkeypatch.setattr(soak_script.Soak, "generate", differing)
    monkeypatch.setattr(soak_script, "reading", leaky)
    soak = soak_script.Soak(["tiny/wan", "tiny/flux"])
    found = {
        "long": soak_script.long_run(soak, 24),
        "side_by_side": soak_script.side_by_side(soak, ("tiny/wan", "tiny/flux"), 4),
    }
    reasons = soak_script.broken(found)
    assert "memory grows by 1.0 MB a run" in reasons
    assert "files grow from 32 to 43" in reasons
    assert "threads grow from 14 to 25" in reasons
    assert "18 runs differ from the first of their kind" in reasons
    assert "6 combinations never ran sparse" in reasons
    assert "8 runs in threads differ, 0 failed" in reasons
    assert len(reasons) == 6
    assert soak_script.slope([1.0, 3.0, 5.0]) == pytest.approx(2.0)


def test_what_the_process_holds_is_read(soak_script: ModuleType, tmp_path: Path) -> None:
    before = soak_script.reading()
    held = torch.ones(1 << 25)  # 128 MB: far above what comes and goes
    with (tmp_path / "open").open("w"):
        during = soak_script.reading()
    assert during.held_mb - before.held_mb == pytest.approx(held.nbytes / 2**20, abs=32)
    assert during.files == before.files + 1
    assert during.threads >= 1


@pytest.mark.parametrize("method", ["svg2", "paro", "sparse_vdit", "radial"])
def test_pipelines_and_sizes_in_turns_share_no_state(method: str) -> None:
    names = ("wan", "hunyuan_video")
    sizes: list[dict[str, int]] = [{}, {"height": 48}]
    few = {"q_clusters": 4, "k_clusters": 8, "least_queries": 2, "least_keys": 2}
    chosen = build(method, few if method == "svg2" else {"block_size": 8})
    alone = {
        (name, place): generate_attached(tiny.build(name), name, chosen, size)
        for name in names
        for place, size in enumerate(sizes)
    }
    pipes = {name: tiny.build(name) for name in names}
    handles = {
        name: attach(pipe, chosen, dense_steps=1, backend="cpu") for name, pipe in pipes.items()
    }
    for place in (0, 1, 1, 0, 1, 0):
        for name in names:
            out = generate(pipes[name], name, **sizes[place])
            assert torch.equal(out, alone[name, place]), (name, place)
    for handle in handles.values():
        assert sum(layer.sparse for layer in handle.report().layers) > 0


def test_two_of_a_class_and_one_of_another_keep_their_own_plans_in_turns() -> None:
    """Different plans, sizes and models take turns; each gives what it gives alone."""
    few = {"q_clusters": 4, "k_clusters": 8, "least_queries": 2, "least_keys": 2}
    plans = {
        "first": ("wan", Plan.of(build("svg2", few))),
        "second": (
            "wan",
            Plan(
                (
                    Rule(build("paro", {"density": 0.3, "block_size": 8})),
                    Rule(build("svg2", few), heads=(0,)),
                    Rule(build("vmoba", {"block_size": 8}), layers=(1,), heads=(0,)),
                )
            ),
        ),
        "image": ("flux", Plan.of(build("psa", {"block_size": 16, "ends": (0.2, 0.3, 0.4, 0.5)}))),
    }
    sizes: dict[str, list[dict[str, int]]] = {
        "wan": [{}, {"height": 48}],
        "flux": [{}, {"height": 24, "width": 64}],
    }
    alone = {
        (name, place): generate_attached(tiny.build(model), model, plan, size)
        for name, (model, plan) in plans.items()
        for place, size in enumerate(sizes[model])
    }
    assert not torch.equal(alone["first", 0], alone["second", 0])
    pipes = {name: tiny.build(model) for name, (model, _) in plans.items()}
    handles = {
        name: attach(pipes[name], plan, dense_steps=1, backend="cpu")
        for name, (_, plan) in plans.items()
    }
    for place in (0, 0, 1):
        for name, (model, _) in plans.items():
            out = generate(pipes[name], model, **sizes[model][place])
            assert torch.equal(out, alone[name, place]), (name, place)
    for name, handle in handles.items():
        assert sum(layer.sparse for layer in handle.report().layers) > 0, name


def generate_attached(pipe: Any, name: str, method: Any, size: dict[str, int]) -> torch.Tensor:
    with attach(pipe, method, dense_steps=1, backend="cpu"):
        return generate(pipe, name, **size)


def test_steps_of_two_runs_may_interleave() -> None:
    """Two pipelines whose denoising steps strictly alternate, as a scheduler of requests may."""
    pipes = [tiny.build("wan") for _ in range(2)]
    sizes: list[dict[str, int]] = [{}, {"height": 48}]
    alone = [generate_attached(tiny.build("wan"), "wan", SPARSE, size) for size in sizes]
    turns = [threading.Event(), threading.Event()]
    turns[0].set()
    results: list[torch.Tensor | None] = [None, None]

    def work(mine: int) -> None:
        def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            turns[mine].clear()
            turns[1 - mine].set()
            if step < 3:
                assert turns[mine].wait(60)
            return tensors

        assert turns[mine].wait(60)
        with attach(pipes[mine], SPARSE, dense_steps=1, backend="cpu"):
            results[mine] = generate(pipes[mine], "wan", callback_on_step_end=after, **sizes[mine])
        turns[1 - mine].set()

    threads = [threading.Thread(target=work, args=(mine,)) for mine in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(results, alone, strict=True):
        assert got is not None
        assert torch.equal(got, want)
