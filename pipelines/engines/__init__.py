"""Engines: ways to turn sample ids and boxes into 8-bit crops. `engine_class` finds one by name.

An engine is `<name>.py` here with a class `Engine(files, *, device, workers)` that offers

    check(spec)                         static: raise ConfigError for what it cannot do
    crops(ids, params, replace)         list of (B, S, S, 3) uint8 tensors on `device`, one per view
    ASYNC                               True: worth running ahead of the consumer in a thread
    close()

It never draws a random number. A sample that cannot be decoded goes to `replace(row, error)`, which returns the id
to use instead and puts that image's parameters into row `row` of every `ViewParams`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pipelines.errors import ConfigError, unknown_name

ENGINES = ("resident", "torchvision")
PLANNED_ENGINES = ("ffcv", "dali")

# A data set goes to memory whole when its images are small and few enough: 2 GiB holds CIFAR ten times over.
RESIDENT_BYTES = 2 << 30
RESIDENT_SIDE = 128


def choose_engine(name: str, files: Any) -> tuple[str, str]:
    """The engine to use and one line that says why. `name` may be `auto`."""
    if name != "auto":
        check_engine_name(name)
        return name, "as configured"
    side = int(max(files.heights.max(), files.widths.max()))
    size = len(files) * int(files.heights.max()) * int(files.widths.max()) * 3
    if side <= RESIDENT_SIDE and size <= RESIDENT_BYTES:
        return "resident", f"images of at most {side} pixels, {size / 2**20:.0f} MiB in all, fit in memory"
    if side > RESIDENT_SIDE:
        return "torchvision", f"images of up to {side} pixels are decoded as they are needed"
    return (
        "torchvision",
        f"{size / 2**30:.1f} GiB of pixels are more than the {RESIDENT_BYTES >> 30} GiB kept in memory",
    )


def engine_class(name: str) -> Any:
    """The `Engine` class of a file in this folder.

    Raises:
        ConfigError: no such engine, or one that this version does not have yet.
    """
    check_engine_name(name)
    return import_module(f"pipelines.engines.{name}").Engine


def check_engine_name(name: str) -> None:
    if name in PLANNED_ENGINES:
        raise ConfigError(f"the {name} engine is not in this version yet; available: auto, {', '.join(ENGINES)}")
    if name not in ENGINES:
        raise ConfigError(unknown_name("engine", name, ("auto", *ENGINES)))
