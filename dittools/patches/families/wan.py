"""Wan 2.1 and 2.2: video tokens only in self-attention, text and image by cross-attention."""

from collections.abc import Mapping
from typing import Any

import torch

from dittools.grid import TokenGrid
from dittools.patches.adapters import (
    Family,
    Layout,
    argument,
    patch_of,
    patched,
    register_family,
)


def layout(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> Layout:
    """Read [B, C, F, H, W] latents; VACE control blocks see the same grid."""
    latents = argument(arguments, "hidden_states")
    sizes = zip(latents.shape[2:], patch_of(denoiser), strict=True)
    return Layout((TokenGrid(*(patched(size, patch) for size, patch in sizes)),))


def variant(denoiser: torch.nn.Module, components: Mapping[str, Any]) -> str:
    """Two transformers, or the patch of the 5B model, mean Wan 2.2."""
    return "wan22" if components.get("transformer_2") is not None else ""


FAMILY = register_family(
    Family(
        name="wan",
        denoisers=("WanTransformer3DModel", "WanVACETransformer3DModel"),
        # VACE runs its control blocks first, but published layer counts mean the main blocks
        sites=(r"blocks\.\d+\.attn1", r"vace_blocks\.\d+\.attn1"),
        layout=layout,
        branches=("cond", "uncond"),
        variant=variant,
    )
)
