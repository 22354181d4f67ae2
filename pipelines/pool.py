"""A pool of threads for work on the rows of a batch: decoding, crops and colour all release the GIL."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from pipelines.errors import RunError

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


class Pool:
    """`size` threads, shared by everything that a loader computes on the CPU."""

    def __init__(self, size: int):
        self.size = max(size, 1)
        self._closed = False
        self._threads = ThreadPoolExecutor(self.size, thread_name_prefix="relssl-work")

    def run(self, function: Callable[[int, int], object], count: int, chunk: int = 1) -> None:
        """Call `function(start, stop)` for chunks of 0 ... count-1 and wait until none of them runs any more.

        Each thread takes the next chunk when it has done one. The first exception stops the handing out of chunks and
        is raised here, after the chunks in progress have ended: whatever they write to is then free again. Not to be
        called from a thread of the pool, which would wait for itself.

        Raises:
            RunError: the pool is closed, or was before the last chunk.
        """
        starts = itertools.count(0, chunk)  # its next() is atomic
        failed = unfinished = False

        def work() -> None:
            nonlocal failed, unfinished
            try:
                while not failed and (start := next(starts)) < count:
                    if self._closed:
                        unfinished = True
                        return
                    function(start, min(start + chunk, count))
            except BaseException:
                failed = True
                raise

        jobs: list[Future] = []
        try:
            jobs.extend(self._submit(work) for _ in range(min(self.size, -(-count // chunk))))
            wait(jobs)
            while jobs:
                jobs.pop(0).result()
        except BaseException:  # also an interrupt of the thread that waits
            failed = True
            wait(jobs)
            jobs.clear()  # a failed job and the traceback through here would hold each other, and all they refer to
            raise
        if unfinished:
            raise _closed()

    def close(self) -> None:
        """End the threads after the chunks in progress; `run` does not wait for the others."""
        self._closed = True
        # Jobs are not cancelled: `wait` would not learn of it. They end by themselves.
        self._threads.shutdown(wait=True)

    def _submit(self, work: Callable[[], None]) -> Future:
        try:
            return self._threads.submit(work)
        except RuntimeError:
            if self._closed:
                raise _closed() from None
            raise


def _closed() -> RunError:
    return RunError("the pool of threads was closed, and with it whatever used it; open another")


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
    """The limit on CPU time of this process's control group and of those above it, in cores; None without one."""
    limits = [cores for group in _cgroups() if (cores := _cores_granted(group)) is not None]
    return min(limits, default=None)


def _cgroups() -> Iterator[Path]:
    """Folders of the control groups that may limit this process's CPU time, of either version.

    Inside a container its own group is usually the root of what it sees, whatever name the group has outside.
    """
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        lines = []
    names = {_CGROUPS: "", _CGROUPS / "cpu": ""}
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number == "0":
            names[_CGROUPS] = name
        elif "cpu" in controllers.split(","):
            names[_CGROUPS / "cpu"] = name
    for root, name in names.items():
        parts = [part for part in name.split("/") if part]
        if ".." in parts:  # outside of what can be seen here
            parts = []
        for depth in range(len(parts) + 1):
            yield root.joinpath(*parts[:depth])


def _cores_granted(group: Path) -> int | None:
    """Quota by period of one control group, rounded up; None where it has no limit."""
    try:
        if (limit := group / "cpu.max").exists():
            quota, period = limit.read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if quota.strip() in ("max", "-1") else max(-(-int(quota) // int(period)), 1)
    except (OSError, ValueError, ZeroDivisionError):
        return None
