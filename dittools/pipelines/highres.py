"""High-resolution images in rungs: a base image as the model knows it, then CLEAR image-to-image.

Each rung enlarges the image, adds noise and runs the last part of the schedule with every image
token looking at a disk of image tokens and at all text; attention then grows with the pixels, not
with their square.
Source: arXiv:2412.16112 and the inference notebook of Huage001/CLEAR (steps, strength, guidance,
NTK factor, schedule, proportional attention). Difference: the image is encoded as its most likely
latents, the notebook draws them.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dittools.errors import AttachError, InputError
from dittools.methods import Method
from dittools.methods.clear import Clear
from dittools.methods.clear_weights import spatial_weights
from dittools.patches.attach import Target, find_targets
from dittools.patches.install import root_of
from dittools.pipelines.generate import Settings
from dittools.pipelines.output import Frames
from dittools.pipelines.rungs import Climb, Enlarged, Recipe, Weights, token
from dittools.pipelines.tail import Step
from dittools.plans import Plan
from dittools.plans.plan import Rule
from dittools.reading import MOST_TENSORS, check_file


def highres(
    pipe: Any,
    prompt: str,
    *,
    height: int,
    width: int,
    native_height: int | None = None,
    native_width: int | None = None,
    image: Frames | torch.Tensor | None = None,
    radius: float = 32.0,
    down_factor: int = 0,
    weights: Weights | str | Path | None = None,
    plan: str | Path | Method | Plan | None = None,
    recipe: Recipe | None = None,
    base_steps: int = 20,
    base_guidance: float | None = 3.5,
    seed: int = 0,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    note: Callable[[str], None] | None = None,
    progress: Step | None = None,
    **arguments: Any,
) -> Enlarged:
    """Return an image at a size beyond the training one.

    Args:
        pipe: a stock Flux.1 text-to-image pipeline; left exactly as it was, also after an error.
        prompt: one prompt.
        height, width: pixels wanted; what is no multiple of the model's own is padded, then cut.
        native_height, native_width: pixels of the base image; None keeps the proportions wanted
            and gives the longer side the training size.
        image: [h, w, 3] in 0..1, to be enlarged instead of a base image generated at native size.
        radius: of the disk, in tokens, or below 1 a share of the longer side. 8, 16 and 32 have
            published weights; without them wide disks stay nearer to the model.
        down_factor: side of the cells whose mean key and value all image tokens also see; 0 for
            none. With weights of a down-sampled variant it follows from them.
        weights: a published state dict or its safetensors file, in place for the rungs only.
        plan: for the attention of the rungs instead of CLEAR: a method, plan or plan file.
        recipe: steps, strength and the like; None as published.
        base_steps, base_guidance: of the base image, whose attention is the model's own.
        seed: of the base image's noise; every rung draws another from it.
        generator: instead of a seed, used by all stages in turn.
        backend: name in `dittools.kernels.backend_names()`.
        note: gets one line before each rung.
        progress: called after every denoising step.
        **arguments: further arguments of the pipeline's call, in all stages.
    Raises:
        InputError: a size, option or image that cannot be used, or a pipeline that is none of
            Flux.1 text-to-image.
        AttachError: a plan is attached already.
    """
    recipe = recipe or Recipe()
    target = _target(pipe)
    _check_options(prompt, arguments, plan, weights)
    given = None if image is None else _as_image(image)
    state = _loaded(weights)
    if plan is None:
        chosen: Any = clear_plan(target, state, radius, down_factor)
    else:
        chosen = plan
    cell = max((_down_factor(rule.method) for rule in getattr(chosen, "rules", ())), default=0)
    unit = token(pipe) * max(cell, 1)
    native = _native(pipe, given, (height, width), native_height, native_width)
    base = Settings(prompt, None, seed, base_steps, None, *native, guidance=base_guidance)
    climb = Climb(pipe, target, recipe, chosen, state, unit, backend, arguments)
    return climb.run(base, given, (height, width), generator, note or _quiet, progress)


def clear_plan(
    target: Target, weights: Weights | None, radius: float, down_factor: int = 0
) -> Plan:
    """Return CLEAR with proportional attention, each layer with the cell weights it was given.

    Raises:
        InputError: cell weights for another number of layers, or for another cell.
    """
    spatial = [] if weights is None else spatial_weights(weights)
    if not spatial:
        local = Clear(radius, down_factor=down_factor, proportional=True)
        return Plan.of(replace(local, fine_tuned=weights is not None))
    if len(spatial) != len(target.paths):
        raise InputError(
            "the cell weights do not fit this transformer",
            expected=f"{len(target.paths)} of them, one per block",
            got=str(len(spatial)),
        )
    side = math.isqrt(len(spatial[0]))
    if down_factor not in (0, side):
        raise InputError(
            "down_factor differs from the weights", expected=str(side), got=str(down_factor)
        )
    method = Clear(radius, down_factor=side, proportional=True, fine_tuned=True)
    rules = (
        Rule(replace(method, spatial_weights=cell), layers=(n,)) for n, cell in enumerate(spatial)
    )
    return Plan(tuple(rules))


def _target(pipe: Any) -> Target:
    """Return the transformer of a pipeline that the recipe can run on."""
    targets = find_targets(pipe)
    name = type(pipe).__name__
    denoiser = targets[0].denoiser
    known = set(inspect.signature(type(pipe).__call__).parameters)
    fits = targets[0].family.name == "flux" and hasattr(pipe, "_pack_latents")
    if not fits or "latents" not in known or known & {"strength", "image", "control_image"}:
        raise InputError(
            f"the recipe does not run on {name}",
            expected="a Flux.1 text-to-image pipeline, such as FluxPipeline",
            got=f"{name} of {type(denoiser).__name__}",
        )
    if root_of(denoiser) is not None:
        raise AttachError(
            "a plan is attached to this pipeline, and the recipe brings its own",
            remedy="dittools.detach(pipe), then hand the plan over as plan=",
        )
    return targets[0]


def _check_options(prompt: Any, arguments: dict[str, Any], plan: Any, weights: Any) -> None:
    if not isinstance(prompt, str) or arguments.get("num_images_per_prompt", 1) != 1:
        count = arguments.get("num_images_per_prompt", 1)
        raise InputError(
            "the recipe makes one image at a time",
            expected="one prompt, a string",
            got=f"{type(prompt).__name__}, {count} images each",
            remedy="a call per image",
        )
    taken = {"latents", "output_type", "sigmas", "prompt_embeds", "timesteps"} & {*arguments}
    if taken:
        raise InputError(
            f"the recipe sets {', '.join(sorted(taken))} itself", remedy="leave it out"
        )
    if plan is not None and weights is not None:
        raise InputError(
            "the weights were made for CLEAR's own mask", remedy="weights without plan="
        )


def _native(
    pipe: Any,
    image: Frames | None,
    wanted: tuple[int, int],
    height: int | None,
    width: int | None,
) -> tuple[int, int]:
    """Return the size of the base image, never larger than what is wanted."""
    for name, side in (("height", wanted[0]), ("width", wanted[1])):
        if type(side) is not int or side < 1:
            raise InputError(f"{name} is not usable", expected="whole pixels", got=repr(side))
    unit = token(pipe)
    longest = int(pipe.default_sample_size * pipe.vae_scale_factor)
    shrink = longest / max(wanted)
    likely = [max(unit, round(side * shrink / unit) * unit) for side in wanted]
    if image is not None:
        likely = [image.shape[0], image.shape[1]]
    found = (likely[0] if height is None else height, likely[1] if width is None else width)
    small = all(type(side) is int and side > 0 for side in found)
    below = small and found[0] <= wanted[0] and found[1] <= wanted[1]
    if not below or found == wanted:
        raise InputError(
            "the size wanted is not above the base image's",
            expected=f"more than {found[0]}x{found[1]} pixels",
            got=f"{wanted[0]}x{wanted[1]}",
            remedy="the pipeline itself at this size, or native_height= and native_width=",
        )
    return found


def _as_image(image: Any) -> Frames:
    found = np.asarray(image, dtype=np.float32)
    if found.ndim != 3 or found.shape[2] != 3 or 0 in found.shape or not np.isfinite(found).all():
        raise InputError(
            "image is not usable", expected="[h, w, 3], finite, in 0..1", got=str(found.shape)
        )
    return found


def _loaded(weights: Weights | str | Path | None) -> Weights | None:
    """Return a state dict, read from a file where a path is given."""
    if weights is None or isinstance(weights, Mapping):
        return weights
    from safetensors.torch import load_file

    try:
        check_file(weights, MOST_TENSORS)
        found: Weights = load_file(str(weights))
        return found
    except Exception as error:  # the reader has an error type per kind of damage
        raise InputError(
            f"cannot read weights from {weights}",
            expected="a clear_*.safetensors file",
            got=(str(error).splitlines() or [type(error).__name__])[0],
        ) from error


def _down_factor(method: Any) -> int:
    return int(getattr(method, "down_factor", 0))


def _quiet(_: str) -> None:
    """Say nothing."""
