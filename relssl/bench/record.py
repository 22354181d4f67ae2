"""What benchmarks share around a measurement: the device, the files to write, what a figure needs beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pipelines.errors import ConfigError
from relssl.bench.plot import check_plot_path
from relssl.runfolder import write_atomically


def chosen_device(name: str) -> torch.device:
    """The device of a name; `auto` is CUDA where there is one.

    Raises:
        ConfigError: no such device, or it is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device is auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here; `relssl doctor` says more")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def check_outputs(json_file: Path | None, plot_file: Path | None) -> None:
    """Refuse places and formats that cannot be written, before minutes are spent.

    Raises:
        ConfigError: a folder that is not there, or a picture format that is not known.
    """
    for path in (json_file, plot_file):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: the folder {path.absolute().parent} does not exist; make it first")
    if plot_file is not None:
        check_plot_path(plot_file)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package that is there."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def plain(values: Any) -> Any:
    """A dataclass as JSON would have it."""

    def simple(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: simple(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [simple(inner) for inner in value]
        return str(value) if isinstance(value, Path) else value

    return simple(asdict(values))


def write_outputs(
    result: Mapping[str, Any], json_file: Path | None, plot_file: Path | None, plot: Callable[..., object]
) -> list[Path]:
    """Write what was asked for, the picture by `plot(result, path)`; the files that were written."""
    if json_file is not None:
        write_atomically(json_file, json.dumps(result, indent=1) + "\n")
    if plot_file is not None:
        plot(result, plot_file)
    return [path for path in (json_file, plot_file) if path is not None]
