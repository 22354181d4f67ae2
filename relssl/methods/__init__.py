"""One file per method: it offers a class `Method`; there is no registry to edit.

A method is called by name (`ressl` is `relssl/methods/ressl.py`), or by the path of a file of your own (`./byol.py`).
"""

from __future__ import annotations

import pkgutil
import sys
from importlib import import_module, util
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import ConfigError, InputError, unknown_name

if TYPE_CHECKING:
    from relssl.methods.base import Method

# Methods from files, with the time at which the file was last changed: one file is one class.
_LOADED: dict[Path, tuple[int, type[Method]]] = {}


def method_names() -> list[str]:
    """Names of the methods here, from the files in this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def load_method(name: str) -> type[Method]:
    """The `Method` class of a file in this folder, or of a file whose path ends in `.py`.

    Raises:
        ConfigError: no such method; the message names the nearest one. Or a file without a whole `Method` class.
        InputError: the file does not exist.
    """
    if name.endswith(".py"):
        return _from_file(Path(name))
    if name not in method_names():
        raise ConfigError(f"{unknown_name('method', name, method_names())} A file of your own is given as ./name.py.")
    return import_module(f"relssl.methods.{name}").Method


def _from_file(path: Path) -> type[Method]:
    if not path.is_file():
        raise InputError(
            f"there is no method file {path} in {Path.cwd()}; expected a Python file with a class Method, its path "
            "seen from the folder in which the command is started"
        )
    place, changed = path.resolve(), path.stat().st_mtime_ns
    if place not in _LOADED or _LOADED[place][0] != changed:
        _LOADED[place] = changed, _checked(_executed(place), path)
    return _LOADED[place][1]


def _executed(path: Path) -> object:
    """What a file calls `Method`; None where nothing is called so."""
    name = f"relssl_method_{path.stem}"
    spec = util.spec_from_file_location(name, path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic and dataclasses look up the names in annotations there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"the method file {path} cannot be loaded: {type(error).__name__}: {error}") from error
    return getattr(module, "Method", None)


def _checked(found: object, path: Path) -> type[Method]:
    """A class that the trainer can ask what it needs to know before it builds anything."""
    from relssl.methods.base import ACCUMULATIONS, KNOWN_NEEDS, PROCESS_KINDS, Method, MethodConfig

    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"the method file {path} has no class Method derived from relssl.methods.base.Method")
    config = getattr(found, "Config", None)
    if not (isinstance(config, type) and issubclass(config, MethodConfig)):
        raise ConfigError(f"{path}: Method.Config must be a class derived from relssl.methods.base.MethodConfig")
    if not _are_views(getattr(found, "VIEWS", None)):
        raise ConfigError(
            f"{path}: Method.VIEWS says which views it takes and how many, at least and at most, such as "
            "{'view': (2, 2)} or {'view': (2, None)}"
        )
    if found.TRAINS and found.forward is Method.forward:
        raise ConfigError(f"{path}: Method has no forward; one that trains nothing says TRAINS = False")
    if not isinstance(found.NEEDS, (set, frozenset)):
        raise ConfigError(f"{path}: Method.NEEDS is a set, such as frozenset({{'labels'}}); got {found.NEEDS!r}")
    for need in found.NEEDS:
        if need not in KNOWN_NEEDS:
            raise ConfigError(f"{path}: Method.NEEDS: {unknown_name('need', need, KNOWN_NEEDS)}")
    for attribute, known in (("ACCUMULATION", ACCUMULATIONS), ("PROCESSES", PROCESS_KINDS)):
        if (value := getattr(found, attribute)) not in known:
            raise ConfigError(f"{path}: Method.{attribute}: {unknown_name('kind', value, known)}")
    return found


def _are_views(views: object) -> bool:
    def is_span(span: object) -> bool:
        return (
            isinstance(span, tuple)
            and len(span) == 2
            and isinstance(span[0], int)
            and (span[1] is None or isinstance(span[1], int))
        )

    return isinstance(views, dict) and all(isinstance(name, str) and is_span(span) for name, span in views.items())
