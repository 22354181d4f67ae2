"""Linear evaluation of a backbone, by the protocol of a paper or our own quick one; and of heads that were saved."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from pipelines.errors import ConfigError, InputError
from pipelines.views import ViewSpec
from relssl import dist
from relssl.dist import mix
from relssl.encode import feature_batches
from relssl.evaluate.task import ALL, Portion, Task, view_text
from relssl.evaluate.weights import Weights
from relssl.evaluators.linear import (
    LinearProtocol,
    LinearResult,
    Progress,
    cached_batches,
    head_accuracy,
    linear_protocol,
    load_head,
    save_head,
    train_linear_probe,
)
from relssl.weights import digest_of

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
    portion: Portion = ALL,
    device: str = "auto",
    command: str = "",
) -> dict[str, Any]:
    """A linear classifier on frozen features, one per seed; saves the heads, adds an entry to results.json.

    Args:
        protocol: a name of `relssl.evaluators.linear`; the recipe's own when None.
        options: settings of the protocol that differ.
        portion: which training images have labels.
    """
    chosen = weights.recipe.eval.linear
    own = linear_protocol(chosen.protocol, **chosen.options)
    if protocol is None:
        settings = linear_protocol(chosen.protocol, **{**chosen.options, **(options or {})})
    else:
        settings = linear_protocol(protocol, **(options or {}))
    seeds = list(seeds if seeds is not None else chosen.seeds)
    with Task(weights, train, test, device, portion=portion) as task:
        views = task.training_views(settings.crop) if settings.augment else None
        places = [task.place_for("head", settings, own, seed) for seed in seeds]
        results = []
        for seed, place in zip(seeds, places, strict=True):
            result = linear_on(task, settings, seed)
            if dist.rank() == 0:
                save_head(
                    place,
                    result,
                    classes=task.sets["train"].classes,
                    backbone=weights.recipe.backbone.name,
                    protocol=settings,
                    seed=seed,
                    extra=origin_of_head(task, weights, "linear", views),
                )
            results.append(result)
        return task.write(
            "linear",
            [r.top1 for r in results],
            [r.top5 for r in results],
            settings.model_dump(mode="json"),
            seeds,
            command,
            {"saved": [place.name for place in places]},
            training_views=views,
        )


def origin_of_head(
    task: Task, weights: Weights, evaluator: str, training_views: Sequence[ViewSpec] | None
) -> dict[str, Any]:
    """What a saved head says of the weights and the images that it was trained on."""
    return {
        "evaluator": evaluator,
        "weights": digest_of(weights.backbone),
        "train": task.names["train"],
        "num_train": len(task.sets["train"]),
        "subset": None if task.portion.is_all else str(task.portion),
        "view": view_text(task.view),
        "training_views": None if training_views is None else [view_text(spec) for spec in training_views],
    }


def evaluate_heads(
    weights: Weights,
    heads: Sequence[Path],
    test: Path | None = None,
    *,
    device: str = "auto",
    command: str = "",
) -> dict[str, Any]:
    """Test heads that were saved before, one per seed, without training; adds an entry to results.json.

    Raises:
        InputError: a head of other weights, of another backbone, of other classes, or no head at all.
        ConfigError: heads of different protocols, or two of one seed.
    """
    loaded = [(path, *load_head(path)) for path in heads]
    abouts = [about for *_, about in loaded]
    different = [about["protocol"] for about in abouts if about["protocol"] != abouts[0]["protocol"]]
    if different:
        raise ConfigError(
            f"these heads were trained by different protocols, {abouts[0]['protocol']['name']} and "
            f"{different[0]['name']}; test them one by one"
        )
    seeds = [about["seed"] for about in abouts]
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if seeds.count(seed) > 1)
        raise ConfigError(f"two of these heads are of seed {twice}; a spread is over heads of different seeds")
    with Task(weights, None, test, device, trains=False) as task:
        for path, _, _, about in loaded:
            _check_head(path, about, weights, task)
        features, labels = task.features("test")
        scores = [head_accuracy(features, labels, weight, bias) for _, weight, bias, _ in loaded]
        first = abouts[0]
        protocol = {**first["protocol"], "name": f"{first['protocol']['name']}, saved head"}
        came_from = {key: first.get(key) for key in ("train", "num_train", "subset", "training_views")}
        return task.write(
            str(first.get("evaluator", "linear")),
            [float(score["top1"] or 0.0) for score in scores],
            [score["top5"] for score in scores],
            protocol,
            seeds,
            command,
            came_from,
        )


def _check_head(path: Path, about: dict[str, Any], weights: Weights, task: Task) -> None:
    backbone = weights.recipe.backbone.name
    if about.get("backbone") != backbone:
        raise InputError(f"{path} was trained on the features of {about.get('backbone')}; the weights are {backbone}")
    digest = about.get("weights")
    if digest is None:  # written by an earlier version
        if path.resolve().parent != weights.folder.resolve() or weights.origin == "random":
            raise InputError(
                f"{path} does not say on which weights it was trained, and does not lie beside these in "
                f"{weights.folder}; train it again with this version"
            )
        log.info("note: %s does not say on which weights it was trained; it lies beside these", path)
    elif digest != digest_of(weights.backbone):
        raise InputError(
            f"{path} was trained on other weights of {backbone} than these; give the run or the file that it came "
            "from with --weights"
        )
    view = json.loads(json.dumps(view_text(task.view)))
    if about.get("view") not in (None, view):
        raise InputError(
            f"{path} was trained on images prepared as {_differing(about['view'], view)}, and these are prepared as "
            f"{_differing(view, about['view'])}; give the --recipe that it was trained with"
        )
    classes, expected = task.sets["test"].classes, about.get("classes")
    if classes and expected and list(classes) != list(expected):
        raise InputError(
            f"{path} tells {len(expected)} classes apart ({', '.join(expected[:5])}, ...) and {task.names['test']} has "
            f"{len(classes)} ({', '.join(classes[:5])}, ...)"
        )


def _differing(view: dict[str, Any], other: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in view.items() if other.get(key) != value)


def linear_on(task: Task, settings: LinearProtocol, seed: int) -> LinearResult:
    """A linear classifier on the data of a task."""
    test = task.features("test")
    if not settings.augment:
        train_x, train_y = task.features("train")
        cached = cached_batches(train_x, train_y, settings.batch_size, seed, drop_last=settings.drop_last)
        return _train_probe(task, cached, len(cached), test, settings, seed)
    with task.shuffled(
        task.training_views(settings.crop), settings.batch_size, mix(seed, "linear") >> 1, drop_last=settings.drop_last
    ) as loader:

        def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
            loader.set_position(epoch, 0)
            for size, (features, _, label) in zip(loader.sizes, feature_batches(task.backbone, loader), strict=True):
                yield dist.gather_batch(features.float(), size), dist.gather_batch(label, size)

        return _train_probe(task, batches, loader.updates_per_epoch, test, settings, seed)


def _train_probe(
    task: Task,
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    per_epoch: int,
    test: tuple[Tensor, Tensor],
    settings: LinearProtocol,
    seed: int,
) -> LinearResult:
    progress = progress_lines("linear", seed, settings.epochs)
    return train_linear_probe(
        batches, per_epoch, test, test[0].shape[1], task.num_classes, settings, seed, task.device, progress
    )


def progress_lines(what: str, seed: int, epochs: int) -> Progress:
    """A line of the log every ten seconds, and for the last epoch."""
    last = perf_counter()

    def progress(record: dict[str, Any]) -> None:
        nonlocal last
        if perf_counter() - last > _SECONDS_BETWEEN_LINES or record["epoch"] == epochs:
            last = perf_counter()
            tested = f"  top-1 {record['top1']:.2f}" if "top1" in record else ""
            log.info(
                "%s, seed %d: epoch %d/%d  loss %.4f%s", what, seed, record["epoch"], epochs, record["loss"], tested
            )

    return progress
