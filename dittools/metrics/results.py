"""The results file: versioned, and carrying what is needed to judge two of them side by side."""

import hashlib
import os
import platform
import subprocess
import tempfile
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dittools import system
from dittools.errors import InputError
from dittools.reading import misfit, read_json, within

FORMAT = "dittools-bench"
VERSION = 1
_SPREAD = dict.fromkeys(("median", "p20", "p80"), float)
_FIDELITY = {
    "psnr_db": float,
    "ssim": float,
    "ms_ssim?": (float, None),
    "frame_psnr_db": [float],
}
_SCORE = {"all": bool}
_CASE = {
    "name": str,
    "plan_checksum": str,
    "density": float,
    "total_ms": _SPREAD,
    "parts_ms": {"*": _SPREAD},
    "peak_bytes": (float, None),
    "speedup": _SPREAD,
    "limit_ms": (float, None),
    "bound": float,
    "bound_at_density": float,
    "fidelity": (_FIDELITY, None),
    "prompt_score": (_SCORE, None),
    "clip": str,
}
_FLOOR = {**_FIDELITY, "density?": (float, None), "prompt_score?": (_SCORE, None)}
_SHAPE = {
    "created": str,
    "hardware": dict,
    "versions": dict,
    "git": dict,
    "run": {"model": str, "*": Any},
    "cases": [_CASE],
    "floors?": {"*": _FLOOR},
}

# What must agree for two runs to be compared: key in "run" -> how a person calls it.
SAME_RUN = {
    "model": "model",
    "prompt": "prompt",
    "seed": "seed",
    "steps": "steps",
    "frames": "frames",
    "height": "height",
    "width": "width",
    "guidance": "guidance",
    "warm_up": "warm-up",
    "device": "device",
    "dtype": "dtype",
}
SAME_HARDWARE = {"cpu": "processor", "gpu": "GPU", "threads": "threads"}


def provenance() -> dict[str, Any]:
    """Return when, on what and with what something is measured, as JSON types."""
    gpu = torch.cuda.is_available()
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": {
            "machine": platform.machine(),
            "cpu": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if gpu else "",
            "gpu_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else 0,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("dittools", "torch", "diffusers", "transformers")},
            "triton": _version("triton"),
        },
        "git": git_state(),
    }


def new_results(run: dict[str, Any], cases: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return a results document.

    Args:
        run: settings every case shares: model, prompt, seed, steps, sizes, warm_up, repeats ...
        cases: one per method; the first is dense.
        more: further top-level entries, e.g. peak.
    """
    head = {"format": FORMAT, "version": VERSION, **provenance()}
    return {**head, "run": run, "cases": cases, **more}


def load_results(path: Path) -> dict[str, Any]:
    """Return a results document.

    Raises:
        InputError: the file cannot be read, is no results file, or is of a newer version.
    """
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read results from {path}",
            expected="a file written by `dittools bench latency`",
            got=getattr(error, "strerror", None) or str(error),
        ) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        kind = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{path} holds no results", expected=f"format {FORMAT}", got=repr(kind))
    if found.get("version") != VERSION:
        raise InputError(
            f"{path} is of another version",
            expected=str(VERSION),
            got=repr(found.get("version")),
            remedy="measure again",
        )
    return checked(found, path)


def checked(found: Any, path: Path) -> dict[str, Any]:
    """Return a results document whose every value can be shown, with clips beside its file.

    Raises:
        InputError: it lacks something, or names a clip elsewhere.
    """
    wrong = misfit(found, _SHAPE, "the file") or ("" if found["cases"] else "the file has no case")
    if wrong:
        raise InputError(f"{path} is incomplete", got=wrong, remedy="measure again")
    parts = [set(case["parts_ms"]) for case in found["cases"]]
    if any(names != parts[0] for names in parts):
        raise InputError(f"{path} is incomplete", expected="the same parts in every case")
    for case in found["cases"]:
        if not case["clip"]:  # nothing to show
            continue
        try:
            within(path.parent, case["clip"])
        except ValueError as error:
            raise InputError(
                f"{path} names a clip elsewhere", expected="clips beside the file", got=str(error)
            ) from error
    return dict(found)


def reasons_not_comparable(first: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return, one sentence each, why times or pictures of two results should not be compared."""
    found = []
    for part, keys in (("run", SAME_RUN), ("hardware", SAME_HARDWARE)):
        for key, name in keys.items():
            one, two = first[part].get(key), other[part].get(key)
            if one != two:
                found.append(f"other {name}: {_text(one)} and {_text(two)}")
    for name in sorted({*first["versions"], *other["versions"]}):
        one, two = first["versions"].get(name), other["versions"].get(name)
        if one != two:
            found.append(f"other version of {name}: {_text(one)} and {_text(two)}")
    for label, document in (("first", first), ("second", other)):
        if document["git"].get("dirty"):
            found.append(f"the {label} was measured with uncommitted changes")
    return found


def git_state(folder: Path | None = None) -> dict[str, Any]:
    """Return the revision the package was run from; empty when it is no checkout."""
    where = folder or Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(where), *words], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # a package installed below some other project's checkout is not part of it
    if git("ls-files", "--error-unmatch", str(Path(__file__))) is None:
        return {"revision": "", "dirty": False}
    status = git("status", "--porcelain", "--untracked-files=no")
    return {"revision": git("rev-parse", "HEAD") or "", "dirty": bool(status)}


def checksum(*blobs: bytes) -> str:
    """Return the first 16 hex digits of the SHA-256 of some bytes."""
    digest = hashlib.sha256()
    for blob in blobs:
        digest.update(len(blob).to_bytes(8, "little") + blob)
    return digest.hexdigest()[:16]


def write_atomic(path: Path, text: str) -> None:
    """Write UTF-8 text so that readers see the old file or the new one, never a part.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise InputError(f"cannot write {path}", got=error.strerror or str(error)) from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def _processor() -> str:
    return system.processor() or platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _text(value: Any) -> str:
    return "none" if value in (None, "") else str(value)
