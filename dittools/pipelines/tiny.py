"""Toy pipelines: real diffusers classes, random weights, no download; for trying out."""

from collections.abc import Callable
from typing import Any

import torch

from dittools.errors import InputError
from dittools.pipelines import tiny_image, tiny_video

TINY: dict[str, Callable[[], Any]] = {**tiny_video.BUILDERS, **tiny_image.BUILDERS}
_CALLS: dict[str, dict[str, Any]] = {**tiny_video.CALLS, **tiny_image.CALLS}
PROMPT = "a red circle moving left"


def build(name: str) -> Any:
    """Return the toy pipeline of a family, on the CPU, the same weights every time.

    Raises:
        InputError: no such name.
    """
    _check(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = TINY[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)  # T5 dropout would make runs differ
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_arguments(name: str) -> dict[str, Any]:
    """Return arguments of a quick call of a toy pipeline; tensors out, no generator."""
    _check(name)
    return {"prompt": PROMPT, "num_inference_steps": 4, "output_type": "pt", **_CALLS[name]}


def settings_for(name: str) -> dict[str, Any]:
    """Return the same call in the words of `dittools generate`."""
    call = call_arguments(name)
    names = {
        "prompt": "prompt",
        "num_inference_steps": "steps",
        "num_frames": "frames",
        "height": "height",
        "width": "width",
        "guidance_scale": "guidance",
    }
    return {names[key]: value for key, value in call.items() if key in names}


def _check(name: str) -> None:
    if name not in TINY:
        raise InputError(
            "unknown tiny pipeline", expected=f"one of {', '.join(TINY)}", got=repr(name)
        )
