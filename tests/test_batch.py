"""Prompt lists: every clip exactly once, whoever dies; damaged clips are made again."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from dittools.cli import main
from dittools.errors import InputError
from dittools.pipelines import batch
from dittools.pipelines.batch import Batch, Job
from dittools.pipelines.generate import Run, Settings
from dittools.plans import Plan

PROMPTS = ["a cat", "a dog", "a bird", "a fish"]
SMALL = ["--model", "tiny/wan", "--method", "gna", "--steps", "1", "--frames", "5"]


def make(job: Job) -> tuple[Run, dict[str, Any]]:
    """One grey frame that tells the clips apart."""
    shade = (len(job.prompt) * 7 + job.seed) % 97 / 97
    return Run(np.full((1, 16, 16, 3), shade, np.float32), 0.5), {"density": 0.25}


def quiet(*_: Any) -> None:
    pass


def batch_of(out: Path, count: int = 2, mark: str = "m") -> Batch:
    return Batch(batch.jobs(PROMPTS, count, 7, out), out, mark, 8)


def prompt_file(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def run_cli(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


# -- one share


def test_a_finished_clip_is_not_made_again(tmp_path: Path) -> None:
    wanted = batch_of(tmp_path)
    made: list[str] = []

    def count(job: Job) -> tuple[Run, dict[str, Any]]:
        made.append(job.path.name)
        return make(job)

    assert batch.make_share(wanted, wanted.jobs, count, quiet) == []
    assert made == [job.path.name for job in wanted.jobs]
    assert batch.make_share(wanted, wanted.jobs, count, quiet) == []
    assert len(made) == 8


@pytest.mark.parametrize("damage", ["cut clip", "no clip", "no record", "torn record", "alien"])
def test_a_damaged_clip_is_made_again(tmp_path: Path, damage: str) -> None:
    wanted = batch_of(tmp_path, 1)
    batch.make_share(wanted, wanted.jobs, make, quiet)
    job, clip = wanted.jobs[1], tmp_path / "a dog-0.png"
    whole = clip.read_bytes()
    if damage == "cut clip":
        clip.write_bytes(whole[:-9])
    elif damage == "no clip":
        clip.unlink()
    elif damage == "no record":
        job.record.unlink()
    elif damage == "torn record":
        job.record.write_bytes(job.record.read_bytes()[:40])
    else:
        job.record.write_text(json.dumps({"format": "dittools-clip", "file": "../../other"}))
    assert not batch.is_done(job, "m")
    batch.make_share(wanted, wanted.jobs, make, quiet)
    assert batch.is_done(job, "m")
    assert clip.read_bytes() == whole


def test_what_a_killed_process_left_half_written_is_swept_up(tmp_path: Path) -> None:
    wanted = batch_of(tmp_path, 1)
    ours = [".a cat-0-x1_y2z3.mp4", ".a dog-0.clip-abcdefgh.json"]
    for name in [*ours, ".hidden.txt", ".an elephant-0-x1.mp4"]:
        (tmp_path / name).write_bytes(b"half")
    batch.make_share(wanted, wanted.jobs, make, quiet)
    left = {p.name for p in tmp_path.glob(".*")}
    assert left == {".hidden.txt", ".an elephant-0-x1.mp4"}


def test_clips_of_other_settings_are_not_taken_for_ours(tmp_path: Path) -> None:
    ours = batch_of(tmp_path, 1)
    batch.make_share(ours, ours.jobs, make, quiet)
    theirs = batch_of(tmp_path, 1, mark="another plan")
    with pytest.raises(InputError, match="other settings"):
        batch.make_share(theirs, theirs.jobs, make, quiet)


def test_a_failure_is_tried_twice_and_listed_and_the_others_are_made(tmp_path: Path) -> None:
    wanted = batch_of(tmp_path, 1)
    tries: dict[str, int] = {}

    def fragile(job: Job) -> tuple[Run, dict[str, Any]]:
        tries[job.prompt] = tries.get(job.prompt, 0) + 1
        if job.prompt == "a dog" or (job.prompt == "a cat" and tries["a cat"] == 1):
            raise RuntimeError("out\nof memory")
        return make(job)

    failures = batch.make_share(wanted, wanted.jobs, fragile, quiet)
    assert tries == {"a cat": 2, "a dog": 2, "a bird": 1, "a fish": 1}
    assert [(f["file"], f["error"], f["attempts"]) for f in failures] == [
        ("a dog-0.mp4", "RuntimeError: out of memory", 2)
    ]
    batch.note_failures(wanted, 0, 1, failures)
    report = batch.merge(wanted, 1)
    assert (report["wanted"], report["done"]) == (4, 3)
    assert report["missing"] == [{"prompt": "a dog", "seed": 7, "file": "a dog-0.mp4"}]
    assert report["failures"] == failures


def test_shares_merge_to_the_same_report_in_any_order(tmp_path: Path) -> None:
    reports = []
    for folder, order in (("one", [0, 1, 2]), ("two", [2, 0, 1])):
        wanted = batch_of(tmp_path / folder)
        for rank in order:
            failures = batch.make_share(wanted, wanted.jobs[rank::3], make, quiet)
            batch.note_failures(wanted, rank, 3, failures)
            report = batch.merge(wanted, 3)
        reports.append(report)
        assert json.loads((tmp_path / folder / "report.json").read_text()) == report
    assert reports[0] == reports[1]
    assert reports[0]["done"] == 8


def test_what_another_process_ends_while_the_report_is_written_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = batch_of(tmp_path, 1)
    batch.make_share(wanted, wanted.jobs[::2], make, quiet)
    write, late = batch.write_text, list(wanted.jobs[1::2])

    def slow(path: Path, text: str) -> None:
        if path.name == "report.json" and late:
            batch.make_share(wanted, [late.pop()], make, quiet)
        write(path, text)

    monkeypatch.setattr(batch, "write_text", slow)
    assert batch.merge(wanted, 2)["done"] == 4
    assert json.loads((tmp_path / "report.json").read_text())["done"] == 4


def test_the_mark_changes_with_plan_and_sizes_and_not_with_the_prompt() -> None:
    plain = Settings("a cat", seed=1, steps=4)
    radial = Plan.of(_method("radial"))
    marks = {
        batch.mark_of(radial, plain),
        batch.mark_of(Plan.of(_method("gna")), plain),
        batch.mark_of("radial", plain),
        batch.mark_of(radial, Settings("a cat", seed=1, steps=5)),
        batch.mark_of(radial, plain, model="demo"),
    }
    assert len(marks) == 5
    assert batch.mark_of(radial, Settings("a dog", seed=2, steps=4)) in marks
    assert batch.mark_of(_method("radial"), plain) == batch.mark_of(radial, plain)


def _method(name: str) -> Any:
    from dittools.methods import build

    return build(name, {})


def test_file_names_are_safe_short_and_distinct(tmp_path: Path) -> None:
    found = batch.jobs(["../../etc/passwd", "é" * 400, "...", "a\nb\tc"], 1, 0, tmp_path)
    for job in found:
        assert job.path.parent == tmp_path
        assert len(job.path.name.encode()) < 250
        assert job.path.name.isprintable()
    with pytest.raises(InputError, match="one file name"):
        batch.jobs(["A cat", "a cat"], 1, 0, tmp_path)  # one file where case does not count


# -- the command


def test_a_prompt_list_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["generate", *SMALL, "--prompts", prompt_file(tmp_path), "--out", out]
    code, said, _ = run_cli(capsys, *words, "--json")
    report = json.loads(said)
    assert (code, report["done"], report["missing"]) == (0, 4, [])
    assert sorted(p.name for p in out.glob("*.mp4")) == sorted(f"{p}-0.mp4" for p in PROMPTS)
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*.mp4")}
    assert run_cli(capsys, *words)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("*.mp4")} == stamps


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "a cat"], "both a prompt and a prompt file"),
        (["--compare"], "--compare takes one prompt"),
        (["--engine", "cluster"], "unknown engine"),
        (["--workers", "2"], "workers belong to the ray engine"),
        (["--per-prompt", "0"], "at least 1"),
    ],
)
def test_bad_options_are_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ["generate", *SMALL, "--prompts", prompt_file(tmp_path), "--out", out, *words]
    code, _, err = run_cli(capsys, *given)
    assert (code, err.count("\n")) == (2, 1)
    assert said in err
    assert not list(tmp_path.rglob("*.mp4"))


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xff\xfe\x00a", None])
def test_unusable_prompt_files_are_one_line(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    code, _, err = run_cli(capsys, "generate", *SMALL, "--prompts", path, "--out", tmp_path / "o")
    assert (code, err.count("\n")) == (2, 1)


def test_a_model_that_cannot_be_loaded_fails_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "tiny/nothing", "--method", "gna", "--prompts", prompt_file(tmp_path)]
    code, _, err = run_cli(capsys, "generate", *words, "--out", tmp_path / "o")
    assert (code, err.count("\n")) == (2, 1)
    assert "unknown tiny pipeline" in err


# -- several processes


def launch(processes: int, prompts: Path, out: Path) -> subprocess.Popen[str]:
    # without a GPU `accelerate launch` starts one process, however many are asked for
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words += ["-m", "dittools", "generate", *SMALL]
    words += ["--prompts", str(prompts), "--per-prompt", "3", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [sys.executable, *words],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def ranks_of(parent: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(parent.pid).children(recursive=True):
        with suppress(psutil.Error):  # a short-lived child of a rank may end meanwhile
            if "generate" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_rank_killed_in_the_middle_costs_nothing_that_was_done(
    processes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = prompt_file(tmp_path), tmp_path / "out"
    running = launch(processes, prompts, out)
    until = time.monotonic() + 240
    while not list(out.glob("*.clip.json")):
        assert running.poll() is None, running.stdout and running.stdout.read()[-2000:]
        assert time.monotonic() < until
        time.sleep(0.01)
    ranks = ranks_of(running)
    assert len(ranks) == processes
    ranks[-1].send_signal(signal.SIGKILL)
    running.communicate(timeout=240)
    assert running.returncode != 0
    done = {p: p.stat().st_mtime_ns for p in out.glob("*.mp4") if _recorded(p)}
    assert 0 < len(done) < 12

    again = launch(processes, prompts, out)
    text, _ = again.communicate(timeout=240)
    assert again.returncode == 0, text[-2000:]
    assert len(list(out.glob("*.mp4"))) == 12
    assert {p: p.stat().st_mtime_ns for p in done} == done
    report = json.loads((out / "report.json").read_text())
    assert (report["done"], report["missing"], report["failures"]) == (12, [], [])

    alone = tmp_path / "alone"
    words = ["generate", *SMALL, "--prompts", prompts, "--per-prompt", "3", "--out", alone]
    assert run_cli(capsys, *words)[0] == 0
    single = json.loads((alone / "report.json").read_text())
    assert [c["sha256"] for c in report["clips"]] == [c["sha256"] for c in single["clips"]]


def _recorded(clip: Path) -> bool:
    return clip.with_name(clip.stem + ".clip.json").exists()
