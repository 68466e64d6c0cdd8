"""`dittools quality`: one clear line on bad input, nothing half-written, suites that go on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dittools import cli
from dittools.commands import suite, terminal
from dittools.errors import InputError
from dittools.metrics import official
from dittools.metrics.clips import read_clip
from dittools.pipelines.output import write_clip


def write(path: Path, seed: int = 0, frames: int = 5, side: int = 64) -> Path:
    rng = np.random.default_rng(seed)
    return write_clip(path, rng.random((frames, side, side, 3)).astype(np.float32), 8)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["quality", *map(str, words)])
    found = capsys.readouterr()
    return int(stop.value.code or 0), found.out, found.err


def test_a_folder_gives_one_json_line_and_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "one.mp4")
    write(tmp_path / "two.mp4", seed=1)
    write(tmp_path / "side_by_side.mp4")
    (tmp_path / "contact_sheet.png").write_bytes(b"not measured beside videos")
    code, out, _ = run(capsys, tmp_path, "--json")
    report = json.loads(out)
    assert code == 0
    assert report == json.loads((tmp_path / "quality.json").read_text())
    assert list(report["clips"]) == ["one.mp4", "two.mp4"]
    assert report["dimensions"]["temporal_flickering"]["kind"] == "vbench"
    assert report["dimensions"]["dynamic_degree"]["kind"] == "proxy"
    assert report["dimensions"]["aesthetic_quality"]["value"] is None
    assert report["official"] is None


def test_the_table_keeps_true_and_proxy_columns_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "console", Console(width=140))
    write(tmp_path / "one.mp4")
    _, out, _ = run(capsys, tmp_path)
    rows = {
        cells[1].strip(): [c.strip() for c in cells[2:4]]
        for line in out.splitlines()
        if len(cells := line.replace("┃", "│").split("│")) > 4
    }
    assert rows["dimension"] == ["VBench", "proxy"]
    assert rows["temporal flickering"][0] != "" == rows["temporal flickering"][1]
    assert rows["imaging quality"][0] == "" != rows["imaging quality"][1]
    assert rows["aesthetic quality"] == ["", ""]


@pytest.mark.parametrize(
    ("prepare", "words", "message"),
    [
        (lambda d: None, ["{d}/none"], "no such folder"),
        (lambda d: None, ["{d}"], "holds no clip"),
        (lambda d: None, [], "nothing to measure"),
        (lambda d: (d / "bad.mp4").write_bytes(b"x"), ["{d}"], "bad.mp4"),
        (lambda d: write(d / "a.mp4"), ["{d}", "--dino", "{d}"], "no dino model"),
        (lambda d: write(d / "a.mp4"), ["{d}", "--reference", "{d}/none"], "no such folder"),
        (lambda d: write(d / "a.mp4"), ["{d}", "--official-python", "{d}/py"], "no such interp"),
        (lambda d: (d / "p.txt").write_text("\n\n"), ["--prompts", "{d}/p.txt"], "no prompt"),
        (lambda d: (d / "p.json").write_text("{"), ["--prompts", "{d}/p.json"], "cannot read"),
        (lambda d: None, ["{d}", "--method", "gna", "--shard", "4/4"], "--shard"),
        (lambda d: None, ["{d}", "--method", "gna", "--per-prompt", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_line_and_writes_no_report(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prepare: Any,
    words: list[str],
    message: str,
) -> None:
    prepare(tmp_path)
    code, _, err = run(capsys, *(word.format(d=tmp_path) for word in words))
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "quality.json").exists()


def test_fidelity_to_a_reference_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, fast = tmp_path / "dense", tmp_path / "fast"
    write(dense / "a.mp4", side=96, frames=2)
    write(fast / "a.mp4", side=96, frames=2)
    _, out, _ = run(capsys, fast, "--reference", dense, "--json")
    found = json.loads(out)["clips"]["a.mp4"]["fidelity"]
    assert found["psnr_db"] == 120
    assert found["ms_ssim"] == pytest.approx(1)
    write(fast / "a.mp4", side=96, frames=3)
    code, _, err = run(capsys, fast, "--reference", dense)
    assert code == 2
    assert "differ in length or size" in err
    write(fast / "b.mp4")
    (fast / "a.mp4").unlink()
    code, _, err = run(capsys, fast, "--reference", dense)
    assert (code, "no clip to compare with" in err) == (2, True)


# -- prompt suites


def test_jobs_are_named_as_vbench_wants_them(tmp_path: Path) -> None:
    found = suite.jobs(["a cat", "a dog/wolf"], 2, 7, tmp_path)
    assert [job.path.name for job in found] == [
        "a cat-0.mp4",
        "a cat-1.mp4",
        "a dog wolf-0.mp4",
        "a dog wolf-1.mp4",
    ]
    assert [job.seed for job in found] == [7, 8, 7, 8]
    with pytest.raises(InputError, match="one file name"):
        suite.jobs(["a/b", "a b"], 1, 0, tmp_path)


def test_shards_cover_every_job_once(tmp_path: Path) -> None:
    every = suite.jobs([f"prompt {i}" for i in range(7)], 1, 0, tmp_path)
    parts = [suite.shard(every, f"{i}/3") for i in range(3)]
    assert sorted(job.path for part in parts for job in part) == sorted(job.path for job in every)
    for text in ("3/3", "1", "a/b", "-1/2"):
        with pytest.raises(InputError, match="--shard"):
            suite.shard(every, text)


def test_prompt_files_of_both_forms(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\n a dog \na cat\n")
    (tmp_path / "p.json").write_text(json.dumps([{"prompt_en": "a cat", "dimension": []}, "a dog"]))
    for name in ("p.txt", "p.json"):
        assert suite.read_prompts(tmp_path / name) == ["a cat", "a dog"]


SMALL = ("--model", "tiny/wan", "--method", "gna", "--steps", 1, "--frames", 5, "--per-prompt", 2)


def test_a_suite_is_generated_scored_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    out = tmp_path / "clips"
    code, said, err = run(capsys, out, *SMALL, "--prompts", prompts, "--json")
    assert code == 0, err
    report = json.loads(said)
    assert list(report["clips"]) == ["a cat-0.mp4", "a cat-1.mp4", "a dog-0.mp4", "a dog-1.mp4"]
    assert json.loads((out / "prompts.json").read_text())["a dog-1.mp4"] == "a dog"
    seeds = [read_clip(out / f"a cat-{i}.mp4").pixels for i in (0, 1)]
    assert not np.array_equal(*seeds)

    kept = (out / "a cat-0.mp4").stat().st_mtime_ns
    (out / "a dog-1.mp4").unlink()
    (out / ".a dog-1-half.mp4").write_bytes(b"left by a killed run")
    run(capsys, out, *SMALL, "--prompts", prompts, "--generate-only")
    assert (out / "a cat-0.mp4").stat().st_mtime_ns == kept
    assert np.array_equal(read_clip(out / "a dog-1.mp4").pixels.shape, seeds[0].shape)


def test_processes_share_a_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process gets its shard of the same prompts; one that fails is named."""
    started: list[list[str]] = []

    class Process:
        def __init__(self, words: list[str], **_: Any) -> None:
            started.append(words)

        def wait(self) -> int:
            return int(started[-1][-1] == "1/2")

    monkeypatch.setattr(suite.subprocess, "Popen", Process)
    wanted = suite.Suite(
        "tiny/wan", "gna", None, ["a cat"], 1, 0, None, 5, None, None, "cpu", tmp_path
    )
    with pytest.raises(InputError, match="finished clips are kept"):
        suite.make_clips(wanted, "0/1", 2, lambda *_: None)
    assert [words[-1] for words in started] == ["0/2", "1/2"]
    shared = tmp_path / "suite.json"
    assert all(str(shared) in words and "--generate-only" in words for words in started)
    assert suite.read_prompts(shared) == ["a cat"]


def test_prompts_of_a_folder_come_from_its_own_files(tmp_path: Path) -> None:
    assert suite.known_prompts(tmp_path) == {}
    (tmp_path / "report.json").write_text(json.dumps({"settings": {"prompt": "a red circle"}}))
    assert suite.known_prompts(tmp_path)["dense"] == "a red circle"
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(InputError, match="cannot read the prompts"):
        suite.known_prompts(tmp_path)


# -- the demo world's checker as one more column


def moving_circle(direction: int) -> np.ndarray:
    y, x = np.mgrid[0:48, 0:64]
    clip = np.empty((9, 48, 64, 3), np.float32)
    clip[:] = (0.08, 0.14, 0.42)
    for frame in range(9):
        centre = 32 + direction * (frame - 4) * 4
        clip[frame][(x - centre) ** 2 + (y - 24) ** 2 < 90] = (0.93, 0.16, 0.16)
    return clip


def test_prompt_score_reads_stored_clips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "a red circle moving left over a blue background"
    write_clip(tmp_path / f"{prompt}-0.mp4", moving_circle(-1), 8)
    write_clip(tmp_path / f"{prompt}-1.mp4", moving_circle(+1), 8)
    index = {f"{prompt}-{i}.mp4": prompt for i in (0, 1)}
    (tmp_path / "prompts.json").write_text(json.dumps(index))
    _, out, _ = run(capsys, tmp_path, "--json")
    report = json.loads(out)
    right, wrong = (row["prompt_score"] for row in report["clips"].values())
    assert right["all"] is True
    assert wrong["all"] is False
    assert wrong["motion"] is False
    assert wrong["colour"] is True
    assert report["prompt_score"] == 0.5


# -- the official package


@pytest.mark.oracle
def test_temporal_flickering_equals_the_official_package(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.setenv("DITTOOLS_CACHE", str(tmp_path_factory.mktemp("cache")))
    write(tmp_path / "noise.mp4")
    write_clip(tmp_path / "circle.mp4", moving_circle(-1), 8)
    code, out, err = run(capsys, tmp_path, "--official", "--json")
    assert code == 0, err
    report = json.loads(out)
    own, said = (report[k]["temporal_flickering"] for k in ("dimensions", "official"))
    assert own["value"] == pytest.approx(said["value"], abs=1e-6)
    assert own["clips"] == pytest.approx(said["clips"], abs=1e-6)
    assert 0 < own["value"] < 1


def test_an_official_package_that_cannot_be_had_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = write(tmp_path / "a.mp4")

    def create(home: Path, **_: Any) -> None:
        (home / "bin").mkdir(parents=True)
        (home / "bin" / "python").write_text("#!/bin/sh\necho 'ERROR: no network' >&2\nexit 1\n")
        (home / "bin" / "python").chmod(0o755)

    monkeypatch.setattr(official.venv, "create", create)
    with pytest.raises(
        InputError, match=r"cannot install the official VBench.*no network.*official-python"
    ):
        official.make_environment(tmp_path / "env")
    assert not (tmp_path / "env" / ".ready").exists()
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named vbench' >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(InputError, match="No module named vbench"):
        official.run_official([clip], ["temporal_flickering"], python=python)


def test_a_dimension_the_official_package_cannot_run_keeps_its_reason() -> None:
    assert official._official({"error": "RuntimeError: no network"}).value is None
    found = official._official({"value": float("nan"), "clips": {}})
    assert found.value is None
    assert "NaN" in found.error
