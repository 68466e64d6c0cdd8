"""Many prompts as clips: shared out over processes, resumable, every clip made exactly once.

A clip takes its name only when it is whole, and its record (a small JSON file beside it: checksum,
prompt, seed, settings) only after the clip. A clip counts as done when its record agrees with what
is asked for and with the bytes on disk. Nothing is passed between processes, so that one that dies
holds up nobody: whoever ends last writes the merged report.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dittools.errors import InputError
from dittools.methods import Method
from dittools.patches import attach
from dittools.pipelines.generate import Run, Settings, generate
from dittools.pipelines.output import write_clip, write_text
from dittools.plans import Plan
from dittools.reading import digest, misfit, read_json, read_text

FORMAT = "dittools-clip"
VERSION = 1
MOST_PROMPT_BYTES = 8_000_000
_RECORD = {
    **dict.fromkeys(("format", "file", "sha256", "mark", "prompt"), str),
    "seed": int,
    "seconds": float,
}
_SHARE = {"mark": str, "failures": [dict]}
LONGEST_NAME = 180  # characters of a prompt kept in a file name
TRIES = 2

Tell = Callable[[str, int, int], None]  # (what, done, total)
Make = Callable[["Job"], tuple[Run, dict[str, Any]]]  # the clip, and what to note about it


@dataclass(frozen=True)
class Job:
    """One clip to make; `path` is where an mp4 goes, a single frame takes the suffix png."""

    prompt: str
    seed: int
    path: Path

    @property
    def record(self) -> Path:
        """Path of the record beside the clip."""
        return self.path.with_name(self.path.stem + ".clip.json")


@dataclass(frozen=True)
class Batch:
    """Clips that share all settings but prompt and seed.

    Attributes:
        jobs: every clip of the batch, in the order of the report.
        out: folder of the clips.
        mark: stands for model, plan and sizes; clips of another mark are not ours.
        fps: frames per second of the files.
    """

    jobs: Sequence[Job]
    out: Path
    mark: str
    fps: int


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file, one a line, or of VBench's own JSON list.

    Raises:
        InputError: the file cannot be read or holds no prompt.
    """
    try:
        if path.suffix == ".json":
            rows = read_json(path, MOST_PROMPT_BYTES)
            lines = [row["prompt_en"] if isinstance(row, dict) else row for row in rows]
        else:
            lines = read_text(path, MOST_PROMPT_BYTES).splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"cannot read prompts from {path}",
            expected="UTF-8 text with one prompt a line, or a JSON list of texts or of "
            "{'prompt_en': text}",
            got=type(error).__name__,
        ) from error
    if not prompts:
        raise InputError(f"{path} holds no prompt")
    return list(dict.fromkeys(prompts))


def jobs(prompts: list[str], per_prompt: int, seed: int, out: Path) -> list[Job]:
    """Return the clips of a batch, named "prompt-0.mp4", "prompt-1.mp4" ... as VBench wants them.

    Raises:
        InputError: two prompts lead to one file name, or fewer than one clip is wanted.
    """
    if per_prompt < 1:
        raise InputError("clips per prompt", expected="at least 1", got=str(per_prompt))
    found: dict[str, Job] = {}
    for prompt in prompts:
        stem = _file_stem(prompt)
        for index in range(per_prompt):
            job = Job(prompt, seed + index, out / f"{stem}-{index}.mp4")
            same = found.setdefault(job.path.name.casefold(), job)
            if same is not job:
                raise InputError(
                    "two prompts lead to one file name",
                    got=f"{same.prompt!r} and {prompt!r}",
                )
    return list(found.values())


def _file_stem(prompt: str) -> str:
    """Return what any file system takes: no separators or control codes, at most 180 bytes."""
    plain = "".join(" " if c in '/\\:*?"<>|' or not c.isprintable() else c for c in prompt)
    short = plain.encode("utf-8", "replace")[:LONGEST_NAME].decode("utf-8", "ignore")
    return short.strip(" .") or "clip"


def mark_of(target: Plan | Method | str, settings: Settings, **more: Any) -> str:
    """Return 16 hex digits that stand for everything of a batch but prompts and seeds.

    Args:
        target: a plan, a configured method, or a method's name.
        settings: sizes and guidance; prompt and seed do not count.
        more: what else makes two clips differ: model, dtype, dense steps ...
    """
    fields = {k: v for k, v in settings.to_dict().items() if k not in ("prompt", "seed")}
    text = json.dumps([_described(target), fields, more], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _described(target: Plan | Method | str) -> str:
    """Return a name, or a digest of the files a plan would be saved as."""
    if isinstance(target, str):
        return target
    plan = target if isinstance(target, Plan) else Plan.of(target)
    with tempfile.TemporaryDirectory() as folder:
        plan.save(Path(folder) / "plan.json")
        return " ".join(_digest(path) for path in sorted(Path(folder).iterdir()))


def is_done(job: Job, mark: str) -> bool:
    """Whether a clip is there, whole, and of this batch.

    Raises:
        InputError: it is there and whole but was made with other settings.
    """
    found = _record(job)
    if found is None or found["sha256"] != _digest(job.path.with_name(found["file"])):
        return False
    if (found["mark"], found["prompt"], found["seed"]) != (mark, job.prompt, job.seed):
        raise InputError(
            f"{job.path.parent} holds a clip of this name made with other settings",
            got=found["file"],
            remedy="another --out folder, or remove that clip",
        )
    return True


def make_share(batch: Batch, mine: Sequence[Job], make: Make, tell: Tell) -> list[dict[str, Any]]:
    """Make the missing clips of one share; a clip that fails is tried again at the end.

    Args:
        batch: what they belong to.
        mine: the share.
        make: returns the frames of one job and notes for its record.
        tell: called after every clip.
    Returns:
        The failures: prompt, seed, file, error.
    """
    todo = [job for job in mine if not is_done(job, batch.mark)]
    _sweep(batch.out, todo)
    ready = len(mine) - len(todo)
    tell("clips", ready, len(mine))
    failures: list[dict[str, Any]] = []
    for attempt in range(TRIES):
        failures, failed = [], []
        for job in todo:
            try:
                run, notes = make(job)
                finish_clip(batch, job, run, notes)
            except Exception as error:  # noqa: BLE001 - one bad prompt must not end the others
                failed.append(job)
                failures.append(_failure(job, error, attempt + 1))
            else:
                ready += 1
                tell("clips", ready, len(mine))
        todo = failed
    return failures


def _sweep(out: Path, todo: Sequence[Job]) -> None:
    """Remove the half-written files a killed process left of these clips."""
    stems = {job.path.stem for job in todo} | {job.record.stem for job in todo}
    for path in out.glob(".*") if todo else ():
        if path.stem[1:].rpartition("-")[0] in stems:
            path.unlink(missing_ok=True)


def finish_clip(batch: Batch, job: Job, run: Run, notes: dict[str, Any]) -> None:
    """Write one clip, then the record that declares it done."""
    path = write_clip(job.path, run.frames, batch.fps)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "file": path.name,
        "sha256": _digest(path),
        "mark": batch.mark,
        "prompt": job.prompt,
        "seed": job.seed,
        "frames": len(run.frames),
        "seconds": run.seconds,
        **notes,
    }
    write_text(job.record, json.dumps(content, indent=1, ensure_ascii=False))


def make_with(pipe: Any, plan: Any, settings: Settings, options: dict[str, Any]) -> Make:
    """Return a `make` that runs one pipeline with a plan attached for each clip."""

    def make(job: Job) -> tuple[Run, dict[str, Any]]:
        with attach(pipe, plan, **options) as handle:
            run = generate(pipe, replace(settings, prompt=job.prompt, seed=job.seed))
            report = handle.report().to_dict()
        return run, {"density": report["density"], "fallbacks": report["fallbacks"]}

    return make


def write_index(todo: Iterable[Job], out: Path) -> None:
    """Write prompts.json: file name -> prompt, of every clip of the batch."""
    names = {job.path.name: job.prompt for job in todo}
    write_text(out / "prompts.json", json.dumps(names, indent=1, ensure_ascii=False))


def note_failures(batch: Batch, rank: int, world: int, failures: list[dict[str, Any]]) -> None:
    """Write down that a share has ended, and what failed in it; none before it has."""
    content = {"mark": batch.mark, "failures": failures, "ended": time.time()}
    write_text(batch.out / f".share-{rank}-of-{world}.json", json.dumps(content))


def merge(batch: Batch, world: int) -> dict[str, Any]:
    """Write report.json from what is on disk and return it.

    The state is read again after writing, until what was written is what is there: of several
    processes that end together, the last to write then wrote everything.
    """
    while True:
        report = _merged(batch, world)
        write_text(batch.out / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
        if _merged(batch, world) == report:
            return report


def _merged(batch: Batch, world: int) -> dict[str, Any]:
    clips, missing = [], []
    for job in batch.jobs:
        found = _record(job)
        if found is not None and found["mark"] == batch.mark:
            clips.append({k: v for k, v in found.items() if k not in ("format", "version", "mark")})
        else:
            missing.append({"prompt": job.prompt, "seed": job.seed, "file": job.path.name})
    failures: list[dict[str, Any]] = []
    for rank in range(world):
        try:
            share = read_json(batch.out / f".share-{rank}-of-{world}.json")
        except (OSError, ValueError):
            continue  # this share has not ended: its clips are listed as missing
        if not misfit(share, _SHARE) and share["mark"] == batch.mark:
            failures += share["failures"]
    return {
        "format": "dittools-batch",
        "version": 1,
        "mark": batch.mark,
        "wanted": len(batch.jobs),
        "done": len(clips),
        "seconds": sum(clip["seconds"] for clip in clips),
        "clips": clips,
        "missing": missing,
        "failures": failures,
    }


def _record(job: Job) -> dict[str, Any] | None:
    """Return the record of a clip; one that is torn or not ours counts as not there."""
    try:
        found: dict[str, Any] = read_json(job.record)
    except (OSError, ValueError):
        return None
    if misfit(found, _RECORD) or found["format"] != FORMAT:
        return None
    suffixes = {job.path.name, job.path.with_suffix(".png").name}
    return found if found["file"] in suffixes else None


def _digest(path: Path) -> str:
    try:
        return digest(path)
    except (OSError, ValueError):
        return ""


def _failure(job: Job, error: Exception, attempts: int) -> dict[str, Any]:
    text = " ".join(str(error).split())[:300]
    return {
        "prompt": job.prompt,
        "seed": job.seed,
        "file": job.path.name,
        "error": f"{type(error).__name__}: {text}",
        "attempts": attempts,
    }
