"""CIFAR-10 and CIFAR-100 as their author publishes them: Python pickles in a folder or a `.tar.gz` archive.

The archive is read in place, not unpacked. Files are compared with the published MD5 sums (which guard
against a broken download; what a pickle may contain is guarded by `pipelines.safe_pickle`). Source:
https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky 2009).
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset_tools.sources import Source
from dataset_tools.sources.published import Progress, Published, check, is_there, obtain
from pipelines import safe_pickle
from pipelines.errors import ConfigError, InputError

_URL = "https://www.cs.toronto.edu/~kriz/"
_VARIABLE = "RELSSL_CIFAR_URL"
_SIDE = 32


@dataclass(frozen=True)
class Labels:
    """Where a batch has its labels, and the file of names theirs."""

    key: str
    names_key: str


@dataclass(frozen=True, kw_only=True)
class Spec(Published):
    """One of the two data sets as published. `files` maps every file to its MD5 sum; `coarse`: its super-classes."""

    files: Mapping[str, str]
    splits: Mapping[str, tuple[str, ...]]
    meta: str
    labels: Labels
    coarse: Labels | None = None


SPECS = {
    "cifar10": Spec(
        kind="cifar10",
        name="CIFAR-10",
        url=_URL,
        variable=_VARIABLE,
        sizes={"train": 50_000, "test": 10_000},
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        files={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
        splits={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        meta="batches.meta",
        labels=Labels("labels", "label_names"),
    ),
    "cifar100": Spec(
        kind="cifar100",
        name="CIFAR-100",
        url=_URL,
        variable=_VARIABLE,
        sizes={"train": 50_000, "test": 10_000},
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        files={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
        splits={"train": ("train",), "test": ("test",)},
        meta="meta",
        labels=Labels("fine_labels", "fine_label_names"),
        coarse=Labels("coarse_labels", "coarse_label_names"),
    ),
}


def is_at(kind: str, path: Path) -> bool:
    """Whether `path` is the archive or the folder of "cifar10" or "cifar100", or holds one of them."""
    spec = SPECS[kind]
    return is_there(spec, path, lambda folder: _is_folder_of(spec, folder))


def read(
    kind: str,
    split: str,
    place: Path,
    *,
    coarse: bool = False,
    download: bool = False,
    url: str | None = None,
    checksum: bool = True,
    progress: Progress | None = None,
) -> Source:
    """The images (32, 32, 3) of a split ("train" or "test"), in published order, with their labels.

    `coarse` takes the 20 super-classes of CIFAR-100 instead of its 100 classes. `place` is the folder, the archive, or
    the folder that holds either; `download`, `url`: see `published.obtain`. `checksum` False takes files with other
    MD5 sums, such as re-pickled ones. Raises InputError when the data set is absent, damaged, or cannot be fetched.
    """
    spec = SPECS[kind]
    spec.check_split(split)
    chosen = spec.coarse if coarse else spec.labels
    if chosen is None:
        raise ConfigError(f"{spec.name} has no super-classes; only CIFAR-100 has coarse labels")
    wanted = (*spec.splits[split], spec.meta)
    found = obtain(
        spec,
        place,
        lambda folder: _is_folder_of(spec, folder),
        download=download,
        url=url,
        checksum=checksum,
        progress=progress,
    )
    files = _from_archive(spec, found, wanted) if found.is_file() else _from_folder(spec, found, wanted, checksum)
    batches = [_batch(spec, name, files[name], chosen) for name in spec.splits[split]]
    images, labels = np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches])
    classes = _classes(spec, files[spec.meta], int(labels.max()), chosen)
    samples = [(f"{split} {i}", images[i], int(label)) for i, label in enumerate(labels)]
    name = f"{spec.name} {split}" + (f", {len(classes)} super-classes" if coarse else "")
    return spec.compare_size(split, Source(name, samples, len(samples), classes, mode="raw"))


def _is_folder_of(spec: Spec, path: Path) -> bool:
    return all((path / name).is_file() for name in (*spec.splits["test"], spec.meta))


def _from_folder(spec: Spec, folder: Path, wanted: tuple[str, ...], checksum: bool) -> dict[str, bytes]:
    files = {}
    for name in wanted:
        path = folder / name
        try:
            files[name] = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: part of {spec.name}, cannot be read: {error.strerror}") from error
        if checksum:
            check(path, hashlib.md5(files[name], usedforsecurity=False).hexdigest(), spec.files[name])
    return files


def _from_archive(spec: Spec, archive: Path, wanted: tuple[str, ...]) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                content = tar.extractfile(member) if folder == spec.folder and name in wanted else None
                if content is not None:
                    files[name] = content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{archive}: a damaged archive: {error}; delete it and fetch it again") from error
    missing = [name for name in wanted if name not in files]
    if missing:
        raise InputError(f"{archive}: {spec.folder}/{missing[0]} is not in it; this is not the {spec.name} archive")
    return files


def _batch(spec: Spec, name: str, data: bytes, chosen: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) uint8 and labels (n,) int64 of one batch file; its rows are R, G, B planes."""
    batch = safe_pickle.loads(data, where=f"{spec.folder}/{name}")
    rows = batch.get("data") if isinstance(batch, dict) else None
    labels = batch.get(chosen.key) if isinstance(batch, dict) else None
    if not (isinstance(rows, np.ndarray) and rows.dtype == np.uint8 and rows.shape[1:] == (3 * _SIDE**2,)):
        raise InputError(f"{spec.folder}/{name}: expected 'data' to be uint8 (n, {3 * _SIDE**2})")
    if not isinstance(labels, list) or len(labels) != len(rows) or not all(type(i) is int and i >= 0 for i in labels):
        raise InputError(f"{spec.folder}/{name}: expected {len(rows)} whole numbers in {chosen.key!r}")
    images = rows.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, np.int64)


def _classes(spec: Spec, data: bytes, highest: int, chosen: Labels) -> list[str]:
    meta: Any = safe_pickle.loads(data, where=f"{spec.folder}/{spec.meta}")
    names = meta.get(chosen.names_key) if isinstance(meta, dict) else None
    if not isinstance(names, list) or len(names) <= highest or not all(isinstance(name, str) for name in names):
        raise InputError(f"{spec.folder}/{spec.meta}: expected more than {highest} names in {chosen.names_key!r}")
    return names
