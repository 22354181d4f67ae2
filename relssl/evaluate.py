"""`relssl eval`: what a backbone is worth, written into results.json beside it.

Weights come from a run folder or a `backbone.safetensors`; both carry the recipe, which says how images are
prepared and which protocol is the method's own.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from pipelines import beton
from pipelines.errors import ConfigError, InputError
from pipelines.loader import ViewLoader
from relssl import checkpoint
from relssl.config import Recipe
from relssl.dist import mix
from relssl.encode import encode, feature_batches, feature_loader, frozen_copy
from relssl.evaluators.features import summarise
from relssl.evaluators.knn import knn_accuracy
from relssl.evaluators.linear import (
    LinearProtocol,
    LinearResult,
    cached_batches,
    linear_protocol,
    save_head,
    train_linear_probe,
)
from relssl.methods import load_method
from relssl.nets import build_backbone
from relssl.runfolder import RunFolder, now
from relssl.weights import load_backbone

log = logging.getLogger("relssl.evaluate")

_SECONDS_BETWEEN_LINES = 10


@dataclass
class Weights:
    """A backbone under evaluation. `origin` is `pretrained` or `random`; results go into `folder`."""

    backbone: nn.Module
    recipe: Recipe
    origin: str
    epochs: int
    folder: Path


def open_weights(path: Path, *, random_init: bool = False) -> Weights:
    """The backbone of a run folder or of a weights file.

    A run that has not ended is evaluated at its newest checkpoint. With `random_init` the backbone is the one that
    the run started from.

    Raises:
        InputError: there are no weights, or they do not fit their recipe.
    """
    if path.is_dir():
        folder = RunFolder(path)
        recipe = folder.recipe()
        if random_init:
            return Weights(initial_backbone(recipe), recipe, "random", 0, path)
        if folder.backbone.is_file():
            found = load_backbone(folder.backbone)
            return Weights(found.backbone, found.recipe, _origin(found.epochs), found.epochs, path)
        return _from_checkpoint(folder, recipe)
    if not path.exists():
        raise InputError(f"there are no weights at {path}; expected a run folder or a backbone.safetensors")
    found = load_backbone(path)
    if random_init:
        return Weights(initial_backbone(found.recipe), found.recipe, "random", 0, path.parent)
    return Weights(found.backbone, found.recipe, _origin(found.epochs), found.epochs, path.parent)


def _origin(epochs: int) -> str:
    return "pretrained" if epochs else "random"  # a method that trains nothing


def initial_backbone(recipe: Recipe) -> nn.Module:
    """The backbone that a run of this recipe starts from: a method builds its encoder first."""
    torch.manual_seed(mix(recipe.train.seed, "init"))
    return build_backbone(recipe.backbone.name, **recipe.backbone.options)


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
    with _Task(weights, train, test, device) as task:
        settings = weights.recipe.eval.knn
        k, temperature = k or settings.k, temperature or settings.temperature
        (train_x, train_y), (test_x, test_y) = task.features("train"), task.features("test")
        on_device = [x.to(task.device) for x in (train_x, train_y, test_x, test_y)]
        scores = knn_accuracy(*on_device, k=k, temperature=temperature, num_classes=task.num_classes)
        protocol = {"name": "weighted kNN", "k": k, "temperature": temperature}
        return task.write("knn", [scores["top1"]], [scores["top5"]], protocol, [], command)


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
    with _Task(weights, train, test, device) as task:
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


def _linear_probe(task: _Task, settings: LinearProtocol, seed: int) -> LinearResult:
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
    task: _Task,
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


class _Task:
    """The data of one evaluation and the features already extracted from it."""

    def __init__(self, weights: Weights, train: Path | None, test: Path | None, device: str):
        self.weights = weights
        self.device = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        self.backbone = frozen_copy(weights.backbone, self.device)
        data = weights.recipe.data
        test_place = test or data.test
        if test_place is None:
            raise ConfigError("no test data: give --test FILE.beton, or set data.test in the recipe")
        places: dict[str, Any] = {"train": train or data.probe or data.train, "test": test_place}
        self.sets: dict[str, Any] = {}
        try:
            self._open(places)
        except BaseException:
            self.close()
            raise

    def _open(self, places: dict[str, Any]) -> None:
        for name, place in places.items():
            self.sets[name] = beton.open(place)
        self.names = {name: _short(place) for name, place in places.items()}
        self._features: dict[str, tuple[Tensor, Tensor]] = {}
        labels = {name: files.labels for name, files in self.sets.items()}
        for name, values in labels.items():
            if (values < 0).any():
                raise InputError(
                    f"{self.names[name]}: {int((values < 0).sum())} of {len(values)} images have no label, and this "
                    "evaluation compares labels. Convert a labelled source (one folder per class), or look at the "
                    "label-free measures in the run's report"
                )
        classes = {name: files.classes for name, files in self.sets.items()}
        if classes["train"] and classes["test"] and list(classes["train"]) != list(classes["test"]):
            raise InputError(
                f"{self.names['train']} and {self.names['test']} have different classes: "
                f"{list(classes['train'])[:5]}... against {list(classes['test'])[:5]}..."
            )
        self.num_classes = int(max(values.max() for values in labels.values())) + 1

    def __enter__(self) -> _Task:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for files in self.sets.values():
            files.close()

    def features(self, name: str) -> tuple[Tensor, Tensor]:
        """(N, D) float32 features and (N,) labels of the un-augmented images, extracted once."""
        if name not in self._features:
            recipe = self.weights.recipe
            log.info("features of %d %s images", len(self.sets[name]), name)
            with contextlib.closing(
                feature_loader(
                    self.sets[name],
                    recipe.eval_spec(),
                    batch_size=recipe.eval.batch_size,
                    device=self.device,
                    engine=recipe.data.engine,
                    resize=recipe.data.resize,
                    workers=recipe.data.workers,
                )
            ) as loader:
                features, labels = encode(self.backbone.float(), loader)
            self._features[name] = features.float(), labels
        return self._features[name]

    def write(
        self,
        evaluator: str,
        top1: list[float],
        top5: list[float | None],
        protocol: dict[str, Any],
        seeds: list[int],
        command: str,
    ) -> dict[str, Any]:
        recipe = self.weights.recipe
        entry = {
            "evaluator": evaluator,
            "weights": self.weights.origin,
            "top1": summarise(top1),
            "top5": summarise(top5),
            "seeds": seeds,
            "protocol": protocol,
            "train": self.names["train"],
            "test": self.names["test"],
            "data": [self.sets[name].content_hash for name in ("train", "test")],
            "num_train": len(self.sets["train"]),
            "num_test": len(self.sets["test"]),
            "backbone": recipe.backbone.name,
            "method": recipe.method_name,
            "epochs": self.weights.epochs,
            "global_batch": recipe.train.batch_size,
            "views_per_step": sum(spec.count for spec in recipe.views.specs()[-1][1]),
            "train_seed": recipe.train.seed,
            "command": command,
            "date": now(),
        }
        RunFolder(self.weights.folder).add_result(entry)
        return entry


def _from_checkpoint(folder: RunFolder, recipe: Recipe) -> Weights:
    found = checkpoint.list_checkpoints(folder.checkpoints)
    if not found:
        raise InputError(
            f"{folder.path} has neither a backbone nor a checkpoint yet; train it first, or use --random-init to "
            "evaluate the initial weights"
        )
    saved = checkpoint.load(found[-1])
    prefix = f"{load_method(folder.method_place(recipe)).EVALUATED}."
    tensors = {k.removeprefix(prefix): v for k, v in saved.model.items() if k.startswith(prefix)}
    backbone = build_backbone(recipe.backbone.name, **recipe.backbone.options)
    checkpoint.load_model(backbone, tensors, str(found[-1]))
    log.info("the run has not ended: evaluating %s", found[-1])
    return Weights(backbone, recipe, "pretrained", saved.position.epoch, folder.path)


def _short(place: str | Path | list[str]) -> str:
    return " + ".join(Path(p).name for p in (place if isinstance(place, list) else [place]))
