"""Stock FFCV, as its users make several views: one loader per view over one file, each decoding every image again.

Its resize is an area average and it has no flip in the decoder, both in its favour. Three habits of FFCV are dealt
with here: importing and starting it changes the number of threads of torch and numba, an exception in a loader's
thread would leave the consumer waiting for ever, and it takes one file.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import ConfigError, RunError
from pipelines.subset import Subset
from pipelines.views import ViewSpec, expand
from relssl.bench.cores import torch_threads
from relssl.bench.peers import Job, PeerBase, optional_module


class Peer(PeerBase):
    """`RandomResizedCropRGBImageDecoder` and nothing else."""

    title = "stock FFCV"

    def __init__(self, job: Job):
        super().__init__(job)
        file, self.ids = _one_file(job.files)
        with _settings_kept():
            optional_module("ffcv", self.title)
            self.loaders = [self._loader(file, spec) for spec in expand(job.plan)]
        self.how = f"{len(self.loaders)} loaders of {self.workers} threads each, decode and crop, no flip"
        self.passes = 0

    def _loader(self, file: Any, spec: ViewSpec) -> Any:
        import numba
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption

        if spec.box_kind != "random_resized":
            raise ConfigError(f"stock FFCV is not measured: it has no box {spec.box_kind!r} (view {spec.name!r})")
        self.workers = min(self.job.cores, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        options = spec.box_options
        pipelines: dict[str, Any] = dict.fromkeys(file.fields)
        pipelines["image"] = [
            RandomResizedCropRGBImageDecoder((spec.size, spec.size), scale=options["scale"], ratio=options["ratio"])
        ]
        return Loader(
            str(file.path),
            batch_size=self.job.batch,
            num_workers=self.workers,
            order=OrderOption.SEQUENTIAL,  # of ids that we shuffle
            os_cache=True,
            drop_last=False,
            seed=0,
            indices=self.ids,
            pipelines=pipelines,
        )

    def batches(self, num_images: int) -> Iterator[tuple[int, list[Tensor]]]:
        self.passes += 1
        rng = np.random.default_rng(self.passes)
        for loader in self.loaders:
            order = rng.permutation(self.ids)[:num_images]
            loader.traversal_order.indices = loader.first_traversal_order = order
        with _settings_kept(), _failures_end_the_epoch() as failures:
            iterators = [iter(loader) for loader in self.loaders]
            try:
                for batches in zip(*iterators, strict=False):  # a loader that fails ends before the others
                    views = [torch.from_numpy(images).permute(0, 3, 1, 2) for (images,) in batches]
                    yield len(views[0]), [view.to(self.job.device, non_blocking=True) for view in views]
            finally:
                for iterator in iterators:
                    _end(iterator)
        if failures:
            raise RunError(f"stock FFCV failed: {failures[0]}")

    def close(self) -> None:
        with _numba_quiet():
            self.loaders = []
            gc.collect()


def _end(iterator: Any) -> None:
    """Let the thread of an epoch end, wherever it is; FFCV would leave it waiting for a consumer."""
    iterator.close()
    while iterator.is_alive():
        with suppress(Empty):
            iterator.output_queue.get(timeout=0.05)
    iterator.join()


def _one_file(files: Any) -> tuple[Any, np.ndarray]:
    """The file behind a data set, and the ids there."""
    ids = np.arange(len(files), dtype=np.int64)
    while isinstance(files, Subset):
        ids, files = files.ids[ids], files.files
    if len(files.files) != 1:
        raise ConfigError(f"stock FFCV is not measured: it reads one file, and the data set has {len(files.files)}")
    return files.files[0], ids


@contextmanager
def _settings_kept() -> Iterator[None]:
    import numba

    before = numba.get_num_threads()
    with torch_threads(torch.get_num_threads()):
        try:
            yield
        finally:
            numba.set_num_threads(before)


@contextmanager
def _numba_quiet() -> Iterator[None]:
    """numba's finalizer trips over its own table when FFCV's compiled code goes: harmless, but printed."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda problem: None if problem.exc_type is KeyError else before(problem)
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def _failures_end_the_epoch() -> Iterator[list[str]]:
    """An exception in the thread of an FFCV loader ends its epoch; the list gets what was raised."""
    failures: list[str] = []
    before = threading.excepthook

    def note(args: Any) -> None:
        queue = getattr(args.thread, "output_queue", None)
        if queue is None:
            before(args)
            return
        failures.append(f"{args.exc_type.__name__}: {args.exc_value}")
        queue.put(None)

    threading.excepthook = note
    try:
        yield failures
    finally:
        threading.excepthook = before
