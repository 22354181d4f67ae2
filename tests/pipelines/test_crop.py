"""Three ways to crop, against PIL and against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.crop import crop_matmul, crop_small, crop_tensor
from pipelines.draw import draw
from pipelines.views import ViewSpec

SPECS = {
    "random": ViewSpec("a", 24, box={"random_resized": {"scale": [0.08, 1.0]}}, flip=0.5),
    "enlarged": ViewSpec("a", 64, box={"random_resized": {"scale": [0.08, 1.0]}}, flip=0.5),
    "whole": ViewSpec("a", 32, box={"whole": {}}),
    "center": ViewSpec("a", 28, box={"center": {"resize": 32}}),
}


def smooth_images(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random pictures with structure at several scales and full contrast."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (n, 12, 12, 3), dtype=np.uint8)
    return np.stack([np.array(Image.fromarray(s).resize((width, height), Image.Resampling.BICUBIC)) for s in small])


def drawn(spec, n, height, width):
    index = np.arange(n)
    return draw([spec], seed=1, epoch=0, index=index, heights=np.full(n, height), widths=np.full(n, width))[0]


def pil_crops(images, params, resample=Image.Resampling.BILINEAR):
    out = []
    for image, box, resized, offset, flip in zip(
        images, params.box, params.resized, params.offset, params.flip, strict=True
    ):
        top, left, h, w = (int(v) for v in box)
        crop = Image.fromarray(image[top : top + h, left : left + w]).resize(
            (int(resized[1]), int(resized[0])), resample
        )
        y, x = (int(v) for v in offset)
        square = np.array(crop)[y : y + params.size, x : x + params.size]
        out.append(square[:, ::-1] if flip else square)
    return np.stack(out).astype(int)


def all_ways(images, params):
    n, size = len(images), params.size
    ids = np.arange(n)
    small = np.empty((n, size, size, 3), np.uint8)
    crop_small(images, ids, params, small)
    tensors = torch.empty((n, size, size, 3), dtype=torch.uint8)
    for i in range(n):
        crop_tensor(torch.from_numpy(images[i]).permute(2, 0, 1), params, i, tensors[i])
    return {
        "small": small.astype(int),
        "tensor": tensors.numpy().astype(int),
        "matmul": crop_matmul(torch.from_numpy(images), torch.from_numpy(ids), params).numpy().astype(int),
    }


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 70)])
def test_every_crop_is_pils_to_one_level(name, height, width):
    images = smooth_images(24, height, width)
    params = drawn(SPECS[name], len(images), height, width)
    theirs = pil_crops(images, params)
    for way, ours in all_ways(images, params).items():
        assert np.abs(ours - theirs).max() <= 1, way


def test_bicubic_is_pils_nearly_everywhere():
    spec = ViewSpec("a", 24, box={"random_resized": {"scale": [0.2, 1.0]}}, interpolation="bicubic", flip=0.5)
    images = smooth_images(24, 96, 70)
    params = drawn(spec, len(images), 96, 70)
    out = torch.empty((24, 24, 24, 3), dtype=torch.uint8)
    for i in range(24):
        crop_tensor(torch.from_numpy(images[i]).permute(2, 0, 1), params, i, out[i])
    difference = np.abs(out.numpy().astype(int) - pil_crops(images, params, Image.Resampling.BICUBIC))
    assert difference.mean() <= 0.25
    assert (difference > 1).mean() <= 0.001


def test_pixels_outside_the_box_do_not_exist():
    """A white frame around a black box must leave no trace, as when one crops first."""
    image = np.full((1, 40, 40, 3), 255, np.uint8)
    image[0, 10:30, 10:30] = 0
    params = drawn(ViewSpec("a", 33, box={"whole": {}}), 1, 40, 40)
    params.box[0] = (10, 10, 20, 20)
    for way, ours in all_ways(image, params).items():
        assert ours.max() == 0, way


def test_crops_do_not_depend_on_the_batch():
    images = smooth_images(16, 32, 32)
    whole = drawn(SPECS["random"], 16, 32, 32)
    out = np.empty((16, 24, 24, 3), np.uint8)
    crop_small(images, np.arange(16), whole, out)
    for i in range(16):
        index = np.array([i])
        one = draw([SPECS["random"]], seed=1, epoch=0, index=index, heights=np.array([32]), widths=np.array([32]))[0]
        single = np.empty((1, 24, 24, 3), np.uint8)
        crop_small(images, index, one, single)
        assert (single[0] == out[i]).all()


def test_smaller_images_in_the_corner_of_a_canvas():
    image = smooth_images(1, 20, 30)
    canvas = np.full((1, 40, 40, 3), 200, np.uint8)
    canvas[0, :20, :30] = image[0]
    params = drawn(SPECS["random"], 1, 20, 30)
    for way, ours in all_ways(canvas, params).items():
        assert np.abs(ours - pil_crops(image, params)).max() <= 1, way


def test_reducing_a_large_image_much():
    images = smooth_images(2, 500, 700)
    params = drawn(ViewSpec("a", 16, box={"whole": {}}), 2, 500, 700)
    for way, ours in all_ways(images, params).items():
        assert np.abs(ours - pil_crops(images, params)).max() <= 1, way
