"""The command line as its users meet it: what it writes, and one clear line when it cannot."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dittools.cli import main

SMALL = ["--steps", "3", "--frames", "5", "--height", "32", "--width", "32"]


def _run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def _fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line an unusable command prints; its exit code must be 2."""
    code, _, err = _run(arguments, capsys)
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_generate_writes_a_clip_and_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "with a space"
    code, text, err = _run(
        ["generate", "--prompt", "a red circle", *SMALL, "--out", str(out)], capsys
    )
    assert code == 0, err
    assert sorted(p.name for p in out.iterdir()) == ["clip.mp4", "report.json"]
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["frames"] == 5
    assert "density" in text


def test_compare_writes_every_file_and_the_floors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--compare", "--repeats", "1", "--method", "random", *SMALL]
    arguments += ["--backend", "cpu"]  # which runs the mask also where dense would be faster
    arguments += [
        "--set",
        "density=0.5",
        "--set",
        "block_size=16",
        "--prompt",
        "a <b>red</b> circle",
    ]
    code, text, err = _run([*arguments, "--json", "--out", str(tmp_path)], capsys)
    assert code == 0, err
    names = {"accelerated.mp4", "contact_sheet.png", "dense.mp4", "side_by_side.mp4"}
    assert {p.name for p in tmp_path.iterdir()} == names | {"report.json", "report.html"}
    report = json.loads(text)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert set(report["floors"]) == {"other_seed", "random_blocks"}
    assert 0 < report["density"] < 1
    assert report["dense"]["attention_seconds"] < report["dense"]["seconds"]
    page = (tmp_path / "report.html").read_text()
    assert "<b>red</b>" not in page
    assert "&lt;b&gt;red" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # self-contained


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "sparkle"], "radial"),
        (["--method", "radial", "--set", "decya=1"], "decay"),
        (["--method", "radial", "--set", "decay=-1"], "decay"),
        (["--set", "decay"], "NAME=VALUE"),
        (["--plan", "missing.json"], "missing.json"),
        (["--frames", "0"], "frames"),
        (["--height", "97"], "97"),
        (["--prompt", "dragon castle"], "circle"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--backend", "warp"], "reference"),
        (["--dense-steps", "-1"], "count"),
        (["--steps", "many"], "--steps"),
        (["--no-such-option"], "no-such-option"),
        (["--method", "radial", "--plan", "p.json"], "one of"),
        (["--dtype", "int3"], "bfloat16"),
        (["--frames", "81"], "at most 64"),
        (["--height", "2048"], "at most 512"),
        (["--dense-steps", "nan"], "count"),
        (["--device", "qqq"], "qqq"),
        (["--seed", "99999999999999999999999"], "64 bits"),
        (["--guidance", "nan"], "guidance"),
        (["--prompt", ""], "no prompt"),
    ],
)
def test_bad_input_gets_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["generate", "--prompt", "a red circle", "--steps", "2", "--out", str(tmp_path)]
    assert said in _fails([*given, *arguments], capsys)
    assert not list(tmp_path.glob("*.mp4"))


def test_a_folder_that_cannot_be_written_is_named_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    start = time.perf_counter()
    line = _fails(
        ["generate", "--prompt", "a red circle", "--out", str(tmp_path / "file" / "x")], capsys
    )
    assert "cannot write to" in line
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("text", ["", "{", '{"format": "dittools-plan"', "[1, 2]", "\x00\xff"])
def test_a_damaged_plan_is_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_bytes(text.encode("latin-1"))
    line = _fails(["generate", "--prompt", "a red circle", "--plan", str(plan)], capsys)
    assert "plan.json" in line


def test_words_the_model_does_not_know_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--prompt", "a huge red circle", *SMALL, "--out", str(tmp_path)]
    code, _, err = _run(arguments, capsys)
    assert code == 0
    assert "does not know: huge" in err
    assert "triangle" in err


def test_an_interrupt_leaves_no_clip(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dittools", "generate", "--prompt", "a red circle"]
    command += ["--steps", "200", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background of a script ignores interrupts and hands that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:  # wait for the first step, then interrupt as a terminal would
        if line.startswith("generating"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_methods_lists_every_method_with_its_parameters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from dittools.methods import METHODS

    code, text, _ = _run(["methods", "--json"], capsys)
    listing = json.loads(text)
    assert code == 0
    assert list(listing) == list(METHODS)
    assert listing["radial"]["parameters"]["decay"]["default"] == METHODS["radial"]().decay
    assert all(entry["summary"] for entry in listing.values())


def test_doctor_finds_the_cpu_backend_sound(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = _run(["doctor", "--json"], capsys)
    checks = {check["name"]: check for check in json.loads(text)}
    assert code == 0
    assert checks["backend cpu"]["state"] == "ok"
    assert checks["diffusers contract"]["state"] == "ok"
    assert not [name for name, check in checks.items() if check["state"] == "broken"]


def test_doctor_notices_a_broken_backend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dittools.kernels import load

    cpu = load("cpu")
    monkeypatch.setattr(type(cpu), "block_sparse", lambda self, call, mask: call.query)
    code, text, _ = _run(["doctor", "--json"], capsys)
    assert code == 1
    assert '"broken"' in text


@pytest.mark.parametrize("command", ["generate", "methods", "doctor"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = _run([command, "--help"], capsys)
    assert code == 0
    assert f"Example: dittools {command}" in text


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dittools", "generate", "--method", "sparkle"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "60"},
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
