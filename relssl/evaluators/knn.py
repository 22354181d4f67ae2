"""Weighted k-nearest-neighbour classification on frozen features: no training, no seed, one number.

The rule is the one common since Wu et al. (2018) and used by DINO and ReSA: cosine similarity, and each of
the k nearest training images votes for its class with weight exp(similarity / temperature). Legend: n test
images, N training images, D feature width, C classes.

Named protocols (`knn_protocol`):

    dino         the code released with DINO: k = 10, 20, 100, 200, temperature 0.07
    resa         the code released with ReSA: k = 5, 10, 15, 20, 25, temperature 0.07
    resa_cifar   the CIFAR code of ReSA: k = 5, every vote equal, Euclidean distance of features as they are

The first two reduce the short side to 256 pixels by a bicubic filter and take the middle 224: `eval.knn.view` of a
recipe.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from pipelines.errors import ConfigError, InputError, unknown_name
from relssl.evaluators.features import (
    check_features,
    check_k,
    check_labels,
    check_same_width,
    normalise,
    top_neighbours,
)
from relssl.evaluators.protocols import Temperature, reasons, usable_temperature

VOTE_BLOCK = 8_192


class Accuracy(TypedDict):
    """In percent; top-5 does not exist with fewer than five classes."""

    top1: float
    top5: float | None


class KnnProtocol(BaseModel):
    """Every number of a kNN evaluation; `knn_protocol(name)` gives the named ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "weighted kNN"
    k: tuple[int, ...] = Field(default=(20,), min_length=1)
    temperature: Temperature | None = 0.07  # None: every neighbour's vote counts the same
    distance: Literal["cosine", "euclidean"] = "cosine"  # euclidean: of features as they are, not of length one

    @model_validator(mode="after")
    def _consistent(self) -> KnnProtocol:
        if self.distance == "euclidean" and self.temperature is not None:
            raise ValueError(
                f"distance euclidean takes no temperature, got {self.temperature}: distances of features as they are "
                "have no scale, and far neighbours would lose their votes"
            )
        return self


KNN_PROTOCOLS: dict[str, dict[str, Any]] = {
    "dino": {"k": (10, 20, 100, 200)},
    "resa": {"k": (5, 10, 15, 20, 25)},
    "resa_cifar": {"k": (5,), "temperature": None, "distance": "euclidean"},
}


def knn_protocol(name: str | None, **overrides: Any) -> KnnProtocol:
    """The protocol `name` (None: weighted kNN, k = 20), with some numbers replaced.

    Raises:
        ConfigError: unknown name (the nearest known one is named), or a value that cannot be.
    """
    if name is not None and name not in KNN_PROTOCOLS:
        raise ConfigError(unknown_name("kNN protocol", name, KNN_PROTOCOLS))
    original = KnnProtocol() if name is None else KnnProtocol(name=name, **KNN_PROTOCOLS[name])
    try:
        changed = KnnProtocol(**{**original.model_dump(), **overrides})
    except ValidationError as error:
        raise ConfigError(f"kNN: {reasons(error)}") from None
    keeps_its_name = name is None or changed == original
    return changed if keeps_its_name else changed.model_copy(update={"name": f"{name} (changed)"})


def weighted_knn(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, *, k: int, temperature: float = 0.07, num_classes: int
) -> Tensor:
    """Class scores of test images: the sum of exp(similarity / temperature) over neighbours of the class.

    Works in blocks, so the n x N similarity matrix never exists, and in float32 (float64 if given float64)
    whatever autocast or TF32 setting surrounds it.

    Args:
        train_x: (N, D), rows of length one; nothing is normalised here.
        train_y: (N,) integer labels in [0, num_classes).
        test_x: (n, D), rows of length one, same device.
        k: neighbours that vote, at most N.
        temperature: at least 0.0125; 0.07 is usual.
        num_classes: C.

    Returns:
        (n, C) scores; exactly zero where no neighbour has the class.

    Raises:
        ConfigError: k or temperature out of range, fewer than one class.
        InputError: features with NaN, different widths, labels missing or out of range.
    """
    try:
        usable_temperature(temperature)
    except ValueError as error:
        raise ConfigError(f"{error}, got {temperature}") from None
    if num_classes < 1:
        raise ConfigError(f"kNN needs at least one class, got num_classes = {num_classes}")
    train_x, test_x = check_features(train_x, "train features"), check_features(test_x, "test features")
    check_same_width(train_x, test_x)
    train_y = check_labels(train_y, len(train_x), num_classes, "train labels").to(train_x.device)
    similarity, index = top_neighbours(test_x.to(train_x.dtype), train_x, k=k)
    return _votes(train_y[index], torch.exp(similarity / temperature), num_classes)


def _votes(label: Tensor, weight: Tensor, num_classes: int) -> Tensor:
    """Sums of the weights (n, k) of neighbours by their labels (n, k): (n, C)."""
    scores = weight.new_zeros((len(label), num_classes))
    rows = torch.arange(len(label), device=scores.device)
    for rank in range(label.shape[1]):  # one neighbour of every image at a time: no two additions meet, so the
        scores[rows, label[:, rank]] += weight[:, rank]  # order is fixed
    return scores


def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Accuracy:
    """Top-1 and top-5 accuracy of `weighted_knn` in percent, for one k; see `knn_accuracies`."""
    protocol = knn_protocol(None, k=(k,), temperature=temperature)
    return knn_accuracies(train_x, train_y, test_x, test_y, protocol=protocol, num_classes=num_classes)[0]


def knn_accuracies(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    protocol: KnnProtocol,
    num_classes: int | None = None,
) -> list[Accuracy]:
    """Top-1 and top-5 accuracy in percent for every k of a protocol; neighbours are looked for once.

    Features may have any length: with cosine distance rows are normalised here. A class that no neighbour has is never
    among the five, so top-5 counts only classes that got a vote. Of classes with equally many votes the first counts.

    Args:
        train_x, train_y: (N, D) features and (N,) labels to look neighbours up in.
        test_x, test_y: (n, D) and (n,).
        num_classes: C; by default the largest label + 1.

    Returns:
        {"top1": percent, "top5": percent, or None with fewer than five classes} for each k, in the protocol's order.

    Raises:
        ConfigError: k out of range.
        InputError: labels missing, one class only, features with NaN or all zero, different widths.
    """
    train_x, test_x = check_features(train_x, "train features"), check_features(test_x, "test features")
    check_same_width(train_x, test_x)
    train_y = check_labels(train_y, len(train_x), num_classes, "train labels").to(train_x.device)
    test_y = check_labels(test_y, len(test_x), num_classes, "test labels").to(train_x.device)
    if len(train_y.unique()) < 2:
        raise InputError(
            "all training images have the same label: with one class every answer is right and an "
            "accuracy says nothing. Expected at least two classes"
        )
    if num_classes is None:
        num_classes = int(max(train_y.max(), test_y.max())) + 1
    for k in protocol.k:
        check_k(k, len(train_x))
    queries, keys = _searchable(test_x.to(train_x.dtype), train_x, protocol.distance)
    similarity, index = top_neighbours(queries, keys, k=max(protocol.k))
    if protocol.temperature is None:
        weight = torch.ones_like(similarity)
    else:
        weight = torch.exp(similarity / protocol.temperature)
    label = train_y[index]
    return [_accuracy(label[:, :k], weight[:, :k], test_y, num_classes) for k in protocol.k]


def _searchable(queries: Tensor, keys: Tensor, distance: str) -> tuple[Tensor, Tensor]:
    """Rows whose inner products rank the keys of each query by nearness.

    Euclidean: |q - x|^2 = |q|^2 - 2 (q.x - |x|^2 / 2), so the second part of the product becomes a column. Distances
    do not change when both are moved, and small numbers lose less in the difference.
    """
    if distance == "cosine":
        return normalise(queries), normalise(keys)
    centre = keys.mean(dim=0)
    queries, keys = queries - centre, keys - centre
    ones = queries.new_ones((len(queries), 1))
    return torch.cat([queries, ones], dim=1), torch.cat([keys, -0.5 * keys.square().sum(dim=1, keepdim=True)], dim=1)


def _accuracy(label: Tensor, weight: Tensor, test_y: Tensor, num_classes: int) -> Accuracy:
    """Of neighbours' labels and weights, (n, k) each. In blocks: scores of all images and classes may be gigabytes."""
    first = within = 0
    for start in range(0, len(test_y), VOTE_BLOCK):
        rows = slice(start, start + VOTE_BLOCK)
        scores = _votes(label[rows], weight[rows], num_classes)
        best, predicted = scores.sort(dim=1, descending=True, stable=True)
        hit = (predicted[:, :5] == test_y[rows, None]) & (best[:, :5] > 0)
        first, within = first + int(hit[:, :1].sum()), within + int(hit.sum())
    return {
        "top1": 100.0 * first / len(test_y),
        "top5": 100.0 * within / len(test_y) if num_classes >= 5 else None,
    }
