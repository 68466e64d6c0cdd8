"""Staged comparisons: what is handed over while a comparison still runs."""

from typing import Any

import pytest

import dittools
from dittools.pipelines.compare import Comparison, run_comparison
from dittools.pipelines.generate import Settings
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
