"""Evaluation while training: weighted kNN where there are labels, RankMe and uniformity where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines import beton
from pipelines.errors import InputError
from pipelines.loader import ViewLoader
from pipelines.subset import spread
from relssl import dist
from relssl.config import Recipe
from relssl.encode import encode, feature_loader
from relssl.evaluators.knn import knn_accuracy
from relssl.evaluators.label_free import neighbours_of, rankme, uniformity

_SHEET_QUERIES, _SHEET_NEIGHBOURS = 8, 6
_UNIFORMITY_IMAGES = 2048
_UNREADABLE = 0.01  # as in training


class OnlineEvaluator:
    """Keeps its data open for the length of a run. Every rank must call `run`; all get the same numbers."""

    def __init__(self, recipe: Recipe, device: torch.device, dtype: torch.dtype):
        self.recipe, self.device = recipe, device
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
        data, online = self.recipe.data, self.recipe.eval.online
        assert online is not None
        self.files.append(beton.open(data.probe or data.train))
        sets = [spread(self.files[0], online.num_train)]
        if data.test is not None and (self.files[0].labels >= 0).all():
            self.files.append(beton.open(data.test))
            if (self.files[1].labels >= 0).all():
                sets.append(spread(self.files[1], online.num_test))
        self.labelled = len(sets) == 2
        for files in sets:
            self.loaders.append(self._loader(files, device, dtype))

    def run(self, encoder: nn.Module) -> list[dict[str, Any]]:
        """Records for metrics.jsonl, without update and epoch."""
        features, labels = self._features(encoder, 0)
        if not self.labelled:
            few = features[:: max(len(features) // _UNIFORMITY_IMAGES, 1)]  # its cost grows with the square
            return [{"evaluator": "rankme", "rankme": rankme(features), "uniformity": uniformity(few)}]
        test_features, test_labels = self._features(encoder, 1)
        knn = self.recipe.eval.knn
        k = min(knn.k, len(features))
        on_device = [x.to(self.device) for x in (features, labels, test_features, test_labels)]
        scores = knn_accuracy(*on_device, k=k, temperature=knn.temperature)
        counts = {"num_train": len(features), "num_test": len(test_features)}
        return [{"evaluator": "knn", **scores, "k": k, **counts, "rankme": rankme(features)}]

    def neighbour_sheet(self, encoder: nn.Module, out: Path) -> None:
        """Draw some images of the training data with their nearest neighbours."""
        features, _ = encode(encoder, self.loaders[0])
        unread = features.isnan().all(dim=1)
        if dist.rank() != 0 or len(features) < 2 or unread.any():  # a picture of unreadable images is none
            return
        from relssl.pictures import neighbour_sheet

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
        neighbour_sheet(rows, similarities=similarity.tolist(), **names).save(out)

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
