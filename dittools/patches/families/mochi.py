"""Mochi: joint attention over [video, valid text], one row of the batch at a time."""

from collections.abc import Mapping
from typing import Any

import torch

from dittools.grid import TokenGrid
from dittools.patches.adapters import Family, Layout, argument, patch_of, patched, register_family


def layout(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> Layout:
    """Read [B, C, F, H, W] latents; padded prompt tokens never reach the attention call."""
    frames, height, width = argument(arguments, "hidden_states").shape[2:]
    patch = patch_of(denoiser)
    grid = TokenGrid(frames, patched(height, patch), patched(width, patch))
    return Layout((grid,), text_up_to=argument(arguments, "encoder_hidden_states").shape[1])


FAMILY = register_family(
    Family(
        "mochi",
        ("MochiTransformer3DModel",),
        (r"transformer_blocks\.\d+\.attn1",),
        layout,
        batched=("uncond", "cond"),
    )
)
