"""`relssl saliency`: a `.beton` file whose images have masks, from one whose images have none.

It copies a file, image by image as it is stored, and gives each the mask of `dataset_tools.saliency`.
"""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset_tools.mask_files import MaskCount, MaskRefused
from dataset_tools.saliency import Saliency, saliency
from pipelines import beton
from pipelines.beton_write import check_target
from pipelines.errors import ConfigError, InputError
from pipelines.machine import available_cores

METHOD = "minimum barrier distance"
NO_SUBJECT = "no subject found"
_IN_FLIGHT = 4  # images per worker
# Entries of a manifest that are about the file itself.
_OWN_ENTRIES = {
    *("format", "file", "bytes", "samples", "labelled", "classes", "mode", "height", "width"),
    *("sha256_tables", "sha256_payloads", "content_hash"),
}


@dataclass
class Masking:
    """What `add_masks` did."""

    path: Path
    images: int
    seconds: float
    masks: MaskCount
    manifest: beton.Manifest

    def text(self) -> str:
        """The summary for a terminal."""
        rate = self.images / max(self.seconds, 1e-9)
        size = self.manifest["bytes"] / 1e6
        lines = [f"{self.path}: {self.images:,} images, {size:,.1f} MB, in {self.seconds:.1f} s ({rate:,.0f} images/s)"]
        lines += self.masks.lines(beton.manifest_path(self.path))
        return "\n".join([*lines, f"next: relssl verify {self.path}"])


def add_masks(
    source: str | Path,
    out: str | Path,
    *,
    workers: int | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Masking:
    """Copy the `.beton` file `source` to `out`, with a saliency mask to every image.

    Images, labels and what the manifest says about their origin are kept; masks that `source` has are replaced. `out`
    appears under its name only when it is whole, so it may be `source` itself, with `force`. An image in which no
    subject is found, or that cannot be decoded, is foreground as a whole, counted, and listed in the manifest.

    Raises ConfigError, InputError and RunError as `pipelines.beton.write` does; InputError, too, for an image that is
    not the one that was written, by the fingerprints of `source`.
    """
    started = time.monotonic()
    check_target(out, force=force)
    workers = _checked_workers(workers)
    count = MaskCount(METHOD)
    with beton.Beton(source) as file, ThreadPoolExecutor(workers, thread_name_prefix="saliency") as pool:
        about = {key: value for key, value in (file.manifest or {}).items() if key not in _OWN_ENTRIES}
        about.setdefault("source", str(source))
        try:
            manifest = beton.write(
                out,
                _masked(file, pool, workers * _IN_FLIGHT, count, progress),
                count=len(file),
                classes=file.classes,
                about=lambda: {**about, "masks": count.about()},
                masks=True,
                names=file.names,
                force=force,
            )
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return Masking(Path(out), len(file), time.monotonic() - started, count, manifest)


def _checked_workers(workers: int | None) -> int:
    if workers is not None and workers < 1:
        raise ConfigError(f"workers {workers}: expected at least 1")
    return workers or available_cores()


def _masked(
    file: beton.Beton,
    pool: ThreadPoolExecutor,
    in_flight: int,
    count: MaskCount,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[bytes | np.ndarray, int, np.ndarray]]:
    """The samples of a file with their masks, in order, a bounded number at a time."""
    queue: deque[tuple[int, Future[tuple[bytes | np.ndarray, np.ndarray | MaskRefused]]]] = deque()

    def take() -> tuple[bytes | np.ndarray, int, np.ndarray]:
        i, ready = queue.popleft()
        image, mask = ready.result()
        if progress is not None:
            progress(i + 1, len(file))
        return image, int(file.labels[i]), count.add(f"sample {i}", mask)

    for i in range(len(file)):
        queue.append((i, pool.submit(_sample, file, i)))
        if len(queue) >= in_flight:
            yield take()
    while queue:
        yield take()


def _sample(file: beton.Beton, i: int) -> tuple[bytes | np.ndarray, np.ndarray | MaskRefused]:
    """An image as it is stored, and its mask."""
    payload = file.payload(i)
    image = payload.tobytes() if file.is_jpeg[i] else payload.reshape(int(file.heights[i]), int(file.widths[i]), 3)
    try:
        found = _saliency_of(file, i, payload)
    except InputError as error:
        return image, MaskRefused("image that cannot be decoded", str(error))
    if not found.believed:
        return image, MaskRefused(NO_SUBJECT, f"{100 * found.share:.1f} % of the image seemed to be it")
    return image, found.mask


def _saliency_of(file: Any, i: int, payload: np.ndarray) -> Saliency:
    if not file.is_jpeg[i]:
        return saliency(payload.reshape(int(file.heights[i]), int(file.widths[i]), 3))
    try:
        with Image.open(io.BytesIO(payload.data), formats=["JPEG"]) as image:
            return saliency(image)
    except Exception as error:
        raise InputError(f"sample {i}: {type(error).__name__}: {error}") from error
