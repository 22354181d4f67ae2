"""Sheets: pictures arrive unchanged, at the stated scale, in the right place; wrong arrays are named."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import ConfigError
from relssl.pictures import BACKGROUND, FRAME, OTHER, SAME, neighbour_sheet, save_picture, sheet

RED, BLUE, GOLD = (250, 10, 20), (10, 20, 250), (240, 200, 30)


def plain(height: int, width: int, colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def box_of(image: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, width, height of the area of exactly this colour."""
    ys, xs = np.nonzero((np.asarray(image) == colour).all(axis=2))
    assert len(ys) == (np.ptp(ys) + 1) * (np.ptp(xs) + 1), "not one solid rectangle"
    return int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1


def test_views_share_one_scale_and_the_original_is_fitted():
    pictures = [plain(150, 300, RED), plain(25, 25, GOLD), plain(50, 50, BLUE)]
    image = sheet([("goldfish", pictures)], column_titles=["original", "small", "large"], cell=100)
    original, small, large = (box_of(image, colour) for colour in (RED, GOLD, BLUE))
    assert original[2:] == (100, 50)
    assert small[2:] == (50, 50)
    assert large[2:] == (100, 100)
    assert original[0] < small[0] < large[0]
    middles = [2 * y + height for _, y, _, height in (original, small, large)]
    assert max(middles) - min(middles) <= 1


def test_without_fitting_every_picture_has_the_same_scale():
    image = sheet([("", [plain(20, 80, RED), plain(40, 40, BLUE)])], cell=80, fit_first_column=False)
    assert box_of(image, RED)[2:] == (80, 20)
    assert box_of(image, BLUE)[2:] == (40, 40)


def test_enlarged_pixels_stay_exact():
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    marker = plain(32, 32, GOLD)
    image = np.asarray(sheet([("", [marker, marker]), ("", [picture, picture])], cell=100))
    wanted = picture.repeat(3, axis=0).repeat(3, axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(image[..., 0], wanted.shape[:2])
    starts = np.argwhere((windows[:, :, ::48, ::48] == wanted[::48, ::48, 0]).all(axis=(2, 3)))
    exact = [(y, x) for y, x in starts if np.array_equal(image[y : y + 96, x : x + 96], wanted)]
    assert len(exact) == 2


def test_rows_may_differ_in_length_and_long_labels_are_shortened():
    image = sheet([("a" * 200, [plain(8, 8, RED)]), ("b", [plain(8, 8, BLUE)] * 3)], cell=32, title="t" * 50)
    assert image.mode == "RGB"
    assert image.width < 1000
    assert box_of(image, RED)[2:] == (32, 32)
    assert image.getpixel((0, 0)) == BACKGROUND


def test_text_is_drawn():
    rows = [("", [plain(64, 64, RED)])]
    bare = np.asarray(sheet(rows, cell=64))
    titled = np.asarray(sheet(rows, cell=64, title="ReSSL", column_titles=["original"], caption="epoch 0"))
    assert titled.shape[0] > bare.shape[0] + 40
    assert (titled[:40] < 128).any()


def test_neighbours_are_framed_by_class():
    image = neighbour_sheet(
        [(plain(32, 32, RED), [plain(32, 32, BLUE), plain(32, 32, GOLD)])],
        query_labels=["cat"],
        neighbour_labels=[["cat", "dog"]],
        similarities=[[0.9, 0.8]],
        cell=64,
    )
    pixels = np.asarray(image)
    for inner, outer in ((BLUE, SAME), (GOLD, OTHER)):
        x, y, width, height = box_of(image, inner)
        assert (width, height) == (64, 64)
        assert tuple(pixels[y - FRAME, x]) == outer
        assert tuple(pixels[y + height + FRAME - 1, x + width // 2]) == outer
    x, y, *_ = box_of(image, RED)
    assert tuple(pixels[y - 1, x]) == BACKGROUND


def test_neighbours_without_labels_have_no_frame():
    image = np.asarray(neighbour_sheet([(plain(8, 8, RED), [plain(8, 8, BLUE)])], cell=32))
    assert not (image == SAME).all(axis=2).any()
    assert not (image == OTHER).all(axis=2).any()


SQUARE = plain(8, 8, RED)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sheet([]), "at least one picture"),
        (lambda: sheet([("a", [])]), "at least one picture"),
        (lambda: sheet([("a", [SQUARE, SQUARE.astype(np.float32)])]), "row 0: .*float32"),
        (lambda: sheet([("a", [SQUARE[..., :1]])]), r"\(8, 8, 1\)"),
        (lambda: sheet([("a", [SQUARE[:0]])]), r"\(0, 8, 3\)"),
        (lambda: sheet([("a", ["cat.jpg"])]), "expected pictures"),
        (lambda: sheet([("a", [SQUARE])], cell=3), "at least 16"),
        (lambda: neighbour_sheet([(SQUARE, [SQUARE])], query_labels=[]), "1 queries, but 0"),
        (lambda: neighbour_sheet([(SQUARE, [SQUARE])], similarities=[[0.1, 0.2]]), "similarities"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["sheet.png", "sheet.JPG"])
def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch, name):
    place = tmp_path / name
    save_picture(Image.new("RGB", (4, 3), BLUE), place)
    before = place.read_bytes()

    def full_disk(self, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_picture(Image.new("RGB", (9, 9), RED), place)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert place.read_bytes() == before
    with Image.open(place) as picture:
        assert picture.size == (4, 3)


@pytest.mark.parametrize("name", ["sheet.txt", "sheet", "nowhere/sheet.png"])
def test_a_place_for_no_picture_is_named(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"as \.png, \.jpg, \.jpeg into a folder that exists; got .*{name}: choose"):
        save_picture(Image.new("RGB", (4, 3)), tmp_path / name)
