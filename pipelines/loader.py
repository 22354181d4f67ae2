"""`ViewLoader`: batches of views, in an order and with contents that depend on (seed, epoch, update) alone."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines import beton
from pipelines.batch import ViewBatch, allocate, named_views
from pipelines.colour import colour
from pipelines.crop import on_device
from pipelines.draw import ViewParams, counter_hash, draw
from pipelines.engines import choose_engine, engine_class
from pipelines.errors import ConfigError, InputError, RunError
from pipelines.memory import Recycler
from pipelines.order import batch_sizes, local_positions, permutation
from pipelines.pool import Pool, default_workers
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
        max_unreadable: share of the data set that may be unreadable before the run stops.
        shuffle: False keeps file order and every image (feature extraction); a rank whose share of the last batch is
            empty gets no batch for it.

    `set_position(epoch, update)` is its whole state. Iterating yields the micro-batches from there to the end of
    the epoch, `num_micro` per update. `close()` ends its threads; it is also a context manager.

    Raises:
        ConfigError: batch and data do not fit, or the engine cannot make a view.
        InputError: a data file is refused.
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
    ):
        self.phases = _checked_phases(phases)
        self.global_batch, self.num_micro = global_batch, num_micro
        self.device, self.dtype, self.channels_last = torch.device(device), dtype, channels_last
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.shuffle = shuffle
        self.epoch, self.update = 0, 0
        self._unreadable: set[int] = set()
        self._lock = threading.Lock()
        self._owns_files = isinstance(files, (str, Path, list, tuple))
        self.files = beton.open(files) if self._owns_files else files
        try:
            self._unreadable_limit = math.ceil(max_unreadable * len(self.files))
            self.sizes = batch_sizes(
                len(self.files),
                global_batch,
                drop_last=drop_last,
                shares=world_size * num_micro,
                least_share=2 if shuffle else 0,
            )
            workers = default_workers() if workers is None else workers
            self.engine_name, self.engine_reason = choose_engine(engine, self.files, self.device, workers)
            make_engine = engine_class(self.engine_name)
            for _, plan in self.phases:
                for spec in plan:
                    make_engine.check(spec, resize)
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
        self._feeder = ThreadPoolExecutor(_FEEDERS, thread_name_prefix="relssl-feed") if self.engine.ASYNC else None

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
        epoch = self.epoch
        if self.shuffle:
            order = permutation(self.seed, epoch, len(self.files))
        else:
            order = np.arange(len(self.files), dtype=np.int64)
        jobs = (
            (update, micro)
            for update in range(self.update, len(self.sizes))
            for micro in range(self.num_micro)
            if self.sizes[update] > micro + self.num_micro * self.rank  # this rank's share is not empty
        )
        if self._feeder is None:
            for update, micro in jobs:
                yield self._finish(self._prepare(epoch, order, update, micro))
            return
        waiting: deque[Future] = deque()
        try:
            for update, micro in jobs:
                waiting.append(self._feeder.submit(self._prepare, epoch, order, update, micro))
                if len(waiting) > _AHEAD:
                    yield self._finish(waiting.popleft().result())
            while waiting:
                yield self._finish(waiting.popleft().result())
        finally:
            for job in waiting:  # an abandoned epoch leaves no work behind
                job.cancel()

    def close(self) -> None:
        """End threads and release memory; the loader cannot be used afterwards."""
        if self._feeder is not None:
            self._feeder.shutdown(wait=True, cancel_futures=True)
        self.engine.close()
        self.pool.close()
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
            crops = self.engine.crops(index.copy(), params, replace)
            return _Prepared(plan, index, position, params, crops, None)
        made = self._allocate(plan, len(index))

        def finish(crops: list[Tensor], start: int, stop: int) -> None:
            for spec, view, crop, out in zip(plan, params, crops, made[0], strict=True):
                colour(crop, view, spec, out, start, stop)

        self.engine.crops(index.copy(), params, replace, finish)
        return _Prepared(plan, index, position, params, [], made)

    def _finish(self, prepared: _Prepared) -> ViewBatch:
        """On an accelerator, the colour work; the rest of a batch."""
        plan = prepared.plan
        made = prepared.made
        if made is None:
            made = self._allocate(plan, len(prepared.index))
            for spec, view, crop, out in zip(plan, prepared.params, prepared.crops, made[0], strict=True):
                colour(crop.to(self.device, non_blocking=True), view, spec, out)
        buffers, storage = made
        index, label, position = (
            on_device(np.ascontiguousarray(values, dtype=np.int64), self.device)
            for values in (prepared.index, self.files.labels[prepared.index], prepared.position)
        )
        return ViewBatch(named_views(plan, buffers), index, label, position, storage)

    def _allocate(self, plan: Sequence[ViewSpec], batch: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        return allocate(plan, batch, self.device, self.dtype, channels_last=self.channels_last, memory=self._memory)

    def _draw(self, plan: Sequence[ViewSpec], epoch: int, index: np.ndarray) -> list[ViewParams]:
        heights, widths = self.files.heights[index], self.files.widths[index]
        # An image has the same views in a subset as in the whole data set.
        ids = self.files.ids[index] if isinstance(self.files, Subset) else index
        return draw(plan, seed=self.seed, epoch=epoch, index=ids, heights=heights, widths=widths)

    def _replacement(self, epoch: int, index: int, attempt: int, error: InputError) -> int:
        """Another id for an image that cannot be read, by a hash of (seed, epoch, id, attempt)."""
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
    made: tuple[list[Tensor], dict[str, Tensor]] | None


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
