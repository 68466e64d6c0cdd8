"""FreeSwim: a clip far larger than the model was trained on, without training.

Native-size generation by the stock pipeline, upscaling, and SDEdit at the target size, in which
each token sees a window of the training size while a second lane with full attention supplies the
text attention, so that the window does not repeat what the prompt asks for.
Source: arXiv:2511.14712 and WillWu111/FreeSwim. Difference: the two lanes follow each other instead
of sharing a batch, which gives the same numbers and runs one lane where only one is needed.
"""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dittools.errors import InputError
from dittools.methods import Method
from dittools.methods.freeswim import FreeSwim, default_temperature
from dittools.patches.attach import Target, find_targets
from dittools.patches.lanes import LaneSettings, check_lanes, lane_plan
from dittools.patches.refining import Refining
from dittools.pipelines.generate import Settings
from dittools.pipelines.output import Frames
from dittools.pipelines.refine import Job, Refined
from dittools.pipelines.tail import Step
from dittools.plans import Plan

MODES = ("override", "window")


def freeswim(
    pipe: Any,
    prompt: str,
    *,
    height: int,
    width: int,
    native_height: int | None = None,
    native_width: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    strength: float = 0.7,
    flow_shift: float | None = None,
    cache_interval: int | None = 2,
    mode: str = "override",
    plan: str | Path | Method | Plan | None = None,
    video: Frames | torch.Tensor | None = None,
    negative_prompt: str | None = None,
    guidance: float | None = None,
    seed: int = 0,
    generator: torch.Generator | None = None,
    attn_temperature: float | None = None,
    cache_device: str | None = None,
    backend: str = "auto",
    note: Callable[[str], None] | None = None,
    progress: Step | None = None,
    **arguments: Any,
) -> Refined:
    """Return a clip at a size beyond the training one.

    Args:
        pipe: a stock video pipeline; it is left exactly as it was, also after an error.
        prompt: one prompt.
        height, width: pixels wanted; what is no multiple of the model's own is padded, then cut.
        native_height, native_width: pixels the model was trained on; None takes the clip's size
            when `video` is given, else the family's.
        frames: frames of the clip, None for the pipeline's default.
        steps: denoising steps of the whole schedule, None for the pipeline's default.
        strength: share of the steps that run at the target size, in (0, 1].
        flow_shift: of the schedule at the target size; None takes the family's published one, or
            else the pipeline's own.
        cache_interval: steps between two refreshes of the text attention; None refreshes it in
            every pass, with the second lane in the pass without the prompt as well.
        mode: "override", or "window" for the window alone: cheaper, but it repeats content.
        plan: for the self-attention of the second lane; None is full attention.
        video: [F, h, w, 3] in 0..1, to be refined instead of a clip generated at the native size.
        negative_prompt, guidance: as the pipeline takes them, in both stages.
        seed: of the first stage's noise; the second stage draws another from it.
        generator: instead of a seed, used by both stages in turn.
        attn_temperature: factor on the scores of self-attention; None as published, which is
            sqrt(log 2N / log N) for N native tokens in a frame.
        cache_device: where the text attention waits, such as "cpu"; None is the model's device.
        backend: name in `dittools.kernels.backend_names()`.
        note: gets one line on cost and memory before anything runs; None writes it to stderr.
        progress: called after every denoising step.
        **arguments: further arguments of the pipeline's call, in both stages.
    Raises:
        InputError: a size, strength, interval, mode or clip that cannot be used, or a pipeline
            that lacks what the mode needs.
        AttachError: a plan is attached already, or there is nothing to attach to.
    """
    _check_options(prompt, strength, cache_interval, mode, plan, arguments)
    targets = find_targets(pipe)
    facts = _facts(pipe, targets)
    clip = None if video is None else _as_frames(video)
    native = _native_size(pipe, facts, clip, native_height, native_width)
    _check_sizes(native, (height, width))
    tokens = (max(1, native[0] // facts.token(pipe)), max(1, native[1] // facts.token(pipe)))
    window = FreeSwim(tokens, attn_temperature=1.0)  # the lanes apply the factor themselves
    if attn_temperature is None:
        attn_temperature = default_temperature(*tokens) if tokens != (1, 1) else 1.0
    FreeSwim(tokens, attn_temperature=attn_temperature)  # refuses what is no factor
    full = None
    if mode == "override":
        full = Plan() if plan is None else lane_plan(pipe, plan)
    lanes = LaneSettings(window, full, attn_temperature, cache_interval, cache_device, backend)
    check_lanes(targets, lanes)
    base = Settings(
        prompt, negative_prompt, seed, _steps(pipe, steps), frames, *native, guidance=guidance
    )
    job = Job(pipe, targets, facts, base, (height, width), lanes, arguments)
    shift = facts.flow_shift if flow_shift is None else flow_shift
    return job.run(clip, strength, shift, generator, note or _say, progress)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _check_options(
    prompt: Any,
    strength: float,
    interval: Any,
    mode: str,
    plan: Any,
    arguments: dict[str, Any],
) -> None:
    if mode not in MODES:
        raise InputError("unknown mode", expected=" or ".join(MODES), got=repr(mode))
    if not isinstance(prompt, str) or arguments.get("num_videos_per_prompt", 1) != 1:
        raise InputError(
            "FreeSwim makes one clip at a time",
            expected="one prompt, a string",
            got=f"{type(prompt).__name__}, {arguments.get('num_videos_per_prompt', 1)} clips each",
            remedy="a call per clip",
        )
    if (
        isinstance(strength, bool)
        or not isinstance(strength, (int, float))
        or not 0 < strength <= 1
    ):
        raise InputError("strength is not usable", expected="in (0, 1]", got=repr(strength))
    if interval is not None and (type(interval) is not int or interval < 1):
        raise InputError(
            "cache_interval is not usable",
            expected="steps between refreshes, at least 1, or None for no cache",
            got=repr(interval),
        )
    if plan is not None and mode == "window":
        raise InputError(
            "a plan is for the second lane, which mode='window' does not run",
            remedy="mode='override', or dittools.attach for a plan on its own",
        )
    taken = {"latents", "output_type", "prompt_embeds", "negative_prompt_embeds"} & {*arguments}
    if taken:
        raise InputError(f"FreeSwim sets {', '.join(sorted(taken))} itself", remedy="leave it out")


def _facts(pipe: Any, targets: list[Target]) -> Refining:
    facts = targets[0].family.refining
    if facts is None:
        raise InputError(
            f"nobody wrote down how {type(pipe).__name__} encodes a clip to refine",
            expected="Wan, LTX-Video, CogVideoX or HunyuanVideo",
            remedy="register_family with refining=Refining(...)",
        )
    return facts


def _native_size(
    pipe: Any, facts: Refining, clip: Frames | None, height: int | None, width: int | None
) -> tuple[int, int]:
    """Return the size the window is taken from and the first stage runs at."""
    known = (clip.shape[1], clip.shape[2]) if clip is not None else _trained_on(pipe, facts)
    found = (known[0] if height is None else height, known[1] if width is None else width)
    if not all(type(side) is int and side > 0 for side in found):
        raise InputError(
            f"the training size of {type(pipe).__name__} is not known",
            got=f"{found[0]}x{found[1]}",
            remedy="native_height= and native_width= in pixels",
        )
    return found


def _trained_on(pipe: Any, facts: Refining) -> tuple[int, int]:
    from dittools.pipelines.demo import DEFAULT_HEIGHT, DEFAULT_WIDTH, WEIGHTS

    if str(getattr(pipe, "name_or_path", "")) == str(WEIGHTS):
        return DEFAULT_HEIGHT, DEFAULT_WIDTH
    return facts.native(pipe)


def _check_sizes(native: tuple[int, int], wanted: tuple[int, int]) -> None:
    for name, small, large in zip(("height", "width"), native, wanted, strict=True):
        if type(large) is not int or large < small:
            raise InputError(
                f"{name} is below the native size, where FreeSwim has nothing to do",
                expected=f"at least {small} pixels",
                got=repr(large),
                remedy=f"a larger {name}, or native_{name}= if the model was trained on less",
            )


def _steps(pipe: Any, steps: int | None) -> int:
    if steps is not None:
        return steps
    known = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    if known is None or not isinstance(known.default, int):
        raise InputError(f"{type(pipe).__name__} has no default for steps", remedy="steps=")
    return known.default


def _as_frames(video: Any) -> Frames:
    """Return float32 [F, h, w, 3]."""
    clip = np.asarray(video, dtype=np.float32)
    if clip.ndim != 4 or clip.shape[3] != 3 or 0 in clip.shape or not np.isfinite(clip).all():
        raise InputError(
            "video is not usable", expected="[F, h, w, 3], finite, in 0..1", got=str(clip.shape)
        )
    return clip
