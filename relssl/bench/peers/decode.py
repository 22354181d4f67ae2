"""Decoding alone: torchvision's `decode_jpeg` on our threads, and nothing after it. What no pipeline can pass."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from pipelines.errors import InputError
from pipelines.pool import Pool
from relssl.bench.peers import Job, PeerBase

_CHUNK = 4  # images that a thread takes at a time


class Peer(PeerBase):
    """Yields the decoded images of a batch, (3, H, W) each, instead of views."""

    title = "decode alone"

    def __init__(self, job: Job):
        super().__init__(job)
        if not job.files.is_jpeg.all():
            raise InputError("decode alone is not measured: the data is raw pixels; give JPEGs as --baseline-data")
        self.pool = Pool(job.cores)
        self.how = f"torchvision's decode_jpeg, {job.cores} threads"
        self.passes = 0

    def batches(self, num_images: int) -> Iterator[tuple[int, list[Tensor]]]:
        self.passes += 1
        order = np.random.default_rng(self.passes).permutation(len(self.job.files))[:num_images]
        for start in range(0, num_images, self.job.batch):
            ids = order[start : start + self.job.batch]
            yield len(ids), self._decoded(ids)

    def _decoded(self, ids: np.ndarray) -> list[Tensor]:
        images: list[Tensor] = [torch.empty(0)] * len(ids)

        def some(start: int, stop: int) -> None:
            for row in range(start, stop):
                data = torch.from_numpy(np.array(self.job.files.payload(int(ids[row]))))
                images[row] = decode_jpeg(data, mode=ImageReadMode.RGB)

        self.pool.run(some, len(ids), _CHUNK)
        return images

    def close(self) -> None:
        self.pool.close()
