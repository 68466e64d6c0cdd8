"""Qwen-Image and its editing models: joint attention over [text, image, reference images]."""

from collections.abc import Mapping
from typing import Any

import torch

from dittools.grid import TokenGrid
from dittools.patches.adapters import Family, Layout, argument, register_family


def layout(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> Layout:
    """Read the (frames, height, width) of each image; the first one is made, the rest are given."""
    shapes = argument(arguments, "img_shapes")
    first = shapes[0]
    images = [first] if isinstance(first[0], int) else list(first)
    frames, height, width = (int(side) for side in images[0])
    others = sum(int(f) * int(h) * int(w) for f, h, w in images[1:])
    text = argument(arguments, "encoder_hidden_states").shape[1]
    grid = TokenGrid(frames, height, width, text, others)
    return Layout((grid,), streams=(text, grid.tokens + others))


FAMILY = register_family(
    Family(
        "qwen_image",
        ("QwenImageTransformer2DModel",),
        (r"transformer_blocks\.\d+\.attn",),
        layout,
        branches=("cond", "uncond"),
    )
)
