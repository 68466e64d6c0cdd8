"""Run a pipeline once with fixed seed, and hand back frames and time."""

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from dittools.errors import InputError
from dittools.pipelines.output import Frames

Progress = Callable[[int, int], None]  # (steps done, steps in all)


@dataclass(frozen=True)
class Settings:
    """What to generate; None leaves the pipeline's own default.

    Attributes:
        prompt: the text.
        negative_prompt: text to steer away from.
        seed: of the initial noise, drawn on the CPU so that it is the same on every device.
        steps: denoising steps.
        frames: frames wanted in the clip; 1 for an image.
        height: pixels.
        width: pixels.
        guidance: classifier-free guidance scale.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    steps: int | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no pipeline can run."""
        for name in ("steps", "frames", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is not usable", expected="at least 1", got=str(value))
        if not -(2**63) <= self.seed < 2**64:
            raise InputError("seed is not usable", expected="64 bits", got=str(self.seed))
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise InputError("guidance is not usable", expected="a number", got=str(self.guidance))

    def to_dict(self) -> dict[str, object]:
        """Return the fields as JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """One generation: frames [F, H, W, 3] in 0..1 and the wall time of the whole pipeline call."""

    frames: Frames
    seconds: float


def generate(
    pipe: Any,
    settings: Settings,
    progress: Progress | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Run:
    """Return the frames a stock pipeline makes for some settings.

    Args:
        pipe: any diffusers pipeline; called unchanged, with the arguments it accepts.
        settings: what to generate.
        progress: called after every denoising step, where the pipeline offers a callback.
        extra: further arguments of the pipeline's call; they go before the settings.
    Raises:
        InputError: the pipeline refuses the size, takes no prompt, or returns NaN frames.
    """
    arguments = {**call_arguments(pipe, settings), **(extra or {})}
    total = settings.steps or int(arguments.get("num_inference_steps", 0))
    check_size(pipe, settings)
    accepted = inspect.signature(type(pipe).__call__).parameters
    unknown = [name for name in extra or () if name not in accepted]
    if unknown:
        raise InputError(f"{type(pipe).__name__} takes no {', '.join(unknown)}")
    if progress is not None and "callback_on_step_end" in accepted:

        def after_step(_pipe: Any, step: int, _time: Any, state: dict[str, Any]) -> dict[str, Any]:
            progress(step + 1, total)
            return state

        arguments["callback_on_step_end"] = after_step
    start = time.perf_counter()
    with torch.inference_mode(False), torch.no_grad(), _without_rounding_note(pipe):
        try:
            output = pipe(**arguments)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the pipeline refuses these settings: {error}") from error
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    frames = _frames(output)
    if not np.isfinite(frames).all():
        bad = int(np.argwhere(~np.isfinite(frames))[0][0])
        raise InputError(
            f"the pipeline returned NaN or infinite pixels, first in frame {bad}",
            remedy="a wider dtype for the denoiser or the VAE, or `--method dense` to compare",
        )
    return Run(frames, seconds)


def call_arguments(pipe: Any, settings: Settings) -> dict[str, Any]:
    """Return the keyword arguments of `pipe(...)`, spelled as that pipeline spells them."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    if "prompt" not in accepted:
        raise InputError(f"{type(pipe).__name__} takes no prompt: nothing to generate from")
    wanted: dict[str, Any] = {
        "prompt": settings.prompt,
        "negative_prompt": settings.negative_prompt,
        "num_inference_steps": settings.steps,
        "height": settings.height,
        "width": settings.width,
        "guidance_scale": settings.guidance,
    }
    if settings.frames is not None and "num_frames" in accepted:
        wanted["num_frames"] = frames_argument(pipe, settings.frames)
    elif settings.frames not in (None, 1):
        raise InputError(
            f"{type(pipe).__name__} makes images", expected="--frames 1", got=str(settings.frames)
        )
    arguments = {name: value for name, value in wanted.items() if value is not None}
    unknown = [name for name in arguments if name not in accepted]
    if unknown:
        raise InputError(f"{type(pipe).__name__} takes no {', '.join(unknown)}")
    if "use_resolution_binning" in accepted and not _has_bins(pipe):
        arguments["use_resolution_binning"] = False
    arguments["generator"] = torch.Generator("cpu").manual_seed(settings.seed)
    arguments["output_type"] = "np"
    return arguments


def _has_bins(pipe: Any) -> bool:
    """Whether PixArt and Sana know standard sizes for this model: they do for a few sample sizes.

    For a model of another sample size they refuse to run unless told not to look for one.
    """
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    return getattr(config, "sample_size", None) in (16, 32, 64, 128, 256)


def check_size(pipe: Any, settings: Settings) -> None:
    """Raise InputError when a clip has more places along an axis than the model has positions."""
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    most = getattr(config, "rope_max_seq_len", None)
    if config is None or most is None:
        return
    in_time, in_space = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
    limits = (
        ("frames", (most * config.patch_size[0] - 1) * in_time + 1),
        ("height", most * in_space * config.patch_size[1]),
        ("width", most * in_space * config.patch_size[2]),
    )
    for name, limit in limits:
        value = getattr(settings, name)
        if value is not None and value > limit:
            raise InputError(
                f"{name} is too large for this model", expected=f"at most {limit}", got=str(value)
            )


def frames_argument(pipe: Any, frames: int) -> int:
    """Return the num_frames that makes a pipeline produce `frames` frames.

    diffusers' Wan pipeline rounds num_frames to n * factor + 1; with a temporal factor of 1 that
    adds a frame to whatever is asked for.
    """
    factor = getattr(pipe, "vae_scale_factor_temporal", None)
    is_wan = type(pipe).__name__.startswith("Wan")
    return max(frames - 1, 0) if is_wan and factor == 1 else frames


@contextmanager
def _without_rounding_note(pipe: Any) -> Iterator[None]:
    """Drop the warning that num_frames - 1 "has to be divisible by 1".

    diffusers' Wan pipeline gives it for every number of frames where the temporal factor is 1.
    """
    log = logging.getLogger(type(pipe).__module__)

    def keep(record: logging.LogRecord) -> bool:
        return "has to be divisible by 1." not in record.getMessage()

    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)


def _frames(output: Any) -> Frames:
    """Return [F, H, W, 3] of the first clip or of the first image."""
    clips = getattr(output, "frames", None)
    if clips is not None:
        frames = np.asarray(clips[0], dtype=np.float32)
    else:
        frames = np.asarray(output.images, dtype=np.float32)[:1]
    return frames
