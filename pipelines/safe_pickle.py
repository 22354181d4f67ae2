"""The one reader of foreign pickles: an exact allow-list, and nothing else is ever looked up.

A pickle is a program; `pickle.load` on a downloaded file runs whatever its author wrote. The data sets and
weights that are published as pickles hold only dictionaries, lists, numbers, strings and numpy arrays, so
that is all this reader builds. Functions that a pickle may call are our own narrow versions, never the
originals.
"""

from __future__ import annotations

import codecs
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pipelines.errors import InputError

_IS_PYTHON_CLASS = 1 << 9  # Py_TPFLAGS_HEAPTYPE; the others take no new attributes


def loads(
    data: bytes, *, where: str, encoding: str = "latin1", more: Mapping[tuple[str, str], Any] | None = None
) -> Any:
    """The object in the pickle `data`. `encoding` is for the strings of Python-2 pickles ("bytes" keeps them
    bytes).

    Args:
        where: a file, named in errors.
        more: what one kind of file asks for besides, (module, name) -> the caller's own harmless version of it.

    Raises:
        InputError: the pickle asks for anything outside the allow-list, or is damaged.
    """
    try:
        return _Reader(io.BytesIO(data), encoding, more or {}).load()
    except _Refused as refused:
        raise InputError(
            f"{where}: refused: this pickle asks for {refused}; only plain data and numpy arrays are read"
        ) from None
    except MemoryError:
        raise InputError(f"{where}: a damaged pickle: it asks for more memory than there is") from None
    except Exception as error:
        raise InputError(f"{where}: a damaged pickle: {type(error).__name__}: {error}") from error


class _Refused(pickle.UnpicklingError):
    """Something outside the allow-list; the message is its name."""


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, encoding: str, more: Mapping[tuple[str, str], Any]):
        super().__init__(file, encoding=encoding)
        self._allowed = {**more, **_ALLOWED}

    def find_class(self, module: str, name: str) -> Any:
        try:
            found = self._allowed[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None
        return fresh(found) if isinstance(found, type) else _Function(found, f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused(f"an external object ({pid!r})")


class _Function:
    """What a pickle may call, and not change: it can set attributes of whatever it holds."""

    __slots__ = ("_call", "_name")

    def __init__(self, call: Callable[..., Any], name: str):
        self._call, self._name = call, name

    def __repr__(self) -> str:
        return self._name

    def makes_arrays(self) -> bool:
        return self._call is _reconstruct

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("a change of what it calls")


def fresh(cls: type) -> type:
    """The class, or where a pickle could change it a subclass for this one pickle."""
    return type(cls.__name__, (cls,), {"__slots__": ()}) if cls.__flags__ & _IS_PYTHON_CLASS else cls


def array_by(make: Any, arguments: tuple[Any, ...], state: tuple[Any, ...]) -> np.ndarray:
    """The array that a pickle takes apart as numpy does, for formats that wrap one.

    What `make` may be is not left to the pickle: numpy's reconstruct function, or the pickle is refused.
    """
    if not (isinstance(make, _Function) and make.makes_arrays()):
        raise _Refused(f"an array made by {make if isinstance(make, (_Function, type)) else type(make)!r}")
    array = make(*arguments)
    array.__setstate__(state)
    return array


def _reconstruct(subtype: type, shape: tuple[int, ...], typecode: bytes | str) -> np.ndarray:
    """numpy's empty array that a pickle then fills; of plain arrays only."""
    if subtype is not np.ndarray:
        raise _Refused(f"an array of {subtype!r}")
    return np.ndarray.__new__(np.ndarray, shape, typecode if isinstance(typecode, str) else typecode.decode("ascii"))


def _dtype(code: str | bytes, align: bool = False, copy: bool = False) -> np.dtype:
    """numpy's dtype, of numbers, booleans and byte strings: none that holds Python objects."""
    kind = np.dtype(code.decode("ascii") if isinstance(code, bytes) else code)
    if kind.hasobject or kind.kind not in "biufcSV":
        raise _Refused(f"an array of {kind}")
    return kind


def _scalar(kind: np.dtype, data: bytes | str) -> Any:
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, kind, 1)[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes into a protocol-2 pickle; of all codecs only the one that it uses."""
    if codecs.lookup(encoding).name != "iso8859-1":
        raise _Refused(f"the codec {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1 and 2
    _ALLOWED[_module, "_reconstruct"] = _reconstruct
    _ALLOWED[_module, "scalar"] = _scalar
