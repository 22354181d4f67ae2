"""Masks of what is foreground that any model wrote, as picture files, for `relssl convert --masks`.

`MaskFolder` finds and reads them, `MaskCount` keeps count. An image whose mask cannot be had is foreground as a whole:
nothing of it is ever taken away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pipelines.beton_format import MASK_SIDE
from pipelines.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".gif")
_LISTED = 10_000  # so many images without a mask are listed in the manifest; all are counted
_SHAPE_TOLERANCE = 1 / 8  # of the proportions: models round sides to multiples of 32


class MaskRefused(InputError):
    """A mask that cannot be used; `reason` is the same short phrase for all of its kind."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def whole() -> np.ndarray:
    """The mask of an image that is all foreground."""
    return np.ones((MASK_SIDE, MASK_SIDE), dtype=bool)


@dataclass
class MaskCount:
    """Masks as they are taken: how many, their mean share of foreground, and the images that are foreground as a whole
    for want of a mask, by reason."""

    source: str
    taken: int = 0
    missing: dict[str, list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)  # masks that belong to none of the images
    details: list[list[str]] = field(default_factory=list)
    _foreground: float = 0.0

    @property
    def num_missing(self) -> int:
        return sum(map(len, self.missing.values()))

    @property
    def share(self) -> float | None:
        """Mean share of foreground of the images that have a mask."""
        return self._foreground / self.taken if self.taken else None

    def add(self, key: str, mask: np.ndarray | MaskRefused) -> np.ndarray:
        """Count the mask of an image, or what is wrong with it; the mask to store."""
        if isinstance(mask, np.ndarray):
            self.taken += 1
            self._foreground += float(mask.mean())
            return mask
        self.missing.setdefault(mask.reason, []).append(key)
        if len(self.details) < _LISTED:
            self.details.append([key, str(mask)])
        return whole()

    def about(self) -> dict[str, Any]:
        """The manifest's entry `masks`."""
        return {
            "source": self.source,
            "count": self.taken,
            "foreground": None if self.share is None else round(self.share, 4),
            "all_foreground": {
                "count": self.num_missing,
                "reasons": {reason: len(keys) for reason, keys in sorted(self.missing.items())},
                "inputs": self.details,
            },
            **({"unused": {"count": len(self.unused), "files": self.unused[:_LISTED]}} if self.unused else {}),
        }

    def lines(self, manifest: Path) -> list[str]:
        """The summary for a terminal."""
        share = "" if self.share is None else f", {100 * self.share:.0f} % of them foreground on average"
        lines = [f"  masks: {self.taken:,} from {self.source}{share}"]
        if self.missing:
            lines.append(f"  without a mask, so foreground as a whole: {self.num_missing:,} images")
            for reason, keys in self.missing.items():
                lines.append(f"    {len(keys):,} x {reason}: {some_of(keys)}")
            lines.append(f"    all are listed in {manifest}")
        if self.unused:
            lines.append(f"  masks that belong to none of the images: {len(self.unused):,}: {some_of(self.unused)}")
        return lines


def some_of(names: list[str]) -> str:
    """The first three."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


class MaskFolder:
    """Masks in the files of a folder: that of the image `cat/1.jpg` in `cat/1.png`, or in another format, or in
    `cat/1.jpg.png`; or without the folders of the image, in `1.png`. Of any size, in the proportions of the image or
    square, over the whole of it; its lighter half, 128 or more of 255, is foreground. It belongs to the image as it is
    shown: turned as its EXIF says.

    Threads may share one. Raises InputError when there is no such folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._owner: dict[str, str] = {}  # file: the image that it is the mask of
        if not self.folder.is_dir():
            raise InputError(f"{folder}: expected a folder of masks; it does not exist or is not a folder")

    def __call__(self, key: str, height: int, width: int) -> np.ndarray | MaskRefused:
        """The mask of the image called `key`, of this size as it is shown: (128, 128) bool, or why there is none.
        Raises InputError when the file is another image's already."""
        path = self._find(key)
        if path is None:
            return MaskRefused("no mask file")
        owner = self._owner.setdefault(str(path), key)
        if owner != key:
            one, other = sorted((owner, key))
            raise InputError(
                f"{path}: the mask of {one} and of {other}; expected one for each, as "
                f"{self.folder / PurePosixPath(one).with_suffix('.png')} or {self.folder / (one + '.png')}"
            )
        try:
            return read_mask(path, height, width)
        except MaskRefused as refused:
            return refused

    def unused(self) -> list[str]:
        """Names of the masks in the folder that no image has asked for, sorted."""
        files = (path for path in self.folder.rglob("*") if path.suffix in SUFFIXES and str(path) not in self._owner)
        return sorted(path.relative_to(self.folder).as_posix() for path in files)

    def _find(self, key: str) -> Path | None:
        name = PurePosixPath(key.replace("\\", "/"))
        # Not to be led out of the folder, and to an image instead of its mask, by an absolute path.
        below = [] if name.is_absolute() or ".." in name.parts else [name]
        for place in dict.fromkeys([*below, PurePosixPath(name.name)]):
            for suffix in SUFFIXES:
                for candidate in (place.with_suffix(suffix), place.with_name(place.name + suffix)):
                    path = self.folder / candidate
                    if path.is_file():
                        return path
        return None


def read_mask(path: Path, height: int, width: int) -> np.ndarray:
    """(128, 128) bool of a picture of the mask of an image of this size. Raises MaskRefused when it cannot be read, is
    not of the image's shape, or nothing is foreground."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            half = 1 << 15 if upright.mode.startswith("I") else 128
            samples = np.asarray(upright if upright.mode.startswith("I") else upright.convert("L"))
    except Exception as error:
        raise MaskRefused("mask that cannot be read", f"{path}: {type(error).__name__}: {error}") from error
    rows, columns = samples.shape
    if rows != columns and abs(math.log((columns / rows) / (width / height))) > math.log1p(_SHAPE_TOLERANCE):
        raise MaskRefused(
            "mask of another shape",
            f"{path}: {columns} x {rows} pixels, the image has {width} x {height}; "
            "expected these proportions or a square",
        )
    if not (samples >= half).any():
        raise MaskRefused("mask without foreground", f"{path}: its largest value is {samples.max()}, less than {half}")
    sharp = Image.fromarray(((samples >= half) * 255).astype(np.uint8))
    reduced = np.asarray(sharp.resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BILINEAR)) >= 128
    if not reduced.any():
        raise MaskRefused(
            "mask without foreground", f"{path}: nothing is left of it at {MASK_SIDE} x {MASK_SIDE} pixels"
        )
    return reduced
