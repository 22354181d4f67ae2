"""The `.beton` container, version 2, as bytes: its tables, how they lie, and what makes them valid.

    header | one descriptor per field | one metadata row per sample | payloads ... | allocation table

All integers are little-endian. A metadata row holds scalars directly and large values as a pointer (an
absolute position in the file); the allocation table, in any order, gives the size behind every pointer. A
payload never crosses a page boundary, because FFCV's page cache reads whole pages. The format is FFCV's (ffcv
1.0.2); the checks are ours, for FFCV itself has none and reads an interrupted or cut file as garbage.

A file may have a field `mask` beside `image` and `label`: what of each image is foreground, 128 x 128 bits in the
image's own coordinates, whatever its size and shape: bit (y, x) is the part of the image from y/128 to (y+1)/128 of
its height and x/128 to (x+1)/128 of its width. It is an array field of FFCV's, uint8 (2048,), rows of 16 bytes whose
first pixel is the highest bit (as `numpy.packbits` packs them).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipelines.errors import InputError

VERSION = 2
_LARGEST_VERSION = 255  # a larger one is the beginning of something else, such as two letters
JPEG, RAW = 0, 1  # the `mode` of an image
MAX_SIDE = 65535  # height and width are stored in 16 bits
MAX_PAGE = 1 << 31  # the page size is a power of two stored in 32 bits
MASK_SIDE = 128
MASK_BYTES = MASK_SIDE * MASK_SIDE // 8

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "u1", (16,)), ("arguments", "u1", (1024,))])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

INT_TYPE, IMAGE_TYPE, ARRAY_TYPE = 1, 2, 4
_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])
# FFCV's type number of a field -> its part of a metadata row.
FIELD_TYPES: dict[int, np.dtype] = {
    0: np.dtype("<f8"),
    INT_TYPE: np.dtype("<i8"),
    IMAGE_TYPE: _IMAGE,
    3: _BYTES,
    ARRAY_TYPE: np.dtype("<u8"),
    5: _BYTES,  # JSON
    6: np.dtype("<u8"),  # tensor
}


# The arguments of an array field: its shape, then the length of a JSON text that says the type of its elements.
_ARRAY_ARGUMENTS = np.dtype([("shape", "<u8", (32,)), ("type_length", "<u8")])


def row_type(type_ids: list[int]) -> np.dtype:
    """Type of a metadata row; its members are called f0, f1, ... in field order and aligned as C would."""
    return np.dtype([("", FIELD_TYPES[type_id]) for type_id in type_ids], align=True)


def descriptor(name: str, type_id: int) -> np.ndarray:
    """Descriptor (DESCRIPTOR scalar array) of a field without arguments; names have at most 16 ASCII
    characters."""
    encoded = name.encode("ascii")
    if not 0 < len(encoded) <= 16:
        raise ValueError(f"field name {name!r}: expected 1 to 16 ASCII characters")
    entry = np.zeros((), DESCRIPTOR)
    entry["type_id"] = type_id
    entry["name"][: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return entry


def mask_descriptor() -> np.ndarray:
    """Descriptor of the field `mask`."""
    element = json.dumps(np.dtype(np.uint8).descr).encode("ascii")
    arguments = np.zeros((), _ARRAY_ARGUMENTS)
    arguments["shape"][0], arguments["type_length"] = MASK_BYTES, len(element)
    content = arguments.tobytes() + element
    entry = descriptor("mask", ARRAY_TYPE)
    entry["arguments"][: len(content)] = np.frombuffer(content, np.uint8)
    return entry


@dataclass(frozen=True)
class Tables:
    """Everything of a `.beton` file but the payloads, checked. N samples, all arrays in sample order."""

    labels: np.ndarray  # (N,) int64, -1 = none
    heights: np.ndarray  # (N,) int32
    widths: np.ndarray  # (N,) int32
    is_jpeg: np.ndarray  # (N,) bool
    offsets: np.ndarray  # (N,) int64, position of the image's payload in the file
    sizes: np.ndarray  # (N,) int64, its bytes
    mask_offsets: np.ndarray | None  # (N,) int64, position of the mask's; None without masks
    fields: tuple[str, ...]
    page_size: int
    head_end: int  # header, descriptors and metadata are the bytes [0, head_end)
    table_start: int  # the allocation table is the bytes [table_start, end of file)


class Bytes(Protocol):
    """The bytes of a file: an array of them, or what reads them when it is sliced."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


def read_tables(data: Bytes, where: str) -> Tables:
    """Parse and check the tables of a whole file `data` (1-D uint8); InputError says what is wrong and where.

    Everything is checked that does not need the payloads to be read: version, table lengths, every pointer
    inside the payload region and known to the allocation table, no two payloads overlapping, image sizes, raw
    images complete.
    """
    header = _header(data, where)
    names, type_ids, entries = _fields(data, int(header["num_fields"]), where)
    rows = row_type(type_ids)
    count, head = int(header["num_samples"]), HEADER.itemsize + len(names) * DESCRIPTOR.itemsize
    head_end, table_start = head + count * rows.itemsize, int(header["alloc_table_ptr"])
    _check_regions(len(data), count, head_end, table_start, where)
    metadata = np.frombuffer(data[head:head_end], rows)
    allocations = _allocations(data, head_end, table_start, where)
    image = metadata[f"f{_image_field(names, type_ids, where)}"]
    label, mask = _label_field(names, type_ids), _mask_field(names, entries)
    offsets, sizes = _payloads("image", image["data_ptr"], allocations, where)
    tables = Tables(
        labels=np.full(count, -1, np.int64) if label is None else metadata[f"f{label}"].astype(np.int64),
        heights=image["height"].astype(np.int32),
        widths=image["width"].astype(np.int32),
        is_jpeg=image["mode"] == JPEG,
        offsets=offsets,
        sizes=sizes,
        mask_offsets=None if mask is None else _masks(metadata[f"f{mask}"], allocations, where),
        fields=tuple(names),
        page_size=int(header["page_size"]),
        head_end=head_end,
        table_start=table_start,
    )
    _check_images(tables, image["mode"], where)
    return tables


def _header(data: Bytes, where: str) -> np.void:
    if len(data) < HEADER.itemsize:
        raise InputError(
            f"{where}: {len(data)} bytes long, a .beton file begins with {HEADER.itemsize} bytes of header"
        )
    header = np.frombuffer(data[: HEADER.itemsize], HEADER)[0]
    if header["version"] > _LARGEST_VERSION:
        raise InputError(
            f"{where}: not a .beton file, whatever its name; make one of the images: relssl convert SOURCE OUT.beton"
        )
    if header["version"] != VERSION:
        raise InputError(f"{where}: not a .beton file of version {VERSION} (bytes 0-1 say {header['version']})")
    if header["alloc_table_ptr"] == 0:
        raise InputError(
            f"{where}: its writing was interrupted (no allocation table, bytes 16-23 are 0); convert again"
        )
    return header


def _fields(data: Bytes, count: int, where: str) -> tuple[list[str], list[int], np.ndarray]:
    """Names and types of the fields, and their descriptors."""
    end = HEADER.itemsize + count * DESCRIPTOR.itemsize
    if count == 0:
        raise InputError(f"{where}: damaged header: 0 fields")
    if end > len(data):
        raise InputError(f"{where}: cut off: {count} fields need {end} bytes, the file has {len(data)}")
    entries = np.frombuffer(data[HEADER.itemsize : end], DESCRIPTOR)
    names = [bytes(entry["name"]).split(b"\0")[0].decode("ascii", "replace") for entry in entries]
    type_ids = [int(entry["type_id"]) for entry in entries]
    for name, type_id in zip(names, type_ids, strict=True):
        if type_id not in FIELD_TYPES:
            raise InputError(f"{where}: field {name!r} has type {type_id}, expected one of {sorted(FIELD_TYPES)}")
    return names, type_ids, entries


def _image_field(names: list[str], type_ids: list[int], where: str) -> int:
    found = [i for i, type_id in enumerate(type_ids) if type_id == IMAGE_TYPE]
    named = [i for i in found if names[i] == "image"]
    if len(named) == 1 or len(found) == 1:
        return (named or found)[0]
    raise InputError(f"{where}: expected one RGB image field, or one called 'image'; the fields are {', '.join(names)}")


def _label_field(names: list[str], type_ids: list[int]) -> int | None:
    found = [i for i, type_id in enumerate(type_ids) if type_id == INT_TYPE]
    named = [i for i in found if names[i] == "label"]
    if named:
        return named[0]
    return found[0] if len(found) == 1 else None


def _mask_field(names: list[str], entries: np.ndarray) -> int | None:
    """The field `mask`; None where there is none, or one that means something else."""
    found = [i for i, name in enumerate(names) if name == "mask"]
    return found[0] if len(found) == 1 and entries[found[0]].tobytes() == mask_descriptor().tobytes() else None


def _check_regions(file_size: int, count: int, head_end: int, table_start: int, where: str) -> None:
    if count == 0:
        raise InputError(f"{where}: holds no samples")
    if head_end > file_size:
        raise InputError(f"{where}: cut off: {count} samples need {head_end} bytes of tables, the file has {file_size}")
    if table_start > file_size:
        raise InputError(f"{where}: cut off: allocation table at byte {table_start}, the file ends at {file_size}")
    if table_start < head_end:
        raise InputError(f"{where}: damaged header: allocation table at byte {table_start}, among the other tables")
    rows, rest = divmod(file_size - table_start, ALLOCATION.itemsize)
    if rest or rows < count:
        raise InputError(f"{where}: cut off: allocation table of {rows} rows and {rest} bytes, expected {count} rows")


def _allocations(data: Bytes, low: int, high: int, where: str) -> np.ndarray:
    """The allocation table, checked and sorted by position."""
    table = np.frombuffer(data[high:], ALLOCATION)
    order = np.argsort(table["ptr"], kind="stable")
    starts, sizes = table["ptr"][order], table["size"][order]
    room = np.uint64(high) - np.minimum(starts, np.uint64(high))
    bad = np.flatnonzero((starts < low) | (sizes > room))
    if len(bad):
        row = order[bad[0]]
        raise InputError(
            f"{where}: allocation row {row}: {table['size'][row]} bytes at {table['ptr'][row]}"
            f" are outside the payload region {low} to {high}"
        )
    overlap = np.flatnonzero(starts[:-1] + sizes[:-1] > starts[1:])
    if len(overlap):
        raise InputError(f"{where}: allocation table: two payloads overlap at byte {starts[overlap[0] + 1]}")
    return table[order]


def _payloads(what: str, pointers: np.ndarray, allocations: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Offset and size of what every sample's pointer points to."""
    starts = allocations["ptr"]
    found = np.minimum(np.searchsorted(starts, pointers), len(starts) - 1)
    owner = allocations["sample_id"][found]
    lost = np.flatnonzero((starts[found] != pointers) | (owner != np.arange(len(pointers), dtype=np.uint64)))
    if len(lost):
        raise InputError(
            f"{where}: sample {lost[0]}: {what} at byte {pointers[lost[0]]}, which the allocation table does"
            f" not list for it ({len(lost)} such samples)"
        )
    return starts[found].astype(np.int64), allocations["size"][found].astype(np.int64)


def _masks(pointers: np.ndarray, allocations: np.ndarray, where: str) -> np.ndarray:
    """Offset of every sample's mask."""
    offsets, sizes = _payloads("mask", pointers, allocations, where)
    bad = np.flatnonzero(sizes != MASK_BYTES)
    if len(bad):
        raise InputError(
            f"{where}: sample {bad[0]}: a mask of {sizes[bad[0]]} bytes, expected {MASK_BYTES}"
            f" ({len(bad)} such samples)"
        )
    return offsets


def _check_images(tables: Tables, modes: np.ndarray, where: str) -> None:
    area = tables.heights.astype(np.int64) * tables.widths
    checks = (
        (modes > RAW, "unknown image mode"),
        (area == 0, "image without pixels"),
        (tables.sizes == 0, "image of 0 bytes"),
        (~tables.is_jpeg & (tables.sizes != 3 * area), "raw image whose bytes are not height x width x 3"),
    )
    for bad, what in checks:
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise InputError(
                f"{where}: sample {i}: {what} (mode {modes[i]}, {tables.widths[i]}x{tables.heights[i]},"
                f" {tables.sizes[i]} bytes); {int(bad.sum())} such samples"
            )
