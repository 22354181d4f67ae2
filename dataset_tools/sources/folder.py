"""Images in folders, and lists of images.

    folder/class/*.jpg, folder/class/anything/below/*.png      label = place of `class` among the sorted names
    folder/*.jpg                                               no labels
    list.txt: a path per line, optionally `,label`             label as given, or by its class folder

Hidden files and folders (their name begins with a dot) and files that are not images are passed over and
counted. Links to folders are followed, each folder once.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dataset_tools.sources import Sample, Source
from pipelines.errors import InputError

EXTENSIONS = [
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".bmp",
    ".gif",
    ".webp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".tga",
    ".jp2",
    ".avif",
]
_SPLITS = frozenset({"train", "test", "val", "valid", "validation", "unlabeled"})


class _Samples:
    """(key, path, label) of many files, kept as strings: 1.28 million `Path` objects would take a
    gigabyte."""

    def __init__(self, root: Path, names: list[str], labels: list[int | None]) -> None:
        self._root, self._names, self._labels = root, names, labels

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[Sample]:
        for name, label in zip(self._names, self._labels, strict=True):
            yield name, self._root / name, label


def read_folder(folder: Path, *, labels: bool = True) -> Source:
    """Every image below `folder`, sorted by path. Class folders give labels unless `labels` is False.

    Raises InputError when the folder is missing or holds no images, mixes loose images with folders of
    images, or holds splits (train, test, ...) instead of classes.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of images; it does not exist or is not a folder")
    names, passed_over = _walk(folder)
    if not names:
        raise InputError(_nothing(folder, passed_over))
    loose = [name for name in names if os.sep not in name]
    remarks = _remarks(passed_over)
    if not labels or len(loose) == len(names):
        return Source(str(folder), _Samples(folder, names, [None] * len(names)), len(names), None, remarks=remarks)
    if loose:
        raise InputError(
            f"{folder}: {len(loose)} images lie in the folder itself ({loose[0]}, ...) and"
            f" {len(names) - len(loose)} in folders below: expected class folders or a flat one. Move them,"
            " or take all of them without labels: --no-labels"
        )
    classes = _class_folders(folder)
    _refuse_splits(folder, classes)
    index = {name: i for i, name in enumerate(classes)}
    of_class: list[int | None] = [index[name.split(os.sep, 1)[0]] for name in names]
    empty = sorted(set(range(len(classes))).difference(of_class))
    if empty:
        remarks.append(f"{len(empty)} class folders hold no images: {_some([classes[i] for i in empty])}")
    return Source(str(folder), _Samples(folder, names, of_class), len(names), classes, remarks=remarks)


def read_list(path: Path, *, root: Path | None = None) -> Source:
    """The images that a text file names, in its order: one path per line, optionally followed by a comma and
    a label.

    Paths are relative to `root` (default: the folder of the list). A bare name like `n01440764_10043.JPEG` is
    also looked for in the folder `n01440764` below `root`, as the published 1 % and 10 % lists of ImageNet
    need it. Labels are whole numbers, or class names, whose sorted order then gives the numbers. Where the
    list has none, the class folders below `root` give them, just as `read_folder(root)` would. Empty lines
    and lines that begin with # are skipped. Raises InputError when the list cannot be read, is empty, or
    gives labels to some lines only.
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
    folders = _class_folders(root)
    known = set(folders)
    names = [_find(name, root, known) for name, _ in entries]
    given = [label for _, label in entries if label is not None]
    if given and len(given) < len(entries):
        bare = next(name for name, label in entries if label is None)
        raise InputError(
            f"{path}: {len(given)} of {len(entries)} lines have a label, {bare!r} has none; label all or none"
        )
    labels, classes = _given_labels(given) if given else _folder_labels(names, folders)
    return Source(str(path), _Samples(root, names, labels), len(names), classes)


def _walk(folder: Path) -> tuple[list[str], Counter[str]]:
    """Paths of the images relative to `folder`, sorted, and what else was there: counts by kind."""
    names: list[str] = []
    other: Counter[str] = Counter()
    seen = set()
    prefix = len(str(folder)) + 1 if str(folder) != os.sep else 1
    for place, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(place)
        identity = (status.st_dev, status.st_ino)
        if identity in seen:  # a link back to a folder that was walked already
            folders.clear()
            continue
        seen.add(identity)
        other["hidden"] += sum(name.startswith(".") for name in folders + files)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = place[prefix:]
        for name in files:
            extension = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if extension in EXTENSIONS:
                names.append(os.path.join(inside, name))
            else:
                other[extension or "no extension"] += 1
    names.sort(key=lambda name: name.split(os.sep))
    return names, +other


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _refuse_splits(folder: Path, classes: list[str]) -> None:
    if {name.lower() for name in classes} <= _SPLITS:
        raise InputError(
            f"{folder}: its folders are called {', '.join(classes)}: these look like splits, not classes."
            f" Convert them one by one, such as: relssl convert {folder / classes[0]} {classes[0]}.beton"
        )


def _nothing(folder: Path, passed_over: Counter[str]) -> str:
    found = _kinds(passed_over) or "nothing at all"
    return f"{folder}: no images found; looked for {' '.join(EXTENSIONS)}, there is: {found}"


def _remarks(passed_over: Counter[str]) -> list[str]:
    total = sum(passed_over.values())
    return [f"passed over {total} files that are hidden or not images: {_kinds(passed_over)}"] if total else []


def _kinds(counts: Counter[str]) -> str:
    """The five most frequent; in an order that does not depend on that of the file system."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind}" for kind, count in ranked[:5])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _split_line(line: str) -> tuple[str, str | None]:
    """(path, label): the label is what follows the last comma or tab, unless that is the name of an image."""
    for separator in (",", "\t"):
        name, found, label = line.rpartition(separator)
        if found and os.path.splitext(label)[1].lower() not in EXTENSIONS:
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


def _folder_labels(names: list[str], folders: list[str]) -> tuple[list[int | None], list[str] | None]:
    index = {name: i for i, name in enumerate(folders)}
    labels = [index.get(name.split(os.sep, 1)[0]) if os.sep in name else None for name in names]
    return labels, folders if any(label is not None for label in labels) else None
