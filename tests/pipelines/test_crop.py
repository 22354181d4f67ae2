"""Three ways to crop, against PIL and against each other."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as tv
from PIL import Image

from pipelines.crop import _interpolation_matrix, crop_image, crop_matmul, crop_small
from pipelines.draw import draw
from pipelines.views import ViewSpec

SPECS = {
    "random": ViewSpec("a", 24, count=3, box={"random_resized": {"scale": [0.08, 1.0]}}, flip=0.5),
    "enlarged": ViewSpec("a", 64, box={"random_resized": {"scale": [0.08, 1.0]}}, flip=0.5),
    "whole": ViewSpec("a", 32, box={"whole": {}}),
    "center": ViewSpec("a", 28, box={"center": {"resize": 32}}),
    "padded": ViewSpec("a", 30, count=2, box={"pad_crop": {"padding": 10}}, flip=0.5),
}


def smooth_images(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random pictures with structure at several scales and full contrast."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (n, 12, 12, 3), dtype=np.uint8)
    return np.stack([np.array(Image.fromarray(s).resize((width, height), Image.Resampling.BICUBIC)) for s in small])


def drawn(spec, n, height, width):
    index = np.arange(n)
    return draw([spec], seed=1, epoch=0, index=index, heights=np.full(n, height), widths=np.full(n, width))[0]


def pil_crops(images, params):
    """(V, N, S, S, 3) as PIL makes them."""
    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[params.interpolation]
    out = np.empty((*params.flip.shape, params.size, params.size, 3), int)
    for v, i in np.ndindex(params.flip.shape):
        top, left, h, w = params.box[v, i].tolist()
        high, wide = params.resized[v, i].tolist()
        crop = Image.fromarray(images[i, top : top + h, left : left + w]).resize((wide, high), resample)
        y, x = params.offset[v, i].tolist()
        square = np.array(crop.crop((x, y, x + params.size, y + params.size)))  # black where it leaves the image
        out[v, i] = square[:, ::-1] if params.flip[v, i] else square
    return out


def all_ways(images, params):
    """Every implementation, each (V, N, S, S, 3)."""
    shape = (*params.flip.shape, params.size, params.size, 3)
    ids = np.arange(len(images))
    small = np.empty(shape, np.uint8)
    crop_small(images, ids, params, small)
    tensors = torch.empty(shape, dtype=torch.uint8)
    for i in range(len(images)):
        crop_image(torch.from_numpy(images[i]).permute(2, 0, 1), params, i, tensors)
    return {
        "small": small.astype(int),
        "image": tensors.numpy().astype(int),
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


@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 70)])
def test_bicubic_is_pils_nearly_everywhere(height, width):
    """PIL clips overshoot between its two passes, which the others do not."""
    box = {"random_resized": {"scale": [0.2, 1.0]}}
    spec = ViewSpec("a", 24, count=2, box=box, interpolation="bicubic", flip=0.5)
    images = smooth_images(24, height, width)
    params = drawn(spec, len(images), height, width)
    for way, ours in all_ways(images, params).items():
        difference = np.abs(ours - pil_crops(images, params))
        assert difference.mean() <= 0.25, way
        assert (difference > 1).mean() <= 0.001, way


def plain_weights(n_in, n_out, cubic):
    """(n_out, n_in) of TensorFlow's resize: centres of pixels at halves, Keys' cubic with a = -1/2 over four neighbours
    or the triangle over two, those beyond the edge left out and the others made to add up to one."""
    weights = np.zeros((n_out, n_in))
    for o in range(n_out):
        place = (o + 0.5) * n_in / n_out - 0.5
        first = int(np.floor(place)) - (1 if cubic else 0)
        for tap in range(first, first + (4 if cubic else 2)):
            x = abs(place - tap)
            if not cubic:
                weight = 1 - x
            elif x <= 1:
                weight = 1.5 * x**3 - 2.5 * x**2 + 1
            else:
                weight = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
            if 0 <= tap < n_in:
                weights[o, tap] = weight
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [3, 24, 96])
@pytest.mark.parametrize("box", [{"byol": {"scale": [0.08, 1.0]}}, {"byol_center": {}}, {"whole": {}}], ids=str)
def test_crops_without_antialiasing_are_tensorflows(interpolation, size, box):
    """By the definition in float64, on noise, where a wider filter would show; a reduction by 30 among them."""
    images = np.random.default_rng(0).integers(0, 256, (12, 96, 70, 3), dtype=np.uint8)
    spec = ViewSpec("a", size, count=2, box=box, interpolation=interpolation, antialias=False, flip=0.5)
    params = drawn(spec, len(images), 96, 70)
    theirs = np.empty((2, len(images), size, size, 3))
    for v, i in np.ndindex(2, len(images)):
        top, left, h, w = params.box[v, i].tolist()
        crop = images[i, top : top + h, left : left + w].astype(float)
        rows, columns = (plain_weights(n, size, interpolation == "bicubic") for n in (h, w))
        resized = (rows @ crop.transpose(2, 0, 1) @ columns.T).transpose(1, 2, 0)
        theirs[v, i] = resized[:, ::-1] if params.flip[v, i] else resized
    for way, ours in all_ways(images, params).items():
        assert np.abs(ours - theirs.clip(0, 255)).max() <= 0.5 + 1e-3, way


@pytest.mark.parametrize("size", [16, 64, 150])
def test_bilinear_crops_without_antialiasing_are_torchs(size):
    images = smooth_images(6, 96, 70)
    spec = ViewSpec("a", size, box={"whole": {}}, antialias=False)
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    theirs = F.interpolate(planes, (size, size), mode="bilinear", align_corners=False).permute(0, 2, 3, 1).numpy()
    for way, ours in all_ways(images, drawn(spec, 6, 96, 70)).items():
        assert np.abs(ours[0] - theirs).max() <= 0.5 + 1e-3, way


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_antialiasing_changes_nothing_where_nothing_is_reduced(interpolation):
    images = smooth_images(6, 30, 40)
    specs = [ViewSpec("a", 64, antialias=antialias, interpolation=interpolation) for antialias in (True, False)]
    smooth, plain = (all_ways(images, drawn(spec, 6, 30, 40)) for spec in specs)
    for way, ours in smooth.items():
        assert (ours == plain[way]).all(), way
    less, plain = (all_ways(images, drawn(dataclasses.replace(s, size=8), 6, 30, 40)) for s in specs)
    for way, ours in less.items():
        assert np.abs(ours - plain[way]).mean() > 2, way


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 1), (torch.bfloat16, 2)])
def test_matrix_products_in_half_precision(dtype, most):
    images = smooth_images(24, 32, 32)
    params = drawn(SPECS["random"], len(images), 32, 32)
    crops = crop_matmul(torch.from_numpy(images), torch.arange(24), params, dtype).numpy().astype(int)
    difference = np.abs(crops - pil_crops(images, params))
    assert difference.max() <= most
    assert difference.mean() <= 0.35


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("height", "width", "size", "padding"),
    [(32, 32, 32, 4), (40, 25, 28, 9), (3, 4, 6, 5), (50, 60, 33, 0), (1, 1, 1, 0)],
)
def test_padded_crops_are_torchvisions_to_the_bit(height, width, size, padding, interpolation):
    """Pad, crop, mirror: the very pixels, and black, in every way and precision."""
    images = np.random.default_rng(0).integers(1, 256, (40, height, width, 3), dtype=np.uint8)
    box = {"pad_crop": {"padding": padding}}
    params = drawn(ViewSpec("a", size, count=2, box=box, flip=0.5, interpolation=interpolation), 40, height, width)
    theirs = np.empty((2, 40, size, size, 3), int)
    for v, i in np.ndindex(2, 40):
        y, x = (params.offset[v, i] + padding).tolist()
        crop = tv.crop(tv.pad(Image.fromarray(images[i]), padding), y, x, size, size)
        theirs[v, i] = np.array(tv.hflip(crop) if params.flip[v, i] else crop)
    canvas = np.full((40, height + 3, width + 2, 3), 200, np.uint8)  # images of different sizes share one
    canvas[:, :height, :width] = images
    for way, ours in [*all_ways(images, params).items(), *all_ways(canvas, params).items()]:
        assert (ours == theirs).all(), way
    for dtype in (torch.float16, torch.bfloat16):
        ours = crop_matmul(torch.from_numpy(images), torch.arange(40), params, dtype)
        assert (ours.numpy() == theirs).all(), dtype
    # What is not a number becomes some integer: 0 here, perhaps not elsewhere.
    assert all(
        _interpolation_matrix(params, i, (height, width)[i], torch.device("cpu")).isfinite().all() for i in (0, 1)
    )


def test_views_of_both_kinds_of_one_image():
    """One view is cut out and another is resized: `crop_small` converts an image once for those that are."""
    images = smooth_images(8, 32, 32)
    params = drawn(ViewSpec("a", 24, count=2, box={"pad_crop": {"padding": 6}}), 8, 32, 32)
    params.box[1], params.resized[1], params.offset[1] = (4, 3, 20, 26), (24, 24), (0, 0)
    for way, ours in all_ways(images, params).items():
        assert np.abs(ours - pil_crops(images, params)).max() <= 1, way


def test_pixels_outside_the_box_do_not_exist():
    """A white frame around a black box must leave no trace, as when one crops first."""
    image = np.full((1, 40, 40, 3), 255, np.uint8)
    image[0, 10:30, 10:30] = 0
    params = drawn(ViewSpec("a", 33, box={"whole": {}}), 1, 40, 40)
    params.box[0, 0] = (10, 10, 20, 20)
    for way, ours in all_ways(image, params).items():
        assert ours.max() == 0, way


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (2, 3), (5, 200)])
def test_images_and_views_of_a_few_pixels(height, width, size):
    images = smooth_images(6, height, width)
    for box in ({"random_resized": {"scale": [0.1, 1.0]}}, {"whole": {}}, {"center": {"resize": size + 1}}):
        for interpolation, most in (("bilinear", 1), ("bicubic", 30)):
            spec = ViewSpec("a", size, count=2, box=box, interpolation=interpolation, flip=0.5)
            params = drawn(spec, len(images), height, width)
            for way, ours in all_ways(images, params).items():
                assert np.abs(ours - pil_crops(images, params)).max() <= most, (way, box)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("box", (0, 0, 21, 20), "box"),
        ("box", (1, 0, 20, 20), "box"),
        ("box", (0, -1, 20, 20), "box"),
        ("box", (0, 5, 10, 0), "box"),
        ("offset", (0, 1), "square"),
        ("offset", (-1, 0), "square"),
        ("cut", (0, -32), "square"),
        ("cut", (20, 0), "square"),
        ("cut", (0, 20), "square"),
        ("cut", (-32, 0), "square"),
        ("cut", (2**31 - 1, -(2**31)), "square"),
    ],
)
def test_nothing_outside_an_image_is_read(name, value, words):
    images = smooth_images(2, 20, 20)
    params = drawn(SPECS["whole"], 2, 20, 20)
    if name == "cut":
        params.resized[0, 1], params.offset[0, 1] = 20, value
    else:
        getattr(params, name)[0, 1] = value
    out = torch.empty((1, 2, 32, 32, 3), dtype=torch.uint8)
    if words == "square":
        with pytest.raises(ValueError, match=words):
            crop_matmul(torch.from_numpy(images), torch.arange(2), params)
    with pytest.raises(ValueError, match=words):
        crop_image(torch.from_numpy(images[1]).permute(2, 0, 1), params, 1, out)
    with pytest.raises(ValueError, match=words):
        crop_small(images, np.arange(2), params, out.numpy())


def test_crops_do_not_depend_on_the_batch():
    images = smooth_images(16, 32, 32)
    whole = drawn(SPECS["random"], 16, 32, 32)
    out = np.zeros((3, 16, 24, 24, 3), np.uint8)
    crop_small(images, np.arange(16), whole, out)
    parts = np.zeros_like(out)
    for start, stop in ((5, 16), (0, 4), (4, 5)):  # ranges of rows, in any order
        crop_small(images, np.arange(16), whole, parts, start, stop)
    assert (parts == out).all()
    for i in range(16):
        index = np.array([i])
        one = draw([SPECS["random"]], seed=1, epoch=0, index=index, heights=np.array([32]), widths=np.array([32]))[0]
        single = np.empty((3, 1, 24, 24, 3), np.uint8)
        crop_small(images, index, one, single)
        assert (single[:, 0] == out[:, i]).all()


def test_smaller_images_in_the_corner_of_a_canvas():
    image = smooth_images(1, 20, 30)
    canvas = np.full((1, 40, 40, 3), 200, np.uint8)
    canvas[0, :20, :30] = image[0]
    params = drawn(SPECS["random"], 1, 20, 30)
    for way, ours in all_ways(canvas, params).items():
        assert np.abs(ours - pil_crops(image, params)).max() <= 1, way


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 40, 70, 120, 200, 333])
def test_every_number_of_taps(size, interpolation):
    """A reduction by 44 has 89 taps, or 177; the compiled loops have their own form for each small number."""
    images = smooth_images(2, 500, 700)
    params = drawn(ViewSpec("a", size, box={"whole": {}}, interpolation=interpolation), 2, 500, 700)
    for way, ours in all_ways(images, params).items():
        difference = np.abs(ours - pil_crops(images, params))
        assert (difference > 1).mean() <= (0.005 if interpolation == "bicubic" else 0), way
        assert difference.mean() <= 0.25, way
