"""Evaluation while training: kNN, a quick linear probe and retrieval where there are labels, RankMe and uniformity.

Features are extracted once for all evaluators that are due, shared out among the processes; the main process measures.
Nothing here draws from a global generator or touches what is trained, so a run ends with the same bits whatever is
evaluated, and how often.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines import beton
from pipelines.errors import ConfigError, InputError
from pipelines.loader import ViewLoader
from pipelines.subset import spread
from relssl import dist
from relssl.config import OnlineMeasure, Recipe
from relssl.encode import encode, feature_loader
from relssl.evaluators.knn import knn_accuracy
from relssl.evaluators.label_free import neighbours_of, rankme, uniformity
from relssl.evaluators.linear import cached_batches, linear_protocol, train_linear_probe
from relssl.evaluators.retrieval import retrieval_scores

_SHEET_QUERIES, _SHEET_NEIGHBOURS = 8, 6
_UNIFORMITY_IMAGES = 2048
_UNREADABLE = 0.01  # as in training
_RETRIEVAL_K = (1, 5, 10)
_NEEDS_NO_LABELS = "label_free"


class OnlineEvaluator:
    """Keeps its data open for the length of a run. Every rank must call `run`; the main process gets the numbers."""

    def __init__(self, recipe: Recipe, device: torch.device, dtype: torch.dtype):
        assert recipe.eval.online is not None
        self.recipe, self.device, self.online = recipe, device, recipe.eval.online
        self.measures = self.online.evaluators.chosen()
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

    def run(self, encoder: nn.Module, due: Sequence[str]) -> list[dict[str, Any]]:
        """Records for metrics.jsonl, without update and epoch; none on the other ranks.

        An evaluator that cannot measure leaves {"evaluator", "problem"} and the others go on.
        """
        if not due:
            return []
        train = self._features(encoder, 0)
        test = self._features(encoder, 1) if self.labelled else None
        if dist.rank() != 0:
            return []
        if test is None:
            due = [_NEEDS_NO_LABELS]
        records = []
        for name in due:
            try:
                records.append(self._measure(name, train, test))
            except (ConfigError, InputError) as error:  # no reason to lose the run
                records.append({"evaluator": name, "problem": str(error)})
        return records

    def _measure(self, name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
        if name == _NEEDS_NO_LABELS or test is None:
            few = train[0][:: max(len(train[0]) // _UNIFORMITY_IMAGES, 1)]  # its cost grows with the square
            return {"evaluator": "rankme", "rankme": rankme(train[0]), "uniformity": uniformity(few)}
        measure = {"knn": self._knn, "linear": self._linear, "retrieval": self._retrieval}[name]
        counts = {"num_train": len(train[0]), "num_test": len(test[0])}
        x, y, test_x, test_y = (part.to(self.device) for part in (*train, *test))
        record = {"evaluator": name, **measure(self.measures[name], x, y, test_x, test_y), **counts}
        if name == "knn" and _NEEDS_NO_LABELS not in self.measures:
            record["rankme"] = rankme(train[0])
        return record

    def _knn(self, measure: OnlineMeasure, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> dict[str, Any]:
        chosen = {"k": self.recipe.eval.knn.k, "temperature": self.recipe.eval.knn.temperature, **measure.options}
        chosen["k"] = min(chosen["k"], len(x))
        return {**knn_accuracy(x, y, test_x, test_y, **chosen), "k": chosen["k"]}

    def _linear(self, measure: OnlineMeasure, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> dict[str, Any]:
        protocol = linear_protocol("cached", **measure.options)
        batches = cached_batches(x, y, protocol.batch_size, seed=0, drop_last=protocol.drop_last)
        classes = int(max(y.max(), test_y.max())) + 1
        found = train_linear_probe(
            batches, len(batches), (test_x, test_y), x.shape[1], classes, protocol, 0, self.device
        )
        return {"top1": found.top1, "top5": found.top5}

    def _retrieval(
        self, measure: OnlineMeasure, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor
    ) -> dict[str, Any]:
        found = retrieval_scores(test_x, test_y, x, y, k=measure.options.get("k", _RETRIEVAL_K))
        return {"map": found["map"], **{f"recall_at_{k}": value for k, value in found["recall"].items()}}

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
