"""Z-Image: one stream of [image, its padding, caption, its padding], both padded to 32 tokens."""

from collections.abc import Mapping
from typing import Any

import torch

from dittools.errors import AttachError
from dittools.grid import TokenGrid
from dittools.patches.adapters import Family, Layout, argument, patched, register_family

_MULTIPLE = 32  # tokens; SEQ_MULTI_OF in diffusers


def layout(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> Layout:
    """Read a list of [C, F, H, W] latents; everything behind the image counts as text."""
    images = argument(arguments, "x")
    if not all(isinstance(image, torch.Tensor) and image.dim() == 4 for image in images):
        raise AttachError("Z-Image with several images per sample has no single token grid")
    if len({tuple(image.shape) for image in images}) > 1:
        raise AttachError("the images of this batch differ in size")
    side = int(arguments.get("patch_size", 2))
    time = int(arguments.get("f_patch_size", 1))
    _, frames, height, width = images[0].shape
    sizes = patched(frames, time), patched(height, side), patched(width, side)
    tokens = sizes[0] * sizes[1] * sizes[2]
    captions = argument(arguments, "cap_feats")
    longest = max(_padded(len(caption)) for caption in captions)
    return Layout((TokenGrid(*sizes, text_after=_padded(tokens) - tokens + longest),))


def _padded(tokens: int) -> int:
    return -(-tokens // _MULTIPLE) * _MULTIPLE


FAMILY = register_family(
    Family(
        "z_image",
        ("ZImageTransformer2DModel",),
        (r"layers\.\d+\.attention",),
        layout,
        batched=("cond", "uncond"),
        timestep="t",
    )
)
