"""One model in memory and one job at a time, with progress, and a stop that stops."""

import gc
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from dittools.errors import DitToolsError, InputError
from dittools.patches import detach
from dittools.pipelines import load as load_pipeline

logger = logging.getLogger("dittools.studio")

MOST_WAITING = 16  # jobs in the queue; more are refused, so that nobody waits in vain
FINISHED = ("done", "stopped", "failed")

Work = Callable[[Any, "Job"], Any]  # (pipeline, job) -> result


class Cancelled(BaseException):
    """The person stopped the job.

    Not an Exception, so that no handler between a denoising step and the engine swallows it.
    """


@dataclass(frozen=True)
class Snapshot:
    """What a page shows of a job.

    Attributes:
        state: "waiting", "running", "done", "stopped" or "failed".
        ahead: jobs before this one; 0 when it runs.
        what: what is running, e.g. "dense".
        done, total: steps of that.
        share: of the whole job, 0 to 1; None while it is not known.
        seconds: since the job started.
        left: seconds to go; None while it is not known.
        error: one sentence; empty unless the state is "failed".
        posted: interim results by name, in the order they came.
    """

    state: str
    ahead: int
    what: str
    done: int
    total: int
    share: float | None
    seconds: float
    left: float | None
    error: str
    posted: dict[str, Any]

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in FINISHED


class Job:
    """One piece of work in the queue; called as (what, done, total) it takes progress."""

    _numbers = itertools.count(1)

    def __init__(self, title: str, model: str, work: Work) -> None:
        """Describe the work; `Engine.submit` makes jobs."""
        self.title, self.model, self.work = title, model, work
        self.number = next(Job._numbers)
        self.result: Any = None
        self._changed = threading.Condition()
        self._version = 0
        self._stop = threading.Event()
        self._state, self._error = "waiting", ""
        self._what, self._done, self._total = "", 0, 0
        self._before = self._expected = 0
        self._started = self._ended = self._first_step = 0.0
        self._posted: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Take progress; raises Cancelled once the person has pressed stop."""
        self.check()
        with self._changed:
            if what != self._what or done < self._done:  # the next part of the work
                self._before += self._done
            self._what, self._done, self._total = what, done, total
            self._touch()

    def check(self) -> None:
        """Raise Cancelled once the person has pressed stop."""
        if self._stop.is_set():
            raise Cancelled

    def expect(self, steps: int) -> None:
        """Say how many steps the job takes from now on; later calls correct the number."""
        with self._changed:
            if not self._expected:
                self._what, self._before, self._done = "", 0, 0
                self._first_step = time.monotonic()
            self._expected = steps

    def post(self, name: str, value: Any) -> None:
        """Hand an interim result to whoever watches."""
        self.check()
        with self._changed:
            self._posted[name] = value
            self._touch()

    def cancel(self) -> None:
        """Stop the job before its next denoiser call; a waiting job never starts."""
        self._stop.set()
        with self._changed:
            if self._state == "waiting":
                self._state = "stopped"
            self._touch()

    @property
    def is_stopping(self) -> bool:
        """Whether stop was pressed."""
        return self._stop.is_set()

    @property
    def state(self) -> str:
        """One of the states of a Snapshot."""
        return self._state

    def snapshot(self, ahead: int = 0) -> Snapshot:
        """Return what there is to show now."""
        with self._changed:
            now = self._ended or time.monotonic()
            steps = self._before + self._done
            share = min(steps / self._expected, 1.0) if self._expected else None
            left = None
            if share and steps and self._first_step:
                left = (now - self._first_step) / steps * max(self._expected - steps, 0)
            return Snapshot(
                self._state,
                ahead,
                self._what,
                self._done,
                self._total,
                share,
                now - self._started if self._started else 0.0,
                left,
                self._error,
                dict(self._posted),
            )

    def wait(self, seen: int, seconds: float) -> int:
        """Return the version of the job once it is newer than `seen`, or after some seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != seen, seconds)
            return self._version

    def begin(self) -> bool:
        """Mark the job as running; False when it was stopped before."""
        with self._changed:
            if self._state != "waiting":
                return False
            self._state, self._started = "running", time.monotonic()
            self._touch()
            return True

    def end(self, state: str, error: str = "") -> None:
        """Mark the job as finished."""
        with self._changed:
            self._state, self._error, self._ended = state, error, time.monotonic()
            self._touch()

    def _touch(self) -> None:
        self._version += 1
        self._changed.notify_all()


class Engine:
    """The one model in memory, and the one thread that runs jobs on it, in order of arrival."""

    def __init__(
        self,
        device: str = "auto",
        dtype: str = "auto",
        loader: Callable[..., Any] = load_pipeline,
    ) -> None:
        """Start without a model; the first job loads one."""
        cuda = torch.cuda.is_available()
        self.device = ("cuda" if cuda else "cpu") if device == "auto" else device
        self.dtype = dtype
        self._loader = loader
        self._queue: deque[Job] = deque()
        self._arrived = threading.Condition()
        self._current: Job | None = None
        self._thread: threading.Thread | None = None
        self._name = ""
        self._pipe: Any = None

    @property
    def model(self) -> str:
        """Name of the model in memory, empty before the first job."""
        return self._name

    def submit(self, title: str, model: str, work: Work) -> Job:
        """Queue `work(pipe, job)` on a model and return its job.

        Raises:
            InputError: too many jobs wait already, or the model has no name.
        """
        if not model.strip():
            raise InputError("no model is chosen", remedy="demo")
        job = Job(title, model.strip(), work)
        with self._arrived:
            self._queue = deque(j for j in self._queue if j.state == "waiting")
            if len(self._queue) >= MOST_WAITING:
                raise InputError(
                    "the queue is full", got=f"{MOST_WAITING} jobs", remedy="again in a minute"
                )
            self._queue.append(job)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._serve, name="studio", daemon=True)
                self._thread.start()
            self._arrived.notify_all()
        return job

    def watch(self, job: Job, every: float = 0.5) -> Iterator[Snapshot]:
        """Yield what there is to show whenever it changes, at least `every` seconds, to the end."""
        seen = -1
        while True:
            seen = job.wait(seen, every)
            found = job.snapshot(self.ahead(job))
            yield found
            if found.is_finished:
                return

    def ahead(self, job: Job) -> int:
        """Return how many jobs run before this one starts."""
        with self._arrived:
            if job not in self._queue:
                return 0
            waiting = [j for j in self._queue if j.state == "waiting"]
            before = waiting.index(job) if job in waiting else 0
            return before + (self._current is not None)

    def _serve(self) -> None:
        while True:
            with self._arrived:
                self._current = None
                self._arrived.wait_for(lambda: bool(self._queue))
                job = self._queue.popleft()
                if not job.begin():
                    continue
                self._current = job
            self._run(job)

    def _run(self, job: Job) -> None:
        try:
            pipe = self._load(job)
            with stoppable(pipe, job):
                job.result = job.work(pipe, job)
        except Cancelled:
            self._clean()
            job.end("stopped")
        except DitToolsError as error:
            self._clean()
            job.end("failed", str(error))
        except (MemoryError, torch.OutOfMemoryError):
            logger.exception("out of memory in %s", job.title)
            self._clean()
            job.end("failed", "The memory ran out; try a smaller size or fewer frames.")
        except Exception as error:  # the page shows a sentence, the log the trace
            logger.exception("%s failed", job.title)
            self._clean()
            text = " ".join(str(error).split())[:300] or "no message"
            job.end("failed", f"{type(error).__name__}: {text} (the server's log has the details)")
        except BaseException:  # whatever ends the thread, nobody waits for ever
            job.end("failed", "The studio is shutting down.")
            raise
        else:
            job.end("done")

    def _clean(self) -> None:
        if self._pipe is not None:
            with suppress(DitToolsError):  # a pipeline without a denoiser: nothing is attached
                detach(self._pipe)
        gc.collect()

    def _load(self, job: Job) -> Any:
        if self._pipe is not None and self._name == job.model:
            return self._pipe
        job("loading the model", 0, 0)
        self._name, self._pipe = "", None  # before the next one comes in: only one fits
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        pipe = self._loader(job.model, dtype=self.dtype, device=self.device)
        pipe.set_progress_bar_config(disable=True)
        self._name, self._pipe = job.model, pipe
        return pipe


@contextmanager
def stoppable(pipe: Any, job: Job) -> Iterator[None]:
    """Let a job be stopped before every call of a denoiser, also where a pipeline has no callback.

    The hook goes on the module's own list in front of all others and is taken off at the end.
    """

    def stop(*_: Any) -> None:
        job.check()

    handles = []
    for name, part in getattr(pipe, "components", {}).items():
        if isinstance(part, torch.nn.Module) and name.startswith(("transformer", "unet")):
            handles.append(part.register_forward_pre_hook(stop, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
