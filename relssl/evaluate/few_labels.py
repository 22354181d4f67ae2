"""Accuracy of a backbone against the number of labels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.subset import balanced_rows
from relssl.evaluate.task import ALL, Portion, Task
from relssl.evaluate.weights import Weights
from relssl.evaluators.few_labels import STRENGTH, Amount, few_label_curve, usual_amounts

log = logging.getLogger("relssl.evaluate")

SEEDS = (0, 1, 2, 3, 4)


def evaluate_few_labels(
    weights: Weights,
    train: Path | None = None,
    test: Path | None = None,
    *,
    amounts: Sequence[Amount] | None = None,
    seeds: Sequence[int] = SEEDS,
    portion: Portion = ALL,
    device: str = "auto",
    command: str = "",
) -> dict[str, Any]:
    """Logistic regression on a few labels, several draws; adds an entry with the `curve` to results.json.

    Args:
        amounts: how many labels; 1, 2, 5, 10, ... of each class and all when None.
        seeds: a draw of labels for each: that of `Portion` with the same seed.
        portion: the training images to draw from.
    """
    with Task(weights, train, test, device, portion=portion) as task:
        return few_labels_of(task, amounts, seeds, command)


def few_labels_of(task: Task, amounts: Sequence[Amount] | None, seeds: Sequence[int], command: str) -> dict[str, Any]:
    """See `evaluate_few_labels`."""
    labels, classes = task.sets["train"].labels, task.sets["train"].classes
    amounts = usual_amounts(torch.from_numpy(labels)) if amounts is None else amounts
    for amount in amounts:  # what would be refused later, before the features are computed
        balanced_rows(labels, 0, **vars(amount), classes=classes)
    (train_x, train_y), (test_x, test_y) = task.features("train"), task.features("test")
    curve = few_label_curve(
        train_x,
        train_y,
        test_x,
        test_y,
        num_classes=task.num_classes,
        amounts=amounts,
        seeds=seeds,
        classes=classes,
        device=task.device,
        progress=lambda line: log.info("few labels: %s", line),
    )
    protocol = {
        "name": "few labels",
        "classifier": "logistic regression by L-BFGS",
        "penalty_times_n_over_d": STRENGTH,
        "amounts": [amount.text for amount in amounts],
    }
    return task.write("fewlabel", [], [], protocol, list(seeds), command, {"curve": curve})
