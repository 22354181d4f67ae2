"""The embedded data set: honest split, one function of its arguments, and digits that can be seen."""

from __future__ import annotations

import numpy as np
import pytest

from dataset_tools.sources import digits
from pipelines.errors import ConfigError

LUMA = np.array([0.299, 0.587, 0.114])


def test_the_splits_share_no_original() -> None:
    train, train_labels = digits.source_digits("train")
    test, test_labels = digits.source_digits("test")
    assert (len(train), len(test)) == (1438, 359)
    # scikit-learn's set holds no duplicate, so equal pixels would mean a shared original
    both = np.concatenate([train, test]).reshape(1797, 64)
    assert len(np.unique(both, axis=0)) == 1797
    assert set(train_labels) == set(test_labels) == set(range(10))


def test_shapes_and_order() -> None:
    images, labels = digits.render_digits("test", renderings=2, size=24)
    assert images.shape == (718, 24, 24, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert np.array_equal(labels[:359], digits.source_digits("test")[1])
    assert np.array_equal(labels[:359], labels[359:])
    assert not np.array_equal(images[:359], images[359:])


def test_rendering_is_a_function_of_its_arguments() -> None:
    first = digits.render_digits("test", renderings=1, seed=3, clutter=0.5, noise=0.02)[0]
    assert np.array_equal(first, digits.render_digits("test", renderings=1, seed=3, clutter=0.5, noise=0.02)[0])
    assert not np.array_equal(first, digits.render_digits("test", renderings=1, seed=4, clutter=0.5, noise=0.02)[0])


def test_a_digit_is_drawn_upright_and_whole() -> None:
    """With the box as large as the canvas and no rotation, averaging gives the original back."""
    images, _ = digits.render_digits("test", renderings=1, size=64, scale=(1, 1), rotation=0)
    strokes, _ = digits.source_digits("test")
    luma = images @ LUMA
    cells = luma.reshape(-1, 8, 8, 8, 8).mean((2, 4)).reshape(len(images), -1)
    correlation = [abs(np.corrcoef(a, b)[0, 1]) for a, b in zip(cells, strokes.reshape(-1, 64), strict=True)]
    assert min(correlation) > 0.9


@pytest.mark.parametrize("clutter", [0.0, 1.0])
def test_every_digit_stands_out(clutter: float) -> None:
    images, _ = digits.render_digits("test", renderings=1, scale=(1, 1), rotation=0, contrast=0.3, clutter=clutter)
    luma = images @ LUMA / 255
    spread = luma.max((1, 2)) - luma.min((1, 2))
    assert spread.min() > 0.3 * (0.5 if clutter else 0.9)  # clutter takes at most half of the contrast


@pytest.mark.parametrize(
    "options",
    [
        {"renderings": 0},
        {"size": 4},
        {"scale": (0.9, 0.5)},
        {"scale": (0.0, 0.5)},
        {"contrast": 0.9},
        {"clutter": 2.0},
        {"noise": -1.0},
    ],
)
def test_impossible_renderings_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        digits.render_digits("train", **{"renderings": 1, **options})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'train' and 'test'"):
        digits.render_digits("val", renderings=1)
