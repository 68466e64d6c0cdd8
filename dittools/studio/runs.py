"""The history: one folder per run, and a run.json in it once the run is whole."""

import json
import re
import secrets
import shutil
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dittools.errors import InputError
from dittools.pipelines.output import write_text
from dittools.reading import digest, is_plain_name, read_json

FORMAT = "dittools-run"
VERSION = 1
_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        id: name of its folder.
        kind: "generate", "atlas", "search", "vote" or "bench".
        title: one line for people, e.g. the prompt.
        created: UTC, ISO 8601.
        facts: what the tab that made it needs to show it again, JSON types.
        files: name -> file name inside the folder.
        folder: where it lies.
    """

    id: str
    kind: str
    title: str
    created: str
    facts: dict[str, Any]
    files: dict[str, str]
    folder: Path
    digests: dict[str, str] = field(default_factory=dict, repr=False)

    def path(self, name: str) -> Path | None:
        """Return the path of a file of the run; None when there is none of that name."""
        return self.folder / self.files[name] if name in self.files else None


class RunStore:
    """The runs under one folder; several pages and processes may share it."""

    def __init__(self, root: Path) -> None:
        """Make the folder.

        Raises:
            InputError: it cannot be made.
        """
        self.root = root.expanduser().resolve()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot make the run folder {root}",
                got=error.strerror or str(error),
                remedy="--runs with a folder you may write to",
            ) from error

    def begin(self) -> Path:
        """Return a new, empty folder; its name is the run's id and no other run's."""
        while True:
            now = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
            folder = self.root / f"{now}-{secrets.token_hex(4)}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            except OSError as error:
                raise InputError(
                    f"cannot write to {self.root}", got=error.strerror or str(error)
                ) from error
            return folder

    def finish(
        self, folder: Path, kind: str, title: str, facts: dict[str, Any], files: dict[str, Path]
    ) -> Run:
        """Write run.json, last and atomically, and return the run.

        Args:
            folder: from `begin`.
            kind, title, facts: as in Run.
            files: name -> path of a file directly inside the folder.
        Raises:
            InputError: a file lies elsewhere.
        """
        strays = [str(path) for path in files.values() if path.parent != folder]
        if strays:
            raise InputError("files of a run lie in its folder", got=", ".join(strays))
        content = {
            "format": FORMAT,
            "version": VERSION,
            "kind": kind,
            "title": title,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "facts": facts,
            "files": {name: path.name for name, path in files.items()},
            "sha256": {path.name: digest(path) for path in files.values()},
        }
        write_text(folder / "run.json", json.dumps(content, indent=1, ensure_ascii=False))
        return self.open(folder.name)

    def discard(self, folder: Path) -> None:
        """Remove the folder of a run that was stopped or failed."""
        if folder.parent == self.root:
            shutil.rmtree(folder, ignore_errors=True)

    def entries(self, kind: str | None = None) -> list[Run]:
        """Return the readable runs, newest first."""
        found = []
        for folder in self.root.iterdir():
            if _ID.fullmatch(folder.name) and (folder / "run.json").is_file():
                try:
                    run = self.open(folder.name)
                except InputError:
                    continue  # `open` on that run tells the reason
                if kind in (None, run.kind):
                    found.append(run)
        return sorted(found, key=lambda run: (run.created, run.id), reverse=True)

    def open(self, run_id: str) -> Run:
        """Return a run.

        Raises:
            InputError: there is none, or its run.json is damaged or of another version.
        """
        folder = self.root / run_id
        if not _ID.fullmatch(run_id) or not (folder / "run.json").is_file():
            raise InputError("there is no such run", got=repr(run_id))
        try:
            content = read_json(folder / "run.json")
            good = content["format"] == FORMAT and content["version"] == VERSION
            kind, title, created = (str(content[name]) for name in ("kind", "title", "created"))
            facts, files = dict(content["facts"]), dict(content["files"])
            digests = dict(content["sha256"])
            good = good and all(is_plain_name(name) for name in files.values())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"run {run_id} is damaged", got=type(error).__name__) from error
        if not good:
            raise InputError(
                f"run {run_id} cannot be read", expected=f"format {FORMAT}, version {VERSION}"
            )
        return Run(run_id, kind, title, created, facts, files, folder, digests)

    def verify(self, run: Run) -> list[str]:
        """Return one sentence per file that is missing or no longer what was written."""
        problems = []
        for name in run.files.values():
            path = run.folder / name
            if not path.is_file() or not self.owns(path):
                problems.append(f"{name} is missing")
            elif digest(path) != run.digests.get(name):
                problems.append(f"{name} has changed since the run")
        return problems

    def owns(self, path: Path) -> bool:
        """Return whether a path lies inside the run folder, links followed."""
        return path.resolve().is_relative_to(self.root)
