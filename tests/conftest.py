"""Settings every test shares, and the record of which feature works on which model family.

A test marked `cell(feature)` is one entry of the compatibility matrix; its family is the argument
`family`, or the parameter `name`. `--matrix FILE` writes what the marked tests of a run found over
what the file says of the same cells.
"""

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import pytest
import torch

LEFT_OUT = "too slow for every run: `make matrix`"
CELLS: pytest.StashKey[set[tuple[str, str]]] = pytest.StashKey()
FOUND: pytest.StashKey[dict[tuple[str, str], "Cell"]] = pytest.StashKey()


class Cell(NamedTuple):
    """What the tests of one feature on one family found.

    Attributes:
        status: "fail" when one failed, else "pass" when one passed, else "skip".
        note: why it was skipped, or what a passing test says about the limits.
        tests: names of the tests.
    """

    status: str
    note: str
    tests: list[str]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", type=Path, metavar="FILE", help="write the compatibility matrix")
    parser.addoption("--cells", action="store_true", help="list the cells of the collected tests")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOUND] = {}
    if config.getoption("--matrix") and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("--matrix needs a run in one process: -n 0")


def cells_of(item: pytest.Item) -> list[tuple[str, str, str]]:
    """Return (family, feature, note) of every cell a test stands for."""
    params: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    words = {name: str(value) for name, value in params.items()}
    found = []
    for mark in item.iter_markers("cell"):
        (feature,) = mark.args
        family = mark.kwargs.get("family") or words["name"]
        found.append((family, feature.format(**words), mark.kwargs.get("note", "")))
    return found


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[CELLS] = {cell[:2] for item in items for cell in cells_of(item)}


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("--cells"):
        for family, feature in sorted(session.config.stash[CELLS]):
            print(f"cell\t{family}\t{feature}")


@pytest.fixture(scope="session")
def collected_cells(pytestconfig: pytest.Config) -> set[tuple[str, str]]:
    """(family, feature) of every marked test that was collected, deselected ones too."""
    return pytestconfig.stash[CELLS]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        for family, feature, note in cells_of(item):
            _note(item, family, feature, note, report)
    return report


def _note(
    item: pytest.Item, family: str, feature: str, note: str, report: pytest.TestReport
) -> None:
    found = item.config.stash[FOUND]
    status = {"passed": "pass", "failed": "fail", "skipped": "skip"}[report.outcome]
    if report.skipped and isinstance(report.longrepr, tuple):
        note = report.longrepr[2].removeprefix("Skipped: ")
    test = f"{item.path.name}::{item.name.split('[')[0]}"
    old = found.get((family, feature), Cell(status, note, []))
    ranks = ["skip", "pass", "fail"]
    worst = max(old.status, status, key=ranks.index)
    notes = [n for n, s in ((old.note, old.status), (note, status)) if s == worst and n]
    tests = sorted({*old.tests, test})
    found[family, feature] = Cell(worst, notes[0] if notes else "", tests)


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = session.config.getoption("--matrix")
    if target is None:
        return
    cells: dict[str, dict[str, Any]] = {}
    if target.exists():
        cells = json.loads(target.read_text())["cells"]
    for (family, feature), cell in sorted(session.config.stash[FOUND].items()):
        entry = {"status": cell.status, "note": cell.note, "tests": cell.tests}
        cells.setdefault(family, {})[feature] = {k: v for k, v in entry.items() if v}
    for family, feature in session.config.stash[CELLS]:  # deselected in this run
        cells.setdefault(family, {}).setdefault(feature, {"status": "skip", "note": LEFT_OUT})
    cells = {family: dict(sorted(cells[family].items())) for family in sorted(cells)}
    versions = {name: _version(name) for name in ("torch", "diffusers", "transformers")}
    target.write_text(json.dumps({"versions": versions, "cells": cells}, indent=1) + "\n")


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package).split("+")[0]
