"""PixArt alpha and sigma: image tokens only in self-attention, text by cross-attention."""

from collections.abc import Mapping
from typing import Any

import torch

from dittools.patches.adapters import Family, Layout, image_grid, register_family


def layout(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> Layout:
    """Read [B, C, H, W] latents."""
    return Layout((image_grid(arguments, denoiser),))


FAMILY = register_family(
    Family(
        "pixart",
        ("PixArtTransformer2DModel",),
        (r"transformer_blocks\.\d+\.attn1",),
        layout,
        batched=("uncond", "cond"),
    )
)
