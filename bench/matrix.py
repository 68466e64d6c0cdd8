"""The compatibility matrix as tables, from what marked tests recorded in docs/results.

`make matrix` runs those tests and writes the record; `bench/readme.py` puts the tables into the
README.
"""

import json
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parents[1] / "docs" / "results" / "compatibility.json"
MANY = 10  # families; a feature tested on that many is a column of the first table
WORDS = {"pass": "yes", "fail": "FAILS", "skip": "not tested"}

Cells = dict[str, dict[str, dict[str, Any]]]  # family -> feature -> status, note, tests


def load(path: Path = RECORD) -> dict[str, Any]:
    """Return the record: versions, and cells by family and feature."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def tables(record: dict[str, Any]) -> str:
    """Return both tables in Markdown, with the notes below them."""
    cells: Cells = record["cells"]
    notes: list[str] = []
    features = sorted({feature for found in cells.values() for feature in found})
    wide = [f for f in features if sum(f in found for found in cells.values()) >= MANY]
    narrow = [f for f in features if f not in wide]
    families = [family for family in cells if set(wide) & set(cells[family])]
    first = _table(
        ["family", *wide],
        [[family, *(_cell(cells[family].get(f), notes) for f in wide)] for family in families],
    )
    columns = [family for family in cells if set(narrow) & set(cells[family])]
    second = _table(
        ["feature", *columns],
        [[f, *(_cell(cells[family].get(f), notes) for family in columns)] for f in narrow],
    )
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    listed = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1))
    head = (
        "Each entry is a test on the CPU with a toy pipeline of the real diffusers classes; empty "
        f"is not tested. {versions}."
    )
    return "\n\n".join(part for part in (head, first, second, listed) if part)


def _cell(found: dict[str, Any] | None, notes: list[str]) -> str:
    if found is None:
        return ""
    note = found.get("note", "")
    word = "refused" if note.startswith("refused") else WORDS[found["status"]]
    if not note:
        return word
    if note not in notes:
        notes.append(note)
    return f"{word} [{notes.index(note) + 1}]"


def _table(headings: list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body]) if body else ""
