"""Damaged files through every loader: an answer or one readable error, inside the folder.

`bench/fuzz_plans.py` does the same to 100,000 plans, `make fuzz` lets coverage lead the damage.
"""

import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dittools import system
from dittools.errors import DitToolsError

BENCH = Path(__file__).parents[1] / "bench"
PROFILE: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
}
SLOW = {"run": 20, "video": 40, "frontier": 60}  # examples; a page is drawn, a film decoded
FORGIVING = ("options", "unit", "record")  # damage is text, or work to do again
NAMES = (
    *("plan", "upload", "tables", "prompts", "suite", "index", "results", "votes", "run", "atlas"),
    *("frontier", "unit", "record", "tuning", "costs", "config", "weights", "image", "video"),
    "options",
)


@pytest.fixture(scope="module")
def tools() -> Iterator[tuple[ModuleType, ModuleType, ModuleType]]:
    """The modules hostile, fuzz_plans and loaders of the bench folder."""
    sys.path.insert(0, str(BENCH))
    import fuzz_plans
    import hostile
    import loaders

    yield hostile, fuzz_plans, loaders
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def guard(tools: tuple[ModuleType, ...]) -> Any:
    return tools[0].Guard()


def test_every_loader_has_its_row(tools: tuple[ModuleType, ...]) -> None:
    assert set(NAMES) == set(tools[2].LOADERS)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_end_in_an_answer_or_one_readable_error(
    tools: tuple[ModuleType, ...], guard: Any, name: str
) -> None:
    hostile, fuzz_plans, loaders = tools
    loader = loaders.LOADERS[name]
    files, outcomes = loader.files(), set()
    with tempfile.TemporaryDirectory() as inside, tempfile.TemporaryDirectory() as elsewhere:
        folder, outside = Path(inside), Path(elsewhere) / "secret"
        outside.write_bytes(b"not yours")
        hostile.lay_out(fuzz_plans.Steady(), folder, files, outside)
        loader.load(folder)  # whole files are read, and late imports are done
        before = system.peak_memory() if system.reset_peak_memory() else None

        @settings(max_examples=SLOW.get(name, 80), **PROFILE)
        @given(st.randoms(use_true_random=False))
        def damaged(draw: random.Random) -> None:
            hostile.lay_out(draw, folder, hostile.damage(draw, files), outside)
            try:
                with guard.watching(folder):
                    loader.load(folder)
                outcomes.add("answer")
            except DitToolsError as error:
                outcomes.add(type(error).__name__)

        damaged()
        after = system.peak_memory()
        assert outside.read_bytes() == b"not yours"
    assert len(outcomes) > 1 or name in FORGIVING, outcomes
    if before is not None and after is not None:
        assert after - before < 300_000_000


def test_a_thousand_plans_are_run_and_none_escapes(tools: tuple[ModuleType, ...]) -> None:
    result = tools[1].fuzz(1000, 7)
    assert result["escapes"] == 0, result["examples"]
    assert result["accepted"] > 50
    assert sum(result["refused"].values()) + result["accepted"] == 1000


def test_the_guard_sees_what_it_is_there_for(
    tools: tuple[ModuleType, ...], guard: Any, tmp_path: Path
) -> None:
    folder, escape = tmp_path / "in", tools[0].Escape
    folder.mkdir()
    (folder / "a").write_text("x")
    (tmp_path / "b").write_text("x")
    with guard.watching(folder):
        (folder / "a").read_text()

    def many_lines() -> None:
        error = DitToolsError("x")
        error.args = ("two\nlines",)
        raise error

    for bad, word in (
        (lambda: (tmp_path / "b").read_text(), "opened"),
        (lambda: (tmp_path / "c.py").write_text("x"), "opened"),
        (lambda: [][0], "IndexError"),
        (lambda: sys.setrecursionlimit(-1), "ValueError"),
        (many_lines, "characters"),
    ):
        with pytest.raises(escape, match=word), guard.watching(folder):
            bad()  # type: ignore[no-untyped-call]
    with pytest.raises(DitToolsError), guard.watching(folder):
        raise DitToolsError("one line")
