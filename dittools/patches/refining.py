"""What refining a clip at a size beyond the training one needs to know of a model family."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def _first_call(module: torch.nn.Module) -> int:
    return 0


@dataclass(frozen=True)
class Refining:
    """Facts of one family; every function gets the pipeline.

    Attributes:
        native: (height, width) in pixels the model was trained on.
        token: pixels along one side of a token.
        multiple: pixels that the pipeline's height and width must be multiples of.
        encode: latents as `pipe(latents=...)` takes them, of pixels [1, 3, F, H, W] in -1..1.
        flow_shift: of the schedule of the second stage as published, None for the pipeline's own.
        text_sites: regular expressions of the modules through which text enters by
            cross-attention, in execution order; empty where text and video share one sequence.
        text_call: which attention call of such a module is the text's, from 0.
    """

    native: Callable[[Any], tuple[int, int]]
    token: Callable[[Any], int]
    multiple: Callable[[Any], int]
    encode: Callable[[Any, torch.Tensor], torch.Tensor]
    flow_shift: float | None = None
    text_sites: tuple[str, ...] = ()
    text_call: Callable[[torch.nn.Module], int] = _first_call


def called_size(pipe: Any) -> tuple[int, int]:
    """Return the default (height, width) of a pipeline's call, 0 where it has none."""
    known = inspect.signature(type(pipe).__call__).parameters
    sides = [known[name].default if name in known else None for name in ("height", "width")]
    height, width = (side if isinstance(side, int) else 0 for side in sides)
    return height, width


def encoded(pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Return the most likely latents of pixels, float32, not normalised."""
    mode: torch.Tensor = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist.mode()
    return mode.float()
