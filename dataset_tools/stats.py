"""Per-channel mean and standard deviation of a set of images, as the normalisation of a recipe wants them.

Every image counts the same whatever its size, as it does in training, where each gives one crop. For images
of one size this is the usual mean over all pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from pipelines.beton import Beton, BetonSet

SAMPLE = 100_000  # at most so many images are looked at
_LEVELS = np.arange(256) / 255


def moments(pixels: np.ndarray) -> np.ndarray:
    """Mean and mean square of each channel of (H, W, 3) uint8, in units of full scale: (2, 3) float64."""
    counts = np.array(Image.fromarray(pixels).histogram()).reshape(3, 256).T
    share = counts / counts[:, 0].sum()
    return np.stack([_LEVELS @ share, _LEVELS**2 @ share])


@dataclass
class ChannelStats:
    """Running statistics over a stream of unknown length, on every k-th image, k the least power of two that
    keeps within `SAMPLE` images.

    Which images count follows from their number alone: so the result does not depend on the workers.
    """

    sample: int = SAMPLE
    seen: int = 0
    _kept: dict[int, np.ndarray] = field(default_factory=dict)

    def wants(self, index: int) -> bool:
        """Whether image `index` may count in the end."""
        return index % self._stride(index) == 0

    def add(self, index: int, image_moments: np.ndarray) -> None:
        """Take the `moments` of image `index`; indices must grow."""
        if self._stride(index) > self._stride(self.seen):
            self._kept = {i: kept for i, kept in self._kept.items() if i % self._stride(index) == 0}
        self.seen = index
        if self.wants(index):
            self._kept[index] = image_moments

    def summary(self) -> dict[str, Any]:
        """`mean` and `std` (lists of three, full scale = 1, five decimals) and `images`, the size of the
        sample."""
        if not self._kept:
            return {"mean": None, "std": None, "images": 0}
        mean, square = np.mean(list(self._kept.values()), axis=0)
        std = np.sqrt(np.maximum(square - mean**2, 0))
        return {"mean": mean.round(5).tolist(), "std": std.round(5).tolist(), "images": len(self._kept)}

    def _stride(self, index: int) -> int:
        return 1 << max(0, (index // self.sample).bit_length())


def channel_stats(images: Beton | BetonSet, *, sample: int = SAMPLE) -> dict[str, Any]:
    """The `summary` of an open `.beton` file or set."""
    stats = ChannelStats(sample)
    for i in range(len(images)):
        if stats.wants(i):
            stats.add(i, moments(images.decode(i)))
    return stats.summary()
