"""AuraFlow: joint attention over [registers, text, image]."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dittools.patches.adapters import Family, Layout, argument, image_grid, register_family


def layout(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> Layout:
    """Read [B, C, H, W] latents; learned registers stand before the text and count as text."""
    registers: Any = denoiser.register_tokens
    text = argument(arguments, "encoder_hidden_states").shape[1] + registers.shape[1]
    return Layout((replace(image_grid(arguments, denoiser), text_before=text),))


FAMILY = register_family(
    Family(
        "auraflow",
        ("AuraFlowTransformer2DModel",),
        (r"joint_transformer_blocks\.\d+\.attn", r"single_transformer_blocks\.\d+\.attn"),
        layout,
        batched=("uncond", "cond"),
    )
)
