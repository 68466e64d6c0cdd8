"""Stable Diffusion 3 and 3.5: joint attention over [image, text]; `attn2` is image only."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dittools.patches.adapters import Family, Layout, argument, image_grid, register_family


def layout(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> Layout:
    """Read [B, C, H, W] latents and the text length."""
    image = image_grid(arguments, denoiser)
    text = argument(arguments, "encoder_hidden_states").shape[1]
    joint = replace(image, text_after=text)
    return Layout((joint,), by_path=((r".*\.attn2", (image,)),))


FAMILY = register_family(
    Family(
        "sd3",
        ("SD3Transformer2DModel",),
        (r"transformer_blocks\.\d+\.attn2?",),
        layout,
        batched=("uncond", "cond"),
        unguided=(r".*\.attn2",),  # so that a layer is a block, in 3 and 3.5 alike
    )
)
