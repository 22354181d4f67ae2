"""The pool of threads: every row once, errors that wait for running work, an end that does not wait for the rest."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest

from pipelines import pool as pool_module
from pipelines.errors import RunError
from pipelines.pool import Pool

PATIENCE = 20  # seconds after which a test that would hang fails


def eventually(condition):
    """Whether something comes true before patience ends."""
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


@pytest.fixture
def pool():
    pool = Pool(2)
    yield pool
    pool.close()


# -- running


@pytest.mark.parametrize(("count", "chunk"), [(0, 1), (0, 5), (1, 1), (1, 9), (7, 3), (9, 3), (100, 1), (100, 64)])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_index_is_handed_out_once_in_whole_chunks(size, count, chunk):
    pool, ranges = Pool(size), []
    pool.run(lambda start, stop: ranges.append((start, stop)), count, chunk)
    pool.close()
    assert sorted(ranges) == [(start, min(start + chunk, count)) for start in range(0, count, chunk)]


@pytest.mark.parametrize("size", [-1, 0])
def test_there_is_always_a_thread(size):
    pool, seen = Pool(size), []
    pool.run(lambda start, stop: seen.append(threading.current_thread()), 3)
    pool.close()
    assert pool.size == 1
    assert len(set(seen)) == 1
    assert threading.current_thread() not in seen


def test_all_threads_work_at_once(pool):
    """Each chunk waits for the other."""
    both = threading.Barrier(2)
    pool.run(lambda start, stop: both.wait(PATIENCE), 2)


def test_two_runs_at_once_do_not_mix(pool):
    """As the batches that a loader prepares: each waits for its own work alone."""
    seen = {"a": [], "b": []}

    def run(name):
        for _ in range(20):
            pool.run(lambda start, stop: seen[name].extend(range(start, stop)), 50, chunk=3)

    threads = [threading.Thread(target=run, args=(name,)) for name in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    for rows in seen.values():
        assert sorted(rows) == sorted([*range(50)] * 20)


# -- errors


def test_the_first_error_stops_the_rest_and_waits_for_what_runs(pool):
    """Otherwise a caller would reuse memory that a chunk still writes to."""
    both, release, over = threading.Barrier(2), threading.Event(), threading.Event()
    calls, order = [], []

    def work(start, stop):
        calls.append(start)
        if start < 2:
            both.wait(PATIENCE)
        if start == 0:
            raise ZeroDivisionError("first")
        release.wait(PATIENCE)
        order.append("the other chunk has ended")

    def run():
        try:
            pool.run(work, 100)
        except ZeroDivisionError:
            order.append("raised")
        over.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert not over.wait(0.3)  # a pool that does not wait is over by now
    release.set()
    thread.join(PATIENCE)
    assert order == ["the other chunk has ended", "raised"]
    assert sorted(calls) == [0, 1]


def test_an_interrupt_while_waiting_waits_for_what_runs_too(pool, monkeypatch):
    started, release = threading.Event(), threading.Event()
    ended, calls, waits = [], [], []
    wait = pool_module.Job.wait

    def interrupted(job):
        waits.append(job)
        if len(waits) == 1:
            started.wait(PATIENCE)
            raise KeyboardInterrupt
        release.set()
        wait(job)

    def work(start, stop):
        calls.append(start)
        started.set()
        release.wait(PATIENCE)
        ended.append(start)

    monkeypatch.setattr(pool_module.Job, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.run(work, 100)
    assert sorted(ended) == sorted(calls)
    assert len(calls) <= 2


def test_the_pool_goes_on_after_an_error(pool):
    with pytest.raises(ZeroDivisionError):
        pool.run(lambda start, stop: 1 / 0, 10)
    seen = []
    pool.run(lambda start, stop: seen.append(start), 10)
    assert sorted(seen) == [*range(10)]


def test_an_error_keeps_nothing_alive_once_it_is_handled(pool):
    """Without the garbage collector, which comes late: a batch of views is a lot of memory."""

    class Buffer:
        pass

    buffer = Buffer()
    gone = weakref.ref(buffer)

    def attempt(held):
        def work(start, stop):
            raise ZeroDivisionError(held)

        with pytest.raises(ZeroDivisionError):
            pool.run(work, 4)

    gc.disable()
    try:
        attempt(buffer)
        pool.run(lambda start, stop: None, 2)  # the threads forget their last work with the next
        pool.run(lambda start, stop: None, 2)
        del buffer
        alive = gone() is not None
    finally:
        gc.enable()
    assert not alive


# -- closing


def test_a_closed_pool_refuses_work(pool):
    pool.close()
    pool.close()
    with pytest.raises(RunError, match="was closed"):
        pool.run(lambda start, stop: None, 3)


@pytest.mark.parametrize("runs", [1, 3])
def test_closing_ends_runs_after_the_chunks_in_progress(runs):
    """Some of the runs have not even begun, for all threads are busy."""
    pool, started, release = Pool(2), threading.Barrier(3), threading.Event()
    calls, errors = [], []

    def work(start, stop):
        calls.append(start)
        started.wait(PATIENCE)
        release.wait(PATIENCE)

    def run():
        try:
            pool.run(work, 100)
        except RunError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(runs)]
    for thread in threads:
        thread.start()
    started.wait(PATIENCE)
    closer = threading.Thread(target=pool.close, daemon=True)
    closer.start()
    closing = eventually(lambda: pool._closed)
    release.set()
    assert closing
    for thread in (closer, *threads):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert len(calls) == 2
    assert len(errors) == runs
    assert not [thread for thread in threading.enumerate() if thread in pool._threads._threads]


def test_a_run_that_closing_finds_at_its_last_chunk_is_complete():
    """All of its rows are there, so there is nothing to complain about."""
    pool = Pool(1)
    pool.run(lambda start, stop: setattr(pool._threads, "closed", True), 1)
    pool.close()


# -- jobs


def test_a_wait_that_was_interrupted_may_be_taken_up_again(pool):
    """Also one that had taken the word that the job is done, but was interrupted before it could tell."""
    job = pool._threads.submit(lambda: 7)
    job._word.get(timeout=PATIENCE)  # as an interrupted wait would
    job.wait()
    assert job.result() == 7


def test_a_job_that_comes_when_the_threads_have_gone_does_not_hang():
    threads = pool_module.Threads(1, "test")
    threads.close()
    with pytest.raises(RunError, match="closed"):
        threads.submit(lambda: 7)
    late = pool_module.Job(lambda: 7, threads)  # handed in between the question and the end
    threads._jobs.put(late)
    with pytest.raises(RunError, match="closed"):
        late.result()


def test_jobs_in_line_are_dropped_when_the_threads_close():
    threads, started, release = pool_module.Threads(1, "test"), threading.Event(), threading.Event()

    def first():
        started.set()
        release.wait(PATIENCE)
        return 1

    jobs = [threads.submit(first), threads.submit(lambda: 2)]
    started.wait(PATIENCE)
    closer = threading.Thread(target=threads.close)
    closer.start()
    while not threads.closed:
        pass
    release.set()
    closer.join(PATIENCE)
    assert jobs[0].result() == 1
    with pytest.raises(RunError, match="closed"):
        jobs[1].result()


AT_THE_EXIT = """
import atexit, threading, time
from pipelines.pool import Threads

release = threading.Event()
atexit.register(lambda: print(job.done))  # the library that the thread is in, which is taken down here
threads = Threads(1, "test")
atexit.register(release.set)

def in_the_library():
    release.wait(20)
    end = time.perf_counter() + 0.05
    while time.perf_counter() < end:
        sum(range(100))

job = threads.submit(in_the_library)
"""


def test_at_the_exit_of_python_a_call_ends_before_what_it_uses_is_taken_down():
    """Handlers run in turn, the last one first: the call goes on, the threads end, the library ends."""
    done = subprocess.run([sys.executable, "-c", AT_THE_EXIT], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)


def test_threads_end_with_the_object_that_made_them():
    threads = pool_module.Threads(2, "test")
    members = list(threads._threads)
    del threads
    for thread in members:
        thread.join(PATIENCE)
        assert not thread.is_alive()
