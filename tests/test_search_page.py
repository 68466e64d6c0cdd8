"""The atlas page in a browser: a click shows candidates and errors, edits export as a plan."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dittools
from dittools.pipelines import load
from dittools.plans import Plan
from dittools.searching import Budget
from dittools.searching.inspect import atlas, atlas_page

SIZE: dict[str, Any] = {"steps": 4, "frames": 9, "height": 32, "width": 48}
PROMPTS = ["a red circle", "a blue square"]
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load("tiny/wan")


@pytest.fixture(scope="module")
def found(pipe: Any) -> dict[str, Any]:
    return atlas(pipe, PROMPTS, methods=["gna"], budget=Budget(1, 1, 18, 1, 1, 1, 0), **SIZE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as driver:
        shown = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield shown
        shown.close()


def _open(browser: Any, found: dict[str, Any], tmp_path: Path) -> Any:
    path = tmp_path / "atlas.html"
    path.write_text(atlas_page(found))
    page = browser.new_page(accept_downloads=True)
    page.goto(f"file://{path}")
    return page


def _export(page: Any, tmp_path: Path) -> Plan:
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "edited.json")
    return Plan.load(tmp_path / "edited.json")


def test_a_click_shows_errors_and_an_edited_choice_is_exported(
    browser: Any, pipe: Any, found: dict[str, Any], tmp_path: Path
) -> None:
    page = _open(browser, found, tmp_path)
    assert page.inner_text("#density") == "1.000"
    page.click("button[title^='layer 1, head 0']")
    rows = page.locator("#side tr")
    assert rows.count() == 1 + len(found["candidates"])
    cell = next(c for c in found["cells"] if (c["layer"], c["range"], c["head"]) == (1, 0, 0))
    best = min((e, n) for n, e in enumerate(cell["error"]) if n and e is not None)
    assert found["candidates"][best[1]]["name"] in rows.nth(2).inner_text()  # below dense
    assert f"{best[0]:.4f}" in rows.nth(2).inner_text()
    rows.nth(2).locator("button").click()
    assert float(page.inner_text("#density")) < 1
    plan = _export(page, tmp_path)
    assert len(plan.rules) == 1
    assert (plan.rules[0].layers, plan.rules[0].heads) == ((1,), (0,))
    assert plan.rules[0].steps == pytest.approx((0, found["ranges"][1]))
    with dittools.attach(pipe, plan, backend="cpu") as handle:
        assert handle.plan.rules[0].method.name == "gna"


def test_choices_of_single_branches_stay_apart_until_they_are_edited(
    browser: Any, found: dict[str, Any], tmp_path: Path
) -> None:
    cells = [dict(c) for c in found["cells"]]
    cells[0] |= {"choice": 1, "choices": [1, 0]}
    page = _open(browser, {**found, "cells": cells}, tmp_path)
    rules = _export(page, tmp_path).rules
    assert [(r.branch, r.layers, r.heads) for r in rules] == [("cond", (0,), (0,))]
    page.click("button[title^='layer 0, head 0']")
    page.locator("#side tr", has_text=found["candidates"][2]["name"]).locator("button").click()
    assert [r.branch for r in _export(page, tmp_path).rules] == ["all"]


def test_a_long_list_of_candidates_leaves_room_for_the_heads(
    browser: Any, found: dict[str, Any], tmp_path: Path
) -> None:
    page = _open(browser, found, tmp_path)
    page.set_viewport_size({"width": 1200, "height": 600})
    page.click("button[title^='layer 1, head 0']")
    assert page.locator("#side table").bounding_box()["height"] > 600
    assert (
        page.locator("#side").bounding_box()["height"] <= 320
    )  # half of the window and its padding
    page.locator("#heads").scroll_into_view_if_needed()
    assert page.locator("#heads").bounding_box()["y"] < 600
