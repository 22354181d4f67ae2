"""What everybody in a benchmark may use: the same cores, the same number of torch threads. Put back afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pipelines.errors import ConfigError
from pipelines.machine import available_cores


@contextmanager
def bound_to(cores: int | None) -> Iterator[int]:
    """Bind this process to its first `cores` cores; gives their number. None leaves it as it is.

    Threads that exist already are bound one by one, new threads and processes inherit it. At the end every thread
    gets back what it had.

    Raises:
        ConfigError: fewer cores are there, or the system cannot bind processes.
    """
    if cores is None:
        yield available_cores()
        return
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("binding a process to cores needs Linux; leave --cores out to use all of them")
    if not 1 <= cores <= available_cores():
        raise ConfigError(f"--cores is between 1 and {available_cores()}, the cores this process may use; got {cores}")
    everything = os.sched_getaffinity(0)
    before = {thread: os.sched_getaffinity(thread) for thread in _threads()}
    chosen = set(sorted(everything)[:cores])
    _bind((thread, chosen) for thread in before)
    try:
        yield cores
    finally:
        _bind((thread, before.get(thread, everything)) for thread in _threads())


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _threads() -> list[int]:
    return [int(entry.name) for entry in Path("/proc/self/task").iterdir()]


def _bind(wanted: Iterable[tuple[int, set[int]]]) -> None:
    for thread, cores in wanted:
        try:
            os.sched_setaffinity(thread, cores)
        except ProcessLookupError:  # it has ended since we looked
            continue
