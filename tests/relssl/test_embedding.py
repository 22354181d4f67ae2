"""The map of features: neighbours stay neighbours, the seed decides, UMAP is optional."""

from __future__ import annotations

import sys

import pytest
import torch

from pipelines.errors import ConfigError, InputError, MissingExtraError
from relssl.evaluators import embedding
from relssl.evaluators.embedding import choose_map, feature_map


def two_groups(n: int = 40) -> torch.Tensor:
    """Even rows point one way, odd rows the other."""
    direction = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)[:, None] * torch.ones(6)
    return direction + 0.1 * torch.randn(n, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["tsne", pytest.param("umap", marks=pytest.mark.slow)])
def test_groups_stay_together_and_the_seed_decides(kind):
    if kind == "umap":
        pytest.importorskip("umap", reason="the extra umap is not installed")
    places = feature_map(two_groups(), kind, seed=1)
    assert places.shape == (40, 2)
    assert places.min(dim=0).values.tolist() == [0, 0]
    assert places.max(dim=0).values.tolist() == pytest.approx([1, 1])
    distance = torch.cdist(places, places).fill_diagonal_(torch.inf)
    nearest = distance.argmin(dim=1)
    assert (nearest % 2 == torch.arange(40) % 2).all()
    assert torch.equal(places, feature_map(two_groups(), kind, seed=1))


def test_the_fewest_images_that_can_be_drawn():
    assert feature_map(two_groups(8), "tsne").shape == (8, 2)
    with pytest.raises(InputError, match="at least 8 images, got 7"):
        feature_map(two_groups(7), "tsne")


def test_umap_where_it_is_installed_and_tsne_elsewhere(monkeypatch):
    monkeypatch.setattr(embedding.importlib.util, "find_spec", lambda name: None)
    assert choose_map("auto") == "tsne"
    with pytest.raises(MissingExtraError, match=r"relssl\[umap\].*--map tsne"):
        choose_map("umap")
    monkeypatch.setattr(embedding.importlib.util, "find_spec", lambda name: sys)
    assert choose_map("auto") == "umap"
    assert choose_map("tsne") == "tsne"
    with pytest.raises(ConfigError, match="got 'pca'"):
        choose_map("pca")


def test_bad_features_are_refused():
    with pytest.raises(InputError, match="NaN"):
        feature_map(two_groups() * float("nan"), "tsne")
