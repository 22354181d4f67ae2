"""Confusion counts, per-class figures and the most frequent confusions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix as peer
from sklearn.metrics import precision_recall_fscore_support

from pipelines.errors import InputError
from relssl.evaluators.confusion import confusion_matrix, most_confused, per_class


def test_counts_and_shares_are_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    labels, predicted = (torch.randint(0, 4, (50,), generator=generator) for _ in range(2))
    counts = confusion_matrix(labels, predicted, 4)
    assert np.array_equal(counts.numpy(), peer(labels, predicted))
    precision, recall, _, images = precision_recall_fscore_support(labels, predicted)
    for row, p, r, n in zip(per_class(counts), precision, recall, images, strict=True):
        assert row == {"images": n, "recall": pytest.approx(100 * r), "precision": pytest.approx(100 * p)}


def test_a_class_without_images_or_without_answers_has_no_share():
    counts = confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]), 3)
    assert per_class(counts) == [
        {"images": 2, "recall": 100.0, "precision": pytest.approx(200 / 3)},
        {"images": 1, "recall": 0.0, "precision": None},
        {"images": 0, "recall": None, "precision": None},
    ]


def test_most_frequent_confusions_come_first_and_zeros_not_at_all():
    counts = torch.tensor([[9, 1, 0], [4, 5, 2], [0, 0, 7]])
    assert most_confused(counts, 10) == [(1, 0, 4), (1, 2, 2), (0, 1, 1)]
    assert most_confused(counts, 1) == [(1, 0, 4)]


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="expected 2 labels"):
        confusion_matrix(torch.tensor([0, 1]), torch.tensor([0]), 2)
    with pytest.raises(InputError, match="only 2 classes"):
        confusion_matrix(torch.tensor([0, 2]), torch.tensor([0, 1]), 2)
    with pytest.raises(InputError, match="square"):
        most_confused(torch.zeros(2, 3), 1)
