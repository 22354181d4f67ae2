"""A pool of threads for work on the rows of a batch: decoding, crops and colour all release the GIL."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from pipelines.errors import RunError


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
            while jobs:  # emptied: a failed job and its traceback through here would hold each other, and a batch
                jobs.pop(0).result()
        except BaseException:  # also an interrupt of the thread that waits
            failed = True
            wait(jobs)
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
