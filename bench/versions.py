"""Run the attach tests on several diffusers releases, each in an environment of its own.

python bench/versions.py                   # 0.36.0, 0.39.0 and the newest release
python bench/versions.py 0.38.0 --fresh    # one release, its environment made anew

Environments stay in .venvs/ and are used again. One table at the end; exit 1 when a test failed.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = ROOT / ".venvs"
VERSIONS = ("0.36.0", "0.39.0", "newest")
TESTS = ("test_attach", "test_families", "test_audit", "test_caches")
PACKAGES = ("torch", "pytest", "hypothesis", "peft", "ftfy")


@dataclass
class Outcome:
    """What the tests of one release did."""

    version: str
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    skips: dict[str, list[str]] = field(default_factory=dict)  # reason -> tests


def newest() -> str:
    """Return the newest release on the package index."""
    command = [sys.executable, "-m", "pip", "index", "versions", "diffusers"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"diffusers \(([\d.]+)\)", found)
    if match is None:
        raise SystemExit(f"pip names no newest diffusers: {found!r}")
    return match[1]


def environment(version: str, fresh: bool) -> Path:
    """Return the Python of an environment with that release, made where it is missing."""
    place = PLACES / f"diffusers-{version}"
    python, done = place / "bin" / "python", place / ".done"
    if fresh:
        shutil.rmtree(place, ignore_errors=True)
    if done.exists():
        return python
    print(f"diffusers {version}: making {place.relative_to(ROOT)}", flush=True)
    venv.create(place, with_pip=True)
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    # what a release of diffusers asks of the hub client is for pip to find out
    free = ("diffusers==", "huggingface_hub==", "transformers==")
    constraints = place / "constraints.txt"
    constraints.write_text("\n".join(pin for pin in pins if not pin.startswith(free)))
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    pip += ["-c", str(constraints)]
    subprocess.run([*pip, *PACKAGES, f"diffusers=={version}", "-e", str(ROOT)], check=True)
    done.touch()
    return python


def run(version: str, python: Path) -> Outcome:
    """Run the tests on one release."""
    print(f"diffusers {version}: running {', '.join(TESTS)}", flush=True)
    outcome, start = Outcome(version), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
        command += ["-m", "not slow and not gpu", f"--junitxml={results}", "--tb=no"]
        command += [str(ROOT / "tests" / f"{name}.py") for name in TESTS]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not results.exists():
            raise SystemExit(f"pytest did not start on diffusers {version}:\n{done.stdout}")
        cases = list(ET.parse(results).iter("testcase"))
    outcome.seconds = time.monotonic() - start
    for case in cases:
        _note(outcome, case)
    return outcome


def _note(outcome: Outcome, case: ET.Element) -> None:
    name = str(case.get("name"))
    skipped = case.find("skipped")
    if case.find("failure") is not None or case.find("error") is not None:
        outcome.counts["failed"] += 1
        outcome.failures.append(name)
    elif skipped is not None:
        outcome.counts["skipped"] += 1
        outcome.skips.setdefault(str(skipped.get("message")), []).append(name)
    else:
        outcome.counts["passed"] += 1


def table(outcomes: list[Outcome]) -> str:
    """Return the summary: a line per release, then what was skipped and what failed."""
    lines = [f"{'diffusers':<10} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}"]
    for outcome in outcomes:
        count = outcome.counts
        lines.append(
            f"{outcome.version:<10} {count['passed']:>7} {count['failed']:>7} "
            f"{count['skipped']:>8} {outcome.seconds:>8.0f}"
        )
    for outcome in outcomes:
        lines += [
            f"{outcome.version}: {len(names)} x {reason}" for reason, names in outcome.skips.items()
        ]
        lines += [f"{outcome.version}: FAILED {name}" for name in outcome.failures]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=list(VERSIONS), metavar="VERSION")
    parser.add_argument("--fresh", action="store_true", help="make the environments anew")
    args = parser.parse_args(argv)
    versions = [newest() if v == "newest" else v for v in args.versions]
    outcomes = [run(v, environment(v, args.fresh)) for v in dict.fromkeys(versions)]
    print(table(outcomes))
    return int(any(outcome.failures for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
