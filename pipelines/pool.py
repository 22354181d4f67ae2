"""Threads for work that releases the GIL: decoding, crops and colour.

An interrupt (Ctrl-C) may come between any two steps of the thread that waits. Python's futures and conditions are then
left locked now and then, and the thread that makes the result waits for that lock for ever. So what passes between
threads here goes through `SimpleQueue`, whose operations cannot be cut in two, and through flags that are set once.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import weakref
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from pipelines.errors import RunError

_LOOK_AGAIN = 0.5  # seconds: whoever waits looks whether its job was done, or dropped, without a word


class Job:
    """A call that a thread will make. `done` is set last; `wait` may be interrupted and called again."""

    def __init__(self, function: Callable[[], Any], threads: Threads):
        self.function: Callable[[], Any] | None = function
        self.value: Any = None
        self.error: BaseException | None = None
        self.done = False
        self._word: SimpleQueue[None] = SimpleQueue()
        self._threads = threads

    def run(self) -> None:
        """In a thread: make the call, and say so."""
        function, self.function = self.function, None
        try:
            if function is not None and not self._threads.closed:
                self.value = function()
            else:
                self.error = _closed()
        except BaseException as error:  # noqa: BLE001  whoever waits raises it
            self.error = error
        self.done = True
        self._word.put(None)

    def cancel(self) -> None:
        """Do not make the call, if it has not begun."""
        self.function = None

    def wait(self) -> None:
        """Until the call is made, or never will be."""
        while not self.done:
            try:
                self._word.get(timeout=_LOOK_AGAIN)
            except Empty:
                if self._threads.ended and not self.done:  # handed in when the threads had gone
                    self.error, self.done = _closed(), True

    def result(self) -> Any:
        """What the call returned; raises what it raised, or RunError if the threads were closed before."""
        self.wait()
        error, self.error = self.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame, which must not hold it
        return self.value


class Threads:
    """`size` threads that make calls in the order in which they are handed in."""

    def __init__(self, size: int, name: str):
        self.closed = self.ended = False
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        at_exit = partial(_close_if_there, weakref.ref(self))
        # However this object ends, its threads do: also when it is dropped half made by an interrupt.
        self._end = weakref.finalize(self, _end_threads, self._jobs, size, at_exit)
        # A thread that is inside a library while the interpreter is taken down can abort the process. Handed in now,
        # this is called before what the library, imported earlier, does at the exit.
        atexit.register(at_exit)
        self._threads = [
            threading.Thread(target=_work, args=(self._jobs,), name=f"{name}_{i}", daemon=True) for i in range(size)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[[], Any]) -> Job:
        """Hand in a call.

        Raises:
            RunError: the threads are closed.
        """
        if self.closed:
            raise _closed()
        job = Job(function, self)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """End the threads after the calls in progress; other calls are answered with RunError."""
        self.closed = True
        self._end()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self.ended = True


def _work(jobs: SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job  # or this thread would hold a batch until the next one


def _end_threads(jobs: SimpleQueue[Job | None], size: int, at_exit: Callable[[], None]) -> None:
    atexit.unregister(at_exit)
    for _ in range(size):
        jobs.put(None)


def _close_if_there(reference: weakref.ref[Threads]) -> None:
    if (threads := reference()) is not None:
        threads.close()


class Pool:
    """`size` threads, shared by everything that a loader computes on the CPU."""

    def __init__(self, size: int):
        self.size = max(size, 1)
        self._threads = Threads(self.size, "relssl-work")

    @property
    def _closed(self) -> bool:
        return self._threads.closed

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

        jobs: list[Job] = []
        try:
            jobs.extend(self._threads.submit(work) for _ in range(min(self.size, -(-count // chunk))))
            for job in jobs:
                job.wait()
            while jobs:  # emptied: a failed job and its traceback through here would hold each other, and a batch
                jobs.pop(0).result()
        except BaseException:  # also an interrupt of the thread that waits
            failed = True
            for job in jobs:
                job.wait()
            raise
        if unfinished:
            raise _closed()

    def close(self) -> None:
        """End the threads after the chunks in progress; `run` does not wait for the others."""
        self._threads.close()


def _closed() -> RunError:
    return RunError("the pool of threads was closed, and with it whatever used it; open another")
