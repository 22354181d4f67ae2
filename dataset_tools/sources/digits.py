"""The embedded data set: scikit-learn's handwritten digits, drawn anew in colour, so that nothing is
downloaded.

The 8x8 originals show nothing about representation learning: their raw pixels already separate the classes.
Drawn in random colours, at random places, sizes and slight rotations on a larger canvas, over a coloured
background, they need a representation that ignores all of that, and a randomly initialised network does not
have it.
"""

from __future__ import annotations

import numpy as np

from pipelines.errors import ConfigError

CLASSES = [str(digit) for digit in range(10)]
TRAIN_FRACTION = 0.8
_SPLIT_SEED = 0  # which originals are for training is part of the data set, not a choice of the run
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_CHUNK = 2048  # images drawn at once: bounds the memory at about 100 MB


def source_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The originals of a split: strokes (S, 8, 8) float32 in 0 ... 1, and labels (S,) int64.
    Every stroke reaches 1 somewhere, whatever the pressure of the pen.

    scikit-learn's 1,797 digits, shuffled once with a fixed seed; "train" is the first 80 %, "test" the rest,
    so no original is in both.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"split {split!r}: the digits have the splits 'train' and 'test'")
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(digits.target))
    border = round(TRAIN_FRACTION * len(order))
    chosen = order[:border] if split == "train" else order[border:]
    strokes = digits.images[chosen].astype(np.float32)
    return strokes / strokes.max((1, 2), keepdims=True), digits.target[chosen].astype(np.int64)


def render_digits(
    split: str,
    *,
    renderings: int,
    size: int = 32,
    seed: int = 0,
    scale: tuple[float, float] = (0.45, 0.85),
    rotation: float = 15.0,
    contrast: float = 0.25,
    clutter: float = 0.0,
    noise: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw every original of `split` `renderings` times.

    Returns images (N, size, size, 3) uint8 and labels (N,) int64, N = renderings x originals; image i shows
    original i mod S, so any prefix is balanced. A function of its arguments alone; the same seed draws
    different randomness for the two splits.

    scale: range of the side of a digit's box, as a fraction of `size`; the box lies anywhere on the canvas.
    rotation: greatest angle, in degrees, to either side. contrast: least difference of luma (0 ... 1) between
    the colour of the digit and that of the background. clutter: strength (0 ... 1) of a smooth random colour
    field added to the background, at most half of the contrast at every pixel for clutter = 1, so that the
    digit stays visible. noise: standard deviation (0 ... 1) of the grain added to every pixel.
    """
    _check(renderings=renderings, size=size, scale=scale, contrast=contrast, clutter=clutter, noise=noise)
    strokes, labels = source_digits(split)
    rng = np.random.default_rng([seed, ("train", "test").index(split)])
    which = np.tile(np.arange(len(labels)), renderings)
    images = np.empty((len(which), size, size, 3), np.uint8)
    for start in range(0, len(which), _CHUNK):
        chosen = which[start : start + _CHUNK]
        ink = _place(strokes[chosen], size, scale, rotation, rng)[..., None]
        paper, colour = _colours(len(chosen), contrast, rng)
        canvas = paper[:, None, None] + _clutter(len(chosen), size, 0.5 * contrast * clutter, rng)
        canvas += ink * (colour[:, None, None] - canvas)
        if noise:
            canvas += noise * rng.standard_normal(canvas.shape, dtype=np.float32)
        images[start : start + _CHUNK] = np.clip(canvas * 255 + 0.5, 0, 255)
    return images, labels[which]


def _check(
    *, renderings: int, size: int, scale: tuple[float, float], contrast: float, clutter: float, noise: float
) -> None:
    if renderings < 1 or size < 8:
        raise ConfigError(f"digits: renderings {renderings} and size {size}: expected at least 1 and 8")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ConfigError(f"digits: scale {scale}: expected two fractions in order, such as (0.45, 0.85)")
    if not 0 <= contrast <= 0.5:  # a mid-grey background leaves no more than 0.5 to either side
        raise ConfigError(f"digits: contrast {contrast}: expected 0 to 0.5")
    if not (0 <= clutter <= 1 and 0 <= noise <= 1):
        raise ConfigError(f"digits: clutter {clutter} and noise {noise}: expected 0 to 1")


def _place(
    strokes: np.ndarray, size: int, scale: tuple[float, float], rotation: float, rng: np.random.Generator
) -> np.ndarray:
    """Ink (n, size, size) in 0 ... 1 of the strokes (n, 8, 8), each in its own box, turned about its
    centre."""
    n, cells = len(strokes), strokes.shape[1]
    side = rng.uniform(*scale, n).astype(np.float32) * size
    angle = np.deg2rad(rng.uniform(-rotation, rotation, n)).astype(np.float32)
    centre = side[:, None] / 2 + rng.random((n, 2), np.float32) * (size - side)[:, None]
    grid = np.arange(size, dtype=np.float32) + 0.5
    y, x = grid[None, :, None] - centre[:, 0, None, None], grid[None, None, :] - centre[:, 1, None, None]
    cos, sin, zoom = (value[:, None, None] for value in (np.cos(angle), np.sin(angle), cells / side))
    rows = (cos * y - sin * x) * zoom + cells / 2 - 0.5
    columns = (sin * y + cos * x) * zoom + cells / 2 - 0.5
    return _bilinear(strokes, rows, columns)


def _bilinear(strokes: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Values of the strokes (n, 8, 8) at fractional cells (n, h, w); zero outside."""
    n, cells = len(strokes), strokes.shape[1]
    padded = np.zeros((n, cells + 2, cells + 2), np.float32)
    padded[:, 1:-1, 1:-1] = strokes
    flat = padded.reshape(-1)
    rows, columns = np.clip(rows + 1, 0, cells + 0.999), np.clip(columns + 1, 0, cells + 0.999)
    top, left = rows.astype(np.int32), columns.astype(np.int32)
    down, right = rows - top, columns - left
    corner = np.arange(n, dtype=np.int32)[:, None, None] * (cells + 2) ** 2 + top * (cells + 2) + left
    upper = flat[corner] * (1 - right) + flat[corner + 1] * right
    lower = flat[corner + cells + 2] * (1 - right) + flat[corner + cells + 3] * right
    return upper * (1 - down) + lower * down


def _colours(n: int, contrast: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two colours (n, 3) each, uniform in the RGB cube among the pairs whose luma differs by `contrast` or
    more."""
    paper, ink = np.empty((n, 3), np.float32), np.empty((n, 3), np.float32)
    todo = np.arange(n)
    while len(todo):
        paper[todo], ink[todo] = rng.random((2, len(todo), 3), np.float32)
        todo = todo[np.abs((paper[todo] - ink[todo]) @ _LUMA) < contrast]
    return paper, ink


def _clutter(n: int, size: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth colour field (n, size, size, 3) between -strength and strength: a 5 x 5 grid, interpolated."""
    if not strength:
        return np.zeros((n, size, size, 3), np.float32)
    knots = rng.uniform(-strength, strength, (n, 5, 5, 3)).astype(np.float32)
    position = np.linspace(0, 4, size, dtype=np.float32)
    low = np.minimum(position.astype(int), 3)
    weights = np.zeros((size, 5), np.float32)
    weights[np.arange(size), low] = 1 - (position - low)
    weights[np.arange(size), low + 1] = position - low
    return np.einsum("yi,nijc,xj->nyxc", weights, knots, weights, optimize=True)
