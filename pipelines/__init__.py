"""From a `.beton` file and a description of views to batches on the device.

`views` describes, `order` says which images, `draw` draws every random number, an engine decodes and crops,
`colour` does the rest. Nothing here imports `relssl`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.batch import ViewBatch
    from pipelines.loader import ViewLoader
    from pipelines.views import ViewSpec

__all__ = ["ViewBatch", "ViewLoader", "ViewSpec"]

_HOME = {"ViewBatch": "batch", "ViewLoader": "loader", "ViewSpec": "views"}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line lists its verbs without waiting for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"pipelines.{_HOME[name]}"), name)
