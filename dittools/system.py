"""What differs between operating systems, and what is done where one lacks it; nowhere else.

Tested on Linux. On macOS and Windows the answers below are the documented ones of Python.
"""

import os
import re
import shutil
import sys
from pathlib import Path


def is_linux() -> bool:
    """Whether this is Linux, where the native kernel is built."""
    return sys.platform == "linux"


def name() -> str:
    """Return the system as Python names it: linux, darwin, win32 ..."""
    return sys.platform


def cache_folder() -> Path:
    """Return where builds and environments are kept; it may not exist yet.

    DITTOOLS_CACHE names it, XDG_CACHE_HOME its parent; else it is .cache/dittools in the home.
    """
    own, shared = os.environ.get("DITTOOLS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or Path.home() / ".cache") / "dittools"


def processor() -> str:
    """Return the processor's name as Linux tells it; empty elsewhere."""
    return next(iter(_cpu_info("model name")), "")


def cpu_features() -> set[str]:
    """Return the instruction sets of this CPU as Linux names them; empty elsewhere."""
    return {word for line in _cpu_info("flags")[:1] for word in line.split()}


def reset_peak_memory() -> bool:
    """Start the record of this process's largest memory anew; False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_memory() -> int | None:
    """Return the largest memory of this process so far, in bytes; None where nothing records it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", _status())
    return int(found.group(1)) * 1024 if found else None


def limit_memory(more: int) -> bool:
    """Let this process take that many bytes of address space more, for good; False on Windows."""
    try:
        import resource
    except ImportError:
        return False
    found = re.search(r"VmSize:\s+(\d+) kB", _status())
    if found is None:  # macOS has the limit but does not keep to it
        return False
    resource.setrlimit(resource.RLIMIT_AS, (int(found.group(1)) * 1024 + more,) * 2)
    return True


def container_memory() -> tuple[int | None, int | None]:
    """Return (limit, used) of the container in bytes; None each where there is no limit."""
    limit, used = (_number(Path(f"/sys/fs/cgroup/memory.{n}")) for n in ("max", "current"))
    return limit, used


def venv_python(folder: Path) -> Path:
    """Return the interpreter of a virtual environment."""
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def venv_takes_links() -> bool:
    """Whether a virtual environment may link to the interpreter; Windows keeps that to admins."""
    return os.name != "nt"


def link_or_copy(source: Path, target: Path) -> None:
    """Make a file appear under a second path; a copy where links are not allowed."""
    try:
        target.symlink_to(source.resolve())
    except (OSError, NotImplementedError):
        shutil.copyfile(source, target)


def _status() -> str:
    try:
        return Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return ""


def _cpu_info(key: str) -> list[str]:
    """Return the values of one key, one per core."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    pairs = (line.partition(":") for line in text.splitlines())
    return [value.strip() for found, _, value in pairs if found.strip() == key]


def _number(path: Path) -> int | None:
    """Return the number in a file; None when it is missing or says "max"."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
