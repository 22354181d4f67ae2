"""Writing a `.beton` file: streaming, atomic, and readable by stock FFCV.

Samples may come from an iterator of unknown length. The metadata table must lie before the payloads, so room
for a guess is left at the front; when it runs out the room is doubled, and the few payloads that lie in the
way are moved to the end of the file (24 bytes per sample in all, nothing beside the data itself). Nothing is
held in memory but 40 bytes per sample.

The file appears under its name only when it is whole: everything is written to `.NAME.partial` in the same
folder, flushed to the disk, and renamed, the manifest first. A second writer of the same file is refused;
what a killed one has left behind is overwritten by the next.

The manifest's `fingerprints` came later than format 1 did, as an entry that may be absent: this version reads
manifests without it, and versions that do not know it read manifests that have it, so the number stays. It is
`values`, base64 of one little-endian uint32 per sample, and `crc32`, the CRC-32 of what that encodes: for 1.28
million images 6.8 MB in the manifest and 5 MB in memory.

`names` is such an entry, too: what the inputs were called (`n01440764/n01440764_10026.JPEG`), one per sample, so that a
list of names can choose among them; `values` is base64 of a compressed JSON list, `crc32` that of the compressed list.

With masks (see `beton_format`) a file has one field more, a manifest `mask_fingerprints` of the same form, and
`sha256_payloads` covers each image's bytes followed by its mask's. Versions that do not know masks read such files as
if they had none; their `verify` finds another hash. Files without masks are what they were, to the byte.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from io import BufferedRandom, FileIO
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import beton_format as fmt
from pipelines import jpeg
from pipelines.errors import ConfigError, InputError, RunError

MANIFEST_FORMAT = 1
MIN_PAGE = 1 << 23
_FIRST_ROOM = 4096  # samples, when their number is not known beforehand
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file size limit",
}

Image = bytes | np.ndarray
Sample = tuple[Image, int | None] | tuple[Image, int | None, np.ndarray]
Manifest = dict[str, Any]


def manifest_path(path: str | Path) -> Path:
    """Where the manifest of a `.beton` file lies: `<file>.json` beside it."""
    path = Path(path)
    return path.with_name(path.name + ".json")


def write(
    path: str | Path,
    samples: Iterable[Sample],
    *,
    count: int | None = None,
    classes: list[str] | None = None,
    about: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    masks: bool = False,
    names: Sequence[str] | None = None,
    force: bool = False,
) -> Manifest:
    """Write (image, label) pairs, in their order, to `path` and its manifest to `<path>.json`.

    An image is JPEG bytes (stored as they are; the header is read, the pixels are not checked) or RGB pixels
    (H, W, 3) uint8, stored raw. A label is an int >= 0, or None for none (stored as -1). With `masks`, samples
    are (image, label, mask): mask (128, 128) bool, True where the image, stretched to this square, is foreground,
    which some of it must be.
    `count`, where known, saves moving data. `about` adds entries to the manifest; a callable is asked once all
    samples have been taken. `names`: what each sample is called, read once all samples have been taken. Returns the
    manifest.

    Raises ConfigError when `path` exists and `force` is not set, or its folder is missing; InputError for an
    image or label that cannot be stored, or when there are no samples; RunError when the disk is full. In
    each case what was at `path` is untouched and nothing is left behind.
    """
    path = Path(path)
    check_target(path, force=force)
    count = len(samples) if count is None and isinstance(samples, Sized) else count
    with _temporary(path) as file, _name_disk_errors(path, count) as progress:
        writer = _Writer(file, room=max(count or _FIRST_ROOM, 1), masks=masks, progress=progress)
        for image, label, *rest in samples:
            mask = _checked_mask(rest, masks, writer.count)
            writer.add(image, _checked_label(label, classes, writer.count), mask)
        if writer.count == 0:
            raise InputError(f"{path}: there are no samples to write")
        writer.finish()
        entries = dict(about() if callable(about) else about or {})
        manifest = _manifest(path, writer, classes, entries, names)
        _publish(path, file, manifest)
    return manifest


def check_target(path: str | Path, *, force: bool) -> None:
    """Raise ConfigError unless a `.beton` file may be written to `path`."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; expected the name of a file to write, such as {path / 'train.beton'}")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: its folder does not exist; create it first: mkdir -p {path.parent}")
    if path.exists() and not force:
        raise ConfigError(f"{path} exists already; choose another name, or overwrite it with --force")


def _checked_label(label: int | None, classes: list[str] | None, sample: int) -> int:
    if label is None:
        return -1
    if isinstance(label, (bool, float)) or not hasattr(label, "__index__"):
        raise InputError(f"sample {sample}: label {label!r}: expected a whole number or None")
    value = int(label)
    if not -1 <= value < 2**63:
        raise InputError(f"sample {sample}: label {value}: expected 0 or more, or -1 or None for no label")
    if classes is not None and value >= len(classes):
        raise InputError(f"sample {sample}: label {value}, but there are only {len(classes)} classes")
    return value


def _checked_mask(given: list[Any], expected: bool, sample: int) -> bytes | None:
    """A mask as it is stored."""
    if len(given) != int(expected):
        parts = "(image, label, mask)" if expected else "(image, label)"
        raise InputError(f"sample {sample}: expected {parts}, got {len(given) + 2} parts")
    if not expected:
        return None
    mask, side = given[0], fmt.MASK_SIDE
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (side, side):
        found = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise InputError(f"sample {sample}: expected a mask as bool ({side}, {side}), got {found}")
    if not mask.any():
        raise InputError(f"sample {sample}: expected a mask with some foreground, got none; of an unknown one, all")
    return np.packbits(mask).tobytes()


class _Writer:
    """Lays out the tables and payloads of one file with the fields `image` and `label`, and `mask` where asked for."""

    def __init__(self, file: BufferedRandom, room: int, masks: bool, progress: list[int]) -> None:
        self._file, self._progress = file, progress
        self._fields = [fmt.descriptor("image", fmt.IMAGE_TYPE), fmt.descriptor("label", fmt.INT_TYPE)]
        if masks:
            self._fields.append(fmt.mask_descriptor())
        self._masks, self._mask_offsets, self._mask_fingerprints = masks, array("Q"), array("I")
        self._row = fmt.row_type([int(field["type_id"]) for field in self._fields])
        self._head = fmt.HEADER.itemsize + len(self._fields) * fmt.DESCRIPTOR.itemsize
        self._room = room
        self._end = self._head + room * self._row.itemsize
        self._position = -1  # where the file stands, when known
        self._modes, self._heights, self._widths = array("B"), array("H"), array("H")
        self._labels, self._offsets, self._sizes = array("q"), array("Q"), array("Q")
        self._fingerprints = array("I")
        self.payload_hash = hashlib.sha256()
        self.page_size = MIN_PAGE
        self.tables_hash = ""

    @property
    def count(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> np.ndarray:
        return np.frombuffer(self._labels, np.int64)

    @property
    def shapes(self) -> np.ndarray:
        """(N, 2) heights and widths."""
        return np.stack([np.frombuffer(self._heights, np.uint16), np.frombuffer(self._widths, np.uint16)], axis=1)

    @property
    def fingerprints(self) -> bytes:
        """One little-endian uint32 per sample."""
        return np.frombuffer(self._fingerprints, np.uint32).astype("<u4").tobytes()

    @property
    def mask_fingerprints(self) -> bytes | None:
        """As `fingerprints`; None without masks."""
        packed = np.frombuffer(self._mask_fingerprints, np.uint32).astype("<u4").tobytes()
        return packed if self._masks else None

    @property
    def jpegs(self) -> int:
        return self._modes.count(fmt.JPEG)

    @property
    def size(self) -> int:
        return self._end

    def add(self, image: Image, label: int, mask: bytes | None) -> None:
        """Store one sample at the end."""
        payload, height, width, mode = _encode(image, self.count)
        if self.count == self._room:
            self._double_room()
        self.payload_hash.update(payload)
        self._fingerprints.append(fingerprint(payload))
        self._offsets.append(self._put(payload))
        self._sizes.append(len(payload))
        self._modes.append(mode)
        self._heights.append(height)
        self._widths.append(width)
        self._labels.append(label)
        if mask is not None:
            self.payload_hash.update(mask)
            self._mask_fingerprints.append(fingerprint(mask))
            self._mask_offsets.append(self._put(mask))
        self._progress[:] = [self.count, self._end]

    def _put(self, payload: bytes | memoryview) -> int:
        """Write a payload at the end of the file, within one page, and return its position.

        A payload longer than a page gets a page of the next power of two, on a multiple of that: so it lies
        within one page whatever larger page size the file ends with.
        """
        page = max(MIN_PAGE, 1 << (len(payload) - 1).bit_length())
        self.page_size = max(self.page_size, page)
        start = self._end
        if start // page != (start + len(payload) - 1) // page:
            start = -(-start // page) * page
        if start != self._position:
            self._file.seek(start)
        self._file.write(payload)
        self._end = self._position = start + len(payload)
        return start

    def _double_room(self) -> None:
        """Make room for twice the samples by moving the payloads at the front to the end."""
        self._room *= 2
        front = self._head + self._room * self._row.itemsize
        self._end = max(self._end, front)
        for offsets, sizes in ((self._offsets, self._sizes), (self._mask_offsets, [fmt.MASK_BYTES] * self.count)):
            for i in np.flatnonzero(np.array(offsets, np.int64) < front):
                self._file.seek(offsets[i])
                payload = self._file.read(sizes[i])
                self._position = -1
                offsets[i] = self._put(payload)

    def finish(self) -> None:
        """Write the tables; the header, which makes the file valid, last."""
        metadata = np.zeros(self.count, self._row)
        metadata["f0"]["mode"], metadata["f0"]["data_ptr"] = self._modes, self._offsets
        metadata["f0"]["height"], metadata["f0"]["width"] = self._heights, self._widths
        metadata["f1"] = self._labels
        table = np.zeros(self.count, fmt.ALLOCATION)
        table["sample_id"], table["ptr"], table["size"] = np.arange(self.count), self._offsets, self._sizes
        if self._masks:
            metadata["f2"] = self._mask_offsets
            rows = table.copy()
            rows["ptr"], rows["size"] = self._mask_offsets, fmt.MASK_BYTES
            table = np.concatenate([table, rows])
        header = np.zeros((), fmt.HEADER)
        header["version"], header["num_fields"] = fmt.VERSION, len(self._fields)
        header["page_size"], header["num_samples"] = self.page_size, self.count
        header["alloc_table_ptr"] = self._end
        head = b"".join(part.tobytes() for part in (header, *self._fields, metadata))
        self._file.seek(self._end)
        self._file.write(table.tobytes())
        self._end += table.nbytes
        self._file.truncate(self._end)
        self._file.seek(0)
        self._file.write(head)
        self.tables_hash = hash_of_tables(self._end, [head, table.tobytes()])


def _encode(image: Image, sample: int) -> tuple[bytes | memoryview, int, int, int]:
    """(payload, height, width, mode) of JPEG bytes or RGB pixels."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(f"sample {sample}: expected uint8 (H, W, 3), got {image.dtype} {image.shape}")
        height, width, payload, mode = *image.shape[:2], np.ascontiguousarray(image).reshape(-1).data, fmt.RAW
    else:
        try:
            header = jpeg.read_header(image)
        except ValueError as error:
            raise InputError(f"sample {sample}: {error}") from error
        height, width, payload, mode = header.height, header.width, image, fmt.JPEG  # type: ignore[assignment]
    if not (0 < height <= fmt.MAX_SIDE and 0 < width <= fmt.MAX_SIDE):
        raise InputError(f"sample {sample}: {width}x{height} pixels; a side may have 1 to {fmt.MAX_SIDE}")
    if len(payload) > fmt.MAX_PAGE:
        raise InputError(f"sample {sample}: {len(payload)} bytes; a .beton file holds at most {fmt.MAX_PAGE} per image")
    return payload, height, width, mode


def fingerprint(payload: bytes | memoryview | np.ndarray) -> int:
    """CRC-32, begun with its length, of bytes that are spread evenly over a payload: all of up to 6 kB, about one or
    two thousand of more, which takes microseconds.

    It tells a payload from any other that may have come into its place, whole or in part, without reading it twice
    as a hash would; it does not notice every changed byte. The distance between the bytes has no factor in common
    with 2 or 3, so that they lie in all channels and columns of raw images.
    """
    content = np.frombuffer(payload, np.uint8)
    distance = len(content) // 6144 * 6 + 1
    return zlib.crc32(content[::distance].tobytes(), len(content))


def hash_of_tables(file_size: int, parts: Iterable[Any]) -> str:
    """SHA-256 over the size of the file and every byte of it but the payloads, which come in any number of `parts`:
    cheap even for a huge file."""
    digest = hashlib.sha256(file_size.to_bytes(8, "little"))
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def hash_of_content(tables_hash: str, payload_hash: str) -> str:
    """The one hash that stands for a file: over the hash of its tables and that of its payloads."""
    return hashlib.sha256(f"{tables_hash} {payload_hash}".encode()).hexdigest()


def _manifest(
    path: Path, writer: _Writer, classes: list[str] | None, about: dict[str, Any], names: Sequence[str] | None
) -> Manifest:
    shapes, jpegs, count = writer.shapes, writer.jpegs, writer.count
    payload_hash = writer.payload_hash.hexdigest()
    manifest = {
        "format": MANIFEST_FORMAT,
        "file": path.name,
        "bytes": writer.size,
        "samples": count,
        "labelled": int((writer.labels >= 0).sum()),
        "classes": classes,
        "mode": "jpg" if jpegs == count else "raw" if jpegs == 0 else f"{jpegs} jpg, {count - jpegs} raw",
        "height": {"min": int(shapes[:, 0].min()), "max": int(shapes[:, 0].max())},
        "width": {"min": int(shapes[:, 1].min()), "max": int(shapes[:, 1].max())},
        **about,
        # Tables: size of the file and every byte before and after the payloads.
        # Payloads: their bytes, in sample order; a sample's image, then its mask.
        "sha256_tables": writer.tables_hash,
        "sha256_payloads": payload_hash,
        "content_hash": hash_of_content(writer.tables_hash, payload_hash),
        "fingerprints": _packed(writer.fingerprints),
    }
    if writer.mask_fingerprints is not None:
        manifest["mask_fingerprints"] = _packed(writer.mask_fingerprints)
    if names is not None:
        if len(names) != count:
            raise ValueError(f"{path}: {len(names)} names for {count} samples")
        manifest["names"] = _packed(zlib.compress(json.dumps(list(names), ensure_ascii=False).encode()))
    return manifest


def _packed(content: bytes) -> dict[str, Any]:
    return {"crc32": zlib.crc32(content), "values": base64.b64encode(content).decode("ascii")}


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[BufferedRandom]:
    """A new file `_partial(path)`, locked; removed when the block fails."""
    name = _partial(path)
    try:
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write into its folder: {error.strerror}") from error
    with BufferedRandom(FileIO(descriptor, "r+"), 1 << 20) as file:
        _lock(descriptor, name, path)
        try:
            file.truncate(0)
            yield file
        except BaseException:
            name.unlink(missing_ok=True)
            manifest_path(name).unlink(missing_ok=True)
            # What is still buffered must not be written again, and fail again, when the file is closed.
            file.raw.close()
            raise


def _lock(descriptor: int, name: Path, path: Path) -> None:
    busy = RunError(f"{path}: another process is writing it; wait for that, or choose another name")
    if importlib.util.find_spec("fcntl") is None:  # Windows: two writers of one file are not noticed there
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError:  # a network file system without locks
        return
    # Between open and lock another writer may have renamed this very file to its final name.
    if not (name.exists() and os.path.samestat(os.fstat(descriptor), name.stat())):
        raise busy


@contextlib.contextmanager
def _name_disk_errors(path: Path, count: int | None) -> Iterator[list[int]]:
    """Turn a full disk into a RunError; the list yielded is kept at [samples done, bytes written]."""
    progress = [0, 0]
    try:
        yield progress
    except OSError as error:
        if error.errno not in _FULL:
            raise RunError(f"{path}: writing stopped: {error}. What was there before is untouched") from error
        done, size = progress
        need = f"; all {count} samples need about {_size(size * count // done)}" if count and done else ""
        raise RunError(
            f"{path}: {_FULL[error.errno]} after {done} samples ({_size(size)}){need}."
            f" What was there before is untouched. Free some space, or write to another disk"
        ) from error


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _publish(path: Path, file: BufferedRandom, manifest: Manifest) -> None:
    """Flush both files to the disk and give them their names, the manifest first."""
    partial = _partial(path)
    file.flush()
    os.fsync(file.fileno())
    sidecar = manifest_path(partial)
    with sidecar.open("w", encoding="utf-8") as text:
        json.dump(manifest, text, indent=1, ensure_ascii=False)
        text.write("\n")
        text.flush()
        os.fsync(text.fileno())
    os.replace(sidecar, manifest_path(path))
    os.replace(partial, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the renames durable; not every system can open a folder, and there the renames are atomic all the
    same."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
