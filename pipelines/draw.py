"""Every random number of every view, drawn here and nowhere else.

The generator is counter-based: the number in slot j of a view is a hash of (seed, epoch, sample id, view number, j).
So a view does not depend on batch size, worker count, rank, engine, or on where a run was resumed. The hash is the
finaliser of SplitMix64 applied once per key; it is vectorised over samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipelines.views import ViewSpec, expand

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
    """One colour operation for a batch. `apply` (B,) bool; `values` name -> array with leading axis B."""

    name: str
    apply: np.ndarray
    values: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class ViewParams:
    """What one view of each image of a batch looks like.

    The crop reads `box` (B, 4) = top, left, height, width in source pixels, resizes it to `resized` (B, 2) and keeps
    the square of `size` pixels at `offset` (B, 2); all int32. `flip` (B,) bool mirrors the result.
    """

    size: int
    interpolation: str
    box: np.ndarray
    resized: np.ndarray
    offset: np.ndarray
    flip: np.ndarray
    ops: list[OpParams]

    def replace_row(self, row: int, other: ViewParams) -> None:
        """Overwrite the parameters of image `row` with those of the only image of `other`."""
        for name in ("box", "resized", "offset", "flip"):
            getattr(self, name)[row] = getattr(other, name)[0]
        for mine, theirs in zip(self.ops, other.ops, strict=True):
            mine.apply[row] = theirs.apply[0]
            for key, value in mine.values.items():
                value[row] = theirs.values[key][0]


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
        One `ViewParams` per view, in plan order.
    """
    index = np.asarray(index, dtype=np.uint64)
    heights, widths = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    return [
        _draw_view(spec, Stream(counter_hash(seed, epoch, number, index)), heights, widths)
        for number, spec in enumerate(expand(plan))
    ]


def counter_hash(seed: int, epoch: int, number: int, index: np.ndarray) -> np.ndarray:
    """uint64 hash of three whole numbers and an array of sample ids (uint64); the shape is that of `index`."""
    key = 0
    for part in (seed, epoch, number):
        key = int(_finalise(np.array([(key ^ (part & _MASK)) + _GOLDEN & _MASK], dtype=np.uint64))[0])
    with np.errstate(over="ignore"):
        return _finalise(_finalise(index + np.uint64(_GOLDEN)) ^ np.uint64(key))


class Stream:
    """Uniform numbers by slot for a batch of keys; any slot can be read at any time."""

    def __init__(self, keys: np.ndarray):
        self.keys = keys

    def uniform(self, slot: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """(B,) float64 in [low, high)."""
        with np.errstate(over="ignore"):
            bits = _finalise(self.keys + np.uint64((slot + 1) * _GOLDEN & _MASK))
        return low + (high - low) * ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def below(self, slot: int, limit: np.ndarray) -> np.ndarray:
        """(B,) int64 uniform in 0 .. limit-1."""
        return np.minimum((self.uniform(slot) * limit).astype(np.int64), limit - 1)


def _finalise(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _draw_view(spec: ViewSpec, stream: Stream, heights: np.ndarray, widths: np.ndarray) -> ViewParams:
    resized = np.full((len(heights), 2), spec.size, dtype=np.int64)
    offset = np.zeros_like(resized)
    box = np.stack([np.zeros_like(heights), np.zeros_like(widths), heights, widths], axis=1)
    if spec.box_kind == "random_resized":
        box = _random_resized(stream, heights, widths, spec.box_options["scale"], spec.box_options["ratio"])
    elif spec.box_kind == "center":
        resized, offset = _resize_then_center(heights, widths, spec.box_options["resize"], spec.size)
    return ViewParams(
        size=spec.size,
        interpolation=spec.interpolation,
        box=box.astype(np.int32),
        resized=resized.astype(np.int32),
        offset=offset.astype(np.int32),
        flip=stream.uniform(_FLIP_SLOT) < spec.flip,
        ops=[
            _draw_op(name, p, options, stream, _FIRST_OP_SLOT + _SLOTS_PER_OP * i)
            for i, (name, p, options) in enumerate(spec.ops)
        ],
    )


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
    aspect = widths / heights
    w = np.where(aspect > max(ratio), np.rint(heights * max(ratio)), widths).astype(np.int64)
    h = np.where(aspect < min(ratio), np.rint(widths / min(ratio)), heights).astype(np.int64)
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1)


def _resize_then_center(
    heights: np.ndarray, widths: np.ndarray, resize: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's Resize(resize) then CenterCrop(size): the long side is cut down to a whole pixel."""
    short = np.minimum(heights, widths)
    resized = np.stack([heights * resize // short, widths * resize // short], axis=1)
    return resized, np.rint((resized - size) / 2.0).astype(np.int64)


def _draw_op(name: str, probability: float, options: dict, stream: Stream, slot: int) -> OpParams:
    apply = stream.uniform(slot) < probability
    if name == "jitter":
        factors = []
        for i, op in enumerate(JITTER_OPS):
            strength = options[op]
            low, high = (-strength, strength) if op == "hue" else (max(0.0, 1.0 - strength), 1.0 + strength)
            factors.append(stream.uniform(slot + 1 + i, low, high))
        order = np.argsort(np.stack([stream.uniform(slot + 5 + i) for i in range(4)], axis=1), axis=1)
        values: dict[str, np.ndarray] = {
            "factors": np.stack(factors, axis=1).astype(np.float32),
            "order": order.astype(np.int64),
        }
        return OpParams(name, apply, values)
    if name == "blur":
        return OpParams(name, apply, {"sigma": stream.uniform(slot + 1, *options["sigma"]).astype(np.float32)})
    if name == "solarise":
        return OpParams(name, apply, {"threshold": np.full(len(apply), options["threshold"], dtype=np.float32)})
    return OpParams(name, apply)
