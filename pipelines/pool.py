"""A pool of threads for work on the rows of a batch: decoding, crops and colour all release the GIL."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path


class Pool:
    """`size` threads, shared by everything that a loader computes on the CPU."""

    def __init__(self, size: int):
        self.size = max(size, 1)
        self._threads = ThreadPoolExecutor(self.size, thread_name_prefix="relssl-work")

    def run(self, function: Callable[[int, int], object], count: int, chunk: int = 1) -> None:
        """Call `function(start, stop)` for chunks of 0 ... count-1 and wait until none of them runs any more.

        Each thread takes the next chunk when it has done one. The first exception stops the handing out of chunks and
        is raised here, after the chunks in progress have ended: whatever they write to is then free again.
        """
        starts = itertools.count(0, chunk)  # its next() is atomic
        failed = False

        def work() -> None:
            nonlocal failed
            try:
                while not failed and (start := next(starts)) < count:
                    function(start, min(start + chunk, count))
            except BaseException:
                failed = True
                raise

        jobs = [self._threads.submit(work) for _ in range(min(self.size, -(-count // chunk)))]
        try:
            wait(jobs)
        except BaseException:  # an interrupt of the thread that waits
            failed = True
            wait(jobs)
            raise
        for job in jobs:
            job.result()

    def close(self) -> None:
        """End the threads after the work in progress."""
        self._threads.shutdown(wait=True, cancel_futures=True)


def available_cores() -> int:
    """Cores this process may use: its affinity, and the bandwidth that its control group grants, rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, _cgroup_cores() or allowed))


def default_workers() -> int:
    """This process's share of the cores: all of them, or among the processes that a launcher started beside it."""
    try:
        neighbours = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    except ValueError:
        neighbours = 1
    return max(available_cores() // neighbours, 1)


def _cgroup_cores() -> int | None:
    """The control group's limit on CPU time, in cores; None where there is none."""
    v1 = Path("/sys/fs/cgroup/cpu")
    try:
        if (v2 := Path("/sys/fs/cgroup/cpu.max")).exists():
            quota, period = v2.read_text().split()
        else:
            quota, period = ((v1 / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if quota.strip() in ("max", "-1") else -(-int(quota) // int(period))
    except (OSError, ValueError):
        return None
