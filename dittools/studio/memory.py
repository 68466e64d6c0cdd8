"""Whether a size fits into memory, told before anything is started."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from dittools import system
from dittools.errors import InputError
from dittools.pipelines.generate import Settings

HEADROOM = 0.9  # share of the free memory a run may take
WIDTHS = 12  # token-wide buffers alive at once: input, normed, q, k, v, output, their copies
MAPS = 4  # full-resolution feature maps alive at once in a decoder
BRANCHES = 2  # guidance runs both branches in one batch in many pipelines
STREAMING = ("AutoencoderKLWan", "AutoencoderKLQwenImage")  # decode one latent frame after another


@dataclass(frozen=True)
class Need:
    """Bytes a generation takes beyond the weights: in the denoiser, and to decode and keep frames.

    The two do not overlap, so the larger counts.
    """

    denoiser: int
    decoder: int

    @property
    def bytes(self) -> int:
        """The peak."""
        return max(self.denoiser, self.decoder)


def check_memory(
    pipe: Any, settings: Settings, free: Callable[[torch.device], int] | None = None
) -> Need:
    """Return what a generation needs.

    Args:
        pipe: a stock pipeline, loaded.
        settings: what to generate.
        free: bytes that are free on a device; None asks the system.
    Raises:
        InputError: it does not fit; says the largest size that does.
    """
    device = torch.device(getattr(pipe, "device", "cpu"))
    settings = filled(pipe, settings)
    room = int((free or free_bytes)(device) * HEADROOM)
    need = estimate(pipe, settings)
    if need.bytes <= room:
        return need
    raise InputError(
        f"this size needs about {_gib(need.bytes)} of memory beside the model",
        expected=f"at most {_gib(room)}, which is free",
        got=_size(settings),
        remedy=_largest(pipe, settings, room),
    )


def filled(pipe: Any, settings: Settings) -> Settings:
    """Return settings with the pipeline's own defaults for size and steps, where it tells them."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    found: dict[str, Any] = {}
    names = {"frames": "num_frames", "steps": "num_inference_steps"}
    for name in ("frames", "steps", "height", "width"):
        default = getattr(parameters.get(names.get(name, name)), "default", None)
        if getattr(settings, name) is None and isinstance(default, int):
            found[name] = default
    side = getattr(pipe, "default_sample_size", None) or _config(pipe).get("sample_size")
    if isinstance(side, int):
        for name in ("height", "width"):
            if getattr(settings, name) is None:
                found.setdefault(name, side * _in_space(pipe))
    return replace(settings, **found)


def estimate(pipe: Any, settings: Settings) -> Need:
    """Return the memory of one generation, from shapes; within a factor of about two.

    A size that is None counts as the smallest.
    """
    config = _config(pipe)
    item = getattr(_denoiser(pipe), "dtype", torch.float32).itemsize
    frames, height, width = settings.frames or 1, settings.height or 8, settings.width or 8
    in_time = int(getattr(pipe, "vae_scale_factor_temporal", 1) or 1)
    in_space = _in_space(pipe)
    patch = config.get("patch_size") or 1
    sides = tuple(patch) if isinstance(patch, (tuple, list)) else (1, int(patch), int(patch))
    sides = (1,) * (3 - len(sides)) + sides
    tokens = (
        max(1, -(-frames // in_time) // sides[0])
        * max(1, height // in_space // sides[1])
        * max(1, width // in_space // sides[2])
    )
    channels = _channels(config)
    inner = int(config.get("ffn_dim") or 4 * channels)
    branches = BRANCHES if (settings.guidance or 0) > 1 else 1
    return Need(
        tokens * branches * item * (WIDTHS * channels + 2 * inner),
        _decoder_bytes(pipe, frames, height, width, in_time),
    )


def free_bytes(device: torch.device) -> int:
    """Return the memory a run may take now: the device's, or the machine's within its cgroup."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reserved)
    import psutil

    available = int(psutil.virtual_memory().available)
    limit, used = system.container_memory()
    return available if limit is None or used is None else min(available, max(limit - used, 0))


def _decoder_bytes(pipe: Any, frames: int, height: int, width: int, in_time: int) -> int:
    arrays = frames * height * width * 3 * 4 * 3  # the frames: tensor, array and a copy
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return arrays
    config = getattr(vae, "config", {})
    item = getattr(vae, "dtype", torch.float32).itemsize
    patch = int(config.get("patch_size") or 1)
    outer = config.get("decoder_base_dim") or config.get("base_dim")
    outer = outer or (config.get("block_out_channels") or (128,))[0]
    if type(vae).__name__ in STREAMING:
        frames = min(frames, in_time)
    if getattr(vae, "use_tiling", False):
        frames = min(frames, int(getattr(vae, "tile_sample_min_num_frames", frames)))
        height = min(height, int(getattr(vae, "tile_sample_min_height", height)))
        width = min(width, int(getattr(vae, "tile_sample_min_width", width)))
    return arrays + frames * height * width // patch**2 * int(outer) * item * MAPS


def _denoiser(pipe: Any) -> Any:
    found = getattr(pipe, "transformer", None)
    return found if found is not None else getattr(pipe, "unet", None)


def _config(pipe: Any) -> Any:
    return getattr(_denoiser(pipe), "config", {})


def _in_space(pipe: Any) -> int:
    return int(
        getattr(pipe, "vae_scale_factor_spatial", 0) or getattr(pipe, "vae_scale_factor", 0) or 8
    )


def _channels(config: Any) -> int:
    heads = config.get("num_attention_heads")
    size = config.get("attention_head_dim")
    if isinstance(heads, int) and isinstance(size, int):
        return heads * size
    blocks = config.get("block_out_channels")
    return int(max(blocks)) if blocks else int(config.get("hidden_size") or 1024)


def _largest(pipe: Any, settings: Settings, room: int) -> str:
    """Return the largest picture at this length, and the longest clip at this size."""
    step = 16
    sides = (settings.height or step, settings.width or step)
    options = []
    for count in range(max(sides) // step, 0, -1):
        share = count * step / max(sides)
        height, width = (max(step, int(side * share) // step * step) for side in sides)
        smaller = replace(settings, height=height, width=width)
        if estimate(pipe, smaller).bytes <= room:
            options.append(_size(smaller))
            break
    for frames in range((settings.frames or 1) - 1, 0, -1):
        shorter = replace(settings, frames=frames)
        if estimate(pipe, shorter).bytes <= room:
            options.append(_size(shorter))
            break
    return " or ".join(options) or "a smaller model"


def _size(settings: Settings) -> str:
    frames = settings.frames or 1
    length = f", {frames} frames" if frames > 1 else ""
    return f"{settings.height} x {settings.width} pixels{length}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
