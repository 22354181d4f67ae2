"""Saliency: a thing before a background is found, and where there is none nothing is taken away."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dataset_tools.saliency import otsu, saliency


def scene(
    width: int = 200, height: int = 150, box: tuple[float, float, float, float] = (0.3, 0.25, 0.7, 0.8), seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A red ellipse, in a box of shares (left, top, right, bottom), before a green and blue texture; and its mask over
    the image stretched to 128 x 128."""
    rng = np.random.default_rng(seed)
    texture = rng.integers(0, 60, (12, 16, 3), dtype=np.uint8) + np.array([20, 90, 80], np.uint8)
    picture = Image.fromarray(texture).resize((width, height), Image.Resampling.BICUBIC)
    sides = np.array([width, height] * 2)
    ImageDraw.Draw(picture).ellipse([float(x) for x in box * sides], fill=(200, 50, 40))
    mask = Image.new("1", (128, 128))
    ImageDraw.Draw(mask).ellipse([128 * x for x in box], fill=1)
    return np.asarray(picture), np.asarray(mask)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("size", [(200, 150), (150, 200), (640, 480), (32, 32), (400, 60)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_thing_is_found_in_images_of_any_size(size: tuple[int, int], seed: int) -> None:
    pixels, mask = scene(*size, seed=seed)
    found = saliency(pixels)
    assert found.believed
    assert overlap(found.mask, mask) > 0.8
    assert (found.mask & mask).sum() > 0.97 * mask.sum()  # the thing stays
    assert abs(found.share - found.mask.mean()) < 1e-6
    assert found.map.shape == found.mask.shape == (128, 128)
    assert found.map[mask].mean() > found.map[~mask].mean() + 0.5


def test_a_thing_may_touch_the_border() -> None:
    pixels, mask = scene(box=(0.55, 0.3, 1.05, 0.8))
    assert overlap(saliency(pixels).mask, mask) > 0.75


def test_one_small_thing_is_found() -> None:
    pixels, mask = scene(box=(0.4, 0.5, 0.62, 0.75))
    found = saliency(pixels)
    assert found.believed
    assert found.share < 0.12
    assert overlap(found.mask, mask) > 0.6


def test_holes_in_a_thing_belong_to_it() -> None:
    pixels, mask = scene()
    ring = pixels.copy()
    ring[70:85, 90:105] = pixels[:15, :15]
    assert saliency(ring).mask[64:70, 60:66].all()
    assert overlap(saliency(ring).mask, mask) > 0.8


@pytest.mark.parametrize("kind", ["one colour", "noise", "a speck", "small things", "one pixel"])
def test_where_no_subject_is_found_all_of_it_stays(kind: str) -> None:
    rng = np.random.default_rng(0)
    pixels = np.full((120, 160, 3), 90, np.uint8)
    if kind == "noise":
        pixels = rng.integers(0, 256, pixels.shape, dtype=np.uint8)
    elif kind == "a speck":
        pixels[60:66, 80:86] = 250
    elif kind == "small things":
        for y, x in ((20, 20), (85, 125)):
            pixels[y : y + 20, x : x + 20] = 250
    elif kind == "one pixel":
        pixels = pixels[:1, :1]
    found = saliency(pixels)
    assert not found.believed
    assert found.mask.all()


def test_the_same_pixels_give_the_same_mask() -> None:
    pixels, _ = scene()
    a, b = saliency(pixels), saliency(Image.fromarray(pixels))
    assert np.array_equal(a.map, b.map)
    assert np.array_equal(a.mask, b.mask)


def test_otsus_threshold_splits_two_groups() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(m, 0.05, 5000) for m in (0.2, 0.7)]).clip(0, 1)
    assert 0.35 < otsu(values) < 0.55
    assert otsu(np.zeros(10)) > 0


@pytest.mark.data
@pytest.mark.slow
def test_real_photographs_have_subjects(imagenet_folder) -> None:
    found = [saliency(Image.open(path).convert("RGB")) for path in sorted(imagenet_folder.glob("*.JPEG"))[::10]]
    assert np.mean([one.believed for one in found]) > 0.85
    assert 0.2 < np.mean([one.share for one in found if one.believed]) < 0.5
