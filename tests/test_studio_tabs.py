"""The studio's logic behind atlas, search, vote and benchmark; no browser, no page."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dittools.errors import DitToolsError, InputError
from dittools.pipelines import load
from dittools.plans import Plan
from dittools.studio import atlas_view, ballots, comparison
from dittools.studio.atlas_edit import SCOPES, AtlasEdit, plan_of, read_atlas
from dittools.studio.engine import Engine
from dittools.studio.latency_job import BenchOrder, results_of, run_bench, table_csv
from dittools.studio.live_search import SearchOrder, run_atlas, run_search
from dittools.studio.plots import frontier_figure, parts_figure, speed_figure
from dittools.studio.runs import Run, RunStore
from dittools.studio.sizes import ModelCalls, prompts_of, settings_for

TINY = {"seed": 0, "steps": 2, "frames": 9, "height": 32, "width": 48}


def _atlas(steps: tuple[int, ...] = (1, 1, 2)) -> dict[str, Any]:
    """Two layers, two heads, three step ranges; dense, two kernels, and one that is a tensor."""
    cells = [
        {
            "layer": layer,
            "range": part,
            "head": head,
            "class": "row" if head else "<b>local",
            "bands": [0.5] * 8,
            "choice": 0,
            "error": [0.0, 0.1, None if (layer, head) == (1, 1) else 0.2, 0.05],
            "branches": [[0.0, 0.1, 0.2, 0.05]],
            "map": [0, 128, 255, 64],
        }
        for layer in range(2)
        for part in range(3)
        for head in range(2)
    ]
    candidates = [
        {"name": "dense()", "method": "dense", "params": {}, "density": 1.0},
        {"name": "gna(window=1)", "method": "gna", "params": {"window": [3, 3, 3]}, "density": 0.2},
        {"name": "radial()", "method": "radial", "params": {"decay": 0.5}, "density": 0.4},
        {"name": "paro()", "method": "paro", "params": None, "density": 0.3},
    ]
    return {
        "layers": 2,
        "heads": 2,
        "ranges": [0.0, 0.25, 0.5, 1.0],
        "range_steps": list(steps),
        "bands": ["local", "diagonal", "stripe", "frame", "row", "column", "first_frame", "text"],
        "uniform": [0.1] * 8,
        "candidates": candidates,
        "cells": cells,
        "model": {"class": "Toy", "layers": 2, "heads": 2, "head_dim": 8},
    }


def _ran(plan: Plan, layer: int, step: int) -> list[str]:
    """Method of each of the two heads at one of eight steps."""
    names = {h: m.name for heads, m in plan.rules_for(layer, "", step, 8, 2) for h in heads}
    return [names[0], names[1]]


def _followed(plan: Plan, edit: AtlasEdit, steps: int) -> list[str]:
    """What a plan runs on every layer, step, branch and head."""
    heads = edit.found["heads"]
    return [
        f"{layer} {step} {branch} {head} {method}"
        for layer in range(edit.found["layers"])
        for step in range(steps)
        for branch in ("cond", "uncond")
        for members, method in plan.rules_for(layer, "", step, steps, heads, branch)
        for head in members
    ]


def test_an_atlas_without_changes_is_a_dense_plan() -> None:
    edit = AtlasEdit.start(_atlas())
    assert plan_of(edit).rules == ()
    assert edit.density() == 1.0
    assert not edit.edited


def test_a_choice_becomes_a_rule_for_that_head_and_can_be_undone() -> None:
    edit = AtlasEdit.start(_atlas(), "run-1")
    changed = edit.with_choice(edit.reach(1, 0, 0, SCOPES[0], every_range=True), 2)
    plan = plan_of(changed)
    assert [_ran(plan, 1, s) for s in (0, 7)] == [["radial", "dense"]] * 2
    assert _ran(plan, 0, 0) == ["dense", "dense"]
    assert (len(plan.rules), plan.rules[0].steps) == (1, "all")
    assert plan.model is not None
    assert plan.model.class_name == "Toy"
    assert plan.provenance["atlas"] == "run-1"
    assert changed.density() == pytest.approx(1 - 0.6 / 4)
    assert changed.restored(sorted(changed.edited)).choice == edit.choice


def test_choices_differ_by_step_range_and_a_range_without_a_step_follows_the_one_before() -> None:
    edit = AtlasEdit.start(_atlas(steps=(2, 0, 2)))
    assert edit.parts == [0, 2]
    changed = edit.with_choice(edit.reach(0, 1, 0, SCOPES[0], every_range=False), 1)
    changed = changed.with_choice(changed.reach(0, 1, 2, SCOPES[0], every_range=False), 2)
    plan = plan_of(changed)
    assert [_ran(plan, 0, s)[1] for s in range(8)] == ["gna"] * 4 + ["radial"] * 4
    uneven = AtlasEdit.start(_atlas(steps=(1, 1, 2)))
    late = uneven.with_choice(uneven.reach(0, 1, 2, SCOPES[0], every_range=False), 2)
    assert late.density() == pytest.approx(1 - 0.6 * 2 / 16)  # two of its four steps, four heads
    alone = edit.with_choice(edit.reach(0, 1, 2, SCOPES[0], every_range=False), 2)
    assert [_ran(plan_of(alone), 0, s)[1] for s in (3, 4)] == ["dense", "radial"]


def test_the_scope_reaches_a_layer_or_all_heads_of_a_class() -> None:
    edit = AtlasEdit.start(_atlas())
    layer = edit.with_choice(edit.reach(0, 0, 0, SCOPES[1], every_range=True), 1)
    assert [_ran(plan_of(layer), n, 0) for n in (0, 1)] == [["gna", "gna"], ["dense", "dense"]]
    assert plan_of(layer).rules[0].heads == "all"
    kind = edit.with_choice(edit.reach(0, 1, 0, SCOPES[2], every_range=True), 1)
    assert [_ran(plan_of(kind), n, 0) for n in (0, 1)] == [["dense", "gna"], ["dense", "gna"]]
    assert len(plan_of(kind).rules) == 1  # layers that treat heads alike share a rule


def test_branches_that_a_search_chose_apart_stay_apart_until_edited() -> None:
    found = _atlas()
    for cell in found["cells"]:
        if (cell["layer"], cell["head"]) == (0, 0):
            cell.update(choice=1, choices=[1, 2])
    edit = AtlasEdit.start(found)
    plan = plan_of(edit)
    assert [(r.branch, r.method.name, r.steps) for r in plan.rules] == [
        ("cond", "gna", "all"),
        ("uncond", "radial", "all"),
    ]
    assert [plan.rules_for(0, "", 0, 8, 2, branch)[0][1].name for branch in ("cond", "uncond")] == [
        "gna",
        "radial",
    ]
    assert edit.density() == pytest.approx((0.2 + 0.4 + 6 * 1.0) / 8)
    text = atlas_view.grid(edit, 0, None) + atlas_view.head(edit, 0, (0, 0))
    assert "gna / radial" in text
    assert re.findall(r">(cond|uncond)</b> <button", text) == ["cond", "uncond"]
    both = edit.with_choice(edit.reach(0, 0, 0, SCOPES[0], every_range=True), 2)
    assert [(r.branch, r.method.name) for r in plan_of(both).rules] == [("all", "radial")]
    assert both.edited
    assert not both.restored(sorted(both.edited)).edited


@pytest.mark.parametrize(
    ("candidate", "words"),
    [(2, "cannot run on this head"), (3, "tensors"), (9, "no such candidate"), (-1, "no such")],
)
def test_what_cannot_run_cannot_be_chosen(candidate: int, words: str) -> None:
    edit = AtlasEdit.start(_atlas())
    with pytest.raises(InputError, match=words):
        edit.with_choice(edit.reach(1, 1, 0, SCOPES[0], every_range=True), candidate)


def test_a_head_that_is_not_there_is_refused() -> None:
    edit = AtlasEdit.start(_atlas())
    for place in ((2, 0, 0), (0, 2, 0), (0, 0, 3), (-1, 0, 0)):
        with pytest.raises(InputError, match="no such head"):
            edit.index(*place)


def test_the_atlas_page_escapes_what_it_shows() -> None:
    found = _atlas()
    found["candidates"][1]["name"] = "gna(<script>)"
    edit = AtlasEdit.start(found)
    text = atlas_view.grid(edit, 0, (0, 0)) + atlas_view.head(edit, 0, (0, 0))
    assert "<script>" not in text
    assert "<b>local" not in text.replace("<b>&lt;b&gt;local", "")
    assert text.count("data-layer=") == 4
    assert text.count('aria-pressed="true"') == 1
    assert "&lt;script&gt;" in text
    buttons = re.findall(r'data-candidate="(\d)"', text)
    assert buttons == ["1", "2"]  # dense is chosen, tensors cannot be


def test_candidates_are_listed_best_first_and_the_chosen_one_on_top() -> None:
    edit = AtlasEdit.start(_atlas())
    edit = edit.with_choice(edit.reach(0, 0, 0, SCOPES[0], every_range=True), 2)
    text = atlas_view.head(edit, 0, (0, 0))
    names = re.findall(r'<td title="(\w+)', text)
    assert names == ["radial", "dense", "paro", "gna"]
    assert atlas_view.readable('gna(window=[1, "full"], stride=1, block_size=8)') == (
        "gna(window=[1, full])"
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cells": []}', "\xff"])
def test_a_damaged_atlas_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "atlas.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"atlas\.json"):
        read_atlas(path)
    short = _atlas()
    short["cells"] = short["cells"][:-1]
    path.write_text(json.dumps(short))
    with pytest.raises(InputError, match=r"12 cells.*11"):
        read_atlas(path)


class _Told:
    """Stands in for a job: notes what it is told."""

    def __init__(self) -> None:
        self.expected = 0
        self.lines: list[tuple[str, int, int]] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        self.lines.append((what, done, total))

    def expect(self, steps: int) -> None:
        self.expected = steps


def test_progress_counts_model_calls_and_leaves_out_what_was_done_before() -> None:
    told = _Told()
    calls = ModelCalls(told, 4, 20)  # type: ignore[arg-type]
    calls.report("measuring", 0, 3)
    assert told.lines[-1] == ("measuring", 0, 12)
    calls.report("measuring", 1, 3)  # no model call: found on disk
    assert (told.lines[-1], told.expected) == (("measuring", 0, 8), 16)
    for _ in range(5):  # one more than a unit takes
        calls.call()
    assert told.lines[-1] == ("measuring", 5, 8)
    for _ in range(5):  # a dense reference on top
        calls.call()
    assert told.lines[-1] == ("measuring", 10, 10)
    calls.report("measuring", 2, 3)
    assert told.expected == 16
    calls.report("verifying", 0, 1)
    assert told.lines[-1] == ("verifying", 0, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "speed"}, "no such target"),
        ({"value": 1.5}, "density is not usable"),
        ({"methods": ("nope",)}, "unknown method"),
        ({"budget": "huge"}, "unknown budget"),
        ({"prompts": [" "]}, "empty"),
    ],
)
def test_an_impossible_search_is_refused_before_it_is_queued(change: Any, words: str) -> None:
    given: dict[str, Any] = {
        "prompts": ["a"],
        "target": "density",
        "value": 0.4,
        "methods": ("gna",),
        "budget": "quick",
        "settings": dict(TINY),
    }
    with pytest.raises(DitToolsError, match=words):
        SearchOrder(**{**given, **change})


def test_fields_are_read_with_the_model_s_own_defaults() -> None:
    found = settings_for("demo", "a red circle", seed=3, steps=None, height=64)
    assert (found["seed"], found["steps"], found["height"], found["width"]) == (3, 12, 64, 96)
    assert "prompt" not in found
    for bad, words in (({"steps": 2.5}, "whole number"), ({"frames": -1}, "at least 1")):
        with pytest.raises(InputError, match=words):
            settings_for("demo", "a red circle", **bad)
    with pytest.raises(InputError, match="knows none"):
        settings_for("demo", "zebra crossing")
    assert prompts_of(" a \n\n b\n") == ["a", "b"]
    with pytest.raises(InputError, match="no prompt"):
        prompts_of(" \n ")
    with pytest.raises(InputError, match="too many or too long"):
        prompts_of("x" * 2001)


def _generated(runs: RunStore, method: str, seed: int, prompt: str = "a <b>circle") -> Run:
    """A finished generation whose clips are a few bytes."""
    folder = runs.begin()
    report = {
        "created": "2026-01-01T00:00:00+00:00",
        "environment": {"torch": "2", "python": "3", "dittools": "0", "gpu": "", "threads": 1},
        "model": "demo",
        "settings": {"prompt": prompt, "seed": seed, "steps": 4},
        "method": method,
        "dense": {"seconds": 2.0, "attention_seconds": 1.0, "all_seconds": [2.0, 2.2]},
        "accelerated": {"seconds": 1.0, "attention_seconds": 0.5, "all_seconds": [1.0, 1.1]},
        "attention_share": 0.5,
        "speedup_bound": 2.0,
        "density": 0.4,
        "fidelity": {"psnr_db": 30.0, "ssim": 0.9, "ms_ssim": None, "frame_psnr_db": [30.0]},
        "floors": {"other_seed": {"psnr_db": 12.0, "ssim": 0.2, "frame_psnr_db": [12.0]}},
        "prompt_score": None,
    }
    files = {name: folder / f"{name}.mp4" for name in ("dense", "accelerated")}
    for name, path in files.items():
        path.write_bytes(f"{name} {method} {seed}".encode())
    files["report"] = folder / "report.json"
    files["report"].write_text(json.dumps(report))
    files["plan"] = Plan.of(_method(method)).save(folder / "plan.json")
    return runs.finish(folder, "generate", prompt, {}, files)


def _method(name: str) -> Any:
    from dittools.methods import build

    return build(name)


@pytest.fixture
def runs(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


def test_two_methods_meet_on_the_same_prompt_and_seed_only(runs: RunStore) -> None:
    for method, seed in (("gna", 0), ("gna", 1), ("radial", 1), ("radial", 2)):
        _generated(runs, method, seed)
    listed = ballots.entries(runs.entries())
    assert ballots.labels(listed)[-1] == "dense"
    assert set(ballots.labels(listed)) == {"gna", "radial", "dense"}
    met = ballots.contest(listed, "gna", "radial")
    assert [(Path(a).read_text(), Path(b).read_text()) for _, a, b, _ in met.pairs] == [
        ("accelerated gna 1", "accelerated radial 1")
    ]
    against = ballots.contest(listed, "dense", "gna")
    assert sorted(Path(a).read_text() for _, a, _, _ in against.pairs) == [
        "dense gna 0",
        "dense gna 1",
    ]
    assert all(a == x for _, a, _, x in against.pairs)


def test_sides_that_never_meet_are_refused(runs: RunStore) -> None:
    _generated(runs, "gna", 0)
    _generated(runs, "radial", 1)
    listed = ballots.entries(runs.entries())
    with pytest.raises(InputError, match="no clip in common"):
        ballots.contest(listed, "gna", "radial")
    with pytest.raises(InputError, match="two different sides"):
        ballots.contest(listed, "gna", "gna")
    with pytest.raises(InputError, match="no clip in common"):
        ballots.contest(listed, "", "gna")


def test_a_run_that_lost_its_files_is_left_out_of_votes(runs: RunStore) -> None:
    kept, lost = _generated(runs, "gna", 0), _generated(runs, "radial", 0)
    (lost.folder / "dense.mp4").unlink()
    (_generated(runs, "psa", 0).folder / "report.json").write_text("{}")
    assert [e.clip.parent for e in ballots.entries(runs.entries())] == [kept.folder]


def test_plans_of_one_name_are_told_apart(runs: RunStore) -> None:
    from dittools.methods import build

    first, second = _generated(runs, "gna", 0), _generated(runs, "gna", 1)
    assert ballots.labels(ballots.entries(runs.entries())) == ["gna", "dense"]
    Plan.of(build("gna", {"window": [3, 3, 3]})).save(second.folder / "plan.json")
    names = ballots.labels(ballots.entries(runs.entries()))
    assert len(names) == 3
    assert all(re.fullmatch(r"gna \(\w{4}\)", name) for name in names[:2])
    assert first.folder != second.folder


def test_nothing_a_page_is_given_tells_the_side(runs: RunStore) -> None:
    for seed in range(6):
        for method in ("gna", "radial"):
            _generated(runs, method, seed)
    met = ballots.contest(ballots.entries(runs.entries()), "gna", "radial")
    every = ballots.questions(met, "", 7)
    assert [t.pair for t in every] != [name for name, *_ in met.pairs]
    assert {t.first_is_a for t in every} == {True, False}
    copies = ballots.blind_copies(runs, every[0])
    again = ballots.blind_copies(runs, every[0])
    for name, source in (("a", every[0].a), ("b", every[0].b), ("x", every[0].x)):
        assert copies[name].read_bytes() == Path(source).read_bytes()
        assert re.fullmatch(r"[0-9a-f]{24}\.mp4", copies[name].name)
        assert copies[name].name != again[name].name
        assert runs.owns(copies[name])
        assert copies[name].stat().st_mtime != Path(source).stat().st_mtime
    ballots.forget(copies)
    assert not any(path.exists() for path in copies.values())
    assert all(path.exists() for path in again.values())


def test_votes_are_kept_per_voter_and_counted_with_an_interval(runs: RunStore) -> None:
    for seed in range(3):
        for method in ("gna", "radial"):
            _generated(runs, method, seed)
    met = ballots.contest(ballots.entries(runs.entries()), "gna", "radial")
    assert "No decided vote" in ballots.sentence(met, ballots.tally(runs, met))
    for voter in ("Ann", "Ben  Smith"):
        every = ballots.questions(met, voter, 1)
        for trial in every:
            ballots.vote(runs, met, trial, "a" if trial.first_is_a else "b")  # always gna
        assert ballots.unanswered(runs, met, ballots.questions(met, voter, 99)) == []
    assert len(ballots.unanswered(runs, met, ballots.questions(met, "Cem", 1))) == 3
    found = ballots.tally(runs, met)
    assert (found.first, found.second, found.same) == (6, 0, 0)
    words = ballots.sentence(met, found)
    assert "gna was closer to dense in 6 of 6" in words
    assert "95% interval 61% to 100%" in words
    assert "not chance: gna is preferred" in words
    ballots.vote(runs, met, ballots.questions(met, "Cem", 1)[0], "same")
    assert "In 1 more no difference" in ballots.sentence(met, ballots.tally(runs, met))
    assert met.file(runs) != ballots.contest(ballots.entries(runs.entries()), "radial", "gna").file(
        runs
    )


def test_a_comparison_takes_generations_and_says_what_is_wrong(
    runs: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = _generated(runs, "gna", 0), _generated(runs, "radial", 1)
    monkeypatch.setattr("dittools.commands.compare_page._pairs", lambda *_: "")  # no real clips
    text = comparison.report_of([one, other])
    assert "other seed: 0 and 1" in text
    assert "<b>circle" not in text
    assert "another seed" in text
    path, document = comparison.document_of(one)
    assert path.parent == one.folder
    assert document["versions"]["torch"] == "2"
    fast = document["cases"][1]
    assert fast["speedup"]["median"] == pytest.approx(2.0)
    assert fast["bound_at_density"] == pytest.approx(1 / 0.7)
    assert fast["parts_ms"]["everything else"]["median"] == pytest.approx(550.0)
    with pytest.raises(InputError, match="1 to 8"):
        comparison.report_of([])
    (one.folder / "report.json").write_text("{}")
    with pytest.raises(InputError, match="damaged"):
        comparison.document_of(one)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("cpu", loader=lambda name, **_: load(name))


def _finished(engine: Engine, work: Any) -> Any:
    job = engine.submit("test", "tiny/wan", work)
    last = list(engine.watch(job))[-1]
    assert last.state == "done", last.error
    return job.result, last


def test_an_atlas_is_measured_kept_and_opened(engine: Engine, runs: RunStore) -> None:
    run, last = _finished(
        engine,
        lambda pipe, job: run_atlas(["a"], ("gna",), dict(TINY), "tiny/wan", runs, pipe, job),
    )
    path = run.path("atlas")
    edit = AtlasEdit.start(read_atlas(path))
    assert run.kind == "atlas"
    assert last.done > 0
    text = atlas_view.grid(edit, 0, None)
    assert text.count("data:image/png;base64,") == edit.found["layers"] * edit.found["heads"]
    assert runs.verify(run) == []


def test_a_stopped_search_goes_on_where_it_was(engine: Engine, runs: RunStore) -> None:
    order = SearchOrder(["a", "b"], "density", 0.6, ("gna",), "quick", dict(TINY))

    def work(pipe: Any, job: Any) -> Run:
        return run_search(order, "tiny/wan", runs, pipe, job)

    job = engine.submit("test", "tiny/wan", work)
    for shot in engine.watch(job):
        if "weights" in shot.what:
            job.cancel()
    assert shot.state == "stopped"
    assert runs.entries() == []
    kept = len(list((runs.root / "search-work").rglob("*.safetensors")))
    assert kept > 0
    run, last = _finished(engine, work)
    assert last.what != "measuring candidates"
    assert [p["density"] for p in last.posted["curve"]] == sorted(
        p["density"] for p in last.posted["curve"]
    )
    assert len(last.posted["trials"]) >= 1
    assert "estimate" in last.posted
    held_out = Plan.load(run.path("plan")).measured["held_out"]
    assert held_out["psnr_db"] == run.facts["chosen"]["psnr_db"]
    assert {"plan", "frontier", "report", "atlas"} <= set(run.files)
    plan, edit = Plan.load(run.path("plan")), AtlasEdit.start(read_atlas(run.path("atlas")))
    assert plan.rules
    assert _followed(plan_of(edit), edit, 2) == _followed(
        plan, edit, 2
    )  # the atlas opens as the plan
    figure = frontier_figure(
        {name: last.posted[name] for name in ("curve", "singles", "trials")}, ("density", 0.6)
    )
    assert len(figure.data) == 3


def test_a_benchmark_is_a_table_a_plot_and_files(engine: Engine, runs: RunStore) -> None:
    order = BenchOrder("a", ("gna",), "", 1, 0, dict(TINY))
    run, last = _finished(engine, lambda pipe, job: run_bench(order, "tiny/wan", runs, pipe, job))
    results = results_of(run)
    assert [case["name"] for case in results["cases"]] == ["dense", "gna"]
    rows = list(csv.DictReader(io.StringIO(run.path("table").read_text())))
    assert [row["case"] for row in rows] == ["dense", "gna"]
    assert float(rows[1]["total_ms_median"]) == results["cases"][1]["total_ms"]["median"]
    assert len(parts_figure(results["cases"]).data) == 6
    assert len(speed_figure(results["cases"]).data[0].x) == 1
    assert (last.done, last.total) == (2, 2)
    assert ballots.labels(ballots.entries([run])) == ["gna (benchmark)", "dense"]


def test_a_benchmark_of_nothing_is_refused() -> None:
    for methods, repeats, words in (((), 1, "no case"), (("gna",), 0, "repeats"), (("x",), 1, "x")):
        with pytest.raises(DitToolsError, match=words):
            BenchOrder("a", methods, "", repeats, 0, dict(TINY))


def test_a_name_is_no_formula_in_a_spreadsheet() -> None:
    spread = {"p20": 1.0, "median": 2.0, "p80": 3.0}
    case = {
        "name": "=cmd()",
        "density": 1.0,
        "total_ms": spread,
        "parts_ms": {"attention": spread},
        "speedup": spread,
        "fidelity": None,
        "bound_at_density": 1.0,
        "bound": 1.0,
        "limit_ms": 1.0,
        "peak_bytes": None,
    }
    assert "\n'=cmd()," in table_csv({"cases": [case]})
