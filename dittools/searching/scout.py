"""The facts of a model at one size, read from one short generation before the search starts."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from dittools.call import AttentionCall
from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.metrics.latency import PartTimer
from dittools.patches import attach
from dittools.patches.attach import Target, find_targets, model_facts
from dittools.pipelines.generate import Settings, generate
from dittools.plans import ModelFacts, Plan, Rule

SCOUT_STEPS = 2


@dataclass(frozen=True)
class Facts:
    """What a search must know beforehand.

    Attributes:
        model: class, layers, heads, head_dim.
        grid: geometry of the main attention: the one with most pairs over all calls.
        steps: of one generation, as the scheduler counts them: some take more than are asked for.
        branches: forwards per step by name, in call order.
        step_seconds: wall time of one step, dense.
        fixed_seconds: wall time of a generation outside of its steps.
        attention_seconds: part of a step spent in attention that a plan can act on.
        dtype: of query, key and value.
        gains: per layer [H, D, D], what the output projection makes of a head's error.
    """

    model: ModelFacts
    grid: TokenGrid
    steps: int
    branches: tuple[str, ...]
    step_seconds: float
    fixed_seconds: float
    attention_seconds: float
    dtype: torch.dtype
    gains: list[torch.Tensor | None] = field(repr=False, default_factory=list)

    @property
    def seconds(self) -> float:
        """Wall time of one dense generation."""
        return self.fixed_seconds + self.steps * self.step_seconds

    @property
    def attention_share(self) -> float:
        """Part of a dense generation that is attention a plan can act on."""
        return self.steps * self.attention_seconds / self.seconds


class _Watcher:
    """A method that runs dense and notes the calls it sees."""

    name: ClassVar[str] = "watcher"

    def __init__(self) -> None:
        self.grids: dict[TokenGrid, int] = {}
        self.branches: dict[str, None] = {}
        self.dtype = torch.float32
        self.steps = 0

    def not_supported(self, call: AttentionCall) -> list[str]:
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        self.grids[call.grid] = self.grids.get(call.grid, 0) + 1
        self.branches[call.branch] = None
        self.steps = call.steps
        self.dtype = call.query.dtype
        return backend.dense(call)


def scout(pipe: Any, settings: Settings) -> Facts:
    """Return the facts of a pipeline at one size; runs three steps in all, the first to warm up.

    Shares come from one run: two runs may meet a machine that is busy in different ways.

    Raises:
        AttachError: nothing in the pipeline can be accelerated.
        InputError: no attention call came through, or the settings are refused.
    """
    targets = find_targets(pipe)
    target, steps = targets[0], settings.steps or 0
    short = replace(settings, steps=min(SCOUT_STEPS, steps))
    watcher = _Watcher()
    forwards: list[tuple[Any, str]] = [(each.denoiser, "forward") for each in targets]
    timer = PartTimer({"steps": forwards}, str(getattr(pipe, "device", "cpu")))
    with attach(pipe, Plan((Rule(watcher),)), check_finite=False, recorder=False) as handle:
        _warm_up(pipe, short)
        handle.reset()
        with timer.running():
            seconds = generate(pipe, short).seconds
        report = handle.report()
    if not watcher.grids:
        raise InputError(
            "no attention call could be watched",
            got="; ".join(report.fallbacks) or "no call at all",
            remedy="a size and pipeline that `dittools doctor` supports",
        )
    inside = min(timer.milliseconds()["steps"] / 1000, seconds)
    timed = watcher.steps or short.steps or 1
    per_step = max(inside, 1e-6) / timed
    return Facts(
        model=model_facts(target.denoiser, target.paths),
        grid=max(watcher.grids, key=lambda g: (watcher.grids[g] * g.total**2, g.total)),
        steps=timed + (steps - (short.steps or 1)) * _order(pipe),
        branches=tuple(watcher.branches),
        step_seconds=per_step,
        fixed_seconds=seconds - inside,
        attention_seconds=min(report.attention_ms / 1000 / timed, per_step),
        dtype=watcher.dtype,
        gains=output_gains(target),
    )


def _order(pipe: Any) -> int:
    """Return how many steps a scheduler takes for one more that is asked for: 2 for Heun."""
    return max(1, int(getattr(getattr(pipe, "scheduler", None), "order", 1)))


def _warm_up(pipe: Any, short: Settings) -> None:
    """Run one step, or as many as the timed run has where a schedule of one cannot be made.

    Raises:
        InputError: the run has one step only, and cannot be made.
    """
    try:
        generate(pipe, replace(short, steps=1))
    except ArithmeticError as error:  # Mochi's schedule divides by the steps of its second half
        if short.steps == 1:
            raise InputError(
                f"{type(pipe).__name__} cannot make a run of one step",
                got=str(error),
                remedy="more steps",
            ) from error
        generate(pipe, short)


def output_gains(target: Target) -> list[torch.Tensor | None]:
    """Return per layer [H, D, D] float32: W_h^T W_h of the output projection, None without one."""
    return [_gain(target.denoiser.get_submodule(path)) for path in target.paths]


def _gain(module: torch.nn.Module) -> torch.Tensor | None:
    projection = getattr(module, "to_out", None)
    if isinstance(projection, torch.nn.ModuleList):
        projection = projection[0]
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return None
    heads = int(module.heads)  # type: ignore[arg-type]
    if weight.shape[1] % heads:
        return None
    parts = weight.detach().float().unflatten(1, (heads, -1))
    return torch.einsum("ohd,ohe->hde", parts, parts)


def named_backend(pipe: Any, name: str) -> str:
    """Return the backend a search runs on: under "auto" the device's own, so that no call is
    silently turned dense because that would be faster.
    """
    if name != "auto":
        return name
    device = str(getattr(pipe, "device", "cpu")).split(":")[0]
    return {"cpu": "cpu", "cuda": "triton"}.get(device, "reference")


Note = Callable[[str], None]
