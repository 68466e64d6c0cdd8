"""Examine this machine: what works, what is slow, and what to do about it."""

import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dittools import system
from dittools.call import AttentionCall
from dittools.errors import DitToolsError, UnsupportedCall
from dittools.grid import TokenGrid
from dittools.kernels import backend_names, choose, load, native
from dittools.mask import BlockMask

TOLERANCE = 2e-5  # fp32, head_dim 64, 300 keys: far above rounding, far below a wrong block
PYTHON = ((3, 10), (3, 13))  # first and last version the suite is written for
SUPPORTED = {  # oldest, and the newest that was tested; None where any newer one is fine so far
    "torch": ((2, 11), (2, 13)),
    "diffusers": ((0, 36), (0, 42)),
    "transformers": ((4, 57), (5, 23)),
    "accelerate": ((1, 10), None),
    "safetensors": ((0, 5), None),
    "numpy": ((1, 26), None),
}
OPTIONAL = {
    "triton": ("CUDA kernels", "pip install triton"),
    "opencv-python-headless": ("video quality", "pip install 'dittools[quality]'"),
    "peft": ("LoRA", "pip install peft"),
    "gradio": ("the studio", "pip install 'dittools[app]'"),
    "ray": ("prompt lists on a cluster", "pip install 'dittools[ray]'"),
}


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
    groups: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("versions", _versions),
        ("devices", _devices),
        ("backends", _backends),
        ("native kernel", _native),
        ("triton compiler", _triton),
        ("auto", _choice),
        ("diffusers contract", _diffusers_contract),
        ("attach", _attach),
        ("folders", _writable),
        ("settings", _settings),
    ]
    found: list[Check] = []
    for name, group in groups:
        try:
            found += group()
        except Exception as error:  # noqa: BLE001 - a doctor that dies of an illness is none
            said = " ".join(str(error).split())[:200]
            found.append(Check(name, "broken", f"{type(error).__name__}: {said}", _REPORT))
    return found


_REPORT = "report it with the output of `dittools doctor --json`"


def _versions() -> Iterator[Check]:
    here = sys.version_info[:2]
    text = f"{sys.version.split()[0]} on {system.name()}"
    if here < PYTHON[0]:
        yield Check("python", "broken", text, f"python {_dotted(PYTHON[0])} or newer")
    elif here > PYTHON[1]:
        yield Check("python", "ok", f"{text}, newer than the tested {_dotted(PYTHON[1])}")
    else:
        yield Check("python", "ok", text)
    if not system.is_linux():
        yield Check("system", "slow", f"{system.name()} is reviewed, not tested", "Linux")
    for name, (least, tested) in SUPPORTED.items():
        yield _package(name, least, tested)
    for name, (gives, remedy) in OPTIONAL.items():
        try:
            yield Check(name, "ok", version(name))
        except PackageNotFoundError:
            yield Check(name, "absent", f"optional, for {gives}", remedy)


def _package(name: str, least: tuple[int, int], tested: tuple[int, int] | None) -> Check:
    need = f"{_dotted(least)} or newer" + (f", tested up to {_dotted(tested)}" if tested else "")
    try:
        found = version(name)
    except PackageNotFoundError:
        return Check(name, "broken", f"not installed; supported: {need}", f"pip install {name}")
    numbers = tuple(int(re.sub(r"\D.*", "", p) or 0) for p in found.split("+")[0].split("."))
    if numbers[:2] < least:
        remedy = f"pip install '{name}>={_dotted(least)}'"
        return Check(name, "broken", f"{found}; supported: {need}", remedy)
    if tested and numbers[:2] > tested:
        remedy = f"if something fails: pip install '{name}=={_dotted(tested)}.*'"
        return Check(name, "ok", f"{found}, newer than the tested {_dotted(tested)}", remedy)
    return Check(name, "ok", found)


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


def _devices() -> Iterator[Check]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            finding = f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory >> 30} GiB"
            old = facts.major < 8
            remedy = "the Triton kernels are written for sm_80 and newer" if old else ""
            yield Check(f"cuda:{index}", "slow" if old else "ok", finding, remedy)
    else:
        remedy = "a torch built for CUDA" if torch.version.cuda is None else "a CUDA driver"
        yield Check("cuda", "absent", "no CUDA device: everything runs on the CPU", remedy)
    capability, cores = torch.backends.cpu.get_cpu_capability(), os.cpu_count() or 1
    threads = torch.get_num_threads()
    finding = f"{threads} threads of {cores} logical cores, {capability}"
    few = 4 * threads < cores
    remedy = f"OMP_NUM_THREADS={max(cores // 2, 1)}, or torch.set_num_threads" if few else ""
    yield Check("cpu", "slow" if few else "ok", finding, remedy)


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
        yield Check(f"backend {name}", "ok" if good else "broken", finding, "" if good else _REPORT)


def _native() -> Iterator[Check]:
    """Say whether the native CPU kernel is in use, and why not."""
    status = native.status()
    if status.available:
        matrix = " with AMX for bfloat16" if status.amx else ""
        yield Check("native kernel", "ok", f"{status.build}{matrix}")
    else:
        remedy = "install a C++ compiler (g++ or clang++); plain torch serves until then"
        yield Check("native kernel", "slow", status.reason, remedy)


def _triton() -> Iterator[Check]:
    """Compile one variant of the kernel, which needs no GPU."""
    try:
        from dittools.kernels.triton_aot import Variant, compile_variant
    except ImportError as error:
        if "triton" in str(error):  # said among the packages already
            return
        raise
    here = torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)
    capability = 10 * here[0] + here[1]
    used = compile_variant(Variant(64, 64, 64), min(capability, 90))
    finding = f"compiles for sm_{min(capability, 90)}: {used.registers} registers"
    spills = f", {used.spill_bytes} bytes spilled" if used.spill_bytes else ""
    yield Check("triton compiler", "slow" if spills else "ok", finding + spills)


def _choice() -> Iterator[Check]:
    """Say what "auto" takes here, and why not the others before it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call, mask = _trial(device)
    try:
        yield Check("auto", "ok", f"takes {choose('auto', call, mask).name} for {device} tensors")
    except UnsupportedCall as error:
        yield Check("auto", "broken", str(error))


def _diffusers_contract() -> Iterator[Check]:
    """Look for every name in the host libraries that attaching relies on."""
    from dittools import contract

    remedy = f"pip install 'diffusers=={_dotted(SUPPORTED['diffusers'][1] or (0, 42))}.*'"
    try:
        wrong = contract.entry_point()
        symbols = contract.relied_on()
        lacking = list(contract.absent(symbols))
        there, there_not = contract.known_families()
    except ImportError as error:
        yield Check("diffusers contract", "broken", str(error), remedy)
        return
    if wrong:
        yield Check("diffusers contract", "broken", wrong, remedy)
    needed = [f"{s.module}.{s.name} ({s.where})" for s in lacking if not s.optional]
    if needed:
        yield Check("diffusers contract", "broken", f"lacks {', '.join(needed[:5])}", remedy)
    elif not wrong:
        spare = [f"{s.module}.{s.name}" for s in lacking if s.optional]
        rest = f"; goes on without {', '.join(spare)}" if spare else ""
        finding = f"attention entry point and {len(symbols) - len(spare)} names as expected{rest}"
        yield Check("diffusers contract", "ok", finding)
    finding = f"{len(there)} of {len(there) + len(there_not)}"
    if there_not:
        yield Check("families", "ok", f"{finding}; not in this diffusers: {', '.join(there_not)}")
    else:
        yield Check("families", "ok", finding)


def _attach() -> Iterator[Check]:
    """Attach to a toy pipeline and detach again."""
    from dittools import contract

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = contract.attached()
    finding = wrong or "dense plan bit-equal, sparse plan followed, detached without a trace"
    yield Check("attach", "broken" if wrong else "ok", finding, _REPORT if wrong else "")


def _writable() -> Iterator[Check]:
    """Write to the folders that are used, or to the parent that would hold them."""
    folders = (
        ("temporary folder", Path(tempfile.gettempdir()), "broken", "set TMPDIR"),
        ("cache folder", system.cache_folder(), "slow", "set DITTOOLS_CACHE"),
        ("output folder", Path.cwd() / "out", "slow", "--out"),
    )
    for name, folder, state, remedy in folders:
        place = folder.expanduser()
        while not place.exists() and place != place.parent:
            place = place.parent
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"x")
        except OSError as error:
            said = f"{folder}: {error.strerror or error}"
            yield Check(name, state, said, f"{remedy} to a folder you can write")
        else:
            yield Check(name, "ok", f"{folder} is writable")


def _settings() -> Iterator[Check]:
    """Name the switches that cost time and may have been forgotten."""
    switches = (
        ("DITTOOLS_DEBUG", "every mask is checked before it runs"),
        ("TRITON_INTERPRET", "Triton kernels are interpreted"),
        ("CUDA_LAUNCH_BLOCKING", "every kernel is waited for"),
    )
    for name, what in switches:
        if os.environ.get(name, "0") not in ("", "0"):
            yield Check(name, "slow", f"is set: {what}", f"unset {name}")
    if os.environ.get("DITTOOLS_NATIVE") == "0":
        yield Check("DITTOOLS_NATIVE", "slow", "is 0: no native kernel", "unset DITTOOLS_NATIVE")
