"""The `.beton` container: what goes in comes out, and nothing damaged is read as if it were sound."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines import beton, beton_write
from pipelines import beton_format as fmt
from pipelines.errors import ConfigError, InputError, RelsslError, RunError
from pipelines.subset import Subset


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def jpeg_of(pixels: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", **options)
    return stream.getvalue()


def decoded(image: np.ndarray | bytes) -> np.ndarray:
    return image if isinstance(image, np.ndarray) else np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


SAMPLES: list[tuple[np.ndarray | bytes, int | None]] = [
    (picture(5, 7), 3),
    (jpeg_of(picture(9, 4)), None),
    (jpeg_of(picture(12, 20), progressive=True), 0),
    (picture(1, 1), 2),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A sound file of `SAMPLES`, with its manifest."""
    beton.write(tmp_path / "a.beton", SAMPLES, classes=["a", "b", "c", "d"])
    return tmp_path / "a.beton"


def leftovers(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# -- round trip

images = st.one_of(
    st.builds(picture, st.integers(1, 40), st.integers(1, 40), st.integers(0, 99)),
    st.builds(picture, st.integers(1, 40), st.integers(1, 40), st.integers(0, 99)).map(jpeg_of),
)
labels = st.one_of(st.none(), st.integers(0, 2**63 - 1))


@given(st.lists(st.tuples(images, labels), min_size=1, max_size=12), st.booleans())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    samples: list[tuple[np.ndarray | bytes, int | None]],
    known: bool,
) -> None:
    path = tmp_path_factory.mktemp("round") / "a.beton"
    manifest = beton.write(path, samples if known else iter(samples))
    with beton.open(path) as read:
        assert len(read) == len(samples) == manifest["samples"]
        for i, (image, label) in enumerate(samples):
            pixels = decoded(image)
            assert np.array_equal(read.decode(i), pixels)
            assert read.labels[i] == (-1 if label is None else label)
            assert (read.heights[i], read.widths[i]) == pixels.shape[:2]
            assert read.is_jpeg[i] == isinstance(image, bytes)
            assert isinstance(image, np.ndarray) or read.payload(i).tobytes() == image
    assert beton.verify(path, decode=True).ok


def test_dtypes_are_those_the_engines_rely_on(path: Path) -> None:
    with beton.open(path) as read:
        kinds = [array.dtype for array in (read.labels, read.heights, read.widths, read.is_jpeg)]
        assert kinds == [np.int64, np.int32, np.int32, np.bool_]
        assert read.payload(0).dtype == np.uint8
        assert read.payload(0).flags.owndata  # a tensor may be made of it without another copy
        assert read.payload(0).flags.writeable
        assert read.classes == ["a", "b", "c", "d"]


@pytest.mark.parametrize("side", [1, 30])
def test_an_iterator_longer_than_the_room_left_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    monkeypatch.setattr(beton_write, "_FIRST_ROOM", 2)
    samples = [(picture(side, 1 + i % 3, i), i) for i in range(300)]
    beton.write(tmp_path / "a.beton", iter(samples))
    beton.write(tmp_path / "b.beton", samples)
    with beton.open(tmp_path / "a.beton") as a, beton.open(tmp_path / "b.beton") as b:
        assert np.array_equal(a.labels, np.arange(300))
        for i, (image, _) in enumerate(samples):
            assert np.array_equal(a.decode(i), image)
            assert np.array_equal(b.decode(i), image)
        hashes = [file.manifest["sha256_payloads"] for file in (a, b) if file.manifest]
    assert hashes[0] == hashes[1]  # over the images in sample order, wherever they lie


def test_no_payload_crosses_a_page(tmp_path: Path) -> None:
    sizes = [900, 1500, 1800, 3000, 10, 1700]  # 2.4, 6.8, 9.7 and 27 MB: pages of 8, 16 and 32 MiB
    beton.write(tmp_path / "a.beton", ((np.zeros((side, side, 3), np.uint8), 0) for side in sizes))
    page = int(np.fromfile(tmp_path / "a.beton", fmt.HEADER, 1)["page_size"][0])
    assert page == 1 << 25
    with beton.Beton(tmp_path / "a.beton") as read:
        assert np.array_equal(read.offsets // page, (read.offsets + read.sizes - 1) // page)


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        beton.write(tmp_path / name / "a.beton", SAMPLES)
    for name in ("a.beton", "a.beton.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_many_threads_read_the_same_pixels(tmp_path: Path) -> None:
    samples = [(jpeg_of(picture(16, 16, i)), i) for i in range(50)]
    beton.write(tmp_path / "a.beton", samples)
    with beton.open(tmp_path / "a.beton") as read, ThreadPoolExecutor(8) as pool:
        for i, pixels in zip([*range(50)] * 4, pool.map(read.decode, [*range(50)] * 4), strict=True):
            assert np.array_equal(pixels, decoded(samples[i][0]))


# -- several files as one


def test_several_files_are_one_data_set(tmp_path: Path, path: Path) -> None:
    beton.write(tmp_path / "b.beton", [(picture(3, 3, 1), None), (picture(2, 2, 2), None)])
    with beton.open([path, tmp_path / "b.beton"]) as both:
        assert len(both) == 6
        assert both.paths == [path, tmp_path / "b.beton"]
        assert both.labels.tolist() == [3, -1, 0, 2, -1, -1]
        assert np.array_equal(both.decode(5), picture(2, 2, 2))
        assert np.array_equal(both.decode(3), SAMPLES[3][0])
        assert both.classes == ["a", "b", "c", "d"]
        assert both.content_hash not in (None, both.files[0].content_hash, both.files[1].content_hash)
        for outside in (6, -1):
            with pytest.raises(IndexError):
                both.payload(outside)


def test_files_whose_classes_differ_are_not_joined(tmp_path: Path, path: Path) -> None:
    beton.write(tmp_path / "b.beton", [(picture(3, 3), 0)], classes=["b", "a"])
    with pytest.raises(InputError, match="their classes differ"):
        beton.open([path, tmp_path / "b.beton"])
    with pytest.raises(InputError, match="at least one"):
        beton.open([])


# -- damage


def edit(path: Path, position: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def table_start(path: Path) -> int:
    return int(np.fromfile(path, fmt.HEADER, 1)["alloc_table_ptr"][0])


ROWS = fmt.HEADER.itemsize + 2 * fmt.DESCRIPTOR.itemsize  # where the metadata rows begin
u8 = (2**40).to_bytes(8, "little")

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: os.truncate(p, 0), "an empty file"),
    "ten bytes": (lambda p: os.truncate(p, 10), "10 bytes long"),
    "only the header": (lambda p: os.truncate(p, 24), "cut off: 2 fields need"),
    "half": (lambda p: os.truncate(p, p.stat().st_size // 2), "cut off"),
    "tail of the table": (
        lambda p: os.truncate(p, p.stat().st_size - 7),
        "cut off: allocation table of 3 rows",
    ),
    "a row of the table": (
        lambda p: os.truncate(p, p.stat().st_size - 24),
        "allocation table of 3 rows and 0 bytes",
    ),
    "something behind": (lambda p: p.open("ab").write(b"x") and None, "4 rows and 1 bytes"),
    "another version": (lambda p: edit(p, 0, b"\x03\0"), "not a .beton file of version 2"),
    "a JPEG": (lambda p: p.write_bytes(jpeg_of(picture(9, 9))), "not a .beton file, whatever its name; make one"),
    "a table": (lambda p: p.write_text("train/0.jpg,3\ntrain/1.jpg,4\n"), "make one of the images: relssl convert"),
    "interrupted": (lambda p: edit(p, 16, bytes(8)), "its writing was interrupted"),
    "table beyond the file": (lambda p: edit(p, 16, u8), "allocation table at byte 1099511627776"),
    "table among the others": (lambda p: edit(p, 16, b"\1" + bytes(7)), "among the other tables"),
    "no samples": (lambda p: edit(p, 8, bytes(8)), "holds no samples"),
    "more samples": (lambda p: edit(p, 8, b"\xff\xff"), "65535 samples need"),
    "no fields": (lambda p: edit(p, 2, bytes(2)), "0 fields"),
    "unknown field": (lambda p: edit(p, fmt.HEADER.itemsize, b"\xff"), "field 'image' has type 255"),
    "no image field": (lambda p: edit(p, fmt.HEADER.itemsize, b"\x01"), "expected one RGB image field"),
    "mode": (lambda p: edit(p, ROWS, b"\x07"), "sample 0: unknown image mode"),
    "width 0": (lambda p: edit(p, ROWS + 1, bytes(2)), "sample 0: image without pixels"),
    "raw size": (lambda p: edit(p, ROWS + 1, b"\x09"), "sample 0: raw image whose bytes are not"),
    "pointer": (lambda p: edit(p, ROWS + 5, u8), "sample 0: image at byte 1099511627776"),
    "pointer in the table": (
        lambda p: edit(p, table_start(p) + 24 + 8, u8),
        "allocation row 1: .* outside the payload",
    ),
    "size in the table": (
        lambda p: edit(p, table_start(p) + 16, u8),
        "allocation row 0: .* outside the payload",
    ),
    "overlap": (lambda p: edit(p, table_start(p) + 16, b"\xff"), "two payloads overlap"),
    "owner in the table": (
        lambda p: edit(p, table_start(p), b"\1"),
        "sample 0: .* allocation table does not list",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_refused_with_the_place(path: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    beton.manifest_path(path).unlink()  # whose hash would notice first
    damage(path)
    with pytest.raises(InputError, match=message) as refused:
        beton.open(path)
    assert str(path) in str(refused.value)
    report = beton.verify(path)
    assert not report.ok
    assert report.problems == [str(refused.value)]


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; make it: relssl convert"):
        beton.open(tmp_path / "absent.beton")
    with pytest.raises(InputError, match="is a folder"):
        beton.open(tmp_path)


def test_the_allocation_table_may_be_in_any_order(path: Path) -> None:
    beton.manifest_path(path).unlink()
    start = table_start(path)
    rows = np.fromfile(path, fmt.ALLOCATION, offset=start)
    edit(path, start, rows[[2, 0, 3, 1]].tobytes())
    with beton.open(path) as read:
        for i, (image, _) in enumerate(SAMPLES):
            assert np.array_equal(read.decode(i), decoded(image))


def facts(read: beton.BetonSet) -> list[list[int]]:
    return [array.tolist() for array in (read.labels, read.heights, read.widths, read.is_jpeg, read.sizes)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    beton.write(folder / "a.beton", SAMPLES)
    return folder / "a.beton"


@given(st.data())
def test_a_flipped_byte_is_noticed_where_the_manifest_covers_it(sound: Path, data: st.DataObject) -> None:
    content = bytearray(sound.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path = sound.with_name("flipped.beton")
    path.write_bytes(content)
    beton.manifest_path(path).write_bytes(beton.manifest_path(sound).read_bytes())
    with beton.open(sound) as original:
        first = int(original.files[0].offsets.min())
        in_payload = first <= position < table_start(sound)
    # Every byte is either in the tables, which opening compares, or in a payload, which verify compares.
    if in_payload:
        report = beton.verify(path)
        assert not report.ok
        assert "sha256 differs" in report.problems[0]
        with beton.open(path) as read, beton.open(sound) as original:
            assert facts(read) == facts(original)
    else:
        with pytest.raises(InputError):
            beton.open(path)


@given(st.data())
def test_without_a_manifest_damage_is_an_input_error_or_harmless(sound: Path, data: st.DataObject) -> None:
    content = bytearray(sound.read_bytes())
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = sound.with_name("damaged.beton")
    path.write_bytes(content)
    try:
        with beton.open(path) as read:
            for i in range(len(read)):
                assert read.decode(i).shape == (read.heights[i], read.widths[i], 3)
    except InputError:
        pass
    beton.verify(path, decode=True)


@given(st.data())
def test_a_cut_file_is_never_opened(sound: Path, data: st.DataObject) -> None:
    content = sound.read_bytes()
    path = sound.with_name("cut.beton")
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(InputError):
        beton.open(path)


def test_a_file_that_shrinks_after_opening_does_not_give_garbage(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    beton.write(path, [(picture(64, 64, i), i) for i in range(3)])
    with beton.open(path) as read:
        os.truncate(path, int(read.files[0].offsets[1]) + 100)
        assert np.array_equal(read.decode(0), picture(64, 64, 0))
        with pytest.raises(InputError, match="cut off since it was opened: sample 1"):
            read.decode(1)


def test_bytes_may_come_in_pieces(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do from network disks, and of more than two gigabytes at once."""
    read_at = beton._read_at
    monkeypatch.setattr(beton, "_read_at", lambda file, into, position: read_at(file, into[:7], position))
    with beton.open(path) as read:
        for i, (image, _) in enumerate(SAMPLES):
            assert np.array_equal(read.decode(i), decoded(image))


def test_a_disk_that_fails_costs_the_sample_and_not_the_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with beton.open(path) as read:
        monkeypatch.setattr(beton, "_read_at", fails)
        with pytest.raises(InputError, match=r"a\.beton: sample 2 cannot be read: Input/output error"):
            read.payload(2)
    with pytest.raises(InputError, match=r"a\.beton: its tables cannot be read: Input/output error"):
        beton.open(path)


def test_reading_where_the_system_cannot_read_by_position(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beton, "_read_at", beton._seek_and_read)
    with beton.open(path) as read, ThreadPoolExecutor(8) as pool:
        for i, pixels in zip([*range(4)] * 50, pool.map(read.decode, [*range(4)] * 50), strict=True):
            assert np.array_equal(pixels, decoded(SAMPLES[i][0]))
        os.truncate(path, int(read.files[0].offsets[2]))
        with pytest.raises(InputError, match="cut off since it was opened: sample 2"):
            read.payload(2)


def test_closing_in_the_middle_of_a_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is closed after that: until then nothing else may have its number."""
    reading, go_on, numbers = threading.Event(), threading.Event(), []
    read_at = beton._read_at

    def waits(file: int, into: memoryview, position: int) -> int:
        numbers.append(file)
        reading.set()
        go_on.wait(20)
        return read_at(file, into, position)

    read = beton.open(path)
    monkeypatch.setattr(beton, "_read_at", waits)
    with ThreadPoolExecutor(1) as pool:
        payload = pool.submit(read.payload, 0)
        reading.wait(20)
        read.close()
        with path.with_suffix(".other").open("wb") as other:
            assert other.fileno() != numbers[0]
            other.write(b"x" * 10_000)
            go_on.set()
            assert payload.result().tobytes() == np.asarray(SAMPLES[0][0]).tobytes()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(numbers[0])


@pytest.mark.filterwarnings("error")
def test_files_that_are_refused_do_not_stay_open(path: Path) -> None:
    def next_number() -> int:
        with path.open("rb") as file:
            return file.fileno()

    free = next_number()
    beton.open(path).close()
    os.truncate(path, path.stat().st_size - 1)
    for damage in (lambda: os.truncate(path, path.stat().st_size - 1), lambda: os.truncate(path, 0)):
        damage()
        with pytest.raises(InputError):
            beton.open([path])
    assert next_number() == free


def test_reading_after_close_is_refused(path: Path) -> None:
    read = beton.open(path)
    kept = read.payload(0)
    read.close()
    assert kept.tobytes() == np.asarray(SAMPLES[0][0]).tobytes()
    with pytest.raises(InputError, match="after the file was closed"):
        read.payload(0)


def test_a_jpeg_that_claims_another_size_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    stream = bytearray(jpeg_of(picture(8, 8)))
    beton.write(tmp_path / "a.beton", [(bytes(stream), 0)])
    beton.manifest_path(tmp_path / "a.beton").unlink()
    frame = stream.index(b"\xff\xc0")
    with beton.Beton(tmp_path / "a.beton") as read:
        start = int(read.offsets[0])
    edit(tmp_path / "a.beton", start + frame + 5, b"\xff\xff\xff\xff")  # 65535 x 65535: 13 GB of pixels
    with (
        beton.open(tmp_path / "a.beton") as read_again,
        pytest.raises(InputError, match=r"sample 0: .* 65535x65535"),
    ):
        read_again.decode(0)


# -- manifest


def test_the_manifest_describes_the_file(path: Path) -> None:
    manifest = json.loads(beton.manifest_path(path).read_text())
    assert manifest["bytes"] == path.stat().st_size
    assert (manifest["samples"], manifest["labelled"], manifest["mode"]) == (4, 3, "2 jpg, 2 raw")
    assert manifest["height"] == {"min": 1, "max": 12}
    payloads = b"".join(i.tobytes() if isinstance(i, np.ndarray) else i for i, _ in SAMPLES)
    assert manifest["sha256_payloads"] == hashlib.sha256(payloads).hexdigest()
    with beton.open(path) as read:
        assert read.content_hash == manifest["content_hash"]
        assert read.manifest == {key: value for key, value in manifest.items() if key != "fingerprints"}


def test_a_file_without_manifest_is_read(path: Path) -> None:
    beton.manifest_path(path).unlink()
    with beton.open(path) as read:
        assert (read.manifest, read.classes, read.content_hash) == (None, None, None)
        assert np.array_equal(read.decode(0), SAMPLES[0][0])


def test_the_manifest_of_another_file_is_an_error(path: Path, tmp_path: Path) -> None:
    beton.write(tmp_path / "b.beton", SAMPLES[:2])
    os.replace(beton.manifest_path(tmp_path / "b.beton"), beton.manifest_path(path))
    with pytest.raises(InputError, match=r"not the file that a\.beton\.json describes .*2 samples.*found: 4 samples"):
        beton.open(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected a JSON object"),
        ({"format": 99}, "format 99, this version reads 1"),
        ({"sha256_tables": None}, "'sha256_tables' is missing"),
        ({"sha256_payloads": "0" * 64}, "content hash does not follow"),
    ],
)
def test_a_damaged_manifest_is_an_error(path: Path, change: str | dict[str, object], message: str) -> None:
    sidecar = beton.manifest_path(path)
    text = change if isinstance(change, str) else json.dumps({**json.loads(sidecar.read_text()), **change})
    sidecar.write_text(text)
    with pytest.raises(InputError, match=message):
        beton.open(path)


# -- fingerprints


@pytest.fixture
def alike(tmp_path: Path) -> Path:
    """Six raw images of one size."""
    beton.write(tmp_path / "alike.beton", [(picture(70, 60, i), i) for i in range(6)])
    return tmp_path / "alike.beton"


def exchange(path: Path, i: int, j: int) -> None:
    with beton.Beton(path) as read:
        payloads, starts = [read.read(k).tobytes() for k in (i, j)], [int(read.offsets[k]) for k in (j, i)]
    for start, payload in zip(starts, payloads, strict=True):
        edit(path, start, payload)


def test_exchanged_samples_are_noticed_when_they_are_read(alike: Path) -> None:
    exchange(alike, 1, 4)
    with beton.open(alike) as read:
        for i in (1, 4):
            for use in (read.payload, read.decode):
                with pytest.raises(InputError, match=rf"alike\.beton: sample {i}: not the bytes that were written for"):
                    use(i)
        for i in (0, 2, 3, 5):
            assert np.array_equal(read.decode(i), picture(70, 60, i))
        assert np.array_equal(read.files[0].read(1).reshape(70, 60, 3), picture(70, 60, 4))


def test_verify_names_the_samples_that_are_not_as_written(alike: Path) -> None:
    exchange(alike, 1, 4)
    report = beton.verify(alike, decode=True)
    assert report.decoded == 6
    assert report.problems == [
        f"{alike}: the images are not those that were written (sha256 differs)",
        f"{alike}: sample 1: not the bytes that were written for it",
        f"{alike}: sample 4: not the bytes that were written for it",
    ]


def test_verify_goes_on_behind_a_sample_that_cannot_be_read(alike: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with beton.Beton(alike) as read:
        bad = int(read.offsets[2])
    read_at = beton._read_at

    def fails(file: int, into: memoryview, position: int) -> int:
        if position == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_at(file, into, position)

    monkeypatch.setattr(beton, "_read_at", fails)
    report = beton.verify(alike, decode=True)
    assert report.decoded == 5
    assert [("sample 2 cannot be read" in problem, "sha256" in problem) for problem in report.problems] == [
        (False, True),
        (True, False),
    ]


@pytest.mark.parametrize("manifest", ["older", "none"])
def test_without_fingerprints_a_file_is_read_as_it_is(alike: Path, manifest: str) -> None:
    sidecar = beton.manifest_path(alike)
    if manifest == "older":
        sidecar.write_text(
            json.dumps({k: v for k, v in json.loads(sidecar.read_text()).items() if k != "fingerprints"})
        )
    else:
        sidecar.unlink()
    exchange(alike, 1, 4)
    with beton.open(alike) as read:
        assert read.files[0].fingerprints is None
        assert np.array_equal(read.decode(1), picture(70, 60, 4))


@pytest.mark.parametrize(
    "entry",
    [
        [],
        {},
        "AAAA",
        {"crc32": 0, "values": None},
        {"crc32": 0, "values": "A"},
        {"crc32": 1, "values": base64.b64encode(bytes(24)).decode()},
        {"crc32": zlib.crc32(bytes(20)), "values": base64.b64encode(bytes(20)).decode()},  # of five samples
    ],
)
def test_damaged_fingerprints_are_an_error(alike: Path, entry: object) -> None:
    sidecar = beton.manifest_path(alike)
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "fingerprints": entry}))
    with pytest.raises(InputError, match=r"alike\.beton\.json: its fingerprints are damaged; restore it, or delete"):
        beton.open(alike)


@pytest.mark.parametrize("size", [1, 100, 3072, 6143, 6144, 12_287, 12_288, 110_000, 196_608, 1_000_000])
def test_a_fingerprint_is_of_bytes_all_over_the_payload(size: int) -> None:
    payload = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    original = beton_write.fingerprint(payload)
    assert original == beton_write.fingerprint(payload.tobytes()) == beton_write.fingerprint(payload.data)
    block = 4096 if size > 6143 else 1  # as much as a disk writes at once; of little payloads every byte counts
    for start in np.linspace(0, max(size - block, 0), 50).astype(int):
        changed = payload.copy()
        changed[start : start + block] ^= 0x5A
        assert beton_write.fingerprint(changed) != original
    for channel in range(3 if size > 2 else 0):
        changed = payload.copy()
        changed[channel::3] = 0
        assert beton_write.fingerprint(changed) != original
    assert beton_write.fingerprint(np.append(payload, np.uint8(0))) != original


def test_verify_compares_every_image(path: Path) -> None:
    with beton.Beton(path) as read:
        start = int(read.offsets[0])
    edit(path, start, bytes([np.asarray(SAMPLES[0][0]).ravel()[0] ^ 1]))
    report = beton.verify(path)
    assert report.payloads_hashed
    assert report.problems == [
        f"{path}: the images are not those that were written (sha256 differs)",
        f"{path}: sample 0: not the bytes that were written for it",
    ]


def test_verify_names_every_image_that_does_not_decode(path: Path) -> None:
    beton.manifest_path(path).unlink()
    with beton.Beton(path) as read:
        start = int(read.offsets[1])
    edit(path, start, b"\0\0")
    report = beton.verify(path, decode=True)
    assert report.decoded == 3
    assert len(report.problems) == 1
    assert "sample 1" in report.problems[0]


# -- refusing to write


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((np.zeros((3, 3), np.uint8), 0), r"sample 1: expected uint8 \(H, W, 3\), got uint8 \(3, 3\)"),
        ((np.zeros((3, 3, 3), np.float32), 0), "got float32"),
        ((np.zeros((0, 3, 3), np.uint8), 0), "3x0 pixels"),
        ((np.zeros((1, 65536, 3), np.uint8), 0), "65536x1 pixels; a side may have"),
        ((b"GIF89a", 0), "not a JPEG"),
        ((jpeg_of(picture(8, 8))[:30], 0), "truncated JPEG"),
        ((picture(2, 2), -2), "label -2: expected 0 or more"),
        ((picture(2, 2), 1.0), "label 1.0: expected a whole number"),
        ((picture(2, 2), "cat"), "label 'cat'"),
        ((picture(2, 2), 2**63), "label 9223372036854775808"),
        ((picture(2, 2), 7), "label 7, but there are only 2 classes"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path: Path, sample: tuple[bytes, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        beton.write(tmp_path / "a.beton", [(picture(4, 4), 1), sample], classes=["a", "b"])
    assert leftovers(tmp_path) == []


def test_nothing_to_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no samples to write"):
        beton.write(tmp_path / "a.beton", iter([]))
    assert leftovers(tmp_path) == []


def test_an_existing_file_needs_force(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"exists already.*--force"):
        beton.write(path, SAMPLES[:1])
    assert path.read_bytes() == before
    beton.write(path, SAMPLES[:1], force=True)
    with beton.open(path) as read:
        assert len(read) == 1


def test_the_place_to_write_to_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its folder does not exist"):
        beton.write(tmp_path / "absent" / "a.beton", SAMPLES)
    with pytest.raises(ConfigError, match="is a folder"):
        beton.write(tmp_path, SAMPLES)


# -- interrupted writing


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError("x"), ZeroDivisionError])
def test_an_error_while_writing_leaves_the_old_file(path: Path, error: type[BaseException]) -> None:
    before = {name: (path.parent / name).read_bytes() for name in leftovers(path.parent)}

    def samples() -> Iterator[tuple[np.ndarray, int]]:
        yield picture(600, 600), 0
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        beton.write(path, samples(), force=True)
    assert {name: (path.parent / name).read_bytes() for name in leftovers(path.parent)} == before


def test_a_full_disk_leaves_the_old_file_and_says_what_is_needed(path: Path) -> None:
    """The kernel refuses bytes beyond 3 MB, in a process of its own, since the limit cannot be lifted
    again."""
    before = {name: (path.parent / name).read_bytes() for name in leftovers(path.parent)}
    script = f"""
import resource, numpy as np
from pipelines import beton
from pipelines.errors import RunError
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, resource.RLIM_INFINITY))
try:
    beton.write({str(path)!r}, ((np.zeros((500, 500, 3), np.uint8), 0) for _ in range(40)), count=40, force=True)
except RunError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "size limit after" in done.stdout
    assert "all 40 samples need about 3" in done.stdout
    assert {name: (path.parent / name).read_bytes() for name in leftovers(path.parent)} == before


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota"), (errno.EIO, "writing stopped")],
)
def test_a_disk_that_is_full_at_the_very_end(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    before = {name: (path.parent / name).read_bytes() for name in leftovers(path.parent)}

    def fsync(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match=message):
        beton.write(path, SAMPLES, force=True)
    assert {name: (path.parent / name).read_bytes() for name in leftovers(path.parent)} == before


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"

    def samples() -> Iterator[tuple[np.ndarray, int]]:
        yield picture(4, 4), 0
        with pytest.raises(RunError, match="another process is writing it"):
            beton.write(path, SAMPLES)
        yield picture(5, 5), 1

    beton.write(path, samples())
    with beton.open(path) as read:
        assert read.heights.tolist() == [4, 5]
    assert leftovers(tmp_path) == ["a.beton", "a.beton.json"]


def test_what_a_killed_writer_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".a.beton.partial").write_bytes(b"x" * 100_000)
    beton.write(tmp_path / "a.beton", SAMPLES)
    assert leftovers(tmp_path) == ["a.beton", "a.beton.json"]
    assert beton.verify(tmp_path / "a.beton", decode=True).ok


def test_a_killed_writer_leaves_no_file_under_the_name(tmp_path: Path) -> None:
    script = f"""
import os, signal, numpy as np
from pipelines import beton
def samples():
    yield np.zeros((900, 900, 3), np.uint8), 0
    os.kill(os.getpid(), signal.SIGKILL)
beton.write({str(tmp_path / "a.beton")!r}, samples())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False)
    assert done.returncode == -9
    assert leftovers(tmp_path) == [".a.beton.partial"]
    with pytest.raises(RelsslError):
        beton.open(tmp_path / ".a.beton.partial")


# -- masks


def mask_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (128, 128)).astype(bool)


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """Six raw images of one size with masks."""
    beton.write(tmp_path / "masked.beton", [(picture(70, 60, i), i, mask_of(i)) for i in range(6)], masks=True)
    return tmp_path / "masked.beton"


def mask_place(path: Path, i: int) -> int:
    with beton.Beton(path) as read:
        offsets = fmt.read_tables(read.data, "").mask_offsets
    assert offsets is not None
    return int(offsets[i])


@pytest.mark.parametrize("room", [2, 4096])
def test_masks_are_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(beton_write, "_FIRST_ROOM", room)
    samples = [(picture(9, 8, i), i, mask_of(i)) for i in range(50)]
    manifest = beton.write(tmp_path / "a.beton", iter(samples), masks=True)
    with beton.open(tmp_path / "a.beton") as read:
        assert read.has_masks
        assert read.files[0].fields == ("image", "label", "mask")
        for i, (image, _, mask) in enumerate(samples):
            assert np.array_equal(read.decode(i), image)
            assert np.array_equal(read.mask(i), mask)
            assert np.array_equal(read.packed_mask(i), np.packbits(mask))
            assert read.mask(i).dtype == bool
        assert "mask_fingerprints" not in (read.manifest or {})  # megabytes, which nobody wants in a log
    assert "mask_fingerprints" in manifest
    assert beton.verify(tmp_path / "a.beton", decode=True).ok


def test_a_file_without_masks_has_none(path: Path, masked: Path) -> None:
    assert "mask_fingerprints" not in json.loads(beton.manifest_path(path).read_text())
    with beton.open(path) as read, beton.open([masked, path]) as both, beton.open([masked, masked]) as twice:
        assert read.files[0].fields == ("image", "label")
        assert not read.has_masks
        assert not both.has_masks
        assert twice.has_masks
        assert np.array_equal(twice.mask(7), mask_of(1))
        with pytest.raises(InputError, match=r"a\.beton has no masks; make a file that has: relssl saliency"):
            read.mask(0)
        with pytest.raises(IndexError):
            twice.files[0].mask(6)
        part = Subset(twice, np.array([9, 2]))
        assert part.has_masks
        assert np.array_equal(part.mask(0), mask_of(3))
        assert np.array_equal(part.packed_mask(1), np.packbits(mask_of(2)))


def test_the_format_of_files_without_masks_stays(tmp_path: Path) -> None:
    """To the byte: this is the hash of what the first version wrote."""
    beton.write(tmp_path / "a.beton", [(np.arange(72, dtype=np.uint8).reshape(4, 6, 3), 3)])
    content = (tmp_path / "a.beton").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "418d55163a5681fea052a20874364acc5ae1d236ed434d159f1ce53182d4e1e2"


def test_other_masks_give_another_content_hash(tmp_path: Path, masked: Path) -> None:
    beton.write(tmp_path / "b.beton", [(picture(70, 60, i), i, mask_of(i + (i == 3))) for i in range(6)], masks=True)
    with beton.open(masked) as a, beton.open(tmp_path / "b.beton") as b:
        assert a.content_hash != b.content_hash


MASK_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pointer": (
        lambda p: edit(p, ROWS + fmt.DESCRIPTOR.itemsize + 24, u8),
        "sample 0: mask at byte 1099511627776, which the allocation table does not list",
    ),
    "length": (
        lambda p: edit(p, table_start(p) + 6 * 24 + 16, (2047).to_bytes(8, "little")),
        "sample 0: a mask of 2047 bytes, expected 2048",
    ),
}


@pytest.mark.parametrize("kind", MASK_DAMAGE)
def test_a_mask_that_is_missing_is_named(masked: Path, kind: str) -> None:
    damage, message = MASK_DAMAGE[kind]
    beton.manifest_path(masked).unlink()
    damage(masked)
    with pytest.raises(InputError, match=message):
        beton.open(masked)
    assert message in beton.verify(masked).problems[0]


def test_a_corrupt_mask_is_named(masked: Path) -> None:
    edit(masked, mask_place(masked, 2) + 1000, b"\x5a")
    with beton.open(masked) as read:
        assert np.array_equal(read.decode(2), picture(70, 60, 2))  # the image is sound
        for use in (read.mask, read.packed_mask):
            with pytest.raises(InputError, match=r"masked\.beton: sample 2: its mask is not the one that was written"):
                use(2)
        assert np.array_equal(read.mask(3), mask_of(3))
    assert beton.verify(masked).problems == [
        f"{masked}: the images and masks are not those that were written (sha256 differs)",
        f"{masked}: sample 2: its mask is not the one that was written for it",
    ]


def test_an_empty_mask_is_named(masked: Path) -> None:
    """Another program's, without a manifest: a view would be grey all over."""
    beton.manifest_path(masked).unlink()
    edit(masked, mask_place(masked, 2), bytes(2048))
    message = f"{masked}: sample 2: its mask has no foreground: nothing of the image would be left"
    with beton.open(masked) as read, pytest.raises(InputError, match=re.escape(message)):
        read.packed_mask(2)
    assert beton.verify(masked).problems == [message]


def test_a_field_mask_of_another_kind_is_not_ours(masked: Path) -> None:
    """FFCV's users have had fields of this name before."""
    beton.manifest_path(masked).unlink()
    start = fmt.HEADER.itemsize + 2 * fmt.DESCRIPTOR.itemsize + 17
    edit(masked, start, (64).to_bytes(8, "little"))  # its shape
    with beton.open(masked) as read:
        assert not read.has_masks
        assert np.array_equal(read.decode(5), picture(70, 60, 5))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((picture(4, 4), 1), r"expected \(image, label, mask\), got 2 parts"),
        ((picture(4, 4), 1, np.ones((128, 127), bool)), r"expected a mask as bool \(128, 128\), got bool \(128, 127\)"),
        ((picture(4, 4), 1, np.ones((128, 128), np.uint8)), "got uint8"),
        ((picture(4, 4), 1, None), "got NoneType"),
        ((picture(4, 4), 1, np.zeros((128, 128), bool)), "sample 0: expected a mask with some foreground, got none"),
    ],
)
def test_what_is_no_mask_is_refused(tmp_path: Path, sample: tuple[np.ndarray, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        beton.write(tmp_path / "a.beton", [sample], masks=True)
    with pytest.raises(InputError, match=r"expected \(image, label\), got 3 parts"):
        beton.write(tmp_path / "a.beton", [(picture(4, 4), 1, mask_of(0))])
    assert leftovers(tmp_path) == []
