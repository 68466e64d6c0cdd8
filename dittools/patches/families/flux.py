"""Flux.1 and Flux.2: joint attention over [text, image, reference images]."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from dittools.errors import AttachError
from dittools.grid import TokenGrid
from dittools.patches.adapters import Family, Layout, argument, register_family

_SIZES: Any = WeakTensorKeyDictionary()  # ids tensor -> (height, width, reference tokens)


def layout(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> Layout:
    """Read position ids; reference images (Kontext, Flux.2 editing) count as text behind the image.

    The ids are made once per run, so reading them back from a device happens once.
    """
    ids = argument(arguments, "img_ids")
    if ids not in _SIZES:
        _SIZES[ids] = image_size(ids)
    height, width, others = _SIZES[ids]
    text = argument(arguments, "encoder_hidden_states").shape[1]
    streams = (text, height * width + others)
    if arguments.get("kv_cache_mode") is not None:  # Flux.2 KV puts reference images first
        text, others = text + others, 0
    return Layout((TokenGrid(1, height, width, text, others),), streams=streams)


def image_size(ids: torch.Tensor) -> tuple[int, int, int]:
    """Return height and width of the image that is made, and the tokens of all other images.

    Args:
        ids: [N, 3] or [B, N, 4]; column 0 numbers the image, 1 and 2 are row and column.
    Raises:
        AttachError: the ids of the image are not a full raster.
    """
    rows = (ids[0] if ids.dim() == 3 else ids).long().cpu()
    own = rows[rows[:, 0] == rows[:, 0].min()]  # references count from 1 (Kontext), 10 (Flux.2)
    sides = own[:, 1:3].amax(0) - own[:, 1:3].amin(0) + 1
    height, width = int(sides[0]), int(sides[1])
    if height * width != len(own):
        raise AttachError(
            "position ids are not a full raster",
            expected=f"{height} x {width} tokens",
            got=str(len(own)),
        )
    return height, width, len(rows) - len(own)


_SITES = (r"transformer_blocks\.\d+\.attn", r"single_transformer_blocks\.\d+\.attn")

FLUX = register_family(
    Family("flux", ("FluxTransformer2DModel",), _SITES, layout, branches=("cond", "uncond"))
)
FLUX2 = register_family(
    Family("flux2", ("Flux2Transformer2DModel",), _SITES, layout, branches=("cond", "uncond"))
)
