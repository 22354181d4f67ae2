"""Peers that transform one image at a time in the worker processes of a torch DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipelines.views import expand
from relssl.bench.peers import Job, PeerBase

Transform = Callable[[Any], Tensor]


class Pass(Sampler[int]):
    """The ids of one pass, another random order every time; `num_images` is set before each."""

    def __init__(self, length: int):
        self.length, self.num_images, self.number = length, 0, 0

    def __iter__(self) -> Iterator[int]:
        self.number += 1
        order = np.random.default_rng(self.number).permutation(self.length)
        return iter(order[: self.num_images].tolist())

    def __len__(self) -> int:
        return self.num_images


class Views(Dataset[list[Tensor]]):
    """An image is decoded once, then transformed once for every view."""

    def __init__(self, files: Any, decode: Callable[[Any, int], Any], transforms: Sequence[Transform]):
        self.files, self.decode, self.transforms = files, decode, transforms

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> list[Tensor]:
        image = self.decode(self.files, index)
        return [transform(image) for transform in self.transforms]


class DataLoaderPeer(PeerBase):
    """As many worker processes as others have threads; on one core none, everything happens in this process."""

    FORKS = True

    def __init__(self, job: Job, decode: Callable[[Any, int], Any], make_transform: Callable[[Any], Transform]):
        super().__init__(job)
        transforms = [make_transform(spec) for spec in expand(job.plan)]
        workers = job.cores if job.cores > 1 else 0
        self.order = Pass(len(job.files))
        self.loader: DataLoader[list[Tensor]] | None = DataLoader(
            Views(job.files, decode, transforms),
            batch_size=job.batch,
            sampler=self.order,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=job.device.type == "cuda",
        )
        self.how = f"DataLoader, {workers} worker processes" if workers else "DataLoader, in this process"

    def batches(self, num_images: int) -> Iterator[tuple[int, list[Tensor]]]:
        assert self.loader is not None
        self.order.num_images = num_images
        for views in self.loader:
            moved = [view.to(self.job.device, non_blocking=True) for view in views]
            yield len(moved[0]), [self.finish(view, number) for number, view in enumerate(moved)]

    def finish(self, view: Tensor, number: int) -> Tensor:
        """What happens to a batch of view `number` on the device."""
        return view

    def close(self) -> None:
        self.loader = None  # the last reference: its workers end with it


def stored_pixels(files: Any, index: int) -> np.ndarray:
    """(H, W, 3) uint8 of a sample that is not JPEG."""
    return np.array(files.payload(index)).reshape(int(files.heights[index]), int(files.widths[index]), 3)
