"""Linear evaluation of a backbone, by the protocol of a paper or our own quick one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from pipelines.errors import ConfigError
from pipelines.loader import ViewLoader
from relssl.dist import mix
from relssl.encode import feature_batches
from relssl.evaluate.task import Task
from relssl.evaluate.weights import Weights
from relssl.evaluators.linear import (
    LinearProtocol,
    LinearResult,
    cached_batches,
    linear_protocol,
    save_head,
    train_linear_probe,
)

log = logging.getLogger("relssl.evaluate")

_SECONDS_BETWEEN_LINES = 10


def evaluate_linear(
    weights: Weights,
    train: Path | None = None,
    test: Path | None = None,
    *,
    protocol: str | None = None,
    options: dict[str, Any] | None = None,
    seeds: Sequence[int] | None = None,
    device: str = "auto",
    command: str = "",
) -> dict[str, Any]:
    """A linear classifier on frozen features, one per seed; saves the heads, adds an entry to results.json.

    Args:
        protocol: a name of `relssl.evaluators.linear`; the recipe's own when None.
        options: settings of the protocol that differ.
    """
    chosen = weights.recipe.eval.linear
    if protocol is None:
        settings = linear_protocol(chosen.protocol, **{**chosen.options, **(options or {})})
    else:
        settings = linear_protocol(protocol, **(options or {}))
    seeds = list(seeds if seeds is not None else chosen.seeds)
    with Task(weights, train, test, device) as task:
        results = []
        for seed in seeds:
            result = _linear_probe(task, settings, seed)
            name = "head" if weights.origin == "pretrained" else f"head-{weights.origin}"
            save_head(
                weights.folder / f"{name}-seed{seed}.safetensors",
                result,
                classes=task.sets["train"].classes,
                backbone=weights.recipe.backbone.name,
                protocol=settings,
                seed=seed,
            )
            results.append(result)
        return task.write(
            "linear",
            [r.top1 for r in results],
            [r.top5 for r in results],
            settings.model_dump(mode="json"),
            seeds,
            command,
        )


def _linear_probe(task: Task, settings: LinearProtocol, seed: int) -> LinearResult:
    test = task.features("test")
    if not settings.augment:
        train_x, train_y = task.features("train")
        cached = cached_batches(train_x, train_y, settings.batch_size, seed)
        return _train_probe(task, cached, len(cached), test, settings, seed)
    specs = task.weights.recipe.linear_specs()
    if specs is None:
        raise ConfigError(
            f"the protocol {settings.name} trains on augmented views, but the recipe's eval.linear has no plan for "
            "them; add eval.linear.plan, or use --protocol cached"
        )
    files = task.sets["train"]
    with ViewLoader(
        files,
        [(None, specs)],
        global_batch=min(settings.batch_size, len(files)),
        engine=task.weights.recipe.data.engine,
        resize=task.weights.recipe.data.resize,
        device=task.device,
        seed=mix(seed, "linear") >> 1,
        drop_last=False,
        workers=task.weights.recipe.data.workers,
    ) as loader:

        def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
            loader.set_position(epoch, 0)
            for features, _, label in feature_batches(task.backbone, loader):
                yield features.float(), label

        return _train_probe(task, batches, loader.updates_per_epoch, test, settings, seed)


def _train_probe(
    task: Task,
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    per_epoch: int,
    test: tuple[Tensor, Tensor],
    settings: LinearProtocol,
    seed: int,
) -> LinearResult:
    last = perf_counter()

    def progress(record: dict[str, Any]) -> None:
        nonlocal last
        if perf_counter() - last > _SECONDS_BETWEEN_LINES or record["epoch"] == settings.epochs:
            last = perf_counter()
            log.info(
                "linear, seed %d: epoch %d/%d  loss %.4f  top-1 %.2f",
                seed,
                record["epoch"],
                settings.epochs,
                record["loss"],
                record["top1"],
            )

    return train_linear_probe(
        batches, per_epoch, test, test[0].shape[1], task.num_classes, settings, seed, task.device, progress
    )
