"""The README is true: snippets run, commands exist, tables are what the scripts write."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from readme import TEXT, fenced, quick

ROOT = Path(__file__).parents[1]


def test_every_python_snippet_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    snippets = fenced("python")
    assert len(snippets) >= 3
    for snippet in snippets:
        exec(compile(quick(snippet), "README.md", "exec"), names)
    assert (tmp_path / "plan.json").exists()


def test_every_command_is_a_command() -> None:
    from dittools.cli import app

    known = {command.callback.__name__ for command in app.registered_commands if command.callback}
    known |= {group.name for group in app.registered_groups}
    used = [
        line.split()[1]
        for block in fenced("sh")
        for line in block.splitlines()
        if line.startswith("dittools ")
    ]
    assert used
    assert set(used) <= known


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = set(re.findall(r"(?:^|`)make ([a-z-]+)", TEXT, flags=re.MULTILINE))
    assert {"demo", "test"} <= used <= targets


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_linked_files_exist() -> None:
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", prose) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_tables_are_what_the_scripts_write() -> None:
    command = [sys.executable, str(ROOT / "bench" / "readme.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, f"run python bench/readme.py\n{done.stderr}"


def test_the_example_method_runs() -> None:
    import dittools

    names: dict[str, object] = {"__name__": "example"}
    exec((ROOT / "examples" / "own_method.py").read_text(), names)
    method = names["EveryNthFrame"]()  # type: ignore[operator]
    pipe = dittools.pipelines.load("demo")
    size = {"height": 96, "width": 96, "num_frames": 11, "num_inference_steps": 2}
    with dittools.attach(pipe, method, backend="cpu") as handle:
        pipe("a red circle", **size)
        report = handle.report()
    assert report.calls["sparse"] == 2 * 2 * 6  # steps, guidance branches, layers
    assert 0.2 < report.density < 0.8
