"""CogVideoX 2B, 5B and 1.5: joint attention over [text, video]."""

from collections.abc import Mapping
from typing import Any

import torch

from dittools.grid import TokenGrid
from dittools.patches.adapters import Family, Layout, argument, patch_of, patched, register_family


def layout(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> Layout:
    """Read [B, F, C, H, W] latents; only 1.5 has patches in time."""
    _, frames, _, height, width = argument(arguments, "hidden_states").shape
    patch = patch_of(denoiser)
    time = getattr(denoiser.config, "patch_size_t", None) or 1
    sizes = patched(frames, time), patched(height, patch), patched(width, patch)
    text = argument(arguments, "encoder_hidden_states").shape[1]
    return Layout((TokenGrid(*sizes, text_before=text),))


def variant(denoiser: torch.nn.Module, components: Mapping[str, Any]) -> str:
    """1.5 is told by its patches in time."""
    return "cogvideox15" if getattr(denoiser.config, "patch_size_t", None) else ""


FAMILY = register_family(
    Family(
        "cogvideox",
        ("CogVideoXTransformer3DModel",),
        (r"transformer_blocks\.\d+\.attn1",),
        layout,
        batched=("uncond", "cond"),
        variant=variant,
    )
)
