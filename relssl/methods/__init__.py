"""One file per method. `relssl/methods/<name>.py` offers a class `Method`; there is no registry to edit."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

from pipelines.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from relssl.methods.base import Method


def method_names() -> list[str]:
    """Names of all methods, from the files in this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def load_method(name: str) -> type[Method]:
    """The `Method` class of a file in this folder.

    Raises:
        ConfigError: no such method; the message names the nearest one.
    """
    if name not in method_names():
        raise ConfigError(unknown_name("method", name, method_names()))
    return import_module(f"relssl.methods.{name}").Method
