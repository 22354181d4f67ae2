"""Small data sets live in memory whole, as one 8-bit tensor on the device: no decoding, no copies.

On the CPU a compiled loop crops, on an accelerator two batched matrix products do. The way for CIFAR, STL and tiny
images, and for many views of each image.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.crop import crop_matmul, crop_small, on_device
from pipelines.draw import ViewParams
from pipelines.engines import Finish, Replace, refuse_area
from pipelines.engines.decode import decode_sample, naming
from pipelines.errors import ConfigError, InputError
from pipelines.machine import free_memory
from pipelines.memory import Recycler
from pipelines.pool import Pool
from pipelines.views import ViewSpec

_MEMORY_SHARE = 0.8
# Pixels of 8 bits are exact in half precision, so crops stay within a level of PIL's, and CUDA devices are made for it.
_CUDA_DTYPE = torch.float16
_CHUNK_VIEWS = 256  # views a thread makes at a time: enough to forget the call, few enough to stay in its cache


class Engine:
    """See `pipelines.engines`. Images of different sizes lie in the corner of one canvas."""

    def __init__(self, files: Any, *, device: torch.device, pool: Pool, resize: str = "antialias"):
        self.device, self.pool = device, pool
        self.ASYNC = device.type == "cpu"  # on an accelerator the crops are queued behind the step anyway
        self._memory = Recycler()
        self._decoded = _decoded(files, device, pool)
        self.images, self.unreadable = self._decoded.images, self._decoded.unreadable

    @staticmethod
    def check(spec: ViewSpec, resize: str) -> None:
        refuse_area(resize)

    def crops(
        self, ids: np.ndarray, params: list[ViewParams], replace: Replace, finish: Finish | None = None
    ) -> list[Tensor]:
        """Crop a batch on the device; see `pipelines.engines`."""
        ids = self._readable(ids, replace)
        if self.device.type != "cpu":
            rows = on_device(ids, self.device)
            dtype = _CUDA_DTYPE if self.device.type == "cuda" else torch.float32
            return [crop_matmul(self.images, rows, view, dtype) for view in params]
        images = self.images.numpy()
        crops = [self._memory.empty((p.count, len(ids), p.size, p.size, 3), torch.uint8) for p in params]

        def make(start: int, stop: int) -> None:
            for view, buffer in zip(params, crops, strict=True):
                crop_small(images, ids, view, buffer.numpy(), start, stop)
            if finish is not None:
                finish(crops, start, stop)

        views = sum(p.count for p in params)
        self.pool.run(make, len(ids), chunk=max(1, _CHUNK_VIEWS // views))
        return crops

    def close(self) -> None:
        self._memory.clear()
        self._decoded = _Decoded(None, torch.empty(0, dtype=torch.uint8), {})
        self.images = self._decoded.images

    def _readable(self, ids: np.ndarray, replace: Replace) -> np.ndarray:
        """`ids` with the images that could not be decoded replaced."""
        if not self.unreadable:
            return ids
        ids = ids.copy()
        for row in range(len(ids)):
            while int(ids[row]) in self.unreadable:
                ids[row] = replace(row, self.unreadable[int(ids[row])])
        return ids


@dataclass(eq=False)
class _Decoded:
    """The images of an open data set on a device, and why some are missing."""

    files: Any
    images: Tensor
    unreadable: dict[int, InputError]


# Engines over one open data set share its images: DeepCluster's features need no second copy. Gone with the last one.
_IN_USE: weakref.WeakValueDictionary[tuple[int, str], _Decoded] = weakref.WeakValueDictionary()


def _decoded(files: Any, device: torch.device, pool: Pool) -> _Decoded:
    key = (id(files), str(device))
    found = _IN_USE.get(key)
    if found is None or found.files is not files:
        found = _IN_USE[key] = _decode_all(files, device, pool)
    return found


def _decode_all(files: Any, device: torch.device, pool: Pool) -> _Decoded:
    shape = (len(files), int(files.heights.max()), int(files.widths.max()), 3)
    _check_memory(shape, device)
    canvas = torch.zeros(shape, dtype=torch.uint8)
    unreadable: dict[int, InputError] = {}

    def load(start: int, stop: int) -> None:
        for index in range(start, stop):
            try:
                with naming(files, index):
                    image = decode_sample(files, index)
            except InputError as error:
                unreadable[index] = error
            else:
                canvas[index, : image.shape[1], : image.shape[2]] = image.permute(1, 2, 0)

    pool.run(load, len(files), chunk=256)
    return _Decoded(files, canvas.to(device), unreadable)


def _check_memory(shape: tuple[int, ...], device: torch.device) -> None:
    needed = int(np.prod(shape))
    free = free_memory(device)
    if free is not None and needed > _MEMORY_SHARE * free:
        raise ConfigError(
            f"the resident engine would hold {shape[0]} images of up to {shape[1]}x{shape[2]} pixels, "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on {device}; "
            "set data.engine: torchvision"
        )
