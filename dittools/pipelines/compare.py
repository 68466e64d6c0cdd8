"""Dense and accelerated generation of the same prompt and seed, with the floors beside them."""

import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dittools
from dittools.errors import InputError
from dittools.methods import METHODS, Method, build
from dittools.metrics import compare as fidelity
from dittools.metrics.prompt_score import score_clip
from dittools.patches import attach
from dittools.pipelines.generate import Run, Settings, generate
from dittools.plans import Plan, Rule, Schedule

Step = Callable[[str, int, int], None]  # (what is running, steps done, steps in all)
Made = Callable[[str, "Run"], None]  # ("dense" or "accelerated", its first run)


@dataclass(frozen=True)
class Measured:
    """Repeated runs of one configuration.

    Attributes:
        run: the last one; the same seed gives the same frames every time.
        seconds: wall time of each repeat, end to end.
        attention_ms: time in self-attention of each repeat.
        report: what the attachment reports of the last repeat.
    """

    run: Run
    seconds: list[float]
    attention_ms: list[float]
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def median_seconds(self) -> float:
        """Median over the repeats."""
        return statistics.median(self.seconds)

    @property
    def median_attention_seconds(self) -> float:
        """Median over the repeats."""
        return statistics.median(self.attention_ms) / 1000


@dataclass(frozen=True)
class Comparison:
    """All runs of one comparison; `to_dict` is what report.json holds. None: floor not measured."""

    settings: Settings
    method: str
    dense: Measured
    accelerated: Measured
    other_seed: Measured | None
    random_blocks: Measured | None
    model: str
    prompt_score: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON types; times in seconds, floors beside the result."""
        dense, fast = self.dense, self.accelerated
        share = dense.median_attention_seconds / dense.median_seconds
        reference = dense.run.frames
        return {
            "format": "dittools-report",
            "version": 1,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "environment": environment(),
            "model": self.model,
            "settings": self.settings.to_dict(),
            "method": self.method,
            "dense": _times(dense),
            "accelerated": {**_times(fast), "report": fast.report},
            "speedup": dense.median_seconds / fast.median_seconds,
            "attention_speedup": _ratio(
                dense.median_attention_seconds, fast.median_attention_seconds
            ),
            "attention_share": share,
            "speedup_bound": 1 / (1 - share),
            "density": fast.report["density"],
            "fidelity": fidelity(reference, fast.run.frames).to_dict(),
            "floors": self._floors(),
            "prompt_score": self.prompt_score,
        }

    def _floors(self) -> dict[str, Any]:
        facts: dict[str, tuple[Measured | None, dict[str, Any]]] = {
            "other_seed": (self.other_seed, {"seed": self.settings.seed + 1}),
            "random_blocks": (self.random_blocks, {}),
        }
        if self.random_blocks is not None:
            facts["random_blocks"][1]["density"] = self.random_blocks.report["density"]
        reference = self.dense.run.frames
        return {
            name: {**fact, **fidelity(reference, floor.run.frames).to_dict()}
            for name, (floor, fact) in facts.items()
            if floor is not None
        }


def run_comparison(
    pipe: Any,
    settings: Settings,
    plan: str | Path | Method | Plan,
    *,
    model: str,
    repeats: int = 3,
    backend: str = "auto",
    options: dict[str, Any] | None = None,
    step: Step | None = None,
    floors: bool = True,
    made: Made | None = None,
    compared: "Callable[[Comparison], None] | None" = None,
) -> Comparison:
    """Generate dense and accelerated in turn, then the two floors.

    Dense and accelerated runs alternate, so that a drifting machine hits both alike; the first,
    uncounted run of each is short and warms caches and kernels up.

    Args:
        pipe: a stock pipeline, nothing attached.
        settings: the same for all runs but the seed of the first floor.
        plan: what `attach` takes.
        model: name written into the report.
        repeats: counted runs of dense and of accelerated.
        backend: of the accelerated runs.
        options: further keywords of `attach`, e.g. dense_steps.
        step: called after every denoising step.
        floors: whether to measure another seed and random blocks as well.
        made: called with "dense", then "accelerated", and its first run as soon as that is there.
        compared: called with the comparison before the floors are measured.
    Raises:
        InputError: repeats below 1.
    """
    if repeats < 1:
        raise InputError("repeats is not usable", expected="at least 1", got=str(repeats))
    extra = options or {}

    def measure(what: str, target: Any, use: Settings, **keywords: Any) -> Measured:
        def progress(done: int, total: int) -> None:
            if step is not None:
                step(what, done, total)

        with attach(pipe, target, **keywords) as handle:
            run = generate(pipe, use, progress)
            report = handle.report().to_dict()
        if made is not None and what.endswith(" 1 of " + str(repeats)):
            made(what.partition(" ")[0], run)
        return Measured(run, [run.seconds], [report["attention_ms"]], report)

    short = replace(settings, steps=min(settings.steps or 2, 2))
    measure("warm-up", "dense", short)
    measure("warm-up", plan, short, backend=backend, **{**extra, "dense_steps": 0})
    dense_runs, fast_runs = [], []
    for turn in range(repeats):
        label = f"{turn + 1} of {repeats}"
        dense_runs.append(measure(f"dense {label}", "dense", settings))
        fast_runs.append(measure(f"accelerated {label}", plan, settings, backend=backend, **extra))
    fast = _joined(fast_runs)
    dense = _joined(dense_runs)
    scores = _scores(model, settings.prompt, {"dense": dense, "accelerated": fast})
    found = Comparison(settings, describe(plan), dense, fast, None, None, model, scores)
    if not floors:
        return found
    if compared is not None:
        compared(found)
    other = measure("other seed", "dense", replace(settings, seed=settings.seed + 1))
    # a named backend runs the blocks it is given, also where dense would be faster
    runner = next(iter(fast.report["backends"]), "auto")
    floor = measure("random blocks", _random_at(fast.report), settings, backend=runner)
    return replace(found, other_seed=other, random_blocks=floor)


def environment() -> dict[str, Any]:
    """Return versions and the device, for a report to be judged by."""
    packages = {}
    for name in ("torch", "diffusers", "transformers", "triton"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "dittools": dittools.__version__,
        "python": platform.python_version(),
        **packages,
        "machine": platform.machine(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
    }


def _random_at(report: dict[str, Any]) -> Plan:
    """Return random blocks that reach the density of a run over all its calls.

    The run's dense steps and layers stay dense, so the rest gets what they leave of the density.
    """
    named = report["schedule"]
    schedule = Schedule(
        named["dense_first_steps"], named["dense_last_steps"], named["dense_layers"]
    )
    layers, steps = len(report["layers"]), report["steps"]
    dense = sum(
        schedule.is_dense(layer, step, steps) for layer in range(layers) for step in range(steps)
    ) / (layers * steps)
    density = (report["density"] - dense) / (1 - dense) if dense < 1 else 1.0
    return Plan((Rule(build("random", {"density": min(max(density, 0.01), 1.0)})),), schedule)


def _joined(runs: Sequence[Measured]) -> Measured:
    return Measured(
        runs[-1].run,
        [run.seconds[0] for run in runs],
        [run.attention_ms[0] for run in runs],
        runs[-1].report,
    )


def _scores(model: str, prompt: str, clips: dict[str, Measured]) -> dict[str, Any] | None:
    """Return the embedded model's prompt score per clip; None for models it does not judge."""
    if model != "demo":
        return None
    return {name: score_clip(run.run.frames, prompt).to_dict() for name, run in clips.items()}


def _times(measured: Measured) -> dict[str, Any]:
    return {
        "seconds": measured.median_seconds,
        "attention_seconds": measured.median_attention_seconds,
        "all_seconds": measured.seconds,
    }


def _ratio(above: float, below: float) -> float | None:
    return above / below if below > 0 else None


def describe(plan: str | Path | Method | Plan) -> str:
    """Return what a report calls a plan: the method's name, or "plan"."""
    if isinstance(plan, str) and plan in METHODS:
        return plan
    if isinstance(plan, Plan):
        return "plan"
    return plan.name if isinstance(plan, Method) else str(plan)
