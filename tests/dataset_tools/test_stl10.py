"""STL-10 in the published binary format: columns first, labels from 1, unlabeled images beside labelled ones."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dataset_tools.convert import convert_source, detect
from dataset_tools.sources import stl10
from pipelines import beton
from pipelines.errors import ConfigError, InputError
from tests.dataset_tools.serve import serving

COUNTS = {"train": 4, "test": 3, "unlabeled": 5}
NAMES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
LABELS = {"train": [0, 9, 4, 4], "test": [2, 1, 0]}


def images_of(split: str) -> np.ndarray:
    seed = sum(split.encode())
    return np.random.default_rng(seed).integers(0, 256, (COUNTS[split], 96, 96, 3), dtype=np.uint8)


def pixels_of(image: np.ndarray) -> bytes:
    """R, G, B, each from the left column to the right, from top to bottom."""
    return b"".join(image[:, column, channel].tobytes() for channel in range(3) for column in range(96))


def files_of() -> dict[str, bytes]:
    """In the order of the published archive."""
    files = {}
    for split in ("test", "train", "unlabeled"):
        files[f"{split}_X.bin"] = b"".join(map(pixels_of, images_of(split)))
        if split in LABELS:
            files[f"{split}_y.bin"] = bytes(label + 1 for label in LABELS[split])
    return files | {"class_names.txt": "\n".join([*NAMES, ""]).encode(), "fold_indices.txt": b"0 1 2\n"}


def put_folder(root: Path) -> Path:
    (root / "stl10_binary").mkdir(parents=True)
    for name, content in files_of().items():
        (root / "stl10_binary" / name).write_bytes(content)
    return root / "stl10_binary"


def put_archive(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    path = root / "stl10_binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files_of().items():
            info = tarfile.TarInfo(f"stl10_binary/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(autouse=True)
def our_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published sums are those of our little files."""
    for name, content in files_of().items():
        if name in stl10.FILES:
            monkeypatch.setitem(stl10.FILES, name, hashlib.md5(content).hexdigest())


def publish(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the sum of this archive the published one; gzip writes the time of day into it."""
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(stl10, "SPEC", dataclasses.replace(stl10.SPEC, md5=md5))


# -- reading


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("split", ["train", "test", "unlabeled", "train+unlabeled"])
def test_images_and_labels_in_published_order(tmp_path: Path, packed: bool, split: str) -> None:
    place = put_archive(tmp_path) if packed else put_folder(tmp_path)
    assert detect(place) == detect(tmp_path) == "stl10"
    done = convert_source(place, tmp_path / "a.beton", split=split, checksum=not packed)
    parts = split.split("+")
    with beton.open(tmp_path / "a.beton") as read:
        pixels = np.stack([read.decode(i) for i in range(len(read))])
        assert np.array_equal(pixels, np.concatenate([images_of(part) for part in parts]))
        assert read.labels.tolist() == [x for part in parts for x in LABELS.get(part, [-1] * COUNTS[part])]
        assert read.classes == (None if split == "unlabeled" else NAMES)
        assert not read.is_jpeg.any()
    published = {"train": 5_000, "test": 8_000, "unlabeled": 100_000, "train+unlabeled": 105_000}[split]
    assert done.remarks == [f"{done.images} images; published are {published:,} ({split})"]
    assert done.source == f"STL-10 {split}"


def test_two_files_are_one_data_set(tmp_path: Path) -> None:
    put_folder(tmp_path)
    for split in ("train", "unlabeled", "train+unlabeled"):
        done = convert_source("stl10", tmp_path / f"{split}.beton", split=split, root=tmp_path)
    assert done.lines()[0].split(": ")[1].startswith("9 images, 4 of them in 10 classes, raw")
    with (
        beton.open([tmp_path / "train.beton", tmp_path / "unlabeled.beton"]) as two,
        beton.open(tmp_path / "train+unlabeled.beton") as one,
    ):
        assert two.labels.tolist() == one.labels.tolist() == [*LABELS["train"], -1, -1, -1, -1, -1]
        assert two.classes == one.classes == NAMES
        assert all(np.array_equal(two.decode(i), one.decode(i)) for i in range(9))


def test_images_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Counting(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            sizes.append(size or 0)
            return super().read(size)

    source = stl10.read("unlabeled", put_folder(tmp_path))
    monkeypatch.setattr(Path, "open", lambda self, mode: Counting(self, mode))
    assert len(list(source.samples)) == 5
    assert sizes == [96 * 96 * 3] * 5


# -- refusing


def test_the_sum_of_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put_archive(tmp_path)
    with pytest.raises(
        InputError, match=r"stl10_binary\.tar\.gz: MD5 .* published is 91f7769df0f17e558f3565bffb0c7dfb"
    ):
        stl10.read("train", tmp_path)
    publish(path, monkeypatch)
    assert stl10.read("train", tmp_path).count == 4


@pytest.mark.parametrize("name", ["train_X.bin", "train_y.bin", "unlabeled_X.bin"])
def test_the_sums_of_files_in_a_folder(tmp_path: Path, name: str) -> None:
    folder = put_folder(tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: MD5 .* published is .* --no-checksum"):
        stl10.read("train+unlabeled", tmp_path)
    assert stl10.read("train+unlabeled", tmp_path, checksum=False).count == 9
    assert stl10.read("test", tmp_path).count == 3


SIZE = 96 * 96 * 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train_X.bin", bytes(4 * SIZE - 1), r"train_X\.bin: 110,591 bytes, expected a multiple of 27,648"),
        ("train_X.bin", b"", r"train_X\.bin: 0 bytes, expected a multiple"),
        ("train_X.bin", bytes(3 * SIZE), r"3 images in train_X\.bin, but 4 labels in train_y\.bin"),
        ("train_y.bin", bytes([1, 2, 3]), r"4 images in train_X\.bin, but 3 labels"),
        ("train_y.bin", bytes([1, 2, 3, 11]), r"train_y\.bin: labels 1 \.\.\. 11, expected 1 \.\.\. 10"),
        ("train_y.bin", bytes([0, 2, 3, 10]), r"train_y\.bin: labels 0 \.\.\. 10, expected 1 \.\.\. 10"),
        ("train_y.bin", None, r"train_y\.bin is missing: part of STL-10 as published"),
        ("train_X.bin", None, r"train_X\.bin is missing: part of STL-10 as published"),
        ("class_names.txt", None, r"class_names\.txt: expected 10 names of classes, found 0"),
        ("class_names.txt", b"one\ntwo\n", r"class_names\.txt: expected 10 names of classes, found 2"),
        ("class_names.txt", b"\xff", r"class_names\.txt: expected a text file"),
    ],
)
def test_files_of_another_layout_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = put_folder(tmp_path) / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        convert_source(tmp_path, tmp_path / "a.beton", checksum=False)
    assert not (tmp_path / "a.beton").exists()


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "stl10_binary.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("cifar/train_X.bin"))
    with pytest.raises(InputError, match=r"stl10_binary/train_X\.bin is missing: part of STL-10"):
        stl10.read("train", tmp_path, checksum=False)


def test_an_archive_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = put_archive(tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="MD5"):
        stl10.read("train", tmp_path)
    with pytest.raises(InputError, match="a damaged archive, or one that was cut off"):
        stl10.read("train", tmp_path, checksum=False)


def test_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    folder = put_folder(tmp_path)
    source = stl10.read("train", tmp_path)
    (folder / "train_X.bin").write_bytes(bytes(3 * SIZE + 5))
    with pytest.raises(InputError, match=r"train_X\.bin: ends within image 3 of 4"):
        list(source.samples)


def test_unknown_splits_and_absent_data(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"split 'val': STL-10 has the splits train, test, unlabeled, train\+unlabeled"
    ):
        convert_source("stl10", tmp_path / "a.beton", split="val", root=tmp_path)
    with pytest.raises(InputError, match=r"expected stl10_binary/ or stl10_binary\.tar\.gz there; .* --download"):
        convert_source("stl10", tmp_path / "a.beton", root=tmp_path)


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(put_archive(tmp_path / "web"), monkeypatch)
    with serving(tmp_path / "web") as server:
        fetching = {"root": tmp_path / "data", "download": True, "url": server.url}
        for split in ("train+unlabeled", "test"):
            convert_source("stl10", tmp_path / f"{split}.beton", split=split, **fetching)
    assert server.requests == [("/stl10_binary.tar.gz", None)]
    assert beton.open(tmp_path / "train+unlabeled.beton").labels.tolist() == [*LABELS["train"], -1, -1, -1, -1, -1]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["stl10_binary.tar.gz"]
