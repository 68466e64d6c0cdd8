"""The package as people get it: built, installed into an empty environment, used from elsewhere.

Run by `make test-wheel`; the installation takes a minute or two, most of it torch.
"""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from readme import fenced, quick

ROOT = Path(__file__).parents[1]
CONFIG = Path.home() / ".config" / "pip" / "pip.conf"  # where packages come from, before HOME moves
pytestmark = pytest.mark.wheel


def run(
    command: list[str | Path], folder: Path, home: Path, *, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a program with an empty home and nothing of this environment."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    env = {**kept, "HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    env["MPLCONFIGDIR"] = str(home)
    if CONFIG.exists():
        env["PIP_CONFIG_FILE"] = str(CONFIG)
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


def environment(folder: Path, home: Path) -> Path:
    """Return the interpreter of a new, empty environment."""
    run([sys.executable, "-m", "venv", folder], folder.parent, home)
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an empty home and an empty working folder in it."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "home").mkdir()
    (folder / "work").mkdir()
    return folder


@pytest.fixture(scope="module")
def built(place: Path) -> tuple[Path, Path]:
    """The source archive, and the wheel made from it."""
    python = environment(place / "build", place / "home")
    run([python, "-m", "pip", "install", "-q", "build"], place, place / "home")
    run([python, "-m", "build", "--outdir", place / "dist", ROOT], place, place / "home")
    (archive,), (wheel,) = (place / "dist").glob("*.tar.gz"), (place / "dist").glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def python(place: Path, built: tuple[Path, Path]) -> Iterator[Path]:
    """The interpreter of an environment that holds the wheel and what it asks for."""
    found = environment(place / "env", place / "home")
    pins = ROOT / "constraints.txt"
    run([found, "-m", "pip", "install", "-q", "-c", pins, built[1]], place, place / "home")
    return found


def test_the_archive_and_the_wheel_hold_what_they_should(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "pyproject.toml", "app.py", "tests/test_plans.py"} <= names
    with zipfile.ZipFile(built[1]) as wheel:
        held = set(wheel.namelist())
        (metadata,) = (wheel.read(n).decode() for n in held if n.endswith("dist-info/METADATA"))
    tops = {name.split("/")[0] for name in held}
    assert len(tops) == 2, tops  # the package and its metadata; nothing that shadows another
    tracked = subprocess.run(
        ["git", "ls-files", "dittools"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not set(tracked) - held
    assert not [name for name in held if name.endswith((".pyc", ".so"))]
    assert "Requires-Python: >=3.10" in metadata
    for minor in (10, 11, 12, 13):
        assert f"Classifier: Programming Language :: Python :: 3.{minor}" in metadata
    assert metadata.count("dittools generate") > 0, "the README is the long description"


def test_the_installed_package_is_used_and_brings_its_data(python: Path, place: Path) -> None:
    code = """
import dittools
from pathlib import Path
from dittools.kernels.native import SOURCE
from dittools.pipelines.session import DEMO_PLAN
from dittools.pipelines.demo import WEIGHTS
root = Path(dittools.__file__).parent
wanted = [SOURCE, DEMO_PLAN, WEIGHTS / "model_index.json"]
wanted += [root / "py.typed", root / "studio/assets"]
print([str(path) for path in wanted if not path.exists()], root)
"""
    said = run([python, "-c", code], place / "work", place / "home").stdout
    assert said.startswith("[] ")
    assert str(place / "env") in said


def test_the_readme_runs_from_another_folder(python: Path, place: Path) -> None:
    script = place / "work" / "readme_snippets.py"
    script.write_text("\n".join(map(quick, fenced("python"))), encoding="utf-8")
    run([python, script], place / "work", place / "home")
    assert (place / "work" / "plan.json").exists()


def test_the_commands_run_from_another_folder(python: Path, place: Path) -> None:
    work, home, program = place / "work", place / "home", python.parent / "dittools"
    assert "generate" in run([program, "--help"], work, home).stdout
    assert "radial" in json.loads(run([program, "methods", "--json"], work, home).stdout)
    checks = json.loads(run([program, "doctor", "--json"], work, home).stdout)
    assert not [check for check in checks if check["state"] == "broken"]
    assert {check["name"]: check["state"] for check in checks}["attach"] == "ok"
    words = ["generate", "--model", "demo", "--steps", "2", "--out", "out/try", "--json"]
    run([program, *words, "--prompt", "a red circle"], work, home)
    assert list((work / "out" / "try").glob("*.mp4"))
    plan = ["--model", "demo", "--plan", work / "plan.json", "--json"]
    assert json.loads(run([program, "forecast", *plan], work, home).stdout)
    wrong = run([program, "generate", "--plan", "none.json"], work, home, code=2)
    assert wrong.stderr.count("\n") == 1


def test_without_extras_the_error_names_what_to_install(python: Path, place: Path) -> None:
    done = run([python.parent / "dittools", "studio"], place / "work", place / "home", code=2)
    assert "pip install" in done.stderr
