"""Engines: ways to turn sample ids and boxes into 8-bit crops. `engine_class` finds one by name.

An engine is `<name>.py` here with a class `Engine(files, *, device, pool, resize)` that offers

    check(spec, resize)                 static: raise ConfigError for what it cannot do
    crops(ids, params, replace, finish) a list with a (V, B, S, S, 3) uint8 tensor per spec
    ASYNC                               True: worth running ahead of the consumer in a thread
    close()

It decodes each image once for all its views and never draws a random number. A sample that cannot be decoded goes to
`replace(row, error)`, which returns the id to use instead and puts that image's parameters into row `row` of every
`ViewParams`. Where the views are wanted on the CPU, the engine calls `finish(crops, start, stop)` for every range of
rows as soon as they are there, from any thread and each row once, and may use the tensors again afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipelines.errors import ConfigError, InputError, unknown_name
from pipelines.machine import free_memory

if TYPE_CHECKING:  # configs are checked without torch
    import torch

Replace = Callable[[int, InputError], int]
Finish = Callable[["list[torch.Tensor]", int, int], None]

ENGINES = ("resident", "torchvision", "ffcv", "dali")
RESIZES = ("antialias", "area")

# A data set goes to memory whole when its images are small and few enough. STL-10's 113,000 images take 2.7 GiB.
RESIDENT_SIDE = 128
RESIDENT_BYTES = 4 << 30  # on the CPU, where every process holds a copy
RESIDENT_SHARE = 0.25  # of the memory that is free
FEW_CORES = 4  # fewer threads than this may not decode JPEGs as fast as a large GPU trains on them (estimated)


def choose_engine(name: str, files: Any, device: torch.device, workers: int) -> tuple[str, str]:
    """The engine to use and one line that says why. `name` may be `auto`.

    `auto` looks at the size of the images and of the data set, how they are stored, the device, and the threads that
    there are for it. It never takes an engine that is optional: what it takes must not depend on what is installed.
    """
    if name != "auto":
        check_engine_name(name)
        return name, "as configured"
    side = int(max(files.heights.max(), files.widths.max()))
    size = len(files) * int(files.heights.max()) * int(files.widths.max()) * 3
    room = _resident_room(device)
    if side <= RESIDENT_SIDE and size <= room:
        where = "memory" if device.type == "cpu" else f"the memory of {device}"
        return "resident", f"images of at most {side} pixels, {size / 2**20:.0f} MiB in all, fit in {where}"
    if side <= RESIDENT_SIDE:
        reason = f"{size / 2**30:.1f} GiB of pixels are more than the {room / 2**30:.1f} GiB that may stay in memory"
    elif not files.is_jpeg.any():
        reason = f"raw pixels of up to {side} pixels a side are read as they are needed"
    else:
        reason = f"images of up to {side} pixels a side are decoded once each, by {workers} threads"
    if device.type == "cuda" and files.is_jpeg.any() and workers < FEW_CORES:
        reason += "; few for a GPU: should it wait, try data.engine: dali, which decodes on the GPU, or raw storage"
    return "torchvision", reason


def _resident_room(device: torch.device) -> int:
    """Bytes that a data set may take on a device without being asked for."""
    free = free_memory(device)
    share = RESIDENT_BYTES if free is None else int(RESIDENT_SHARE * free)
    return share if device.type == "cuda" else min(RESIDENT_BYTES, share)


def engine_class(name: str) -> Any:
    """The `Engine` class of a file in this folder.

    Raises:
        ConfigError: no such engine.
        MissingExtraError: its package is not installed.
    """
    check_engine_name(name)
    return import_module(f"pipelines.engines.{name}").Engine


def check_engine_name(name: str) -> None:
    if name not in ENGINES:
        raise ConfigError(unknown_name("engine", name, ("auto", *ENGINES)))


def refuse_area(resize: str) -> None:
    """For engines that have one resize only."""
    if resize not in RESIZES:
        raise ConfigError(unknown_name("resize", resize, RESIZES))
    if resize != "antialias":
        raise ConfigError(f"resize: {resize} is FFCV's own; set data.engine: ffcv, or leave data.resize: antialias")
