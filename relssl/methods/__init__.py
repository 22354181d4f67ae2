"""One file per method: it offers a class `Method`; there is no registry to edit.

A method is called by name (`ressl` is `relssl/methods/ressl.py`), or by the path of a file of your own (`./byol.py`).
"""

from __future__ import annotations

import pkgutil
from importlib import import_module, util
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import ConfigError, InputError, unknown_name

if TYPE_CHECKING:
    from relssl.methods.base import Method


def method_names() -> list[str]:
    """Names of the methods here, from the files in this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def load_method(name: str) -> type[Method]:
    """The `Method` class of a file in this folder, or of a file whose path ends in `.py`.

    Raises:
        ConfigError: no such method; the message names the nearest one. Or a file without a `Method` class.
        InputError: the file does not exist.
    """
    if name.endswith(".py"):
        return _from_file(Path(name))
    if name not in method_names():
        raise ConfigError(f"{unknown_name('method', name, method_names())}; a file of your own is given as ./name.py")
    return import_module(f"relssl.methods.{name}").Method


def _from_file(path: Path) -> type[Method]:
    from relssl.methods.base import Method

    if not path.is_file():
        raise InputError(f"there is no method file {path}; expected a Python file with a class Method")
    spec = util.spec_from_file_location(f"relssl_method_{path.stem}", path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"the method file {path} cannot be loaded: {type(error).__name__}: {error}") from error
    found = getattr(module, "Method", None)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"the method file {path} has no class Method derived from relssl.methods.base.Method")
    return found
