"""Where the time goes, and how far it can fall: spans by part, interleaved repeats, bounds."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dittools import system
from dittools.errors import InputError

Tell = Callable[[str, int, int], None]  # (what is running, runs done, runs in all)


@dataclass(frozen=True)
class Spread:
    """Median and the 20th and 80th percentile of repeated measurements, in their unit."""

    p20: float
    median: float
    p80: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of some values; percentiles interpolate linearly.

        Raises:
            InputError: there is no value.
        """
        if not values:
            raise InputError("nothing was measured", expected="at least one repeat")
        rows = torch.tensor(sorted(values), dtype=torch.float64)
        low, middle, high = torch.quantile(rows, torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
        return cls(low, middle, high, len(values))

    def to_dict(self) -> dict[str, float | int]:
        """Return the fields as JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Sample:
    """One run.

    Attributes:
        total_ms: end to end.
        parts_ms: disjoint parts of it.
        peak_bytes: largest memory in use while it ran; None where that cannot be told.
        extra: anything else the run reports.
    """

    total_ms: float
    parts_ms: dict[str, float]
    peak_bytes: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class PartTimer:
    """Times named parts of a pipeline while it runs: modules by forward hooks, methods by wrapping.

    Parts must not contain each other. On CUDA, time is taken with events, so nothing waits.
    """

    def __init__(self, parts: Mapping[str, Sequence[tuple[Any, str]]], device: str = "cpu") -> None:
        """Remember what to time.

        Args:
            parts: name -> (object, method) pairs; method "forward" of a module is hooked.
            device: where the work runs.
        """
        self._parts, self._device = parts, torch.device(device)
        self._cuda = self._device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in parts}
        self._open: list[tuple[str, Any]] = []

    @property
    def current(self) -> str:
        """Name of the part that is running, empty outside all of them."""
        return self._open[-1][0] if self._open else ""

    def calls(self, name: str) -> int:
        """Return how often a part ran."""
        return len(self._spans[name])

    def milliseconds(self) -> dict[str, float]:
        """Return the time in each part so far; waits for CUDA work under way."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        return {
            name: sum(
                start.elapsed_time(end) if self._cuda else (end - start) * 1000
                for start, end in spans
            )
            for name, spans in self._spans.items()
        }

    @contextmanager
    def running(self) -> Iterator["PartTimer"]:
        """Time the parts inside the block; everything is as before afterwards."""
        with ExitStack() as undo:
            for name, owners in self._parts.items():
                for owner, method in owners:
                    if method == "forward" and isinstance(owner, torch.nn.Module):
                        self._hook(name, owner, undo)
                    else:
                        self._wrap(name, owner, method, undo)
            try:
                yield self
            finally:
                self._open.clear()

    def _hook(self, name: str, module: torch.nn.Module, undo: ExitStack) -> None:
        before = module.register_forward_pre_hook(lambda *_: self._start(name))
        # always_call: a forward that raises must not leave its part open
        after = module.register_forward_hook(lambda *_: self._stop(), always_call=True)
        undo.callback(before.remove)
        undo.callback(after.remove)

    def _wrap(self, name: str, owner: Any, method: str, undo: ExitStack) -> None:
        stock = getattr(owner, method)
        had = method in vars(owner)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            self._start(name)
            try:
                return stock(*arguments, **keywords)
            finally:
                self._stop()

        setattr(owner, method, timed)
        undo.callback(setattr, owner, method, stock) if had else undo.callback(
            delattr, owner, method
        )

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _start(self, name: str) -> None:
        self._open.append((name, self._now()))

    def _stop(self) -> None:
        if self._open:
            name, start = self._open.pop()
            self._spans[name].append((start, self._now()))


def interleaved(
    cases: Mapping[str, Callable[[], Sample]],
    *,
    repeats: int,
    warm_up: int,
    tell: Tell | None = None,
) -> dict[str, list[Sample]]:
    """Return `repeats` samples of every case, taken in turn so that drift hits all alike.

    The order is turned round every other repeat, so that no case always runs first.

    Raises:
        InputError: repeats below 1 or warm_up below 0.
    """
    if repeats < 1 or warm_up < 0:
        raise InputError(
            "repeats are not usable",
            expected="repeats of 1 or more, warm-up of 0 or more",
            got=f"{repeats} and {warm_up}",
        )
    found: dict[str, list[Sample]] = {name: [] for name in cases}
    total, done = (repeats + warm_up) * len(cases), 0
    for turn in range(warm_up + repeats):
        order = list(cases) if turn % 2 == 0 else list(reversed(list(cases)))
        for name in order:
            sample = cases[name]()
            if turn >= warm_up:
                found[name].append(sample)
            done += 1
            if tell is not None:
                tell("runs", done, total)
    return found


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the spreads of some runs of one case as JSON types."""
    parts = samples[0].parts_ms
    peaks = [sample.peak_bytes for sample in samples if sample.peak_bytes is not None]
    return {
        "total_ms": Spread.of([sample.total_ms for sample in samples]).to_dict(),
        "parts_ms": {
            part: Spread.of([sample.parts_ms[part] for sample in samples]).to_dict()
            for part in parts
        },
        "peak_bytes": max(peaks) if peaks else None,
    }


def speedup(slow: Sequence[Sample], fast: Sequence[Sample]) -> Spread:
    """Return the spread of the time ratios of runs taken in the same turn."""
    return Spread.of([a.total_ms / b.total_ms for a, b in zip(slow, fast, strict=True)])


def amdahl(share: float, density: float = 0.0) -> float:
    """Return the largest speed-up when a share of the time shrinks to `density` of itself.

    Raises:
        InputError: share or density is not within 0 to 1.
    """
    if not (0 <= share <= 1 and 0 <= density <= 1):
        raise InputError("share and density", expected="0 to 1", got=f"{share} and {density}")
    rest = 1 - share * (1 - density)
    return 1 / rest if rest > 0 else float("inf")


class PeakMemory:
    """Largest memory in use inside a block: CUDA's allocator, or the process on Linux."""

    def __init__(self, device: str = "cpu") -> None:
        """Choose what to read."""
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        """Start anew."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._can_reset = system.reset_peak_memory()
        return self

    def __exit__(self, *_: object) -> None:
        """Read the peak; it stays None where the system cannot start anew."""
        if self._cuda:
            self.bytes = int(torch.cuda.max_memory_allocated(self._device))
        elif self._can_reset:
            self.bytes = system.peak_memory()
