"""A batch on a Ray cluster: Ray Data over actors, each of which loads the pipeline once.

Ray keeps the queue: an actor takes the next clip when it is free (back-pressure), and one that dies
is started again and its clip made again. All actors write to the same folder, so on several
machines it has to be one they share.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dittools.errors import InputError
from dittools.pipelines import batch
from dittools.pipelines.batch import Tell

if TYPE_CHECKING:
    from dittools.pipelines.batch_run import Work

BACKLOG = 2  # blocks of one clip each that may wait per actor


class Worker:
    """One actor: keeps a pipeline and makes the clips it is handed.

    Args:
        work: the batch.
    """

    def __init__(self, work: "Work") -> None:
        """Take the work; the pipeline is loaded with the first clip."""
        from dittools.pipelines.batch_run import Maker

        self.work = work
        self.make = Maker(work.request)

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Make the clips of some rows; what failed comes back as JSON, empty when nothing did."""
        failed = []
        for number in rows["job"]:
            job = self.work.batch.jobs[int(number)]
            failed += batch.make_share(self.work.batch, [job], self.make, _quiet)
        return {"failures": [json.dumps(failed)]}


def run_on_ray(work: "Work", workers: int | None, tell: Tell) -> dict[str, Any]:
    """Make the clips that are missing on Ray actors and return the merged report.

    Args:
        work: the batch; its folder must be the same for all nodes.
        workers: actors; by default one per GPU of the cluster, or one where there is none.
        tell: called as clips come back.
    Raises:
        InputError: Ray is not installed, or `workers` is not usable.
    """
    ray = _ray()
    if workers is not None and workers < 1:
        raise InputError("workers is not usable", expected="at least 1", got=str(workers))
    todo = [n for n, job in enumerate(work.batch.jobs) if not batch.is_done(job, work.batch.mark)]
    wanted = len(work.batch.jobs)
    tell("clips", wanted - len(todo), wanted)
    failures: list[dict[str, Any]] = []
    if todo:
        own = not ray.is_initialized()
        if own:
            ray.init(log_to_driver=False, include_dashboard=False, logging_level="error")
        try:
            work = _absolute(work)
            for done, found in enumerate(_results(ray, work, todo, workers), start=1):
                failures += json.loads(found)
                tell("clips", wanted - len(todo) + done, wanted)
        finally:
            if own:
                ray.shutdown()
    batch.note_failures(work.batch, 0, 1, failures)
    return batch.merge(work.batch, 1)


def _results(ray: Any, work: "Work", todo: list[int], workers: int | None) -> Iterator[str]:
    """Yield one answer per clip as they come."""
    gpus = int(ray.cluster_resources().get("GPU", 0)) if work.request.device != "cpu" else 0
    count = workers or max(gpus, 1)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = ray.data.from_items([{"job": n} for n in todo], override_num_blocks=len(todo))
    answers = rows.map_batches(
        Worker,
        fn_constructor_args=(work,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=min(count, len(todo)), max_tasks_in_flight_per_actor=BACKLOG
        ),
        num_gpus=1 if gpus else 0,
        num_cpus=0 if gpus else 1,
    )
    for row in answers.iter_rows():
        yield row["failures"]


def _absolute(work: "Work") -> "Work":
    """Name the folder so that actors, which start elsewhere, mean the same one."""
    wanted = work.batch
    jobs = [replace(job, path=job.path.absolute()) for job in wanted.jobs]
    request, plan = work.request, work.request.plan
    return replace(
        work,
        request=replace(request, plan=None if plan is None else plan.absolute()),
        batch=replace(wanted, jobs=jobs, out=wanted.out.absolute()),
    )


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(
            "the ray engine needs Ray", got=str(error), remedy="pip install 'dittools[ray]'"
        ) from error
    return ray


def _quiet(_what: str, _done: int, _total: int) -> None:
    """Report nothing: the driver counts the answers."""
