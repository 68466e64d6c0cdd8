"""Sana: linear self-attention, which has no query-key pairs to drop."""

from collections.abc import Mapping
from typing import Any

import torch

from dittools.patches.adapters import Family, Layout, image_grid, register_family


def layout(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> Layout:
    """Read [B, C, H, W] latents."""
    return Layout((image_grid(arguments, denoiser),))


FAMILY = register_family(
    Family(
        "sana",
        ("SanaTransformer2DModel",),
        (r"transformer_blocks\.\d+\.attn1",),
        layout,
        blocked=(
            "its self-attention is linear (no softmax over query-key pairs), so there is nothing "
            "to make sparse; only cross-attention to the text is softmax attention"
        ),
    )
)
