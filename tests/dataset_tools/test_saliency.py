"""Saliency: a thing before a background is found, and where there is none nothing is taken away."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dataset_tools.saliency import _distances, _tidied, border_distance, otsu, saliency

Box = tuple[float, float, float, float]


def scene(
    width: int = 200, height: int = 150, box: Box = (0.3, 0.25, 0.7, 0.8), seed: int = 0, contrast: int = 30
) -> tuple[np.ndarray, np.ndarray]:
    """A red ellipse, in a box of shares (left, top, right, bottom), before a green and blue texture; and its mask over
    the image stretched to 128 x 128."""
    rng = np.random.default_rng(seed)
    texture = rng.integers(0, contrast, (12, 16, 3), dtype=np.uint8) + np.array([20, 90, 80], np.uint8)
    picture = Image.fromarray(texture).resize((width, height), Image.Resampling.BICUBIC)
    sides = np.array([width, height] * 2)
    ImageDraw.Draw(picture).ellipse([float(x) for x in box * sides], fill=(200, 50, 40))
    mask = Image.new("1", (128, 128))
    ImageDraw.Draw(mask).ellipse([128 * x for x in box], fill=1)
    return np.asarray(picture), np.asarray(mask)


def shares(found: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """How much of the thing is kept, and how much of the background is gone."""
    return float(found[mask].mean()), float(1 - found[~mask].mean())


@pytest.mark.parametrize("size", [(200, 150), (150, 200), (640, 480), (32, 32), (400, 60)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_thing_is_found_in_images_of_any_size(size: tuple[int, int], seed: int) -> None:
    pixels, mask = scene(*size, seed=seed)
    found = saliency(pixels)
    assert found.believed
    kept, gone = shares(found.mask, mask)
    assert kept > 0.99
    assert gone > 0.9
    assert abs(found.share - found.mask.mean()) < 1e-6
    assert found.map.shape == found.mask.shape == (128, 128)
    assert found.map.dtype == np.float32
    assert found.map[mask].mean() > found.map[~mask].mean() + 0.5


@pytest.mark.parametrize(
    ("box", "least"),
    [
        ((0.55, 0.3, 1.05, 0.8), 0.6),
        ((-0.05, 0.3, 0.45, 0.8), 0.6),
        ((0.3, -0.1, 0.7, 0.5), 0.6),
        ((0.3, 0.5, 0.7, 1.05), 0.9),  # subjects stand on the lower side
    ],
)
def test_a_thing_may_touch_any_one_side(box: Box, least: float) -> None:
    pixels, mask = scene(box=box)
    kept, gone = shares(saliency(pixels).mask, mask)
    assert kept > 0.97
    assert gone > least


def test_of_a_strong_texture_the_thing_is_kept_and_most_of_the_rest_is_gone() -> None:
    pixels, mask = scene(contrast=60)
    kept, gone = shares(saliency(pixels).mask, mask)
    assert kept > 0.99
    assert gone > 0.7


def test_one_small_thing_is_found() -> None:
    pixels, mask = scene(box=(0.4, 0.5, 0.62, 0.75))
    found = saliency(pixels)
    assert found.believed
    assert found.share < 0.12
    assert shares(found.mask, mask)[0] > 0.99


def test_a_mask_is_tidied() -> None:
    """Gaps are closed, specks go, holes belong to the thing around them; corners beside it do not."""
    mask = np.zeros((128, 128), bool)
    mask[20:100, 10:60] = mask[20:100, 64:118] = True  # two halves of a thing
    mask[50:70, 20:40] = False
    mask[5:8, 5:8] = True
    tidied = np.zeros_like(mask)
    tidied[19:101, 9:119] = True  # and a margin
    assert np.array_equal(_tidied(mask), tidied)
    mask[:] = True
    mask[:20, :20] = mask[-20:, -20:] = False
    assert not _tidied(mask)[[0, -1], [0, -1]].any()
    assert not _tidied(np.zeros_like(mask)).any()


@pytest.mark.parametrize("kind", ["one colour", "almost one colour", "noise", "a speck", "one pixel"])
def test_where_no_subject_is_found_all_of_it_stays(kind: str) -> None:
    rng = np.random.default_rng(0)
    pixels = np.full((120, 160, 3), 90, np.uint8)
    if kind == "noise":
        pixels = rng.integers(0, 256, pixels.shape, dtype=np.uint8)
    elif kind == "almost one colour":
        pixels[40:80, 60:100] += 2
    elif kind == "a speck":
        pixels[60:66, 80:86] = 250
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


def exact_barrier(values: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Minimum barrier distance of every pixel from the seeds: the least highest value of a way that never falls below
    some level, over all levels."""
    best = np.full(values.shape, np.inf)
    for level in np.unique(values):
        highest = np.full(values.shape, np.inf)
        queue = [(values[y, x], y, x) for y, x in zip(*np.nonzero(seeds & (values >= level)), strict=True)]
        heapq.heapify(queue)
        while queue:
            value, y, x = heapq.heappop(queue)
            if highest[y, x] < np.inf:
                continue
            highest[y, x] = value
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= v < values.shape[0] and 0 <= u < values.shape[1] and values[v, u] >= level:
                    heapq.heappush(queue, (max(value, values[v, u]), v, u))
        best = np.minimum(best, highest - level)
    return best


@pytest.mark.parametrize("shape", [(9, 9), (7, 12), (1, 20)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_distances_are_those_of_some_way_and_not_far_from_the_least(shape: tuple[int, int], seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 50, (*shape, 1)).astype(np.float64)
    found = _distances(values)
    for side, where in enumerate((np.s_[0, :], np.s_[:, 0], np.s_[:, -1])):
        seeds = np.zeros(shape, bool)
        seeds[where] = True
        exact = exact_barrier(values[..., 0], seeds)
        assert (found[side] >= exact).all()
        assert found[side].mean() <= (1 if shape[0] == 1 else 1.2) * exact.mean()  # in one row there is one way


def test_border_distance_leaves_out_the_farthest_side_and_the_lower_one() -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, 20:] = 255  # a step of 100 in lightness, and none in a and b
    distance = border_distance(pixels)
    assert distance.shape == (40, 40)
    assert np.allclose(distance, 0, atol=0.1)  # the upper side reaches both halves, and each half its own side
    pixels[:20] = 0
    lower = border_distance(pixels)
    assert np.allclose(lower[:, :20], 0, atol=0.1)
    assert np.allclose(
        lower[20:, 20:], 50, atol=0.1
    )  # a step from the upper side, none from the right, the left left out


def test_otsus_threshold_splits_two_groups() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(m, 0.05, 5000) for m in (0.2, 0.7)]).clip(0, 1)
    assert 0.35 < otsu(values) < 0.55
    assert otsu(np.zeros(10)) > 0


@pytest.mark.data
@pytest.mark.slow
def test_real_photographs_have_subjects(imagenet_folder) -> None:
    found = [saliency(Image.open(path).convert("RGB")) for path in sorted(imagenet_folder.glob("*.JPEG"))[::10]]
    assert np.mean([one.believed for one in found]) > 0.95
    assert 0.4 < np.mean([one.share for one in found if one.believed]) < 0.7
