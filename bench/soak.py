"""Many generations in one process: memory, files and threads stay flat, results stay the same.

    python bench/soak.py [--runs 500] [--pairs 100] [--out docs/results/soak.json]

One process loads the embedded model and a few toy pipelines once, then attaches a method, generates
a few steps at one of several sizes and detaches, in turn over all combinations. Every result must
equal the first of its kind bit for bit. Memory, open files and threads are read after each run.
Memory is what the process itself holds ("RssAnon"): pages of mapped files come and go with the load
of the machine. Its slope is that of a least-squares line behind the warm-up, which ends when every
combination has run twice. Then two pipelines run side by side in two threads, each against what it
gives alone. The exit code is 1 when a limit is broken.
"""

import argparse
import gc
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dittools.methods import build
from dittools.patches import attach
from dittools.pipelines.load import load
from dittools.pipelines.tiny import call_arguments

MOST_MB_PER_RUN = 0.1
SIZES = {  # changes to the call of a toy pipeline, or the whole call of the embedded model
    "tiny/wan": (
        {},
        {"height": 48, "num_frames": 13},
        {"width": 64, "num_frames": 13},
        {"height": 64, "width": 32},
        {"width": 32, "num_frames": 17},
    ),
    "tiny/hunyuan_video": ({}, {"height": 48, "width": 32}),
    "tiny/flux": ({}, {"height": 24, "width": 32}, {"height": 40}, {"height": 56, "width": 8}),
    "tiny/sd3": ({}, {"height": 32, "width": 32}),
    "demo": (
        {"height": 48, "width": 48, "num_frames": 3},
        {"height": 32, "width": 64, "num_frames": 8},
    ),
}
BLOCK = {"block_size": 16}  # tokens; sequences are short
SMALL = {"block_size": 8}
METHODS: dict[str, dict[str, dict[str, Any]]] = {  # name and parameters, by pipeline
    "tiny/wan": {
        **dict.fromkeys(("radial", "svg", "sparge", "paro"), SMALL),
        "psa": BLOCK,
        "gna": {"window": (0.5, 0.5, 0.5)},
        "svg2": {"q_clusters": 4, "k_clusters": 8, "least_queries": 2, "least_keys": 2},
    },
    "tiny/hunyuan_video": {"radial": SMALL, "sparse_vdit": SMALL},
    "tiny/flux": {"clear": SMALL, "sparge": SMALL, "psa": BLOCK},
    "tiny/sd3": {"random": SMALL, "paro": SMALL},
    "demo": {
        **dict.fromkeys(("radial", "sparge", "svg", "rectified"), BLOCK),
        "vmoba": {},
    },
}


class Job(NamedTuple):
    """One combination: a pipeline by name, its size by number, and a method."""

    name: str
    size: int
    method: str


class Reading(NamedTuple):
    """What the process held after one run."""

    held_mb: float
    files: int
    threads: int


class Soak:
    """Pipelines that are loaded once, and the first result of every job."""

    def __init__(self, names: list[str], steps: int = 2) -> None:
        """Load the named pipelines; `steps` denoising steps a run."""
        self.pipes = {name: load(name) for name in names}
        for pipe in self.pipes.values():
            pipe.set_progress_bar_config(disable=True)
        self.steps = steps
        self.first: dict[Job, torch.Tensor] = {}
        self.differing: dict[Job, int] = {}
        self.sparse: dict[Job, int] = {}  # calls of the last run that were sparse

    def jobs(self) -> list[Job]:
        """Return every combination, the pipelines mixed."""
        made = [
            (place, Job(name, size, method))
            for name in self.pipes
            for place, (method, size) in enumerate(
                (method, size) for method in METHODS[name] for size in range(len(SIZES[name]))
            )
        ]
        return [job for _, job in sorted(made, key=lambda row: row[0])]

    def generate(self, job: Job, pipe: Any = None) -> torch.Tensor:
        """Return the latents of one attached run; the pipeline is bare again afterwards."""
        pipe = self.pipes[job.name] if pipe is None else pipe
        arguments: dict[str, Any] = {"prompt": "a red circle moving left"}
        if job.name.startswith("tiny/"):
            arguments = call_arguments(job.name.removeprefix("tiny/"))
        arguments |= SIZES[job.name][job.size]
        arguments |= {"num_inference_steps": self.steps, "output_type": "latent"}
        method = METHODS[job.name][job.method]
        # a named backend: "auto" would run sequences this short dense
        with attach(pipe, build(job.method, method), dense_steps=1, backend="cpu") as handle:
            made = pipe(**arguments, generator=torch.Generator().manual_seed(job.size))
            report = handle.report()
        self.sparse[job] = sum(layer.sparse for layer in report.layers)
        latents: torch.Tensor = made.frames if hasattr(made, "frames") else made.images
        return latents

    def run(self, job: Job) -> None:
        """Run a job and compare it with its first result."""
        result = self.generate(job)
        if not torch.equal(self.first.setdefault(job, result), result):
            self.differing[job] = self.differing.get(job, 0) + 1


def reading() -> Reading:
    """Return what this process holds now; Linux only."""
    held = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
    files = len(list(Path("/proc/self/fd").iterdir())) - 1  # the listing itself
    held_mb = int(held[1]) / 1024 if held else float("nan")
    return Reading(held_mb, files, len(list(Path("/proc/self/task").iterdir())))


def slope(values: list[float]) -> float:
    """Return the slope of the least-squares line through equally spaced values, per step."""
    y = torch.tensor(values, dtype=torch.float64)
    x = torch.arange(len(values), dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum().clamp(min=1))


def long_run(
    soak: Soak, runs: int, note: Callable[[int, Reading], None] | None = None
) -> dict[str, Any]:
    """Return the figures of `runs` runs one after another.

    Args:
        soak: loaded pipelines.
        runs: at least two per job, and one more.
        note: is told the number of runs done and what the process holds.
    """
    jobs = soak.jobs()
    readings, started = [], time.monotonic()
    for number in range(runs):
        soak.run(jobs[number % len(jobs)])
        if number % 10 == 9:
            gc.collect()
        readings.append(reading())
        if note is not None:
            note(number + 1, readings[-1])
    settled = readings[min(2 * len(jobs), runs // 2) :]
    return {
        "runs": runs,
        "jobs": len(jobs),
        "jobs_without_sparse_calls": sum(not calls for calls in soak.sparse.values()),
        "after_warm_up": len(settled),
        "seconds": round(time.monotonic() - started, 1),
        "mb_per_run": round(slope([r.held_mb for r in settled]), 4),
        "held_mb": [round(r.held_mb, 1) for r in (readings[0], settled[0], readings[-1])],
        "files": [settled[0].files, readings[-1].files],
        "threads": [settled[0].threads, readings[-1].threads],
        "differing": sum(soak.differing.values()),
    }  # fmt: skip


def side_by_side(soak: Soak, names: tuple[str, str], pairs: int) -> dict[str, Any]:
    """Return the figures of two pipelines in two threads, `pairs` runs each.

    Every result is compared with what its job gives alone.
    """
    jobs = [[job for job in soak.jobs() if job.name == name] for name in names]
    alone = [{job: soak.generate(job) for job in own} for own in jobs]
    differing, failed = [0, 0], []

    def work(mine: int) -> None:
        try:
            for number in range(pairs):
                job = jobs[mine][number % len(jobs[mine])]
                differing[mine] += not torch.equal(soak.generate(job), alone[mine][job])
        except Exception as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work, args=(mine,)) for mine in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "pipelines": list(names),
        "runs_each": pairs,
        "differing": sum(differing),
        "failed": [str(error) for error in failed],
    }


def broken(found: dict[str, Any]) -> list[str]:
    """Return the limits that the figures break, one sentence each."""
    long, pair = found["long"], found["side_by_side"]
    reasons = []
    if not long["mb_per_run"] < MOST_MB_PER_RUN:
        reasons.append(f"memory grows by {long['mb_per_run']} MB a run")
    for kind in ("files", "threads"):
        if long[kind][1] > long[kind][0]:
            reasons.append(f"{kind} grow from {long[kind][0]} to {long[kind][1]}")
    if long["differing"]:
        reasons.append(f"{long['differing']} runs differ from the first of their kind")
    if long["jobs_without_sparse_calls"]:
        reasons.append(f"{long['jobs_without_sparse_calls']} combinations never ran sparse")
    if pair["differing"] or pair["failed"]:
        reasons.append(f"{pair['differing']} runs in threads differ, {len(pair['failed'])} failed")
    return reasons


def main() -> int:
    """Run, print and write the figures; 1 when a limit is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--pairs", type=int, default=100, help="runs of each of the two threads")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)

    def note(done: int, now: Reading) -> None:
        if done % 50 == 0:
            sys.stdout.write(f"{done:5} runs  {now.held_mb:7.1f} MB  {now.files} files\n")
            sys.stdout.flush()

    soak = Soak(list(SIZES))
    found = {"torch": torch.__version__.split("+")[0], "long": long_run(soak, given.runs, note)}
    found["side_by_side"] = side_by_side(soak, ("tiny/wan", "tiny/flux"), given.pairs)
    text = json.dumps(found, indent=1)
    sys.stdout.write(text + "\n")
    if given.out:
        given.out.write_text(text + "\n")
    reasons = broken(found)
    sys.stdout.write("".join(f"broken: {reason}\n" for reason in reasons))
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
