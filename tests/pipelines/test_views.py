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
        ({"antialias": False}, "without antialiasing"),
        ({"mask_p": 0.1}, "saliency masks"),
        ({"box": {"random_resize": {}}}, "did you mean 'random_resized'"),
        ({"box": {"byol": {}}}, "'byol' is not in this version yet"),
        ({"box": {"random_resized": {"scale": [0.5, 0.2]}}}, r"scale is \[low, high\]"),
        ({"box": {"random_resized": {"scale": [0.2, 1.2]}}}, "at most 1"),
        ({"box": {"center": {}}}, "resize must be given"),
        ({"box": {"center": {"resize": 16}}}, "set resize to at least 32"),
        ({"ops": [["jiter", 1]]}, "did you mean 'jitter'"),
        ({"ops": [["randaugment", 1]]}, "'randaugment' is not in this version yet"),
        ({"ops": [["blur", 0.5]]}, "sigma must be given"),
        ({"ops": [["jitter", 1, {"hue": 0.6}]]}, r"strength in \[0, 0.5\], got 0.6"),
        ({"ops": [["grey"]]}, "an op is"),
        ({"ops": [["grey", 0.2, {"a": 1}]]}, "unknown option 'a'"),
        ({"normalize": {"mean": [0, 0, 0], "std": [1, 1, 0]}}, "three positive stds"),
    ],
)
def test_what_cannot_be_is_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        ViewSpec.from_dict({"name": "student", "size": 32, **change})


def test_required_keys():
    with pytest.raises(ConfigError, match="lacks size"):
        ViewSpec.from_dict({"name": "a"})
