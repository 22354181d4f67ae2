"""CIFAR-10 and CIFAR-100 as their author publishes them: Python pickles in a folder or a `.tar.gz` archive.

The archive is read in place, not unpacked. Files are compared with the published MD5 sums (which guard
against a broken download; what a pickle may contain is guarded by `pipelines.safe_pickle`). Source:
https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky 2009).
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset_tools.sources import Source
from pipelines import safe_pickle
from pipelines.errors import ConfigError, InputError

URL = "https://www.cs.toronto.edu/~kriz/"
_TIMEOUT = 60  # seconds without a byte
_SIDE = 32


@dataclass(frozen=True)
class Spec:
    """One of the two data sets as published. `files` maps every file to its MD5 sum."""

    name: str
    archive: str
    md5: str
    folder: str
    files: Mapping[str, str]
    splits: Mapping[str, tuple[str, ...]]
    meta: str
    label_key: str
    names_key: str


SPECS = {
    "cifar10": Spec(
        name="CIFAR-10",
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
        label_key="labels",
        names_key="label_names",
    ),
    "cifar100": Spec(
        name="CIFAR-100",
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
        label_key="fine_labels",
        names_key="fine_label_names",
    ),
}


def detect(path: Path) -> str | None:
    """ "cifar10" or "cifar100" when `path` is the archive or the folder of it, or holds one of them; else
    None."""
    for kind, spec in SPECS.items():
        if (path.is_file() and path.name == spec.archive) or (path / spec.archive).is_file():
            return kind
        if path.is_dir() and (_is_folder_of(spec, path) or _is_folder_of(spec, path / spec.folder)):
            return kind
    return None


def read(
    kind: str,
    split: str,
    place: Path,
    *,
    download: bool = False,
    url: str | None = None,
    checksum: bool = True,
) -> Source:
    """The images (32, 32, 3) of a split ("train" or "test"), in published order, with their (fine) labels.

    `place` is the folder, the archive, or the folder that holds either. With `download` an absent archive is
    fetched into `place` from `url` (default: the environment variable RELSSL_CIFAR_URL, or the published
    address), which may be the address of the file or of its folder. `checksum` False takes files with other
    MD5 sums, such as re-pickled ones. Raises InputError when the data set is absent, damaged, or cannot be
    fetched.
    """
    spec = SPECS[kind]
    if split not in spec.splits:
        raise ConfigError(f"split {split!r}: {spec.name} has the splits {' and '.join(spec.splits)}")
    wanted = (*spec.splits[split], spec.meta)
    files = _locate(spec, place, wanted, checksum)
    if files is None:
        if not download:
            raise InputError(
                f"{place}: expected {spec.folder}/ or {spec.archive} there; fetch it with --download, or"
                " say where it is with --root"
            )
        _download(spec, place, url or os.environ.get("RELSSL_CIFAR_URL", URL), checksum)
        files = _locate(spec, place, wanted, checksum)
        assert files is not None
    batches = [_batch(spec, name, files[name]) for name in spec.splits[split]]
    images, labels = np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches])
    classes = _classes(spec, files[spec.meta], int(labels.max()))
    samples = [(f"{split} {i}", images[i], int(label)) for i, label in enumerate(labels)]
    return Source(f"{spec.name} {split}", samples, len(samples), classes, mode="raw")


def _is_folder_of(spec: Spec, path: Path) -> bool:
    return all((path / name).is_file() for name in (*spec.splits["test"], spec.meta))


def _locate(spec: Spec, place: Path, wanted: tuple[str, ...], checksum: bool) -> dict[str, bytes] | None:
    """Contents of the wanted files, from a folder or from the archive; None when neither is there."""
    for folder in (place, place / spec.folder):
        if _is_folder_of(spec, folder):
            return _from_folder(spec, folder, wanted, checksum)
    archive = place if place.is_file() else place / spec.archive
    return _from_archive(spec, archive, wanted, checksum) if archive.is_file() else None


def _from_folder(spec: Spec, folder: Path, wanted: tuple[str, ...], checksum: bool) -> dict[str, bytes]:
    files = {}
    for name in wanted:
        path = folder / name
        try:
            files[name] = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: part of {spec.name}, cannot be read: {error.strerror}") from error
        _check(path, hashlib.md5(files[name], usedforsecurity=False).hexdigest(), spec.files[name], checksum)
    return files


def _from_archive(spec: Spec, archive: Path, wanted: tuple[str, ...], checksum: bool) -> dict[str, bytes]:
    _check(archive, _md5(archive), spec.md5, checksum)
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


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check(what: object, found: str, expected: str, checksum: bool) -> None:
    if checksum and found != expected:
        raise InputError(
            f"{what}: MD5 {found}, published is {expected}: damaged or changed. Fetch it again, or"
            " take it as it is with --no-checksum"
        )


def _batch(spec: Spec, name: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) uint8 and labels (n,) int64 of one batch file; its rows are R, G, B planes."""
    batch = safe_pickle.loads(data, where=f"{spec.folder}/{name}")
    rows = batch.get("data") if isinstance(batch, dict) else None
    labels = batch.get(spec.label_key) if isinstance(batch, dict) else None
    if not (isinstance(rows, np.ndarray) and rows.dtype == np.uint8 and rows.shape[1:] == (3 * _SIDE**2,)):
        raise InputError(f"{spec.folder}/{name}: expected 'data' to be uint8 (n, {3 * _SIDE**2})")
    if not isinstance(labels, list) or len(labels) != len(rows) or not all(type(i) is int and i >= 0 for i in labels):
        raise InputError(f"{spec.folder}/{name}: expected {len(rows)} whole numbers in {spec.label_key!r}")
    images = rows.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, np.int64)


def _classes(spec: Spec, data: bytes, highest: int) -> list[str]:
    meta: Any = safe_pickle.loads(data, where=f"{spec.folder}/{spec.meta}")
    names = meta.get(spec.names_key) if isinstance(meta, dict) else None
    if not isinstance(names, list) or len(names) <= highest or not all(isinstance(name, str) for name in names):
        raise InputError(f"{spec.folder}/{spec.meta}: expected more than {highest} names in {spec.names_key!r}")
    return names


def _download(spec: Spec, place: Path, url: str, checksum: bool) -> None:
    """Fetch the archive into `place`; under its name only when it is whole and has the right MD5 sum."""
    address = url if url.endswith(spec.archive) else url.rstrip("/") + "/" + spec.archive
    target = place / spec.archive
    partial = target.with_name(target.name + ".partial")
    advice = f"fetch it by other means and put it at {target}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(address, timeout=_TIMEOUT) as answer, partial.open("wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
            expected = answer.headers.get("Content-Length")
        if expected is not None and partial.stat().st_size != int(expected):
            raise InputError(f"{address}: the connection broke off at {partial.stat().st_size} of {expected} bytes")
        _check(address, _md5(partial), spec.md5, checksum)
        os.replace(partial, target)
    except urllib.error.HTTPError as error:
        raise InputError(f"{address}: the server answers {error.code} {error.reason}; {advice}") from error
    except urllib.error.URLError as error:
        raise InputError(
            f"{address}: cannot be reached ({error.reason}); is there a network? Otherwise {advice}"
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f"{address}: the download failed: {error}; {advice}") from error
    finally:
        partial.unlink(missing_ok=True)
