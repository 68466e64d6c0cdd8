"""The last part of a stock pipeline's schedule: SDEdit without a pipeline of its own."""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dittools.errors import AttachError, InputError
from dittools.grid import TokenGrid
from dittools.patches.attach import Target
from dittools.pipelines.generate import Settings, generate


def tail_of(scheduler: Any, steps: int, strength: float, shift: float | None) -> tuple[Any, int]:
    """Return a scheduler that only runs the last part of its schedule, and the first step it runs.

    Args:
        scheduler: of the pipeline; left alone, the result is another of its kind.
        steps: of the whole schedule.
        strength: share of the schedule that runs, rounded as diffusers rounds it.
        shift: of flow-matching sigmas, None for the scheduler's own.
    Raises:
        InputError: no step is left, or the scheduler has no shift.
    """
    first = steps - min(int(steps * strength), steps)
    if first == steps:
        raise InputError(
            "strength leaves no step to run",
            expected=f"at least {1 / steps:.3g} for {steps} steps",
            got=str(strength),
        )
    twin = type(scheduler).from_config(scheduler.config, **_shifted(scheduler, shift))
    whole = twin.set_timesteps

    @functools.wraps(whole)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        whole(*args, **kwargs)
        skipped = first * getattr(twin, "order", 1)
        twin.timesteps = twin.timesteps[skipped:]
        if getattr(twin, "sigmas", None) is not None:
            twin.sigmas = twin.sigmas[skipped:]

    twin.set_timesteps = set_timesteps
    return twin, first


@contextmanager
def standing_in(pipe: Any, scheduler: Any) -> Iterator[None]:
    """Give a pipeline another scheduler for a while; its own comes back whatever happens."""
    stock = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = stock


def _shifted(scheduler: Any, shift: float | None) -> dict[str, Any]:
    if shift is None:
        return {}
    name = next((n for n in ("flow_shift", "shift") if n in scheduler.config), None)
    if name is None:
        raise InputError(f"{type(scheduler).__name__} has no flow shift", remedy="no flow_shift")
    fixed = {"use_dynamic_shifting": False} if "use_dynamic_shifting" in scheduler.config else {}
    return {name: shift, **fixed}


def add_noise(scheduler: Any, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return latents as noisy as the first timestep of a schedule that is set expects them."""
    start = scheduler.timesteps[:1]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # timesteps may repeat, so a look-up could find another
    if hasattr(scheduler, "add_noise"):
        noisy: torch.Tensor = scheduler.add_noise(latents, noise, start)
    else:
        noisy = scheduler.scale_noise(latents, start, noise)
    return noisy


@dataclass(frozen=True)
class Scouted:
    """What the first forward of a run will look like.

    Attributes:
        grid: geometry of its tokens.
        rows: of its batch.
        steps: timesteps that will run.
        dtype: of the latents the denoiser gets.
    """

    grid: TokenGrid
    rows: int
    steps: int
    dtype: torch.dtype


class _Seen(Exception):
    """Ends a run at its first forward."""


def scout(pipe: Any, targets: list[Target], settings: Settings, extra: dict[str, Any]) -> Scouted:
    """Return what a run would start with, by starting it and stopping before the first forward.

    The pipeline refuses what it refuses here already; its scheduler is left with the schedule set.

    Raises:
        InputError: the pipeline refuses the settings, or calls none of its denoisers.
    """
    found: list[Scouted] = []

    def look(target: Target) -> Any:
        def hook(denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = inspect.signature(type(denoiser).forward).bind_partial(
                denoiser, *args, **kwargs
            )
            layout = target.family.layout(bound.arguments, denoiser)
            latents = bound.arguments["hidden_states"]
            steps = len(pipe.scheduler.timesteps)
            found.append(Scouted(layout.grids[0], len(latents), steps, latents.dtype))
            raise _Seen

        return target.denoiser.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [look(target) for target in targets]
    bar = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        generate(pipe, settings, extra=extra)
    except _Seen:
        return found[0]
    finally:
        for handle in handles:
            handle.remove()
        if bar is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = bar
    raise AttachError(f"{type(pipe).__name__} made a clip without calling its denoiser")
