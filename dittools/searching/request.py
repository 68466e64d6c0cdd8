"""What a search is asked for, checked before any work starts."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from dittools.errors import InputError
from dittools.methods import METHODS
from dittools.pipelines.generate import Settings
from dittools.searching.candidates import NEVER


@dataclass(frozen=True)
class Budget:
    """How much a search may do, in counts, so that it is the same on every machine.

    Attributes:
        calibration: prompts that candidates are measured on.
        held_out: prompts that plans are verified on.
        rows: queries looked at per call.
        steps_per_range: steps looked at in each step range.
        sensitivity: layers perturbed one at a time; the others lie between.
        vectors: random vectors carried back through the sampler, where sensitivity is asked so.
        rounds: generations of the held-out prompts at most, one plan each.
        points: single methods that are generated too, for the frontier.
        branches: whether a plan with rules of its own for each guidance branch is tried too.
    """

    calibration: int = 2
    held_out: int = 4
    rows: int = 96
    steps_per_range: int = 2
    sensitivity: int = 6
    rounds: int = 8
    points: int = 1
    vectors: int = 2
    branches: bool = False

    def __post_init__(self) -> None:
        """Refuse what measures nothing."""
        for name in (
            "calibration",
            "held_out",
            "rows",
            "steps_per_range",
            "rounds",
            "sensitivity",
            "vectors",
        ):
            if getattr(self, name) < 1:
                raise InputError(
                    f"budget {name} is not usable",
                    expected="at least 1",
                    got=str(getattr(self, name)),
                )


BUDGETS = {
    "quick": Budget(1, 2, 64, 1, 2, 4, 0, 1),
    "standard": Budget(),
    "thorough": Budget(4, 8, 256, 4, 16, 12, 40, 4, True),
}
SENSITIVITIES = ("perturbation", "gradient")
DEFAULT_RANGES = (0.0, 1 / 6, 1 / 3, 2 / 3, 1.0)


@dataclass(frozen=True)
class Constraints:
    """What the plan must keep to.

    Attributes:
        dense_layers: layers that stay dense.
        dense_heads: (layer, head) pairs that stay dense.
        exclude: methods that may not be used.
        distinct: most different kernels in one layer at one time; 0 for any number.
        mask_bytes: memory of all masks together; 0 for any amount.
        reuse: a layer takes over its predecessor's choice where that adds at most this share to
            its predicted error; 0 never does.
    """

    dense_layers: tuple[int, ...] = ()
    dense_heads: tuple[tuple[int, int], ...] = ()
    exclude: tuple[str, ...] = ()
    distinct: int = 0
    mask_bytes: int = 0
    reuse: float = 0.0


@dataclass(frozen=True)
class Request:
    """Everything that decides the outcome of a search.

    Attributes:
        prompts: one is enough; odd ones calibrate, even ones are held out.
        settings: size, steps, guidance and seed of every generation.
        target: "density", "psnr" or "speedup".
        value: what it should be.
        methods: names in METHODS, empty for all.
        ranges: edges of the step ranges, as shares of the run.
        carry: penalty of Sparse-vDiT's greedy choice during calibration; None measures on dense
            inputs.
        sensitivity: "perturbation" or "gradient": how it is found what an error does in the end.
    """

    prompts: tuple[str, ...]
    settings: Settings
    target: str
    value: float
    methods: tuple[str, ...] = ()
    budget: Budget = field(default_factory=Budget)
    constraints: Constraints = field(default_factory=Constraints)
    ranges: tuple[float, ...] = DEFAULT_RANGES
    carry: float | None = None
    sensitivity: str = "perturbation"

    def __post_init__(self) -> None:
        """Check prompts, methods, step ranges, penalties and seeds."""
        if not self.prompts:
            raise InputError("no prompts to search with", remedy="one prompt or more")
        for name, value in (("carry", self.carry or 0.0), ("reuse", self.constraints.reuse)):
            if not 0 <= value < float("inf"):
                raise InputError(
                    f"{name} is not usable", expected="a number from 0 on", got=f"{value:g}"
                )
        _ = (self.calibration, self.held_out)  # whose seeds follow the one given
        unknown = [m for m in (*self.methods, *self.constraints.exclude) if m not in METHODS]
        if unknown:
            raise InputError(
                "unknown method in the search",
                expected=", ".join(name for name in METHODS if name not in NEVER),
                got=", ".join(unknown),
            )
        if self.sensitivity not in SENSITIVITIES:
            raise InputError(
                "unknown kind of sensitivity",
                expected=", ".join(SENSITIVITIES),
                got=repr(self.sensitivity),
            )
        edges = self.ranges
        rising = all(a < b for a, b in pairwise(edges))
        if len(edges) < 2 or edges[0] != 0 or edges[-1] != 1 or not rising:
            raise InputError(
                "step ranges are not usable",
                expected="rising shares of the run from 0 to 1",
                got=str(edges),
            )

    @property
    def calibration(self) -> list[Settings]:
        """Generations that candidates are measured in."""
        chosen = self.prompts[0::2][: self.budget.calibration]
        return [
            replace(self.settings, prompt=p, seed=self.settings.seed + i)
            for i, p in enumerate(chosen)
        ]

    @property
    def held_out(self) -> list[Settings]:
        """Generations that verify; a single prompt is verified with other seeds."""
        chosen = self.prompts[1::2][: self.budget.held_out] or self.prompts[:1]
        return [
            replace(self.settings, prompt=p, seed=self.settings.seed + 10_000 + i)
            for i, p in enumerate(chosen)
        ]


def target_of(
    density: float | None, psnr: float | None, speedup: float | None
) -> tuple[str, float]:
    """Return which target is asked for and its value.

    Raises:
        InputError: none or several are given, or one lies outside its limits.
    """
    given = {"density": density, "psnr": psnr, "speedup": speedup}
    chosen = [(name, float(value)) for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise InputError(
            "a search needs exactly one target",
            expected="target_density, min_psnr or target_speedup",
            got=", ".join(name for name, _ in chosen) or "none",
        )
    name, value = chosen[0]
    limits = {"density": (0.0, 1.0), "psnr": (0.0, 100.0), "speedup": (1.0, 1000.0)}[name]
    if not limits[0] < value <= limits[1]:
        raise InputError(
            f"the target {name} is not usable",
            expected=f"above {limits[0]:g}, at most {limits[1]:g}",
            got=f"{value:g}",
        )
    return name, value


def budget_of(budget: str | Budget) -> Budget:
    """Return the budget of a name.

    Raises:
        InputError: no such budget.
    """
    if isinstance(budget, Budget):
        return budget
    if budget not in BUDGETS:
        raise InputError("unknown budget", expected=", ".join(BUDGETS), got=repr(budget))
    return BUDGETS[budget]


def settings_for(pipe: Any, given: dict[str, Any]) -> Settings:
    """Return the settings of every generation, the model's own defaults filled in."""
    known = {name: value for name, value in given.items() if value is not None}
    if is_demo(pipe):
        from dittools.pipelines.demo import DEMO_DEFAULTS

        known = {**DEMO_DEFAULTS, **known}
    known.pop("prompt", None)
    if "steps" not in known:
        parameters = inspect.signature(type(pipe).__call__).parameters
        default = parameters.get("num_inference_steps")
        if default is None or not isinstance(default.default, int):
            raise InputError(
                f"{type(pipe).__name__} does not say how many steps it takes", remedy="give steps"
            )
        known["steps"] = default.default
    return Settings(prompt="", **known)


def is_demo(pipe: Any) -> bool:
    """Whether a pipeline is the embedded model, loaded from its own folder."""
    from dittools.pipelines.demo import WEIGHTS

    name = getattr(getattr(pipe, "config", None), "_name_or_path", None)
    return bool(name) and Path(str(name)) == WEIGHTS


def check_prompts(prompts: Sequence[str] | str | Path) -> tuple[str, ...]:
    """Return prompts as a tuple; a path is read as a prompts file."""
    from dittools.searching.store import read_prompts

    if isinstance(prompts, Path):
        return tuple(read_prompts(prompts))
    if isinstance(prompts, str):
        return (prompts,)
    found = tuple(prompts)
    if not all(isinstance(p, str) and p.strip() for p in found):
        raise InputError("a prompt is empty or no text", remedy="plain, non-empty strings")
    return found
