"""Launch configurations of the Triton kernel: defaults that fit, and tuning tables from JSON.

A table named by the environment variable DITTOOLS_TRITON_TUNING is read before the first launch;
`bench/gpu.py --tune` writes one.
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from dittools.errors import UnsupportedCall
from dittools.reading import read_json


class Config(NamedTuple):
    """How one tile shape is launched.

    Attributes:
        tile_m, tile_n: queries and keys per step.
        num_warps, num_stages: as in Triton; each stage holds one key and one value tile.
        maxnreg: register cap, 0 for none.
    """

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int
    maxnreg: int = 0


_TUNED: dict[str, Config] = {}


def tuning_key(head_dim: int, q_block: int, kv_block: int, dtype: torch.dtype) -> str:
    """Return the key of one entry of a tuning table, "128/128x64/bfloat16"."""
    return f"{padded_head_dim(head_dim)}/{q_block}x{kv_block}/{str(dtype).removeprefix('torch.')}"


def load_tuning(path: Path) -> int:
    """Take launch configurations from JSON {tuning_key: [tile_m, tile_n, warps, stages, maxnreg]}.

    Returns:
        How many were taken; they replace the defaults for this process.
    Raises:
        UnsupportedCall: an entry is malformed, or a tile does not divide its block.
    """
    try:
        table = read_json(path)
        if not isinstance(table, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise UnsupportedCall(f"cannot read the tuning table {path}", got=str(error)) from error
    for key, numbers in table.items():
        try:
            config = Config(*(int(n) for n in numbers))
            q_block, kv_block = (int(n) for n in key.split("/")[1].split("x"))
        except (TypeError, ValueError, IndexError) as error:
            raise UnsupportedCall(
                f"tuning entry {key!r} is malformed", got=repr(numbers)
            ) from error
        tiles = config[:2]
        if min(tiles) < 16 or any(tile & (tile - 1) for tile in tiles):
            raise UnsupportedCall(
                f"tuning entry {key!r} has tiles that are no powers of two of at least 16"
            )
        if q_block % config.tile_m or kv_block % config.tile_n:
            raise UnsupportedCall(f"tuning entry {key!r} has tiles that do not divide its blocks")
        _TUNED[key] = config
    return len(table)


@lru_cache(maxsize=1)
def _load_once(path: str) -> int:
    return load_tuning(Path(path))


def default_config(
    head_dim: int,
    q_block: int,
    kv_block: int,
    dtype: torch.dtype,
    *,
    masked: bool = True,
    capability: int = 80,
) -> Config:
    """Return the tuned configuration, else one whose registers and shared memory are known to fit.

    Tiles are the largest powers of two that divide the blocks, capped so that no variant spills or
    asks for more shared memory than the target has. `triton_aot` compiles and checks them; which is
    fastest on a device is for a tuning table to say.
    """
    if path := os.environ.get("DITTOOLS_TRITON_TUNING"):
        _load_once(path)
    tuned = _TUNED.get(tuning_key(head_dim, q_block, kv_block, dtype))
    if tuned is not None:
        return tuned
    even_q, even_k = q_block & -q_block, kv_block & -kv_block
    size = padded_head_dim(head_dim) * dtype.itemsize  # bytes per token
    if dtype.itemsize == 4:  # three TF32 products per score: small tiles, or registers spill
        edge = 32 if size <= 512 else 16
        return Config(min(even_q, edge), min(even_k, edge), 8 if edge == 32 else 4, 2)
    if size > 256:
        return Config(min(even_q, 64), min(even_k, 32), 8, 2)
    wide = size == 256 and masked  # the tests of cut blocks need registers of their own
    roomy = 90 <= capability < 120  # 12.x has the tensor cores of 8.x, not those of 9.0 and 10.x
    tile_m = min(even_q, 64 if wide and not roomy else 128)
    return Config(tile_m, min(even_k, 64), 8 if tile_m == 128 or wide else 4, 3)


def capability_of(device: torch.device) -> int:
    """Return 80, 90 ... of a CUDA device; 80, the least that is supported, of any other."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def padded_head_dim(head_dim: int) -> int:
    """Return the power of two, at least 16, that holds a head."""
    return max(16, 1 << (head_dim - 1).bit_length())
