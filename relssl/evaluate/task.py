"""What every evaluation shares: labelled training and test data, features extracted once, an entry in results.json."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines import beton
from pipelines.errors import ConfigError, InputError
from relssl.encode import encode, feature_loader, frozen_copy
from relssl.evaluate.weights import Weights
from relssl.evaluators.features import summarise
from relssl.runfolder import RunFolder, now

log = logging.getLogger("relssl.evaluate")


class Task:
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

    def __enter__(self) -> Task:
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


def _short(place: str | Path | list[str]) -> str:
    return " + ".join(Path(p).name for p in (place if isinstance(place, list) else [place]))
