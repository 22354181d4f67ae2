"""Weighted k-nearest-neighbour classification on frozen features: no training, no seed, one number.

The rule is the one common since Wu et al. (2018) and used by DINO and ReSA: cosine similarity, and each of
the k nearest training images votes for its class with weight exp(similarity / temperature). Legend: n test
images, N training images, D feature width, C classes.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from pipelines.errors import ConfigError, InputError
from relssl.evaluators.features import (
    check_features,
    check_labels,
    check_same_width,
    normalise,
    top_neighbours,
)

# exp(1 / 0.0125) = 6e34 still fits float32, and exp(-1 / 0.0125) is still above zero
SMALLEST_TEMPERATURE = 0.0125


class Accuracy(TypedDict):
    """In percent; top-5 does not exist with fewer than five classes."""

    top1: float
    top5: float | None


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
    if not temperature >= SMALLEST_TEMPERATURE:
        raise ConfigError(
            f"kNN temperature must be at least {SMALLEST_TEMPERATURE} (below it the weights leave the "
            f"range of float32), got {temperature}"
        )
    if num_classes < 1:
        raise ConfigError(f"kNN needs at least one class, got num_classes = {num_classes}")
    train_x, test_x = check_features(train_x, "train features"), check_features(test_x, "test features")
    check_same_width(train_x, test_x)
    train_y = check_labels(train_y, len(train_x), num_classes, "train labels").to(train_x.device)
    similarity, index = top_neighbours(test_x.to(train_x.dtype), train_x, k=k)
    weight = torch.exp(similarity / temperature)
    label = train_y[index]
    scores = weight.new_zeros((len(test_x), num_classes))
    rows = torch.arange(len(test_x), device=scores.device)
    for rank in range(k):  # one neighbour of every image at a time: no two additions meet, so the order is fixed
        scores[rows, label[:, rank]] += weight[:, rank]
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
    """Top-1 and top-5 accuracy of `weighted_knn` in percent; features may have any length, rows are
    normalised here.

    A class that no neighbour has is never among the five, so top-5 counts only classes that got a vote.

    Args:
        train_x, train_y: (N, D) features and (N,) labels to look neighbours up in.
        test_x, test_y: (n, D) and (n,).
        k, temperature: see `weighted_knn`.
        num_classes: C; by default the largest label + 1.

    Returns:
        {"top1": percent, "top5": percent, or None with fewer than five classes}.

    Raises:
        ConfigError: k or temperature out of range.
        InputError: labels missing, one class only, features with NaN or all zero, different widths.
    """
    train_x, test_x = check_features(train_x, "train features"), check_features(test_x, "test features")
    train_y = check_labels(train_y, len(train_x), num_classes, "train labels")
    test_y = check_labels(test_y, len(test_x), num_classes, "test labels").to(train_x.device)
    if len(train_y.unique()) < 2:
        raise InputError(
            "all training images have the same label: with one class every answer is right and an "
            "accuracy says nothing. Expected at least two classes"
        )
    if num_classes is None:
        num_classes = int(max(train_y.max(), test_y.max())) + 1
    scores = weighted_knn(
        normalise(train_x), train_y, normalise(test_x), k=k, temperature=temperature, num_classes=num_classes
    )
    best, predicted = scores.topk(min(5, num_classes), dim=1)
    hit = (predicted == test_y[:, None]) & (best > 0)
    top1 = 100.0 * int(hit[:, :1].sum()) / len(hit)
    top5 = 100.0 * int(hit.sum()) / len(hit) if num_classes >= 5 else None
    return {"top1": top1, "top5": top5}
