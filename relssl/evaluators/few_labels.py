"""Accuracy against the number of labels: what a backbone is worth to somebody who has few.

The classifier is logistic regression by L-BFGS with one fixed rule for its penalty, D / (10 n) for n labelled images
and D features (standardised): scikit-learn's C = 10 on features scaled to a mean squared length of one. Nothing is
chosen, so there is no validation set that would need labels too. Mean and standard deviation of the features are
those of all training images, which need no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.errors import ConfigError, InputError
from pipelines.subset import balanced_rows
from relssl.evaluators.features import check_features, check_labels, check_same_width, summarise
from relssl.evaluators.heads import labelled_rows, logistic_regression, score_heads

STRENGTH = 0.1  # of the penalty, times D / n
USUAL = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
MOST_IMAGES = 100_000  # of the usual amounts: beyond that there are no few labels, and each draw takes minutes


@dataclass(frozen=True)
class Amount:
    """How many labels: so many of each class, or a percentage of all images, equally many of each class."""

    per_class: int | None = None
    percent: float | None = None

    @property
    def text(self) -> str:
        return f"{self.per_class} a class" if self.percent is None else f"{self.percent:g} %"


def usual_amounts(labels: Tensor) -> list[Amount]:
    """1, 2, 5, 10, ... labels a class, as far as the smallest class goes, and all; none of more than MOST_IMAGES."""
    counts = torch.bincount(labels)
    counts = counts[counts > 0]
    fewest, classes = int(counts.min()), len(counts)
    steps = [Amount(per_class=k) for k in USUAL if k < fewest and k * classes <= MOST_IMAGES]
    return steps + [Amount(percent=100.0)] * (len(labels) <= MOST_IMAGES or not steps)


@torch.inference_mode(False)
def few_label_curve(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    num_classes: int,
    amounts: Sequence[Amount],
    seeds: Sequence[int],
    classes: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Top-1 accuracy in percent for each amount of labels, over draws that are balanced over classes.

    All labels are drawn once: every seed would draw the same.

    Args:
        train_x, train_y: (N, D) and (N,).
        test_x, test_y: (n, D) and (n,).
        amounts: see `Amount`.
        seeds: one draw for each: that of `pipelines.subset.balanced_rows`.
        classes: their names, for messages.
        progress: called with a line after every amount.

    Returns:
        one {"per_class", "percent", "images", "top1": {"mean", "std", "values"}} for each amount, fewest labels
        first.

    Raises:
        ConfigError: no amounts or seeds, or one that `balanced_rows` refuses.
        InputError: NaN features, labels missing, one class only, or images that `balanced_rows` refuses.
    """
    if not amounts or not seeds:
        raise ConfigError("a few-label curve needs at least one amount of labels and one seed")
    rows = labelled_rows(train_x, train_y, num_classes, "train", device)
    test_x = check_features(test_x, "test features")
    check_same_width(train_x, test_x)
    tested = rows.like(test_x, check_labels(test_y, len(test_x), num_classes, "test labels"))
    if len(rows.labels.unique()) < 2:
        raise InputError("all training images have the same label: expected at least two classes")
    labels = rows.labels.cpu().numpy()
    draws = [
        [torch.from_numpy(balanced_rows(labels, s, **vars(a), classes=classes)) for s in _seeds_for(a, seeds)]
        for a in amounts
    ]
    everything = torch.arange(len(test_y))
    curve = []
    for amount, indices in sorted(zip(amounts, draws, strict=True), key=lambda pair: len(pair[1][0])):
        top1 = []
        for index in indices:
            penalty = STRENGTH * rows.features.shape[1] / len(index)
            weight, bias = logistic_regression(rows, index, num_classes, penalty)
            top1.append(float(score_heads(tested, everything, weight[None], bias[None])[0]))
        curve.append({**vars(amount), "images": len(indices[0]), "top1": summarise(top1)})
        if progress is not None:
            progress(f"{amount.text} ({len(indices[0])} labels): top-1 {sum(top1) / len(top1):.2f}")
    return curve


def _seeds_for(amount: Amount, seeds: Sequence[int]) -> Sequence[int]:
    return seeds[:1] if amount.percent == 100 else seeds
