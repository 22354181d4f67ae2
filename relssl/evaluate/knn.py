"""Weighted kNN of a backbone's features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from relssl.evaluate.task import Task
from relssl.evaluate.weights import Weights
from relssl.evaluators.knn import knn_accuracy


def evaluate_knn(
    weights: Weights,
    train: Path | None = None,
    test: Path | None = None,
    *,
    k: int | None = None,
    temperature: float | None = None,
    device: str = "auto",
    command: str = "",
) -> dict[str, Any]:
    """Weighted kNN of the test images among the training images; adds an entry to results.json and returns it."""
    with Task(weights, train, test, device) as task:
        settings = weights.recipe.eval.knn
        k, temperature = k or settings.k, temperature or settings.temperature
        (train_x, train_y), (test_x, test_y) = task.features("train"), task.features("test")
        on_device = [x.to(task.device) for x in (train_x, train_y, test_x, test_y)]
        scores = knn_accuracy(*on_device, k=k, temperature=temperature, num_classes=task.num_classes)
        protocol = {"name": "weighted kNN", "k": k, "temperature": temperature}
        return task.write("knn", [scores["top1"]], [scores["top5"]], protocol, [], command)
