"""Fine-tuning of a backbone on labelled images, all of them or a few: semi-supervised evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pipelines.loader import ViewLoader
from pipelines.views import ViewSpec
from relssl.dist import mix
from relssl.evaluate.linear import origin_of_head, progress_lines
from relssl.evaluate.task import ALL, Portion, Task
from relssl.evaluate.weights import Weights
from relssl.evaluators.finetune import FinetuneProtocol, FinetuneResult, finetune, finetune_protocol
from relssl.evaluators.linear import save_head
from relssl.weights import digest_of, save_backbone


def evaluate_finetune(
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
    """Backbone and head trained on labelled images, once per seed; saves both, adds an entry to results.json.

    Args:
        protocol: a name of `relssl.evaluators.finetune`; the recipe's own when None.
        options: settings of the protocol that differ.
        portion: which training images have labels; where batches leave one image over, an epoch goes without it.

    Raises:
        InputError: there is one training image only, or the data does not fit (see `Task`).
    """
    chosen = weights.recipe.eval.finetune
    own = finetune_protocol(chosen.protocol, **chosen.options)
    if protocol is None:
        settings = finetune_protocol(chosen.protocol, **{**chosen.options, **(options or {})})
    else:
        settings = finetune_protocol(protocol, **(options or {}))
    seeds = list(seeds if seeds is not None else chosen.seeds)
    with Task(weights, train, test, device, portion=portion) as task:
        views = task.training_views(settings.crop) if settings.augment else None
        places = [task.place_for("finetuned", settings, own, seed) for seed in seeds]
        results = []
        for seed, place in zip(seeds, places, strict=True):
            result = finetune_on(task, settings, seed)
            _save(task, result, settings, place, seed, views)
            results.append(result)
        return task.write(
            "finetune",
            [r.top1 for r in results],
            [r.top5 for r in results],
            settings.model_dump(mode="json"),
            seeds,
            command,
            {"saved": [place.name for place in places]},
            training_views=views,
        )


def finetune_on(task: Task, settings: FinetuneProtocol, seed: int) -> FinetuneResult:
    """A copy of the backbone and a head, trained on the data of a task."""
    specs = task.training_views(settings.crop) if settings.augment else [task.view]
    backbone: Any = task.backbone.float()
    with (
        task.shuffled(
            specs,
            settings.batch_size,
            mix(seed, "finetune") >> 1,
            drop_last=settings.drop_last,
            least_batch=2,  # of one image there are no batch statistics
        ) as train,
        task.unaugmented("test") as test,
    ):

        def train_batches(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
            train.set_position(epoch, 0)
            return _images(train)

        def test_batches() -> Iterable[tuple[Tensor, Tensor]]:
            test.set_position(0, 0)
            return _images(test)

        return finetune(
            backbone,
            train_batches,
            train.updates_per_epoch,
            test_batches,
            backbone.feature_dim,
            task.num_classes,
            settings,
            seed,
            task.device,
            progress_lines("fine-tuning", seed, settings.epochs),
        )


def _images(loader: ViewLoader) -> Iterable[tuple[Tensor, Tensor]]:
    for batch in loader:
        ((view,),) = batch.views.values()
        yield view, batch.label


def _save(
    task: Task,
    result: FinetuneResult,
    settings: FinetuneProtocol,
    place: Path,
    seed: int,
    views: Sequence[ViewSpec] | None,
) -> None:
    """The backbone, and beside it its head."""
    weights = task.weights
    save_backbone(place, result.backbone, weights.recipe, weights.epochs, origin="finetuned", imported=weights.imported)
    save_head(
        place.with_name(place.name.replace("finetuned", "finetuned-head", 1)),
        result,
        classes=task.sets["train"].classes,
        backbone=weights.recipe.backbone.name,
        protocol=settings,
        seed=seed,
        extra={**origin_of_head(task, weights, "finetune", views), "weights": digest_of(result.backbone)},
    )
