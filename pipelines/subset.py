"""Some images of a data set, in a given order, with the interface of a `BetonSet`."""

from __future__ import annotations

from typing import Any

import numpy as np


class Subset:
    """Rows `ids` of an open data set; sample id i here is `ids[i]` there. Closing it leaves the data set open."""

    def __init__(self, files: Any, ids: np.ndarray):
        ids = np.asarray(ids, dtype=np.int64)
        if isinstance(files, Subset):  # ids are always those of the whole data set: they are what views are drawn by
            files, ids = files.files, files.ids[ids]
        self.files: Any = files
        self.ids = ids
        self.labels = files.labels[self.ids]
        self.heights, self.widths = files.heights[self.ids], files.widths[self.ids]
        self.is_jpeg = files.is_jpeg[self.ids]
        self.classes, self.has_masks = files.classes, files.has_masks

    def __len__(self) -> int:
        return len(self.ids)

    def payload(self, index: int) -> np.ndarray:
        return self.files.payload(int(self.ids[index]))

    def decode(self, index: int) -> np.ndarray:
        return self.files.decode(int(self.ids[index]))

    def packed_mask(self, index: int) -> np.ndarray:
        return self.files.packed_mask(int(self.ids[index]))

    def mask(self, index: int) -> np.ndarray:
        return self.files.mask(int(self.ids[index]))

    def locate(self, index: int) -> tuple[Any, int]:
        """The file that holds a sample, and the sample's id there."""
        return self.files.locate(int(self.ids[index]))


def spread(files: Any, most: int) -> Any:
    """At most `most` images of a data set, evenly spaced over the file, so sorted classes stay balanced."""
    if len(files) <= most:
        return files
    return Subset(files, np.arange(most, dtype=np.int64) * len(files) // most)
