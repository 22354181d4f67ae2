"""View specs: what they accept, and how they refuse the rest."""

from __future__ import annotations

import pytest

from pipelines.errors import ConfigError
from pipelines.views import ViewSpec, expand, view_counts


def test_a_spec_from_a_recipe():
    spec = ViewSpec.from_dict(
        {
            "name": "student",
            "size": 32,
            "count": 2,
            "box": {"random_resized": {"scale": [0.2, 1]}},
            "ops": [["jitter", 0.8, {"hue": 0.1}], ["grey", 0.2], ["blur", 0.5, {"sigma": [0.1, 2]}]],
            "normalize": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
        }
    )
    assert spec.box_kind == "random_resized"
    assert spec.box_options == {"scale": (0.2, 1.0), "ratio": (3 / 4, 4 / 3)}
    assert spec.ops[0] == ("jitter", 0.8, {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.1})
    assert spec.normalize == ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert view_counts([spec, spec]) == {"student": 4}
    assert expand([spec]) == [spec, spec]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sise": 3}, "did you mean 'size'"),
        ({"size": 0}, "at least 1, got 0"),
        ({"size": True}, "whole number"),
        ({"name": "Student 1"}, "lower-case"),
        ({"flip": 1.5}, r"flip is a number in \[0, 1\], got 1.5"),
        ({"interpolation": "nearest"}, "bilinear, bicubic"),
        ({"antialias": 0}, "antialias is true or false, got 0"),
        ({"mask_p": 1.1}, r"mask_p is a number in \[0, 1\], got 1.1"),
        ({"box": {"random_resize": {}}}, "did you mean 'random_resized'"),
        ({"box": {"byol": {"scale": [0, 1]}}}, r"scale is \[low, high\]"),
        ({"box": {"byol": {"scale": [0.2, 1.2]}}}, "at most 1"),
        ({"box": {"byol": {"ratio": [2, 1]}}}, r"ratio is \[low, high\]"),
        ({"box": {"byol_center": {"share": 1.1}}}, r"share of the short side is a number in \(0, 1\], got 1.1"),
        ({"box": {"byol_center": {"share": 0}}}, "share of the short side"),
        ({"box": {"byol_center": {"share": "7/8"}}}, "share of the short side"),
        ({"box": {"random_resized": {"scale": [0.5, 0.2]}}}, r"scale is \[low, high\]"),
        ({"box": {"random_resized": {"scale": [0.2, 1.2]}}}, "at most 1"),
        ({"box": {"center": {}}}, "resize must be given"),
        ({"box": {"center": {"resize": 16}}}, "set resize to at least 32"),
        ({"box": {"pad_crop": {}}}, "padding must be given"),
        ({"box": {"pad_crop": {"padding": -1}}}, "padding is a whole number of at least 0, got -1"),
        ({"box": {"pad_crop": {"padding": 32}}}, "set padding to at most 31"),
        ({"ops": [["jiter", 1]]}, "did you mean 'jitter'"),
        ({"ops": [["randaugment", 1, {"n": 7}]]}, "randaugment: n is at most 6, got 7"),
        ({"ops": [["randaugment", 1, {"n": 0}]]}, "randaugment: n is a whole number of at least 1, got 0"),
        ({"ops": [["randaugment", 1, {"m": 11}]]}, "randaugment: m is at most 10, got 11"),
        ({"ops": [["randaugment", 1, {"m": 1}]]}, "randaugment: m is a whole number of at least 2, got 1"),
        ({"ops": [["blur", 0.5]]}, "sigma must be given"),
        ({"ops": [["jitter", 1, {"hue": 0.6}]]}, r"strength in \[0, 0.5\], got 0.6"),
        ({"ops": [["jitter", 1, {"brightness": float("inf")}]]}, r"strength in \[0, inf\], got inf"),
        ({"ops": [["jitter_byol", 1, {"hue": 0.6}]]}, r"jitter_byol: hue is a strength in \[0, 0.5\], got 0.6"),
        ({"ops": [["jitter_byol", 1, {"brightness": 1.5}]]}, r"brightness is a strength in \[0, 1.0\], got 1.5"),
        ({"ops": [["jitter_byol", 1, {"contrast": -1}]]}, r"contrast is a strength in \[0, inf\], got -1"),
        ({"ops": [["blur", 1, {"sigma": [1, 2], "kernel": 23}]]}, "kernel is one of torchvision, byol, got 23"),
        ({"ops": [["affine", 1]]}, "degrees must be given"),
        ({"ops": [["affine", 1, {"degrees": -5}]]}, "affine: degrees is a number x .* at most 360 degrees, got -5"),
        ({"ops": [["affine", 1, {"degrees": [5, -5]}]]}, "degrees is a number x"),
        ({"ops": [["affine", 1, {"degrees": [1, 2, 3]}]]}, "degrees is a number x"),
        ({"ops": [["affine", 1, {"degrees": "5"}]]}, "degrees is a number x"),
        ({"ops": [["affine", 1, {"degrees": 5, "translate": 1.5}]]}, r"translate is a share .* got 1.5"),
        ({"ops": [["affine", 1, {"degrees": 5, "translate": [0.1]}]]}, r"translate is a share .* got \[0.1\]"),
        ({"ops": [["affine", 1, {"degrees": 5, "scale": 0.9}]]}, r"affine: scale is \[low, high\]"),
        ({"ops": [["affine", 1, {"degrees": 5, "shear": 90}]]}, "shear is a number x .* at most 89 degrees, got 90"),
        ({"ops": [["affine", 1, {"degrees": 5, "shear": [0, 1, 2]}]]}, "shear is a number x"),
        ({"ops": [["affine", 1, {"degrees": 5, "shear": [0, 1, 2, 1]}]]}, "shear is a number x"),
        ({"ops": [["erase", 1, {"scale": [0.1, 1.5]}]]}, "erase: scale is a share of the view's area, at most 1"),
        ({"ops": [["erase", 1, {"ratio": [2, 1]}]]}, r"erase: ratio is \[low, high\]"),
        ({"ops": [["erase", 1, {"value": "random"}]]}, "erase: value is a number, .* got 'random'"),
        ({"ops": [["erase", 1], ["grey", 0.2]]}, "list it once, as the last of the ops"),
        ({"ops": [["erase", 1], ["erase", 1]]}, "list it once"),
        ({"ops": [["grey"]]}, "an op is"),
        ({"ops": [["grey", 0.2, {"a": 1}]]}, "unknown option 'a'"),
        ({"normalize": {"mean": [0, 0, 0], "std": [1, 1, 0]}}, "three positive stds"),
    ],
)
def test_what_cannot_be_is_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        ViewSpec.from_dict({"name": "student", "size": 32, **change})


def test_the_finetune_views_of_relational_reasoning():
    affine = {"degrees": 18, "translate": 0.1, "scale": [0.9, 1.1], "shear": 10}
    erase = {"scale": [0.111, 0.111], "ratio": [1, 1]}
    box = {"pad_crop": {"padding": 12}}
    spec = ViewSpec.from_dict(
        {"name": "a", "size": 96, "box": box, "flip": 0.5, "ops": [["affine", 0.5, affine], ["erase", 0.5, erase]]}
    )
    assert spec.box_options == {"padding": 12}
    ranges = {"degrees": (-18, 18), "translate": (0.1, 0.1), "scale": (0.9, 1.1), "shear": (-10, 10, 0, 0)}
    assert spec.ops[0] == ("affine", 0.5, ranges)
    assert spec.ops[1] == ("erase", 0.5, {"scale": (0.111, 0.111), "ratio": (1, 1), "value": 0})
    both = ViewSpec("a", 8, ops=[["affine", 1, {"degrees": [0, 5], "shear": [1, 2, -3, 4], "translate": [0.1, 0.2]}]])
    ranges = {"degrees": (0, 5), "translate": (0.1, 0.2), "scale": (1, 1), "shear": (1, 2, -3, 4)}
    assert both.ops[0] == ("affine", 1.0, ranges)


def test_the_views_of_relicv2():
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    blur = {"sigma": [0.1, 2], "kernel": "byol"}
    ops = [["jitter_byol", 0.8, jitter], ["grey", 0.2], ["blur", 1.0, blur], ["solarise", 0.2, {"threshold": 0.5}]]
    spec = ViewSpec.from_dict({"name": "large", "size": 224, "box": "byol", "flip": 0.5, "ops": ops})
    assert spec.box_options == {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}
    assert spec.ops[0] == ("jitter_byol", 0.8, jitter)
    assert spec.ops[2] == ("blur", 1.0, {"sigma": (0.1, 2.0), "kernel": "byol"})
    assert ViewSpec("test", 224, box="byol_center").box_options == {"share": 0.875}


def test_required_keys():
    with pytest.raises(ConfigError, match="lacks size"):
        ViewSpec.from_dict({"name": "a"})
