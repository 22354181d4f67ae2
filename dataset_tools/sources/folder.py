"""Images in folders on the disk, and lists of images.

    folder/class/*.jpg, folder/*.jpg       as in `dataset_tools.sources.tree`
    list.txt: a path per line, optionally `,label`             label as given, or by its class folder

Links to folders are followed, each folder once.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from dataset_tools.sources import Sample, Source
from dataset_tools.sources.tree import SPLITS, Listing, is_image, kind_of_file, read_tree, sort_key
from pipelines.errors import InputError


class _Samples:
    """(key, path, label) of many files, kept as strings: 1.28 million `Path` objects would take a
    gigabyte."""

    def __init__(self, root: Path, names: Sequence[str], labels: Sequence[int | None]) -> None:
        self._root, self._names, self._labels = root, names, labels

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[Sample]:
        for name, label in zip(self._names, self._labels, strict=True):
            yield name, self._root / name, label


class FolderTree:
    """A folder on the disk as a `Tree`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def name(self) -> str:
        return str(self.root)

    def listing(self) -> Listing:
        if not self.root.is_dir():
            return Listing([], [])
        names, passed_over = _walk(self.root)
        return Listing(names, self.folders(), passed_over)

    def folders(self) -> list[str]:
        if not self.root.is_dir():
            return []
        with os.scandir(self.root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))

    def below(self, folder: str) -> FolderTree:
        return FolderTree(self.root / folder)

    def size(self, name: str) -> int | None:
        path = self.root / name
        return path.stat().st_size if path.is_file() else None

    def open(self, name: str) -> BinaryIO:
        try:
            return (self.root / name).open("rb")
        except OSError as error:
            raise InputError(f"{self.root / name}: cannot be read: {error.strerror}") from error

    def samples(self, names: Sequence[str], labels: Sequence[int | None]) -> _Samples:
        return _Samples(self.root, names, labels)


def read_folder(folder: Path, *, labels: bool = True) -> Source:
    """Every image below `folder`, sorted by path. Class folders give labels unless `labels` is False.

    Raises InputError when the folder is missing, and as `read_tree` does.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of images; it does not exist or is not a folder")
    return read_tree(FolderTree(folder), labels=labels)


def read_list(path: Path, *, root: Path | None = None) -> Source:
    """The images that a text file names, in its order: one path per line, optionally followed by a comma and
    a label.

    Paths are relative to `root` (default: the folder of the list). A bare name like `n01440764_10043.JPEG` is
    also looked for in the folder `n01440764` below `root`, as the published 1 % and 10 % lists of ImageNet
    need it. Labels are whole numbers, or class names, whose sorted order then gives the numbers. Where the
    list has none, the class folders below `root` give them, just as `read_folder(root)` would. Empty lines
    and lines that begin with # are skipped. Raises InputError when the list cannot be read, is empty, or
    gives labels to some lines only, or when the folders are splits (train, test, ...) instead of classes.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of images: {error}") from error
    root = path.parent if root is None else root
    entries = [_split_line(line.strip()) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not entries:
        raise InputError(f"{path}: the list is empty; expected a path per line, optionally ',label'")
    if not root.is_dir():
        raise InputError(f"{root}: expected the folder that the paths of {path} start from; give it with --root")
    folders = FolderTree(root).folders()
    known = set(folders)
    names = [_find(name, root, known) for name, _ in entries]
    given = [label for _, label in entries if label is not None]
    if given and len(given) < len(entries):
        bare = next(name for name, label in entries if label is None)
        raise InputError(
            f"{path}: {len(given)} of {len(entries)} lines have a label, {bare!r} has none; label all or none"
        )
    if not given:
        _refuse_splits(path, root, names, known)
    labels, classes = _given_labels(given) if given else _folder_labels(names, folders)
    return Source(str(path), _Samples(root, names, labels), len(names), classes)


def _walk(folder: Path) -> tuple[list[str], Counter[str]]:
    """Paths of the images relative to `folder`, sorted, and what else was there: counts by kind."""
    names: list[str] = []
    other: Counter[str] = Counter()
    seen = set()
    prefix = len(str(folder)) + 1 if str(folder) != os.sep else 1
    for place, folders, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        status = os.stat(place)
        identity = (status.st_dev, status.st_ino)
        if identity in seen:  # a link back to a folder that was walked already
            folders.clear()
            continue
        seen.add(identity)
        other["hidden"] += sum(name.startswith(".") for name in folders + files)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = place[prefix:].replace(os.sep, "/")
        for name in files:
            if name.startswith("."):
                continue
            if is_image(name):
                names.append(f"{inside}/{name}" if inside else name)
            else:
                other[kind_of_file(name)] += 1
    names.sort(key=sort_key)
    return names, +other


def _refuse_folder(error: OSError) -> None:
    """`os.walk` would leave out a folder that it cannot read."""
    raise InputError(f"{error.filename}: the folder cannot be read: {error.strerror}") from error


def _split_line(line: str) -> tuple[str, str | None]:
    """(path, label): the label is what follows the last comma or tab, unless that is the name of an image."""
    for separator in (",", "\t"):
        name, found, label = line.rpartition(separator)
        if found and not is_image(label):
            return name.strip(), label.strip()
    return line, None


def _find(name: str, root: Path, folders: set[str]) -> str:
    """The path below `root` that a line means."""
    if os.path.isabs(name) or os.sep in name:
        return name
    folder = name.split("_", 1)[0]
    if folder in folders and not (root / name).exists():
        return os.path.join(folder, name)
    return name


def _given_labels(given: list[str]) -> tuple[list[int | None], list[str] | None]:
    if all(label.lstrip("-").isdigit() for label in given):
        return [int(label) for label in given], None
    classes = sorted(set(given))
    index = {name: i for i, name in enumerate(classes)}
    return [index[label] for label in given], classes


def _refuse_splits(path: Path, root: Path, names: list[str], folders: set[str]) -> None:
    """A root one folder too high would make the splits of a data set its classes."""
    used = sorted({name.split(os.sep, 1)[0] for name in names if os.sep in name} & folders)
    if used and {name.lower() for name in used} <= SPLITS:
        raise InputError(
            f"{path}: its images lie in the folders {', '.join(used)} of {root}: these look like splits, not classes."
            f" Begin the paths one folder lower, with --root {root / used[0]}, or give each line its label: path,label"
        )


def _folder_labels(names: list[str], folders: list[str]) -> tuple[list[int | None], list[str] | None]:
    index = {name: i for i, name in enumerate(folders)}
    labels = [index.get(name.split(os.sep, 1)[0]) if os.sep in name else None for name in names]
    return labels, folders if any(label is not None for label in labels) else None
