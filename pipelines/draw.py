"""Every random number of every view, drawn here and nowhere else.

The generator is counter-based: the number in slot j of a view is a hash of (seed, epoch, sample id, view number, j).
So a view does not depend on batch size, worker count, rank, engine, or on where a run was resumed. The hash is the
finaliser of SplitMix64 applied once per key; it is vectorised over samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.errors import ConfigError
from pipelines.views import ViewSpec

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

# Slots of a view's stream. Ten attempts of four numbers for the box, one for the flip, sixteen for each op:
# adding an op to a plan leaves the box, the flip and the ops before it as they were. `erase`, of ten attempts too,
# may take more than sixteen, as it is the last op.
_ATTEMPTS = 10
_FLIP_SLOT = 4 * _ATTEMPTS
_MASK_SLOT = _FLIP_SLOT + 1
_FIRST_OP_SLOT = 64
_SLOTS_PER_OP = 16

JITTER_OPS = ("brightness", "contrast", "saturation", "hue")
# FixMatch's pool, of which `randaugment` takes some with replacement.
RANDAUGMENT_OPS = (
    "autocontrast", "brightness", "colour", "contrast", "equalize", "identity", "posterize", "rotate", "sharpness",
    "shear_x", "shear_y", "solarise", "translate_x", "translate_y",
)  # fmt: skip
NUM_VALUES = 6  # of the op that needs the most


@dataclass
class OpParams:
    """One colour operation of a spec, as windows into the `PackedOps` of all of them.

    Attributes:
        name: key of `pipelines.views.OPS`.
        apply: (V, B) bool.
        value: (V, B, 6) float32, the first of them: jitter's factors as in `JITTER_OPS`, of which `jitter_byol` adds
            the brightness; blur's sigma and the length of its kernel (0: four sigmas to either side); solarise's
            threshold; affine's matrix as in `inverse_affine`; randaugment's operations as in `randaugment_codes`;
            erase's top, left, height, width and value.
        order: (V, B, 4) uint8: which of `JITTER_OPS` comes first, second, ...
    """

    name: str
    apply: np.ndarray
    value: np.ndarray
    order: np.ndarray


@dataclass
class PackedOps:
    """The operations of a spec in their order: `names`, apply (V, B, O), value (V, B, O, 6), order (V, B, O, 4)."""

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
    keeps the square of `size` pixels at `offset` (V, B, 2); all int32. Where nothing is resized the square may reach
    over the edge of the box, and is black there. `flip` (V, B) bool mirrors the result. Without `antialias` the filter
    of the resize does not grow with a reduction. The views of a spec lie in one array because kernels and draw cost
    least over many at once. `masked` (V, B) bool: the background is taken out; `window` (V, B, 4) float32: where the
    square lies in the image, as shares of its height and width: top, left, bottom, right, with left and right
    exchanged when it is mirrored. Both are None for a spec without masks.
    """

    size: int
    interpolation: str
    antialias: bool
    box: np.ndarray
    resized: np.ndarray
    offset: np.ndarray
    flip: np.ndarray
    ops: PackedOps
    masked: np.ndarray | None = None
    window: np.ndarray | None = None

    @property
    def count(self) -> int:
        return self.box.shape[0]

    def replace_row(self, row: int, other: ViewParams) -> None:
        """Overwrite the parameters of image `row` with those of the only image of `other`."""
        for name in ("box", "resized", "offset", "flip", "masked", "window"):
            if getattr(self, name) is not None:
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

    Raises:
        ConfigError: an image is too small for a view; see `check_sizes`.
    """
    index = np.asarray(index, dtype=np.uint64)
    heights, widths = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    drawn, number = [], 0
    for spec in plan:
        check_sizes(spec, heights, widths, lambda row: f"image {index[row]}")
        keys = np.array([_key(seed, epoch, n) for n in range(number, number + spec.count)], dtype=np.uint64)
        stream = Stream(_hashed(keys[:, None], index).ravel())
        drawn.append(_draw_views(spec, stream, np.tile(heights, spec.count), np.tile(widths, spec.count)))
        number += spec.count
    return drawn


def check_sizes(spec: ViewSpec, heights: np.ndarray, widths: np.ndarray, name: Callable[[int], str]) -> None:
    """Refuse images that are too small to take a view from.

    Args:
        heights, widths: (N,) sides of the images in pixels.
        name: what the message calls an image, given its place in `heights`.

    Raises:
        ConfigError: a padded image is smaller than the square that `pad_crop` takes out of it.
    """
    if spec.box_kind != "pad_crop":
        return
    padding, short = spec.box_options["padding"], np.minimum(heights, widths)
    if (short + 2 * padding >= spec.size).all():
        return
    row = int(short.argmin())
    raise ConfigError(
        f"view {spec.name!r}: box pad_crop takes {spec.size} x {spec.size} pixels out of an image with a border of "
        f"{padding}, but {name(row)} has {heights[row]} x {widths[row]} pixels; set padding to at least "
        f"{-((short[row] - spec.size) // 2)}, or size to at most {short[row] + 2 * padding}"
    )


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

    def below(self, slot: int, limit: np.ndarray | int) -> np.ndarray:
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
    elif spec.box_kind == "byol":
        box = _byol_box(stream, heights, widths, spec.box_options["scale"], spec.box_options["ratio"])
    elif spec.box_kind == "byol_center":
        box = _byol_center(heights, widths, spec.box_options["share"])
    elif spec.box_kind == "center":
        resized, offset = _resize_then_center(heights, widths, spec.box_options["resize"], spec.size)
    elif spec.box_kind == "pad_crop":
        resized, offset = _pad_then_crop(stream, heights, widths, spec.box_options["padding"], spec.size)
    ops = _draw_ops(spec.ops, stream, spec.size)
    by_view = functools.partial(_by_view, spec.count)
    flip = stream.uniform(_FLIP_SLOT) < spec.flip
    masks = {}
    if spec.mask_p > 0:
        masks["masked"] = by_view(stream.uniform(_MASK_SLOT) < spec.mask_p)
        masks["window"] = by_view(_window(box, resized, offset, spec.size, flip, heights, widths))
    return ViewParams(
        size=spec.size,
        interpolation=spec.interpolation,
        antialias=spec.antialias,
        box=by_view(box.astype(np.int32)),
        resized=by_view(resized.astype(np.int32)),
        offset=by_view(offset.astype(np.int32)),
        flip=by_view(flip),
        ops=PackedOps(ops.names, by_view(ops.apply), by_view(ops.value), by_view(ops.order)),
        **masks,
    )


def _window(
    box: np.ndarray,
    resized: np.ndarray,
    offset: np.ndarray,
    size: int,
    flip: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
) -> np.ndarray:
    """`ViewParams.window` (B, 4) of boxes (B, 4) whose square of `size` pixels lies at `offset` (B, 2)."""
    pixel, sides = box[:, 2:] / resized, np.stack([heights, widths], axis=1)
    first, last = (box[:, :2] + offset * pixel) / sides, (box[:, :2] + (offset + size) * pixel) / sides
    first[flip, 1], last[flip, 1] = last[flip, 1], first[flip, 1]
    return np.concatenate([first, last], axis=1).astype(np.float32)


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
    box = _central_fallback(heights, widths, ratio)
    _try_boxes(box, stream, 0, heights, widths, scale, ratio, lambda side, most: (side > 0) & (side <= most))
    return box


def _try_boxes(
    box: np.ndarray,
    stream: Stream,
    slot: int,
    heights: np.ndarray,
    widths: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    fits: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> None:
    """Put the first of ten boxes whose sides fit into `box` (B, 4), where there is one. `scale` is their share of the
    area, `ratio` is width over height, log-uniform."""
    open_rows = np.arange(len(heights))
    for first in range(slot, slot + 4 * _ATTEMPTS, 4):
        tried = Stream(stream.keys[open_rows])
        high, wide = heights[open_rows], widths[open_rows]
        h, w = _random_sides(tried, first, high, wide, scale, ratio)
        found = fits(w, wide) & fits(h, high)
        top = tried.below(first + 2, np.maximum(high - h + 1, 1))
        left = tried.below(first + 3, np.maximum(wide - w + 1, 1))
        box[open_rows[found]] = np.stack([top, left, h, w], axis=1)[found]
        open_rows = open_rows[~found]
        if not len(open_rows):
            break


def _random_sides(
    stream: Stream,
    slot: int,
    heights: np.ndarray,
    widths: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of boxes whose share of the area is uniform and whose ratio, width over height, log-uniform."""
    target = (heights * widths).astype(np.float64) * stream.uniform(slot, *scale)
    aspect = np.exp(stream.uniform(slot + 1, math.log(ratio[0]), math.log(ratio[1])))
    h, w = np.rint(np.sqrt(target / aspect)), np.rint(np.sqrt(target * aspect))
    return h.astype(np.int64), w.astype(np.int64)


def _byol_box(
    stream: Stream, heights: np.ndarray, widths: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """BYOL's crop: one try, whose sides are cut down to the image's, so that extreme boxes have another ratio."""
    h, w = _random_sides(stream, 0, heights, widths, scale, ratio)
    h, w = np.clip(h, 1, heights), np.clip(w, 1, widths)
    return np.stack([stream.below(2, heights - h + 1), stream.below(3, widths - w + 1), h, w], axis=1)


def _byol_center(heights: np.ndarray, widths: np.ndarray, share: float) -> np.ndarray:
    """The square in the middle whose side is a share of the short side. Of an odd rest the larger half is above it and
    to its left."""
    side = np.maximum((share * np.minimum(heights, widths)).astype(np.int64), 1)
    return np.stack([(heights - side + 1) // 2, (widths - side + 1) // 2, side, side], axis=1)


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


def _pad_then_crop(
    stream: Stream, heights: np.ndarray, widths: np.ndarray, padding: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's RandomCrop(size, padding), without making the padded image."""
    resized = np.stack([heights, widths], axis=1)
    room = resized + (2 * padding - size + 1)
    offset = np.stack([stream.below(0, room[:, 0]), stream.below(1, room[:, 1])], axis=1)
    return resized, offset - padding


def _draw_ops(ops: Sequence[Sequence[Any]], stream: Stream, size: int) -> PackedOps:
    """Leading axis V*B, still flat."""
    n = len(stream.keys)
    packed = PackedOps(
        names=tuple(name for name, _, _ in ops),
        apply=np.zeros((n, len(ops)), dtype=bool),
        value=np.zeros((n, len(ops), NUM_VALUES), dtype=np.float32),
        order=np.zeros((n, len(ops), 4), dtype=np.uint8),
    )
    for i, (name, probability, options) in enumerate(ops):
        slot = _FIRST_OP_SLOT + _SLOTS_PER_OP * i
        packed.apply[:, i] = stream.uniform(slot) < probability
        value = packed.value[:, i]
        if name in ("jitter", "jitter_byol"):
            sums = ("hue",) if name == "jitter" else ("hue", "brightness")  # the others are factors
            for j, op in enumerate(JITTER_OPS):
                strength = options[op]
                low, high = (-strength, strength) if op in sums else (max(0.0, 1.0 - strength), 1.0 + strength)
                value[:, j] = stream.uniform(slot + 1 + j, low, high)
            packed.order[:, i] = np.argsort(np.stack([stream.uniform(slot + 5 + j) for j in range(4)], axis=1), axis=1)
        elif name == "blur":
            value[:, 0] = stream.uniform(slot + 1, *options["sigma"])
            value[:, 1] = 0 if options["kernel"] == "torchvision" else 2 * (size // 20) + 1  # a tenth of the side
        elif name == "solarise":
            value[:, 0] = options["threshold"]
        elif name == "randaugment":
            value[:, : options["n"]] = _random_operations(stream, slot + 1, options["n"], options["m"])
        elif name == "affine":
            value[:] = _random_affine(stream, slot + 1, size, options)
        elif name == "erase":
            value[:, :4] = _random_erasing(stream, slot + 1, size, options["scale"], options["ratio"])
            value[:, 4] = options["value"]
    return packed


def _random_operations(stream: Stream, slot: int, n: int, m: int) -> np.ndarray:
    """(B, n) `randaugment_codes`: any operation of the pool, with any level below m, in either direction, and each of
    them applied half of the time. One number decides on all of it."""
    codes = np.zeros((len(stream.keys), n))
    for i in range(n):
        number = stream.below(slot + i, 4 * (m - 1) * len(RANDAUGMENT_OPS))
        number, operation = np.divmod(number, len(RANDAUGMENT_OPS))
        number, level = np.divmod(number, m - 1)
        codes[:, i] = np.where(number % 2, randaugment_codes(operation, level + 1, number // 2), 0)
    return codes


def randaugment_codes(operation: np.ndarray, level: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """An operation of RandAugment as one number, which float32 holds: 10 (place in `RANDAUGMENT_OPS` + 1) + level, the
    level in 1 ... 9; below zero where it turns, shears or shifts in the negative direction. Zero is no operation."""
    return (10 * (operation + 1) + level) * np.where(negative, -1, 1)


def _random_affine(stream: Stream, slot: int, size: int, options: Mapping[str, Any]) -> np.ndarray:
    """torchvision's `RandomAffine.get_params` for a square image, as `inverse_affine`."""
    x, y = (size * share for share in options["translate"])
    return inverse_affine(
        angle=stream.uniform(slot, *options["degrees"]),
        translate_x=np.rint(stream.uniform(slot + 1, -x, x)),
        translate_y=np.rint(stream.uniform(slot + 2, -y, y)),
        scale=stream.uniform(slot + 3, *options["scale"]),
        shear_x=stream.uniform(slot + 4, *options["shear"][:2]),
        shear_y=stream.uniform(slot + 5, *options["shear"][2:]),
    )


def inverse_affine(
    *,
    angle: np.ndarray | float = 0.0,
    translate_x: np.ndarray | float = 0.0,
    translate_y: np.ndarray | float = 0.0,
    scale: np.ndarray | float = 1.0,
    shear_x: np.ndarray | float = 0.0,
    shear_y: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Where the pixels of a transformed image come from, as an affine map about the image's centre.

    Conventions are those of torchvision's `affine`: an image is sheared along x, then along y, enlarged, turned
    clockwise and shifted.

    Args:
        angle, shear_x, shear_y: degrees. translate_x, translate_y: pixels. Arrays (B,), or numbers for all.

    Returns:
        (B, 6) float64 of a, b, c, d, e, f: the pixel whose centre lies at (x, y) from the middle of the result comes
        from (a x + b y + c, d x + e y + f) from the middle of the image.
    """
    turn, shear_x, shear_y = np.radians(angle), np.radians(shear_x), np.radians(shear_y)
    cos, sin = np.cos(turn - shear_y) / np.cos(shear_y), np.sin(turn - shear_y) / np.cos(shear_y)
    a = (np.cos(turn) - sin * np.tan(shear_x)) / scale
    b = (np.sin(turn) + cos * np.tan(shear_x)) / scale
    d, e = -sin / scale, cos / scale
    c, f = -(a * translate_x + b * translate_y), -(d * translate_x + e * translate_y)
    return np.stack(np.broadcast_arrays(a, b, c, d, e, f), axis=-1)


def _random_erasing(
    stream: Stream, slot: int, size: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """torchvision's `RandomErasing.get_params` for a square image: (B, 4) top, left, height, width. A box is smaller
    than the image on either axis, and empty where ten tries gave none. Ratios are height over width."""
    sides = np.full(len(stream.keys), size)
    box = np.zeros((len(sides), 4), dtype=np.int64)
    _try_boxes(box, stream, slot, sides, sides, scale, (1 / ratio[1], 1 / ratio[0]), np.less)
    return box
