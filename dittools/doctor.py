"""Examine this machine: what works, what is slow, and what to do about it."""

import inspect
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dittools.call import AttentionCall
from dittools.errors import DitToolsError, UnsupportedCall
from dittools.grid import TokenGrid
from dittools.kernels import backend_names, choose, load, native
from dittools.mask import BlockMask

TOLERANCE = 2e-5  # fp32, head_dim 64, 300 keys: far above rounding, far below a wrong block


@dataclass(frozen=True)
class Check:
    """One finding; state is "ok", "slow", "absent" (optional, not there) or "broken"."""

    name: str
    state: str
    finding: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the fields as JSON types."""
        return asdict(self)


def examine() -> list[Check]:
    """Return every check; none of them raises."""
    groups: list[Callable[[], Iterator[Check]]] = [
        _versions,
        _devices,
        _backends,
        _native,
        _choice,
        _diffusers_contract,
        _writable,
    ]
    return [check for group in groups for check in group()]


def _versions() -> Iterator[Check]:
    yield Check("python", "ok", sys.version.split()[0])
    wanted = {"torch": (2, 11), "diffusers": (0, 36), "transformers": (4, 57)}
    for name, least in wanted.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Check(name, "broken", "not installed", f"pip install {name}")
            continue
        enough = tuple(int(part) for part in found.split("+")[0].split(".")[:2]) >= least
        need = f"{least[0]}.{least[1]} or newer"
        yield Check(name, "ok" if enough else "broken", found, "" if enough else f"install {need}")
    for name, gives in (("triton", "CUDA kernels"), ("peft", "LoRA"), ("gradio", "the web page")):
        try:
            yield Check(name, "ok", version(name))
        except PackageNotFoundError:
            yield Check(name, "absent", f"optional, for {gives}", f"pip install {name}")


def _devices() -> Iterator[Check]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield Check(f"cuda:{index}", "ok", torch.cuda.get_device_name(index))
    else:
        yield Check("cuda", "absent", "no CUDA device: everything runs on the CPU")
    capability = torch.backends.cpu.get_cpu_capability()
    yield Check("cpu", "ok", f"{torch.get_num_threads()} threads, {capability}")


def _trial(device: str) -> tuple[AttentionCall, BlockMask]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn((3, 1, 300, 2, 64), generator=generator).to(device).unbind()
    keep = torch.rand((2, 5, 5), generator=generator) < 0.5
    mask = BlockMask(keep | torch.eye(5, dtype=torch.bool), 64, q_tokens=300, kv_tokens=300)
    return AttentionCall(query, key, value, TokenGrid(1, 1, 300)), mask


def _backends() -> Iterator[Check]:
    """Run every backend on a small call against the reference."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call, mask = _trial(device)
    wanted = load("reference").block_sparse(call, mask)
    for name in backend_names():
        if name in ("auto", "reference"):
            continue
        try:
            backend = load(name)
            reasons = backend.not_supported(call, mask)
        except UnsupportedCall as error:
            reasons = [str(error)]
        if reasons:
            yield Check(f"backend {name}", "absent", reasons[0])
            continue
        try:
            off = float((backend.block_sparse(call, mask) - wanted).abs().max())
        except (DitToolsError, RuntimeError, OSError) as problem:
            # an optional backend may lack its own tools; the one "auto" takes must work
            state = "broken" if name == choose("auto", call, mask).name else "absent"
            said = str(problem).strip().splitlines()
            reason = f"{type(problem).__name__}: {' '.join(said[:2])[:160]}"
            yield Check(f"backend {name}", state, reason, "leave it out, or mend what it names")
            continue
        good = off < TOLERANCE
        finding = f"equals the reference to {off:.0e}" if good else f"off by {off:.1e}"
        yield Check(f"backend {name}", "ok" if good else "broken", finding)


def _native() -> Iterator[Check]:
    """Say whether the native CPU kernel is in use, and why not."""
    status = native.status()
    if status.available:
        matrix = " with AMX for bfloat16" if status.amx else ""
        yield Check("native kernel", "ok", f"{status.build}{matrix}")
    else:
        remedy = "install a C++ compiler (g++ or clang++); plain torch serves until then"
        yield Check("native kernel", "slow", status.reason, remedy)


def _choice() -> Iterator[Check]:
    """Say what "auto" takes here, and why not the others before it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call, mask = _trial(device)
    try:
        yield Check("auto", "ok", f"takes {choose('auto', call, mask).name} for {device} tensors")
    except UnsupportedCall as error:
        yield Check("auto", "broken", str(error))


def _diffusers_contract() -> Iterator[Check]:
    """Look for the names in diffusers that attaching relies on."""
    try:
        from diffusers.models import attention_dispatch
    except ImportError as error:
        yield Check("diffusers contract", "broken", str(error), "pip install 'diffusers>=0.36'")
        return
    function = getattr(attention_dispatch, "dispatch_attention_fn", None)
    if function is None:
        yield Check(
            "diffusers contract", "broken", "dispatch_attention_fn is gone", "an older diffusers"
        )
        return
    names = inspect.signature(function).parameters
    missing = [
        name for name in ("query", "key", "value", "attn_mask", "scale") if name not in names
    ]
    if missing:
        finding = f"dispatch_attention_fn lacks {', '.join(missing)}"
        yield Check("diffusers contract", "broken", finding, "an older diffusers")
    else:
        yield Check("diffusers contract", "ok", "attention entry point as expected")


def _writable() -> Iterator[Check]:
    home = os.environ.get("DITTOOLS_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    for name, folder in (("temporary folder", tempfile.gettempdir()), ("cache folder", home)):
        path = Path(folder).expanduser()
        while not path.exists() and path != path.parent:
            path = path.parent
        good = os.access(path, os.W_OK)
        remedy = "" if good else "set DITTOOLS_CACHE to a folder you can write"
        yield Check(
            name, "ok" if good else "slow", f"{'writable' if good else 'read-only'}", remedy
        )
