"""tiny-ImageNet as published: 200 classes of 64 x 64 JPEGs in a folder or a `.zip` archive.

    train/<class>/images/*.JPEG     500 of each class; <class> is a WordNet id such as n01443537
    val/images/*.JPEG               10,000; their classes stand in val/val_annotations.txt, a line for each:
                                    name, class and box, separated by tabs
    test/images/*.JPEG              10,000; their classes were never published

Classes are numbered by the sorted names of the folders of `train`, for every split. A `val` that somebody has already
sorted into folders of classes is read too, and gives the same file. Evaluations take `val` as the test set.

Source: http://cs231n.stanford.edu/tiny-imagenet-200.zip; the MD5 sum is the one that several public loaders check.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dataset_tools.images import ImageRefused
from dataset_tools.sources import Source
from dataset_tools.sources.published import Progress, Published, is_there, obtain, tree_of
from dataset_tools.sources.tree import ANNOTATIONS, Listing, Tree, read_text, read_tree, source_of
from pipelines.errors import InputError

SPEC = Published(
    kind="tiny-imagenet",
    name="tiny-ImageNet",
    archive="tiny-imagenet-200.zip",
    md5="90528d7ca1a48142e341f4ef8d21d0de",
    folder="tiny-imagenet-200",
    url="http://cs231n.stanford.edu/",
    variable="RELSSL_TINY_IMAGENET_URL",
    sizes={"train": 100_000, "val": 10_000, "test": 10_000},
)


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
    """The images of a split ("train", "val" or "test"), sorted by class and name; those of "test" have no labels.

    `place` is the folder, the archive, or the folder that holds either; `download`, `url`, `checksum`: see
    `published.obtain`. Raises InputError when the data set is absent, damaged, of another layout, or cannot be fetched.
    """
    SPEC.check_split(split)
    found = obtain(SPEC, place, _is_folder, download=download, url=url, checksum=checksum, progress=progress)
    tree = tree_of(found, SPEC.folder, progress)
    classes = tree.below("train").folders()
    if not classes:
        raise InputError(
            f"{tree.name}: expected {SPEC.name} as published, with train/<class>/images/*.JPEG: it has no train/<class>"
        )
    below = tree.below(split)
    if split == "train":
        source = read_tree(below)
    elif split == "val":
        source = _val(below, classes)
    else:
        source = _test(below)
    source.name = f"{SPEC.name} {split}"
    return SPEC.compare_size(split, source)


def _is_folder(path: Path) -> bool:
    return (path / "wnids.txt").is_file() and (path / "train").is_dir()


def _val(tree: Tree, classes: list[str]) -> Source:
    listing = _listing(tree)
    numbers = {name: i for i, name in enumerate(classes)}
    annotated = _annotations(tree, numbers)
    labels = {name: numbers.get(name.split("/", 1)[0], annotated.get(_base(name))) for name in listing.names}
    unknown = [name for name, label in labels.items() if label is None]
    if unknown:
        what = "has no line for" if annotated else "is missing, which gives the classes of"
        raise InputError(
            f"{tree.name}/{ANNOTATIONS} {what} {len(unknown):,} of the {len(labels):,} images ({unknown[0]}, ...):"
            " unpack the published archive again"
        )
    names = sorted(listing.names, key=lambda name: (classes[labels[name] or 0], _base(name)))
    absent = sorted(annotated.keys() - {_base(name) for name in names})
    refused = [(f"images/{name}", ImageRefused("file not found", f"named in {ANNOTATIONS}")) for name in absent]
    listing = replace(listing, names=names, refused=listing.refused + refused)
    return source_of(tree, listing, [labels[name] for name in names], classes)


def _test(tree: Tree) -> Source:
    listing = _listing(tree)
    source = source_of(tree, listing, [None] * len(listing.names), None)
    source.remarks.append("the classes of the test images were never published; evaluations take --split val")
    return source


def _listing(tree: Tree) -> Listing:
    listing = tree.listing()
    if not listing.names:
        raise InputError(f"{tree.name}: no images there; expected {SPEC.name} as published")
    return listing


def _base(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _annotations(tree: Tree, numbers: Mapping[str, int]) -> dict[str, int]:
    """Class by name of the image; empty when there is no such file."""
    found: dict[str, int] = {}
    for number, line in enumerate((read_text(tree, ANNOTATIONS) or "").splitlines(), 1):
        name, *rest = line.split("\t")
        label = numbers.get(rest[0]) if rest else None
        if label is None or found.setdefault(name, label) != label:
            raise InputError(
                f"{tree.name}/{ANNOTATIONS}, line {number}: expected the name of an image, a tab, and one of the"
                f" {len(numbers)} classes in train, the same for every line of an image; got {line[:80]!r}"
            )
    return found
