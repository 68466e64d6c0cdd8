"""Wan 2.1 and 2.2: video tokens only in self-attention, text and image by cross-attention."""

from collections.abc import Mapping
from typing import Any

import torch

from dittools.patches.adapters import Family, latent_video, register_family


def variant(denoiser: torch.nn.Module, components: Mapping[str, Any]) -> str:
    """Two transformers mean Wan 2.2."""
    return "wan22" if components.get("transformer_2") is not None else ""


FAMILY = register_family(
    Family(
        name="wan",
        denoisers=("WanTransformer3DModel", "WanVACETransformer3DModel"),
        # VACE runs its control blocks first, but published layer counts mean the main blocks
        sites=(r"blocks\.\d+\.attn1", r"vace_blocks\.\d+\.attn1"),
        layout=latent_video,  # VACE control blocks see the same grid
        branches=("cond", "uncond"),
        variant=variant,
    )
)
