"""Lumina-Image 2: joint attention over [valid text, image, padding]; the text differs per row."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dittools.patches.adapters import Family, Layout, argument, image_grid, register_family


def layout(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> Layout:
    """Read [B, C, H, W] latents and how many prompt tokens of each row are valid."""
    image = image_grid(arguments, denoiser)
    lengths = argument(arguments, "encoder_attention_mask").sum(dim=1).tolist()
    rows = tuple(replace(image, text_before=int(length)) for length in lengths)
    return Layout(rows[:1] if len(set(rows)) == 1 else (), rows=rows)


FAMILY = register_family(
    Family(
        "lumina2",
        ("Lumina2Transformer2DModel",),
        (r"layers\.\d+\.attn",),
        layout,
        branches=("cond", "uncond"),
    )
)
