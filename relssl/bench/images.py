"""Which images a benchmark reads: enough for a pass of seconds, few enough to stay in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipelines.subset import Subset, spread

MOST_IMAGES = 1 << 16
MOST_BYTES = 2 << 30  # of stored data: what a pass reads has to stay in the page cache
LEAST_IMAGES = 1 << 13  # 500 raw images would be over in a tenth of a second
_PAGE = 4096


def prepare(files: Any, *, least: int = LEAST_IMAGES) -> Any:
    """Images for passes of any length up to their number, read once so that they lie in the page cache.

    A large file is represented by images evenly spread over it; the images of a small one come up several times,
    as they do in epochs.
    """
    sizes = np.array([len(files.payload(i)) for i in range(0, len(files), max(1, len(files) // 1024))])
    chosen = spread(files, max(1, min(MOST_IMAGES, int(MOST_BYTES / sizes.mean()))))
    for i in range(len(chosen)):
        chosen.payload(i)[::_PAGE].max()
    if len(chosen) >= least:
        return chosen
    return Subset(chosen, np.resize(np.arange(len(chosen)), least))


def describe(files: Any, paths: list[Path]) -> dict[str, Any]:
    """What a figure needs to know of the data."""
    storage = {True: "jpeg", False: "raw"}
    kinds = sorted({storage[bool(kind)] for kind in files.is_jpeg})
    return {
        "files": [str(path) for path in paths],
        "images": len(files),
        "storage": " and ".join(kinds),
        "bytes": sum(path.stat().st_size for path in paths),
        "mean_height": round(float(files.heights.mean()), 1),
        "mean_width": round(float(files.widths.mean()), 1),
        "content_hash": files.content_hash,
    }
