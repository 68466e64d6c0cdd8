"""HunyuanVideo and 1.5: joint attention over [video, text, padding]."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from dittools.grid import TokenGrid
from dittools.patches.adapters import Family, Layout, argument, patch_of, patched, register_family
from dittools.patches.refining import Refining, called_size, encoded


def video(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> tuple[int, int, int]:
    """Read [B, C, F, H, W] latents; one patch size for both sides."""
    frames, height, width = argument(arguments, "hidden_states").shape[2:]
    side, time = patch_of(denoiser), patch_of(denoiser, "patch_size_t")
    return patched(frames, time), patched(height, side), patched(width, side)


def layout(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> Layout:
    """Count every prompt token; the key mask at the call drops the padded ones."""
    text = argument(arguments, "encoder_hidden_states").shape[1]
    return Layout((TokenGrid(*video(arguments, denoiser), text_after=text),))


def layout15(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> Layout:
    """Two text encoders and the image's tokens stand behind the video, valid ones first."""
    names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    parts = [arguments[name] for name in names if arguments.get(name) is not None]
    text = sum(int(part.shape[1]) for part in parts)
    return Layout((TokenGrid(*video(arguments, denoiser)),), text_up_to=text)


def token(pipe: Any) -> int:
    """Pixels along a side of the codec's block times the patch."""
    return int(pipe.vae_scale_factor_spatial * patch_of(pipe.transformer))


def multiple(pipe: Any) -> int:
    """Whole tokens, and the 16 the pipeline asks for."""
    return math.lcm(16, token(pipe))


def encode(pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
    """One factor for all channels."""
    return encoded(pipe, pixels) * float(pipe.vae.config.scaling_factor)


HUNYUAN_VIDEO = register_family(
    Family(
        "hunyuan_video",
        ("HunyuanVideoTransformer3DModel",),
        (r"transformer_blocks\.\d+\.attn", r"single_transformer_blocks\.\d+\.attn"),
        layout,
        branches=("cond", "uncond"),
        refining=Refining(called_size, token, multiple, encode),
    )
)
HUNYUAN_VIDEO15 = register_family(
    Family(
        "hunyuan_video15",
        ("HunyuanVideo15Transformer3DModel",),
        (r"transformer_blocks\.\d+\.attn",),
        layout15,
        branches=("cond", "uncond"),
        pairwise_mask=True,
    )
)
