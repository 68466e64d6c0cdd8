"""LTX-Video and LTX-2: video tokens only in `attn1`; LTX-2's other sites stay stock."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from dittools.grid import TokenGrid
from dittools.patches.adapters import Family, Layout, argument, register_family
from dittools.patches.refining import Refining, called_size, encoded


def layout(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> Layout:
    """Read the latent sizes from the keywords; patches of 1 in every release.

    Appended condition tokens do not fit the grid, so such calls stay dense.
    """
    sizes = [int(argument(arguments, name)) for name in ("num_frames", "height", "width")]
    return Layout((TokenGrid(*sizes),))


def token(pipe: Any) -> int:
    """Pixels along a side of the codec's block times the patch."""
    return int(pipe.vae_spatial_compression_ratio * pipe.transformer_spatial_patch_size)


def multiple(pipe: Any) -> int:
    """Whole tokens, and the 32 the pipeline asks for."""
    return math.lcm(32, token(pipe))


def encode(pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Normalise per channel and pack into tokens, as the pipeline's own latents are."""
    vae = pipe.vae
    latents = pipe._normalize_latents(
        encoded(pipe, pixels), vae.latents_mean, vae.latents_std, vae.config.scaling_factor
    )
    packed: torch.Tensor = pipe._pack_latents(
        latents, pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
    )
    return packed


LTX = register_family(
    Family(
        "ltx",
        ("LTXVideoTransformer3DModel",),
        (r"transformer_blocks\.\d+\.attn1",),
        layout,
        batched=("uncond", "cond"),
        refining=Refining(
            called_size,
            token,
            multiple,
            encode,
            text_sites=(r"transformer_blocks\.\d+\.attn2",),
        ),
    )
)
LTX2 = register_family(
    Family(
        "ltx2",
        ("LTX2VideoTransformer3DModel",),
        (r"transformer_blocks\.\d+\.attn1",),
        layout,
        batched=("uncond", "cond"),
    )
)
