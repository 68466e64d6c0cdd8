"""A plan: rules from layer, head and step to a method, and the steps and layers that stay dense."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import torch

from dittools.errors import PlanError
from dittools.methods import Method, build
from dittools.methods.headhunter import HeadHunter

_DENSE: Method = build("dense")
BRANCHES = ("all", "cond", "uncond")
HeadRule = tuple[tuple[int, ...], Method]  # heads, ascending, and the method that runs them


@dataclass(frozen=True)
class ModelFacts:
    """What a plan must know of a model to fit it.

    Attributes:
        class_name: class of the denoiser, e.g. "WanTransformer3DModel".
        layers: number of attention sites.
        heads: heads of one site.
        head_dim: channels of one head.
        paths: module path of every site in layer order; empty when unknown.
    """

    class_name: str
    layers: int
    heads: int
    head_dim: int
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """The steps and layers that stay dense.

    A float in [0, 1) is a share of the run's steps, rounded up, so that a run of few steps keeps at
    least one when the share is above 0; a whole number counts steps.

    Attributes:
        dense_first_steps: at the start of the run.
        dense_last_steps: at its end.
        dense_layers: leading layers, always dense.
    """

    dense_first_steps: float | int = 0
    dense_last_steps: float | int = 0
    dense_layers: int = 0

    def __post_init__(self) -> None:
        """Refuse negative counts and shares of 1 or more."""
        for name in ("dense_first_steps", "dense_last_steps"):
            value = getattr(self, name)
            is_share = isinstance(value, float) and 0 <= value < 1
            if not is_share and not _is_count(value):
                raise PlanError(
                    f"{name} is not usable",
                    expected="a share of the steps in [0, 1) or a whole number of steps",
                    got=repr(value),
                )
        if not _is_count(self.dense_layers):
            raise PlanError(
                "dense_layers is not usable",
                expected="a whole number of leading layers",
                got=repr(self.dense_layers),
            )

    @property
    def needs_steps(self) -> bool:
        """Whether the length of the run must be known."""
        shares = (self.dense_first_steps, self.dense_last_steps)
        return any(isinstance(v, float) and v > 0 for v in shares) or self.dense_last_steps > 0

    def counts(self, steps: int) -> tuple[int, int]:
        """Return how many first and last steps of a run of that many stay dense."""
        return _count(self.dense_first_steps, steps), _count(self.dense_last_steps, steps)

    def is_dense(self, layer: int, step: int, steps: int) -> bool:
        """Whether one layer stays dense at one step of a run of that many (0: not known).

        While the length of the run is not known, a schedule that depends on it keeps all dense.
        """
        if layer < self.dense_layers:
            return True
        if steps == 0 and self.needs_steps:
            return True
        first, last = self.counts(steps)
        return step < first or (steps > 0 and step >= steps - last)


@dataclass(frozen=True)
class Rule:
    """One method and where it runs; of two rules for the same head the later one wins.

    Attributes:
        method: the method with its parameters.
        layers: "all", or layer indices and module paths ("blocks.3.attn1"; with the component in
            front, "transformer_2.blocks.3.attn1", only there).
        heads: "all", or head indices.
        steps: "all", or (start, stop) as shares of the run, stop excluded.
        branch: guidance branch, for pipelines that run the branches one after the other; calls of
            no known branch follow the rules for all.
    """

    method: Method
    layers: Literal["all"] | tuple[int | str, ...] = "all"
    heads: Literal["all"] | tuple[int, ...] = "all"
    steps: Literal["all"] | tuple[float, float] = "all"
    branch: Literal["all", "cond", "uncond"] = "all"

    def __post_init__(self) -> None:
        """Refuse a malformed choice of layers, heads, branch or steps."""
        _check_choice("layers", self.layers, (int, str))
        _check_choice("heads", self.heads, (int,))
        if self.branch not in BRANCHES:
            raise PlanError(
                "rule branch is not usable", expected=", ".join(BRANCHES), got=repr(self.branch)
            )
        if self.steps == "all":
            return
        if not (
            isinstance(self.steps, tuple)
            and len(self.steps) == 2
            and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in self.steps)
            and 0 <= self.steps[0] < self.steps[1] <= 1
        ):
            raise PlanError(
                "rule steps are not usable",
                expected='"all" or (start, stop) with 0 <= start < stop <= 1',
                got=repr(self.steps),
            )

    def covers_layer(self, layer: int, path: str) -> bool:
        """Whether the rule names this layer, by index or by module path."""
        if self.layers == "all":
            return True
        return any(
            name == layer if isinstance(name, int) else name == path or path.endswith(f".{name}")
            for name in self.layers
        )

    def covers_step(self, step: int, steps: int) -> bool:
        """Whether the rule holds at this step; a rule for part of a run needs the run's length."""
        if self.steps == "all":
            return True
        return steps > 0 and self.steps[0] <= step / steps < self.steps[1]

    def covers_branch(self, branch: str) -> bool:
        """Whether the rule holds on this guidance branch."""
        return self.branch in ("all", branch)


@dataclass(frozen=True)
class Plan:
    """Rules, the schedule around them, and where the plan comes from.

    Attributes:
        rules: where no rule holds, attention stays dense.
        schedule: dense steps and layers; goes before every rule.
        model: the model it was made for; None fits any.
        guidance: heads whose perturbation guides the run; None for none.
        tensors: extra tensors saved beside the plan.
        provenance: how it came about, JSON values.
        measured: what was measured with it, JSON values.
    """

    rules: tuple[Rule, ...] = ()
    schedule: Schedule = field(default_factory=Schedule)
    model: ModelFacts | None = None
    guidance: HeadHunter | None = field(default=None, kw_only=True)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(
        method: Method,
        *,
        dense_first_steps: float | int = 0,
        dense_last_steps: float | int = 0,
        dense_layers: int = 0,
        provenance: Mapping[str, Any] | None = None,
    ) -> "Plan":
        """Return the plan that runs one method on every layer and head."""
        schedule = Schedule(dense_first_steps, dense_last_steps, dense_layers)
        return Plan((Rule(method),), schedule, provenance=dict(provenance or {}))

    @staticmethod
    def load(path: str | Path) -> "Plan":
        """Return the plan a file holds.

        Raises:
            PlanError: missing, damaged, of another format or version, or with unknown keys.
            UnknownMethod: it names a method or parameter this version does not have.
        """
        from dittools.plans.file import load_plan

        return load_plan(Path(path))

    def save(self, path: str | Path) -> Path:
        """Write the plan, and its tensors beside it; equal plans give equal bytes.

        Raises:
            PlanError: the folder cannot be written to.
        """
        from dittools.plans.file import save_plan

        return save_plan(self, Path(path))

    def scheduled(
        self,
        *,
        dense_first_steps: float | int | None = None,
        dense_last_steps: float | int | None = None,
        dense_layers: int | None = None,
    ) -> "Plan":
        """Return the plan with parts of its schedule replaced; None keeps a part."""
        wanted = {
            "dense_first_steps": dense_first_steps,
            "dense_last_steps": dense_last_steps,
            "dense_layers": dense_layers,
        }
        given: dict[str, Any] = {name: v for name, v in wanted.items() if v is not None}
        return replace(self, schedule=replace(self.schedule, **given)) if given else self

    def rules_for(
        self, layer_index: int, path: str, step: int, steps: int, heads: int, branch: str = ""
    ) -> list[HeadRule]:
        """Return (heads, method) pairs that together cover every head once.

        Args:
            layer_index: index of the site in execution order.
            path: module path of the site.
            step: denoising step, from 0.
            steps: steps of the run, 0 when not known.
            heads: head count of the site.
            branch: guidance branch of the call; only "cond" and "uncond" have rules of their own.
        """
        every = tuple(range(heads))
        if self.schedule.is_dense(layer_index, step, steps):
            return [(every, _DENSE)]
        chosen: list[Method] = [_DENSE] * heads
        for rule in self.rules:
            if (
                rule.covers_layer(layer_index, path)
                and rule.covers_step(step, steps)
                and rule.covers_branch(branch)
            ):
                for head in every if rule.heads == "all" else rule.heads:
                    if head < heads:
                        chosen[head] = rule.method
        groups: list[tuple[Method, list[int]]] = []
        for head, method in enumerate(chosen):
            for known, members in groups:
                if _same(known, method):
                    members.append(head)
                    break
            else:
                groups.append((method, [head]))
        return [(tuple(members), method) for method, members in groups]

    @property
    def needs_branch(self) -> bool:
        """Whether a rule holds on one guidance branch only."""
        return any(rule.branch != "all" for rule in self.rules)

    @property
    def needs_steps(self) -> bool:
        """Whether the plan cannot be followed without knowing the length of the run."""
        return self.schedule.needs_steps or any(rule.steps != "all" for rule in self.rules)

    def check(self, facts: ModelFacts) -> None:
        """Raise when the plan does not fit a model.

        Raises:
            PlanError: another class, layer count, head count or head_dim, or a rule for a layer,
                module path or head the model does not have.
        """
        if self.model is not None:
            for name in ("class_name", "layers", "heads", "head_dim"):
                want, have = getattr(self.model, name), getattr(facts, name)
                if want != have:
                    raise PlanError(
                        "the plan was made for another model",
                        expected=f"{name.replace('class_name', 'class')} {want}",
                        got=f"{have} ({facts.class_name})",
                        remedy="search a plan for this model, or attach a method by name",
                    )
        for number, rule in enumerate(self.rules):
            _check_rule(number, rule, facts)


def _check_rule(number: int, rule: Rule, facts: ModelFacts) -> None:
    """Raise when a rule names a layer, path or head that does not exist."""
    problem = f"rule {number} of the plan does not fit {facts.class_name}"
    for layer in () if rule.layers == "all" else rule.layers:
        if isinstance(layer, int) and not 0 <= layer < facts.layers:
            raise PlanError(problem, expected=f"layers 0..{facts.layers - 1}", got=str(layer))
        if isinstance(layer, str) and facts.paths and not _names_one(layer, facts.paths):
            some = ", ".join(facts.paths[:3])
            raise PlanError(problem, expected=f"a module path such as {some}", got=repr(layer))
    for head in () if rule.heads == "all" else rule.heads:
        if not 0 <= head < facts.heads:
            raise PlanError(problem, expected=f"heads 0..{facts.heads - 1}", got=str(head))


def _same(one: Method, other: Method) -> bool:
    """Whether two methods have equal parameters; rules read from a file share no objects."""
    if one is other or type(one) is not type(other):
        return one is other
    values = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(cast(Any, one))]
    return all(
        a is b or (not isinstance(a, torch.Tensor) and type(a) is type(b) and a == b)
        for a, b in values
    )


def _names_one(name: str, paths: tuple[str, ...]) -> bool:
    return any(p == name or p.endswith(f".{name}") or name.endswith(f".{p}") for p in paths)


def _check_choice(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    """Raise unless value is "all" or a filled tuple of the given kinds, none negative."""
    if value == "all":
        return
    good = (
        isinstance(value, tuple)
        and len(value) > 0
        and all(isinstance(v, kinds) and not isinstance(v, bool) for v in value)
        and all(v >= 0 for v in value if isinstance(v, int))
    )
    if not good:
        words = " or ".join({"int": "indices", "str": "module paths"}[k.__name__] for k in kinds)
        raise PlanError(
            f"rule {name} are not usable", expected=f'"all" or a tuple of {words}', got=repr(value)
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@lru_cache(maxsize=256)
def _count(amount: float | int, steps: int) -> int:
    if isinstance(amount, int):
        return amount
    return math.ceil(amount * steps - 1e-9)  # 0.24 * 50 must stay 12
