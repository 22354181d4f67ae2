"""relssl itself, as a user gets it: order, draw, decode, crops, colour and batches, with every check."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor

from pipelines.draw import draw
from pipelines.errors import InputError
from pipelines.loader import ViewLoader
from pipelines.order import permutation
from relssl.bench.peers import Job, PeerBase

_FEEDERS, _AHEAD = 2, 3  # as `ViewLoader` does it


class Loader(PeerBase):
    """Complete views, by `ViewLoader`."""

    def __init__(self, job: Job, engine: str, resize: str = "antialias"):
        super().__init__(job)
        self.loader = ViewLoader(
            job.files,
            [(None, job.plan)],
            global_batch=job.batch,
            engine=engine,
            resize=resize,
            device=job.device,
            channels_last=job.device.type == "cuda",  # as the trainer wants them
            workers=job.cores,
        )
        self.epoch = 0
        self.title = f"relssl ({self.loader.engine_name})"
        self.how = f"{job.cores} thread(s); engine {self.loader.engine_name}: {self.loader.engine_reason}"

    def batches(self, num_images: int) -> Iterator[tuple[int, list[Tensor]]]:
        """The last batches of an epoch: as many as wanted, and no work is left running."""
        self.loader.set_position(self.epoch, self.loader.updates_per_epoch - num_images // self.job.batch)
        self.epoch += 1
        for batch in self.loader:
            yield len(batch), list(chain.from_iterable(batch.views.values()))

    def close(self) -> None:
        self.loader.close()


class Crops(Loader):
    """Draw, decode and crop with the loader's engine, and nothing after that.

    On the CPU the crops are done with when the next batch is made, as the loader's are, so memory is used again. On
    an accelerator they are copied there, and batches are made ahead.
    """

    def batches(self, num_images: int) -> Iterator[tuple[int, list[Tensor]]]:
        order = permutation(0, self.epoch, len(self.job.files))[:num_images]
        self.epoch += 1
        every_ids = [order[start : start + self.job.batch] for start in range(0, num_images, self.job.batch)]
        for ids, crops in zip(every_ids, self._made(every_ids), strict=True):
            views = [view.permute(0, 3, 1, 2) for spec in crops for view in spec]
            yield len(ids), [view.to(self.job.device, non_blocking=True) for view in views]

    def _made(self, every_ids: list[np.ndarray]) -> Iterator[list[Tensor]]:
        engine = self.loader.engine
        if self.job.device.type == "cpu" or not engine.ASYNC:
            return map(self._crops, every_ids)
        return run_ahead(self._crops, every_ids)

    def _crops(self, ids: np.ndarray) -> list[Tensor]:
        files = self.job.files
        sides = {"heights": files.heights[ids], "widths": files.widths[ids]}
        params = draw(self.job.plan, seed=0, epoch=self.epoch, index=ids, **sides)
        finish = _done_with if self.job.device.type == "cpu" else None
        crops: list[Tensor] = self.loader.engine.crops(ids, params, _no_replacement, finish)
        return crops


def start_ours(engine: str, job: Job, resize: str = "antialias") -> PeerBase:
    """The loader for complete views, its engine alone for crops."""
    return (Loader if job.measure == "views" else Crops)(job, engine, resize)


def run_ahead(function: Callable[[Any], Any], items: Iterable[Any]) -> Generator[Any, None, None]:
    """`map` by threads that are a few items ahead."""
    threads = ThreadPoolExecutor(_FEEDERS)
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            waiting.append(threads.submit(function, item))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


def _done_with(crops: list[Tensor], start: int, stop: int) -> None:
    """What the loader would do to rows `start` to `stop` is what is left out here."""


def _no_replacement(row: int, error: InputError) -> int:
    raise error
