"""What one attachment knows and remembers: plan, backend, step, counts, memory of methods."""

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.patches.adapters import Layout
from dittools.patches.flight import Flight
from dittools.patches.masks import KeyMask
from dittools.patches.recorder import Recorder
from dittools.patches.sites import Site
from dittools.patches.steps import StepClock
from dittools.patches.timing import Stopwatch
from dittools.plans import Plan
from dittools.plans.plan import HeadRule

logger = logging.getLogger("dittools")


@dataclass
class Tally:
    """What one site did so far; `sparse_density` adds up densities of calls.

    `forwards` counts the forwards of its denoiser in which it was called at all; a cache that
    reuses a block's old output makes it fewer than the forwards there were.
    """

    sparse: int = 0
    dense: int = 0
    passed: int = 0
    forwards: int = 0
    sparse_density: float | torch.Tensor = 0.0
    fallbacks: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Moment:
    """One forward of a denoiser.

    Attributes:
        layout: where its tokens sit; None when that could not be found.
        problem: why not.
        step, steps, branch: where in the run it stands.
        ordinals: main calls so far per site.
        masks: key masks worked out so far, by id of the mask (kept alive beside it).
        fired: sites called so far.
    """

    layout: Layout | None
    problem: str
    step: int
    steps: int
    branch: str
    ordinals: Counter[str] = field(default_factory=Counter)
    masks: dict[int, tuple[torch.Tensor, KeyMask]] = field(default_factory=dict)
    fired: set[str] = field(default_factory=set)


class Runtime:
    """State of one attachment, shared by its denoisers and by copies of them."""

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        pipe: Any,
        check_finite: bool,
        recorder: Recorder | None = None,
    ) -> None:
        """Start with nothing counted; `pipe` holds the scheduler, None for a bare denoiser."""
        self.plan = plan
        self.backend = backend
        self.check_finite = check_finite
        self.exchange = "heads"  # what ranks of a context-parallel group give each other
        self.clock = StepClock(pipe)
        self.memory: dict[tuple[str, str, int], tuple[Any, dict[str, Any]]] = {}
        self._rules: dict[tuple[str, int, int, int, str], list[HeadRule]] = {}
        self.flight = None if recorder is None else Flight(recorder)
        self._told_idle = False
        self.reset()

    def reset(self) -> None:
        """Forget what was counted and timed; method memory stays."""
        self.tallies: dict[str, Tally] = {}
        self.attention = Stopwatch()
        self.sparse_calls = Stopwatch()
        self.backend_work = Stopwatch()
        self.used: set[str] = set()
        self.branches: set[str] = set()
        self.steps_seen: set[int] = set()
        self.forwards: Counter[str] = Counter()  # by component
        self.grids: set[TokenGrid] = set()
        self.ranks = ""  # of a context-parallel group, in words
        if self.flight is not None:
            self.flight.reset()

    def begin_run(self) -> None:
        """Forget what belongs to one run of the pipeline."""
        self.memory.clear()
        if self.flight is not None:
            self.flight.begin_run()

    def tell_idle(self) -> None:
        """Log once, where a recorder watches, that nothing ran sparse so far, and mostly why."""
        tallies = self.tallies.values()
        if self.flight is None or self._told_idle or any(tally.sparse for tally in tallies):
            return
        reasons = sum((tally.fallbacks for tally in tallies), Counter[str]())
        for reason, count in reasons.most_common(1):
            self._told_idle = True
            logger.warning(
                "nothing ran sparse so far: %d calls: %s; the attachment's report() has more",
                count,
                reason,
            )

    def tally(self, site: Site) -> Tally:
        """Return the counts of a site."""
        return self.tallies.setdefault(site.name, Tally())

    def rules(
        self, site: Site, step: int, steps: int, heads: int, branch: str = ""
    ) -> list[HeadRule]:
        """Return what the plan says, worked out once per site, step and branch."""
        branch = branch if self.plan.needs_branch else ""
        key = (site.name, step, steps, heads, branch)
        if key not in self._rules:
            if len(self._rules) > 65536:
                self._rules.clear()
            self._rules[key] = self.plan.rules_for(
                site.layer, site.name, step, steps, heads, branch
            )
        return self._rules[key]

    def recall(self, key: tuple[str, str, int], shapes: Any) -> dict[str, Any]:
        """Return the memory of (site, branch, ordinal), empty when shapes changed."""
        known, memory = self.memory.get(key, (None, {}))
        if known != shapes:
            memory = {}
            self.memory[key] = (shapes, memory)
        return memory
