"""Boxes, flips and factors: distributions against torchvision's, and independence of everything but the keys."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import ColorJitter, RandomAffine, RandomCrop, RandomErasing, RandomResizedCrop
from torchvision.transforms.functional import _get_inverse_affine_matrix

from pipelines.crop import crop_small
from pipelines.draw import JITTER_OPS, RANDAUGMENT_OPS, Stream, check_sizes, counter_hash, draw, inverse_affine
from pipelines.errors import ConfigError
from pipelines.views import ViewSpec

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
PLAN = [
    ViewSpec("teacher", 32, box={"random_resized": {"scale": [0.2, 1.0]}}, flip=0.5),
    ViewSpec(
        "student",
        24,
        count=2,
        box={"random_resized": {"scale": [0.2, 1.0]}},
        flip=0.5,
        ops=[["jitter", 0.8, JITTER], ["grey", 0.2], ["blur", 0.5, {"sigma": [0.1, 2.0]}], ["solarise", 0.2]],
    ),
]
AFFINE = {"degrees": 18, "translate": 0.1, "scale": [0.9, 1.1], "shear": 10}
BYOL = ViewSpec(
    "byol",
    224,
    box={"byol": {"scale": [0.08, 1.0]}},
    flip=0.5,
    ops=[
        ["jitter_byol", 0.8, {"brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1}],
        ["blur", 0.1, {"sigma": [0.1, 2.0], "kernel": "byol"}],
    ],
)
AUGMENTED = ViewSpec("augmented", 24, ops=[["grey", 0.2], ["randaugment", 0.9], ["blur", 0.5, {"sigma": [1, 2]}]])
PADDED = ViewSpec("padded", 24, box={"pad_crop": {"padding": 12}}, flip=0.5)  # of images of any size
WARPED = ViewSpec("warped", 24, flip=0.5, ops=[["affine", 0.5, AFFINE], ["grey", 0.2], ["erase", 0.5]])
EVERY = [*PLAN, PADDED, WARPED, BYOL, AUGMENTED]


def draw_sized(plan, n, *, height, width, seed=0, epoch=0, first=0):
    index = np.arange(first, first + n)
    return draw(plan, seed=seed, epoch=epoch, index=index, heights=np.full(n, height), widths=np.full(n, width))


def rows_of(params, rows):
    """Everything that was drawn for some rows, as one flat list of arrays."""
    ops = params.ops
    arrays = [params.box, params.resized, params.offset, params.flip, ops.apply, ops.value, ops.order]
    return [a[:, rows] for a in arrays]


@given(
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 10**6),
    n=st.integers(1, 40),
    cut=st.integers(0, 40),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
)
def test_draw_depends_on_the_sample_alone(seed, epoch, n, cut, height, width):
    """Any part of a batch, in any company and order, is drawn as in the whole batch."""
    whole = draw_sized(EVERY, n, height=height, width=width, seed=seed, epoch=epoch)
    rows = np.arange(n)[::-1][: max(cut, 1)]
    part = draw(
        EVERY,
        seed=seed,
        epoch=epoch,
        index=rows,
        heights=np.full(len(rows), height),
        widths=np.full(len(rows), width),
    )
    for a, b in zip(whole, part, strict=True):
        for x, y in zip(rows_of(a, rows), rows_of(b, slice(None)), strict=True):
            assert (x == y).all()


@given(height=st.integers(1, 400), width=st.integers(1, 400), seed=st.integers(0, 1000))
def test_boxes_lie_inside_the_image(height, width, seed):
    plan = [
        *PLAN,
        ViewSpec("test", 8, box={"center": {"resize": 10}}),
        ViewSpec("all", 8, box={"whole": {}}),
        ViewSpec("wide", 8, box={"random_resized": {"ratio": [3.0, 4.0]}}),
        ViewSpec("narrow", 8, box={"random_resized": {"ratio": [0.1, 0.3]}}),
        ViewSpec("byol", 8, box={"byol": {}}),
        ViewSpec("byol_wide", 8, box={"byol": {"scale": [1e-6, 1.0], "ratio": [0.1, 10.0]}}),
        ViewSpec("byol_center", 8, box={"byol_center": {}}),
        ViewSpec("byol_point", 8, box={"byol_center": {"share": 0.001}}),
    ]
    for params in draw_sized(plan, 16, height=height, width=width, seed=seed):
        top, left, h, w = np.moveaxis(params.box, -1, 0)
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (h >= 1).all()
        assert (w >= 1).all()
        assert (top + h <= height).all()
        assert (left + w <= width).all()
        assert (params.offset >= 0).all()
        assert (params.offset + params.size <= params.resized).all()


def test_views_seeds_epochs_and_samples_are_drawn_apart():
    base = draw_sized(PLAN, 64, height=40, width=50)
    others = [
        draw_sized(PLAN, 64, height=40, width=50, seed=1)[1],
        draw_sized(PLAN, 64, height=40, width=50, epoch=1)[1],
        draw_sized(PLAN, 64, height=40, width=50, first=64)[1],
    ]
    for other in [*(o.box[0] for o in others), base[1].box[1]]:
        same = (base[1].box[0] == other).all(axis=1).mean()
        assert same < 0.1


def test_a_view_is_drawn_by_its_number_however_it_is_listed():
    """`count: 2` is the same as the spec twice, and what stands before a view only counts."""
    whole = draw_sized(PLAN, 16, height=40, width=50)[1]
    single = dataclasses.replace(PLAN[1], count=1)
    apart = draw_sized([PLAN[0], single, single], 16, height=40, width=50)[1:]
    for view in range(2):
        for a, b in zip(rows_of(whole, slice(None)), rows_of(apart[view], slice(None)), strict=True):
            assert (a[view] == b[0]).all()


def test_adding_an_op_leaves_earlier_draws_alone():
    short = draw_sized([ViewSpec("a", 16, ops=[["jitter", 0.8, JITTER]])], 50, height=30, width=30)[0]
    for added in (
        ["grey", 0.5],
        ["affine", 0.5, AFFINE],
        ["erase", 0.5],
        ["jitter_byol", 0.5, JITTER],
        ["randaugment", 0.5],
    ):
        long = draw_sized([ViewSpec("a", 16, ops=[["jitter", 0.8, JITTER], added])], 50, height=30, width=30)[0]
        assert (short.box == long.box).all()
        assert (short.ops.value[:, :, 0] == long.ops.value[:, :, 0]).all()
        assert (short.ops.order[:, :, 0] == long.ops.order[:, :, 0]).all()


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(300, 400), (32, 32), (50, 400)])
def test_random_resized_crops_are_distributed_as_torchvisions(height, width):
    """Mean and standard deviation of area, log ratio and centre over 20,000 boxes, within 5 standard errors."""
    n, scale, ratio = 20_000, (0.2, 1.0), (3 / 4, 4 / 3)
    ours = draw_sized([PLAN[0]], n, height=height, width=width)[0].box[0].astype(float)
    image = torch.empty(1, height, width)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)], dtype=float)
    for name, f in {
        "area": lambda b: b[:, 2] * b[:, 3] / (height * width),
        "log ratio": lambda b: np.log(b[:, 3] / b[:, 2]),
        "centre y": lambda b: (b[:, 0] + b[:, 2] / 2) / height,
        "centre x": lambda b: (b[:, 1] + b[:, 3] / 2) / width,
    }.items():
        a, b = f(ours), f(theirs)
        error = 5 * np.sqrt((a.var() + b.var()) / n) + 1e-9
        assert abs(a.mean() - b.mean()) < error, name
        assert abs(a.std() - b.std()) < 2 * error, name


def boxes_of_byol(rng, n, height, width, scale, ratio):
    """The specification, one box at a time: one try, rounded, cut down to the image, anywhere in it."""
    boxes = np.empty((n, 4))
    for i in range(n):
        area = rng.uniform(*scale) * height * width
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w = min(round(math.sqrt(area * aspect)), width)
        h = min(round(math.sqrt(area / aspect)), height)
        boxes[i] = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    return boxes


@pytest.mark.parametrize(("height", "width"), [(300, 400), (32, 32), (50, 400)])
def test_byols_boxes_are_distributed_as_specified(height, width):
    n = 20_000
    ours = draw_sized([BYOL], n, height=height, width=width)[0].box[0].astype(float)
    theirs = boxes_of_byol(np.random.default_rng(0), n, height, width, (0.08, 1.0), (3 / 4, 4 / 3))
    found = [np.column_stack([b[:, :2] + b[:, 2:] / 2, b[:, 2:], np.log(b[:, 3] / b[:, 2])]) for b in (ours, theirs)]
    assert_distributed_alike(*found, ("centre y", "centre x", "height", "width", "log ratio"))
    for axis, side in ((2, height), (3, width)):  # how many were cut down: there is no second try
        assert abs((ours[:, axis] == side).mean() - (theirs[:, axis] == side).mean()) < 0.02
    assert (ours[:, 2] == height).mean() > 0.03
    for axis, side in ((0, height), (1, width)):  # every place, the first and the last
        room = side - ours[:, 2 + axis]
        assert (ours[room > 0, axis] == 0).any()
        assert (ours[room > 0, axis] == room[room > 0]).any()


def test_the_ratio_of_byols_boxes_is_width_over_height():
    spec = ViewSpec("a", 24, box={"byol": {"scale": [0.1, 0.1], "ratio": [2, 3]}})
    box = draw_sized([spec], 2000, height=400, width=400)[0].box[0].astype(float)
    ratio = box[:, 3] / box[:, 2]
    assert abs(np.log(ratio).mean() - math.log(6) / 2) < 0.01
    assert 1.95 < ratio.min() < 2.02
    assert 2.95 < ratio.max() < 3.05


def test_byols_central_box():
    """From the formulas of the original's evaluation, by hand; the rest is resized."""
    for height, width, share, box in [
        (500, 375, 0.875, (86, 24, 328, 328)),  # 328.125; 172 / 2 = 86, 47 / 2 up
        (375, 500, 0.875, (24, 86, 328, 328)),
        (256, 256, 0.875, (16, 16, 224, 224)),
        (1, 7, 0.875, (0, 3, 1, 1)),
        (33, 40, 1.0, (0, 4, 33, 33)),
    ]:
        spec = ViewSpec("test", 224, box={"byol_center": {"share": share}})
        params = draw_sized([spec], 1, height=height, width=width)[0]
        assert tuple(params.box[0, 0]) == box
        assert tuple(params.resized[0, 0]) == (224, 224)
        assert tuple(params.offset[0, 0]) == (0, 0)


def test_byols_jitter_is_distributed_as_specified():
    n = 20_000
    jitter, blur = draw_sized([BYOL], n, height=32, width=32)[0].ops
    for i, (low, high) in enumerate([(-0.4, 0.4), (0.7, 1.3), (0.8, 1.2), (-0.1, 0.1)]):
        a = jitter.value[0, :, i]
        width = high - low
        assert low <= a.min() < low + 0.01 * width
        assert high - 0.01 * width < a.max() <= high
        assert abs(a.mean() - (low + high) / 2) < 5 * width / math.sqrt(12 * n)
        assert abs(a.std() - width / math.sqrt(12)) < 0.01 * width
    assert abs(np.corrcoef(jitter.value[0, :, :4].T) - np.eye(4)).max() < 0.05
    orders, counts = np.unique(jitter.order[0], axis=0, return_counts=True)
    assert len(orders) == 24
    assert abs(counts / n - 1 / 24).max() < 0.01
    assert abs(jitter.apply.mean() - 0.8) < 0.02
    assert abs(blur.apply.mean() - 0.1) < 0.02
    assert (blur.value[..., 1] == 23).all()
    for size, taps in ((96, 9), (32, 3), (19, 1), (160, 17)):
        spec = ViewSpec("a", size, ops=[["blur", 1, {"sigma": [0.1, 2.0], "kernel": "byol"}]])
        (op,) = draw_sized([spec], 5, height=32, width=32)[0].ops
        assert (op.value[..., 1] == taps).all()


@pytest.mark.parametrize(("height", "width", "size", "padding"), [(32, 32, 32, 4), (20, 50, 24, 3), (96, 96, 90, 0)])
def test_padded_crops_are_distributed_as_torchvisions(height, width, size, padding):
    """Every place of the square is as frequent as any other, within 5 standard deviations, and there are as many."""
    n = 20_000
    spec = ViewSpec("a", size, box={"pad_crop": {"padding": padding}})
    params = draw_sized([spec], n, height=height, width=width)[0]
    assert (params.box[0] == (0, 0, height, width)).all()
    assert (params.resized[0] == (height, width)).all()
    torch.manual_seed(0)
    padded = torch.empty(1, height + 2 * padding, width + 2 * padding)
    theirs = np.array([RandomCrop.get_params(padded, (size, size))[:2] for _ in range(n)])
    for axis in range(2):
        ours, counts = np.unique(params.offset[0, :, axis] + padding, return_counts=True)
        assert ours.tolist() == np.unique(theirs[:, axis]).tolist()
        expected = n / len(ours)
        assert abs(counts - expected).max() <= 5 * math.sqrt(expected * (1 - 1 / len(ours)))
    if height > size or padding:
        assert abs(np.corrcoef(params.offset[0].T)[0, 1]) < 0.05


def test_images_that_are_too_small_for_a_padded_crop_are_refused():
    spec = ViewSpec("a", 32, box={"pad_crop": {"padding": 4}})
    draw_sized([spec], 3, height=24, width=30)
    words = (
        r"view 'a': box pad_crop takes 32 x 32 pixels .* border of 4, but image 7 has 40 x 21 pixels; "
        r"set padding to at least 6, or size to at most 29$"
    )
    with pytest.raises(ConfigError, match=words):
        draw_sized([spec], 1, height=40, width=21, first=7)
    enough = ViewSpec("a", 32, box={"pad_crop": {"padding": 6}})
    check_sizes(enough, np.array([40]), np.array([21]), str)
    with pytest.raises(ConfigError, match="second has 25 x 23"):
        check_sizes(spec, np.array([24, 25, 24]), np.array([24, 23, 24]), ["first", "second", "third"].__getitem__)


def test_affine_matrices_are_torchvisions():
    rng = np.random.default_rng(0)
    low, high = [-180, -30, -30, 0.3, -60, -60], [180, 30, 30, 3, 60, 60]
    given = rng.uniform(low, high, (200, 6))
    names = ("angle", "translate_x", "translate_y", "scale", "shear_x", "shear_y")
    ours = inverse_affine(**dict(zip(names, given.T, strict=True)))
    theirs = [_get_inverse_affine_matrix([0.0, 0.0], a, [x, y], s, [u, v]) for a, x, y, s, u, v in given.tolist()]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    assert inverse_affine(shear_x=np.zeros(3)).tolist() == [[1, 0, 0, 0, 1, 0]] * 3


def decomposed(matrices):
    """(n, 5) angle, translations, scale and shear along x of inverse matrices without shear along y."""
    a, b, c, d, e, f = np.asarray(matrices, dtype=float).T
    scale = (a * e - b * d) ** -0.5
    angle = np.degrees(np.arctan2(-d, e))
    shear = np.degrees(np.arctan2(a * d + b * e, a * e - b * d))
    x, y = -np.linalg.solve(np.stack([a, b, d, e], -1).reshape(-1, 2, 2), np.stack([c, f], -1)[..., None])[..., 0].T
    return np.stack([angle, x, y, scale, shear], axis=1)


def assert_distributed_alike(ours, theirs, names):
    """Mean and standard deviation within 5 standard errors, of two samples (n, numbers)."""
    n = min(len(ours), len(theirs))
    for i, name in enumerate(names):
        a, b = ours[:, i], theirs[:, i]
        error = 5 * np.sqrt((a.var() + b.var()) / n) + 1e-6
        assert abs(a.mean() - b.mean()) < error, name
        assert abs(a.std() - b.std()) < 2 * error, name


def test_affine_is_distributed_as_torchvisions():
    n, size, names = 20_000, 24, ("angle", "x", "y", "scale", "shear")
    op = next(iter(draw_sized([WARPED], n, height=32, width=32)[0].ops))
    assert abs(op.apply.mean() - 0.5) < 0.02
    ours = decomposed(op.value[0, op.apply[0]])
    torch.manual_seed(0)
    params = [
        RandomAffine.get_params([-18.0, 18.0], [0.1, 0.1], [0.9, 1.1], [-10.0, 10.0], [size, size]) for _ in range(5000)
    ]
    theirs = np.array([(angle, *shift, scale, shear[0]) for angle, shift, scale, shear in params])
    assert_distributed_alike(ours, theirs, names)
    for i, name in enumerate(names):  # uniform: as far to either side
        assert abs(np.quantile(ours[:, i], [0, 1]) - np.quantile(theirs[:, i], [0, 1])).max() < 0.02, name
    for i in (1, 2):  # whole pixels; the outermost of them half as often, as fewer numbers are rounded to them
        shifts, counts = np.unique(np.rint(ours[:, i]), return_counts=True)
        assert abs(ours[:, i] - np.rint(ours[:, i])).max() < 1e-4
        assert shifts.tolist() == [-2, -1, 0, 1, 2]
        assert abs(counts / len(ours) - [(theirs[:, i] == x).mean() for x in shifts]).max() < 0.04
    assert abs(np.corrcoef(ours.T) - np.eye(5)).max() < 0.05


def test_affine_ranges_of_each_axis():
    options = {"degrees": [5, 5], "translate": [0.5, 0], "scale": [2, 2], "shear": [0, 0, 20, 30]}
    op = next(iter(draw_sized([ViewSpec("a", 24, ops=[["affine", 1, options]])], 2000, height=9, width=9)[0].ops))
    torch.manual_seed(0)
    params = [RandomAffine.get_params([5, 5], [0.5, 0], [2, 2], [0, 0, 20, 30], [24, 24]) for _ in range(2000)]
    theirs = np.array([_get_inverse_affine_matrix([0.0, 0.0], *p) for p in params])
    assert_distributed_alike(op.value[0].astype(float), theirs, "abcdef")
    assert len(np.unique(op.value[0, :, 3])) > 1900  # the shear along y
    plain = ViewSpec("a", 24, ops=[["affine", 1, {"degrees": 0}]])
    (same,) = draw_sized([plain], 5, height=9, width=9)[0].ops
    assert (same.value == (1, 0, 0, 0, 1, 0)).all()


@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.02, 0.33), (0.3, 3.3)), ((0.4, 1.0), (0.2, 1.0)), ((0.2, 0.4), (5, 6))]
)
def test_erased_boxes_are_distributed_as_torchvisions(scale, ratio):
    """Where ten tries give no box, nothing is erased: torchvision returns the image itself."""
    n, size = 20_000, 24
    spec = ViewSpec("a", size, ops=[["grey", 0.5], ["erase", 0.3, {"scale": scale, "ratio": ratio, "value": 0.25}]])
    _, op = draw_sized([spec], n, height=32, width=32)[0].ops
    assert abs(op.apply.mean() - 0.3) < 0.03
    assert (op.value[..., 4] == 0.25).all()
    image = torch.zeros(3, size, size)
    torch.manual_seed(0)
    params = [RandomErasing.get_params(image, scale, ratio, [0.0]) for _ in range(4000)]
    theirs = np.array([(0, 0, 0, 0) if v is image else (i, j, h, w) for i, j, h, w, v in params], dtype=float)
    ours = op.value[0, op.apply[0], :4].astype(float)
    assert (ours == np.rint(ours)).all()
    assert (ours >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= size).all()
    assert (ours[:, 2:] < size).all()
    some, others = ours[ours[:, 2] > 0], theirs[theirs[:, 2] > 0]
    assert abs(len(some) / len(ours) - len(others) / 4000) < 0.03
    if len(others):
        both = [np.column_stack([boxes, np.log(boxes[:, 2] / boxes[:, 3])]) for boxes in (some, others)]
        assert_distributed_alike(*both, ("top", "left", "height", "width", "log ratio"))


def test_the_erased_squares_of_relational_reasoning():
    spec = ViewSpec("a", 96, ops=[["erase", 0.5, {"scale": [0.111, 0.111], "ratio": [1, 1]}]])
    (op,) = draw_sized([spec], 100, height=96, width=96)[0].ops
    assert (op.value[0, :, 2:4] == 32).all()
    assert (op.value[0, :, 4] == 0).all()


def test_jitter_is_distributed_as_torchvisions():
    n = 20_000
    op = next(iter(draw_sized(PLAN, n, height=32, width=32)[1].ops))
    torch.manual_seed(0)
    params = [ColorJitter.get_params([0.6, 1.4], [0.6, 1.4], [0.6, 1.4], [-0.1, 0.1]) for _ in range(2000)]
    theirs = np.array([p[1:] for p in params], dtype=float)
    for i, name in enumerate(JITTER_OPS):
        a = op.value[0, :, i]
        assert abs(a.mean() - theirs[:, i].mean()) < 5 * theirs[:, i].std() / np.sqrt(2000), name
        assert a.min() >= theirs[:, i].min() - 0.01, name
        assert a.max() <= theirs[:, i].max() + 0.01, name
    orders, counts = np.unique(op.order[0], axis=0, return_counts=True)
    assert len(orders) == 24
    assert abs(counts / n - 1 / 24).max() < 0.01
    assert abs(op.apply.mean() - 0.8) < 0.02


def test_randaugment_is_distributed_as_specified():
    """Five of fourteen operations with replacement, levels 1 ... 9, applied half of the time, either sign: all alike,
    and independent of each other."""
    n = 50_000
    _, op, _ = draw_sized([AUGMENTED], n, height=32, width=32)[0].ops
    assert abs(op.apply.mean() - 0.9) < 0.01
    assert (op.value[..., 5] == 0).all()
    codes = op.value[0, :, :5].astype(int)
    assert (codes == op.value[0, :, :5]).all()
    for drawn in codes.T:
        assert abs((drawn == 0).mean() - 0.5) < 5 * math.sqrt(0.25 / n)
        kinds = len(RANDAUGMENT_OPS) * 9 * 2
        found, counts = np.unique(drawn[drawn != 0], return_counts=True)
        assert len(found) == kinds
        assert set(abs(found) // 10) == set(range(1, 15))
        assert set(abs(found) % 10) == set(range(1, 10))
        expected = n / 2 / kinds
        assert abs(counts - expected).max() < 5.5 * math.sqrt(expected)
    assert abs(np.corrcoef((codes != 0).T) - np.eye(5)).max() < 0.03
    assert abs(np.corrcoef(abs(codes).T // 10) - np.eye(5)).max() < 0.03
    twice = codes[(codes[:, 0] != 0) & (codes[:, 1] != 0)]
    assert abs((abs(twice[:, 0]) // 10 == abs(twice[:, 1]) // 10).mean() - 1 / 14) < 0.015


def test_randaugment_of_other_numbers():
    spec = ViewSpec("a", 24, ops=[["randaugment", 1, {"n": 2, "m": 4}]])
    (op,) = draw_sized([spec], 2000, height=32, width=32)[0].ops
    assert set(np.unique(abs(op.value[0, :, :2]) % 10)) == {0, 1, 2, 3}
    assert (op.value[0, :, 2:] == 0).all()
    (most,) = draw_sized([ViewSpec("a", 24, ops=[["randaugment", 1, {"n": 6}]])], 50, height=9, width=9)[0].ops
    assert most.value[..., 5].any()


def test_probabilities_and_ranges():
    _, student = draw_sized(PLAN, 20_000, height=32, width=32)
    _, grey, blur, solarise = student.ops
    assert abs(student.flip.mean() - 0.5) < 0.02
    assert abs(grey.apply.mean() - 0.2) < 0.02
    assert abs(blur.apply.mean() - 0.5) < 0.02
    assert abs(solarise.apply.mean() - 0.2) < 0.02
    sigma = blur.value[..., 0]
    assert sigma.min() >= 0.1
    assert sigma.max() <= 2.0
    assert abs(sigma.mean() - 1.05) < 0.02
    together = (grey.apply & blur.apply).mean()
    assert abs(together - 0.1) < 0.02  # independent of each other


def test_uniform_numbers_fill_the_interval_evenly():
    stream = Stream(counter_hash(3, 4, 5, np.arange(100_000, dtype=np.uint64)))
    a, b = stream.uniform(0), stream.uniform(1)
    counts = np.histogram(a, bins=50, range=(0, 1))[0]
    assert abs(counts - 2000).max() < 5 * np.sqrt(2000)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.02


def test_the_generator_is_frozen():
    """Runs of an earlier version must resume with the same views: these numbers never change."""
    keys = counter_hash(1, 2, 3, np.array([0, 1, 2**40], dtype=np.uint64))
    assert [f"{k:016x}" for k in keys] == FROZEN_KEYS
    np.testing.assert_allclose(Stream(keys).uniform(7), FROZEN_UNIFORM, rtol=0, atol=1e-15)


FROZEN_KEYS = ["f9a321bac6164bd8", "24e95aa7d4f5becf", "ba9d241260ee8a54"]
FROZEN_UNIFORM = [0.7010148158518115, 0.25413396011805556, 0.47811315980965563]


# -- masks


def test_masks_change_nothing_else_that_is_drawn():
    plain = draw_sized(EVERY, 30, height=50, width=40)
    masked = draw_sized([dataclasses.replace(spec, mask_p=0.5) for spec in EVERY], 30, height=50, width=40)
    for a, b in zip(plain, masked, strict=True):
        assert a.masked is None
        assert a.window is None
        for x, y in zip(rows_of(a, slice(None)), rows_of(b, slice(None)), strict=True):
            assert (x == y).all()


def test_plans_are_drawn_as_they_were_before_there_were_masks():
    """A run that is resumed has the views it would have had."""
    digest = hashlib.sha256()
    index, widths = np.arange(50), np.arange(30, 80)
    plan = [*PLAN, PADDED, WARPED]
    for params in draw(plan, seed=7, epoch=3, index=index, heights=np.full(50, 40), widths=widths):
        ops = params.ops
        arrays = (params.box, params.resized, params.offset, params.flip, ops.apply, ops.order, ops.value[..., :6])
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
    assert digest.hexdigest() == "8370c2975593a73892721054307596682bb1313bc76b011f5a5813e520cb2134"


def test_each_view_is_masked_for_itself():
    spec = ViewSpec("a", 8, count=2, flip=0.5, ops=[["grey", 0.5]], mask_p=0.3)
    (params,) = draw_sized([spec], 20_000, height=20, width=20)
    assert params.masked.shape == (2, 20_000)
    assert abs(params.masked.mean(1) - 0.3).max() < 0.015
    for other in (params.masked[1], params.flip[0], params.ops.apply[0, :, 0]):
        assert abs(np.corrcoef(params.masked[0], other)[0, 1]) < 0.03
    (always,) = draw_sized([dataclasses.replace(spec, mask_p=1)], 50, height=20, width=20)
    assert always.masked.all()


@pytest.mark.parametrize("box", [{"random_resized": {}}, {"center": {"resize": 40}}, {"whole": {}}])
def test_the_window_is_where_the_crop_lies(box):
    """A crop of an image of coordinates has those of its window."""
    y, x = np.mgrid[:50, :70] + 0.5
    image = np.stack([y / 50 * 255, x / 70 * 255, 0 * x], axis=-1).round().astype(np.uint8)
    (params,) = draw_sized([ViewSpec("a", 32, box=box, flip=0.5, mask_p=1)], 20, height=50, width=70)
    crops = np.empty((1, 20, 32, 32, 3), np.uint8)
    crop_small(image[None], np.zeros(20, np.int64), params, crops)
    share = (np.arange(32) + 0.5) / 32
    for b in range(20):
        top, left, bottom, right = params.window[0, b]
        for axis, low, high in ((0, top, bottom), (1, left, right)):
            expected = low + (high - low) * share
            found = crops[0, b, :, :, axis].mean(1 - axis) / 255
            assert abs(found - expected)[3:-3].max() < 0.01


def test_a_replaced_row_has_its_own_mask():
    spec = ViewSpec("a", 8, count=3, mask_p=0.5)
    mine, other = (draw_sized([spec], 9, height=20, width=20, first=first)[0] for first in (0, 100))
    one = draw_sized([spec], 1, height=20, width=20, first=104)[0]
    mine.replace_row(4, one)
    assert (mine.masked[:, 4] == other.masked[:, 4]).all()
    assert (mine.window[:, 4] == other.window[:, 4]).all()
