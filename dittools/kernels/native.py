"""Builds, loads and calls the native CPU kernel, one C++ file with a plain C interface.

The library is compiled on first use for the instruction sets of this CPU, put into the user's cache
by an atomic rename and loaded with ctypes; it is linked to the OpenMP runtime torch has already
loaded. Whatever goes wrong is a reason in `status()`, and the grouped torch path serves instead.

Environment: DITTOOLS_NATIVE=0 turns it off, or names one build (amx, avx512, avx2, generic);
DITTOOLS_CACHE or XDG_CACHE_HOME moves the cache; CXX names the compiler.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from dittools import system
from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.mask import BlockMask

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp"]
_AVX2 = ["avx2", "fma", "f16c"]
_AVX512 = [*_AVX2, "avx512f", "avx512dq", "avx512bw", "avx512vl"]
# build name -> CPU features it needs, best first; the compiler flag is the feature's own name
BUILDS: dict[str, list[str]] = {
    "amx": [*_AVX512, "avx512_bf16", "amx_tile", "amx_bf16"],
    "avx512": _AVX512,
    "avx2": _AVX2,
    "generic": [],
}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BLOCKS = range(8, 513, 8)
_LOCK = threading.Lock()
_LOADED: "dict[str, Native | NativeStatus]" = {}

_Three, _Two = ctypes.c_int64 * 3, ctypes.c_int64 * 2
_POINTERS = "query key value out lse bias indptr full_end block tile tiles order"
_SIZES = (
    "batch heads mask_heads q_len k_len dim order_slots order_tokens "
    "q_block kv_block q_blocks kv_blocks"
)


class _Call(ctypes.Structure):
    """Mirrors DittoolsCall in native.cpp; the size is compared on every call."""

    _fields_ = [
        ("abi", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((f"{name}_stride", _Three) for name in ("query", "key", "value", "out", "lse")),
        ("bias_stride", _Two),
        ("order_stride", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in _SIZES.split()),
        *((name, ctypes.c_int32) for name in ("dtype", "threads", "use_amx", "has_tiles")),
        ("scale", ctypes.c_float),
    ]


@dataclass(frozen=True)
class NativeStatus:
    """Whether the native kernel runs here, and why not when it does not.

    Attributes:
        available: it is built, loaded and gave the right answer to a small question.
        build: amx, avx512, avx2 or generic; empty when not available.
        amx: bf16 calls use AMX tiles.
        reason: one sentence; empty when available.
        library: path of the shared object.
        compiler: command that built it.
    """

    available: bool
    build: str = ""
    amx: bool = False
    reason: str = ""
    library: str = ""
    compiler: str = ""


class Native:
    """The loaded library."""

    def __init__(self, library: Path, build: str, compiler: str) -> None:
        """Load a shared object and ask it for AMX permission."""
        self._lib = ctypes.CDLL(str(library))
        self._lib.dittools_attention.argtypes = [ctypes.POINTER(_Call)]
        amx = build == "amx" and bool(self._lib.dittools_amx())
        self.status = NativeStatus(True, build, amx, "", str(library), compiler)

    def attention(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return [B, S, H, D] and, when asked for, the log-sum-exp float32 [B, S, H].

        The tensors of the call are read where they lie; only a last dimension that is not
        contiguous is copied.

        Raises:
            UnsupportedCall: no memory for the key panels; or, with DITTOOLS_DEBUG=1, a list or a
                token order that points outside its range.
        """
        if os.environ.get("DITTOOLS_DEBUG") == "1":
            check_ranges(mask)
        q, k, v = (_unit_stride(t) for t in (call.query, call.key, call.value))
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[:3], dtype=torch.float32) if return_lse else None
        lists, order, bias = mask.lists(), mask.order, call.additive_mask()
        bias = None if bias is None else _unit_stride(bias)
        index = None if order is None else order.index.contiguous()
        tiles = None if mask.tiles is None else mask.tiles.contiguous()
        address = [q, k, v, out, lse, bias, *lists, tiles, index]
        args = _Call(
            ctypes.sizeof(_Call),
            *(None if t is None else t.data_ptr() for t in address),
            *(_Three(*_bhs_strides(t)) for t in (q, k, v, out, out if lse is None else lse)),
            _Two(*(0, 0) if bias is None else _shared_strides(bias)),
            0 if index is None or index.shape[0] == 1 else index.stride(0),
            *(q.shape[0], q.shape[2], mask.keep.shape[0], q.shape[1], k.shape[1], q.shape[3]),
            *((0, 0) if order is None else (order.slots, order.tokens)),
            *(mask.q_block, mask.kv_block, mask.keep.shape[1], mask.keep.shape[2]),
            *(_DTYPES[q.dtype], torch.get_num_threads(), self.status.amx, tiles is not None),
            call.softmax_scale,
        )
        code = self._lib.dittools_attention(ctypes.byref(args))
        if code:
            what = {1: "out of memory", 2: "built for another version"}.get(code, f"code {code}")
            raise UnsupportedCall(f"the native kernel could not run: {what}")
        return out, lse


def not_supported(call: AttentionCall, mask: BlockMask) -> list[str]:
    """Say why the native kernel cannot run this call; empty when it can."""
    reasons = []
    if call.query.dtype not in _DTYPES:
        reasons.append(f"dtype {call.query.dtype} is not fp32, bf16 or fp16")
    for name, size in (("query", mask.q_block), ("key", mask.kv_block)):
        if size not in _BLOCKS:
            reasons.append(f"{name} block is {size}, not a multiple of 8 from 8 to 512")
    tensors = (call.query, call.key, call.value)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        reasons.append("it has no backward pass and a tensor requires a gradient")
    return reasons


def load() -> Native | None:
    """Return the library, built if need be; None where there is none (see `status`)."""
    wanted = os.environ.get("DITTOOLS_NATIVE", "1")
    if wanted not in _LOADED:
        with _LOCK:
            if wanted not in _LOADED:
                _LOADED[wanted] = _find(wanted)
    found = _LOADED[wanted]
    return found if isinstance(found, Native) else None


def status() -> NativeStatus:
    """Return what `load` found; builds the library if that was not tried yet."""
    load()
    found = _LOADED[os.environ.get("DITTOOLS_NATIVE", "1")]
    return found.status if isinstance(found, Native) else found


def cache_dir() -> Path:
    """Return the folder that holds built libraries; it may not exist yet."""
    return system.cache_folder() / "native"


def check_ranges(mask: BlockMask) -> None:
    """Raise UnsupportedCall when a list or the token order points outside its range."""
    lists = mask.lists()
    tiles = 0 if mask.tiles is None else mask.tiles.shape[0]
    entries, rows = len(lists.block), mask.keep.shape[0] * mask.keep.shape[1]
    cut = torch.zeros(entries, dtype=torch.bool)
    if len(lists.indptr) == rows + 1 and bool((lists.indptr.diff() >= 0).all()):
        row = torch.arange(rows).repeat_interleave(lists.indptr.diff().long())
        cut = torch.arange(entries) >= lists.full_end[row[:entries]]
    for name, values, low, high in (
        ("indptr", lists.indptr, 0, entries),
        ("full_end", lists.full_end, 0, entries),
        ("block", lists.block, 0, mask.keep.shape[2] - 1),
        ("tile", lists.tile[cut], 0, tiles - 1),
    ):
        if len(values) and (int(values.min()) < low or int(values.max()) > high):
            raise UnsupportedCall(
                f"the block lists are damaged: {name} is out of range",
                expected=f"{low} to {high}",
                got=f"{int(values.min())} to {int(values.max())}",
            )
    if mask.order is not None and not mask.order.is_valid():
        raise UnsupportedCall(
            "the token order is not a permutation",
            expected=f"each of {mask.order.tokens} tokens in exactly one slot",
            got="a missing, repeated or unknown token",
        )


def _unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _bhs_strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(2), tensor.stride(1)


def _shared_strides(bias: torch.Tensor) -> tuple[int, int]:
    batch, head = (0 if bias.shape[i] == 1 else bias.stride(i) for i in (0, 1))
    return batch, head


def _find(wanted: str) -> "Native | NativeStatus":
    """Try the builds this CPU can run from the best on; the last failure is the reason."""
    if wanted == "0":
        return NativeStatus(False, reason="turned off by DITTOOLS_NATIVE=0")
    if not system.is_linux():
        return NativeStatus(False, reason=f"it is built on Linux only, this is {system.name()}")
    features = cpu_features()
    builds = [name for name, needs in BUILDS.items() if set(needs) <= features]
    if wanted != "1":
        if wanted not in builds:
            return NativeStatus(False, reason=f"DITTOOLS_NATIVE={wanted} is not among {builds}")
        builds = [wanted]
    compiler = _compiler()
    if compiler is None:
        return NativeStatus(False, reason="no C++ compiler found; install g++ or set CXX")
    reason = ""
    for build in builds:
        try:
            return _opened(build, compiler)
        except (OSError, subprocess.SubprocessError, UnsupportedCall) as error:
            said = getattr(error, "stderr", None) or str(error)
            reason = f"build {build} failed: {_first_error(said)}"
    return NativeStatus(False, reason=reason, compiler=compiler)


def _opened(build: str, compiler: str) -> Native:
    """Return one build, loaded and tested; a damaged file in the cache is built anew, once."""
    library, compiled_now = _built(build, compiler)
    try:
        native = Native(library, build, compiler)
    except OSError:
        if compiled_now:
            raise
        library.unlink(missing_ok=True)
        native = Native(_built(build, compiler)[0], build, compiler)
    _self_test(native)
    return native


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")


@lru_cache(maxsize=1)
def cpu_features() -> set[str]:
    """Return the instruction sets of this CPU as Linux names them; empty elsewhere."""
    return system.cpu_features()


def _compiler() -> str | None:
    names = [os.environ.get("CXX", ""), "g++", "c++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _built(build: str, compiler: str) -> tuple[Path, bool]:
    """Return the shared object of one build and whether it was compiled now, not found."""
    flags = FLAGS + [f"-m{name.replace('amx_', 'amx-').replace('_', '')}" for name in BUILDS[build]]
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    runtime = _openmp()
    parts = (SOURCE.read_text(), version, " ".join(flags), platform.machine(), str(runtime))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = _writable(cache_dir())
    library = folder / f"dittools-{build}-{key}.so"
    if library.exists():
        return library, False
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
        item, made = Path(scratch, "native.o"), Path(scratch, "native.so")
        link = [str(runtime)] if runtime else ["-fopenmp"]
        for command in (
            [compiler, *flags, "-c", str(SOURCE), "-o", str(item)],
            [compiler, "-shared", str(item), "-o", str(made), *link],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        made.replace(library)  # atomic: another process sees the whole file or none
    return library, True


def _openmp() -> Path | None:
    """Return torch's own OpenMP runtime; a second one in the process would fight over the cores."""
    return next(iter(sorted(Path(torch.__file__).parent.glob("lib/libgomp*"))), None)


def _writable(folder: Path) -> Path:
    """Return the folder, or a temporary one for this process where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="dittools-native-"))


def _self_test(native: Native) -> None:
    """Raise UnsupportedCall unless a small call comes out right in every dtype."""
    from dittools.grid import TokenGrid

    make = torch.Generator().manual_seed(0)
    keep = torch.tensor([[[1, 0, 1], [0, 1, 1], [1, 1, 1]]], dtype=torch.bool)
    mask = BlockMask(keep, 32, q_tokens=80, kv_tokens=80)
    dense = mask.to_dense()[:, :80, :80]
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.004)):
        q, k, v = (torch.randn((1, 80, 2, 40), generator=make).to(dtype) for _ in range(3))
        out, _ = native.attention(AttentionCall(q, k, v, TokenGrid(1, 1, 80)), mask)
        a, b, c = (t.transpose(1, 2).double() for t in (q, k, v))
        want = torch.nn.functional.scaled_dot_product_attention(a, b, c, attn_mask=dense)
        error = float((out.double() - want.transpose(1, 2)).abs().max())
        if not error < limit:
            raise UnsupportedCall(
                f"self-test error in {dtype}", expected=f"under {limit}", got=f"{error:.2g}"
            )
