"""Conversion: every source, every option, and nothing bad in silence."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dataset_tools
from dataset_tools.convert import convert, convert_source, detect
from dataset_tools.images import ImageRefused
from dataset_tools.sources.digits import render_digits
from dataset_tools.verify import verify
from pipelines import beton
from pipelines.errors import ConfigError, InputError

RNG = np.random.default_rng(0)


def picture(height: int = 10, width: int = 14) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture() if pixels is None else pixels).save(path)
    return path


def jpeg_of(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, one of them nested, with what people have lying around."""
    root = tmp_path / "images"
    for name in ("dog/b.jpg", "dog/a.JPG", "cat/x/deep/1.png", "cat/x/2.jpeg", "emu/only.webp"):
        save(root / name)
    for name in (".DS_Store", "dog/notes.txt", "dog/.hidden.jpg", "cat/Thumbs.db"):
        (root / name).write_bytes(b"x")
    (root / ".git").mkdir()
    save(root / ".git" / "no.jpg")
    return root


def leftovers(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# -- the door for Python


def test_the_package_exports_convert() -> None:
    assert dataset_tools.convert is convert


def test_small_arrays_are_stored_raw(tmp_path: Path) -> None:
    images = [picture(32, 32) for _ in range(5)]
    done = convert(((str(i), image, i % 2) for i, image in enumerate(images)), tmp_path / "a.beton", classes=["a", "b"])
    with beton.open(tmp_path / "a.beton") as read:
        assert not read.is_jpeg.any()
        assert all(np.array_equal(read.decode(i), image) for i, image in enumerate(images))
        assert read.labels.tolist() == [0, 1, 0, 1, 0]
    assert (done.images, done.labelled, done.mode, done.num_skipped) == (5, 5, "raw", 0)
    stack = np.stack(images) / 255
    assert np.allclose(done.manifest["channels"]["mean"], stack.mean((0, 1, 2)), atol=1e-5)
    assert np.allclose(done.manifest["channels"]["std"], stack.std((0, 1, 2)), atol=1e-5)


def test_large_arrays_become_jpeg_unless_asked_otherwise(tmp_path: Path) -> None:
    samples = [("a", picture(200, 200), None)]
    assert convert(samples, tmp_path / "a.beton").mode == "jpg"
    assert convert(samples, tmp_path / "b.beton", mode="raw").mode == "raw"


def test_anything_that_is_an_image_may_come(tmp_path: Path) -> None:
    pixels = picture()
    stream = jpeg_of(pixels)
    samples = [
        ("bytes", stream, 0),
        ("array", pixels, np.int64(1)),
        ("grey", pixels[..., 0], None),
        ("pillow", Image.fromarray(pixels), 2),
        ("path", save(tmp_path / "x.png", pixels), 3),
        ("bytearray", bytearray(stream), 4),
    ]
    done = convert(samples, tmp_path / "a.beton", mode="raw")  # type: ignore[arg-type]
    with beton.open(tmp_path / "a.beton") as read:
        assert read.labels.tolist() == [0, 1, -1, 2, 3, 4]
        for i in (1, 3, 4):
            assert np.array_equal(read.decode(i), pixels)
        assert np.array_equal(read.decode(0), read.decode(5))
    assert done.labelled == 5


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        ([], InputError, "no samples to convert"),
        ([picture()], InputError, r"expected samples of \(key, image, label\), got ndarray"),
        ([("a", picture(), -3)], InputError, "label -3"),
        ([("a", picture(), 0), ("b", picture())], InputError, r"got tuple"),
        ([("a", b"", 0), ("b", b"GIF", 0)], InputError, "none of the 2 inputs can be used: 1 x empty file"),
    ],
)
def test_samples_that_are_none(tmp_path: Path, samples: list[object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        convert(samples, tmp_path / "a.beton")  # type: ignore[arg-type]
    assert leftovers(tmp_path) == []


def test_an_error_of_the_iterable_comes_through_and_leaves_nothing(tmp_path: Path) -> None:
    def samples() -> Iterator[tuple[str, np.ndarray, int]]:
        yield "a", picture(), 0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        convert(samples(), tmp_path / "a.beton")
    assert leftovers(tmp_path) == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("convert")] == []


def test_impossible_options(tmp_path: Path) -> None:
    for options in ({"workers": 0}, {"mode": "png"}, {"quality": 1000}, {"resolution": -1}):
        with pytest.raises(ConfigError, match="expected"):
            convert([("a", picture(), 0)], tmp_path / "a.beton", **options)
    with pytest.raises(ConfigError, match="expected one of auto, folder"):
        convert_source(tmp_path, tmp_path / "a.beton", format="zip")


# -- bad images among good ones

BAD = {
    "truncated.jpg": jpeg_of(picture(64, 64))[:-300],
    "empty.png": b"",
    "page.jpg": b"<html>404</html>",
}


def test_bad_inputs_are_skipped_counted_and_listed(tmp_path: Path, folder: Path) -> None:
    for name, content in BAD.items():
        (folder / "dog" / name).write_bytes(content)
    done = convert_source(folder, tmp_path / "a.beton")
    assert (done.images, done.num_skipped) == (5, 3)
    assert {reason: [os.path.basename(key) for key in keys] for reason, keys in done.skipped.items()} == {
        "empty file (0 bytes)": ["empty.png"],
        "not an image": ["page.jpg"],
        "truncated or damaged JPEG": ["truncated.jpg"],
    }
    listed = json.loads((tmp_path / "a.beton.json").read_text())["skipped"]
    assert (listed["count"], len(listed["inputs"])) == (3, 3)
    assert listed["reasons"]["not an image"] == 1
    text = done.text()
    assert "skipped 3 of 8 inputs" in text
    assert f"1 x not an image: {os.path.join('dog', 'page.jpg')}" in text
    with beton.open(tmp_path / "a.beton") as read:
        assert read.labels.tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("place", [0, 1])
def test_a_source_may_refuse_an_image_itself(tmp_path: Path, place: int) -> None:
    samples: list[Any] = [("good", picture(), 0)]
    samples.insert(place, ("bad", ImageRefused("out of reach", "for a reason"), 1))
    done = convert(samples, tmp_path / "a.beton")
    assert (done.images, done.skipped) == (1, {"out of reach": ["bad"]})
    assert done.manifest["skipped"]["inputs"] == [["bad", "out of reach: for a reason"]]


@pytest.mark.parametrize("name", BAD)
def test_strict_makes_a_bad_input_an_error(tmp_path: Path, folder: Path, name: str) -> None:
    (folder / "dog" / name).write_bytes(BAD[name])
    with pytest.raises(InputError, match=name):
        convert_source(folder, tmp_path / "a.beton", strict=True)
    assert leftovers(tmp_path) == ["images"]


# -- order, workers, memory


def test_the_file_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    samples = [(str(i), jpeg_of(picture(8 + i % 5, 9)), i) for i in range(60)]
    samples[30] = ("30", b"broken", 30)
    for workers in (1, 2, 7):
        (tmp_path / str(workers)).mkdir()
        convert(samples, tmp_path / str(workers) / "a.beton", workers=workers)
    for name in ("a.beton", "a.beton.json"):
        assert len({(tmp_path / str(workers) / name).read_bytes() for workers in (1, 2, 7)}) == 1


def test_few_images_are_in_flight(tmp_path: Path) -> None:
    """The source is asked for the next image only when an earlier one has been written."""
    taken = 0
    written = 0
    ahead = []

    def samples() -> Iterator[tuple[str, np.ndarray, int]]:
        nonlocal taken
        for i in range(100):
            taken += 1
            ahead.append(taken - written)
            yield str(i), picture(4, 4), i

    def progress(done: int, total: int | None, size: int) -> None:
        nonlocal written
        written = done
        assert (total, size) == (None, 48 * done)

    convert(samples(), tmp_path / "a.beton", workers=2, progress=progress)
    assert written == 100
    assert max(ahead) <= 2 * 4 + 1


def test_progress_knows_the_total_of_a_list(tmp_path: Path) -> None:
    calls: list[tuple[int, int | None, int]] = []
    convert([("a", picture(4, 4), 0)] * 3, tmp_path / "a.beton", progress=lambda *call: calls.append(call))
    assert calls == [(1, 3, 48), (2, 3, 96), (3, 3, 144)]


# -- folders


def test_class_folders(tmp_path: Path, folder: Path) -> None:
    done = convert_source(folder, tmp_path / "a.beton")
    with beton.open(tmp_path / "a.beton") as read:
        assert read.classes == ["cat", "dog", "emu"]
        assert read.labels.tolist() == [0, 0, 1, 1, 2]
        order = ["cat/x/2.jpeg", "cat/x/deep/1.png", "dog/a.JPG", "dog/b.jpg", "emu/only.webp"]
        assert read.payload(0).tobytes() == (folder / order[0]).read_bytes()
        assert read.payload(2).tobytes() == (folder / order[2]).read_bytes()
        assert read.is_jpeg.all()
    assert done.remarks == ["passed over 5 files that are hidden or not images: 3 hidden, 1 .db, 1 .txt"]
    assert done.notes["JPEG bytes kept"] == 3
    assert done.manifest["source"] == str(folder)


def test_a_folder_without_labels(tmp_path: Path, folder: Path) -> None:
    for name in ("b.jpg", "a.png"):
        save(tmp_path / "flat" / name)
    convert_source(tmp_path / "flat", tmp_path / "a.beton")
    convert_source(folder, tmp_path / "b.beton", labels=False)
    with beton.open([tmp_path / "a.beton", tmp_path / "b.beton"]) as read:
        assert read.labels.tolist() == [-1] * 7
        assert read.classes is None


def test_links_to_folders_are_followed_once(tmp_path: Path, folder: Path) -> None:
    save(tmp_path / "elsewhere" / "1.png")
    (folder / "fox").symlink_to(tmp_path / "elsewhere")
    (folder / "cat" / "loop").symlink_to(folder)
    assert convert_source(folder, tmp_path / "a.beton").images == 6


def test_a_class_without_images_keeps_its_number(tmp_path: Path, folder: Path) -> None:
    (folder / "cow").mkdir()
    done = convert_source(folder, tmp_path / "a.beton")
    assert done.classes == ["cat", "cow", "dog", "emu"]
    assert "1 class folders hold no images: cow" in done.remarks


def test_names_sort_by_folder_and_not_by_character(tmp_path: Path) -> None:
    for name in ("a b/1.png", "a/2.png", "a.b/3.png"):
        save(tmp_path / "images" / name)
    convert_source(tmp_path / "images", tmp_path / "a.beton")
    with beton.open(tmp_path / "a.beton") as read:
        assert read.classes == ["a", "a b", "a.b"]
        assert read.labels.tolist() == [0, 1, 2]


def test_folders_that_are_refused(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "a.beton"
    with pytest.raises(InputError, match="there is no such file or folder; expected a folder or archive of images"):
        convert_source(tmp_path / "absent", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no images found; looked for \.jpg .*, there is: nothing at all"):
        convert_source(tmp_path / "empty", out)
    (tmp_path / "empty" / "a.mp4").write_bytes(b"")
    (tmp_path / "empty" / "README").write_bytes(b"")
    with pytest.raises(InputError, match=r"there is: 1 \.mp4, 1 no extension"):
        convert_source(tmp_path / "empty", out)
    folder.rename(tmp_path / "train")
    (tmp_path / "sets").mkdir()
    (tmp_path / "train").rename(tmp_path / "sets" / "train")
    with pytest.raises(InputError, match=r"these look like splits.*relssl convert .*train train\.beton"):
        convert_source(tmp_path / "sets", out)
    save(tmp_path / "sets" / "loose.png")
    with pytest.raises(InputError, match=r"1 images lie in the folder itself \(loose\.png, \.\.\.\) and 5 in folders"):
        convert_source(tmp_path / "sets", out)
    assert not out.exists()


def test_a_folder_that_cannot_be_read_is_not_left_out(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def closed(path: str) -> object:
        if str(path).endswith("cat/x"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(InputError, match=r"cat/x: the folder cannot be read: Permission denied"):
        convert_source(folder, tmp_path / "a.beton")


def test_one_class_alone_is_noticed(tmp_path: Path, folder: Path) -> None:
    folder.rename(tmp_path / "sets")
    (tmp_path / "images").mkdir()
    (tmp_path / "sets").rename(tmp_path / "images" / "sets")
    done = convert_source(tmp_path / "images", tmp_path / "a.beton")
    assert done.classes == ["sets"]
    assert f"all images are of one class, sets: is {tmp_path / 'images'} one folder too high?" in done.remarks


def test_archives_in_a_folder_are_not_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "n01440764.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"there is: 1 \.tar; give the archives themselves as the source"):
        convert_source(tmp_path / "images", tmp_path / "a.beton")


def test_the_target_is_looked_at_before_the_source(tmp_path: Path) -> None:
    (tmp_path / "a.beton").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="exists already"):
        convert_source(tmp_path / "absent", tmp_path / "a.beton")
    with pytest.raises(ConfigError, match="its folder does not exist"):
        convert_source(tmp_path / "absent", tmp_path / "no" / "a.beton")
    assert (tmp_path / "a.beton").read_bytes() == b"precious"


def test_force_replaces(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.beton").write_bytes(b"old")
    convert_source(folder, tmp_path / "a.beton", force=True)
    assert verify(tmp_path / "a.beton").ok


# -- lists


def write_list(folder: Path, text: str) -> Path:
    (folder / "list.txt").write_text(text)
    return folder / "list.txt"


def test_a_list_gives_order_and_labels(tmp_path: Path, folder: Path) -> None:
    path = write_list(folder, "# mine\ndog/b.jpg,7\n\ncat/x/2.jpeg\t3\ndog/b.jpg,7\n")
    convert_source(path, tmp_path / "a.beton")
    with beton.open(tmp_path / "a.beton") as read:
        assert read.labels.tolist() == [7, 3, 7]
        assert read.classes is None
        assert read.payload(1).tobytes() == (folder / "cat/x/2.jpeg").read_bytes()


def test_a_list_with_class_names(tmp_path: Path, folder: Path) -> None:
    convert_source(write_list(folder, "dog/b.jpg,wolf\ncat/x/2.jpeg,ant\n"), tmp_path / "a.beton")
    with beton.open(tmp_path / "a.beton") as read:
        assert read.labels.tolist() == [1, 0]
        assert read.classes == ["ant", "wolf"]


def test_a_list_without_labels_takes_the_class_folders(tmp_path: Path, folder: Path) -> None:
    path = write_list(tmp_path, "emu/only.webp\ndog/b.jpg\n")
    convert_source(path, tmp_path / "a.beton", root=folder)
    with beton.open(tmp_path / "a.beton") as read:
        assert read.labels.tolist() == [2, 1]
        assert read.classes == ["cat", "dog", "emu"]


@pytest.mark.parametrize("lines", ["test/cat/0.jpg\n", "Train/cat/0.jpg\ntest/cat/0.jpg\n"])
def test_a_list_does_not_take_splits_for_classes(tmp_path: Path, lines: str) -> None:
    for name in ("Train/cat/0.jpg", "test/cat/0.jpg", "extra/0.jpg"):
        save(tmp_path / "c10" / name)
    path, first = write_list(tmp_path, lines), lines.split("/")[0]
    with pytest.raises(InputError, match=rf"these look like splits, not classes.* --root .*c10/{first}, or give"):
        convert_source(path, tmp_path / "a.beton", root=tmp_path / "c10")
    convert_source(write_list(tmp_path, lines.replace(".jpg", ".jpg,cat")), tmp_path / "a.beton", root=tmp_path / "c10")
    with beton.open(tmp_path / "a.beton") as read:
        assert read.classes == ["cat"]


def test_the_published_subsets_of_imagenet(tmp_path: Path) -> None:
    for wnid in ("n01440764", "n01443537", "n01484850"):
        for i in (1, 2):
            save(tmp_path / "train" / wnid / f"{wnid}_{i}.JPEG")
    path = write_list(tmp_path, "n01484850_2.JPEG\nn01440764_1.JPEG\n")
    convert_source(path, tmp_path / "a.beton", root=tmp_path / "train")
    convert_source(tmp_path / "train", tmp_path / "all.beton")
    with beton.open(tmp_path / "a.beton") as few, beton.open(tmp_path / "all.beton") as every:
        assert few.labels.tolist() == [2, 0]
        assert few.classes == every.classes
        assert few.payload(0).tobytes() == every.payload(5).tobytes()


def test_a_list_without_any_labels(tmp_path: Path) -> None:
    save(tmp_path / "a, b.jpg")
    convert_source(write_list(tmp_path, "a, b.jpg\n"), tmp_path / "a.beton")
    with beton.open(tmp_path / "a.beton") as read:
        assert read.labels.tolist() == [-1]
        assert read.classes is None


def test_lists_that_are_refused(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "a.beton"
    with pytest.raises(InputError, match="the list is empty"):
        convert_source(write_list(folder, "# nothing\n"), out)
    with pytest.raises(InputError, match=r"1 of 2 lines have a label, 'dog/a.JPG' has none"):
        convert_source(write_list(folder, "dog/b.jpg,1\ndog/a.JPG\n"), out)
    with pytest.raises(InputError, match="none of the 2 inputs can be used: 2 x file not found"):
        convert_source(write_list(folder, "x.jpg\ny.jpg\n"), out)
    with pytest.raises(InputError, match="with --root"):
        convert_source(write_list(folder, "x.jpg\n"), out, root=folder / "absent")
    (folder / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as a list"):
        convert_source(folder / "list.txt", out)
    with pytest.raises(InputError, match="say what it is with --format"):
        convert_source(folder / "dog" / "b.jpg", out)


# -- digits


def test_digits(tmp_path: Path) -> None:
    done = convert_source("digits", tmp_path / "a.beton", split="test", render={"renderings": 2, "seed": 5})
    images, labels = render_digits("test", renderings=2, seed=5)
    with beton.open(tmp_path / "a.beton") as read:
        assert np.array_equal(np.stack([read.decode(i) for i in range(len(read))]), images)
        assert np.array_equal(read.labels, labels)
        assert read.classes == [str(digit) for digit in range(10)]
    assert (done.images, done.mode) == (718, "raw")
    with pytest.raises(ConfigError, match=r"digits: .*colour"):
        convert_source("digits", tmp_path / "b.beton", render={"colour": 1})


def test_a_folder_goes_before_a_data_set_of_the_same_name(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert detect("digits") == "digits"
    folder.rename("digits")
    assert detect("digits") == "folder"


def test_data_sets_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    for name in ("stl10_binary.tar.gz", "tiny-imagenet-200.zip"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        InputError, match=r"holds stl10, tiny-imagenet: say which, such as: relssl convert stl10 .* --root"
    ):
        detect(tmp_path)
    assert detect(tmp_path / "stl10_binary.tar.gz") == "stl10"
    assert detect("tiny_imagenet") == detect("tiny-imagenet") == "tiny-imagenet"


def test_a_folder_called_like_its_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stl10").mkdir()
    (tmp_path / "stl10" / "stl10_binary.tar.gz").write_bytes(b"x")
    with pytest.raises(InputError, match=r"stl10/stl10_binary\.tar\.gz: MD5"):
        convert_source("stl10", "a.beton")


# -- summary and verification


def test_the_summary_says_what_a_person_wants_to_know(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 102.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock, 102.0))
    lines = convert_source(folder, tmp_path / "a.beton").lines()
    size = (tmp_path / "a.beton").stat().st_size / 1e6
    assert lines[0].endswith(f"a.beton: 5 images, 3 classes, jpg, {size:.1f} MB, in 2.0 s (2 images/s)")
    assert lines[-1] == f"next: relssl verify {tmp_path / 'a.beton'}"


def test_verify_reports(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "a.beton"
    convert_source(folder, path)
    sound = verify(path)
    assert sound.ok
    assert sound.report.decoded == 0
    assert f"{path}: 5 images" in sound.text()
    assert "14x10" in sound.text()
    assert "is sound" in sound.text()
    beton.manifest_path(path).unlink()
    calls: list[tuple[int, int]] = []
    assert verify(path, progress=lambda *call: calls.append(call)).report.decoded == 5
    assert calls == [(i, 5) for i in range(1, 6)]
    os.truncate(path, path.stat().st_size - 1)
    damaged = verify(path)
    assert "is damaged; convert it again" in damaged.text()
    assert "cut off" in damaged.text()
    with pytest.raises(InputError, match="cut off"):
        damaged.raise_if_damaged()


# -- real images


def test_real_cifar_images(cifar_subset: Path, tmp_path: Path) -> None:
    train = convert_source(cifar_subset / "train", tmp_path / "train.beton")
    assert (train.images, train.labelled, train.num_skipped, train.mode) == (300, 300, 0, "jpg")
    with beton.open(tmp_path / "train.beton") as read:
        assert np.bincount(read.labels).tolist() == [30] * 10
        assert read.classes is not None
        assert read.classes[0] == "airplane"


@pytest.mark.slow
def test_real_imagenet_images(imagenet_folder: Path, tmp_path: Path) -> None:
    done = convert_source(imagenet_folder, tmp_path / "a.beton")
    assert (done.images, done.labelled, done.num_skipped) == (500, 0, 0)
    assert done.notes["JPEG bytes kept"] == 498
    assert done.notes["rotated as its EXIF says"] == 2
    files = sorted(imagenet_folder.glob("*.JPEG"))
    with beton.open(tmp_path / "a.beton") as read:
        for i in range(0, 500, 50):
            assert read.payload(i).tobytes() == files[i].read_bytes()
