"""A foreign file as plain Python: dictionaries, numbers and tensors or arrays.

PyTorch's files (zip, and the older form of PyTorch before 1.6) are read by `torch.load` with `weights_only`, the
pickles of Haiku by `pipelines.safe_pickle`. Both build plain data only and refuse everything else by name.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipelines import safe_pickle
from pipelines.errors import ConfigError, InputError

# Before it, a crafted file could get past `weights_only`.
FIRST_SAFE_TORCH = (2, 10)

_ZIP = b"PK\x03\x04"
_TORCH_BEFORE_1_6 = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickled number that begins every such file
_PICKLE = b"\x80"
_HEAD = 1024


def read_foreign(path: Path) -> Any:
    """The object in a file of somebody else.

    Raises:
        InputError: it cannot be opened, is something else (a web page, an archive), is damaged, or asks for anything
            but plain data.
        ConfigError: this PyTorch is too old to read such files safely.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise InputError(f"cannot open {path}: {error.strerror or error}; expected a checkpoint") from None
    if head.startswith((_ZIP, _TORCH_BEFORE_1_6)):
        return _read_torch(path)
    if head.startswith(_PICKLE):
        return safe_pickle.loads(path.read_bytes(), where=str(path), more=_HAIKU)
    raise InputError(f"{path} is not a checkpoint: {_what_it_is(head)}")


def _what_it_is(head: bytes) -> str:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "it is empty; download it again"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return (
            "it is a web page, as Google Drive sends one in place of a large file; open the link in a browser and "
            "confirm the download"
        )
    if text.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; fetch the file itself with git lfs pull"
    if head[257:262] == b"ustar" or head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
        return "it is an archive; unpack it and import the file inside"
    if head[8:9] == b"{":
        return (
            "it looks like safetensors; a backbone written by relssl needs no import, use it as --weights, and other "
            "safetensors files are not read"
        )
    return f"it begins with {head[:8]!r}; expected what torch.save or pickle.dump writes"


def _read_torch(path: Path) -> Any:
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < FIRST_SAFE_TORCH:
        needed = ".".join(map(str, FIRST_SAFE_TORCH))
        raise ConfigError(
            f"{path} comes from somebody else, and PyTorch {torch.__version__} cannot read such files safely; "
            f"install PyTorch {needed} or newer"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise InputError(f"{path} is a damaged checkpoint: {_first_line(error)}") from None
        raise InputError(
            f"{path}: refused: this checkpoint asks for {asked[1]}; only tensors and plain data are read"
        ) from None
    except Exception as error:
        raise InputError(
            f"{path} is a damaged or incomplete checkpoint ({_first_line(error)}); download it again"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# -- what pickles of Haiku ask for, in versions of ours that only hold data


def _mapping(data: Mapping[str, Any]) -> dict[str, Any]:
    """Haiku's immutable dictionaries."""
    return dict(data)


def _jax_array(make: Any, arguments: tuple[Any, ...], state: tuple[Any, ...], *of_jax: Any) -> Any:
    """JAX wraps a numpy array: how it is made, its contents, and what only JAX wants to know."""
    return safe_pickle.array_by(make, arguments, state)


def _dill_array(make: Any, arguments: tuple[Any, ...], state: tuple[Any, ...], attributes: Any = None) -> Any:
    """dill's way of writing a numpy array; attributes are of subclasses only."""
    return safe_pickle.array_by(make, arguments, state)


def _dill_namedtuple(name: str, fields: Sequence[str], *more: Any) -> type:
    """dill writes named tuples with their definition."""
    return safe_pickle.fresh(_ByolState if tuple(fields) == _ByolState._fields else _Unread)


class _Unread(tuple[Any, ...]):
    """A part of an optimizer's state."""

    __slots__ = ()

    def __new__(cls, *fields: Any) -> _Unread:
        return super().__new__(cls, fields)


class _ByolState(NamedTuple):
    """How BYOL's code, on which ReLICv2's builds, saves its state."""

    online_params: Any
    target_params: Any
    online_state: Any
    target_state: Any
    opt_state: Any


_HAIKU: dict[tuple[str, str], Any] = {
    **{("haiku._src.data_structures", name): _mapping for name in ("FlatMapping", "FlatMap", "frozendict")},
    ("jax._src.array", "_reconstruct_array"): _jax_array,
    ("jax._src.device_array", "reconstruct_device_array"): _jax_array,
    ("dill._dill", "_create_array"): _dill_array,
    ("dill._dill", "_create_namedtuple"): _dill_namedtuple,
    ("byol.byol_experiment", "_ByolExperimentState"): _ByolState,
    ("byol.utils.optimizers", "ScaleByLarsState"): _Unread,
    ("byol.utils.optimizers", "AddWeightDecayState"): _Unread,
    ("optax._src.transform", "ScaleState"): _Unread,
    ("optax._src.base", "EmptyState"): _Unread,
}
