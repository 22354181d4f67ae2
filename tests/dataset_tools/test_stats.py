"""Channel statistics: exact on small sets, and a sample that follows from the image numbers alone on large
ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dataset_tools.stats import ChannelStats, channel_stats, moments
from pipelines import beton

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 6, 5, 3), dtype=np.uint8)


def test_mean_and_std_are_those_over_all_pixels(tmp_path: Path) -> None:
    beton.write(tmp_path / "a.beton", [(image, None) for image in IMAGES])
    with beton.open(tmp_path / "a.beton") as read:
        summary = channel_stats(read)
    assert np.allclose(summary["mean"], (IMAGES / 255).mean((0, 1, 2)), atol=1e-5)
    assert np.allclose(summary["std"], (IMAGES / 255).std((0, 1, 2)), atol=1e-5)
    assert summary["images"] == 40


def test_every_image_counts_the_same_whatever_its_size() -> None:
    stats = ChannelStats()
    stats.add(0, moments(np.full((1, 1, 3), 255, np.uint8)))
    stats.add(1, moments(np.zeros((50, 50, 3), np.uint8)))
    assert stats.summary()["mean"] == [0.5, 0.5, 0.5]


def test_a_large_set_is_sampled_evenly_and_within_bounds() -> None:
    stats = ChannelStats(sample=8)
    for i, image in enumerate(IMAGES):
        if stats.wants(i):
            stats.add(i, moments(image))
    summary = stats.summary()
    assert summary["images"] == 5
    assert np.allclose(summary["mean"], (IMAGES[::8] / 255).mean((0, 1, 2)), atol=1e-5)


def test_no_images() -> None:
    assert ChannelStats().summary() == {"mean": None, "std": None, "images": 0}
