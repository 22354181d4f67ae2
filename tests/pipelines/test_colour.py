"""Colour operations against torchvision's float functionals with the same parameters, and against PIL."""

from __future__ import annotations

import colorsys
import functools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image

from pipelines import colour as operations
from pipelines import kernels
from pipelines.colour import colour, colour_cpu, colour_torch
from pipelines.draw import JITTER_OPS, RANDAUGMENT_OPS, draw, inverse_affine, randaugment_codes
from pipelines.pool import Pool
from pipelines.views import ViewSpec
from relssl.bench.parity_references import pil_operation, pil_randaugment
from tests.pipelines.test_crop import smooth_images
from tests.relssl import golden

STRONG = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.4}
OPS = {
    "jitter": ["jitter", 1.0, STRONG],
    "grey": ["grey", 0.5],
    "blur": ["blur", 0.7, {"sigma": [0.1, 2.0]}],
    "solarise": ["solarise", 0.5],
    "affine": ["affine", 0.6, {"degrees": 18, "translate": 0.1, "scale": [0.9, 1.1], "shear": 10}],
    "jitter_byol": ["jitter_byol", 0.8, STRONG],
    "blur_byol": ["blur", 0.7, {"sigma": [0.1, 2.0], "kernel": "byol"}],
    "randaugment": ["randaugment", 0.7],
    "erase": ["erase", 0.6, {"value": -0.3}],
}
ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def drawn(spec, n, size):
    return draw([spec], seed=2, epoch=1, index=np.arange(n), heights=np.full(n, size), widths=np.full(n, size))[0]


@pytest.fixture(params=["kernels", "torch"])
def ours(request):
    """The two implementations, as images (N, S, S, 3) uint8, spec -> (N, S, S, 3)."""

    def run(images, spec, params=None):
        params = params or drawn(spec, len(images), images.shape[1])
        crops, out = torch.from_numpy(images).unsqueeze(0), torch.empty((1, *images.shape))
        if request.param == "torch":
            colour_torch(crops, params, spec, out)
        else:
            colour_cpu(crops, params, spec, out, 0, len(images))
        return out[0]

    return run


def torchvision_chain(images, spec):
    """One image at a time with torchvision's functionals in float; (N, S, S, 3) in [0, 1]."""
    params = drawn(spec, len(images), images.shape[1])
    out = []
    for i, image in enumerate(images):
        x = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        for op in params.ops:
            if not op.apply[0, i]:
                continue
            if op.name == "jitter":
                for kind in op.order[0, i]:
                    x = ADJUST[kind](x, float(op.value[0, i, kind]))
            elif op.name == "grey":
                x = tv.rgb_to_grayscale(x, num_output_channels=3)
            elif op.name == "blur":
                x = tv.gaussian_blur(x, [23, 23], [float(op.value[0, i, 0])] * 2)
            else:
                x = tv.solarize(x, 128 / 255)
        out.append(x.permute(1, 2, 0))
    return torch.stack(out)


@pytest.mark.parametrize("name", ["jitter", "grey", "blur"])
def test_each_operation_is_torchvisions(ours, name):
    spec = ViewSpec("a", 32, ops=[OPS[name]], normalize=None)
    images = smooth_images(48, 32, 32)
    assert (ours(images, spec) - torchvision_chain(images, spec)).abs().max() * 255 < 0.01


def test_the_whole_chain_is_torchvisions(ours):
    spec = ViewSpec("a", 32, ops=[OPS["jitter"], OPS["grey"], OPS["blur"]], normalize=None)
    images = smooth_images(64, 32, 32)
    assert (ours(images, spec) - torchvision_chain(images, spec)).abs().max() * 255 < 0.01


def test_solarise_is_exact_on_eight_bit_images(ours):
    spec = ViewSpec("a", 32, ops=[OPS["solarise"]], normalize=None)
    images = smooth_images(32, 32, 32)
    params = drawn(spec, 32, 32)
    theirs = images.astype(int)
    solarised = np.where(theirs >= 128, 255 - theirs, theirs)
    theirs[params.ops.apply[0, :, 0]] = solarised[params.ops.apply[0, :, 0]]
    assert params.ops.apply[0, :, 0].any()
    assert not params.ops.apply[0, :, 0].all()
    assert (np.rint(ours(images, spec).numpy() * 255) == theirs).all()


def test_order_of_the_operations_matters_and_is_kept(ours):
    first = ViewSpec("a", 32, ops=[["grey", 1.0], ["jitter", 1.0, {"hue": 0.4}]], normalize=None)
    images = smooth_images(4, 32, 32)
    out = ours(images, first)  # grey first: a hue has nothing left to turn
    assert (out[..., 0] - out[..., 1]).abs().max() < 1e-6


# -- BYOL's dialect

ORIGINAL = golden.load("relicv2_augment")
SHAPE = ORIGINAL["image"].shape  # height, width, 3
SQUARE = max(SHAPE)


def by_kernels(name, image, value, sums):
    planes = np.ascontiguousarray(image.transpose(2, 0, 1)).reshape(3, -1)
    value = np.float32(value)
    if name == "brightness":
        kernels._added_brightness(planes, value)
    elif name == "contrast":
        kernels._channel_contrast(planes, value, np.empty(sums, np.float32))
    elif name == "saturation":
        kernels._hsv_saturation(planes, value)
    elif name == "hue":
        kernels._hue(planes, value)
    elif name == "grayscale":
        kernels._grey(planes)
    elif name == "solarize":
        kernels._solarise(planes, value)
    else:
        side = image.shape[0]
        spare, border = np.empty(3 * side * side, np.float32), np.empty(4 * side, np.float32)
        kernels._blur(planes, side, value, BLUR_TAPS, spare, border)
    return planes.reshape(3, *image.shape[:2]).transpose(1, 2, 0)


def by_torch(name, image, value, sums):
    x = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0).contiguous()
    values = {
        "brightness": (1, 0, value),
        "contrast": (value, 1 - value, 0),
        "saturation": (0, 0, value),
        "hue": (0, 0, 0, value),
        "blur": (value, BLUR_TAPS),
    }.get(name, (value,))
    function = {
        "brightness": operations._channel_linear,
        "contrast": operations._channel_linear,
        "saturation": operations._hsv_saturation,
        "hue": operations._hue,
        "grayscale": operations._grey,
        "solarize": operations._solarise,
        "blur": operations._blur,
    }[name]
    return function(x, torch.tensor([values], dtype=torch.float32))[0].permute(1, 2, 0).numpy()


BLUR_TAPS = 2 * int(ORIGINAL["blur_kernel_size_arg"] / 2) + 1


@pytest.mark.evidence(
    "relicv2", "part", "each colour operation of BYOL's dialect, on one image; kernels of the CPU and torch's",
    golden="relicv2_augment", dtype="float32", tolerance="2e-6",
)  # fmt: skip
@pytest.mark.parametrize("way", [by_kernels, by_torch])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("brightness", ORIGINAL["brightness_deltas"]),
        ("contrast", ORIGINAL["contrast_factors"]),
        ("saturation", ORIGINAL["saturation_factors"]),
        ("hue", ORIGINAL["hue_deltas"]),
        ("blur", ORIGINAL["blur_sigmas"]),
        ("grayscale", [0.0]),
        ("solarize", [ORIGINAL["solarize_threshold"]]),
    ],
)
def test_byols_pieces_are_the_originals(name, values, way):
    """From one image of floats; the clip that ends each step of the jitter is applied to both."""
    expected = ORIGINAL[name] if ORIGINAL[name].ndim == 4 else ORIGINAL[name][None]
    assert len(expected) == len(values)
    image = ORIGINAL["image"]
    if name == "blur":  # of squares: black beside an image is what lies around it
        image = np.zeros((SQUARE, SQUARE, 3), np.float32)
        image[: SHAPE[0], : SHAPE[1]] = ORIGINAL["image"]
    for value, theirs in zip(values, expected, strict=True):
        found = way(name, image, float(value), SHAPE[1])[: SHAPE[0], : SHAPE[1]]
        assert np.abs(found - np.clip(theirs, 0, 1)).max() <= 2e-6
        assert np.abs(theirs - ORIGINAL["image"]).max() > 0.01  # it was something


def byol_step(x, kind, value):
    """One step of the jitter on an image (S, S, 3) of doubles, by the formulas of the specification."""
    if kind == 0:
        x = x + value
    elif kind == 1:
        mean = x.mean((0, 1))
        x = value * (x - mean) + mean
    else:
        hsv = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in x.reshape(-1, 3)])
        if kind == 2:
            hsv[:, 1] = np.clip(hsv[:, 1] * value, 0, 1)
        else:
            hsv[:, 0] = (hsv[:, 0] + value) % 1
        x = np.array([colorsys.hsv_to_rgb(*pixel) for pixel in hsv]).reshape(x.shape)
    return np.clip(x, 0, 1)


def test_byols_jitter_takes_its_steps_in_the_samples_order(ours):
    """All four, clipped after each, in every order; against one image at a time in float64."""
    spec = ViewSpec("a", 12, ops=[["jitter_byol", 0.8, STRONG]], normalize=None)
    images = smooth_images(96, 12, 12)
    images[0] = 0
    images[1] = 255
    images[2] = np.arange(144, dtype=np.uint8).reshape(12, 12, 1)
    params = drawn(spec, len(images), 12)
    (op,) = params.ops
    op.apply[0, :3] = True
    assert len(np.unique(op.order[0], axis=0)) == 24
    found = ours(images, spec, params).numpy()
    for i, image in enumerate(images):
        x = image / 255
        if op.apply[0, i]:
            for kind in op.order[0, i]:
                x = byol_step(x, kind, float(op.value[0, i, kind]))
        assert np.abs(found[i] - x).max() <= 1e-5, i
    assert not op.apply.all()


@pytest.mark.parametrize("size", [1, 7, 19, 20, 64, 121])
def test_byols_blur_darkens_the_borders(ours, size):
    """A tenth of the side long, and black outside: against the same sums written out."""
    spec = ViewSpec("a", size, ops=[["blur", 1.0, {"sigma": [0.5, 9.0], "kernel": "byol"}]], normalize=None)
    images = np.maximum(smooth_images(6, size, size), 1)
    params = drawn(spec, len(images), size)
    radius = int(size / 10 / 2)
    for i, image in enumerate(images):
        at = np.arange(-radius, radius + 1)
        weight = np.exp(-0.5 * (at / params.ops.value[0, i, 0, 0].astype(float)) ** 2)
        weight /= weight.sum()
        x = np.pad(image / 255, ((radius, radius), (radius, radius), (0, 0)))
        x = sum(w * x[k : k + size] for k, w in enumerate(weight))
        x = sum(w * x[:, k : k + size] for k, w in enumerate(weight))
        assert np.abs(ours(images, spec, params)[i].numpy() - x).max() <= 2e-6
    white = ours(np.full_like(images, 255), spec, params)
    assert (white[:, 0] < 0.9).all() if radius else (white > 0.999999).all()


# -- RandAugment

UNEVEN = [("identity", 1, 1), ("autocontrast", 5, 1), ("equalize", 5, 1)]  # their level means nothing
EVERY_LEVEL = [
    *UNEVEN,
    *[(name, level, 1) for name in RANDAUGMENT_OPS for level in range(1, 10) if name not in {u[0] for u in UNEVEN}],
    *[(n, level, -1) for n in RANDAUGMENT_OPS for level in range(1, 10) if n.startswith(("rot", "shear", "trans"))],
]


def augmented_pictures(size):
    """Smooth, noisy, dark, of few levels, with one bright pixel, of one level, and of two."""
    rng = np.random.default_rng(size)
    smooth = smooth_images(2, size, size, seed=3)
    noise = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    dark, few = noise // 5 + 30, noise // 64 * 60 + 7
    lonely, even = np.full_like(noise, 9), np.full_like(noise, 77)
    lonely[0, -1] = (255, 10, 200)
    two = np.where(noise > 200, np.uint8(99), np.uint8(12))
    return np.stack([*smooth, noise, dark, few, lonely, even, two])


@pytest.mark.parametrize("size", [1, 2, 3, 32, 90])
def test_each_operation_of_randaugment_is_pils_to_the_bit(ours, size):
    pictures = augmented_pictures(size)
    spec = ViewSpec("a", size, ops=[["randaugment", 1.0]], normalize=None)
    images = np.repeat(pictures, len(EVERY_LEVEL), axis=0)
    params = drawn(spec, len(images), size)
    value = params.ops.value[0, :, 0]
    value[:] = 0
    value[:, 2] = np.tile(
        [randaugment_codes(RANDAUGMENT_OPS.index(name), level, sign < 0) for name, level, sign in EVERY_LEVEL],
        len(pictures),
    )
    found = ours(images, spec, params).numpy() * 255
    at = 0
    for picture in pictures:
        for name, level, sign in EVERY_LEVEL:
            theirs = np.array(pil_operation(Image.fromarray(picture), name, level, sign))
            assert np.abs(found[at] - theirs).max() <= 1e-4, (name, level, sign)
            at += 1


def test_randaugments_levels_are_those_of_the_specification():
    """What `pil_operation` asks of PIL, by hand."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2))
    array = np.array(ramp)
    assert len(np.unique(pil_operation(ramp, "posterize", 2, 1))) == 16
    assert len(np.unique(pil_operation(ramp, "posterize", 9, 1))) == 128
    assert np.array(pil_operation(ramp, "solarise", 9, 1)).max() == 229  # 256 - 230 = 26 and more are inverted
    assert np.array(pil_operation(ramp, "solarise", 1, 1)).max() == 230  # 256 - 25 = 231
    assert np.array(pil_operation(ramp, "brightness", 5, 1)).max() == 127  # 0.5
    assert np.array(pil_operation(ramp, "brightness", 9, 1)).max() == 219  # 0.86
    left = np.array(pil_operation(ramp, "translate_x", 9, 1))  # 0.27 of 16 pixels
    assert (left[:, :12] == array[:, 4:]).all()
    assert (left[:, 12:] == 0).all()
    down = np.array(pil_operation(ramp, "translate_y", 3, -1))
    assert (down[1:] == array[:15]).all()
    assert (down[0] == 0).all()
    sheared = np.array(pil_operation(ramp, "shear_x", 9, -1))
    assert (sheared[-1, :4] == 0).all()  # 0.27 times 15.5 pixels
    assert (sheared[-1, 4:] == array[-1, :12]).all()
    turned = np.array(pil_operation(ramp.resize((101, 101)), "rotate", 9, 1))
    assert (turned[0, 0] == 0).all()  # by 27 degrees: a corner is beyond the edge


@pytest.mark.parametrize("before", [[], [OPS["jitter"], OPS["grey"], OPS["blur"]]], ids=["alone", "after colours"])
def test_randaugment_is_pils_on_rounded_images(ours, before):
    size = 40
    images, op = smooth_images(96, size, size), ["randaugment", 0.8]
    spec = ViewSpec("a", size, ops=[*before, op], normalize=None)
    params = drawn(spec, len(images), size)
    plain = ours(images, ViewSpec("a", size, ops=before, normalize=None)).numpy()
    found = ours(images, spec, params).numpy() * 255
    (*_, drawn_op) = params.ops
    assert (drawn_op.value[..., 5] == 0).all()
    for i in range(len(images)):
        if not drawn_op.apply[0, i]:
            assert np.abs(found[i] - plain[i] * 255).max() <= 1e-4
            continue
        rounded = Image.fromarray((plain[i] * np.float32(255) + np.float32(0.5)).clip(0, 255).astype(np.uint8))
        theirs = np.array(pil_randaugment(rounded, drawn_op.value[0, i]))
        assert np.abs(found[i] - theirs).max() <= 1e-4
    assert not drawn_op.apply.all()


@pytest.mark.parametrize("size", [1, 2, 32, 33, 96])
def test_affine_is_torchvisions_on_pil_images(ours, size):
    """From the parameters on, by torchvision's own function. It cuts off the fractions of 8 bits that we keep."""
    rng = np.random.default_rng(0)
    spec = ViewSpec("a", size, ops=[["affine", 1.0, {"degrees": 18}]], normalize=None)
    images = rng.integers(1, 256, (24, size, size, 3), dtype=np.uint8)
    params = drawn(spec, 24, size)
    low, high = [-180, -0.3 * size, -0.3 * size, 0.5, -40, -40], [180, 0.3 * size, 0.3 * size, 2, 40, 40]
    given = rng.uniform(low, high, (24, 6))
    given[:, 1:3] = np.rint(given[:, 1:3])
    given[0], given[1] = (0, 0, 0, 1, 0, 0), (0, size // 2, -(size // 4), 1, 0, 0)  # nothing, and a shift alone
    names = ("angle", "translate_x", "translate_y", "scale", "shear_x", "shear_y")
    params.ops.value[0, :, 0] = inverse_affine(**dict(zip(names, given.T, strict=True)))
    theirs = [
        tv.affine(Image.fromarray(image), a, [int(x), int(y)], s, [u, v], tv.InterpolationMode.BILINEAR)
        for image, (a, x, y, s, u, v) in zip(images, given.tolist(), strict=True)
    ]
    found = ours(images, spec, params).numpy() * 255
    difference = found - np.stack(theirs)
    near = (difference > -0.02) & (difference < 1.02)  # elsewhere a pixel fell on the other side of the image's edge
    assert (~near).mean() <= 1e-4
    black = np.stack(theirs) == 0
    assert abs(found[near & black]).max() <= 0.02 if size > 1 else True
    assert black.mean() > 0.02 or size == 1
    assert abs(found[0] - images[0]).max() <= 0.01


def test_affine_by_both_ways_is_one(monkeypatch):
    images = np.random.default_rng(1).integers(0, 256, (1, 16, 64, 64, 3), dtype=np.uint8)
    spec = ViewSpec("a", 64, ops=[["affine", 0.7, OPS["affine"][2]]], normalize=None)
    params, crops = drawn(spec, 16, 64), torch.from_numpy(images)
    a, b = torch.empty(crops.shape), torch.empty(crops.shape)
    colour_cpu(crops, params, spec, a, 0, 16)
    colour_torch(crops, params, spec, b)
    assert (a - b).abs().max() * 255 <= 0.01
    kept = ~params.ops.apply[0, :, 0]
    assert 0 < kept.sum() < 16
    assert torch.equal(a[0, kept] * 255, crops[0, kept].float())


def test_affine_comes_in_the_order_of_the_ops(ours):
    """What lies outside is black before the ops that follow: inverted, it is white."""
    shifted, inverted = ["affine", 1, {"degrees": 0, "translate": 1}], ["solarise", 1, {"threshold": 0}]
    images = np.full((8, 16, 16, 3), 255, np.uint8)
    last = ours(images, ViewSpec("a", 16, ops=[inverted, shifted], normalize=None))
    assert (last == 0).all()
    first = ours(images, ViewSpec("a", 16, ops=[shifted, inverted], normalize=None))
    assert set(first.unique().tolist()) == {0, 1}


def test_what_is_outside_is_black_before_the_normalisation(ours):
    spec = ViewSpec("a", 16, ops=[["affine", 1, {"degrees": 0, "translate": 1}]], normalize=((0.5,) * 3, (0.25,) * 3))
    found = ours(np.full((8, 16, 16, 3), 255, np.uint8), spec)
    assert set(found.unique().tolist()) == {-2, 2}


@pytest.mark.parametrize("value", [0.0, -0.3])
def test_erase_is_torchvisions_after_the_normalisation(ours, value):
    spec = ViewSpec("a", 33, ops=[OPS["jitter"], ["erase", 0.6, {"value": value}]])
    images = smooth_images(48, 33, 33)
    params = drawn(spec, 48, 33)
    _, erase = params.ops
    expected = ours(images, ViewSpec("a", 33, ops=[OPS["jitter"]]))
    for i in np.flatnonzero(erase.apply[0]):
        top, left, height, width = erase.value[0, i, :4].astype(int).tolist()
        tv.erase(expected[i].permute(2, 0, 1), top, left, height, width, torch.tensor(value), inplace=True)
    found = ours(images, spec)
    assert torch.equal(found, expected)
    assert (found == np.float32(value)).any()
    assert not erase.apply.all()


def test_boxes_of_any_kind_are_erased_inside_the_view(ours):
    spec = ViewSpec("a", 8, ops=[["erase", 1]], normalize=None)
    params = drawn(spec, 4, 8)
    params.ops.value[0, :, 0, :4] = [(0, 0, 8, 8), (3, 2, 0, 5), (-2, -3, 4, 5), (6, 7, 100, 100)]
    erased = (ours(np.full((4, 8, 8, 3), 255, np.uint8), spec, params) == 0).all(-1)
    expected = torch.zeros(4, 8, 8, dtype=torch.bool)
    expected[0], expected[2, :2, :2], expected[3, 6:, 7:] = True, True, True
    assert torch.equal(erased, expected)


def test_near_pils_chain(ours):
    """PIL rounds to 8 bits after every step and blurs by boxes: close on average."""
    spec = ViewSpec("a", 32, ops=[OPS["jitter"]], normalize=None)
    images = smooth_images(32, 32, 32)
    params = drawn(spec, 32, 32)
    op = next(iter(params.ops))
    theirs = []
    for i, image in enumerate(images):
        x = Image.fromarray(image)
        for kind in op.order[0, i]:
            x = ADJUST[kind](x, float(op.value[0, i, kind]))
        theirs.append(np.array(x))
    assert np.abs(ours(images, spec).numpy() * 255 - np.stack(theirs)).mean() <= 1.5


def test_bits_do_not_depend_on_the_batch(ours):
    spec = ViewSpec("a", 37, ops=list(OPS.values()))
    images = smooth_images(20, 37, 37)
    whole = ours(images, spec)
    for part in (slice(3, 4), slice(5, 12)):
        index = np.arange(20)[part]
        n = len(index)
        params = draw([spec], seed=2, epoch=1, index=index, heights=np.full(n, 37), widths=np.full(n, 37))[0]
        assert torch.equal(ours(images[part], spec, params), whole[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("planar", [False, True])
def test_every_dtype_and_layout_is_the_rounded_float32(dtype, planar):
    spec = ViewSpec("a", 21, count=2, ops=list(OPS.values()))
    images = np.stack([smooth_images(6, 21, 21), smooth_images(6, 21, 21, seed=1)])
    crops, params = torch.from_numpy(images), drawn(spec, 6, 21)
    exact = torch.empty(2, 6, 21, 21, 3)
    colour_cpu(crops, params, spec, exact, 0, 6)
    out = torch.empty(2, 6, 3, 21, 21, dtype=dtype).movedim(2, -1) if planar else torch.empty_like(exact, dtype=dtype)
    for start, stop in ((4, 6), (0, 1), (1, 4)):  # ranges of rows, in any order
        colour_cpu(crops, params, spec, out, start, stop)
    assert torch.equal(out, exact.to(dtype))
    by_torch = torch.empty_like(out)
    colour_torch(crops, params, spec, by_torch)
    assert (by_torch.float() - exact).abs().max() <= torch.finfo(dtype).eps * 4 + 1e-4


def test_threads_do_not_change_a_bit():
    spec = ViewSpec("a", 40, count=3, ops=list(OPS.values()))
    crops, params = torch.from_numpy(np.stack([smooth_images(32, 40, 40)] * 3)), drawn(spec, 32, 40)
    results = []
    for threads in (1, 2, 5):
        out, pool = torch.empty(3, 32, 40, 40, 3), Pool(threads)
        pool.run(functools.partial(colour_cpu, crops, params, spec, out), 32)
        pool.close()
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_layout_that_is_neither_planes_nor_pixels_is_refused():
    spec = ViewSpec("a", 8)
    out = torch.empty(1, 2, 8, 3, 8).movedim(3, -1)
    with pytest.raises(ValueError, match="contiguous pixels or planes"):
        colour_cpu(torch.zeros(1, 2, 8, 8, 3, dtype=torch.uint8), drawn(spec, 2, 8), spec, out, 0, 2)


def test_normalisation_comes_last(ours):
    spec = ViewSpec("a", 8, normalize=((0.5, 0.25, 0.0), (0.5, 0.25, 1.0)))
    images = np.full((1, 8, 8, 3), 255, np.uint8)
    assert torch.equal(ours(images, spec)[0, 0, 0], torch.tensor([1.0, 3.0, 1.0]))


def test_grey_pixels_have_no_hue(ours):
    spec = ViewSpec("a", 8, ops=[["jitter", 1.0, {"hue": 0.5}]], normalize=None)
    images = np.repeat(np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1) * 4, 3, axis=3)
    assert (ours(images, spec) * 255 - torch.from_numpy(images.astype(np.float32))).abs().max() < 1e-4


def test_jitter_names_match_the_functions():
    assert [f.__name__ for f in ADJUST] == [f"adjust_{name}" for name in JITTER_OPS]


# -- masks


def blobs(n, seed=0):
    """Masks (N, 128, 128) bool with smooth outlines, and one of single pixels."""
    masks = smooth_images(n, 128, 128, seed=seed)[..., 0] > 128
    masks[-1] = np.random.default_rng(seed).random((128, 128)) > 0.5
    return masks


def masked_views(way, crops, params, spec, masks):
    out = torch.empty(crops.shape)
    packed = np.packbits(masks, axis=-1).reshape(len(masks), -1)
    if way == "torch":
        colour_torch(crops, params, spec, out, packed)
    else:
        colour_cpu(crops, params, spec, out, 0, crops.shape[1], packed)
    return out


def drawn_sized(spec, n, height, width):
    return draw([spec], seed=2, epoch=1, index=np.arange(n), heights=np.full(n, height), widths=np.full(n, width))[0]


@pytest.mark.parametrize("way", ["kernels", "torch"])
@pytest.mark.parametrize("size", [24, 200])
def test_the_background_is_grey_where_pils_crop_of_the_mask_is_dark(way, size):
    spec = ViewSpec("a", size, count=2, flip=0.5, mask_p=0.7, normalize=None)
    params, masks = drawn_sized(spec, 12, 60, 90), blobs(12)
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 120, (2, 12, size, size, 3), dtype=np.uint8))
    out = masked_views(way, crops, params, spec, masks)
    for v, b in np.ndindex(2, 12):
        if not params.masked[v, b]:
            assert torch.equal(out[v, b], crops[v, b] / 255.0)
            continue
        top, left, height, width = params.box[v, b] * np.array([128 / 60, 128 / 90] * 2)
        picture = Image.fromarray(masks[b].astype(np.float32))
        box = (left, top, left + width, top + height)
        share = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=box))
        share = share[:, ::-1] if params.flip[v, b] else share
        # At the edge of the box, PIL's filter ends, ours goes on: a mask is not cut out before it is resampled.
        sure = abs(share - 0.5) > 1e-3
        sure[[0, -1]] = sure[:, [0, -1]] = False
        foreground = (out[v, b] != 0.5).all(-1).numpy()
        assert (foreground == (share >= 0.5))[sure].mean() > 0.995
        assert torch.equal(out[v, b][foreground], (crops[v, b] / 255.0)[foreground])
        assert (out[v, b][~foreground] == 0.5).all()
    assert 0 < params.masked.sum() < 24


@pytest.mark.parametrize(
    "box", [{"random_resized": {}}, {"center": {"resize": 80}}, {"whole": {}}, {"pad_crop": {"padding": 40}}]
)
def test_masks_by_both_ways_are_one(box):
    spec = ViewSpec("a", 64, count=3, box=box, flip=0.5, mask_p=0.6, ops=[OPS["jitter"], OPS["blur"]], normalize=None)
    params, masks = drawn_sized(spec, 10, 60, 90), blobs(10)
    crops = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 10, 64, 64, 3), dtype=np.uint8))
    a, b = (masked_views(way, crops, params, spec, masks) for way in ("kernels", "torch"))
    assert (a - b).abs().max() * 255 < 0.02


@pytest.mark.parametrize("way", ["kernels", "torch"])
def test_what_is_outside_the_image_is_background(way):
    spec = ViewSpec("a", 32, box={"pad_crop": {"padding": 16}}, mask_p=1, normalize=None)
    params = drawn_sized(spec, 8, 32, 32)
    out = masked_views(way, torch.zeros(1, 8, 32, 32, 3, dtype=torch.uint8), params, spec, np.ones((8, 128, 128), bool))
    for b in range(8):
        y, x = params.offset[0, b]
        inside = np.zeros((32, 32), bool)
        inside[max(-y, 0) : 32 - max(y, 0), max(-x, 0) : 32 - max(x, 0)] = True
        assert (out[0, b][torch.from_numpy(inside)] == 0).all()
        assert (out[0, b][torch.from_numpy(~inside)] == 0.5).all()


@pytest.mark.parametrize("way", ["kernels", "torch"])
def test_the_background_goes_before_the_colours(way):
    """Solarised mid-grey is mid-grey; what is bright in the background would be dark, and be blurred into the rest."""
    ops = [["solarise", 1, {"threshold": 0.6}], ["blur", 1, {"sigma": [2, 2]}]]
    spec = ViewSpec("a", 32, box="whole", mask_p=1, normalize=None, ops=ops)
    masks = np.zeros((4, 128, 128), bool)
    bright = torch.full((1, 4, 32, 32, 3), 250, dtype=torch.uint8)
    out = masked_views(way, bright, drawn_sized(spec, 4, 32, 32), spec, masks)
    assert (out - 0.5).abs().max() < 1e-6


def test_masked_views_of_a_range_of_rows():
    spec = ViewSpec("a", 16, count=2, mask_p=0.5, normalize=None)
    params, masks = drawn_sized(spec, 9, 40, 40), blobs(9)
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 9, 16, 16, 3), dtype=np.uint8))
    whole, parts = masked_views("kernels", crops, params, spec, masks), torch.empty(crops.shape)
    packed = np.packbits(masks, axis=-1).reshape(9, -1)
    for start, stop in ((0, 2), (2, 7), (7, 9)):
        colour(crops, params, spec, parts, start, stop, packed[start:stop])
    assert torch.equal(whole, parts)
    with pytest.raises(ValueError, match="need the masks of their images"):
        colour(crops, params, spec, parts)
