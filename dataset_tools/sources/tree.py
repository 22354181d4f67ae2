"""Image files below a root, whether that is a folder on the disk or one in an archive.

    root/class/*.jpg, root/class/anything/below/*.png      label = place of `class` among the sorted names
    root/*.jpg                                             no labels

Hidden files and folders (their name begins with a dot) and files that are not images are passed over and counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

from dataset_tools.images import ImageRefused
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
SPLITS = frozenset({"train", "test", "val", "valid", "validation", "unlabeled"})
ANNOTATIONS = "val_annotations.txt"  # has the classes of tiny-ImageNet's val/images
_LONGEST_TEXT = 1 << 26  # bytes
_ARCHIVES = {".tar", ".tgz", ".gz", ".xz", ".bz2", ".zip"}


@dataclass
class Listing:
    """What lies below a root. `names`: images, relative to the root, parts separated by `/`, in the order in which
    they will be read. `folders`: at the top, sorted. `refused`: images that are known to be unusable already."""

    names: list[str]
    folders: list[str]
    passed_over: Counter[str] = field(default_factory=Counter)
    refused: list[tuple[str, ImageRefused]] = field(default_factory=list)


class Tree(Protocol):
    """Files below a root. `name` is what a user types to get this root."""

    @property
    def name(self) -> str: ...

    def listing(self) -> Listing:
        """All of it; looked through once more at each call."""

    def folders(self) -> list[str]:
        """The folders at the top, sorted, without hidden ones."""

    def below(self, folder: str) -> Tree:
        """The same files, seen from a folder; empty when there is no such folder."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is no such file."""

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file that exists, to be read once from its beginning to its `size`."""

    def samples(self, names: Sequence[str], labels: Sequence[int | None]) -> Iterable[Sample]:
        """These images: in this order, or, where they can only be read in another one, in that."""


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def kind_of_file(name: str) -> str:
    """How a file that is not an image is counted."""
    return os.path.splitext(name)[1].lower() or "no extension"


def sort_key(name: str) -> str:
    """Sorts by folder first: "a/2" before "a b/1". As a list of the parts would, in a third of the memory."""
    return name.replace("/", "\0")


def read_text(tree: Tree, name: str) -> str | None:
    """The text of a small file; None when there is no such file."""
    size = tree.size(name)
    if size is None:
        return None
    with tree.open(name) as file:
        content = file.read(min(size, _LONGEST_TEXT))
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{tree.name}/{name}: expected a text file: {error}") from error


def read_tree(tree: Tree, *, labels: bool = True) -> Source:
    """Every image below the root. Class folders give labels unless `labels` is False.

    Raises InputError when there are no images, when loose images mix with folders of images, or when the folders are
    splits (train, test, ...) instead of classes.
    """
    listing = tree.listing()
    names = listing.names
    if not names and not listing.refused:
        raise InputError(_nothing(tree.name, listing.passed_over))
    loose = [name for name in names if "/" not in name]
    if not labels or len(loose) == len(names):
        return source_of(tree, listing, [None] * len(names), None)
    if loose:
        raise InputError(
            f"{tree.name}: {len(loose)} images lie in the folder itself ({loose[0]}, ...) and"
            f" {len(names) - len(loose)} in folders below: expected class folders or a flat one. Move them,"
            " or take all of them without labels: --no-labels"
        )
    classes = listing.folders
    _refuse_splits(tree, classes)
    index = {name: i for i, name in enumerate(classes)}
    of_class = [index[name.split("/", 1)[0]] for name in names]
    empty = sorted(set(range(len(classes))).difference(of_class))
    source = source_of(tree, listing, of_class, classes)
    if empty:
        source.remarks.append(f"{len(empty)} class folders hold no images: {_some([classes[i] for i in empty])}")
    if len(classes) - len(empty) == 1:
        only = names[0].split("/", 1)[0]
        source.remarks.append(f"all images are of one class, {only}: is {tree.name} one folder too high?")
    return source


def source_of(tree: Tree, listing: Listing, labels: Sequence[int | None], classes: list[str] | None) -> Source:
    """The images of a listing, after those that are known to be unusable: they are counted and listed as skipped."""
    samples: Iterable[Sample] = tree.samples(listing.names, labels)
    if listing.refused:
        samples = _Chained([(name, reason, None) for name, reason in listing.refused], samples)
    count = len(listing.names) + len(listing.refused)
    return Source(tree.name, samples, count, classes, remarks=_remarks(listing.passed_over))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


class _Chained:
    """Two iterables, one after the other, as often as wanted."""

    def __init__(self, *parts: Iterable[Sample]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[Sample]:
        for part in self._parts:
            yield from part


def _refuse_splits(tree: Tree, classes: list[str]) -> None:
    if {name.lower() for name in classes} <= SPLITS:
        raise InputError(
            f"{tree.name}: its folders are called {', '.join(classes)}: these look like splits, not classes."
            f" Convert them one by one, such as: relssl convert {tree.name}/{classes[0]} {classes[0]}.beton"
        )
    if classes == ["images"] and tree.size(ANNOTATIONS) is not None:
        raise InputError(
            f"{tree.name}: its classes are in {ANNOTATIONS}, not in folders: this is tiny-ImageNet. Convert it with:"
            " relssl convert tiny-imagenet val.beton --split val --root FOLDER_OF_tiny-imagenet-200"
        )


def _nothing(name: str, passed_over: Counter[str]) -> str:
    found = _kinds(passed_over) or "nothing at all"
    archives = "; give the archives themselves as the source" if _ARCHIVES & passed_over.keys() else ""
    return f"{name}: no images found; looked for {' '.join(EXTENSIONS)}, there is: {found}{archives}"


def _remarks(passed_over: Counter[str]) -> list[str]:
    total = sum(passed_over.values())
    return [f"passed over {total} files that are hidden or not images: {_kinds(passed_over)}"] if total else []


def _kinds(counts: Counter[str]) -> str:
    """The five most frequent; in an order that does not depend on that of the file system."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind}" for kind, count in ranked[:5])
