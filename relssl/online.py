"""Evaluation while training: every evaluator of `relssl eval` where there are labels, RankMe and uniformity without.

Features are extracted once for all evaluators that are due, shared out among the processes; the main process measures,
and does alone what needs augmented images. Nothing here draws from a global generator or touches what is trained, so a
run ends with the same bits whatever is evaluated, and how often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from pipelines import beton
from pipelines.errors import ConfigError, InputError, RunError
from pipelines.loader import ViewLoader
from pipelines.subset import spread, spread_rows
from relssl import dist
from relssl.config import Recipe
from relssl.encode import encode, feature_loader
from relssl.evaluate.finetune import finetune_on
from relssl.evaluate.linear import linear_on
from relssl.evaluate.task import Portion, Task
from relssl.evaluate.weights import Weights
from relssl.evaluators.few_labels import Amount, few_label_curve
from relssl.evaluators.finetune import FinetuneProtocol, FinetuneResult
from relssl.evaluators.knn import knn_accuracy
from relssl.evaluators.label_free import neighbours_of, rankme, uniformity
from relssl.evaluators.linear import LinearProtocol, LinearResult, cached_batches, train_linear_probe
from relssl.evaluators.probe import FEATURES, ProbeProtocol, fast_probe
from relssl.evaluators.retrieval import retrieval_scores
from relssl.nets import build_backbone
from relssl.online_options import FewLabels, Knn, LabelFree, Labelled, Retrieval, online_settings
from relssl.progress import duration

_SHEET_QUERIES, _SHEET_NEIGHBOURS = 8, 6
_UNIFORMITY_IMAGES = 2048
_UNREADABLE = 0.01  # as in training
_FEW_LABELS = (1, 10, 100)  # a class
_NEEDS_NO_LABELS = "label_free"
# Before the patience of the other processes ends: what is measured without looking at the clock must end, too.
_MARGIN = timedelta(minutes=15)

Watch = Callable[[], None]


class Stopped(Exception):
    """The run is asked to end: the evaluation was left, and nothing of it is kept."""


@dataclass(frozen=True)
class _Features:
    """What evaluators look at: the encoder; features and labels of training images, and of test images if labelled."""

    encoder: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None


class OnlineEvaluator:
    """Keeps its data open for the length of a run. Every rank must call `run`; the main process gets the numbers."""

    def __init__(self, recipe: Recipe, device: torch.device, dtype: torch.dtype):
        assert recipe.eval.online is not None
        self.recipe, self.device, self.online = recipe, device, recipe.eval.online
        self.measures, self.settings = self.online.evaluators.chosen(), online_settings(recipe.eval)
        self.files: list[Any] = []
        self.loaders: list[ViewLoader] = []
        try:
            self._open(device, dtype)
        except BaseException:
            self.close()
            raise

    def _features(self, encoder: nn.Module, which: int) -> tuple[Tensor, Tensor]:
        """Features and labels, without the few images that could not be read."""
        features, labels = encode(encoder, self.loaders[which])
        unread = features.isnan().all(dim=1)
        if 0 < int(unread.sum()) <= _UNREADABLE * len(features) + 1:
            return features[~unread], labels[~unread]
        return features, labels

    def _open(self, device: torch.device, dtype: torch.dtype) -> None:
        data, online = self.recipe.data, self.online
        self.files.append(beton.open(data.probe or data.train))
        sets = [spread(self.files[0], online.num_train)]
        if data.test is not None and (self.files[0].labels >= 0).all():
            self.files.append(beton.open(data.test))
            if (self.files[1].labels >= 0).all():
                sets.append(spread(self.files[1], online.num_test))
        self.labelled = len(sets) == 2
        for files in sets:
            self.loaders.append(self._loader(files, device, dtype))

    def due(self, epoch: int, *, last: bool) -> list[str]:
        """The evaluators whose turn it is after `epoch` epochs: all of them after the last."""
        every = {name: measure.every_epochs or self.online.every_epochs for name, measure in self.measures.items()}
        return [name for name, period in every.items() if last or epoch % period == 0]

    def run(
        self, encoder: nn.Module, due: Sequence[str], *, stop: Callable[[], bool] = lambda: False
    ) -> list[dict[str, Any]]:
        """Records for metrics.jsonl, without update and epoch; none on the other ranks.

        An evaluator that cannot measure leaves {"evaluator", "problem"} and the others go on.

        Args:
            stop: whether to leave the evaluation; the main process asks it before each batch of images and each epoch.

        Raises:
            Stopped: on the main process, which alone measures.
        """
        if not due:
            return []
        train = self._features(encoder, 0)
        test = self._features(encoder, 1) if self.labelled else None
        if dist.rank() != 0:
            return []
        if test is None:
            due = [_NEEDS_NO_LABELS]
        found, watch = _Features(encoder, train, test), _watch(stop)
        records = []
        for name in due:
            problem = ""
            try:
                watch()
                records.append(self._measure(name, found, watch))
            except (ConfigError, InputError, RunError) as error:  # no reason to lose the run
                problem = str(error)
            except RuntimeError as error:  # nor is one of torch's, such as no memory for a second backbone
                problem = str(error).strip().partition("\n")[0] or type(error).__name__
            if problem:
                records.append({"evaluator": name, "problem": problem})
                self._free_memory()
        return records

    def _measure(self, name: str, found: _Features, watch: Watch) -> dict[str, Any]:
        settings = self.settings[name] if name in self.settings else LabelFree()
        train_x = found.train[0]
        if isinstance(settings, LabelFree) or found.test is None:
            few = train_x[spread_rows(len(train_x), _UNIFORMITY_IMAGES)]  # its cost grows with the square
            return {"evaluator": "rankme", "rankme": rankme(train_x), "uniformity": uniformity(few)}
        data = tuple(part.to(self.device) for part in (*found.train, *found.test))
        counts = {"num_train": len(train_x), "num_test": len(found.test[0])}
        if isinstance(settings, Labelled):
            measured = self._labelled(settings, found.encoder, data, watch)
        else:
            measured = _ON_FEATURES[type(settings)](settings, *data)
        record = {"evaluator": name, **counts, **measured}
        if name == "knn" and _NEEDS_NO_LABELS not in self.settings:
            record["rankme"] = rankme(train_x)
        return record

    def _free_memory(self) -> None:
        """Give back what an evaluator held when it failed; its frames, which held it, are gone with the error."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _labelled(self, settings: Labelled, encoder: nn.Module, data: Sequence[Tensor], watch: Watch) -> dict[str, Any]:
        """A protocol: on the features that there are where it can, on the images where it must."""
        protocol = settings.protocol
        found: LinearResult | FinetuneResult
        if isinstance(protocol, LinearProtocol) and not protocol.augment and settings.percent is None:
            found, counts = _linear(protocol, *data, device=self.device, watch=watch), {}
        else:
            with dist.alone(), self._task(settings, encoder, watch) as task:
                if isinstance(protocol, FinetuneProtocol):
                    found = finetune_on(task, protocol, 0)
                elif protocol.augment:
                    found = linear_on(task, protocol, 0)
                else:
                    images = (*task.features("train"), *task.features("test"))
                    found = _linear(protocol, *images, device=self.device, watch=watch)
                counts = {"num_train": len(task.sets["train"]), "num_test": len(task.sets["test"])}
        return {"top1": found.top1, "top5": found.top5, "protocol": protocol.name, **counts}

    def _task(self, settings: Labelled, encoder: nn.Module, watch: Watch) -> Task:
        """The labelled data of the recipe, all of it, for a copy of the encoder as `relssl eval` would build it.

        An epoch over the images may take long, so copies of that copy watch each batch.
        """
        chosen = self.recipe.backbone
        with torch.random.fork_rng(devices=[]):  # building draws initial weights
            backbone = build_backbone(chosen.name, **chosen.options)
        backbone.load_state_dict(encoder.state_dict())
        backbone.register_forward_pre_hook(lambda *_: watch())
        weights = Weights(backbone, self.recipe, "pretrained", None, Path())
        return Task(weights, None, None, str(self.device), portion=Portion(settings.percent, None, settings.draw))

    def neighbour_sheet(self, encoder: nn.Module, out: Path) -> None:
        """Draw some images of the training data with their nearest neighbours."""
        features, _ = encode(encoder, self.loaders[0])
        unread = features.isnan().all(dim=1)
        if dist.rank() != 0 or len(features) < 2 or unread.any():  # a picture of unreadable images is none
            return
        from relssl.pictures import neighbour_sheet, save_picture

        count = min(_SHEET_QUERIES, len(features))
        queries = torch.arange(count) * len(features) // count
        found, similarity = neighbours_of(features, queries, k=min(_SHEET_NEIGHBOURS, len(features) - 1))
        files = self.loaders[0].files
        rows = [
            (files.decode(int(q)), [files.decode(int(i)) for i in row])
            for q, row in zip(queries.tolist(), found.tolist(), strict=True)
        ]
        names: dict[str, Any] = {}
        if files.classes and (files.labels >= 0).all():
            names["query_labels"] = [files.classes[files.labels[q]] for q in queries.tolist()]
            names["neighbour_labels"] = [[files.classes[files.labels[i]] for i in row] for row in found.tolist()]
        save_picture(neighbour_sheet(rows, similarities=similarity.tolist(), **names), out)

    def close(self) -> None:
        for loader in self.loaders:
            loader.close()
        for files in self.files:
            files.close()

    def _loader(self, files: Any, device: torch.device, dtype: torch.dtype) -> ViewLoader:
        if not len(files):
            raise InputError("the data for online evaluation is empty")
        return feature_loader(
            files,
            self.recipe.eval_spec(),
            batch_size=self.recipe.eval.batch_size,
            device=device,
            dtype=dtype,
            engine=self.recipe.data.engine,
            resize=self.recipe.data.resize,
            workers=self.recipe.data.workers,
            max_unreadable=_UNREADABLE,
        )


def _watch(stop: Callable[[], bool]) -> Watch:
    """To be called now and then: raises `Stopped` while `stop()` says so, RunError when the others wait too long."""
    most = (dist.PATIENCE - _MARGIN).total_seconds()
    until = monotonic() + most if dist.world_size() > 1 else math.inf

    def look() -> None:
        if stop():
            raise Stopped
        if monotonic() > until:
            raise RunError(
                f"the other processes have waited {duration(most)} for the evaluation, and would end the run after "
                f"{duration(dist.PATIENCE.total_seconds())}. Evaluate with --follow on another device, or make it "
                "shorter: percent, epochs"
            )

    return look


def _knn(settings: Knn, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> dict[str, Any]:
    k = min(settings.k, len(x))
    return {**knn_accuracy(x, y, test_x, test_y, k=k, temperature=settings.temperature), "k": k}


def _retrieval(settings: Retrieval, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> dict[str, Any]:
    found = retrieval_scores(test_x, test_y, x, y, k=settings.k)
    return {"map": found["map"], **{f"recall_at_{k}": value for k, value in found["recall"].items()}}


def _linear(
    protocol: LinearProtocol,
    x: Tensor,
    y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    device: torch.device,
    watch: Watch,
) -> LinearResult:
    batches = cached_batches(x, y, protocol.batch_size, seed=0, drop_last=protocol.drop_last)
    test, classes = (test_x, test_y), _num_classes(y, test_y)
    return train_linear_probe(
        batches, len(batches), test, x.shape[1], classes, protocol, 0, device, lambda record: watch()
    )


def _probe(protocol: ProbeProtocol, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> dict[str, Any]:
    found = fast_probe(
        {FEATURES: x},
        y,
        {FEATURES: test_x},
        test_y,
        num_classes=_num_classes(y, test_y),
        protocol=protocol,
        device=x.device,
    )
    return {"top1": found.top1, "top5": found.top5, "check_top1": found.check_top1}


def _few_labels(settings: FewLabels, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> dict[str, Any]:
    fewest = int(y.unique(return_counts=True)[1].min())
    usual = [Amount(per_class=k) for k in _FEW_LABELS if k <= fewest]
    curve = few_label_curve(
        x,
        y,
        test_x,
        test_y,
        num_classes=_num_classes(y, test_y),
        amounts=usual if settings.amounts is None else settings.amounts,
        seeds=settings.seeds,
        device=x.device,
    )
    names = [
        f"{point['per_class']}" if point["percent"] is None else f"{point['percent']:g}_percent" for point in curve
    ]
    return {f"top1_at_{name}": point["top1"]["mean"] for name, point in zip(names, curve, strict=True)}


def _num_classes(y: Tensor, test_y: Tensor) -> int:
    return int(max(y.max(), test_y.max())) + 1


_ON_FEATURES: dict[type, Callable[..., dict[str, Any]]] = {
    Knn: _knn,
    Retrieval: _retrieval,
    FewLabels: _few_labels,
    ProbeProtocol: _probe,
}
