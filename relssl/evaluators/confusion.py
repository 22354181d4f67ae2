"""Which classes are taken for which: counts, and what they say of each class. Legend: n images, C classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipelines.errors import InputError
from relssl.evaluators.features import check_labels


def confusion_matrix(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """counts[i, j]: images of class i that were taken for class j; (C, C) int64 on the CPU.

    Raises:
        InputError: labels and predictions differ in number, are missing or out of range.
    """
    labels = check_labels(labels, len(labels), num_classes, "labels").cpu()
    predicted = check_labels(predicted, len(labels), num_classes, "predictions").cpu()
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def per_class(counts: Tensor) -> list[dict[str, Any]]:
    """For each class: images, recall (its accuracy) and precision in percent; None where there is nothing to share."""
    right, images, given = counts.diagonal().tolist(), counts.sum(dim=1).tolist(), counts.sum(dim=0).tolist()
    return [
        {
            "images": total,
            "recall": 100.0 * hit / total if total else None,
            "precision": 100.0 * hit / named if named else None,
        }
        for hit, total, named in zip(right, images, given, strict=True)
    ]


def most_confused(counts: Tensor, most: int) -> list[tuple[int, int, int]]:
    """(class, taken for, images) of the `most` largest counts off the diagonal, largest first; none that is zero.

    Raises:
        InputError: not a square matrix.
    """
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise InputError(f"a confusion matrix is square, got {tuple(counts.shape)}")
    off = counts.clone()
    off.fill_diagonal_(0)
    order = off.flatten().argsort(descending=True, stable=True)[:most].tolist()
    size = len(counts)
    return [(i // size, i % size, int(off[i // size, i % size])) for i in order if off[i // size, i % size] > 0]
