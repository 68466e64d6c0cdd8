"""What the compiler makes of the Triton kernel, without a GPU: registers, spills, shared memory.

`python -m dittools.kernels.triton_aot` prints the table of the main configurations.
"""

# mypy: disable-error-code="misc"

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dittools.errors import UnsupportedCall
from dittools.kernels.triton_block_sparse import attend_kernel
from dittools.kernels.triton_config import Config, default_config, padded_head_dim
from dittools.kernels.triton_mend import mend_kernel, mend_options

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227}  # KiB one block may use, by compute capability
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}


class Variant(NamedTuple):
    """One compile-time variant of the kernel; the defaults are the plain dense-token form."""

    head_dim: int
    q_block: int
    kv_block: int
    dtype: torch.dtype = torch.bfloat16
    gather: bool = False
    bias: bool = False
    masked: bool = False
    quant: str = ""  # "", "int8" (query and key), "int8+int8", "int8+fp8" (value too)
    mend: bool = False  # the second pass, which keeps NaN and inf with the queries that keep them


class Resources(NamedTuple):
    """What one compiled variant takes on one target."""

    registers: int  # per thread
    spill_bytes: int  # stack per thread
    shared_kib: float
    tensor_core: str  # "wgmma", "mma" or ""
    async_copies: bool  # keys and values are fetched ahead
    config: Config


def compile_variant(variant: Variant, capability: int, config: Config | None = None) -> Resources:
    """Compile for sm_80, sm_90 ... and read the resources back from the cubin.

    Raises:
        UnsupportedCall: cuobjdump, which Triton's wheel bundles, is missing.
    """
    if config is None:
        config = default_config(
            variant.head_dim, variant.q_block, variant.kv_block, variant.dtype,
            masked=variant.masked, capability=capability,
        )  # fmt: skip
    kernel, signature, fixed, aligned, config = _signature(variant, config)
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    options["enable_fp_fusion"] = True
    if config.maxnreg:
        options["maxnreg"] = config.maxnreg
    source = ASTSource(kernel, signature, fixed, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _usage(made.asm["cubin"])
    ptx = made.asm["ptx"]
    core = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else ""
    shared = made.metadata.shared / 1024
    return Resources(registers, stack, shared, core, "cp.async" in ptx, config)


def _signature(
    variant: Variant, config: Config
) -> tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[object]]], Config]:
    """Return kernel, argument types, constants by name, divisibility hints by position, launch."""
    element = _TYPES[variant.dtype]
    qk = "i8" if variant.quant else element
    pv = {"int8+int8": "i8", "int8+fp8": "fp8e4nv"}.get(variant.quant, element)
    pointers = {"q_ptr": qk, "k_ptr": qk, "v_ptr": pv, "out_ptr": element}
    pointers |= dict.fromkeys(("lse_ptr", "bias_ptr"), "fp32")
    pointers |= dict.fromkeys(("q_scale_ptr", "k_scale_ptr", "v_scale_ptr"), "fp32")
    fixed: dict[str, Any] = {
        "HEADS": 24,
        "HEAD_DIM": variant.head_dim,
        "BLOCK_D": padded_head_dim(variant.head_dim),
        "Q_BLOCK": variant.q_block,
        "KV_BLOCK": variant.kv_block,
        "TILE_M": config.tile_m,
        "TILE_N": config.tile_n,
        "GATHER": variant.gather,
        "SCATTER": variant.gather,
        "BIAS": variant.bias,
        "TILES": variant.masked,
        "MASKED": variant.masked,
        "UPCAST": False,
        "PRECISION": "tf32x3" if variant.dtype == torch.float32 else None,
        "QUANT": bool(variant.quant),
        "P_RANGE": {"int8+int8": 127, "int8+fp8": 448}.get(variant.quant, 0),
    }
    kernel = attend_kernel
    if variant.mend:
        kernel = mend_kernel
        fixed, config = mend_options(fixed, variant.dtype.itemsize)
    fixed |= {f"stride_{t}d": 1 for t in "qkv"}
    signature: dict[str, str] = {}
    aligned: dict[tuple[int, ...], list[list[object]]] = {}
    for place, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + pointers.get(name, "i32")
            aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
            if name.startswith("stride"):
                aligned[(place,)] = [["tt.divisibility", 16]]
    return kernel, signature, fixed, aligned, config


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of the only function in a cubin."""
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    tool = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if tool is None:
        raise UnsupportedCall("cuobjdump is missing", remedy="reinstall triton from its wheel")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if found is None:
        raise UnsupportedCall("cuobjdump says nothing of registers", got=done.stdout[-200:])
    return int(found[1]), int(found[2])


def main_variants() -> list[Variant]:
    """Return the variants that attention in image and video transformers comes down to."""
    plain = [
        Variant(dim, q_block, 64, dtype)
        for dim, q_block, dtype in (
            (64, 64, torch.bfloat16),
            (64, 128, torch.bfloat16),
            (128, 64, torch.bfloat16),
            (128, 128, torch.bfloat16),
            (96, 64, torch.float16),
            (256, 64, torch.bfloat16),
            (64, 64, torch.float32),
            (128, 64, torch.float32),
        )
    ]
    plain.append(Variant(128, 128, 128))
    cut = [variant._replace(masked=True) for variant in plain]
    eight = [plain[3]._replace(quant=kind) for kind in ("int8", "int8+int8", "int8+fp8")]
    gathered = [variant._replace(gather=True, bias=True) for variant in cut]
    second = [variant._replace(mend=True) for variant in (gathered[3], gathered[5], gathered[6])]
    return plain + cut + gathered + eight + second


def table(variants: list[Variant] | None = None, capabilities: tuple[int, ...] = (80, 90)) -> str:
    """Return one line per variant and target, columns aligned."""
    lines = ["target  variant                                   tile warps stages  regs spill smem"]
    for variant in main_variants() if variants is None else variants:
        for capability in capabilities:
            if variant.quant == "int8+fp8" and capability < 89:
                continue
            used = compile_variant(variant, capability)
            c = used.config
            extra = [n for n in ("gather", "bias", "masked", "mend") if getattr(variant, n)]
            name = f"{variant.head_dim} {variant.q_block}x{variant.kv_block} "
            name += " ".join([_TYPES[variant.dtype], *extra, variant.quant])
            lines.append(
                f"sm_{capability} {used.tensor_core:6} {name:40} {c.tile_m}x{c.tile_n} "
                f"{c.num_warps} {c.num_stages} {used.registers:5} {used.spill_bytes:5} "
                f"{used.shared_kib:6.1f} KiB{'' if used.async_copies else ' no async copies'}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
