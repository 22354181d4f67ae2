"""What the engines that decode image by image share: each image decoded once in a thread, then all its crops."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.crop import crop_image
from pipelines.draw import ViewParams
from pipelines.engines import Finish, Replace, refuse_area
from pipelines.engines.decode import naming
from pipelines.errors import InputError
from pipelines.pool import Pool
from pipelines.views import ViewSpec


class ThreadedEngine:
    """See `pipelines.engines`; a subclass says how one image is decoded."""

    ASYNC = True

    def __init__(self, files: Any, *, device: torch.device, pool: Pool, resize: str = "antialias"):
        self.files = files
        self.pin = device.type == "cuda"
        self.pool = pool
        self.resize = resize
        self._spare: deque[list[Tensor]] = deque(maxlen=4)

    @staticmethod
    def check(spec: ViewSpec, resize: str) -> None:
        refuse_area(resize)

    def decode(self, index: int) -> Tensor:
        """Sample `index` as (3, H, W) uint8 with H x W x 3 memory; InputError when it is damaged."""
        raise NotImplementedError

    def crop(self, image: Tensor, params: ViewParams, row: int, out: Tensor) -> None:
        """The crops of one decoded image for one spec, into row `row` of out (V, B, S, S, 3)."""
        crop_image(image, params, row, out)

    def crops(
        self, ids: np.ndarray, params: list[ViewParams], replace: Replace, finish: Finish | None = None
    ) -> list[Tensor]:
        """Decode and crop a batch on the host; see `pipelines.engines`."""
        crops = self._buffers(params, len(ids), reuse=finish is not None)

        def make(start: int, stop: int) -> None:
            for row in range(start, stop):
                index, image = self._readable(int(ids[row]), row, replace)
                with naming(self.files, index):
                    for view, buffer in zip(params, crops, strict=True):
                        self.crop(image, view, row, buffer)
            if finish is not None:
                finish(crops, start, stop)

        self.pool.run(make, len(ids))
        if finish is not None:
            self._spare.append(crops)
        return crops

    def close(self) -> None:
        self._spare.clear()

    def _buffers(self, params: list[ViewParams], batch: int, *, reuse: bool) -> list[Tensor]:
        """Room for the crops: used again on the CPU; page-locked for CUDA, where torch's own cache of such memory
        gives a block out again only when the copy from it has ended."""
        shapes = [(view.count, batch, view.size, view.size, 3) for view in params]
        if reuse:
            try:
                spare = self._spare.pop()
            except IndexError:
                pass
            else:
                if [tuple(buffer.shape) for buffer in spare] == shapes:
                    return spare
        return [torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin) for shape in shapes]

    def _readable(self, index: int, row: int, replace: Replace) -> tuple[int, Tensor]:
        """A sample, or the one that replaces it, or the one that replaces that; decoded."""
        while True:
            try:
                with naming(self.files, index):
                    return index, self.decode(index)
            except InputError as error:
                index = replace(row, error)
