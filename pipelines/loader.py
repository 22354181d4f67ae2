"""`ViewLoader`: batches of views, in an order and with contents that depend on (seed, epoch, update) alone."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines import beton
from pipelines.batch import ViewBatch, allocate, named_views
from pipelines.beton_format import MASK_BYTES
from pipelines.colour import colour
from pipelines.crop import on_device
from pipelines.draw import ViewParams, check_sizes, counter_hash, draw
from pipelines.engines import choose_engine, engine_class
from pipelines.engines.decode import place
from pipelines.errors import ConfigError, InputError, RelsslError, RunError
from pipelines.machine import default_workers
from pipelines.memory import Recycler
from pipelines.order import batch_sizes, local_positions, permutation
from pipelines.pool import Job, Pool, Threads
from pipelines.subset import Subset
from pipelines.views import ViewSpec

log = logging.getLogger("relssl.loader")

_REPLACEMENT = 0x7265706C  # keeps the numbers that choose a replacement apart from the views' numbers
_AHEAD = 3  # batches in the making while one is used
_FEEDERS = 2  # while the threads of the pool finish one batch, the next is drawn and begun

Phase = tuple[int | None, Sequence[ViewSpec]]


class ViewLoader:
    """Micro-batches of views for one rank.

    Args:
        files: a `.beton` path, several, or an open `BetonSet`.
        phases: `(until_epoch, plan)` pairs: the plan holds for epochs below `until_epoch`; the last has None.
        global_batch: images per update over all ranks and micro-batches.
        num_micro: micro-batches per update (gradient accumulation).
        engine: `auto`, or one of `pipelines.engines.ENGINES`.
        resize: `antialias`, or `area` for the ffcv engine.
        device: where the views are wanted.
        seed, rank, world_size: keys of order and draw; the views of a sample do not depend on the last two.
        drop_last: leave out the last, smaller global batch of an epoch.
        dtype: of the views.
        channels_last: memory order of the views; planes when False.
        workers: threads for decoding, crops and colour; when None, this process's share of the
            cores it may use.
        max_unreadable: share of the data set that may be unreadable before the run stops; with 0 the first image that
            cannot be read is an InputError.
        shuffle: False keeps file order and every image (feature extraction); a rank whose share of the last batch is
            empty gets no batch for it.

    `set_position(epoch, update)` is its whole state. Iterating yields the micro-batches from there to the end of
    the epoch, `num_micro` per update; several iterators may be in use at once, and each may be left at any time.
    `close()` ends its threads, at once and whatever they are doing; it is also a context manager.

    Raises:
        ConfigError: batch and data do not fit, the engine cannot make a view, an image is too small for one, or views
            are to be masked and the data has no masks.
        InputError: a data file is refused; while iterating, an image cannot be read where none may be unreadable.
        RunError: while iterating: too many images are unreadable; the views of an image could not be made for a
            reason nobody expected, which is the cause; the loader is closed, or was made by another process.
    """

    def __init__(
        self,
        files: Any,
        phases: Sequence[Phase],
        *,
        global_batch: int,
        num_micro: int = 1,
        engine: str = "auto",
        resize: str = "antialias",
        device: torch.device | str = "cpu",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        workers: int | None = None,
        max_unreadable: float = 0.01,
        shuffle: bool = True,
        least_share: int | None = None,
    ):
        self.phases = _checked_phases(phases)
        self.global_batch, self.num_micro = global_batch, num_micro
        self.device, self.dtype, self.channels_last = _numbered(torch.device(device)), dtype, channels_last
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.shuffle = shuffle
        self.epoch, self.update = 0, 0
        self._unreadable: set[int] = set()
        self._unmasked: set[int] = set()
        self._lock = threading.Lock()
        self._process, self._closed = os.getpid(), False
        self._owns_files = isinstance(files, (str, Path, list, tuple))
        self.files = beton.open(files) if self._owns_files else files
        try:
            # One at least has to be readable, or the search for a replacement would not end.
            self._tolerant = max_unreadable > 0
            self._unreadable_limit = min(math.ceil(max_unreadable * len(self.files)), len(self.files) - 1)
            self.sizes = batch_sizes(
                len(self.files),
                global_batch,
                drop_last=drop_last,
                shares=world_size * num_micro,
                least_share=(2 if shuffle else 0) if least_share is None else least_share,
            )
            workers = default_workers() if workers is None else workers
            self.engine_name, self.engine_reason = choose_engine(engine, self.files, self.device, workers)
            make_engine = engine_class(self.engine_name)
            for _, plan in self.phases:
                for spec in plan:
                    make_engine.check(spec, resize)
                    _check_masks(spec, self.files)
                    check_sizes(spec, self.files.heights, self.files.widths, lambda i: place(self.files, i))
            self.pool = Pool(workers)
            try:
                self.engine = make_engine(self.files, device=self.device, pool=self.pool, resize=resize)
            except BaseException:
                self.pool.close()
                raise
        except BaseException:
            if self._owns_files:
                self.files.close()
            raise
        self._memory = Recycler()
        self._feeder = Threads(_FEEDERS, "relssl-feed") if self.engine.ASYNC else None

    @property
    def updates_per_epoch(self) -> int:
        return len(self.sizes)

    @property
    def num_unreadable(self) -> int:
        """Distinct images of this rank that could not be decoded so far."""
        return len(self._unreadable)

    def plan_of(self, epoch: int) -> Sequence[ViewSpec]:
        """The plan in force during an epoch."""
        return next(plan for until, plan in self.phases if until is None or epoch < until)

    def set_position(self, epoch: int, update: int = 0) -> None:
        """Continue with update `update` of epoch `epoch`, both counted from zero."""
        if epoch < 0 or not 0 <= update <= self.updates_per_epoch:
            raise ValueError(f"no update {update} in epoch {epoch}: an epoch has {self.updates_per_epoch} updates")
        self.epoch, self.update = epoch, update

    def __iter__(self) -> Iterator[ViewBatch]:
        self._check_usable()
        return self._batches(self.epoch, self.update)

    def _batches(self, epoch: int, update: int) -> Iterator[ViewBatch]:
        if self.shuffle:
            order = permutation(self.seed, epoch, len(self.files))
        else:
            order = np.arange(len(self.files), dtype=np.int64)
        jobs = (
            (update, micro)
            for update in range(update, len(self.sizes))
            for micro in range(self.num_micro)
            if self.sizes[update] > micro + self.num_micro * self.rank  # this rank's share is not empty
        )
        if self._feeder is None:
            for update, micro in jobs:
                self._check_usable()
                yield self._finish(self._prepare(epoch, order, update, micro))
            return
        waiting: deque[Job] = deque()
        try:
            for update, micro in jobs:
                self._check_usable()
                waiting.append(self._feeder.submit(partial(self._prepare, epoch, order, update, micro)))
                if len(waiting) > _AHEAD:
                    yield self._finish(self._result(waiting.popleft()))
            while waiting:
                yield self._finish(self._result(waiting.popleft()))
        finally:
            for job in waiting:  # an abandoned epoch leaves no work behind
                job.cancel()

    def _result(self, job: Job) -> _Prepared:
        self._check_usable()
        job.wait()
        if self._closed:  # in another thread
            raise _closed()
        return job.result()

    def _check_usable(self) -> None:
        if self._closed:
            raise _closed()
        if os.getpid() != self._process:  # to wait for threads that are not there would be to wait forever
            raise RunError(
                f"this loader was made by process {self._process} and its threads are there, not in process "
                f"{os.getpid()}, which was forked from it; open a loader in the process that uses it"
            )

    def close(self) -> None:
        """End threads and release memory; the loader cannot be used afterwards. What was being made is dropped."""
        self._closed = True
        if os.getpid() != self._process:  # a copy without the threads that the parts of it would wait for
            return
        self.pool.close()  # first: a batch in the making ends with the images that are in work
        if self._feeder is not None:
            self._feeder.close()
        self.engine.close()
        self._memory.clear()
        if self._owns_files:
            self.files.close()

    def __enter__(self) -> ViewLoader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _prepare(self, epoch: int, order: np.ndarray, update: int, micro: int) -> _Prepared:
        """What may run ahead of the consumer: all of it on the CPU, up to the colour work on an accelerator."""
        start = update * self.global_batch
        images = order[start : start + self.sizes[update]]
        position = local_positions(
            len(images), micro=micro, num_micro=self.num_micro, rank=self.rank, world_size=self.world_size
        )
        index = images[position]
        plan = self.plan_of(epoch)
        params = self._draw(plan, epoch, index)

        attempts: dict[int, int] = {}

        def replace(row: int, error: InputError) -> int:
            attempts[row] = attempts.get(row, 0) + 1
            index[row] = self._replacement(epoch, int(index[row]), attempts[row], error)
            for mine, other in zip(params, self._draw(plan, epoch, index[row : row + 1]), strict=True):
                mine.replace_row(row, other)
            return int(index[row])

        if self.device.type != "cpu":
            with self._naming(index):
                crops = self.engine.crops(index.copy(), params, replace)
                masks = self._masks(index, params, 0, len(index))
            return _Prepared(plan, index, position, params, crops, masks, None)
        made = self._allocate(plan, len(index))

        def finish(crops: list[Tensor], start: int, stop: int) -> None:
            with self._naming(index[start:stop]):
                masks = self._masks(index, params, start, stop)
                for spec, view, crop, out in zip(plan, params, crops, made[0], strict=True):
                    colour(crop, view, spec, out, start, stop, masks)

        with self._naming(index):
            self.engine.crops(index.copy(), params, replace, finish)
        return _Prepared(plan, index, position, params, [], None, made)

    def _finish(self, prepared: _Prepared) -> ViewBatch:
        """On an accelerator, the colour work; the rest of a batch."""
        plan = prepared.plan
        made = prepared.made
        if made is None:
            made = self._allocate(plan, len(prepared.index))
            for spec, view, crop, out in zip(plan, prepared.params, prepared.crops, made[0], strict=True):
                crop = crop.to(self.device, non_blocking=True)
                if crop.is_cuda:  # an engine may have made it on a stream of its own
                    crop.record_stream(torch.cuda.current_stream(self.device))
                colour(crop, view, spec, out, masks=prepared.masks)
        buffers, storage = made
        index, label, position = (
            on_device(np.ascontiguousarray(values, dtype=np.int64), self.device)
            for values in (prepared.index, self.files.labels[prepared.index], prepared.position)
        )
        return ViewBatch(named_views(plan, buffers), index, label, position, storage)

    @contextmanager
    def _naming(self, index: np.ndarray) -> Iterator[None]:
        """Turn an error that nobody expected into a RunError that says which images were in work."""
        try:
            yield
        except RelsslError:
            raise
        except Exception as error:
            others = f" or one of the {len(index) - 1} images after it in the batch" if len(index) > 1 else ""
            reason = f"{type(error).__name__}: {error}"
            raise RunError(f"{place(self.files, int(index[0]))}{others}: {reason}") from error

    def _masks(self, index: np.ndarray, params: list[ViewParams], start: int, stop: int) -> np.ndarray | None:
        """(stop - start, 2048) uint8 masks of some rows of a batch; None when no view of them is masked."""
        chosen = [view.masked[:, start:stop].any(0) for view in params if view.masked is not None]
        rows = np.flatnonzero(np.logical_or.reduce(chosen)) if chosen else ()
        if not len(rows):
            return None
        masks = np.empty((stop - start, MASK_BYTES), np.uint8)
        for row in rows:
            masks[row] = self._mask(int(index[start + row]))
        return masks

    def _mask(self, index: int) -> np.ndarray:
        """The mask of a sample; one that cannot be read takes nothing away from the image."""
        try:
            return self.files.packed_mask(index)
        except InputError as error:
            with self._lock:
                new = index not in self._unmasked
                self._unmasked.add(index)
                count = len(self._unmasked)
            if new:
                log.warning("image %d is not masked: %s", index, error)
            if count > self._unreadable_limit:
                raise RunError(
                    f"{count} of {len(self.files)} masks could not be read, and at most {self._unreadable_limit} may "
                    f"be; run `relssl verify` on the data. The last one: {error}"
                ) from error
            return np.full(MASK_BYTES, 255, np.uint8)

    def _allocate(self, plan: Sequence[ViewSpec], batch: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        return allocate(plan, batch, self.device, self.dtype, channels_last=self.channels_last, memory=self._memory)

    def _draw(self, plan: Sequence[ViewSpec], epoch: int, index: np.ndarray) -> list[ViewParams]:
        heights, widths = self.files.heights[index], self.files.widths[index]
        # An image has the same views in a subset as in the whole data set.
        ids = self.files.ids[index] if isinstance(self.files, Subset) else index
        return draw(plan, seed=self.seed, epoch=epoch, index=ids, heights=heights, widths=widths)

    def _replacement(self, epoch: int, index: int, attempt: int, error: InputError) -> int:
        """Another id for an image that cannot be read, by a hash of (seed, epoch, id, attempt)."""
        if not self._tolerant:
            names = self.files.names
            called = "" if names is None else f" ({names[index]})"
            raise InputError(
                f"{error}{called}. No image may be left out here: run `relssl verify` on the data, and convert it again"
            ) from error
        key = np.array([index], dtype=np.uint64)
        other = int(counter_hash(self.seed, epoch, _REPLACEMENT + attempt, key)[0])
        other %= len(self.files)
        if other == index:
            other = (index + 1) % len(self.files)
        with self._lock:
            new = index not in self._unreadable
            self._unreadable.add(index)
            count = len(self._unreadable)
        if new:
            log.warning("image %d is replaced by image %d: %s", index, other, error)
        if count > self._unreadable_limit:
            raise RunError(
                f"{count} of {len(self.files)} images could not be read, and at most {self._unreadable_limit} may be; "
                f"run `relssl verify` on the data. The last one: {error}"
            )
        return other


@dataclass
class _Prepared:
    """A batch between the threads that run ahead and the consumer's."""

    plan: Sequence[ViewSpec]
    index: np.ndarray
    position: np.ndarray
    params: list[ViewParams]
    crops: list[Tensor]
    masks: np.ndarray | None
    made: tuple[list[Tensor], dict[str, Tensor]] | None


def _closed() -> RunError:
    return RunError("the loader is closed; open another one, or close it later")


def _check_masks(spec: ViewSpec, files: Any) -> None:
    """Raises ConfigError when a view is to be masked and the data has no masks."""
    if spec.mask_p == 0 or files.has_masks:
        return
    without = [str(file.path) for file in (files.files.files if isinstance(files, Subset) else files.files)
               if not file.has_masks]  # fmt: skip
    raise ConfigError(
        f"view {spec.name!r}: mask_p is {spec.mask_p}, but {', '.join(without)} has no masks; make masks with "
        f"{beton.HOW_TO_MASK}, or set mask_p: 0"
    )


def _numbered(device: torch.device) -> torch.device:
    """`cuda` as the device that it means in this thread: threads of the loader may have another current one."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def _checked_phases(phases: Sequence[Phase]) -> list[Phase]:
    if not phases:
        raise ConfigError("a loader needs at least one phase: [(None, [ViewSpec, ...])]")
    ends = [until for until, _ in phases]
    if ends[-1] is not None or any(end is None for end in ends[:-1]):
        raise ConfigError(f"the last phase, and only the last, has no until_epoch; got {ends}")
    bounds = [end for end in ends if end is not None]
    if any(b <= a for a, b in zip([0, *bounds], bounds, strict=False)):
        raise ConfigError(f"until_epoch of phases must be positive and increase, got {bounds}")
    if any(not plan for _, plan in phases):
        raise ConfigError("a phase has no views")
    return list(phases)
