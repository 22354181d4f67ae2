"""The default engine: torchvision's JPEG decoder and antialiased 8-bit resize in a pool of threads.

Each image is decoded once for all its views. Decoder and resize release the GIL, so threads scale without copies
between processes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.crop import crop_tensor
from pipelines.draw import ViewParams
from pipelines.engines.decode import decode_sample
from pipelines.errors import InputError
from pipelines.views import ViewSpec


class Engine:
    """See `pipelines.engines`. `workers` threads decode and crop; results are pinned when the device is CUDA."""

    ASYNC = True

    def __init__(self, files: Any, *, device: torch.device, workers: int):
        self.files = files
        self.device = device
        self.pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="relssl-decode")

    @staticmethod
    def check(spec: ViewSpec) -> None:
        """Every spec can be made."""

    def crops(
        self, ids: np.ndarray, params: list[ViewParams], replace: Callable[[int, InputError], int]
    ) -> list[Tensor]:
        """Decode and crop a batch; one (B, S, S, 3) uint8 tensor per view, on the host."""
        pin = self.device.type == "cuda"
        out = [torch.empty((len(ids), p.size, p.size, 3), dtype=torch.uint8, pin_memory=pin) for p in params]

        def one(row: int) -> None:
            index = int(ids[row])
            while True:
                try:
                    image = decode_sample(self.files, index)
                    break
                except InputError as error:
                    index = replace(row, error)
            for view, buffer in zip(params, out, strict=True):
                crop_tensor(image, view, row, buffer[row])

        for _ in self.pool.map(one, range(len(ids))):  # re-raises what a worker raised
            pass
        return out

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
