"""A list of prompts generated clip by clip: resumable, and shared out over processes."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dittools.errors import InputError
from dittools.pipelines.batch import (
    Batch,
    Job,
    Tell,
    jobs,
    make_share,
    mark_of,
    read_prompts,
    write_index,
)
from dittools.pipelines.batch_run import Maker
from dittools.pipelines.demo import DEMO_DEFAULTS
from dittools.pipelines.output import write_text
from dittools.pipelines.session import FPS, Request, settings_of, target_of
from dittools.reading import read_json


@dataclass(frozen=True)
class Suite:
    """What to generate; None leaves the model's default."""

    model: str
    method: str | None
    plan: Path | None
    prompts: list[str]
    per_prompt: int
    seed: int
    steps: int | None
    frames: int | None
    height: int | None
    width: int | None
    device: str
    out: Path


def make_clips(suite: Suite, part: str, processes: int, tell: Tell) -> None:
    """Make the clips of a suite that are not there yet.

    Args:
        suite: what to make.
        part: "I/N", the share of this process.
        processes: above 1, that many processes share the work instead.
        tell: called as clips are done.
    Raises:
        InputError: bad options, or a process failed; finished clips stay.
    """
    wanted = jobs(suite.prompts, suite.per_prompt, suite.seed, suite.out)
    mine = shard(wanted, part)
    if processes > 1:
        write_index(wanted, suite.out)
        _spawn(suite, processes)
        return
    request = _request(suite)
    settings, target = settings_of(request), target_of(request)
    batch = Batch(wanted, suite.out, mark_of(target, settings, model=suite.model), FPS)
    write_index(wanted, suite.out)
    failures = make_share(batch, mine, Maker(request), tell)
    if failures:
        raise InputError(
            f"{len(failures)} of {len(mine)} clips failed: {failures[0]['error']}",
            remedy="run again: finished clips are kept",
        )


def _request(suite: Suite) -> Request:
    return Request(
        model=suite.model,
        prompt=suite.prompts[0],
        method=suite.method,
        plan=suite.plan,
        steps=suite.steps,
        frames=suite.frames,
        height=suite.height,
        width=suite.width,
        device=suite.device,
        out=suite.out,
    )


def prompt_list(path: Path | None, prompt: str | None, model: str) -> list[str]:
    """Return the prompts of a file, or the one given, or the demo model's own.

    Raises:
        InputError: there is none.
    """
    if path is not None:
        return read_prompts(path)
    if prompt:
        return [prompt]
    if model == "demo":
        return [str(DEMO_DEFAULTS["prompt"])]
    raise InputError("no prompt to run", remedy="--prompts FILE or --prompt TEXT")


def shard(all_jobs: list[Job], text: str) -> list[Job]:
    """Return the part "I/N" of some jobs, I from 0.

    Raises:
        InputError: the text is not of that form, or I is not below N.
    """
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise InputError("--shard is not usable", expected="I/N, I from 0 to N - 1", got=repr(text))
    return all_jobs[int(index) :: int(count)]


def known_prompts(folder: Path) -> dict[str, str]:
    """Return file stem -> prompt for a folder: from prompts.json, from report.json, or from names.

    Raises:
        InputError: one of the two files is there but cannot be read.
    """
    try:
        if (folder / "prompts.json").is_file():
            index = read_json(folder / "prompts.json")
            return {Path(name).stem: str(prompt) for name, prompt in index.items()}
        if (folder / "report.json").is_file():
            report = read_json(folder / "report.json")
            prompt = str(report["settings"]["prompt"])
            return dict.fromkeys(("clip", "dense", "accelerated"), prompt)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot read the prompts of {folder}", got=str(error)) from error
    return {}


def _spawn(suite: Suite, processes: int) -> None:
    """Run one process per shard and wait for all of them."""
    options = {
        "--model": suite.model,
        "--method": suite.method,
        "--plan": suite.plan,
        "--prompts": suite.out / "suite.json",
        "--per-prompt": suite.per_prompt,
        "--seed": suite.seed,
        "--steps": suite.steps,
        "--frames": suite.frames,
        "--height": suite.height,
        "--width": suite.width,
        "--device": suite.device,
    }
    write_text(suite.out / "suite.json", json.dumps(suite.prompts, ensure_ascii=False))
    words = [str(suite.out), "--generate-only"]
    words += [str(word) for pair in options.items() if pair[1] is not None for word in pair]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "dittools", "quality", *words, "--shard", f"{i}/{processes}"],
            stdout=subprocess.DEVNULL,
        )
        for i in range(processes)
    ]
    failed = [str(i) for i, process in enumerate(running) if process.wait() != 0]
    if failed:
        raise InputError(
            f"process {', '.join(failed)} of {processes} failed",
            remedy="run again: finished clips are kept",
        )
