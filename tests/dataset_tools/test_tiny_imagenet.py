"""tiny-ImageNet in the published layout: classes of val in a file, those of test nowhere."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_tools.convert import convert_source, detect
from dataset_tools.sources import tiny_imagenet
from pipelines import beton
from pipelines.errors import ConfigError, InputError
from tests.dataset_tools.serve import serving

CLASSES = ["n01443537", "n01629819", "n02002724"]
VAL = [2, 0, 1, 0]  # classes of val_0.JPEG ...
RNG = np.random.default_rng(0)


def picture(grey: bool = False) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64) if grey else (64, 64, 3), dtype=np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def published() -> dict[str, bytes]:
    """Files of the archive. `wnids.txt` is not sorted; two images are grey."""
    files = {"wnids.txt": "\n".join(reversed(CLASSES)).encode(), "words.txt": b"n01443537\tgoldfish\n"}
    for name in reversed(CLASSES):
        files[f"train/{name}/{name}_boxes.txt"] = b"x\t0\t0\t1\t1\n"
        files |= {f"train/{name}/images/{name}_{i}.JPEG": picture(grey=i == 1) for i in range(2)}
    lines = [f"val_{i}.JPEG\t{CLASSES[label]}\t0\t32\t44\t62\n" for i, label in enumerate(VAL)]
    files["val/val_annotations.txt"] = "".join(lines).encode()
    files |= {f"val/images/val_{i}.JPEG": picture() for i in range(4)}
    return files | {f"test/images/test_{i}.JPEG": picture() for i in range(3)}


FILES = published()


def put_folder(root: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        path = root / "tiny-imagenet-200" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root / "tiny-imagenet-200"


def put_archive(root: Path, files: dict[str, bytes] = FILES) -> Path:
    root.mkdir(exist_ok=True)
    with zipfile.ZipFile(root / "tiny-imagenet-200.zip", "w") as packed:
        for name, content in files.items():
            packed.writestr(f"tiny-imagenet-200/{name}", content)
    return root / "tiny-imagenet-200.zip"


def put(root: Path, packed: bool, files: dict[str, bytes] = FILES) -> Path:
    return put_archive(root, files) if packed else put_folder(root, files)


def val_without(*names: str) -> dict[str, bytes]:
    return {name: content for name, content in FILES.items() if name not in names}


# -- reading


EXPECTED = {
    "train": [(f"train/{name}/images/{name}_{i}.JPEG", label) for label, name in enumerate(CLASSES) for i in range(2)],
    "val": [(f"val/images/val_{i}.JPEG", label) for i, label in sorted(enumerate(VAL), key=lambda item: item[::-1])],
    "test": [(f"test/images/test_{i}.JPEG", -1) for i in range(3)],
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_images_and_classes(tmp_path: Path, packed: bool, split: str) -> None:
    place = put(tmp_path, packed)
    assert detect(place) == detect(tmp_path) == "tiny-imagenet"
    done = convert_source(place, tmp_path / "a.beton", split=split, checksum=False)
    with beton.open(tmp_path / "a.beton") as read:
        stored = [(read.payload(i).tobytes(), int(read.labels[i])) for i in range(len(read))]
        assert stored == [(FILES[name], label) for name, label in EXPECTED[split]]
        assert read.classes == (None if split == "test" else CLASSES)
        assert read.decode(1).shape == (64, 64, 3)
    assert done.notes == {"JPEG bytes kept": len(stored)}
    assert done.source == f"tiny-ImageNet {split}"
    assert f"{len(stored)} images; published are {100_000 if split == 'train' else 10_000:,} ({split})" in done.remarks
    assert ("the classes of the test images were never published; evaluations take --split val" in done.remarks) == (
        split == "test"
    )


@pytest.mark.parametrize("keep", [False, True])
def test_a_val_that_was_sorted_into_folders_gives_the_same_file(tmp_path: Path, keep: bool) -> None:
    sorted_files = {name: content for name, content in FILES.items() if not name.startswith("val/")}
    for i, label in enumerate(VAL):
        sorted_files[f"val/{CLASSES[label]}/val_{i}.JPEG"] = FILES[f"val/images/val_{i}.JPEG"]
    if keep:
        sorted_files["val/val_annotations.txt"] = FILES["val/val_annotations.txt"]
    put_folder(tmp_path / "a")
    put_folder(tmp_path / "b", sorted_files)
    hashes = {
        name: convert_source("tiny_imagenet", tmp_path / f"{name}.beton", split="val", root=tmp_path / name).manifest[
            "content_hash"
        ]
        for name in ("a", "b")
    }
    assert hashes["a"] == hashes["b"]


def test_the_folder_of_val_is_not_one_class(tmp_path: Path) -> None:
    for place in (put_folder(tmp_path) / "val", f"{put_archive(tmp_path)}/tiny-imagenet-200/val"):
        with pytest.raises(
            InputError, match=r"its classes are in val_annotations\.txt.*convert tiny-imagenet .*--split val"
        ):
            convert_source(place, tmp_path / "a.beton")


def test_annotated_images_that_are_not_there_are_skipped(tmp_path: Path) -> None:
    put_folder(tmp_path, val_without("val/images/val_1.JPEG"))
    done = convert_source("tiny-imagenet", tmp_path / "a.beton", split="val", root=tmp_path)
    assert (done.images, done.skipped) == (3, {"file not found": ["images/val_1.JPEG"]})
    with pytest.raises(InputError, match=r"images/val_1\.JPEG: file not found: named in val_annotations\.txt"):
        convert_source("tiny-imagenet", tmp_path / "b.beton", split="val", root=tmp_path, strict=True)


# -- refusing


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"val_annotations\.txt is missing, which gives the classes of 4 of the 4 images \(images/val_0\.JPEG"),
        (b"val_1.JPEG\tn01443537\t0\n", r"val_annotations\.txt has no line for 3 of the 4 images \(images/val_0\.JPEG"),
        (b"val_0.JPEG\tn09999999\t0\n", r"line 1: expected the name .* one of the 3 classes .*got 'val_0\.JPEG\\tn09"),
        (b"val_0.JPEG n01443537 0\n", r"line 1: expected the name of an image, a tab"),
        (b"val_0.JPEG\tn01443537\nval_0.JPEG\tn01629819\n", r"line 2: expected .* the same for every line of an image"),
        (b"\xff", r"val_annotations\.txt: expected a text file"),
    ],
)
def test_bad_annotations(tmp_path: Path, packed: bool, change: bytes | None, message: str) -> None:
    files = val_without("val/val_annotations.txt")
    put(tmp_path, packed, files if change is None else files | {"val/val_annotations.txt": change})
    with pytest.raises(InputError, match=message):
        convert_source("tiny-imagenet", tmp_path / "a.beton", split="val", root=tmp_path, checksum=False)
    assert not (tmp_path / "a.beton").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_parts_that_are_missing(tmp_path: Path, packed: bool) -> None:
    only = {name: content for name, content in FILES.items() if name.startswith(("train", "wnids"))}
    put(tmp_path, packed, only)
    with pytest.raises(InputError, match=r"val: no images there; expected tiny-ImageNet as published"):
        tiny_imagenet.read("val", tmp_path, checksum=False)


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    put_archive(tmp_path, {"cat/1.jpg": picture()})
    with pytest.raises(
        InputError, match=r"tiny-imagenet-200\.zip: MD5 .* published is 90528d7ca1a48142e341f4ef8d21d0de"
    ):
        tiny_imagenet.read("train", tmp_path)
    with pytest.raises(InputError, match=r"expected tiny-ImageNet as published, with train/<class>/images/\*\.JPEG"):
        tiny_imagenet.read("train", tmp_path, checksum=False)


def test_unknown_splits_and_absent_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="split 'unlabeled': tiny-ImageNet has the splits train, val, test"):
        convert_source("tiny-imagenet", tmp_path / "a.beton", split="unlabeled", root=tmp_path)
    with pytest.raises(InputError, match=r"expected tiny-imagenet-200/ or tiny-imagenet-200\.zip there; .* --download"):
        convert_source("tiny-imagenet", tmp_path / "a.beton", root=tmp_path)


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    md5 = hashlib.md5(put_archive(tmp_path / "web").read_bytes()).hexdigest()
    monkeypatch.setattr(tiny_imagenet, "SPEC", dataclasses.replace(tiny_imagenet.SPEC, md5=md5))
    with serving(tmp_path / "web") as server:
        for split in ("train", "val"):
            done = convert_source(
                "tiny-imagenet",
                tmp_path / f"{split}.beton",
                split=split,
                root=tmp_path / "data",
                download=True,
                url=server.url,
            )
    assert server.requests == [("/tiny-imagenet-200.zip", None)]
    assert (done.images, done.labelled) == (4, 4)
