"""A list of prompts generated clip by clip: resumable, and shared out over processes."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dittools.errors import InputError
from dittools.patches import attach
from dittools.pipelines import load
from dittools.pipelines.demo import DEMO_DEFAULTS
from dittools.pipelines.generate import Settings, generate
from dittools.pipelines.output import write_clip, write_text
from dittools.pipelines.session import DEFAULT_METHOD, FPS, Request, settings_of
from dittools.plans import Plan

Tell = Callable[[str, int, int], None]  # (what, done, total)
LONGEST_NAME = 180  # characters of a prompt kept in a file name


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


@dataclass(frozen=True)
class Job:
    """One clip to make."""

    prompt: str
    seed: int
    path: Path


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
    todo = jobs(suite.prompts, suite.per_prompt, suite.seed, suite.out)
    mine = shard(todo, part)
    write_index(todo, suite.out)
    if processes > 1:
        _spawn(suite, processes)
        return
    request = Request(
        model=suite.model,
        prompt=suite.prompts[0],
        steps=suite.steps,
        frames=suite.frames,
        height=suite.height,
        width=suite.width,
        device=suite.device,
    )
    settings, target = settings_of(request), _target(suite)
    pipe = load(suite.model, device=suite.device)
    pipe.set_progress_bar_config(disable=True)
    for _ in generate_jobs(pipe, mine, settings, target, tell):
        pass


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


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file, one a line, or of VBench's own JSON list.

    Raises:
        InputError: the file cannot be read or holds no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            lines = [row["prompt_en"] if isinstance(row, dict) else row for row in json.loads(text)]
        else:
            lines = text.splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"cannot read prompts from {path}",
            expected="one prompt a line, or a JSON list of texts or of {'prompt_en': text}",
            got=type(error).__name__,
        ) from error
    if not prompts:
        raise InputError(f"{path} holds no prompt")
    return list(dict.fromkeys(prompts))


def jobs(prompts: list[str], per_prompt: int, seed: int, out: Path) -> list[Job]:
    """Return the clips of a suite, named "prompt-0.mp4", "prompt-1.mp4" ... as VBench wants them.

    Raises:
        InputError: two prompts lead to one file name, or fewer than one clip is wanted.
    """
    if per_prompt < 1:
        raise InputError("clips per prompt", expected="at least 1", got=str(per_prompt))
    found: dict[Path, Job] = {}
    for prompt in prompts:
        stem = "".join(" " if c in '/\\:*?"<>|\0' else c for c in prompt)[:LONGEST_NAME].strip(" .")
        for index in range(per_prompt):
            job = Job(prompt, seed + index, out / f"{stem}-{index}.mp4")
            if job.path in found:
                raise InputError(
                    "two prompts lead to one file name",
                    got=f"{found[job.path].prompt!r} and {prompt!r}",
                )
            found[job.path] = job
    return list(found.values())


def shard(all_jobs: list[Job], text: str) -> list[Job]:
    """Return the part "I/N" of some jobs, I from 0.

    Raises:
        InputError: the text is not of that form, or I is not below N.
    """
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise InputError("--shard is not usable", expected="I/N, I from 0 to N - 1", got=repr(text))
    return all_jobs[int(index) :: int(count)]


def generate_jobs(
    pipe: Any,
    todo: list[Job],
    settings: Settings,
    target: Any,
    tell: Tell,
) -> Iterator[Path]:
    """Make the clips that are not there yet and yield each path once it is complete.

    A clip takes its name only when it is whole, so that an interrupted suite goes on where it was.
    """
    missing = [job for job in todo if not _done(job.path)]
    tell("clips", len(todo) - len(missing), len(todo))
    with attach(pipe, target):
        for number, job in enumerate(missing):
            run = generate(pipe, replace(settings, prompt=job.prompt, seed=job.seed))
            yield write_clip(job.path, run.frames, FPS)
            tell("clips", len(todo) - len(missing) + number + 1, len(todo))


def write_index(todo: list[Job], out: Path) -> None:
    """Write prompts.json: file name -> prompt, of every clip of the suite."""
    names = {job.path.name: job.prompt for job in todo}
    write_text(out / "prompts.json", json.dumps(names, indent=1, ensure_ascii=False))


def known_prompts(folder: Path) -> dict[str, str]:
    """Return file stem -> prompt for a folder: from prompts.json, from report.json, or from names.

    Raises:
        InputError: one of the two files is there but cannot be read.
    """
    try:
        if (folder / "prompts.json").is_file():
            index = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
            return {Path(name).stem: str(prompt) for name, prompt in index.items()}
        if (folder / "report.json").is_file():
            report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            prompt = str(report["settings"]["prompt"])
            return dict.fromkeys(("clip", "dense", "accelerated"), prompt)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot read the prompts of {folder}", got=str(error)) from error
    return {}


def _target(suite: Suite) -> str | Plan:
    if suite.plan is not None and suite.method is not None:
        raise InputError("both a method and a plan are given", remedy="one of --method and --plan")
    return Plan.load(suite.plan) if suite.plan is not None else suite.method or DEFAULT_METHOD


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


def _done(path: Path) -> bool:
    return path.exists() or path.with_suffix(".png").exists()
