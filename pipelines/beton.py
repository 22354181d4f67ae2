"""`.beton` files: the one place where the project's images lie on disk.

    with beton.open("train.beton") as images:      # or several files, which then are one data set
        images.labels, images.heights, images.decode(7)

A file is memory-mapped and read-only; opening checks all its tables (`beton_format`), and against its
manifest when there is one, without reading the images. Reading is thread-safe. `write` (see `beton_write`)
makes files that stock FFCV reads, `open` reads files that stock FFCV wrote.

What the manifest's hashes cover: `sha256_tables` the size of the file and every byte before and after the
payloads, compared at every opening (31 MB for 1.28 million images); `sha256_payloads` the images themselves,
compared by `verify`, which reads the whole file. A file that is cut after it was opened is noticed by
`payload` as long as the cut came before the call; a cut during the access itself ends the process (SIGBUS),
as with every memory map.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import beton_format as fmt
from pipelines import jpeg
from pipelines.beton_write import (
    MANIFEST_FORMAT,
    Manifest,
    hash_of_content,
    hash_of_tables,
    manifest_path,
    write,
)
from pipelines.errors import InputError

__all__ = ["Beton", "BetonSet", "Manifest", "VerifyReport", "manifest_path", "open", "verify", "write"]

PathLike = str | Path


class Beton:
    """One open `.beton` file. N samples; sample ids are 0 ... N-1.

    Attributes: `path`; `labels` (N,) int64, -1 = none; `heights`, `widths` (N,) int32; `is_jpeg` (N,) bool,
    False = raw RGB pixels; `offsets`, `sizes` (N,) int64, where the payloads lie in `data`; `data`, the file
    as 1-D uint8; `manifest`, `classes`, `content_hash`, None where the file has no manifest; `fields`, the
    names of its fields. Raises InputError when the file is absent, damaged, or does not belong to its
    manifest.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self._file = _open_file(self.path)
        try:
            self.data = _map(self._file, self.path)
            tables = fmt.read_tables(self.data, str(self.path))
            self.manifest = _read_manifest(self.path, self.data, tables)
        except BaseException:
            self._file.close()
            raise
        self.labels, self.heights, self.widths = tables.labels, tables.heights, tables.widths
        self.is_jpeg, self.offsets, self.sizes = tables.is_jpeg, tables.offsets, tables.sizes
        self.fields = tables.fields

    def __len__(self) -> int:
        return len(self.labels)

    def __enter__(self) -> Beton:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def classes(self) -> list[str] | None:
        return self.manifest["classes"] if self.manifest else None

    @property
    def content_hash(self) -> str | None:
        return self.manifest["content_hash"] if self.manifest else None

    def payload(self, i: int) -> np.ndarray:
        """The stored bytes of sample i: 1-D uint8, read-only, not copied; JPEG or raw by `is_jpeg[i]`."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path}: sample {i} of {len(self)}")
        if self._file.closed:
            raise InputError(f"{self.path}: sample {i} asked for after the file was closed")
        start, stop = int(self.offsets[i]), int(self.offsets[i] + self.sizes[i])
        # Touching a page that no longer exists kills the process; a look at the size costs a microsecond.
        if os.fstat(self._file.fileno()).st_size < stop:
            raise InputError(f"{self.path}: cut off since it was opened: sample {i} ends at byte {stop}")
        return self.data[start:stop]

    def decode(self, i: int) -> np.ndarray:
        """Pixels of sample i: (H, W, 3) uint8 RGB. Raises InputError, naming file and sample, when
        damaged."""
        payload, shape = self.payload(i), (int(self.heights[i]), int(self.widths[i]))
        if not self.is_jpeg[i]:
            return payload.reshape(*shape, 3)
        try:
            header = jpeg.read_header(payload)
            if (header.height, header.width) != shape:
                raise ValueError(f"JPEG of {header.height}x{header.width} pixels, the table says {shape[0]}x{shape[1]}")
            return jpeg.decode(payload)
        except ValueError as error:
            raise InputError(f"{self.path}: sample {i}: {error}") from error

    def close(self) -> None:
        """Close the file. Views that `payload` gave out stay valid: the map lives as long as they do."""
        self._file.close()


class BetonSet:
    """Several open files as one data set: sample id = offset of the file + id in the file.

    The same attributes and methods as `Beton`, with `paths` and `files` (the `Beton` objects) instead of
    `path` and `data`; `starts` (F+1,) int64 holds the offsets. `manifest` is that of a single file and None
    for several; `classes` are those of the files that have labels, which must agree. `content_hash` is None
    unless every file has one.
    """

    def __init__(self, files: Sequence[Beton]) -> None:
        if not files:
            raise InputError("expected at least one .beton file, got none")
        self.files = list(files)
        self.paths = [file.path for file in files]
        self.starts = np.cumsum([0, *map(len, files)], dtype=np.int64)
        self.labels = np.concatenate([file.labels for file in files])
        self.heights = np.concatenate([file.heights for file in files])
        self.widths = np.concatenate([file.widths for file in files])
        self.is_jpeg = np.concatenate([file.is_jpeg for file in files])
        self.sizes = np.concatenate([file.sizes for file in files])
        self.classes = _common_classes(self.files)

    def __len__(self) -> int:
        return len(self.labels)

    def __enter__(self) -> BetonSet:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def manifest(self) -> Manifest | None:
        return self.files[0].manifest if len(self.files) == 1 else None

    @property
    def content_hash(self) -> str | None:
        hashes = [file.content_hash for file in self.files]
        if len(hashes) == 1:
            return hashes[0]
        known = [value for value in hashes if value is not None]
        return hashlib.sha256(" ".join(known).encode()).hexdigest() if len(known) == len(hashes) else None

    def locate(self, i: int) -> tuple[Beton, int]:
        """The file that holds sample i, and its id there."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        which = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.files[which], int(i - self.starts[which])

    def payload(self, i: int) -> np.ndarray:
        """As `Beton.payload`."""
        file, local = self.locate(i)
        return file.payload(local)

    def decode(self, i: int) -> np.ndarray:
        """As `Beton.decode`."""
        file, local = self.locate(i)
        return file.decode(local)

    def close(self) -> None:
        """Close every file."""
        for file in self.files:
            file.close()


def open(paths: PathLike | Sequence[PathLike]) -> BetonSet:
    """Open one `.beton` file, or several as one data set. Raises InputError, naming the file that is
    refused."""
    names = [paths] if isinstance(paths, (str, Path)) else list(paths)
    files: list[Beton] = []
    try:
        files.extend(map(Beton, names))
        return BetonSet(files)
    except BaseException:
        for file in files:
            file.close()
        raise


@dataclass
class VerifyReport:
    """What `verify` found. `problems` is empty for a sound file; each entry says what is wrong and where."""

    path: Path
    samples: int = 0
    bytes: int = 0
    has_manifest: bool = False
    payloads_hashed: bool = False
    decoded: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(path: PathLike, *, decode: bool = False, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Read the whole of a file and compare it with its manifest; with `decode`, decode every image too.

    A file that cannot be opened at all is a problem in the report, not an exception. `progress(done, total)`
    is called after every sample.
    """
    report = VerifyReport(Path(path))
    try:
        file = Beton(path)
    except InputError as error:
        report.problems.append(str(error))
        return report
    with file:
        report.samples, report.bytes, report.has_manifest = (
            len(file),
            len(file.data),
            file.manifest is not None,
        )
        digest = hashlib.sha256()
        for i in range(len(file)):
            digest.update(file.payload(i).data)
            if decode:
                _try_decode(file, i, report)
            if progress is not None:
                progress(i + 1, len(file))
        if file.manifest is not None:
            report.payloads_hashed = True
            if digest.hexdigest() != file.manifest["sha256_payloads"]:
                report.problems.append(f"{path}: the images are not those that were written (sha256 differs)")
    return report


def _try_decode(file: Beton, i: int, report: VerifyReport) -> None:
    try:
        file.decode(i)
        report.decoded += 1
    except InputError as error:
        report.problems.append(str(error))


def _open_file(path: Path) -> Any:
    try:
        return path.open("rb")
    except IsADirectoryError:
        raise InputError(
            f"{path} is a folder, expected a .beton file; make one: relssl convert {path} OUT.beton"
        ) from None
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; make it: relssl convert SOURCE {path}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _map(file: Any, path: Path) -> np.ndarray:
    try:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except ValueError:
        raise InputError(f"{path}: an empty file (0 bytes), expected a .beton file") from None


def _read_manifest(path: Path, data: np.ndarray, tables: fmt.Tables) -> Manifest | None:
    """The manifest beside the file, compared with it; None when there is none."""
    sidecar = manifest_path(path)
    try:
        manifest = json.loads(sidecar.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{sidecar}: cannot be read as JSON ({error}); restore it, or delete it: it is optional"
        ) from error
    _check_manifest(manifest, sidecar)
    found = hash_of_tables(len(data), data[: tables.head_end].data, data[tables.table_start :].data)
    if found != manifest["sha256_tables"]:
        raise InputError(
            f"{path} is not the file that {sidecar.name} describes (written: {manifest['samples']} samples,"
            f" {manifest['bytes']} bytes; found: {len(tables.labels)} samples, {len(data)} bytes): one of"
            f" the two was damaged or replaced. Convert again, or delete {sidecar.name} to do without it"
        )
    return manifest


def _check_manifest(manifest: Any, sidecar: Path) -> None:
    needed = {
        "format": int,
        "samples": int,
        "bytes": int,
        "classes": (list, type(None)),
        "sha256_tables": str,
        "sha256_payloads": str,
        "content_hash": str,
    }
    if not isinstance(manifest, dict):
        raise InputError(f"{sidecar}: expected a JSON object; restore it, or delete it: it is optional")
    for key, kind in needed.items():
        if not isinstance(manifest.get(key), kind):  # type: ignore[arg-type]
            raise InputError(f"{sidecar}: entry {key!r} is missing or of the wrong type; restore it, or delete it")
    if manifest["format"] != MANIFEST_FORMAT:
        raise InputError(f"{sidecar}: format {manifest['format']}, this version reads {MANIFEST_FORMAT}; convert again")
    if manifest["content_hash"] != hash_of_content(manifest["sha256_tables"], manifest["sha256_payloads"]):
        raise InputError(f"{sidecar}: its content hash does not follow from its other hashes; convert again")


def _common_classes(files: list[Beton]) -> list[str] | None:
    labelled = [file for file in files if file.classes is not None]
    for file in labelled[1:]:
        if file.classes != labelled[0].classes:
            raise InputError(
                f"{labelled[0].path} and {file.path} cannot be one data set: their classes differ"
                f" ({len(labelled[0].classes or [])} and {len(file.classes or [])} names)"
            )
    return labelled[0].classes if labelled else None
