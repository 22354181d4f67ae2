"""Small data sets live in memory whole, as one 8-bit tensor on the device: no decoding, no workers, no copies.

On the CPU a numba kernel crops, on an accelerator two batched matrix products do. The way for CIFAR, STL and tiny
images, and for many views of each image.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.crop import crop_matmul, crop_small
from pipelines.draw import ViewParams
from pipelines.engines.decode import decode_sample
from pipelines.errors import ConfigError, InputError
from pipelines.views import ViewSpec

_MEMORY_SHARE = 0.8


class Engine:
    """See `pipelines.engines`. Images of different sizes lie in the corner of one canvas."""

    ASYNC = False

    def __init__(self, files: Any, *, device: torch.device, workers: int):
        self.device = device
        self.unreadable: dict[int, InputError] = {}
        shape = (len(files), int(files.heights.max()), int(files.widths.max()), 3)
        _check_memory(shape, device)
        canvas = torch.zeros(shape, dtype=torch.uint8)

        def load(index: int) -> None:
            try:
                image = decode_sample(files, index)
            except InputError as error:
                self.unreadable[index] = error
            else:
                canvas[index, : image.shape[1], : image.shape[2]] = image.permute(1, 2, 0)

        with ThreadPoolExecutor(max(workers, 1)) as pool:
            for _ in pool.map(load, range(len(files)), chunksize=256):
                pass
        self.images = canvas.to(device)

    @staticmethod
    def check(spec: ViewSpec) -> None:
        if spec.interpolation != "bilinear":
            raise ConfigError(
                f"view {spec.name!r}: the resident engine resizes bilinearly, not {spec.interpolation}; "
                "set data.engine: torchvision"
            )

    def crops(
        self, ids: np.ndarray, params: list[ViewParams], replace: Callable[[int, InputError], int]
    ) -> list[Tensor]:
        """Crop a batch; one (B, S, S, 3) uint8 tensor per view, on the device."""
        if self.unreadable:
            ids = ids.copy()
            for row in range(len(ids)):
                while int(ids[row]) in self.unreadable:
                    ids[row] = replace(row, self.unreadable[int(ids[row])])
        if self.device.type == "cpu":
            out = [torch.empty((len(ids), p.size, p.size, 3), dtype=torch.uint8) for p in params]
            for view, buffer in zip(params, out, strict=True):
                crop_small(self.images.numpy(), ids, view, buffer.numpy())
            return out
        rows = torch.as_tensor(ids, device=self.device)
        return [crop_matmul(self.images, rows, view) for view in params]

    def close(self) -> None:
        self.images = torch.empty(0, dtype=torch.uint8)


def _check_memory(shape: tuple[int, ...], device: torch.device) -> None:
    needed = int(np.prod(shape))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if free is not None and needed > _MEMORY_SHARE * free:
        raise ConfigError(
            f"the resident engine would hold {shape[0]} images of up to {shape[1]}x{shape[2]} pixels, "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on {device}; "
            "set data.engine: torchvision"
        )


def available_memory() -> int | None:
    """Bytes that can be had without swapping, the page cache included; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
