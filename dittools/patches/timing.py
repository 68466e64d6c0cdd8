"""Time spent on a device, measured without making the device wait."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_PENDING = 512  # event pairs kept before finished ones are added up


class Stopwatch:
    """Adds up spans of work: wall time on the CPU, events on CUDA."""

    def __init__(self) -> None:
        """Start at zero."""
        self._seconds = 0.0
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count the time of the block, also when it raises."""
        if device.type != "cuda":
            start = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - start
            return
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(device)
        events[0].record(stream)
        try:
            yield
        finally:
            events[1].record(stream)
            self._pending.append(events)
            if len(self._pending) >= _PENDING:
                self._add_finished()

    def _add_finished(self) -> None:
        waiting = []
        for start, end in self._pending:
            if end.query():
                self._seconds += start.elapsed_time(end) / 1000
            else:
                waiting.append((start, end))
        self._pending = waiting

    @property
    def total_ms(self) -> float:
        """Milliseconds so far; waits for CUDA work that is still under way."""
        for _, end in self._pending:
            end.synchronize()
        self._add_finished()
        return self._seconds * 1000
