"""Some images of a data set, in a given order, with the interface of a `BetonSet`; three ways to choose them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.draw import counter_hash
from pipelines.errors import ConfigError, InputError

# Keep the numbers that choose images apart from those of views and orders.
_BALANCED, _SPREAD = 0x62616C61, 0x73707265
_SHOWN = 3


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

    @property
    def names(self) -> list[str] | None:
        """As those of a `BetonSet`."""
        names = self.files.names
        return None if names is None else [names[i] for i in self.ids.tolist()]

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
    """At most `most` images of a data set, spread over it as by `spread_rows`."""
    return files if len(files) <= most else Subset(files, spread_rows(len(files), most))


def spread_rows(total: int, most: int) -> np.ndarray:
    """At most `most` of `total` rows, increasing: one out of each of so many equal stretches.

    Sorted classes stay balanced. Which one of its stretch is always the same, but at random: at even distances, data
    whose classes take turns would lose some of them.
    """
    most = min(total, most)
    begin = np.arange(most + 1, dtype=np.int64) * total // max(most, 1)
    length = np.diff(begin).astype(np.uint64)
    step = counter_hash(0, 0, _SPREAD, np.arange(most, dtype=np.uint64)) % np.maximum(length, 1)
    return begin[:-1] + step.astype(np.int64)


def listed(files: Any, path: Path) -> Subset:
    """The images that a text file names, one per line, as the published 1 % and 10 % lists of ImageNet do.

    A line is the name that an image had when it was converted (`n01440764/n01440764_10026.JPEG`), or the last part of
    it where only one image has that. Empty lines and lines that begin with # are skipped. The images come in the order
    of the file, whatever that of the list.

    Raises:
        InputError: the list cannot be read, is empty, names an image twice, one that is not there, or one of several;
            or the images have no names.
    """
    lines = _read_list(path)
    wanted = dict.fromkeys(lines)
    names = files.names
    where = _place(files)
    if names is None:
        raise InputError(
            f"{path} chooses images by name, but {where} does not say what its images were called: it was converted "
            f"before names were kept, or not by relssl. Convert it again; or convert the list itself, and use that "
            f"file whole: relssl convert {path} SUBSET.beton --root FOLDER"
        )
    whole: dict[str, list[int]] = {name: [] for name in wanted}
    last_part: dict[str, list[int]] = {name: [] for name in wanted}
    for i, name in enumerate(names):
        if name in whole:
            whole[name].append(i)
        if (last := os.path.basename(name)) in last_part:
            last_part[last].append(i)
    places = {name: whole[name] or last_part[name] for name in wanted}
    absent = [name for name, found in places.items() if not found]
    if absent:
        raise InputError(
            f"{path}: {len(absent)} of the {len(wanted)} images that it names are not in {where}: {_some(absent)}. "
            f"Names there look like {names[0]!r}"
        )
    unclear = [name for name, found in places.items() if len(found) > 1]
    if unclear:
        first, second = (names[i] for i in places[unclear[0]][:2])
        what_to_do = f"Write {first}, say, or {second}"
        if first == second:
            what_to_do = "Their whole names are the same, so that no list can tell them apart"
        raise InputError(
            f"{path}: {len(unclear)} of its names could each mean several images in {where}: {_some(unclear)}. "
            f"{what_to_do}"
        )
    twice = [name for name, count in Counter(lines).items() if count > 1]
    if twice:
        raise InputError(f"{path}: {len(twice)} names stand in it more than once: {_some(twice)}")
    ids = np.unique([found[0] for found in places.values()])
    if len(ids) < len(wanted):
        raise InputError(f"{path}: {len(wanted) - len(ids)} images stand in it twice, with their folder and without")
    return Subset(files, ids)


def balanced(files: Any, percent: float, seed: int) -> Any:
    """`percent` of the images of a labelled data set, equally many of each class, drawn by `seed`: `balanced_rows`.

    100 is the whole data set, balanced or not.

    Raises:
        ConfigError, InputError: as `balanced_rows`.
    """
    if percent == 100:
        return files
    return Subset(files, balanced_rows(files.labels, seed, percent=percent, classes=files.classes, where=_place(files)))


def balanced_rows(
    labels: np.ndarray,
    seed: int,
    *,
    per_class: int | None = None,
    percent: float | None = None,
    classes: Sequence[str] | None = None,
    where: str = "the training images",
) -> np.ndarray:
    """Rows of a random draw with equally many images of each class that there is.

    A function of labels and seed. What does not divide among the classes goes to some of them, one image each. A larger
    draw holds the images of a smaller one of the same seed, and all of 100 percent are all, balanced or not.

    Args:
        labels: (N,) whole numbers.
        per_class: images of each class.
        percent: of all images. One of both is given.
        classes: their names, for messages.
        where: what the images are, for messages.

    Returns:
        int64, increasing.

    Raises:
        ConfigError: not one of both, a negative seed, not a percentage, so few images that a class would be without, or
            a class with fewer than `per_class`.
        InputError: images without labels, or a class with fewer images than its share of `percent`.
    """
    if (per_class is None) == (percent is None):
        raise ConfigError("a draw of labels needs either a number for each class or a percentage")
    if seed < 0:
        raise ConfigError(f"the seed of a draw must be 0 or more, got {seed}")
    if percent is not None and not 0 < percent <= 100:
        raise ConfigError(f"a percentage is above 0 and at most 100, got {percent:g}")
    if (labels < 0).any():
        raise InputError(
            f"{where}: {int((labels < 0).sum())} of {len(labels)} images have no label, so a share of each class "
            "cannot be drawn; give labelled data"
        )
    if percent == 100:
        return np.arange(len(labels))
    present, counts = np.unique(labels, return_counts=True)
    shares = _shares(present, counts, seed, per_class, percent)
    if (counts < shares).any():
        least = int(np.argmin(counts))
        name = classes[present[least]] if classes else str(present[least])
        if percent is None:
            raise ConfigError(
                f"{per_class} labels of each class were asked for, but class {name} has {counts[least]} images: take "
                f"at most {counts[least]}"
            )
        raise InputError(
            f"{percent:g} % of {where} in equal parts are {shares.max()} images of each class, but class {name} has "
            f"{counts[least]}. Take a smaller percentage, or choose the images with --subset LIST"
        )
    ranks = counter_hash(seed, 0, _BALANCED, np.arange(len(labels), dtype=np.uint64))
    chosen = []
    for label, share in zip(present, shares, strict=True):
        mine = np.flatnonzero(labels == label)
        chosen.append(mine[np.argsort(ranks[mine], kind="stable")[:share]])
    return np.sort(np.concatenate(chosen))


def _shares(
    present: np.ndarray, counts: np.ndarray, seed: int, per_class: int | None, percent: float | None
) -> np.ndarray:
    """Images of each class."""
    if percent is None:
        assert per_class is not None
        if per_class < 1:
            raise ConfigError(f"a draw takes 1 label of each class or more, got {per_class}")
        return np.full(len(present), per_class)
    images = int(counts.sum())
    total = round(images * percent / 100)
    each, rest = divmod(total, len(present))
    if each == 0:
        raise ConfigError(
            f"{percent:g} % of {images} images are {total}, fewer than the {len(present)} classes: a class would be "
            f"without an image. Take at least {100 * len(present) / images:.3g} %"
        )
    shares = np.full(len(present), each)
    shares[np.argsort(counter_hash(seed, 1, _BALANCED, present.astype(np.uint64)), kind="stable")[:rest]] += 1
    return shares


def _read_list(path: Path) -> list[str]:
    """The names of a list, in its order."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise InputError(f"there is no list {path}; expected a text file with the name of an image per line") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read as a list of images, one name per line: {reason}") from error
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise InputError(f"{path}: the list is empty; expected the name of an image per line")
    return names


def _place(files: Any) -> str:
    paths = getattr(files, "paths", None) or getattr(getattr(files, "files", None), "paths", None) or []
    return " + ".join(str(path) for path in paths) or "the data"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
