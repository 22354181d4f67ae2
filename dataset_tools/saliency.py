"""What of a photograph is its subject: saliency by minimum barrier distance, without any training.

The barrier distance of a pixel from a part of the image is the least range of values that a way between them must run
through (Strand et al. 2013): small within a thing and across a smooth or noisy background, large across an outline,
however long the way. That of the image's border measures saliency (Zhang et al., "Minimum Barrier Salient Object
Detection at 80 FPS", ICCV 2015); as there, it is found approximately, by a few scans over each channel of CIELAB.

Ours are the sides of the border, each by itself: a subject may touch one of the upper, the left and the right, so the
farthest of them does not count, and subjects stand on the lower one, so it is not asked. Ours, too, are the weight of
the image's middle and all that makes a mask of the saliency, where losing a part of the subject is held to be worse
than keeping some background. The loops are compiled and release the GIL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from PIL import Image

from pipelines.beton_format import MASK_SIDE

WORKING_SIDE = 64  # pixels: the image is stretched to this square
LEAST, MOST = 0.05, 0.90  # a foreground of a smaller or larger share of the image is not believed

_ROUNDS = 2  # of a scan from the upper left and one from the lower right
_CENTRE_SIGMA = 0.45  # of each side: photographs show their subject in the middle rather than at the edge
_OF_MEAN, _OF_OTSU = 0.8, 0.35  # the higher is the threshold: the second where something small stands out far
_LEAST_BARRIER = 10.0  # in CIELAB, the channels' ranges added: an image without a higher one is of one colour
_LEAST_CONTRAST = 1.4  # of the foreground's mean distance to the background's: noise has less, by its middle alone

_GAP = 4  # pixels of the mask: parts of the foreground that are twice as near to each other are one
_ISLAND = 0.10  # of the largest part of the foreground: a smaller part goes
_HOLE = 0.25  # of the largest part of the foreground: a smaller hole is filled
_MARGIN = 1  # pixels of the mask around the subject


def _compiled(function: Any) -> Any:
    """numba.njit with a cache on disk where there can be one: a frozen or read-only installation compiles anew."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # "no locator available for file ..."
        return numba.njit(nogil=True)(function)


@dataclass(frozen=True)
class Saliency:
    """Of one image: `map` (128, 128) float32 in [0, 1] and `mask` (128, 128) bool, both over the image stretched to
    this square; `share` of the mask that is foreground, `believed` whether it can be the subject (where it is not, the
    mask is foreground everywhere)."""

    map: np.ndarray
    mask: np.ndarray
    share: float
    believed: bool


def saliency(image: np.ndarray | Image.Image) -> Saliency:
    """The subject of an image, (H, W, 3) uint8 RGB or Pillow's, of any size. A JPEG that Pillow has opened and not
    read yet is decoded no larger than needed."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.draft("RGB", (2 * WORKING_SIDE, 2 * WORKING_SIDE))
    small = image.convert("RGB").resize((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BILINEAR)
    distance = _enlarged(border_distance(np.asarray(small)))
    weighted = distance * _centre()
    values = weighted / max(weighted.max(), _LEAST_BARRIER)
    mask = _tidied(values >= max(_OF_MEAN * values.mean(), _OF_OTSU * otsu(values)))
    share = float(mask.mean())
    believed = LEAST <= share <= MOST and _stands_out(distance, mask)
    return Saliency(values.astype(np.float32), mask if believed else np.ones_like(mask), share, believed)


def _enlarged(values: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(values.astype(np.float32))
    return np.asarray(picture.resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BILINEAR)).astype(np.float64)


def _centre() -> np.ndarray:
    off = (np.arange(MASK_SIDE) + 0.5) / MASK_SIDE - 0.5
    along = np.exp(-(off**2) / (2 * _CENTRE_SIGMA**2))
    return along[:, None] * along


def _stands_out(distance: np.ndarray, mask: np.ndarray) -> bool:
    """Whether a mask of a part of the image holds what is there, and not the weight of the middle only."""
    return distance.max() >= _LEAST_BARRIER and distance[mask].mean() >= _LEAST_CONTRAST * distance[~mask].mean()


def otsu(values: np.ndarray) -> float:
    """The threshold that splits values in [0, 1] into two groups with the least variance within them (Otsu 1979)."""
    counts = np.histogram(values, 256, (0, 1))[0].astype(np.float64)
    below, moment = np.cumsum(counts), np.cumsum(counts * (np.arange(256) + 0.5) / 256)
    above = below[-1] - below
    between = np.where((below > 0) & (above > 0), (moment[-1] * below - moment * below[-1]) ** 2, 0)
    return float((between / np.maximum(below * above, 1)).argmax() + 1) / 256


def border_distance(pixels: np.ndarray) -> np.ndarray:
    """(H, W) float64: minimum barrier distance of every pixel of an image (H, W, 3) uint8 from its border, the mean of
    those from the two nearest of the upper, the left and the right side; in units of CIELAB, summed over channels."""
    from_sides = _distances(_lab(pixels))
    return (from_sides.sum(0) - from_sides.max(0)) / 2


@_compiled
def _distances(lab):  # type: ignore[no-untyped-def]
    """(3, H, W) barrier distance of every pixel of (H, W, C) from the upper, the left and the right side, summed over
    channels: of the best way that the scans come upon, so never less than the least."""
    height, width, channels = lab.shape
    out = np.zeros((3, height, width))
    for side in range(3):
        for c in range(channels):
            value = lab[:, :, c].copy()
            distance, low, high = np.full((height, width), np.inf), value.copy(), value.copy()
            if side == 0:
                distance[0] = 0.0
            else:
                distance[:, 0 if side == 1 else width - 1] = 0.0
            for _ in range(_ROUNDS):
                _scan(value, distance, low, high)
                _scan(value[::-1, ::-1], distance[::-1, ::-1], low[::-1, ::-1], high[::-1, ::-1])
            out[side] += distance
    return out


@_compiled
def _scan(value, distance, low, high):  # type: ignore[no-untyped-def]
    """From the upper left, give each pixel the way of the neighbour above or before it where that has less of a range:
    its lowest and highest value, in place."""
    for y in range(value.shape[0]):
        for x in range(value.shape[1]):
            for v, u in ((y - 1, x), (y, x - 1)):
                if v >= 0 and u >= 0 and distance[v, u] < np.inf:
                    lowest, highest = min(low[v, u], value[y, x]), max(high[v, u], value[y, x])
                    if highest - lowest < distance[y, x]:
                        distance[y, x], low[y, x], high[y, x] = highest - lowest, lowest, highest


def _tidied(mask: np.ndarray) -> np.ndarray:
    """A mask without specks, gaps and holes, and grown by a margin."""
    if not mask.any():
        return mask
    padded = np.pad(mask, _GAP)
    mask = ~_grown(~_grown(padded, _GAP), _GAP)[_GAP:-_GAP, _GAP:-_GAP]
    part, sizes = _parts(mask)
    largest = sizes.max()
    mask = (sizes >= _ISLAND * largest)[part] & mask
    around = np.pad(~mask, 1, constant_values=True)  # one part, of what reaches the border
    hole, hole_sizes = _parts(around)
    filled = hole_sizes < _HOLE * largest
    filled[hole[0, 0]] = False
    return _grown(mask | (around & filled[hole])[1:-1, 1:-1], _MARGIN)


@_compiled
def _parts(mask):  # type: ignore[no-untyped-def]
    """Number (H, W) of the connected part of every True pixel, over edges, and (P,) pixels of each part."""
    height, width = mask.shape
    part, sizes = np.full((height, width), -1), np.zeros(mask.size, np.int64)
    stack, n = np.empty((mask.size, 2), np.int64), 0
    for y0 in range(height):
        for x0 in range(width):
            if not mask[y0, x0] or part[y0, x0] >= 0:
                continue
            part[y0, x0] = n
            stack[0, 0], stack[0, 1], top = y0, x0, 1
            while top > 0:
                top -= 1
                y, x = stack[top, 0], stack[top, 1]
                sizes[n] += 1
                for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                    if 0 <= v < height and 0 <= u < width and mask[v, u] and part[v, u] < 0:
                        part[v, u] = n
                        stack[top, 0], stack[top, 1] = v, u
                        top += 1
            n += 1
    return part, sizes[:n]


def _grown(mask: np.ndarray, margin: int) -> np.ndarray:
    """True also within `margin` pixels of what is True, along both axes."""
    for axis in (0, 1):
        length = mask.shape[axis]
        padded = np.pad(mask, [(margin, margin) if a == axis else (0, 0) for a in (0, 1)])
        mask = np.logical_or.reduce([padded.take(range(k, k + length), axis) for k in range(2 * margin + 1)])
    return mask


@_compiled
def _lab(pixels):  # type: ignore[no-untyped-def]
    """CIELAB (H, W, 3) float64 of sRGB pixels, white D65."""
    linear = np.empty(256)
    for i in range(256):
        x = i / 255.0
        linear[i] = x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
    out = np.empty(pixels.shape)
    for y in range(pixels.shape[0]):
        for x in range(pixels.shape[1]):
            r, g, b = linear[pixels[y, x, 0]], linear[pixels[y, x, 1]], linear[pixels[y, x, 2]]
            fx = _cube_root((0.4124564 * r + 0.3575761 * g + 0.1804375 * b) / 0.95047)
            fy = _cube_root(0.2126729 * r + 0.7151522 * g + 0.0721750 * b)
            fz = _cube_root((0.0193339 * r + 0.1191920 * g + 0.9503041 * b) / 1.08883)
            out[y, x, 0], out[y, x, 1], out[y, x, 2] = 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)
    return out


@_compiled
def _cube_root(t):  # type: ignore[no-untyped-def]
    return t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116
