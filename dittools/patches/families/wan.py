"""Wan 2.1 and 2.2: video tokens only in self-attention, text and image by cross-attention."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from dittools.patches.adapters import Family, latent_video, register_family
from dittools.patches.refining import Refining, called_size, encoded


def variant(denoiser: torch.nn.Module, components: Mapping[str, Any]) -> str:
    """Two transformers mean Wan 2.2."""
    return "wan22" if components.get("transformer_2") is not None else ""


def native(pipe: Any) -> tuple[int, int]:
    """480p for the 1.3B model, 720p for the larger ones, as FreeSwim's inference.py has it."""
    if pipe.config.get("expand_timesteps"):  # 2.2 TI2V-5B
        return 704, 1280
    return (720, 1280) if _config(pipe).num_layers >= 40 else called_size(pipe)


def token(pipe: Any) -> int:
    """Pixels along a side of the codec's block times the patch."""
    return int(pipe.vae_scale_factor_spatial * _config(pipe).patch_size[1])


def multiple(pipe: Any) -> int:
    """Whole tokens, and the 16 every Wan pipeline asks for."""
    return math.lcm(16, token(pipe))


def encode(pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Normalise per channel, in the order of the stock video-to-video pipeline."""
    latents, config = encoded(pipe, pixels), pipe.vae.config
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(latents)
        for values in (config.latents_mean, config.latents_std)
    )
    return (latents - mean) * (1.0 / std)


def text_call(module: torch.nn.Module) -> int:
    """With projections of its own the image is attended to first."""
    return int(getattr(module, "add_k_proj", None) is not None)


def _config(pipe: Any) -> Any:
    return (pipe.transformer if pipe.transformer is not None else pipe.transformer_2).config


FAMILY = register_family(
    Family(
        name="wan",
        denoisers=("WanTransformer3DModel", "WanVACETransformer3DModel"),
        # VACE runs its control blocks first, but published layer counts mean the main blocks
        sites=(r"blocks\.\d+\.attn1", r"vace_blocks\.\d+\.attn1"),
        layout=latent_video,  # VACE control blocks see the same grid
        branches=("cond", "uncond"),
        variant=variant,
        refining=Refining(
            native,
            token,
            multiple,
            encode,
            flow_shift=9.0,
            text_sites=(r"blocks\.\d+\.attn2", r"vace_blocks\.\d+\.attn2"),
            text_call=text_call,
        ),
    )
)
