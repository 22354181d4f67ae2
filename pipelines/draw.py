"""Every random number of every view, drawn here and nowhere else.

The generator is counter-based: the number in slot j of a view is a hash of (seed, epoch, sample id, view number, j).
So a view does not depend on batch size, worker count, rank, engine, or on where a run was resumed. The hash is the
finaliser of SplitMix64 applied once per key; it is vectorised over samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.views import ViewSpec

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

# Slots of a view's stream. Ten attempts of four numbers for the box, one for the flip, sixteen for each op:
# adding an op to a plan leaves the box, the flip and the ops before it as they were.
_ATTEMPTS = 10
_FLIP_SLOT = 4 * _ATTEMPTS
_FIRST_OP_SLOT = 64
_SLOTS_PER_OP = 16

JITTER_OPS = ("brightness", "contrast", "saturation", "hue")


@dataclass
class OpParams:
    """One colour operation of a spec, as windows into the `PackedOps` of all of them.

    Attributes:
        name: key of `pipelines.views.OPS`.
        apply: (V, B) bool.
        value: (V, B, 4) float32: jitter's factors as in `JITTER_OPS`; blur's sigma or solarise's threshold in front.
        order: (V, B, 4) uint8: which of `JITTER_OPS` comes first, second, ...
    """

    name: str
    apply: np.ndarray
    value: np.ndarray
    order: np.ndarray


@dataclass
class PackedOps:
    """The operations of a spec in their order: `names`, apply (V, B, O), value (V, B, O, 4), order (V, B, O, 4)."""

    names: tuple[str, ...]
    apply: np.ndarray
    value: np.ndarray
    order: np.ndarray

    def __iter__(self) -> Iterator[OpParams]:
        for i, name in enumerate(self.names):
            yield OpParams(name, self.apply[:, :, i], self.value[:, :, i], self.order[:, :, i])


@dataclass
class ViewParams:
    """What the V = `count` views of one spec look like for each of B images.

    A crop reads `box` (V, B, 4) = top, left, height, width in source pixels, resizes it to `resized` (V, B, 2) and
    keeps the square of `size` pixels at `offset` (V, B, 2); all int32. `flip` (V, B) bool mirrors the result. The
    views of a spec lie in one array because kernels and draw cost least over many at once.
    """

    size: int
    interpolation: str
    box: np.ndarray
    resized: np.ndarray
    offset: np.ndarray
    flip: np.ndarray
    ops: PackedOps

    @property
    def count(self) -> int:
        return self.box.shape[0]

    def replace_row(self, row: int, other: ViewParams) -> None:
        """Overwrite the parameters of image `row` with those of the only image of `other`."""
        for name in ("box", "resized", "offset", "flip"):
            getattr(self, name)[:, row] = getattr(other, name)[:, 0]
        for name in ("apply", "value", "order"):
            getattr(self.ops, name)[:, row] = getattr(other.ops, name)[:, 0]


def draw(
    plan: Sequence[ViewSpec],
    *,
    seed: int,
    epoch: int,
    index: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
) -> list[ViewParams]:
    """Draw the parameters of every view of a plan for a batch of images.

    Args:
        plan: the specs; view numbers count their `count`s in plan order.
        seed, epoch: keys of the draw.
        index: (B,) sample ids.
        heights, widths: (B,) sides of the stored images in pixels.

    Returns:
        One `ViewParams` per spec, in plan order, with the spec's `count` views in it.
    """
    index = np.asarray(index, dtype=np.uint64)
    heights, widths = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    drawn, number = [], 0
    for spec in plan:
        keys = np.array([_key(seed, epoch, n) for n in range(number, number + spec.count)], dtype=np.uint64)
        stream = Stream(_hashed(keys[:, None], index).ravel())
        drawn.append(_draw_views(spec, stream, np.tile(heights, spec.count), np.tile(widths, spec.count)))
        number += spec.count
    return drawn


def counter_hash(seed: int, epoch: int, number: int, index: np.ndarray) -> np.ndarray:
    """uint64 hash of three whole numbers and an array of sample ids (uint64); the shape is that of `index`."""
    return _hashed(np.uint64(_key(seed, epoch, number)), index)


def _key(*parts: int) -> int:
    key = 0
    for part in parts:
        key = _finalise_integer((key ^ (part & _MASK)) + _GOLDEN & _MASK)
    return key


def _hashed(key: np.ndarray | np.uint64, index: np.ndarray) -> np.ndarray:
    return _finalise(_finalise(index + np.uint64(_GOLDEN)) ^ key)


class Stream:
    """Uniform numbers by slot for a batch of keys; any slot can be read at any time."""

    def __init__(self, keys: np.ndarray):
        self.keys = keys

    def uniform(self, slot: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """(B,) float64 in [low, high)."""
        bits = _finalise(self.keys + np.uint64((slot + 1) * _GOLDEN & _MASK))
        return low + (high - low) * ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def below(self, slot: int, limit: np.ndarray) -> np.ndarray:
        """(B,) int64 uniform in 0 .. limit-1."""
        return np.minimum((self.uniform(slot) * limit).astype(np.int64), limit - 1)


def _finalise(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _finalise_integer(z: int) -> int:
    """`_finalise` of one Python integer: without an array's overhead, which counts once per view."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def _draw_views(spec: ViewSpec, stream: Stream, heights: np.ndarray, widths: np.ndarray) -> ViewParams:
    resized = np.full((len(heights), 2), spec.size, dtype=np.int64)
    offset = np.zeros_like(resized)
    box = np.stack([np.zeros_like(heights), np.zeros_like(widths), heights, widths], axis=1)
    if spec.box_kind == "random_resized":
        box = _random_resized(stream, heights, widths, spec.box_options["scale"], spec.box_options["ratio"])
    elif spec.box_kind == "center":
        resized, offset = _resize_then_center(heights, widths, spec.box_options["resize"], spec.size)
    ops = _draw_ops(spec.ops, stream)
    by_view = functools.partial(_by_view, spec.count)
    return ViewParams(
        size=spec.size,
        interpolation=spec.interpolation,
        box=by_view(box.astype(np.int32)),
        resized=by_view(resized.astype(np.int32)),
        offset=by_view(offset.astype(np.int32)),
        flip=by_view(stream.uniform(_FLIP_SLOT) < spec.flip),
        ops=PackedOps(ops.names, by_view(ops.apply), by_view(ops.value), by_view(ops.order)),
    )


def _by_view(count: int, flat: np.ndarray) -> np.ndarray:
    """Split the leading axis V*B into (V, B)."""
    return flat.reshape(count, len(flat) // count, *flat.shape[1:])


def _random_resized(
    stream: Stream,
    heights: np.ndarray,
    widths: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """torchvision's `RandomResizedCrop.get_params`: the first of ten tries that fits, else a central crop."""
    area = (heights * widths).astype(np.float64)
    box = _central_fallback(heights, widths, ratio)
    open_rows = np.arange(len(heights))
    for attempt in range(_ATTEMPTS):
        tried = Stream(stream.keys[open_rows])
        slot = 4 * attempt
        target = area[open_rows] * tried.uniform(slot, *scale)
        aspect = np.exp(tried.uniform(slot + 1, math.log(ratio[0]), math.log(ratio[1])))
        w = np.rint(np.sqrt(target * aspect)).astype(np.int64)
        h = np.rint(np.sqrt(target / aspect)).astype(np.int64)
        high, wide = heights[open_rows], widths[open_rows]
        fits = (w > 0) & (w <= wide) & (h > 0) & (h <= high)
        top = tried.below(slot + 2, np.maximum(high - h + 1, 1))
        left = tried.below(slot + 3, np.maximum(wide - w + 1, 1))
        box[open_rows[fits]] = np.stack([top, left, h, w], axis=1)[fits]
        open_rows = open_rows[~fits]
        if not len(open_rows):
            break
    return box


def _central_fallback(heights: np.ndarray, widths: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """The largest central box whose ratio is allowed; one pixel where none is, as in an image one pixel high."""
    aspect = widths / heights
    w = np.where(aspect > max(ratio), np.maximum(np.rint(heights * max(ratio)), 1), widths).astype(np.int64)
    h = np.where(aspect < min(ratio), np.maximum(np.rint(widths / min(ratio)), 1), heights).astype(np.int64)
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1)


def _resize_then_center(
    heights: np.ndarray, widths: np.ndarray, resize: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's Resize(resize) then CenterCrop(size): the long side is cut down to a whole pixel."""
    short = np.minimum(heights, widths)
    resized = np.stack([heights * resize // short, widths * resize // short], axis=1)
    return resized, np.rint((resized - size) / 2.0).astype(np.int64)


def _draw_ops(ops: Sequence[Sequence[Any]], stream: Stream) -> PackedOps:
    """Leading axis V*B, still flat."""
    n = len(stream.keys)
    packed = PackedOps(
        names=tuple(name for name, _, _ in ops),
        apply=np.zeros((n, len(ops)), dtype=bool),
        value=np.zeros((n, len(ops), 4), dtype=np.float32),
        order=np.zeros((n, len(ops), 4), dtype=np.uint8),
    )
    for i, (name, probability, options) in enumerate(ops):
        slot = _FIRST_OP_SLOT + _SLOTS_PER_OP * i
        packed.apply[:, i] = stream.uniform(slot) < probability
        value = packed.value[:, i]
        if name == "jitter":
            for j, op in enumerate(JITTER_OPS):
                strength = options[op]
                low, high = (-strength, strength) if op == "hue" else (max(0.0, 1.0 - strength), 1.0 + strength)
                value[:, j] = stream.uniform(slot + 1 + j, low, high)
            packed.order[:, i] = np.argsort(np.stack([stream.uniform(slot + 5 + j) for j in range(4)], axis=1), axis=1)
        elif name == "blur":
            value[:, 0] = stream.uniform(slot + 1, *options["sigma"])
        elif name == "solarise":
            value[:, 0] = options["threshold"]
    return packed
