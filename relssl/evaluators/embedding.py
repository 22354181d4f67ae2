"""A map of features in two dimensions, by UMAP (extra `umap`) or scikit-learn's t-SNE.

Neighbours on the map are mostly neighbours in the features; distances between groups and the sizes of groups mean
little, and another seed gives another map.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import ConfigError, InputError, MissingExtraError
from relssl.evaluators.features import check_features, normalise

LEAST_IMAGES = 8
MapKind = Literal["auto", "umap", "tsne"]


def choose_map(kind: MapKind) -> Literal["umap", "tsne"]:
    """`auto` is UMAP where it is installed.

    Raises:
        ConfigError: an unknown kind.
        MissingExtraError: UMAP is asked for and not installed.
    """
    if kind not in ("auto", "umap", "tsne"):
        raise ConfigError(f"a map is umap, tsne or auto (UMAP where it is installed), got {kind!r}")
    installed = importlib.util.find_spec("umap") is not None
    if kind == "umap" and not installed:
        raise MissingExtraError("UMAP is not installed: pip install 'relssl[umap]', or use t-SNE with --map tsne")
    return "tsne" if kind == "tsne" or not installed else "umap"


def feature_map(features: Tensor, kind: MapKind = "auto", seed: int = 0) -> Tensor:
    """(N, 2) float32 places of (N, D) features by their directions, each axis scaled to [0, 1].

    Repeatable on one machine with one version of the library.

    Raises:
        ConfigError, MissingExtraError: see `choose_map`.
        InputError: fewer than 8 images, NaN, or features that are zero throughout.
    """
    kind = choose_map(kind)
    features = normalise(check_features(features, "features")).cpu()
    if len(features) < LEAST_IMAGES:
        raise InputError(f"a map of features needs at least {LEAST_IMAGES} images, got {len(features)}")
    places = _umap(features.numpy(), seed) if kind == "umap" else _tsne(features.numpy(), seed)
    low, high = places.min(axis=0), places.max(axis=0)
    return torch.from_numpy(((places - low) / np.maximum(high - low, 1e-12)).astype(np.float32))


def _umap(features: np.ndarray, seed: int) -> np.ndarray:
    from umap import UMAP

    neighbours = min(15, len(features) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own dependencies, and that a seed means one thread
        return UMAP(n_neighbors=neighbours, min_dist=0.1, random_state=seed, n_jobs=1).fit_transform(features)


def _tsne(features: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(features)
