"""What a search looks at where calls are not all alike: sizes, batches, steps, refused methods."""

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler

from dittools.call import AttentionCall
from dittools.cli import main
from dittools.errors import InputError, PlanError
from dittools.grid import TokenGrid
from dittools.kernels import load
from dittools.methods import build
from dittools.pipelines.generate import Settings
from dittools.pipelines.tiny import build as tiny
from dittools.pipelines.tiny import settings_for
from dittools.plans import ModelFacts, Plan
from dittools.searching import guidance
from dittools.searching.atlas import BANDS
from dittools.searching.candidates import Candidate, candidates_for, measured
from dittools.searching.gradient import Tap
from dittools.searching.inspect import atlas
from dittools.searching.measure import Bench
from dittools.searching.probe import Probe, Sites
from dittools.searching.request import Constraints
from dittools.searching.rows import sample_rows
from dittools.searching.run import work_folder
from dittools.searching.scout import scout
from dittools.searching.store import Store, Unit
from dittools.searching.table import Table, flat_weights, merge, plan_of, problem_of, survivors

GRID = TokenGrid(3, 6, 6, text_after=5)
LONGER = replace(GRID, text_after=9)  # another prompt
PLAIN = replace(GRID, text_after=0)  # a second attention beside the text
SMALL = TokenGrid(1, 4, 5)  # fewer tokens than a map has cells
HALVES, QUARTERS = (0.0, 0.5, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0)


def _sites(grid: TokenGrid, steps: int = 4, ranges: tuple[float, ...] = HALVES) -> Sites:
    rows = sample_rows(grid.total, 24, 0)
    return Sites(grid, 1, 2, ranges, steps, frozenset(range(steps)), rows)


def _call(grid: TokenGrid, step: int = 0, batch: int = 1) -> AttentionCall:
    generator = torch.Generator().manual_seed(step)
    q, k, v = torch.randn(3, batch, grid.total, 2, 16, generator=generator).unbind()
    return AttentionCall(3 * q, k, v, grid, step=step, steps=4, branch="cond")


def _probed(
    candidates: list[Candidate],
    calls: list[AttentionCall],
    sites: Sites,
    carry: float | None = None,
) -> Probe:
    probe = Probe(sites, candidates, [None], carry)
    for call in calls:
        probe.attend(call, load("reference"))
    return probe


def _candidates(*methods: Any) -> list[Candidate]:
    found = [measured(build("dense"), GRID)] + [measured(m, GRID) for m in methods]
    return [c or Candidate(build("dense"), None, 1.0, 1.0, 0) for c in found]


@pytest.mark.parametrize("grid", [LONGER, PLAIN, SMALL], ids=["longer", "plain", "small"])
def test_calls_of_another_size_are_looked_at_by_their_own_masks(grid: TokenGrid) -> None:
    gna = build("gna", {"window": ("full", 3, 3), "stride": 1, "block_size": 8})
    sparge = build("sparge", {"density": 0.3, "block_size": 8})
    found = _probed(_candidates(gna, sparge), [_call(grid)], _sites(GRID)).results()
    assert found["calls"].sum() == 1
    kept = gna.mask(grid).head_density()  # type: ignore[attr-defined]
    assert torch.allclose(found["density"][0, 0, 0, :, 1], kept.expand(2).double())
    assert 0 < float(found["density"][0, 0, 0, :, 2].mean()) < 1
    assert float(found["error"][0, 0, 0, :, 1:].min()) > 0
    assert float(found["bands"][0, 0, :, BANDS.index("frame")].max()) <= 24 * (1 + 1e-5)


def test_a_call_counts_once_whatever_its_batch() -> None:
    one = _probed(_candidates(), [_call(GRID)], _sites(GRID)).results()
    whole = _call(GRID)
    doubled = replace(
        whole, **{n: getattr(whole, n).expand(2, -1, -1, -1) for n in ("query", "key", "value")}
    )
    two = _probed(_candidates(), [doubled], _sites(GRID)).results()
    for name in ("bands", "maps", "norm"):
        assert torch.allclose(two[name], one[name], rtol=1e-4), name


def test_a_method_that_refuses_a_call_is_no_candidate_there() -> None:
    gna: Any = build("gna", {"window": ("full", 3, 3), "stride": 1, "block_size": 8})
    refuses = type("Refuses", (type(gna),), {"not_supported": lambda *_: ["not here"]})
    candidates = _candidates(gna)
    candidates.append(replace(candidates[1], method=object.__new__(refuses)))
    found = _probed(candidates, [_call(GRID)], _sites(GRID)).results()
    assert torch.isinf(found["error"][0, 0, 0, :, 2]).all()
    assert torch.isfinite(found["error"][0, 0, 0, :, 1]).all()


def _two_layers_one_seen() -> Table:
    candidates = candidates_for(GRID, ["gna"])
    sites = replace(_sites(GRID), layers=2)
    probe = Probe(sites, candidates, [None, None])
    for step in range(4):
        probe.attend(replace(_call(GRID, step), layer=1), load("reference"))
    return merge([probe.results()], candidates, sites)


def test_a_layer_of_which_nothing_was_seen_stays_dense() -> None:
    table = _two_layers_one_seen()
    problem = problem_of(table, flat_weights(table), table.executed(), Constraints())
    seen = problem.allowed.view(2, 2, 2, -1)
    assert seen[0].sum(dim=-1).unique().tolist() == [1]  # dense alone
    assert bool(seen[1].all())
    cheapest = problem.cost.masked_fill(~problem.allowed, 9.0).argmin(dim=1)
    plan = plan_of(table, cheapest, ModelFacts("X", 2, 2, 16))
    assert {rule.layers for rule in plan.rules} == {(1,)}


def _table_of(steps: int, ranges: tuple[float, ...]) -> Table:
    extra = [build("sparge", {"density": d, "block_size": 8}) for d in (0.2, 0.5)]
    found = candidates_for(GRID, ["gna", "radial"])
    candidates = [*found, *_candidates(*extra)[1:]]
    sites = _sites(GRID, steps, ranges)
    calls = [_call(GRID, step) for step in range(steps)]
    return merge([_probed(candidates, calls, sites).results()], candidates, sites)


def test_step_ranges_without_a_step_say_nothing() -> None:
    one, four = _table_of(1, (0.0, 1.0)), _table_of(1, QUARTERS)
    assert four.sites.range_steps == [1, 0, 0, 0]
    assert torch.allclose(four.densities(), one.densities())
    assert survivors(four) == survivors(one)
    problem = problem_of(four, flat_weights(four), four.executed(), Constraints())
    assert problem.allowed.view(1, 4, 2, -1)[:, 1:].sum() == 6  # dense alone, at no cost


def test_the_density_of_a_chooser_counts_every_step_of_the_run() -> None:
    candidates = _candidates(build("psa", {"block_size": 16}))  # keeps what holds the mass
    calls = [_call(GRID, step) for step in range(3)]
    calls[2] = replace(calls[2], query=calls[2].query * 9)  # a sharper step, alone in its range
    sites = _sites(GRID, 3)
    assert sites.range_steps == [2, 1]
    found = merge([_probed(candidates, calls, sites).results()], candidates, sites)
    early, late = found.density[0, :, :, 1].mean(dim=1).tolist()
    assert early > late + 0.05
    assert found.candidates[1].density == pytest.approx((2 * early + late) / 3)


def test_the_cheapest_candidate_survives_so_that_reach_is_not_lost() -> None:
    table = _table_of(4, HALVES)
    table.density[..., 1:], table.computed[..., 1:] = 0.99, 0.99
    table.density[..., 3], table.computed[..., 3] = 0.1, 0.1
    table.error[..., 3] = 1e9
    assert 3 in survivors(table, most=2)
    table.error[..., 3] = float("inf")  # it cannot run
    assert 3 not in survivors(table)


def test_the_greedy_choice_that_carries_errors_on_weighs_what_choosers_keep() -> None:
    candidates = _candidates(build("sparge", {"density": 0.2, "block_size": 8}))
    call = _call(GRID)
    dense = load("reference").dense(call)
    for penalty, is_sparse in ((0.0, False), (100.0, True)):
        probe = Probe(_sites(GRID), candidates, [None], penalty)
        assert torch.equal(probe.attend(call, load("reference")), dense) != is_sparse


def test_a_gradient_is_noted_in_calls_of_another_size() -> None:
    def noted(grid: TokenGrid, heads: int = 2) -> Tap:
        tap = Tap(_sites(GRID))
        call = _call(grid)
        query = call.query[:, :, :heads].clone().requires_grad_()
        parts = (query, call.key[:, :, :heads], call.value[:, :, :heads])
        out = tap.attend(AttentionCall(*parts, grid, branch="cond"), load("reference"))
        out.backward(torch.ones_like(out))
        return tap

    main, other = noted(GRID), noted(PLAIN)
    assert main.calls.sum() == other.calls.sum() == 1
    share = other.total[0, 0, 0] / main.total[0, 0, 0]  # as many gradients as tokens
    assert share.tolist() == pytest.approx([PLAIN.total / GRID.total] * 2)
    assert noted(GRID, heads=1).calls.sum() == 0


def test_the_main_grid_is_the_one_with_most_pairs() -> None:
    given = {k: v for k, v in settings_for("sd").items() if k != "steps"}
    facts = scout(tiny("sd"), Settings(**given, steps=3))
    assert facts.grid == TokenGrid(1, 16, 24)  # more calls are made at (8, 12)
    assert facts.steps == 4  # its scheduler, PNDM, takes one more than asked for
    assert facts.seconds == pytest.approx(facts.fixed_seconds + 4 * facts.step_seconds)


def test_the_steps_of_a_run_are_those_its_scheduler_takes() -> None:
    pipe, given = tiny("pixart"), settings_for("pixart")
    assert scout(pipe, Settings(**{**given, "steps": 5})).steps == 5
    pipe.scheduler = HeunDiscreteScheduler()
    assert scout(pipe, Settings(**{**given, "steps": 5})).steps == 9


def test_a_pipeline_that_cannot_make_one_step_is_scouted_with_two() -> None:
    pipe, given = tiny("mochi"), settings_for("mochi")
    assert scout(pipe, Settings(**{**given, "steps": 4})).steps == 4
    with pytest.raises(InputError, match=r"cannot make a run of one step.*more steps"):
        scout(pipe, Settings(**{**given, "steps": 1}))


def test_a_plan_that_does_not_fit_the_atlas_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe, given = tiny("pixart"), settings_for("pixart")
    given.pop("prompt")
    monkeypatch.setattr(Bench, "calibrate", lambda *_: pytest.fail("measured"))
    plan = Plan.of(build("gna", {"window": ("full", 2, 2), "stride": 1}))
    with pytest.raises(PlanError, match="parameters that are no candidate"):
        atlas(pipe, ["a"], plan=plan, methods=["gna"], **{**given, "steps": 1})


def test_a_folder_in_place_of_the_page_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "--model", "tiny/pixart", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is a folder; expected the file of the page; try: another --out" in said


def _full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_under_finished_work_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", _full)
    said = r"cannot keep finished work in .*; got No space left on device; try: .*--work folder"
    with pytest.raises(InputError, match=said):
        store.run("work", [Unit("a", 0, lambda: {"x": torch.ones(1)})])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_under_the_results_of_a_guidance_search_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = guidance.Found(("L0H0",), (), 0.0, 1, Plan(), {})
    monkeypatch.setattr(guidance, "write_text", _full)
    with pytest.raises(InputError, match=r"cannot write the results to .*; got No space left"):
        guidance.write_guidance(None, found, ["a"], tmp_path / "plan.json", with_atlas=False)


def test_a_full_disk_under_the_atlas_page_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dittools.searching.inspect.atlas", lambda *_, **__: {})
    monkeypatch.setattr("dittools.searching.inspect.atlas_page", lambda _: "x")
    monkeypatch.setattr("dittools.pipelines.output.write_text", _full)
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "--model", "tiny/pixart", "--out", str(tmp_path / "a.html")])
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "a.html; got No space left on device; try: the same command with room" in said


def test_the_work_folder_of_a_model_is_the_same_in_every_process(tmp_path: Path) -> None:
    pipe = tiny("pixart")
    names = pipe.scheduler.config["_use_default_values"]
    assert len(names) > 3  # diffusers lists them in the order of a set of strings
    first = work_folder(pipe, tmp_path, "cpu")
    pipe.scheduler.register_to_config(_use_default_values=list(reversed(names)))
    assert work_folder(pipe, tmp_path, "cpu") == first
    pipe.scheduler.register_to_config(beta_start=0.5)
    assert work_folder(pipe, tmp_path, "cpu") != first
