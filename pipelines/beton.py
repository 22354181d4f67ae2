"""`.beton` files: the one place where the project's images lie on disk.

    with beton.open("train.beton") as images:      # or several files, which then are one data set
        images.labels, images.heights, images.decode(7)

Opening checks all the tables of a file (`beton_format`), and against its manifest when there is one, without
reading the images. Reading is thread-safe. `write` (see `beton_write`) makes files that stock FFCV reads,
`open` reads files that stock FFCV wrote.

What the manifest covers: `sha256_tables` the size of the file and every byte before and after the payloads,
compared at every opening (61 MB for 1.28 million images); `fingerprints` a sample of the bytes of every
payload, compared whenever it is read, so that exchanged, overwritten or zeroed images are noticed before
anybody sees them under a wrong label; `sha256_payloads` every byte of the images, compared by `verify`, which
reads the whole file. Masks, where a file has them, are covered as images are. A file without manifest, and one
whose manifest was written before there were fingerprints, is read without that comparison: there, two images of
the same size that changed places are not noticed.

Files are read by position and not memory-mapped, because a map turns a failing disk, a lost server or a file
that is cut while it is open into the end of the process (SIGBUS). Here each of them is an InputError that names
file and sample. It costs 10 to 20 microseconds more than copying a mapped payload of 100 kB, a hundredth of what
decoding it takes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import beton_format as fmt
from pipelines import jpeg
from pipelines.beton_write import (
    MANIFEST_FORMAT,
    Manifest,
    Sample,
    fingerprint,
    hash_of_content,
    hash_of_tables,
    manifest_path,
    write,
)
from pipelines.errors import InputError

__all__ = [
    "HOW_TO_MASK",
    "Beton",
    "BetonSet",
    "Manifest",
    "Sample",
    "VerifyReport",
    "manifest_path",
    "open",
    "unpacked",
    "verify",
    "write",
]

PathLike = str | Path
_NO_FOREGROUND = "has no foreground: nothing of the image would be left"
HOW_TO_MASK = "relssl saliency DATA.beton OUT.beton, or relssl convert ... --masks DIR"


class Beton:
    """One open `.beton` file. N samples; sample ids are 0 ... N-1.

    Attributes: `path`; `labels` (N,) int64, -1 = none; `heights`, `widths` (N,) int32; `is_jpeg` (N,) bool,
    False = raw RGB pixels; `offsets`, `sizes` (N,) int64, where the payloads lie in the file; `data`, the bytes of
    the file, read when they are sliced; `manifest` without its fingerprints and names, `classes`, `content_hash`, None
    where the file has no manifest; `fingerprints` (N,) uint32, None where the manifest has none; `names`, what the
    images were called before they were converted, None where the manifest has none; `fields`, the names of its fields;
    `has_masks`, whether there is a mask to every image. Raises InputError when the file is absent, damaged, or does
    not belong to its manifest.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self.data = FileBytes(self.path)
        try:
            tables = fmt.read_tables(self.data, str(self.path))
            self.manifest = _read_manifest(self.path, self.data, tables)
            count, sidecar = len(tables.labels), manifest_path(self.path)
            self.fingerprints = _take_fingerprints(self.manifest, "fingerprints", count, sidecar)
            self._mask_fingerprints = _take_fingerprints(self.manifest, "mask_fingerprints", count, sidecar)
            self._packed_names = self.manifest.pop("names", None) if self.manifest else None
        except BaseException:
            self.data.close()
            raise
        self.labels, self.heights, self.widths = tables.labels, tables.heights, tables.widths
        self.is_jpeg, self.offsets, self.sizes = tables.is_jpeg, tables.offsets, tables.sizes
        self.fields, self._mask_offsets = tables.fields, tables.mask_offsets
        self.has_masks = self._mask_offsets is not None

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

    @property
    def names(self) -> list[str] | None:
        """Unpacked at each call: few readers want them, and those of a million images take 100 MB."""
        return None if self._packed_names is None else _unpacked_names(self._packed_names, len(self), self.path)

    def payload(self, i: int) -> np.ndarray:
        """The stored bytes of sample i, JPEG or raw by `is_jpeg[i]`: 1-D uint8, the caller's own.

        Raises InputError, naming file and sample, when they cannot be read or are not those that were written.
        """
        payload = self.read(i)
        if not self.is_as_written(i, payload):
            raise InputError(
                f"{self.path}: sample {i}: not the bytes that were written for it (by their fingerprint in"
                f" {manifest_path(self.path).name}): overwritten, or exchanged with another sample's"
            )
        return payload

    def read(self, i: int) -> np.ndarray:
        """As `payload`, but whatever bytes there are now."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path}: sample {i} of {len(self)}")
        start = int(self.offsets[i])
        return self.data.read(start, start + int(self.sizes[i]), f"sample {i}")

    def is_as_written(self, i: int, payload: np.ndarray) -> bool:
        """Whether bytes have the fingerprint of sample i; True where it has none."""
        return self.fingerprints is None or fingerprint(payload) == self.fingerprints[i]

    def packed_mask(self, i: int) -> np.ndarray:
        """The stored mask of sample i: (2048,) uint8, see `beton_format`. Raises InputError, naming file and sample,
        when there is none, or it cannot be read, is not the one that was written, or has no foreground."""
        mask = self.read_mask(i)
        if not self.is_mask_as_written(i, mask):
            raise InputError(
                f"{self.path}: sample {i}: its mask is not the one that was written for it (by its fingerprint in"
                f" {manifest_path(self.path).name}): overwritten, or exchanged with another sample's"
            )
        if not mask.any():
            raise InputError(f"{self.path}: sample {i}: its mask {_NO_FOREGROUND}")
        return mask

    def mask(self, i: int) -> np.ndarray:
        """What of sample i is foreground: (128, 128) bool over the image stretched to this square. Raises as
        `packed_mask`."""
        return unpacked(self.packed_mask(i))

    def read_mask(self, i: int) -> np.ndarray:
        """As `packed_mask`, but whatever bytes there are now."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path}: sample {i} of {len(self)}")
        if self._mask_offsets is None:
            raise InputError(f"{self.path} has no masks; make a file that has: {HOW_TO_MASK}")
        start = int(self._mask_offsets[i])
        return self.data.read(start, start + fmt.MASK_BYTES, f"the mask of sample {i}")

    def is_mask_as_written(self, i: int, mask: np.ndarray) -> bool:
        """As `is_as_written`, for the mask."""
        return self._mask_fingerprints is None or fingerprint(mask) == self._mask_fingerprints[i]

    def decode(self, i: int) -> np.ndarray:
        """Pixels of sample i: (H, W, 3) uint8 RGB. Raises InputError, naming file and sample, when
        damaged."""
        return self.pixels(i, self.payload(i))

    def pixels(self, i: int, payload: np.ndarray) -> np.ndarray:
        """`decode` of bytes that were read already."""
        shape = int(self.heights[i]), int(self.widths[i])
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
        """Close the file, as soon as no thread reads from it any more."""
        self.data.close()


def unpacked(masks: np.ndarray) -> np.ndarray:
    """Masks (..., 2048) uint8, as they are stored, as (..., 128, 128) bool."""
    return np.unpackbits(masks, axis=-1).reshape(*masks.shape[:-1], fmt.MASK_SIDE, fmt.MASK_SIDE).astype(bool)


class FileBytes:
    """The bytes of an open file by position, for any number of threads. `data[a:b]` is 1-D uint8, read anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: _File | None = _open_file(path)
        self._length = os.fstat(self._file.fileno()).st_size
        if not self._length:
            raise InputError(f"{path}: an empty file (0 bytes), expected a .beton file")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self._length)
        return self.read(start, max(start, stop), "its tables")

    def read(self, start: int, stop: int, what: str) -> np.ndarray:
        """Bytes [start, stop) in memory of their own. Raises InputError, naming `what` they are, when not all of
        them can be had."""
        file = self._file  # held here, it stays open until this is done
        if file is None:
            raise InputError(f"{self.path}: {what} asked for after the file was closed")
        content = np.empty(stop - start, np.uint8)
        rest = content.data
        while rest:
            try:
                got = _read_at(file.fileno(), rest, stop - len(rest))
            except OSError as error:
                raise InputError(f"{self.path}: {what} cannot be read: {error.strerror}") from error
            if not got:
                raise InputError(f"{self.path}: cut off since it was opened: {what} ends at byte {stop}")
            rest = rest[got:]
        return content

    def chunks(self, start: int, stop: int, length: int = 1 << 18) -> Iterator[np.ndarray]:
        """Bytes [start, stop), a few that stay in the processor's cache at a time."""
        for position in range(start, stop, length):
            yield self[position : min(position + length, stop)]

    def close(self) -> None:
        self._file = None


class _File(io.FileIO):
    """Closed when nobody holds it any more, and not before: the number of a closed file may already belong to the
    next one that was opened, and its bytes would be taken for this one's."""

    def __del__(self) -> None:
        self.close()


def _read_at(descriptor: int, into: memoryview, position: int) -> int:
    """Read from a position as many bytes as come at once; how many they were."""
    return os.preadv(descriptor, [into], position)


_SEEKING = threading.Lock()


def _seek_and_read(descriptor: int, into: memoryview, position: int) -> int:
    """`_read_at` one thread after the other, for systems that cannot read by position: Windows."""
    with _SEEKING:
        os.lseek(descriptor, position, os.SEEK_SET)
        content = os.read(descriptor, len(into))
    into[: len(content)] = content
    return len(content)


if not hasattr(os, "preadv"):
    _read_at = _seek_and_read


class BetonSet:
    """Several open files as one data set: sample id = offset of the file + id in the file.

    The same attributes and methods as `Beton`, with `paths` and `files` (the `Beton` objects) instead of
    `path` and `data`; `starts` (F+1,) int64 holds the offsets. `manifest` is that of a single file and None
    for several; `classes` are those of the files that have labels, which must agree. `content_hash` is None
    unless every file has one, and so are `names`. `has_masks` is True when every file has masks.
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
        self.has_masks = all(file.has_masks for file in files)

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

    @property
    def names(self) -> list[str] | None:
        parts = [file.names for file in self.files]
        return None if None in parts else [name for part in parts for name in part or []]

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

    def packed_mask(self, i: int) -> np.ndarray:
        """As `Beton.packed_mask`."""
        file, local = self.locate(i)
        return file.packed_mask(local)

    def mask(self, i: int) -> np.ndarray:
        """As `Beton.mask`."""
        return unpacked(self.packed_mask(i))

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
            try:
                _verify_sample(file, i, digest, report, decode=decode)
            except InputError as error:
                report.problems.append(str(error))
            if progress is not None:
                progress(i + 1, len(file))
        if file.manifest is not None:
            report.payloads_hashed = True
            what = "images and masks" if file.has_masks else "images"
            if digest.hexdigest() != file.manifest["sha256_payloads"]:
                report.problems.insert(0, f"{path}: the {what} are not those that were written (sha256 differs)")
    return report


def _verify_sample(file: Beton, i: int, digest: Any, report: VerifyReport, *, decode: bool) -> None:
    payload = file.read(i)
    digest.update(payload)
    if not file.is_as_written(i, payload):
        report.problems.append(f"{file.path}: sample {i}: not the bytes that were written for it")
    if file.has_masks:
        mask = file.read_mask(i)
        digest.update(mask)
        if not file.is_mask_as_written(i, mask):
            report.problems.append(f"{file.path}: sample {i}: its mask is not the one that was written for it")
        elif not mask.any():
            report.problems.append(f"{file.path}: sample {i}: its mask {_NO_FOREGROUND}")
    if decode:
        file.pixels(i, payload)
        report.decoded += 1


def _open_file(path: Path) -> _File:
    try:
        return _File(path, "rb")
    except IsADirectoryError:
        raise InputError(
            f"{path} is a folder, expected a .beton file; make one: relssl convert {path} OUT.beton"
        ) from None
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; make it: relssl convert SOURCE {path}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _read_manifest(path: Path, data: FileBytes, tables: fmt.Tables) -> Manifest | None:
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
    parts = itertools.chain(data.chunks(0, tables.head_end), data.chunks(tables.table_start, len(data)))
    found = hash_of_tables(len(data), parts)
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


def _take_fingerprints(manifest: Manifest | None, key: str, count: int, sidecar: Path) -> np.ndarray | None:
    """Remove the fingerprints from a manifest, decoded: (N,) uint32; None where there are none."""
    entry = manifest.pop(key, None) if manifest else None
    if entry is None:
        return None
    try:
        packed = _unpacked(entry)
        if len(packed) != 4 * count:
            raise ValueError("damaged")
    except (KeyError, TypeError, ValueError):
        raise _damaged(key.replace("_", " "), sidecar) from None
    return np.frombuffer(packed, "<u4").astype(np.uint32)


def _unpacked_names(entry: Any, count: int, path: Path) -> list[str]:
    try:
        names = json.loads(zlib.decompress(_unpacked(entry)))
        if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
            raise ValueError("damaged")
    except (KeyError, TypeError, ValueError, zlib.error):
        raise _damaged("names", manifest_path(path)) from None
    return names


def _unpacked(entry: Any) -> bytes:
    content = base64.b64decode(entry["values"])
    if zlib.crc32(content) != entry["crc32"]:
        raise ValueError("damaged")
    return content


def _damaged(what: str, sidecar: Path) -> InputError:
    return InputError(f"{sidecar}: its {what} are damaged; restore it, or delete the entry: it is optional")


def _common_classes(files: list[Beton]) -> list[str] | None:
    labelled = [file for file in files if file.classes is not None]
    for file in labelled[1:]:
        if file.classes != labelled[0].classes:
            raise InputError(
                f"{labelled[0].path} and {file.path} cannot be one data set: their classes differ"
                f" ({len(labelled[0].classes or [])} and {len(file.classes or [])} names)"
            )
    return labelled[0].classes if labelled else None
