"""Stable Diffusion 1, 2 and XL UNets: image self-attention at several resolutions."""

from collections.abc import Mapping
from typing import Any

import torch

from dittools.grid import TokenGrid
from dittools.patches.adapters import Family, Layout, argument, register_family

_LEVELS = 8


def layout(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> Layout:
    """Halve the [B, C, H, W] sample level by level; a site is placed by its token count."""
    height, width = argument(arguments, "sample").shape[-2:]
    grids = []
    for _ in range(_LEVELS):
        grids.append(TokenGrid(1, int(height), int(width)))
        height, width = -(-height // 2), -(-width // 2)
    return Layout(tuple(dict.fromkeys(grids)), levels=True)


_INSIDE = r".*attentions\.\d+\.transformer_blocks\.\d+\.attn1"

FAMILY = register_family(
    Family(
        "unet",
        ("UNet2DConditionModel",),
        (rf"down_blocks\.{_INSIDE}", rf"mid_block\.{_INSIDE}", rf"up_blocks\.{_INSIDE}"),
        layout,
        batched=("uncond", "cond"),
    )
)
