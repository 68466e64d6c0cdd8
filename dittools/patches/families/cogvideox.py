"""CogVideoX 2B, 5B and 1.5: joint attention over [text, video]."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from dittools.grid import TokenGrid
from dittools.patches.adapters import Family, Layout, argument, patch_of, patched, register_family
from dittools.patches.refining import Refining, encoded


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


def native(pipe: Any) -> tuple[int, int]:
    """The sample size of the config, in latents."""
    config, side = pipe.transformer.config, pipe.vae_scale_factor_spatial
    return config.sample_height * side, config.sample_width * side


def token(pipe: Any) -> int:
    """Pixels along a side of the codec's block times the patch."""
    return int(pipe.vae_scale_factor_spatial * patch_of(pipe.transformer))


def multiple(pipe: Any) -> int:
    """Whole tokens, and the 8 the pipeline asks for."""
    return math.lcm(8, token(pipe))


def encode(pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Scale, put frames before channels, and lead with the frames that 1.5 drops in the end."""
    latents = encoded(pipe, pixels).transpose(1, 2) * pipe.vae_scaling_factor_image
    time = getattr(pipe.transformer.config, "patch_size_t", None) or 1
    missing = -latents.shape[1] % time
    return torch.cat((latents[:, :1].expand(-1, missing, -1, -1, -1), latents), dim=1)


FAMILY = register_family(
    Family(
        "cogvideox",
        ("CogVideoXTransformer3DModel",),
        (r"transformer_blocks\.\d+\.attn1",),
        layout,
        batched=("uncond", "cond"),
        variant=variant,
        refining=Refining(native, token, multiple, encode),
    )
)
