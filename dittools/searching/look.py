"""A short dense run of a model in which a plan's methods say what they would keep."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.kernels import Backend
from dittools.kernels.auto import resolve
from dittools.methods import Method
from dittools.patches import attach
from dittools.pipelines.generate import Settings, generate
from dittools.plans import Plan, Rule
from dittools.plans.phrase import phrase
from dittools.plans.plan import HeadRule
from dittools.searching.groups import Watched
from dittools.searching.pricing import Load, Seen, sides_of

LOOK_STEPS = 4


@dataclass
class Look(Seen):
    """What was seen, and one call of a layer half-way through the model, to time methods on."""

    sample: AttentionCall | None = None


def groups_of(plan: Plan, load: Load) -> list[tuple[Method, int]]:
    """Return every method a plan runs and the heads it runs together, without repeats."""
    found: dict[tuple[str, int], Method] = {}
    for layer in range(load.layers):
        for step in range(load.steps):
            for side in sides_of(plan):
                for heads, method in _rules(plan, load, layer, step, side):
                    found.setdefault((phrase(method), len(heads)), method)
    return [(method, heads) for (_, heads), method in found.items()]


def _rules(plan: Plan, load: Load, layer: int, step: int, side: str) -> list[HeadRule]:
    """Return the rules of one layer at one step that run a method, dense ones left out."""
    rules = plan.rules_for(layer, load.path(layer), step, load.steps, load.heads, side)
    return [(heads, m) for heads, m in rules if m.name != "dense" and not _is_plain(m)]


def _is_plain(method: Method) -> bool:
    """Whether a method computes nothing, or everything, and costs as much."""
    return getattr(method, "mode", "") in ("skip", "full")


class _Looker:
    """A method that runs dense and asks the plan's methods what they keep of each call."""

    name: ClassVar[str] = "looker"

    def __init__(self, plan: Plan, load: Load, backend: str, found: Look) -> None:
        self.plan, self.load, self.found = plan, load, found
        self.backend = resolve(backend)
        self.known: set[tuple[int, str, tuple[int, ...], str]] = set()

    def not_supported(self, call: AttentionCall) -> list[str]:
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        if call.head_count == self.load.heads:
            is_middle = self.found.sample is None or call.layer == self.load.layers // 2
            if call.grid == self.load.grid and is_middle:
                q, k, v = (x.contiguous() for x in (call.query, call.key, call.value))
                self.found.sample = AttentionCall(q[:1], k[:1], v[:1], call.grid, scale=call.scale)
            for heads, method in self._groups(call):
                self._ask(call, heads, method)
        return backend.dense(call)

    def _groups(self, call: AttentionCall) -> list[HeadRule]:
        """Return what the plan runs on this layer in the part of a run this step stands for."""
        load, side = self.load, call.branch if self.plan.needs_branch else ""
        groups: dict[tuple[tuple[int, ...], str], HeadRule] = {}
        for step in range(load.steps):
            if self.found.part(step, load.steps) == call.step:
                for heads, method in _rules(self.plan, load, call.layer, step, side):
                    groups.setdefault((heads, phrase(method)), (heads, method))
        return list(groups.values())

    def _ask(self, call: AttentionCall, heads: tuple[int, ...], method: Method) -> None:
        part, name = call.heads(heads), phrase(method)
        if method.not_supported(part):
            return
        watched = Watched(self.backend, call.query.device)
        try:
            method.attend(part, watched)
            key = (call.layer, call.branch, heads, name)
            if watched.calls > 1 and key not in self.known:  # it may have tried patterns out
                watched = Watched(self.backend, call.query.device)
                method.attend(part, watched)
            self.known.add(key)
        except UnsupportedCall:
            return
        pairs = float(call.grid.total**2 * len(heads) * call.query.shape[0])
        at = (call.step, call.layer, heads, name)
        self.found.note(at, (min(watched.kept / pairs, 1.0), watched.asked / pairs))


def look(pipe: Any, settings: Settings, plan: Plan, load: Load, backend: str) -> Look:
    """Return what a plan's methods keep on a model, seen at a few steps of a short dense run."""
    steps = min(LOOK_STEPS, load.steps)
    found = Look(steps)
    looker = _Looker(plan, load, backend, found)
    with attach(pipe, Plan((Rule(looker),)), check_finite=False, recorder=False):
        generate(pipe, replace(settings, steps=steps))
    return found
