"""Blind A/B/X voting: which of two clips is closer to X, the dense one, without knowing which is
which. Pairs and sides are shuffled by a seed, votes are kept in a local file, and the share of
votes for the accelerated clip comes with its confidence interval.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from dittools.errors import InputError
from dittools.metrics.results import write_atomic
from dittools.reading import read_json

FORMAT = "dittools-votes"
VERSION = 1
CHOICES = ("a", "b", "same")


@dataclass(frozen=True)
class Trial:
    """One question.

    Attributes:
        pair: name of the pair, e.g. its prompt and seed.
        a: path shown as A.
        b: path shown as B.
        x: path of the reference, shown as X; empty when two clips are only compared.
        first_is_a: whether A is the first clip of the pair; never shown.
    """

    pair: str
    a: str
    b: str
    x: str
    first_is_a: bool


@dataclass(frozen=True)
class Tally:
    """What the votes say.

    Attributes:
        first: votes for the first clip of the pairs.
        second: votes for the second.
        same: votes that see no difference.
        share: of the first among decided votes; None without any.
        low: lower end of the interval of `share`.
        high: upper end.
        confidence: of the interval.
    """

    first: int
    second: int
    same: int
    share: float | None
    low: float
    high: float
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        """One line for people."""
        if self.share is None:
            return f"no decided vote yet; {self.same} saw no difference"
        chance = "could be chance" if self.low <= 0.5 <= self.high else "not chance"
        return (
            f"{self.first} of {self.first + self.second} for the first, {self.share:.0%} "
            f"({self.confidence:.0%} interval {self.low:.0%} to {self.high:.0%}, {chance}); "
            f"{self.same} saw no difference"
        )


def trials(pairs: Sequence[tuple[str, str, str, str]], seed: int) -> list[Trial]:
    """Return the questions in shuffled order, with the sides of each drawn at random.

    As many pairs show their first clip as A as show it as B, give or take one.

    Args:
        pairs: (name, first, second, reference) each; the reference may be empty.
        seed: the same seed gives the same order.
    Raises:
        InputError: no pair, or two of one name.
    """
    names = [pair[0] for pair in pairs]
    if not pairs or len(set(names)) != len(names):
        raise InputError("pairs to vote on", expected="one or more, each of its own name")
    draw = random.Random(seed)
    sides = [number % 2 == 0 for number in range(len(pairs))]
    draw.shuffle(sides)
    found = [
        Trial(name, first if side else second, second if side else first, reference, side)
        for (name, first, second, reference), side in zip(pairs, sides, strict=True)
    ]
    draw.shuffle(found)
    return found


class VoteBox:
    """Votes in a local file; every vote is on disk, whole, before `cast` returns."""

    def __init__(self, path: Path) -> None:
        """Open a box, or start one.

        Raises:
            InputError: the file is there but holds no votes.
        """
        self._path = path
        self._votes: dict[str, str] = _load(path) if path.exists() else {}

    def cast(self, trial: Trial, choice: str) -> None:
        """Store a vote; voting again on the same pair replaces the earlier one.

        Args:
            trial: the question.
            choice: "a", "b" or "same".
        Raises:
            InputError: another choice, or the file cannot be written; the vote is then not counted.
        """
        if choice not in CHOICES:
            raise InputError("no such choice", expected=", ".join(CHOICES), got=repr(choice))
        meant = "same" if choice == "same" else _NAMES[(choice == "a") == trial.first_is_a]
        votes = {**self._votes, trial.pair: meant}
        document = {"format": FORMAT, "version": VERSION, "votes": votes}
        write_atomic(self._path, json.dumps(document, indent=1, ensure_ascii=False))
        self._votes = votes

    def open_trials(self, every: Sequence[Trial]) -> list[Trial]:
        """Return the questions without a vote, in their order."""
        return [trial for trial in every if trial.pair not in self._votes]

    def tally(self, confidence: float = 0.95) -> Tally:
        """Return the counts and the interval of the first clip's share."""
        votes = list(self._votes.values())
        first, second = votes.count("first"), votes.count("second")
        low, high = wilson(first, first + second, confidence)
        share = first / (first + second) if first + second else None
        return Tally(first, second, votes.count("same"), share, low, high, confidence)


_NAMES = {True: "first", False: "second"}


def wilson(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a binomial share; (0, 1) without any trial.

    Source: Wilson 1927, without continuity correction.

    Raises:
        InputError: successes outside 0 to total, or confidence outside 0 to 1.
    """
    if not (0 <= successes <= total and 0 < confidence < 1):
        raise InputError(
            "counts or confidence",
            expected="0 <= successes <= total and 0 < confidence < 1",
            got=f"{successes}, {total}, {confidence}",
        )
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * (share * (1 - share) / total + z * z / (4 * total**2)) ** 0.5 / (1 + z * z / total)
    # at no success and at nothing but successes the ends are exact, up to rounding
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == total else centre + half


def _load(path: Path) -> dict[str, str]:
    try:
        found = read_json(path)
        votes = found["votes"]
        good = found["format"] == FORMAT and found["version"] == VERSION
        good = good and all(value in ("first", "second", "same") for value in votes.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot read votes from {path}", got=type(error).__name__) from error
    if not good:
        raise InputError(f"{path} holds no votes", expected=f"format {FORMAT}, version {VERSION}")
    return {str(name): str(value) for name, value in votes.items()}
