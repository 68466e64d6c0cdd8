"""The flight recorder: what it looks for, and how its findings are written down.

Every call is looked at as a whole (finite, size), every few steps a few of its queries are
attended exactly. A head in trouble is computed anew by the stock function and stays dense until
the run ends; other heads come out as they would have without the incident.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

from dittools.errors import InputError

HELD = "the flight recorder keeps heads dense after an incident"
BROKEN = "the output is not finite"
HOPELESS = "the output is not finite, and that of dense attention is not either"
BLIND = "no memory was left to look at the output"
IDLE = "queries attend to nothing"
FAR = "the output is too far from dense"
REST_DENSE = "dense for the rest of the run"
UNREPAIRED = "nothing to repair"

Key = tuple[str, str, int]  # site, branch, which call of the site in one forward


@dataclass(frozen=True)
class Recorder:
    """What the flight recorder looks at, and what it takes for trouble.

    Attributes:
        every: steps between two sampled errors of a site; sites take turns.
        rows: queries that are attended exactly in a sampled call.
        limit: error of a head, relative to dense, that is trouble. The default is far above what
            any method means to do: it stops garbage. A report shows what is usual for a plan.
        drift: growth or decay of a head's output from step to step that has it sampled at once.
        each_call: whether numbers are read in every call, so that a broken one is mended before
            anything else sees it; False reads them once per forward, which keeps a GPU busy, and
            only later calls are mended. None: every call on the CPU, once per forward elsewhere.
    """

    every: int = 8
    rows: int = 8
    limit: float = 2.0
    drift: float = 4.0
    each_call: bool | None = None

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        if self.each_call is not None and not isinstance(self.each_call, bool):
            raise InputError(
                "recorder: each_call is not usable",
                expected="true, false or nothing",
                got=repr(self.each_call),
            )
        least = {"every": 1, "rows": 1, "limit": 0.0, "drift": 1.0}
        for item in fields(self):
            value = getattr(self, item.name)
            low = least.get(item.name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            whole = item.name not in ("every", "rows") or isinstance(value, int)
            if low is not None and not (is_number and whole and value >= low):
                kind = "a number" if low in (0.0,) or item.name == "drift" else "a whole number"
                raise InputError(
                    f"recorder: {item.name} is not usable",
                    expected=f"{kind} of at least {low:g}",
                    got=repr(value),
                )


@dataclass(frozen=True)
class Incident:
    """One time the recorder stepped in.

    Attributes:
        layer, site, heads: where.
        step, branch: when.
        reason: what was seen.
        outcome: what was done.
        error: relative error of the worst of these heads, None where none was measured.
    """

    layer: int
    site: str
    heads: tuple[int, ...]
    step: int
    branch: str
    reason: str
    outcome: str
    error: float | None = None

    def __str__(self) -> str:
        """Return one line."""
        heads = ", ".join(map(str, self.heads))
        branch = f" ({self.branch})" if self.branch else ""
        error = "" if self.error is None else f", error {self.error:.2f}"
        where = f"layer {self.layer}, head{'s' * (len(self.heads) != 1)} {heads}"
        return f"{where}, step {self.step}{branch}: {self.reason}{error}; {self.outcome}"


class View(NamedTuple):
    """Which call is looked at.

    Attributes:
        layer, site, branch, ordinal, step: its place.
        end: the step from which on the run is dense, 0 when unknown.
        heads: numbers, within the site, of the heads it holds.
    """

    layer: int
    site: str
    branch: str
    ordinal: int
    step: int
    end: int
    heads: tuple[int, ...]

    @property
    def key(self) -> Key:
        """What is the same from step to step."""
        return self.site, self.branch, self.ordinal
