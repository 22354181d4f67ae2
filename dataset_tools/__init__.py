"""Making, checking and describing data sets: `convert` writes any images to a `.beton` file.

Nothing here imports `relssl`.
"""

from __future__ import annotations

from dataset_tools.convert import convert

__all__ = ["convert"]
