"""What of a photograph is its subject: saliency from robust background detection, without any training.

The method follows Zhu, Liang, Wei and Sun, "Saliency Optimization from Robust Background Detection" (CVPR 2014), as far
as it is known here: the paper itself could not be read. The image is cut into superpixels. A region is background when
much of it lies at the image's border for its size (boundary connectivity); it is salient when its colour is far from
that of background nearby; both are reconciled with smoothness between alike neighbours by a least-squares problem with
one unknown per superpixel.

Ours are the weight of the image's middle, most constants, and all that makes a mask of the saliency. The loops are
compiled and release the GIL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from PIL import Image

from pipelines.beton_format import MASK_SIDE

WORKING_SIDE = 160  # pixels of the longer side of what is looked at
SUPERPIXELS = 200
LEAST, MOST = 0.03, 0.90  # a foreground of a smaller or larger share of the image is not believed

_COMPACTNESS = 16.0  # of superpixels: a distance of one superpixel weighs like this distance in CIELAB
_ROUNDS = 6  # of k-means
_GEODESIC_SIGMA = 8.0
_BOUNDARY_SIGMA = 1.0
_SPATIAL_SIGMA = 0.4  # of the image's longer side
_LEAST_CONTRAST, _LEAST_RANGE = 1.0, 0.01  # rounding errors of an image of one colour are not stretched to a subject
_SMOOTH_SIGMA = 10.0
_SMOOTH_LEAST = 0.1  # of neighbours whatever their colours
_BACKGROUND_WEIGHT = 5.0

_CENTRE_SIGMA = 0.6  # of each side: photographs show their subject in the middle rather than at the edge
_THRESHOLD = 0.65  # of Otsu's: rather some background kept than a part of the subject lost
_GAP = 4  # pixels of the mask: parts of the foreground that are twice as near to each other are one
_ISLAND = 0.10  # of the largest part of the foreground: a smaller part goes
_HOLE = 0.25  # of the largest part of the foreground: a smaller hole is filled
_MARGIN = 1  # pixels of the mask around the subject
_SCATTERED = 0.16  # a foreground that is a smaller share of the image, and not in one part, is not believed

# No NaN can arise, and with them in mind a minimum is not vectorised; infinities are meant.
_STRICT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"nnan", "nsz"}}


def _compiled(function: Any) -> Any:
    """numba.njit with a cache on disk where there can be one: a frozen or read-only installation compiles anew."""
    try:
        return numba.njit(cache=True, **_STRICT)(function)
    except RuntimeError:  # "no locator available for file ..."
        return numba.njit(**_STRICT)(function)


@dataclass(frozen=True)
class Saliency:
    """Of one image: `map` (128, 128) float32 in [0, 1] and `mask` (128, 128) bool, both over the image stretched to
    this square; `share` of the mask that is foreground, `believed` whether that is a share that can be (where it is
    not, the mask is foreground everywhere)."""

    map: np.ndarray
    mask: np.ndarray
    share: float
    believed: bool


def saliency(image: np.ndarray | Image.Image) -> Saliency:
    """The subject of an image, (H, W, 3) uint8 RGB or Pillow's, of any size. A JPEG that Pillow has opened and not
    read yet is decoded no larger than needed."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    scale = WORKING_SIDE / max(image.size)
    size = (max(8, round(image.width * scale)), max(8, round(image.height * scale)))
    image.draft("RGB", (2 * size[0], 2 * size[1]))
    small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    regions = Image.fromarray(region_saliency(np.asarray(small)).astype(np.float32))
    values = np.asarray(regions.resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BILINEAR)).clip(0, 1)
    mask, parts = _tidied(values >= _THRESHOLD * otsu(values))
    share = float(mask.mean())
    believed = LEAST <= share <= MOST and not (share < _SCATTERED and parts > 1)
    return Saliency(values, mask if believed else np.ones_like(mask), share, believed)


def otsu(values: np.ndarray) -> float:
    """The threshold that splits values in [0, 1] into two groups with the least variance within them (Otsu 1979)."""
    counts = np.histogram(values, 256, (0, 1))[0].astype(np.float64)
    below, moment = np.cumsum(counts), np.cumsum(counts * (np.arange(256) + 0.5) / 256)
    above = below[-1] - below
    between = np.where((below > 0) & (above > 0), (moment[-1] * below - moment * below[-1]) ** 2, 0)
    return float((between / np.maximum(below * above, 1)).argmax() + 1) / 256


def _tidied(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """A mask without specks, gaps and pinholes, grown by a margin; and the number of its parts."""
    padded = np.pad(mask, _GAP)
    mask = ~_grown(~_grown(padded, _GAP), _GAP)[_GAP:-_GAP, _GAP:-_GAP]
    part, sizes = _parts(mask)
    if len(sizes) == 0:
        return mask, 0
    kept = sizes >= _ISLAND * sizes.max()
    mask = kept[part] & mask
    hole, hole_sizes = _parts(~mask)
    if len(hole_sizes):
        mask = mask | (hole_sizes < _HOLE * sizes.max())[hole]
    return _grown(mask, _MARGIN), int(kept.sum())


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


@_compiled
def _superpixels(lab, wanted):  # type: ignore[no-untyped-def]
    """SLIC (Achanta et al. 2012): k-means over colour and place, each centre looked for near its place only.

    Returns the superpixel of every pixel (H, W), and features (N, 6) of each: mean colour, mean row and column, pixels.
    """
    height, width = lab.shape[:2]
    step = max(np.sqrt(height * width / wanted), 2.0)
    rows, columns = max(int(height / step + 0.5), 1), max(int(width / step + 0.5), 1)
    n = rows * columns
    centre = np.empty((n, 6))
    for i in range(rows):
        for j in range(columns):
            y, x = int((i + 0.5) * height / rows), int((j + 0.5) * width / columns)
            centre[i * columns + j, :3] = lab[y, x]
            centre[i * columns + j, 3], centre[i * columns + j, 4] = y, x
    label, nearest = np.zeros((height, width), np.int64), np.empty((height, width))
    place_weight = (_COMPACTNESS / step) ** 2
    reach = int(step + 0.5)
    for _ in range(_ROUNDS):
        nearest[:] = np.inf
        for k in range(n):
            cy, cx = centre[k, 3], centre[k, 4]
            for y in range(max(int(cy) - reach, 0), min(int(cy) + reach + 1, height)):
                for x in range(max(int(cx) - reach, 0), min(int(cx) + reach + 1, width)):
                    d = ((y - cy) ** 2 + (x - cx) ** 2) * place_weight
                    for c in range(3):
                        d += (lab[y, x, c] - centre[k, c]) ** 2
                    if d < nearest[y, x]:
                        nearest[y, x] = d
                        label[y, x] = k
        total = np.zeros((n, 6))
        for y in range(height):
            for x in range(width):
                k = label[y, x]
                for c in range(3):
                    total[k, c] += lab[y, x, c]
                total[k, 3] += y
                total[k, 4] += x
                total[k, 5] += 1
        for k in range(n):
            if total[k, 5] > 0:
                centre[k, :5] = total[k, :5] / total[k, 5]
            centre[k, 5] = total[k, 5]
    return label, centre


@_compiled
def _neighbours(label, n):  # type: ignore[no-untyped-def]
    """(N, N) bool: superpixels that touch; (N,) pixels of each that lie at the image's border."""
    height, width = label.shape
    touch, border = np.zeros((n, n), np.bool_), np.zeros(n)
    for y in range(height):
        for x in range(width):
            k = label[y, x]
            if y in (0, height - 1) or x in (0, width - 1):
                border[k] += 1
            if x + 1 < width and label[y, x + 1] != k:
                touch[k, label[y, x + 1]] = touch[label[y, x + 1], k] = True
            if y + 1 < height and label[y + 1, x] != k:
                touch[k, label[y + 1, x]] = touch[label[y + 1, x], k] = True
    return touch, border


@_compiled
def _distances(centre):  # type: ignore[no-untyped-def]
    """(N, N) between mean colours."""
    n = len(centre)
    out = np.zeros((n, n))
    for i in range(n):
        for j in range(i):
            d = 0.0
            for c in range(3):
                d += (centre[i, c] - centre[j, c]) ** 2
            out[i, j] = out[j, i] = np.sqrt(d)
    return out


@_compiled
def _geodesics(colour, touch, border):  # type: ignore[no-untyped-def]
    """(N, N) least sum of colour steps on a way over neighbours; regions at the border are all neighbours. Steps as
    small as an average superpixel's smallest one are taken for noise."""
    n = len(colour)
    noise, counted = 0.0, 0
    for i in range(n):
        least = np.inf
        for j in range(n):
            if touch[i, j]:
                least = min(least, colour[i, j])
        if least < np.inf:
            noise += least
            counted += 1
    noise /= max(counted, 1)
    way = np.full((n, n), np.inf)
    for i in range(n):
        way[i, i] = 0.0
        for j in range(n):
            if touch[i, j] or (border[i] > 0 and border[j] > 0):
                way[i, j] = max(colour[i, j] - noise, 0.0)
    for k in range(n):
        for i in range(n):
            first = way[i, k]
            if first < np.inf:
                for j in range(n):
                    way[i, j] = min(way[i, j], first + way[k, j])
    return way


@_compiled
def _solve(matrix, right):  # type: ignore[no-untyped-def]
    """Solution of a symmetric positive definite system, by its Cholesky factor, which replaces the matrix."""
    n = len(right)
    for i in range(n):
        for j in range(i + 1):
            s = matrix[i, j]
            for k in range(j):
                s -= matrix[i, k] * matrix[j, k]
            matrix[i, j] = np.sqrt(s) if i == j else s / matrix[j, j]
    x = right.copy()
    for i in range(n):
        for k in range(i):
            x[i] -= matrix[i, k] * x[k]
        x[i] /= matrix[i, i]
    for i in range(n - 1, -1, -1):
        for k in range(i + 1, n):
            x[i] -= matrix[k, i] * x[k]
        x[i] /= matrix[i, i]
    return x


@_compiled
def _background(way, border):  # type: ignore[no-untyped-def]
    """(N,) in [0, 1] by boundary connectivity: how much of the outline of a region, softly the one that the superpixel
    belongs to, is the image's border."""
    n = len(border)
    out = np.empty(n)
    for i in range(n):
        area, length = 0.0, 0.0
        for j in range(n):
            part = np.exp(-(way[i, j] ** 2) / (2 * _GEODESIC_SIGMA**2))
            area += part
            length += part * (border[j] > 0)
        connectivity = length / np.sqrt(area)
        out[i] = 1 - np.exp(-(connectivity**2) / (2 * _BOUNDARY_SIGMA**2))
    return out


@_compiled
def _contrast(centre, colour, background, height, width):  # type: ignore[no-untyped-def]
    """(N,) in [0, 1]: how far the colour is from that of background nearby, more so in the middle."""
    n, longer = len(background), max(height, width)
    out = np.zeros(n)
    for i in range(n):
        for j in range(n):
            away = ((centre[i, 3] - centre[j, 3]) ** 2 + (centre[i, 4] - centre[j, 4]) ** 2) / longer**2
            out[i] += colour[i, j] * np.exp(-away / (2 * _SPATIAL_SIGMA**2)) * background[j]
        off_y, off_x = centre[i, 3] / height - 0.5, centre[i, 4] / width - 0.5
        out[i] *= np.exp(-(off_y**2 + off_x**2) / (2 * _CENTRE_SIGMA**2))
    return (out - out.min()) / max(out.max() - out.min(), _LEAST_CONTRAST * n)


@_compiled
def _system(colour, touch, border, background, contrast):  # type: ignore[no-untyped-def]
    """(N, N) of the least-squares problem: background is 0, contrast is 1, neighbours and their neighbours, and regions
    at the border, are alike as their colours are."""
    n = len(background)
    matrix = np.zeros((n, n))
    for i in range(n):
        near = touch[i].copy()
        for k in range(n):
            if touch[i, k]:
                near |= touch[k]
        if border[i] > 0:
            near |= border > 0
        matrix[i, i] += _BACKGROUND_WEIGHT * background[i] + contrast[i] + 1e-6
        for j in range(n):
            if near[j] and i != j:
                w = np.exp(-(colour[i, j] ** 2) / (2 * _SMOOTH_SIGMA**2)) + _SMOOTH_LEAST
                matrix[i, i] += w
                matrix[i, j] -= w
    return matrix


@_compiled
def region_saliency(pixels):  # type: ignore[no-untyped-def]
    """Saliency of every pixel (H, W) float64 in [0, 1], equal within a superpixel."""
    label, centre = _superpixels(_lab(pixels), SUPERPIXELS)
    n = len(centre)
    touch, border = _neighbours(label, n)
    colour = _distances(centre)
    background = _background(_geodesics(colour, touch, border), border)
    contrast = _contrast(centre, colour, background, label.shape[0], label.shape[1])
    s = _solve(_system(colour, touch, border, background, contrast), contrast)
    s = (s - s.min()) / max(s.max() - s.min(), _LEAST_RANGE)
    out = np.empty(label.shape)
    for y in range(label.shape[0]):
        for x in range(label.shape[1]):
            out[y, x] = s[label[y, x]]
    return out
