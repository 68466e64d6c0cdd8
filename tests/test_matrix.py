"""The compatibility matrix names what tests produce, all of it and nothing else."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
MARK = "mark.cell("


def matrix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "bench" / "matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def marked_files() -> list[Path]:
    here = Path(__file__).parent
    files = [path for path in here.glob("test_*.py") if path != Path(__file__)]
    return sorted(path for path in files if MARK in path.read_text())


@pytest.fixture(scope="module")
def produced(
    request: pytest.FixtureRequest, collected_cells: set[tuple[str, str]]
) -> set[tuple[str, str]]:
    """Cells of all marked tests: of this run when it has collected them, else collected anew."""
    if set(marked_files()) <= {item.path for item in request.session.items}:
        return collected_cells
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", "--cells", *map(str, marked_files())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.split("\t") for line in done.stdout.splitlines() if line.startswith("cell\t")]
    return {(family, feature) for _, family, feature in lines}


def test_the_record_names_exactly_the_cells_that_tests_produce(
    produced: set[tuple[str, str]],
) -> None:
    cells = matrix().load()["cells"]
    named = {(family, feature) for family, found in cells.items() for feature in found}
    assert named - produced == set(), "stale: no test produces these; run make matrix"
    assert produced - named == set(), "missing from the record; run make matrix"


def test_every_entry_names_tests_that_exist_and_none_fails() -> None:
    source = {path.name: path.read_text() for path in marked_files()}
    for family, found in matrix().load()["cells"].items():
        for feature, cell in found.items():
            assert cell["status"] in ("pass", "skip"), (family, feature)
            assert cell["status"] == "pass" or cell["note"], (family, feature)
            for test in cell.get("tests", ()):
                file, function = test.split("::")
                assert f"def {function}(" in source[file], test


def test_the_tables_show_every_cell_with_its_note() -> None:
    record = {
        "versions": {"torch": "2"},
        "cells": {
            **{f"family{i}": {"wide": {"status": "pass"}} for i in range(10)},
            "family3": {
                "wide": {"status": "pass", "note": "refused: it is linear"},
                "narrow": {"status": "skip", "note": "no such thing"},
                "other": {"status": "fail"},
            },
        },
    }
    text = matrix().tables(record)
    assert "| family | wide |" in text
    assert "| family0 | yes |" in text
    assert "| family3 | refused [1] |" in text
    assert "| feature | family3 |" in text
    assert "| narrow | not tested [2] |" in text
    assert "| other | FAILS |" in text
    assert "1. refused: it is linear\n2. no such thing" in text
