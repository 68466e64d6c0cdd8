"""A search from prompts to plan on a toy Wan pipeline: targets, bytes, kills, shards, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import pytest

import dittools
from dittools.errors import InputError, PlanError
from dittools.pipelines import load
from dittools.pipelines.generate import Settings, generate
from dittools.plans import Plan
from dittools.searching import Budget, Constraints
from dittools.searching.api import SearchResult, make_request
from dittools.searching.estimate import estimate
from dittools.searching.inspect import atlas, atlas_page, choice_of
from dittools.searching.store import Store, Unit, read_prompts

PROMPTS = ["a red circle", "a blue square", "a cat", "a dog on a green square"]
SIZE: dict[str, Any] = {"steps": 4, "frames": 9, "height": 32, "width": 48}
BUDGET = Budget(1, 2, 18, 1, 2, 4, 2)
GIVEN: dict[str, Any] = {"methods": ["gna", "sparse_vdit"], "budget": BUDGET, **SIZE}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load("tiny/wan")


@pytest.fixture(scope="module")
def found(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    out = tmp_path_factory.mktemp("search") / "plan.json"
    return dittools.search(pipe, PROMPTS, target_density=0.5, out=out, **GIVEN)


def _bytes(result: SearchResult) -> dict[str, bytes]:
    return {name: result.files[name].read_bytes() for name in ("plan", "frontier")}


def test_the_plan_meets_its_density_and_says_what_was_predicted(
    pipe: Any, found: SearchResult
) -> None:
    plan = Plan.load(found.files["plan"])
    assert found.met
    assert 0.3 < plan.measured["density"] <= 0.502
    with dittools.attach(pipe, found.files["plan"], backend="cpu") as handle:
        generate(pipe, Settings("a red circle", **SIZE))
        assert handle.report().density == pytest.approx(plan.measured["density"], abs=1e-6)
    assert plan.model is not None
    assert plan.model.class_name == "WanTransformer3DModel"
    assert plan.provenance["held_out"] == ["a blue square", "a dog on a green square"]
    assert {"predicted_psnr_db", "held_out"} <= set(plan.measured)


def test_every_single_method_is_on_the_frontier(found: SearchResult) -> None:
    singles = found.frontier["singles"]
    assert {s["method"] for s in singles} == {"gna", "sparse_vdit"}
    assert sum(s["held_out"] is not None for s in singles) == BUDGET.points
    curve = [p["psnr_db"] for p in found.frontier["predicted"]]
    assert curve == sorted(curve)


def test_the_report_needs_nothing_but_itself(found: SearchResult) -> None:
    text = found.files["report"].read_text()
    assert "http" not in text
    assert text.count("<circle") == len(found.frontier["singles"]) + len(found.frontier["trials"])
    assert "kernel times" in text
    data = text.split('type="application/json">')[1].split("</script>")[0]
    cells = json.loads(data)["cells"]
    assert len(cells) == 2 * 2 * 4  # layers, heads, step ranges
    assert all(len(cell["error"]) == len(json.loads(data)["candidates"]) for cell in cells)


def test_equal_inputs_give_equal_bytes_and_a_second_search_finds_its_work(
    pipe: Any, found: SearchResult, tmp_path: Path
) -> None:
    again = dittools.search(pipe, PROMPTS, target_density=0.5, out=tmp_path / "plan.json", **GIVEN)
    assert _bytes(again) == _bytes(found)
    seen: list[str] = []
    third = dittools.search(
        pipe,
        PROMPTS,
        target_density=0.5,
        out=tmp_path / "plan.json",
        progress=lambda what, done, total: seen.append(what),
        **GIVEN,
    )
    assert _bytes(third) == _bytes(found)
    report = (tmp_path / "report.html").read_bytes()
    assert third.files["report"].read_bytes() == report
    other = dittools.search(pipe, PROMPTS, target_density=0.5, seed=5, **GIVEN)
    assert other.frontier["chosen"] != found.frontier["chosen"]


def test_a_psnr_is_met_on_the_held_out_prompts(pipe: Any, tmp_path: Path) -> None:
    budget = replace(BUDGET, rounds=10)
    got = dittools.search(pipe, PROMPTS, min_psnr=40, work=tmp_path, **{**GIVEN, "budget": budget})
    assert got.met
    assert got.frontier["chosen"]["psnr_db"] >= 40
    cheaper = [t for t in got.frontier["trials"] if t["density"] < got.plan.measured["density"]]
    assert all(t["psnr_db"] < 40 for t in cheaper)


def test_constraints_hold_in_the_plan(pipe: Any) -> None:
    limits = Constraints(dense_layers=(0,), dense_heads=((1, 0),), exclude=("gna",), distinct=2)
    got = dittools.search(pipe, PROMPTS, target_density=0.9, constraints=limits, **GIVEN)
    for step in range(4):
        assert [m.name for _, m in got.plan.rules_for(0, "", step, 4, 2)] == ["dense"]
        rules = got.plan.rules_for(1, "", step, 4, 2)
        assert rules[0][0][0] == 0
        assert rules[0][1].name == "dense"
        assert all(method.name != "gna" for _, method in rules)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"target_density": 0.001}, "density is out of reach.*at least 0"),
        ({"target_speedup": 900.0}, "speedup is out of reach.*at most"),
        ({}, "exactly one target"),
        ({"target_density": 0.5, "min_psnr": 30.0}, "exactly one target"),
        ({"target_density": 1.5}, "target density is not usable"),
        ({"target_density": 0.5, "methods": ["nonsense"]}, "unknown method"),
        ({"target_density": 0.5, "budget": "huge"}, "unknown budget"),
        ({"target_density": 0.5, "ranges": (0.0, 0.7, 0.5, 1.0)}, "step ranges"),
        ({"target_density": 0.5, "constraints": Constraints(dense_layers=(9,))}, "layers below 2"),
        ({"target_density": 0.5, "constraints": Constraints(reuse=-1.0)}, "reuse .* from 0 on"),
        ({"target_density": 0.5, "carry": float("nan")}, "carry .* got nan"),
        ({"target_density": 0.5, "seed": 2**64 - 1}, "seed is not usable.*64 bits"),
        ({"target_density": 0.5, "methods": ["Gna2"]}, r"expected radial, (?!.*oracle).*Gna2"),
    ],
)
def test_one_clear_error(pipe: Any, target: dict[str, Any], words: str) -> None:
    limits = Constraints(exclude=("sparse_vdit",))  # its skip mode reaches any density
    with pytest.raises(InputError, match=words) as caught:
        dittools.search(pipe, PROMPTS, **{**GIVEN, "constraints": limits, **target})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot read"), (b"\n \n", "holds no prompt"), (b"a \xff cat", "not UTF-8.*0xff")],
)
def test_unusable_prompts_files(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_prompts(path)


def test_prompts_files_may_have_a_mark_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n ein Vögel \n".encode())
    assert read_prompts(path) == ["a cat", "ein Vögel"]


def test_plans_for_another_model_are_refused(found: SearchResult) -> None:
    assert found.plan.model is not None
    other = replace(found.plan, model=replace(found.plan.model, heads=3))
    with pytest.raises(PlanError, match=r"another model.*heads 3.*got 2"):
        dittools.attach(load("tiny/wan"), other)


def test_a_folder_in_place_of_the_plan_is_refused_at_once(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a file name; got a folder"):
        dittools.search(pipe, PROMPTS, target_density=0.5, out=tmp_path, **GIVEN)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_plan_whole(
    pipe: Any, found: SearchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dittools.searching import api

    out = tmp_path / "plan.json"
    api.write(found, out)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: Path, text: str, **_: Any) -> None:
        path.write_bytes(text.encode()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left"):
        api.write(found, out)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_estimate_counts_the_forwards_a_search_makes(pipe: Any) -> None:
    request = make_request(pipe, PROMPTS, target_density=0.5, **GIVEN)
    found = estimate(pipe, request)
    assert found.generations == {
        "dense": 3,
        "calibration": 1,
        "sensitivity": 6,
        "weights": 3,
        "verification": 8,
        "single methods": 4,
        "first look": 2,
    }
    assert found.forwards == 27 * 4 * 2
    few = make_request(pipe, PROMPTS, target_density=0.5, **{**GIVEN, "methods": ["radial"]})
    assert "first look" not in estimate(pipe, few).generations


def test_a_unit_is_done_once_and_a_damaged_file_is_done_again(tmp_path: Path) -> None:
    import torch

    ran: list[int] = []

    def work() -> dict[str, torch.Tensor]:
        ran.append(1)
        return {"x": torch.arange(3)}

    for _ in range(2):
        assert Store(tmp_path).run("w", [Unit("key", 0, work)])[0]["x"].tolist() == [0, 1, 2]
    assert len(ran) == 1
    next(tmp_path.iterdir()).write_bytes(b"cut short")
    assert Store(tmp_path).run("w", [Unit("key", 0, work)])[0]["x"].tolist() == [0, 1, 2]
    assert len(ran) == 2


def test_a_longer_list_of_prompts_is_calibrated_as_in_a_new_folder(
    pipe: Any, tmp_path: Path
) -> None:
    """Prompts take turns at the steps, so that a prompt's turn depends on how many there are."""
    given = {**GIVEN, "methods": ["sparse_vdit"], "steps": 8, "ranges": (0.0, 0.5, 1.0)}
    given["budget"] = Budget(2, 1, 18, 2, 2, 1, 0)
    longer = dittools.search(pipe, PROMPTS, target_density=0.6, **given).frontier
    for prompts in (PROMPTS[:2], PROMPTS):
        found = dittools.search(
            pipe, prompts, target_density=0.6, work=tmp_path / "work", **given
        ).frontier
    assert found == longer


def test_the_work_folder_is_that_of_the_whole_pipeline(tmp_path: Path) -> None:
    import torch
    from diffusers import KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler

    from dittools.searching.run import work_folder

    def folder() -> Path | None:
        return work_folder(other, tmp_path, "cpu")

    other = load("tiny/sd")
    seen = [folder()]
    assert folder() == seen[0]
    for name in ("unet", "vae", "text_encoder"):
        with torch.no_grad():
            next(getattr(other, name).parameters()).add_(1.0)
        seen.append(folder())
    for kind in (KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler):
        other.scheduler = kind()
        seen.append(folder())
    assert len(set(seen)) == len(seen)
    other.to("meta")  # as sequential offloading leaves it
    assert folder() not in seen


def _search_in_child(out: Path) -> None:
    dittools.search(load("tiny/wan"), PROMPTS, target_density=0.5, out=out, **GIVEN)


def test_a_search_killed_at_random_points_gives_the_same_plan(
    found: SearchResult, tmp_path: Path
) -> None:
    out, random, kills = tmp_path / "plan.json", Random(4), 0
    for target in (1, 4, 9, 16):
        child = get_context("fork").Process(target=_search_in_child, args=(out,))
        child.start()
        deadline = time.monotonic() + 240
        while len(list(tmp_path.rglob("*.safetensors"))) < target and child.is_alive():
            assert time.monotonic() < deadline, "the search does not get on"
            time.sleep(0.002)
        time.sleep(random.random() * 0.05)
        if child.is_alive():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
    assert kills >= 3
    _search_in_child(out)
    assert out.read_bytes() == found.files["plan"].read_bytes()
    assert (tmp_path / "frontier.json").read_bytes() == found.files["frontier"].read_bytes()


def test_two_processes_give_the_plan_of_one(found: SearchResult, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    script = tmp_path / "shard.py"
    script.write_text(
        "import sys, torch, dittools\n"
        "torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from dittools.pipelines import load\n"
        "from dittools.searching import Budget\n"
        "from dittools.pipelines.ranks import finish\n"
        f"dittools.search(load('tiny/wan'), Path({str(prompts)!r}), target_density=0.5,\n"
        f"    methods=['gna', 'sparse_vdit'], budget={BUDGET!r}, out=Path({str(tmp_path)!r})\n"
        f"    / 'plan.json', work=Path({str(tmp_path)!r}) / sys.argv[1], **{SIZE!r})\n"
        "from dittools.pipelines.ranks import place\n"
        f"(Path({str(tmp_path)!r}) / ('rank %d of %d' % place())).touch()\n"
        "finish()\n"
    )
    # without a GPU `accelerate launch` starts one process, however many are asked for
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *launch, str(script), "work"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # lines the two print at once may run into one another; files do not
    assert {p.name for p in tmp_path.glob("rank *")} == {"rank 0 of 2", "rank 1 of 2"}
    assert (tmp_path / "plan.json").read_bytes() == found.files["plan"].read_bytes()


def test_the_atlas_shows_every_head_and_exports_plans_that_load(
    pipe: Any, found: SearchResult, tmp_path: Path
) -> None:
    got = atlas(
        pipe, PROMPTS, plan=found.plan, methods=["gna", "sparse_vdit"], budget=BUDGET, **SIZE
    )
    assert [c["choice"] for c in got["cells"]] == [c["choice"] for c in found.atlas["cells"]]
    page = atlas_page(got)
    assert "http" not in page
    assert 'id="export"' in page
    assert {c["class"] for c in got["cells"]} <= {
        "local", "diagonal", "stripe", "frame", "row", "column", "sink", "spread",
    }  # fmt: skip
    assert choice_of(None, _table(pipe), ()).sum() == 0
    with pytest.raises(PlanError, match="no candidate"):
        atlas(pipe, PROMPTS, plan=found.plan, methods=["gna"], budget=BUDGET, **SIZE)


def _table(pipe: Any) -> Any:
    from dittools.searching.measure import Bench, sites_for
    from dittools.searching.run import prepare
    from dittools.searching.table import merge

    request = make_request(pipe, PROMPTS, target_density=0.5, **GIVEN)
    facts, candidates = prepare(pipe, request)
    sites = sites_for(facts, request.ranges, 8, 1, 0)
    results = Bench(pipe, Store(None), "cpu").calibrate(
        request.calibration, sites, candidates, facts, None
    )
    return merge(results, candidates, sites)


def test_the_frontier_can_be_watched_while_it_grows(pipe: Any, found: SearchResult) -> None:
    told: list[tuple[str, int, int]] = []
    seen: list[tuple[str, Any]] = []
    again = dittools.search(
        pipe,
        PROMPTS,
        target_density=0.5,
        progress=lambda *step: told.append(step),
        watch=lambda name, value: seen.append((name, value)),
        **GIVEN,
    )
    assert [name for name, _ in seen[:2]] == ["curve", "singles"]
    assert seen[0][1] == again.frontier["predicted"]
    trials = [value for name, value in seen if name == "trial"]
    assert trials == again.frontier["trials"]
    assert all(single["held_out"] is None for single in seen[1][1])
    phases = list(dict.fromkeys(what for what, _, _ in told))
    assert all(next(t for t in told if t[0] == phase)[1] == 0 for phase in phases)
