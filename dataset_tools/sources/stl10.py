"""STL-10 as published: binary files of pixels in a folder or a `.tar.gz` archive, read as a stream.

`train_X.bin`, `test_X.bin` and `unlabeled_X.bin` hold images one after another, each 3 x 96 x 96 bytes: the planes R, G
and B, every one column by column. `train_y.bin` and `test_y.bin` hold a byte per image, 1 ... 10. The archive is never
unpacked and an image is read when it is converted, so that the 2.8 GB of unlabeled images take no memory.

Source: https://cs.stanford.edu/~acoates/stl10/ (Coates, Lee and Ng 2011); the sums of the files are those that
torchvision compares with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset_tools.sources import Sample, Source
from dataset_tools.sources.published import Progress, Published, check_file, is_there, obtain, tree_of
from dataset_tools.sources.tree import Tree, read_text
from pipelines.errors import InputError

SPEC = Published(
    kind="stl10",
    name="STL-10",
    archive="stl10_binary.tar.gz",
    md5="91f7769df0f17e558f3565bffb0c7dfb",
    folder="stl10_binary",
    url="http://ai.stanford.edu/~acoates/stl10/",
    variable="RELSSL_STL10_URL",
    sizes={"train": 5_000, "test": 8_000, "unlabeled": 100_000, "train+unlabeled": 105_000},
)
FILES = {
    "train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
    "train_y.bin": "5a34089d4802c674881badbb80307741",
    "test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
    "test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
    "unlabeled_X.bin": "5242ba1fed5e4be9e1e742405eb56ca4",
}
_NAMES = "class_names.txt"
_SIDE = 96
_BYTES = 3 * _SIDE**2


@dataclass(frozen=True)
class _Part:
    """The images of one file; `labels` None for the unlabeled ones."""

    name: str
    count: int
    labels: np.ndarray | None


class _Samples:
    """The images of several parts, read as they are asked for."""

    def __init__(self, tree: Tree, parts: list[_Part]) -> None:
        self._tree, self._parts = tree, parts

    def __len__(self) -> int:
        return sum(part.count for part in self._parts)

    def __iter__(self) -> Iterator[Sample]:
        for part in self._parts:
            with self._tree.open(f"{part.name}_X.bin") as file:
                for i in range(part.count):
                    pixels = np.frombuffer(file.read(_BYTES), np.uint8)
                    if pixels.size < _BYTES:
                        raise InputError(f"{self._tree.name}/{part.name}_X.bin: ends within image {i} of {part.count}")
                    # (channel, column, row) to (row, column, channel)
                    image = np.ascontiguousarray(pixels.reshape(3, _SIDE, _SIDE).transpose(2, 1, 0))
                    yield f"{part.name} {i}", image, None if part.labels is None else int(part.labels[i])


def is_at(path: Path) -> bool:
    """Whether `path` is the archive or the folder, or holds one of them."""
    return is_there(SPEC, path, _is_folder)


def read(
    split: str,
    place: Path,
    *,
    download: bool = False,
    url: str | None = None,
    checksum: bool = True,
    progress: Progress | None = None,
) -> Source:
    """The images (96, 96, 3) of a split, in published order: "train", "test", "unlabeled" or "train+unlabeled".

    Labels are 0 ... 9, None for unlabeled images. `place` is the folder, the archive, or the folder that holds either;
    `download`, `url`: see `published.obtain`. `checksum` False takes files with other MD5 sums. Raises InputError when
    the data set is absent, damaged, of another layout, or cannot be fetched.
    """
    SPEC.check_split(split)
    found = obtain(SPEC, place, _is_folder, download=download, url=url, checksum=checksum, progress=progress)
    tree = tree_of(found, SPEC.folder, progress)
    parts = [_part(tree, name) for name in split.split("+")]
    if found.is_dir() and checksum:
        for part in parts:
            for file in (f"{part.name}_X.bin", f"{part.name}_y.bin"):
                if file in FILES:
                    check_file(found / file, FILES[file])
    samples = _Samples(tree, parts)
    classes = None if split == "unlabeled" else _classes(tree)
    return SPEC.compare_size(split, Source(f"STL-10 {split}", samples, len(samples), classes, mode="raw"))


def _is_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in ("train_X.bin", "test_X.bin", "unlabeled_X.bin"))


def _part(tree: Tree, name: str) -> _Part:
    size = _size(tree, f"{name}_X.bin")
    if size == 0 or size % _BYTES:
        raise InputError(
            f"{tree.name}/{name}_X.bin: {size:,} bytes, expected a multiple of {_BYTES:,} (3 x 96 x 96 for an image):"
            " cut off, or the file of another data set"
        )
    if name == "unlabeled":
        return _Part(name, size // _BYTES, None)
    num_labels = _size(tree, f"{name}_y.bin")
    if num_labels != size // _BYTES:
        raise InputError(
            f"{tree.name}: {size // _BYTES:,} images in {name}_X.bin, but {num_labels:,} labels in {name}_y.bin"
        )
    with tree.open(f"{name}_y.bin") as file:
        labels = np.frombuffer(file.read(num_labels), np.uint8)
    if labels.min() < 1 or labels.max() > 10:
        raise InputError(f"{tree.name}/{name}_y.bin: labels {labels.min()} ... {labels.max()}, expected 1 ... 10")
    return _Part(name, num_labels, labels.astype(np.int64) - 1)


def _size(tree: Tree, name: str) -> int:
    size = tree.size(name)
    if size is None:
        raise InputError(f"{tree.name}/{name} is missing: part of STL-10 as published; fetch or unpack it again")
    return size


def _classes(tree: Tree) -> list[str]:
    names = (read_text(tree, _NAMES) or "").split()
    if len(names) != 10:
        raise InputError(f"{tree.name}/{_NAMES}: expected 10 names of classes, found {len(names)}")
    return names
