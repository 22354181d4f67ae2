"""SlimageNet64: folders of splits and classes, in a folder or an archive whose name a Zenodo record tells."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_tools.convert import convert_source, detect
from dataset_tools.sources import slimagenet
from pipelines import beton
from pipelines.errors import ConfigError, InputError
from tests.dataset_tools.serve import serving

RNG = np.random.default_rng(0)
SPLIT_OF = {"n01": "train", "n03": "train", "n02": "val", "n04": "test"}


def picture(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


def files_of(layout: str, kind: str = "PNG") -> dict[str, bytes]:
    """Ten images of every class; "few-shot": each class in one split, "user": 8 in train and 2 in test, or "plain"."""
    suffix = {"PNG": "png", "JPEG": "jpeg"}[kind]
    files = {}
    for name in SPLIT_OF:
        for i in range(10):
            split = {"few-shot": SPLIT_OF[name] + "/", "user": "train/" if i < 8 else "test/", "plain": ""}[layout]
            files[f"{split}{name}/{name}_{i}.{suffix}"] = picture(kind)
    return files


def put_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / "SlimageNet64" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root / "SlimageNet64"


def put_archive(root: Path, files: dict[str, bytes], name: str = "SlimageNet64.tar.bz2") -> Path:
    root.mkdir(exist_ok=True)
    with tarfile.open(root / name, "w:bz2") as tar:
        for path, content in files.items():
            info = tarfile.TarInfo(f"./SlimageNet64/{path}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return root / name


@pytest.fixture(params=["folder", "archive"])
def put(request: pytest.FixtureRequest) -> object:
    return put_folder if request.param == "folder" else put_archive


def keys(split: str, place: Path) -> dict[str, int | None]:
    source = slimagenet.read(split, place)
    found = {key.rsplit("/", 1)[-1]: label for key, _, label in source.samples}
    assert len(found) == source.count
    return found


@pytest.mark.parametrize("split", ["train", "val", "test", "all"])
def test_splits_are_folders_and_classes_are_numbered_over_all_of_them(tmp_path: Path, put: object, split: str) -> None:
    assert callable(put)
    files = files_of("few-shot")
    place = put(tmp_path, files)
    assert detect(place) == detect(tmp_path) == "slimagenet64"
    done = convert_source(place, tmp_path / "a.beton", split=split)
    names = [name for name in files if split == "all" or SPLIT_OF[name.split("/")[1]] == split]
    assert done.images == len(names)
    assert done.classes == ["n01", "n02", "n03", "n04"]
    assert done.source == f"SlimageNet64 {split}"
    with beton.open(tmp_path / "a.beton") as read:
        pixels = {read.decode(i).tobytes(): int(read.labels[i]) for i in range(len(read))}
    expected = {
        np.asarray(Image.open(io.BytesIO(files[name]))).tobytes(): int(name.split("/")[1][2]) - 1 for name in names
    }
    assert pixels == expected
    classes = {"train": 2, "val": 1, "test": 1}.get(split)
    assert [f"{split} has images of {classes} of the 4 classes"] * (split != "all") == [
        remark for remark in done.remarks if "of the 4 classes" in remark
    ]
    assert ("40 images; published are 200,000 (all)" in done.remarks) == (split == "all")


def test_splits_of_every_class(tmp_path: Path, put: object) -> None:
    assert callable(put)
    for layout in ("few-shot", "plain", "user"):
        place = put(tmp_path / layout, files_of(layout))
        first, last = keys("first80", place), keys("last20", place)
        assert sorted(first) == [f"{name}_{i}.png" for name in sorted(SPLIT_OF) for i in range(8)]
        assert sorted(last) == [f"{name}_{i}.png" for name in sorted(SPLIT_OF) for i in (8, 9)]
        assert {**first, **last} == keys("all", place)
    assert keys("train", tmp_path / "user") == first
    assert keys("test", tmp_path / "user") == last


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "raw"), ("JPEG", "jpg")])
def test_small_images_are_not_encoded_anew(tmp_path: Path, kind: str, mode: str) -> None:
    put_folder(tmp_path, files_of("user", kind))
    done = convert_source("slimagenet64", tmp_path / "a.beton", root=tmp_path)
    assert done.mode == mode
    assert done.notes["encoded as JPEG"] == 0
    assert convert_source("slimagenet64", tmp_path / "b.beton", root=tmp_path, mode="raw").mode == "raw"


def test_what_is_refused(tmp_path: Path) -> None:
    convert = lambda folder, **options: convert_source(tmp_path / folder, tmp_path / "a.beton", **options)  # noqa: E731
    put_folder(tmp_path / "plain", files_of("plain"))
    with pytest.raises(ConfigError, match=r"split 'train': .*SlimageNet64 has the splits all, first80, last20$"):
        convert("plain")
    put_folder(tmp_path / "few", files_of("few-shot"))
    with pytest.raises(ConfigError, match=r"split 'tset': .* has the splits test, train, val, all, first80, last20$"):
        convert("few", split="tset")
    put_folder(tmp_path / "mixed", files_of("user") | {"n05/1.png": picture("PNG")})
    with pytest.raises(InputError, match=r"folders of splits \(test, train\) beside others \(n05\)"):
        convert("mixed")
    put_folder(tmp_path / "loose", files_of("user") | {"train/1.png": picture("PNG")})
    with pytest.raises(InputError, match=r"expected images in <split>/<class>/, found train/1\.png"):
        convert("loose")
    (tmp_path / "empty" / "SlimageNet64").mkdir(parents=True)
    with pytest.raises(InputError, match="no images in the split all"):
        convert("empty", split="all")
    with pytest.raises(InputError, match=r"expected SlimageNet64/ or SlimageNet64\.tar\.bz2 there; .* --download"):
        convert_source("slimagenet64", tmp_path / "a.beton", root=tmp_path)
    assert not (tmp_path / "a.beton").exists()


def test_the_download_asks_the_record(tmp_path: Path) -> None:
    path = put_archive(tmp_path / "web", files_of("user"), "slim images.tar.bz2")
    with serving(tmp_path / "web") as server:
        checksum = "md5:" + hashlib.md5(path.read_bytes()).hexdigest()
        link = f"{server.url}slim%20images.tar.bz2"
        files = [{"key": path.name, "size": path.stat().st_size, "checksum": checksum, "links": {"self": link}}]
        (tmp_path / "web" / "3672132").write_text(json.dumps({"files": files}))
        options = {"root": tmp_path / "data", "download": True, "url": server.url + "3672132"}
        assert convert_source("slimagenet64", tmp_path / "a.beton", **options).images == 32
        assert convert_source("slimagenet64", tmp_path / "b.beton", split="test", **options).images == 8
    assert [path for path, _ in server.requests] == ["/3672132", "/slim%20images.tar.bz2"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["SlimageNet64.tar.bz2"]


@pytest.mark.parametrize("suffix", [".tar.bz2", ".tar.gz"])
def test_an_archive_of_any_kind_is_found(tmp_path: Path, suffix: str) -> None:
    path = put_archive(tmp_path, files_of("user"), f"SlimageNet64{suffix}")
    assert detect(path) == detect(tmp_path) == "slimagenet64"
    assert len(keys("train", tmp_path)) == 32
