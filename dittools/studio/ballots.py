"""Blind votes on the runs of the history: who meets whom, and clips whose names tell nothing."""

import hashlib
import json
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dittools.errors import DitToolsError, InputError
from dittools.metrics.results import load_results
from dittools.metrics.vote import Tally, Trial, VoteBox, trials
from dittools.reading import read_json
from dittools.studio.runs import Run, RunStore

DENSE = "dense"
CLIPS = "ballots"  # below the run folder: copies under random names
VOTES = "votes"  # below the run folder: one file per contest
_SAME = ("prompt", "negative_prompt", "seed", "steps", "frames", "height", "width", "guidance")
_KEPT_SECONDS = 24 * 3600.0  # copies of pages that were closed without a word
_lock = threading.Lock()


@dataclass(frozen=True)
class Entry:
    """One accelerated clip and the dense one of the same prompt and seed.

    Attributes:
        key: what has to agree for two clips to be compared.
        label: the method or plan.
        clip, dense: files.
        title: prompt and seed.
    """

    key: str
    label: str
    clip: Path
    dense: Path
    title: str


@dataclass(frozen=True)
class Contest:
    """Two labels and the pairs of clips in which they meet; the first one's share is counted."""

    first: str
    second: str
    pairs: tuple[tuple[str, str, str, str], ...]

    def file(self, runs: RunStore) -> Path:
        """Return the file of its votes."""
        digest = hashlib.sha256(f"{self.first}\0{self.second}".encode()).hexdigest()[:12]
        words = re.sub(r"[^a-z0-9]+", "-", f"{self.first}-{self.second}".lower()).strip("-")[:40]
        return runs.root / VOTES / f"{words}-{digest}.json"


def entries(found: Iterable[Run]) -> list[Entry]:
    """Return the clips of finished generations and benchmarks, newest first.

    Runs whose files are gone or damaged are left out; the history names them.
    """
    listed: list[Entry] = []
    for run in found:
        try:
            listed += _generated(run) if run.kind == "generate" else _benched(run)
        except (DitToolsError, OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return _told_apart(listed)


def _generated(run: Run) -> list[Entry]:
    report, clip, dense = (run.path(name) for name in ("report", "accelerated", "dense"))
    if report is None or clip is None or dense is None or not (clip.exists() and dense.exists()):
        return []
    content = read_json(report)
    digest = _plan_digest(run) or run.id
    return [
        Entry(
            _key(content["model"], content["settings"]),
            f"{content['method']}\0{digest}",
            clip,
            dense,
            _title(content["settings"]),
        )
    ]


def _benched(run: Run) -> list[Entry]:
    path = run.path("results")
    if run.kind != "bench" or path is None:
        return []
    content = load_results(path)
    clips = {case["name"]: run.folder / case["clip"] for case in content["cases"]}
    if not all(clip.is_file() and runs_inside(clip, run.folder) for clip in clips.values()):
        return []
    settings = {name: content["run"].get(name) for name in _SAME}
    return [
        Entry(
            _key(content["run"]["model"], settings),
            f"{case['name']} (benchmark)\0{case['plan_checksum']}",
            clips[case["name"]],
            clips[DENSE],
            _title(settings),
        )
        for case in content["cases"]
        if case["name"] != DENSE
    ]


def runs_inside(path: Path, folder: Path) -> bool:
    """Return whether a file lies in a folder, links followed."""
    return path.resolve().is_relative_to(folder.resolve())


def _plan_digest(run: Run) -> str:
    path = run.path("plan")
    if path is None or not path.exists():
        return ""
    from dittools.plans import Plan
    from dittools.searching.measure import plan_digest

    return plan_digest(Plan.load(path))


def _told_apart(listed: Sequence[Entry]) -> list[Entry]:
    """Return the entries with labels people can read, numbered where one name has many plans."""
    digests: dict[str, list[str]] = {}
    for entry in listed:
        name, digest = entry.label.split("\0")
        if digest not in digests.setdefault(name, []):
            digests[name].append(digest)
    found = []
    for entry in listed:
        name, digest = entry.label.split("\0")
        label = name if len(digests[name]) == 1 else f"{name} ({digest[-4:]})"
        found.append(Entry(entry.key, label, entry.clip, entry.dense, entry.title))
    return found


def _key(model: str, settings: dict[str, Any]) -> str:
    return json.dumps([model, *(settings.get(name) for name in _SAME)])


def _title(settings: dict[str, Any]) -> str:
    return f"{settings['prompt']} (seed {settings['seed']})"


def labels(listed: Sequence[Entry]) -> list[str]:
    """Return what can be voted on, the newest first, dense last."""
    found = list(dict.fromkeys(entry.label for entry in listed))
    return [*found, DENSE] if found else []


def contest(listed: Sequence[Entry], first: str, second: str) -> Contest:
    """Return every pair in which two labels meet on the same prompt, seed and size.

    Against dense, X is the dense clip too: who sees no difference cannot tell which one it is.

    Raises:
        InputError: the labels are the same, or never meet.
    """
    if first == second:
        raise InputError("a vote needs two different sides", got=f"{first} twice")
    by_label: dict[str, dict[str, Entry]] = {first: {}, second: {}}
    for entry in listed:
        if entry.label in by_label:
            by_label[entry.label].setdefault(entry.key, entry)
    other = first if second == DENSE else second
    pairs = []
    for key, entry in by_label[other if first == DENSE else first].items():
        rival = by_label[other].get(key)
        if rival is None:
            continue
        sides = {entry.label: entry.clip, rival.label: rival.clip, DENSE: entry.dense}
        name = f"{entry.title} · {hashlib.sha256(key.encode()).hexdigest()[:8]}"
        pairs.append((name, str(sides[first]), str(sides[second]), str(entry.dense)))
    if not pairs:
        raise InputError(
            f"{first} and {second} have no clip in common",
            expected="runs of the same prompt, seed, size and steps",
            remedy="generate one prompt with both",
        )
    return Contest(first, second, tuple(pairs))


def questions(found: Contest, voter: str, seed: int) -> list[Trial]:
    """Return the shuffled questions for one voter, who is counted apart from the others."""
    who = " ".join(voter.split())[:60]
    pairs = [(f"{who}: {name}" if who else name, a, b, x) for name, a, b, x in found.pairs]
    return trials(pairs, seed)


def unanswered(runs: RunStore, found: Contest, every: Sequence[Trial]) -> list[Trial]:
    """Return the questions that have no vote yet."""
    return VoteBox(found.file(runs)).open_trials(every)


def vote(runs: RunStore, found: Contest, trial: Trial, choice: str) -> None:
    """Store one vote; pages that vote at the same time do not lose each other's."""
    with _lock:
        VoteBox(found.file(runs)).cast(trial, choice)


def tally(runs: RunStore, found: Contest) -> Tally:
    """Return what all votes of a contest say."""
    return VoteBox(found.file(runs)).tally()


def sentence(found: Contest, counted: Tally) -> str:
    """Return the outcome in words, with its interval."""
    if counted.share is None:
        return f"No decided vote yet; in {counted.same} no difference was seen."
    decided = counted.first + counted.second
    level = f"{counted.confidence:.0%}"
    preferred = found.first if counted.low > 0.5 else found.second
    verdict = f"This is not chance: {preferred} is preferred."
    if counted.low <= 0.5 <= counted.high:
        verdict = "This could be chance: a fair coin lies inside the interval."
    unseen = f" In {counted.same} more no difference was seen." if counted.same else ""
    return (
        f"{found.first} was closer to dense in {counted.first} of {decided} decided votes, "
        f"{counted.share:.0%} ({level} interval {counted.low:.0%} to {counted.high:.0%}). "
        f"{verdict}{unseen}"
    )


def blind_copies(runs: RunStore, trial: Trial) -> dict[str, Path]:
    """Return copies of A, B and X whose names and dates say nothing about the side.

    Raises:
        InputError: a clip is gone, or the disk is full.
    """
    folder = runs.root / CLIPS
    made: dict[str, Path] = {}
    try:
        folder.mkdir(exist_ok=True)
        for name, source in (("a", trial.a), ("b", trial.b), ("x", trial.x)):
            target = folder / f"{secrets.token_hex(12)}{Path(source).suffix}"
            shutil.copyfile(source, target)  # contents alone: no date of the original
            made[name] = target
    except OSError as error:
        forget(made)
        raise InputError(
            "a clip of this pair cannot be shown", got=error.strerror or type(error).__name__
        ) from error
    return made


def forget(copies: dict[str, Path]) -> None:
    """Remove copies."""
    for path in copies.values():
        path.unlink(missing_ok=True)


def sweep(runs: RunStore) -> None:
    """Remove copies that closed pages left behind."""
    limit = time.time() - _KEPT_SECONDS
    for path in (runs.root / CLIPS).glob("*"):
        if path.is_file() and path.stat().st_mtime < limit:
            path.unlink(missing_ok=True)
