"""The fast probe of a backbone: its own features, or those of several layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from relssl.evaluate.layers import Layers
from relssl.evaluate.task import ALL, Portion, Task
from relssl.evaluate.weights import Weights
from relssl.evaluators.features import summarise
from relssl.evaluators.probe import FEATURES, ProbeResult, fast_probe, probe_protocol

log = logging.getLogger("relssl.evaluate")


def evaluate_probe(
    weights: Weights,
    train: Path | None = None,
    test: Path | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    portion: Portion = ALL,
    device: str = "auto",
    command: str = "",
) -> dict[str, Any]:
    """A grid of linear heads, picked on held-out training images, tested once; adds an entry to results.json.

    Args:
        options: settings of the protocol that differ, its grid among them.
        seeds: each draws a held-out part of its own.
        portion: which training images have labels.
    """
    protocol = probe_protocol(**(options or {}))
    with Task(weights, train, test, device, portion=portion) as task:
        start = perf_counter()
        (train_x, train_y), (test_x, test_y) = (
            layer_features(task, name, protocol.layer) for name in ("train", "test")
        )
        extracted = perf_counter()
        results = []
        for seed in seeds:
            log.info(
                "probe, seed %d: %d heads", seed, len(protocol.lr) * len(protocol.weight_decay) * len(protocol.layer)
            )
            results.append(
                fast_probe(
                    train_x,
                    train_y,
                    test_x,
                    test_y,
                    num_classes=task.num_classes,
                    protocol=protocol,
                    seed=seed,
                    device=task.device,
                )
            )
        seconds = {"features": extracted - start, "probe": perf_counter() - extracted}
        return task.write(
            "probe",
            [r.top1 for r in results],
            [r.top5 for r in results],
            protocol.model_dump(mode="json"),
            list(seeds),
            command,
            {
                "check": {
                    "name": "logistic regression by L-BFGS",
                    "top1": summarise([r.check_top1 for r in results]),
                    "top5": summarise([r.check_top5 for r in results]),
                },
                "picked": [picked(r) for r in results],
                "seconds": {name: round(value, 2) for name, value in seconds.items()},
            },
        )


def layer_features(task: Task, name: str, layers: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Features (N, D) of each layer, and labels, of the data set `name`; the images are read once."""
    if list(layers) == [FEATURES]:
        features, labels = task.features(name)
        return {FEATURES: features}, labels
    log.info("features of %d %s images: %s", len(task.sets[name]), name, ", ".join(layers))
    stack = Layers(task.backbone.float(), layers)
    spec = task.weights.recipe.eval_spec()
    features, labels = task.extract(task.sets[name], spec, stack)
    return stack.split(features, spec.size), labels


def picked(result: ProbeResult) -> dict[str, Any]:
    """What results.json tells of the choice."""
    choice = asdict(result.choice)
    grid = [{key: value for key, value in entry.items() if key != "loss"} for entry in choice.pop("grid")]
    return {**choice, "at_edge": result.choice.at_edge, "grid": grid}
