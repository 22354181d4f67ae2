"""SlimageNet64: 1,000 classes of ImageNet with 200 images of 64 x 64 pixels each, in a folder or an archive.

    SlimageNet64/<split>/<class>/*     or     SlimageNet64/<class>/*

Where there are folders of splits, `--split` chooses one of them. The archive was made for few-shot learning, where the
splits have different classes; the relational-reasoning paper trains on 160,000 of the images and tests on 40,000, and
which ones that are was not found. So there are two splits more, made here: "first80" and "last20" are the first 80 %
and the last 20 % of the images of every class, sorted by name: 160,000 and 40,000. "all" is everything. Whatever the
split, classes are numbered by their sorted names over all splits.

Source: https://zenodo.org/record/3672132 (Antoniou et al. 2020, arXiv 2004.11967). The name of the archive and its MD5
sum are read from the description of that record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dataset_tools.sources import Source
from dataset_tools.sources.published import Progress, Published, is_there, obtain, tree_of
from dataset_tools.sources.tree import SPLITS, Tree, source_of
from pipelines.errors import ConfigError, InputError

SPEC = Published(
    kind="slimagenet64",
    name="SlimageNet64",
    archive="SlimageNet64.tar.bz2",
    md5=None,
    folder="SlimageNet64",
    url="https://zenodo.org/api/records/3672132",
    variable="RELSSL_SLIMAGENET64_URL",
    sizes={"all": 200_000, "first80": 160_000, "last20": 40_000},
    is_record=True,
)
_JPEG = (".jpg", ".jpeg")


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
    """The images of a split: "all", "first80", "last20", or a folder such as "train", "val" and "test".

    `place` is the folder, the archive, or the folder that holds either; `download`, `url`: see `published.obtain`.
    Images are stored raw unless they are JPEGs already. Raises InputError when the data set is absent, damaged, of
    another layout, or cannot be fetched; ConfigError for a split that is not there.
    """
    found = obtain(SPEC, place, _is_folder, download=download, url=url, checksum=checksum, progress=progress)
    tree = _top(tree_of(found, progress=progress))
    folders = tree.folders()
    splits = [name for name in folders if name.lower() in SPLITS]
    if splits and len(splits) < len(folders):
        others = [name for name in folders if name not in splits]
        raise InputError(
            f"{tree.name}: folders of splits ({', '.join(splits)}) beside others ({', '.join(others[:5])})"
        )
    if split not in (*splits, *SPEC.sizes):
        raise ConfigError(f"split {split!r}: {tree.name} has the splits {', '.join((*splits, *SPEC.sizes))}")
    listing = tree.listing()
    class_of = {name: _class(tree, name, depth=1 if splits else 0) for name in listing.names}
    classes = sorted(set(class_of.values()))
    numbers = {name: i for i, name in enumerate(classes)}
    chosen = _chosen(split, class_of)
    if not chosen:
        raise InputError(f"{tree.name}: no images in the split {split}")
    part = replace(listing, names=[name for name in listing.names if name in chosen])
    source = source_of(tree, part, [numbers[class_of[name]] for name in part.names], classes)
    source.name = f"{SPEC.name} {split}"
    source.mode = "jpg" if all(name.lower().endswith(_JPEG) for name in part.names) else "raw"
    present = {class_of[name] for name in part.names}
    if len(present) < len(classes):
        source.remarks.append(f"{split} has images of {len(present):,} of the {len(classes):,} classes")
    return SPEC.compare_size(split, source) if split in SPEC.sizes else source


def _is_folder(path: Path) -> bool:
    return path.name == SPEC.folder


def _top(tree: Tree) -> Tree:
    """Below the folders that hold everything."""
    folders = tree.folders()
    return _top(tree.below(folders[0])) if len(folders) == 1 and folders[0].lower() not in SPLITS else tree


def _class(tree: Tree, name: str, *, depth: int) -> str:
    parts = name.split("/")
    if len(parts) < depth + 2:
        raise InputError(f"{tree.name}: expected images in {'<split>/' * depth}<class>/, found {name}")
    return parts[depth]


def _chosen(split: str, class_of: Mapping[str, str]) -> set[str]:
    """Names of the images of a split."""
    if split == "all":
        return set(class_of)
    if split not in SPEC.sizes:
        return {name for name in class_of if name.startswith(f"{split}/")}
    by_class: dict[str, list[str]] = {}
    for name in sorted(class_of, key=lambda name: (name.rsplit("/", 1)[-1], name)):
        by_class.setdefault(class_of[name], []).append(name)
    parts = [(names[: len(names) * 4 // 5], names[len(names) * 4 // 5 :]) for names in by_class.values()]
    return {name for first, last in parts for name in (first if split == "first80" else last)}
