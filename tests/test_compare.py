"""Staged comparisons: what is handed over while a comparison still runs."""

from typing import Any

import pytest

import dittools
from dittools.metrics.fidelity import db_words
from dittools.pipelines.compare import Comparison, run_comparison
from dittools.pipelines.generate import Settings
from dittools.pipelines.report_attention import attention
from dittools.pipelines.report_html import page, rows
from dittools.pipelines.session import write_comparison

SETTINGS = Settings("a red circle", steps=2, frames=2, height=32, width=32, guidance=1.0)


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = dittools.pipelines.load("demo")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_clips_and_numbers_come_before_the_floors(pipe: Any) -> None:
    order: list[str] = []
    early: list[Comparison] = []

    def compared(found: Comparison) -> None:
        order.append("compared")
        early.append(found)

    whole = run_comparison(
        pipe,
        SETTINGS,
        "gna",
        model="demo",
        repeats=2,
        step=lambda what, done, total: order.append(what) if what in FLOORS else None,
        made=lambda name, run: order.append(name),
        compared=compared,
    )
    assert order[:3] == ["dense", "accelerated", "compared"]
    assert set(order[3:]) == set(FLOORS)
    assert early[0].to_dict()["floors"] == {}
    assert set(whole.to_dict()["floors"]) == {"other_seed", "random_blocks"}
    assert early[0].to_dict()["fidelity"] == whole.to_dict()["fidelity"]


FLOORS = ("other seed", "random blocks")


def test_without_floors_the_report_and_its_page_leave_them_out(pipe: Any, tmp_path: Any) -> None:
    found = run_comparison(pipe, SETTINGS, "gna", model="demo", repeats=1, floors=False)
    report = found.to_dict()
    assert [row[0] for row in rows(report)] == ["dense", "gna"]
    assert "another seed" not in page(report, {}).partition("Attention")[0].partition("<svg")[2]
    result = write_comparison(found, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in result.files.values()}


INCIDENT = {
    "layer": 3,
    "site": "transformer.blocks.3.attn1",
    "heads": [1, 2],
    "step": 5,
    "branch": "cond",
    "reason": "non-finite <output>",
    "outcome": "dense for the rest of the run",
    "error": None,
}


def attached(**more: Any) -> dict[str, Any]:
    sites = [f"transformer.blocks.{n}.attn1" for n in range(4)]
    layer = {"sparse": 7, "dense": 1, "density": 0.25}
    return {
        "method": "metered",
        "fallbacks": {"no grid": 9},
        "fallback_sites": {"no grid": sites},
        "layers": [
            {"site": sites[0], **layer, "error": 0.125},
            {"site": sites[1], **layer, "error": None},
        ],
        "errors": {sites[0]: {"0": 0.5, "10": 0.0625}, sites[1]: {"10": 0.03125}},
        "incidents": [INCIDENT] * 9,
        "incidents_left_out": 2,
        **more,
    }


def test_the_page_tells_the_error_by_site_and_step_and_every_incident() -> None:
    html = attention(attached())
    assert "<td>transformer.blocks.0.attn1</td><td>7</td><td>1</td><td>0.25</td><td>0.125</td>" in (
        html
    )
    by_step = html.partition("Error by step")[2]
    assert "<th>site</th><th>0</th><th>10</th>" in by_step  # by number, not as text
    assert by_step.index("60%") < by_step.index("0.500") < by_step.index("0.062")
    assert by_step.count("<td></td>") == 1  # the second site was not sampled at step 0
    named = html.partition("9 calls: no grid (")[2].partition(")")[0]
    assert named == ", ".join(f"transformer.blocks.{n}.attn1" for n in range(3)) + " ..."
    assert html.count("heads 1, 2, step 5, branch cond, reason non-finite &lt;output&gt;") == 8
    assert "<dd>3 more</dd>" in html


def test_reports_written_before_there_was_a_recorder_still_show() -> None:
    old = attached(fallbacks={}, layers=[{"site": "a", "sparse": 1, "dense": 0, "density": 1.0}])
    for name in ("errors", "incidents", "incidents_left_out"):
        del old[name]
    html = attention(old)
    assert "Error by step" not in html
    assert "Incident" not in html
    assert "<td>a</td><td>1</td><td>0</td><td>1</td><td></td>" in html


@pytest.mark.parametrize(("psnr_db", "words"), [(120.0, "identical"), (41.26, "41.3 dB")])
def test_a_psnr_at_its_cap_is_told_as_identical(psnr_db: float, words: str) -> None:
    assert db_words(psnr_db) == words
