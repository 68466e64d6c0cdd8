"""The official VBench package, in an environment of its own.

Its pins (transformers 4.33, numpy below 2) cannot stand beside current diffusers, so it runs in
another interpreter. The environment made here borrows this one's torch and adds the package without
its dependencies, which is all that temporal flickering needs; the other dimensions need networks
and run where the user names an interpreter in which VBench is fully installed.
"""

import json
import math
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from dittools import system
from dittools.errors import InputError

VBENCH = "0.1.5"
DECORD = "0.6.0"
OFFLINE = ("temporal_flickering",)  # measured without a download
_RUNNER = Path(__file__).with_name("official_runner.py")


@dataclass(frozen=True)
class Official:
    """What VBench says of one dimension.

    Attributes:
        value: over all clips; None when it failed.
        clips: file name -> value.
        error: why it failed, empty when it did not.
    """

    value: float | None
    clips: dict[str, float]
    error: str = ""


def environment_folder() -> Path:
    """Return where the environment is kept; DITTOOLS_CACHE or XDG_CACHE_HOME moves it."""
    return system.cache_folder() / f"vbench-{VBENCH}-py{sys.version_info[0]}.{sys.version_info[1]}"


def make_environment(folder: Path | None = None) -> Path:
    """Return the interpreter of VBench's environment, made on first use (a small download).

    Raises:
        InputError: pip cannot install the packages, with its last line.
    """
    home = folder or environment_folder()
    python = system.venv_python(home)
    ready = home / ".ready"
    if ready.exists():
        return python
    venv.create(home, clear=True, with_pip=True, symlinks=system.venv_takes_links())
    minor = int(version("torch").split(".")[1])  # torch 2.N goes with torchvision 0.(N + 15)
    wanted = [f"vbench=={VBENCH}", f"decord=={DECORD}", f"torchvision==0.{minor + 15}.*"]
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "--no-deps", *wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InputError(
            "cannot install the official VBench",
            got=_last_line(done.stderr),
            remedy="--official-python with an interpreter that has vbench",
        )
    site = next(home.glob("[lL]ib/**/site-packages"))
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    ready.touch()
    return python


def run_official(
    clips: Sequence[Path],
    dimensions: Sequence[str],
    *,
    python: Path | None = None,
    device: str = "cpu",
) -> dict[str, Official]:
    """Return what VBench says of some clips, in its custom_input mode.

    Args:
        clips: video files; only these are seen by VBench.
        dimensions: VBench's names.
        python: interpreter with a full VBench; None uses the small environment.
        device: "cpu" or "cuda".
    Raises:
        InputError: the environment cannot be made, or VBench cannot be started in it.
    """
    if python is not None and not python.is_file():
        raise InputError("no such interpreter", got=str(python))
    interpreter = python or make_environment()
    with tempfile.TemporaryDirectory(prefix="dittools-vbench-") as scratch:
        seen, output = Path(scratch) / "clips", Path(scratch) / "output"
        seen.mkdir()
        output.mkdir()
        for clip in clips:
            system.link_or_copy(clip, seen / clip.name)
        done = subprocess.run(
            [str(interpreter), "-I", str(_RUNNER), str(seen), str(output), device, *dimensions],
            capture_output=True,
            text=True,
            check=False,
        )
        report = output / "bridge.json"
        if not report.exists():
            raise InputError(
                "the official VBench does not start",
                got=_last_line(done.stderr),
                remedy="--official-python with an interpreter that has vbench",
            )
        found = json.loads(report.read_text(encoding="utf-8"))
    return {name: _official(row) for name, row in found.items()}


def _official(row: dict[str, object]) -> Official:
    if "error" in row:
        return Official(None, {}, str(row["error"]))
    value, clips = float(str(row["value"])), row["clips"]
    assert isinstance(clips, dict)
    if not math.isfinite(value):
        return Official(None, {}, "VBench returned NaN: it needs clips of two frames or more")
    return Official(value, {str(name): float(each) for name, each in clips.items()})


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"
