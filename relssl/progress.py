"""Rates, time left, and where the time of a step goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


class Stopwatch:
    """Seconds by name. On CUDA the parts are timed by events and read once per report, so nothing waits in between."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time a block of device work."""
        if not self.cuda:
            with self.on_host(name):
                yield
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._events.append((name, start, end))

    @contextmanager
    def on_host(self, name: str) -> Iterator[None]:
        """Time a block that the host waits in, such as the next batch."""
        start = perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds since the last call, and start again."""
        if self._events:
            torch.cuda.synchronize()
            for name, start, end in self._events:
                self._seconds[name] = self._seconds.get(name, 0.0) + start.elapsed_time(end) / 1000
            self._events = []
        taken, self._seconds = self._seconds, {}
        return {name: round(seconds, 6) for name, seconds in taken.items()}


class Rate:
    """Images per second since the last report, and the time left at the rate of the whole run so far."""

    def __init__(self, total_updates: int, done: int):
        self.total, self.first = total_updates, done
        self.start = self.last = perf_counter()
        self.images = 0

    def count(self, images: int) -> None:
        self.images += images

    def take(self) -> float:
        """Images per second since the last call."""
        now = perf_counter()
        rate = self.images / max(now - self.last, 1e-9)
        self.last, self.images = now, 0
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is no training: it does not count against the rate, but against the time left."""
        start = perf_counter()
        yield
        self.last += perf_counter() - start

    def seconds_left(self, done: int) -> float:
        """`done` updates of the run are complete."""
        finished = max(done - self.first, 1)
        return (perf_counter() - self.start) / finished * (self.total - done)


def duration(seconds: float) -> str:
    """`145 s`, `12 min`, `3 h 20 min`."""
    if seconds < 180:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"
