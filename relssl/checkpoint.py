"""Checkpoints that are whole or absent: safetensors and JSON, hashed, written beside and renamed.

    checkpoints/update-00000390/   model.safetensors  optimizer.safetensors  state.json  COMPLETE

`COMPLETE` is written last, inside a folder with a temporary name that is renamed when everything has reached the
disk. It holds the SHA-256 of each file. Nothing is pickled. A checkpoint holds all the state there is: parameters,
buffers, optimizer, gradient scaler and position. One at the end of an epoch is written before the epoch is evaluated;
the empty file `EVALUATED` joins it afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.errors import InputError

FORMAT = 1
_COMPLETE = "COMPLETE"
_EVALUATED = "EVALUATED"
_TEMPORARY = ".writing-"
_PREFIX = "update-"


@dataclass(frozen=True)
class Position:
    """Where a run stands: `update` updates of epoch `epoch` are done, `total` over all epochs."""

    epoch: int = 0
    update: int = 0
    total: int = 0


@dataclass
class Saved:
    """The contents of a checkpoint."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    position: Position
    extra: dict[str, Any] = field(default_factory=dict)


def save(folder: Path, saved: Saved, *, keep: int) -> Path:
    """Write one checkpoint into `folder` and delete all but the newest `keep`.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{_PREFIX}{saved.position.total:08d}"
    if _is_whole(target):  # the same position again, as after a resume that had nothing left to do
        return target
    work = folder / f"{_TEMPORARY}{target.name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        save_file(_plain(saved.model), work / "model.safetensors")
        save_file(_plain(saved.optimizer), work / "optimizer.safetensors")
        state = {"format": FORMAT, "position": asdict(saved.position), "extra": saved.extra}
        (work / "state.json").write_text(json.dumps(state, indent=1))
        hashes = {path.name: sha256(path) for path in sorted(work.iterdir())}
        (work / _COMPLETE).write_text(json.dumps({"format": FORMAT, "sha256": hashes}, indent=1))
        for path in work.iterdir():
            _fsync(path)
        _fsync(work)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(work, target)
        _fsync(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        (old / _COMPLETE).unlink()  # first: a removal that is cut short leaves nothing that looks whole
    for rest in folder.iterdir():
        if rest.name.startswith((_TEMPORARY, _PREFIX)) and not is_complete(rest):
            shutil.rmtree(rest, ignore_errors=True)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.startswith(_PREFIX) and is_complete(path))


def mark_evaluated(folder: Path, update: int) -> None:
    """Note beside the checkpoint at an update, if there is one, that the evaluation there has been recorded."""
    path = folder / f"{_PREFIX}{update:08d}"
    if is_complete(path):
        (path / _EVALUATED).touch()
        _fsync(path)


def is_evaluated(path: Path) -> bool:
    """Whether the evaluation at a checkpoint has been recorded."""
    return (path / _EVALUATED).is_file()


def update_of(path: Path) -> int:
    """How many updates a checkpoint is from the start of its run."""
    return int(path.name.removeprefix(_PREFIX))


def load(path: Path) -> Saved:
    """Read a checkpoint and verify its hashes.

    Raises:
        InputError: a file is missing, changed, or of another format.
    """
    try:
        complete = json.loads((path / _COMPLETE).read_text())
        if complete["format"] != FORMAT:
            raise InputError(f"{path} has checkpoint format {complete['format']}; this version reads {FORMAT}")
        for name, expected in complete["sha256"].items():
            if sha256(path / name) != expected:
                raise InputError(f"{path / name} has changed since it was written (SHA-256 differs)")
        state = json.loads((path / "state.json").read_text())
        model = load_file(path / "model.safetensors")
        optimizer = load_file(path / "optimizer.safetensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(
            f"{path} is not a readable checkpoint ({error}); delete the folder to resume from the one before it"
        ) from None
    return Saved(model, optimizer, Position(**state["position"]), state["extra"])


def load_model(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into a module; every key must fit.

    Raises:
        InputError: missing or unexpected keys, or another shape.
    """
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    if missing or unexpected or shapes:
        raise InputError(
            f"{where} does not fit this model: missing {_few(missing)}; unexpected {_few(unexpected)}; "
            f"other shapes {_few(sorted(shapes))}"
        )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(tensors[key])


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """Optimizer state as `<parameter name>/<entry>` -> tensor. `names` maps `id(parameter)` to its name."""
    return {
        f"{names[id(parameter)]}/{entry}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for entry, value in state.items()
        if value is not None
    }


def load_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[int, str], tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`: replaces the whole state."""
    optimizer.state.clear()
    by_name = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"] if id(p) in names}
    for key, value in tensors.items():
        name, entry = key.rsplit("/", 1)
        if name not in by_name:
            raise InputError(f"the checkpoint holds optimizer state for {name!r}, which this model does not train")
        parameter = by_name[name]
        if value.shape == parameter.shape and value.dim():
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)  # the parameter's memory order
        else:
            value = value.clone()  # what was loaded is still mapped to the file
        optimizer.state[parameter][entry] = value


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the host: safetensors stores neither strides nor shared memory."""
    return {key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()}


def is_complete(path: Path) -> bool:
    """Whether a checkpoint was written to its end and has not been deleted."""
    return (path / _COMPLETE).is_file()


def _is_whole(path: Path) -> bool:
    try:
        load(path)
    except InputError:
        return False
    return True


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _chunked(file)


def _chunked(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"
