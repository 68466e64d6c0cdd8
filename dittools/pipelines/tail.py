"""The last part of a stock pipeline's schedule: SDEdit without a pipeline of its own."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dittools.errors import AttachError, InputError
from dittools.grid import TokenGrid
from dittools.patches.attach import Target
from dittools.pipelines.generate import Settings, generate
from dittools.pipelines.output import Frames

Step = Callable[[str, int, int], None]  # (what, steps done, steps in all)


def tail_of(
    scheduler: Any, steps: int, strength: float, shift: float | None, *, round_up: bool = False
) -> tuple[Any, int]:
    """Return a scheduler that only runs the last part of its schedule, and the first step it runs.

    Args:
        scheduler: of the pipeline; left alone, the result is another of its kind.
        steps: of the whole schedule.
        strength: share of the schedule that runs, in whole steps as diffusers rounds it.
        shift: of flow-matching sigmas, None for the scheduler's own.
        round_up: a part of a step runs whole, as in diffusers' Flux pipelines; its video pipelines
            leave it out.
    Raises:
        InputError: no step is left, or the scheduler has no shift.
    """
    if round_up:
        first = int(max(steps - steps * strength, 0))
    else:
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


def fresh_noise(like: torch.Tensor, seed: int, generator: torch.Generator | None) -> torch.Tensor:
    """Return noise that the first stage did not use, drawn on the generator's device.

    It is the same on every device; without a generator a seed drawn from `seed` starts one.
    """
    if generator is None:
        first = torch.Generator().manual_seed(seed)
        fresh = int(torch.randint(2**62, (1,), generator=first))
        generator = torch.Generator().manual_seed(fresh)
    noise = torch.randn(like.shape, generator=generator, device=generator.device)
    return noise.to(like)


def enlarged(
    clip: Frames, wanted: tuple[int, int], padded: tuple[int, int], *, bicubic: bool = False
) -> torch.Tensor:
    """Return [1, 3, F, H, W] in -1..1: a clip at the wanted size, its edge repeated up to `padded`.

    Args:
        clip: [F, h, w, 3] in 0..1.
        wanted: (height, width) to enlarge to.
        padded: (H, W), no smaller.
        bicubic: with the filter of Pillow's resize; else bilinear.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(clip)).permute(0, 3, 1, 2)
    if bicubic:  # with antialias torch uses Pillow's coefficients
        pixels = F.interpolate(pixels, wanted, mode="bicubic", antialias=True).clamp(0, 1)
    else:
        pixels = F.interpolate(pixels, wanted, mode="bilinear", align_corners=False)
    below, right = padded[0] - wanted[0], padded[1] - wanted[1]
    pixels = F.pad(pixels, (0, right, 0, below), mode="replicate")
    return (pixels * 2 - 1).transpose(0, 1)[None]


def told(progress: Step | None, what: str, total: int | None = None) -> Any:
    """Return a callback for one stage's steps, None without `progress`."""
    if progress is None:
        return None
    return lambda done, whole: progress(what, done, total or whole)


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
