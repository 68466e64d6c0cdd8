"""The scoreboard: densities are met, rows carry revisions, runs merge, the page adds up."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dittools.methods import build
from dittools.pipelines.generate import Settings
from dittools.searching.ladders import Ladder, ladders_for

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType, ModuleType]:
    """The modules scoreboard, board_rows and board_page, as `python bench/scoreboard.py` sees."""
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("scoreboard", "board_rows", "board_page"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import board_page
    import board_rows
    import scoreboard

    return scoreboard, board_rows, board_page


class Judge:
    """Answers with a density that follows from the parameters, and counts questions."""

    def __init__(self, floor: float = 0.0) -> None:
        self.floor, self.asked = floor, 0

    def numbers(self, plan: Any, settings: Any) -> dict[str, float]:
        self.asked += 1
        density = plan.rules[0].method.density
        return {"density": max(self.floor, 0.08 + 0.8 * density**1.4), "psnr_db": 20.0}


def _ladder() -> Ladder:
    return Ladder("sparge", "", lambda d: build("sparge", {"density": round(d, 4)}))


@pytest.mark.parametrize("density", [0.2, 0.3, 0.4, 0.5])
def test_a_method_is_set_until_its_density_is_met(
    scripts: tuple[ModuleType, ...], density: float
) -> None:
    judge = Judge()
    _, found = scripts[1].matched(judge, _ladder(), density, Settings("x"), 0.0)
    assert found == pytest.approx(density, abs=scripts[1].CLOSE)
    assert judge.asked <= 5


def test_the_nearest_density_is_taken_where_none_fits(scripts: tuple[ModuleType, ...]) -> None:
    judge = Judge(floor=0.6)
    _, found = scripts[1].matched(judge, _ladder(), 0.3, Settings("x"), 0.0)
    assert found == pytest.approx(0.6, abs=0.01)
    assert judge.asked <= 5


def test_fixed_ladders_meet_densities_without_a_run(scripts: tuple[ModuleType, ...]) -> None:
    grid = scripts[1].DEMO_GRID
    for name in ("gna", "sta", "clear", "sparse_vdit"):
        for ladder in ladders_for(name, grid):
            if ladder.fixed:
                method: Any = ladder.make(0.5)
                assert abs(method.mask(grid).density - 0.5) < 0.04, (name, ladder.label)


def test_the_board_is_not_the_calibration(scripts: tuple[ModuleType, ...]) -> None:
    board = {s.prompt for s in scripts[0].settings_of(16)}
    assert len(board) == 16
    assert not board & {s.prompt for s in scripts[0].calibration_settings()}
    assert {s.prompt for s in scripts[0].settings_of(4)} <= board


def _line(name: str, psnr: float, kind: str = "method", density: float = 0.4) -> dict[str, Any]:
    return {
        "name": name, "kind": kind, "detail": "", "params": {}, "prompts": 16, "psnr_db": psnr,
        "ssim": 0.9, "density": density, "computed": density, "attention_s": 1.0, "whole_s": 4.0,
        "prompt": 1.0, "details": 1.0, "psnr_db_each": [psnr], "revisions": ["abc"],
    }  # fmt: skip


def test_runs_merge_and_shares_of_the_gap_are_made_anew(
    scripts: tuple[ModuleType, ...], tmp_path: Path
) -> None:
    other = tmp_path / "other.json"
    lines = [_line("random", 20.0, "floor"), _line("paro", 99.0), _line("oracle", 30.0, "ceiling")]
    other.write_text(json.dumps({"densities": {"0.4": lines}}))
    content: dict[str, Any] = {"densities": {"0.4": [_line("paro", 28.0)]}}
    scripts[0].merge(content, [other])
    found = {line["name"]: line for line in content["densities"]["0.4"]}
    assert found["paro"]["psnr_db"] == 28.0
    assert found["paro"]["gap_closed"] == pytest.approx(0.8)


def test_the_page_marks_what_does_not_compare(
    scripts: tuple[ModuleType, ...], tmp_path: Path
) -> None:
    lines = [
        _line("random", 20.0, "floor"),
        _line("radial", 35.0, density=0.5),
        _line("paro", 28.0),
        {**_line("psa", 29.0), "prompts": 3},
        _line("searched plan", 31.0, "searched"),
    ]
    content = {"grid": [12, 12, 12], "steps": 12, "prompts": [], "densities": {"0.4": lines}}
    text = scripts[2].page(content)
    rows = [line for line in text.splitlines() if " dB |" not in line and line.count("|") == 9]
    order = [row.split("|")[1].strip() for row in rows[1:]]
    assert order == [
        "**searched plan**", "psa (3 prompts)", "paro", "random", "radial (not matched)",
    ]  # fmt: skip
    assert "3 to 16 held-out prompts" in text
    scripts[2].plot(content, tmp_path / "board.png")
    assert (tmp_path / "board.png").read_bytes()[:4] == b"\x89PNG"


def test_code_counts_and_comments_do_not(scripts: tuple[ModuleType, ...]) -> None:
    digest = scripts[1].source_digest
    paro, psa = build("paro"), build("psa")
    assert digest([paro]) == digest([build("paro", {"density": 0.2})])
    assert digest([paro]) != digest([psa])
    module = ModuleType("m")
    texts = iter(["x = 1  # one\n", "x = 1\n", "x = 2\n"])
    plain = scripts[1]._plain_source
    original = scripts[1].inspect.getsource
    try:
        scripts[1].inspect.getsource = lambda _: next(texts)
        one, two, three = plain(module), plain(module), plain(module)
    finally:
        scripts[1].inspect.getsource = original
    assert one == two != three
