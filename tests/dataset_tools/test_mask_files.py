"""Masks from any model: found beside their images, read as they are meant, and named when they cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_tools import convert
from dataset_tools.convert import convert_source
from dataset_tools.mask_files import MaskFolder, MaskRefused, read_mask
from pipelines import beton
from pipelines.errors import ConfigError, InputError

RNG = np.random.default_rng(0)


def save(path: Path, pixels: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8) if pixels is None else pixels).save(path)
    return path


def left(height: int = 40, width: int = 60, value: int = 255) -> np.ndarray:
    """The left half is foreground."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = value
    return mask


LEFT = np.arange(128) < 64


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("m.png", left()),
        ("m.png", left(7, 10)),
        ("m.png", left(32, 52)),  # a model's multiple of its stride
        ("m.png", left(600, 600)),  # stretched to a square
        ("m.png", left(value=128)),
        ("m.png", np.repeat(left()[..., None], 3, axis=2)),
        ("m.png", left().astype(np.uint16) * 200 + 1000),
        ("m.png", left() > 0),
        ("m.jpg", left()),
    ],
)
def test_masks_of_any_kind(tmp_path: Path, name: str, pixels: np.ndarray) -> None:
    assert np.array_equal(read_mask(save(tmp_path / name, pixels), 40, 60), np.tile(LEFT, (128, 1)))


def test_a_mask_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    picture = Image.fromarray(left())
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter: the left is the top
    picture.save(tmp_path / "m.jpg", exif=exif)
    assert np.array_equal(read_mask(tmp_path / "m.jpg", 60, 40), np.tile(LEFT[:, None], (1, 128)))


@pytest.mark.parametrize(
    ("content", "reason", "words"),
    [
        (b"", "mask that cannot be read", "m.png: UnidentifiedImageError"),
        (b"\x89PNG\r\n", "mask that cannot be read", "m.png"),
        (left(value=1), "mask without foreground", "its largest value is 1, less than 128"),  # classes, not levels
        (left(value=127), "mask without foreground", "its largest value is 127"),
        (np.eye(2000, dtype=np.uint8) * 255, "mask without foreground", "nothing is left of it at 128 x 128"),
        (left(60, 40), "mask of another shape", "40 x 60 pixels, the image has 60 x 40; expected these proportions or"),
        (left(40, 80), "mask of another shape", "80 x 40 pixels"),
    ],
)
def test_masks_that_cannot_be_used(tmp_path: Path, content: bytes | np.ndarray, reason: str, words: str) -> None:
    path = tmp_path / "m.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save(path, content)
    with pytest.raises(MaskRefused, match=words) as refused:
        read_mask(path, 40, 60)
    assert refused.value.reason == reason


@pytest.mark.parametrize("name", ["cat/x/1.png", "cat/x/1.JPG", "cat/x/1.jpeg.png", "1.png", "1.jpeg.png"])
def test_masks_are_found_by_the_name_of_the_image(tmp_path: Path, name: str) -> None:
    save(tmp_path / "masks" / name, left())
    folder = MaskFolder(tmp_path / "masks")
    assert np.array_equal(folder("cat/x/1.jpeg", 40, 60), np.tile(LEFT, (128, 1)))
    missing = folder("cat/x/2.jpeg", 40, 60)
    assert isinstance(missing, MaskRefused)
    assert missing.reason == "no mask file"


@pytest.mark.parametrize("key", ["{folder}/images/1.png", "../images/1.png", "a/../../images/1.png"])
def test_an_image_is_not_taken_for_its_own_mask(tmp_path: Path, key: str) -> None:
    save(tmp_path / "images" / "1.png")
    (tmp_path / "masks").mkdir()
    folder = MaskFolder(tmp_path / "masks")
    assert isinstance(folder(key.format(folder=tmp_path), 40, 60), MaskRefused)
    save(tmp_path / "masks" / "1.png", left())
    assert isinstance(folder(key.format(folder=tmp_path), 40, 60), np.ndarray)


def test_two_images_do_not_share_a_mask(tmp_path: Path) -> None:
    save(tmp_path / "masks" / "1.png", left())
    folder = MaskFolder(tmp_path / "masks")
    for _ in range(2):
        assert isinstance(folder("cat/1.jpg", 40, 60), np.ndarray)
    with pytest.raises(InputError, match=r"1\.png: the mask of cat/1\.jpg and of dog/1\.jpg; .*masks/cat/1\.png or "):
        folder("dog/1.jpg", 40, 60)


def test_masks_of_no_image_are_named(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/2.png", "b.PNG"):
        save(tmp_path / "masks" / name, left())
    (tmp_path / "masks" / "notes.txt").write_text("x")
    folder = MaskFolder(tmp_path / "masks")
    folder("cat/1.jpg", 40, 60)
    assert folder.unused() == ["b.PNG", "cat/2.png"]


# -- conversion


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five images, of which one has no mask, one a damaged one, and one cannot be read itself; and a mask of none."""
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.png"):
        save(tmp_path / "images" / name)
    (tmp_path / "images/dog/bad.jpg").write_bytes(b"x")
    for name, width in (("cat/1.png", 60), ("dog/1.png", 64)):
        save(tmp_path / "masks" / name, left(40, width))
    (tmp_path / "masks/dog/2.png").write_bytes(b"no picture")
    save(tmp_path / "masks/dog/9.png", left())
    return tmp_path / "images"


def test_conversion_with_masks(pictures: Path, tmp_path: Path) -> None:
    done = convert_source(pictures, tmp_path / "a.beton", masks=tmp_path / "masks")
    with beton.open(tmp_path / "a.beton") as files:
        assert files.has_masks
        assert [files.mask(i).mean() for i in range(4)] == [0.5, 1, 0.5, 1]
        manifest = files.manifest
    assert manifest is not None
    assert manifest["masks"]["count"] == 2
    assert manifest["masks"]["foreground"] == 0.5
    missing = manifest["masks"]["all_foreground"]
    assert missing["count"] == 2
    assert missing["reasons"] == {"mask that cannot be read": 1, "no mask file": 1}
    assert [entry[0] for entry in missing["inputs"]] == ["cat/2.jpg", "dog/2.png"]
    assert manifest["masks"]["unused"] == {"count": 1, "files": ["dog/9.png"]}
    text = done.text()
    for part in (
        "masks that belong to none of the images: 1: dog/9.png",
        f"masks: 2 from {tmp_path / 'masks'}, 50 %",
        "1 x no mask file: cat/2.jpg",
        "skipped 1 of 5 inputs",
    ):
        assert part in text
    assert beton.verify(tmp_path / "a.beton", decode=True).ok


def test_without_masks_nothing_is_said_of_them(pictures: Path, tmp_path: Path) -> None:
    done = convert_source(pictures, tmp_path / "a.beton")
    assert "masks" not in done.manifest
    assert "mask" not in done.text().replace(str(tmp_path), "")


def test_strict_makes_a_missing_mask_an_error(pictures: Path, tmp_path: Path) -> None:
    (pictures / "dog/bad.jpg").unlink()
    with pytest.raises(InputError, match=r"cat/2\.jpg: no mask file"):
        convert_source(pictures, tmp_path / "a.beton", masks=tmp_path / "masks", strict=True)
    save(tmp_path / "masks/cat/2.png", left())
    with pytest.raises(InputError, match=r"dog/2\.png: mask that cannot be read"):
        convert_source(pictures, tmp_path / "a.beton", masks=tmp_path / "masks", strict=True)
    assert not (tmp_path / "a.beton").exists()


def test_folders_that_cannot_be_meant(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: none of 4 images has a mask there: 4 x no mask file: cat/1\.jpg"):
        convert_source(pictures, tmp_path / "a.beton", masks=tmp_path / "empty")
    with pytest.raises(InputError, match="expected a folder of masks"):
        convert_source(pictures, tmp_path / "a.beton", masks=tmp_path / "absent")
    for masks in (f"{pictures}/../images", pictures / "cat"):
        with pytest.raises(ConfigError, match="this is the one of the images or lies within it"):
            convert_source(pictures, tmp_path / "a.beton", masks=masks)
    assert not (tmp_path / "a.beton").exists()


def test_from_python(tmp_path: Path) -> None:
    save(tmp_path / "masks" / "7.png", left(40, 40))
    image = RNG.integers(0, 256, (9, 9, 3), dtype=np.uint8)
    convert([("7", image, 0), ("8", image, 1)], tmp_path / "a.beton", masks=tmp_path / "masks")
    with beton.open(tmp_path / "a.beton") as files:
        assert np.array_equal(files.mask(0), np.tile(LEFT, (128, 1)))
        assert files.mask(1).all()
