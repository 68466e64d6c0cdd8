"""Atlas, search, compare and benchmark end to end in the browser. `make test-app` runs this."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import chromium, open_page, shot, studio, tab

from dittools.methods import build
from dittools.pipelines.output import write_clip
from dittools.plans import Plan
from dittools.studio.runs import RunStore

pytestmark = pytest.mark.browser

ATTACK = "a red circle <img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("runs")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    with studio(runs) as found:
        yield found


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    found = open_page(browser, address)
    yield found
    assert found.evaluate("window.hacked") is None
    found.close()


def small(page: Any, name: str, **more: int) -> None:
    """Ask for a size that takes a moment."""
    page.locator(f"#{name}-size").get_by_role("button").first.click()
    sizes = {"steps": 2, "frames": 4, "height": 48, "width": 48, **more}
    for key, value in sizes.items():
        field = page.locator(f"#{name}-{key} input")
        field.fill(str(value))
        field.blur()


def only(page: Any, name: str, method: str) -> None:
    """Leave one method chosen."""
    boxes = page.locator(f"#{name}-methods input[type=checkbox]")
    for number in range(boxes.count()):
        box = boxes.nth(number)
        box.set_checked(box.get_attribute("name") == method)


def text_of(page: Any, where: str) -> str:
    return str(page.locator(where).inner_text())


def fits(page: Any, name: str) -> None:
    """Nothing but tables scrolls sideways on a telephone; a picture is kept for people."""
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(300)
    shot(page, f"{name}-390")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1280, "height": 900})


def test_editing_a_head_changes_the_plan(page: Any, runs: Path, tmp_path: Path) -> None:
    tab(page, "Atlas")
    assert "No atlas is open" in text_of(page, "#atlas-empty")
    only(page, "atlas", "gna")
    small(page, "atlas")
    page.locator("#atlas-prompt :is(input, textarea)").fill(ATTACK)
    page.locator("#atlas-start").click()
    page.locator("#atlas-grid button").first.wait_for()
    assert text_of(page, "#atlas-density") == "1.000"
    page.locator('#atlas-grid [data-layer="2"][data-head="0"]').click()
    page.locator("#atlas-head h3", has_text="Layer 2, head 0").wait_for()
    page.keyboard.press("ArrowRight")  # a keyboard reaches every head
    page.keyboard.press("Enter")
    page.locator("#atlas-head h3", has_text="Layer 2, head 1").wait_for()
    page.locator("#atlas-head button[data-candidate]").first.click()
    page.locator('#atlas-grid [data-layer="2"][data-head="1"].dt-edited').wait_for()
    assert float(text_of(page, "#atlas-density")) < 1
    page.get_by_text("The plan as a file").click()
    assert '"method": "gna"' in text_of(page, "#atlas-summary pre")
    page.get_by_text("The plan as a file").click()
    shot(page, "atlas-1280")
    with page.expect_download() as waiting:
        page.locator("#atlas-download").click()
    waiting.value.save_as(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert [(rule.layers, rule.heads, rule.method.name) for rule in plan.rules] == [
        ((2,), (1,), "gna")
    ]
    page.get_by_label("the whole layer").check()
    page.locator("#atlas-head button[data-candidate]").nth(2).click()
    page.locator('#atlas-grid [data-layer="2"][data-head="2"].dt-edited').wait_for()
    page.locator("#atlas-use").click()
    page.locator("#atlas-said", has_text="next generation").wait_for()
    (offered,) = (runs / "plans").glob("*/plan.json")
    assert {rule.heads for rule in Plan.load(offered).rules} == {"all"}
    fits(page, "atlas")
    page.locator("#atlas-undo").click()
    page.wait_for_function("document.querySelector('#atlas-density').innerText === '1.000'")
    tab(page, "Generate")
    assert page.get_by_label("A plan").is_checked()


def test_another_page_does_not_see_the_edits(browser: Any, address: str, runs: Path) -> None:
    assert any(run.kind == "atlas" for run in RunStore(runs).entries())
    page = open_page(browser, address)
    tab(page, "Atlas")
    assert "No atlas is open" in text_of(page, "#atlas-empty")
    page.locator("#atlas-saved input").click()
    page.get_by_role("option").first.click()
    page.locator("#atlas-grid button").first.wait_for()
    assert page.locator("#atlas-grid .dt-edited").count() == 0
    assert page.evaluate("window.hacked") is None
    page.close()


def test_a_search_stops_goes_on_and_gives_its_plan(page: Any, runs: Path, tmp_path: Path) -> None:
    tab(page, "Search")
    only(page, "search", "gna")
    small(page, "search")
    page.locator("#search-prompts textarea").fill("a red circle\na blue square")
    page.locator("#search-value input").fill("2")
    page.locator("#search-start").click()
    page.locator("#search-status .dt-alert", has_text="density is not usable").wait_for()
    page.locator("#search-value input").fill("0.8")
    page.locator("#search-value input").blur()
    page.locator("#search-start").click()
    page.locator("#search-empty", has_text="generations, about").wait_for()
    page.locator("#search-status", has_text="left").wait_for()
    page.locator("#search-stop").click()
    page.locator("#search-status", has_text="Stopped").wait_for()
    assert not [run for run in RunStore(runs).entries() if run.kind == "search"]
    page.locator("#search-start").click()
    page.locator("#search-plot .js-plotly-plot").wait_for()
    page.locator("#search-outcome .dt-notice", has_text="held-out").wait_for()
    page.locator("#search-plan:not([disabled])").wait_for()
    for name in ("plan", "report"):
        with page.expect_download() as waiting:
            page.locator(f"#search-{name}").click()
        waiting.value.save_as(tmp_path / waiting.value.suggested_filename)
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.provenance["target"] == {"density": 0.8}
    assert "Head atlas" in (tmp_path / "report.html").read_text()
    shot(page, "search-1280")
    fits(page, "search")
    page.locator("#search-use").click()
    page.locator("#search-said", has_text="next generation").wait_for()


def _finished(runs: RunStore, method: str, seed: int) -> None:
    """Put a finished generation into the history."""
    folder, rng = runs.begin(), np.random.default_rng(seed)
    dense = rng.random((4, 16, 16, 3), dtype=np.float32)
    clips = {"dense": dense, "accelerated": (dense + 0.1 * len(method)) % 1}
    files = {name: write_clip(folder / f"{name}.mp4", clip, 8) for name, clip in clips.items()}
    settings = {"prompt": ATTACK, "seed": seed, "steps": 2}
    times = {"seconds": 1.0, "attention_seconds": 0.5, "all_seconds": [1.0]}
    report = {
        "model": "demo",
        "method": method,
        "settings": settings,
        "created": "",
        "environment": {},
        "dense": times,
        "accelerated": times,
        "floors": {},
        "attention_share": 0.5,
        "speedup_bound": 2.0,
        "density": 0.4,
        "prompt_score": None,
        "fidelity": {"psnr_db": 20.0, "ssim": 0.5, "ms_ssim": None, "frame_psnr_db": [20.0]},
    }
    files["report"] = folder / "report.json"
    files["report"].write_text(json.dumps(report))
    files["plan"] = Plan.of(build(method)).save(folder / "plan.json")
    runs.finish(folder, "generate", ATTACK, {"method": method, "settings": settings}, files)


def test_a_blind_vote_is_stored_and_ends_with_an_interval(
    page: Any, runs: Path, tmp_path: Path
) -> None:
    tab(page, "Compare")
    assert "nothing to vote on" in text_of(page, "#vote-ballot")
    for method in ("gna", "radial"):
        for seed in (0, 1):
            _finished(RunStore(runs), method, seed)
    tab(page, "Generate")
    tab(page, "Compare")
    page.locator("#vote-ballot", has_text="press Start").wait_for()
    page.locator("#vote-start").click()
    page.locator(".dt-ballot video").nth(2).wait_for()
    page.wait_for_function(
        "[...document.querySelectorAll('.dt-ballot video')].every((v) => v.readyState > 1)"
    )
    shown = page.locator("#vote-ballot").inner_html()
    for secret in ("gna", "radial", "dense", "accelerated", "red circle"):
        assert secret not in shown.lower()
    shot(page, "vote-1280")
    fits(page, "vote")
    assert text_of(page, "#vote-outcome").strip() == ""
    page.locator("#vote-a").click()
    page.locator("#vote-ballot", has_text="Pair 2 of 2").wait_for()
    page.locator("#vote-same").click()
    page.locator("#vote-outcome .dt-interval").wait_for()
    words = text_of(page, "#vote-outcome")
    assert "of 1 decided votes" in words
    assert "95% interval" in words
    (kept,) = (runs / "votes").glob("*.json")
    votes = sorted(json.loads(kept.read_text())["votes"].values())
    assert votes in (["first", "same"], ["same", "second"])
    assert list((runs / "ballots").iterdir()) == []
    page.get_by_text("Comparison report of several runs").click()
    page.locator("#compare-runs input").click()
    for seed in (0, 1):
        page.get_by_role("option", name=f"gna, seed {seed}").click()
    page.locator("#compare-make").click()
    with page.expect_download() as waiting:
        page.locator("#compare-file").click()
    waiting.value.save_as(tmp_path / "comparison.html")
    report = (tmp_path / "comparison.html").read_text()
    assert "other seed: " in report
    assert "<img src=x" not in report


def test_a_benchmark_shows_its_table_and_exports_it(page: Any, tmp_path: Path) -> None:
    tab(page, "Benchmark")
    only(page, "bench", "none")
    page.locator("#bench-start").click()
    page.locator("#bench-status .dt-alert", has_text="choose a method").wait_for()
    only(page, "bench", "gna")
    small(page, "bench")
    for name, value in (("repeats", "1"), ("warm-up", "0")):
        page.locator(f"#bench-{name} input").fill(value)
        page.locator(f"#bench-{name} input").blur()
    page.locator("#bench-start").click()
    page.locator("#bench-table table").wait_for()
    page.locator("#bench-parts .js-plotly-plot").wait_for()
    rows = text_of(page, "#bench-table")
    for word in ("dense", "gna", "attention", "speed-up", "peak MiB"):
        assert word in rows
    with page.expect_download() as waiting:
        page.locator("#bench-csv").click()
    waiting.value.save_as(tmp_path / "latency.csv")
    found = list(csv.DictReader((tmp_path / "latency.csv").open()))
    assert [row["case"] for row in found] == ["dense", "gna"]
    assert f"{float(found[1]['attention_ms_median']):.1f}" in rows
    with page.expect_download() as waiting:
        page.locator("#bench-json").click()
    waiting.value.save_as(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["format"] == "dittools-bench"
    shot(page, "bench-1280")
    fits(page, "bench")


def test_the_dark_page_is_dark(browser: Any, address: str) -> None:
    page = open_page(browser, address + "?__theme=dark", color_scheme="dark")
    for name in ("Atlas", "Search", "Compare", "Benchmark"):
        tab(page, name)
        page.wait_for_timeout(200)
        shot(page, f"{name.lower()}-dark")
    red, green, blue = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
    )
    assert max(red, green, blue) < 80
    page.close()
