"""A prompt list from request to report: here, over `accelerate launch` processes, or on Ray."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dittools.errors import InputError
from dittools.pipelines import batch
from dittools.pipelines.batch import Batch, Job, Tell
from dittools.pipelines.generate import Run
from dittools.pipelines.load import load
from dittools.pipelines.output import check_writable
from dittools.pipelines.ranks import own_device, place
from dittools.pipelines.session import FPS, Request, attach_options, settings_of, target_of

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Work:
    """What every process of a batch needs to make its clips.

    Attributes:
        request: model, target and sizes; prompt, seed and out are those of the first clip.
        batch: all clips.
    """

    request: Request
    batch: Batch


def run_batch(
    request: Request,
    prompts: Path,
    tell: Tell,
    *,
    per_prompt: int = 1,
    engine: str = "local",
    workers: int | None = None,
) -> dict[str, Any]:
    """Make the clips of a prompt list that are not there yet and return the merged report.

    Args:
        request: everything but the prompts.
        prompts: text file, one prompt a line, or VBench's JSON list.
        tell: called as clips are done.
        per_prompt: clips of each prompt, on consecutive seeds.
        engine: "local" for this process and its `accelerate launch` siblings, or "ray".
        workers: Ray actors; one per device by default.
    Raises:
        InputError: bad options, an unwritable folder, or clips of other settings are in it.
    """
    work = plan_batch(request, prompts, per_prompt)
    if engine == "ray":
        from dittools.pipelines.ray_engine import run_on_ray

        return run_on_ray(work, workers, tell)
    if engine != "local":
        raise InputError("unknown engine", expected=" or ".join(ENGINES), got=repr(engine))
    if workers is not None:
        raise InputError(
            "workers belong to the ray engine",
            remedy="--engine ray, or torchrun --nproc_per_node N -m dittools ...",
        )
    rank, world = place()
    return run_share(work, rank, world, tell)


def plan_batch(request: Request, prompts: Path, per_prompt: int) -> Work:
    """Return what is to be made, after everything the user can mend was checked."""
    if request.compare:
        raise InputError("--compare takes one prompt", remedy="leave out --prompts or --compare")
    if request.prompt is not None:
        raise InputError("both a prompt and a prompt file are given", remedy="one of the two")
    texts = batch.read_prompts(prompts)
    wanted = batch.jobs(texts, per_prompt, request.seed, request.out)
    request = replace(request, prompt=texts[0])
    settings, target = settings_of(request), target_of(request)
    mark = batch.mark_of(
        target,
        settings,
        model=request.model,
        dtype=request.dtype,
        options=attach_options(request),
    )
    check_writable(request.out)
    batch.write_index(wanted, request.out)
    return Work(request, Batch(wanted, request.out, mark, FPS))


def run_share(work: Work, rank: int, world: int, tell: Tell) -> dict[str, Any]:
    """Make every `world`-th clip from `rank` on, and return the report as far as it goes."""
    mine = work.batch.jobs[rank::world]
    maker = Maker(work.request)
    if not all(batch.is_done(job, work.batch.mark) for job in mine):
        maker.open()
    failures = batch.make_share(work.batch, mine, maker, tell)
    batch.note_failures(work.batch, rank, world, failures)
    return batch.merge(work.batch, world)


class Maker:
    """Makes clips; loads the pipeline with the first one, so that a finished share loads nothing.

    Args:
        request: model, target and sizes.
    """

    def __init__(self, request: Request) -> None:
        """Keep the request; nothing is loaded yet."""
        self.request = request
        self._make: batch.Make | None = None

    def open(self) -> batch.Make:
        """Load the pipeline once.

        Raises:
            InputError: the model cannot be loaded.
        """
        if self._make is None:
            request = self.request
            pipe = load(request.model, dtype=request.dtype, device=own_device(request.device))
            pipe.set_progress_bar_config(disable=True)
            options = {"backend": request.backend, **attach_options(request)}
            self._make = batch.make_with(pipe, target_of(request), settings_of(request), options)
        return self._make

    def __call__(self, job: Job) -> tuple[Run, dict[str, Any]]:
        """Return the frames of one clip and the notes of its record."""
        return self.open()(job)
