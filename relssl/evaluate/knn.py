"""kNN classification by a backbone's features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relssl.evaluate.task import ALL, Portion, Task
from relssl.evaluate.weights import Weights
from relssl.evaluators.features import check_k
from relssl.evaluators.knn import knn_accuracies, knn_protocol


def evaluate_knn(
    weights: Weights,
    train: Path | None = None,
    test: Path | None = None,
    *,
    protocol: str | None = None,
    k: int | Sequence[int] | None = None,
    temperature: float | None = None,
    portion: Portion = ALL,
    device: str = "auto",
    command: str = "",
) -> list[dict[str, Any]]:
    """kNN of the test images among the training images; adds an entry to results.json for each k, and returns them.

    Args:
        protocol: a name of `relssl.evaluators.knn`; when None the recipe's own, or its k and temperature.
        k, temperature: instead of the protocol's.
    """
    recipe = weights.recipe
    own = recipe.eval.knn
    name = protocol or own.protocol
    changes: dict[str, Any] = {"k": (own.k,), "temperature": own.temperature} if name is None else {}
    if k is not None:
        changes["k"] = (k,) if isinstance(k, int) else tuple(k)
    if temperature is not None:
        changes["temperature"] = temperature
    settings = knn_protocol(name, **changes)
    with Task(weights, train, test, device, view=recipe.knn_spec(), portion=portion) as task:
        for each in settings.k:  # before the features are computed
            check_k(each, len(task.sets["train"]))
        (train_x, train_y), (test_x, test_y) = task.features("train"), task.features("test")
        on_device = [x.to(task.device) for x in (train_x, train_y, test_x, test_y)]
        found = knn_accuracies(*on_device, protocol=settings, num_classes=task.num_classes)
        entries = []
        for each, scores in zip(settings.k, found, strict=True):
            said = {**settings.model_dump(mode="json"), "name": f"{settings.name}, k = {each}", "k": each}
            entries.append(task.write("knn", [scores["top1"]], [scores["top5"]], said, [], command))
    return entries
