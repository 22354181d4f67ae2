"""What every evaluation shares: labelled training and test data, features extracted once, an entry in results.json."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines import beton
from pipelines.errors import ConfigError, InputError
from pipelines.views import ViewSpec
from relssl.encode import encode, feature_loader, frozen_copy
from relssl.evaluate.weights import Weights
from relssl.evaluators.features import summarise
from relssl.runfolder import RunFolder, now

log = logging.getLogger("relssl.evaluate")


class Task:
    """The data of one evaluation and the features already extracted from it.

    With `needs_labels` false the data may lack labels (then `labelled` is false) and there may be no test set.
    """

    def __init__(
        self, weights: Weights, train: Path | None, test: Path | None, device: str, *, needs_labels: bool = True
    ):
        self.weights = weights
        self.device = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        self.backbone = frozen_copy(weights.backbone, self.device)
        data = weights.recipe.data
        test_place = test or data.test
        if test_place is None and needs_labels:
            raise ConfigError("no test data: give --test FILE.beton, or set data.test in the recipe")
        places: dict[str, Any] = {"train": train or data.probe or data.train}
        if test_place is not None:
            places["test"] = test_place
        self.sets: dict[str, Any] = {}
        try:
            self._open(places, needs_labels)
        except BaseException:
            self.close()
            raise

    def _open(self, places: dict[str, Any], needs_labels: bool) -> None:
        for name, place in places.items():
            self.sets[name] = beton.open(place)
        self.names = {name: _short(place) for name, place in places.items()}
        self._features: dict[str, tuple[Tensor, Tensor]] = {}
        self.num_classes = 0
        labels = {name: files.labels for name, files in self.sets.items()}
        self.labelled = len(labels) == 2 and all((values >= 0).all() for values in labels.values())
        if not self.labelled and not needs_labels:
            return
        for name, values in labels.items():
            if (values < 0).any():
                raise InputError(
                    f"{self.names[name]}: {int((values < 0).sum())} of {len(values)} images have no label, and this "
                    "evaluation compares labels. Convert a labelled source (one folder per class), or use "
                    "`relssl eval analyse`, which does without"
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
            log.info("features of %d %s images", len(self.sets[name]), name)
            self._features[name] = self.extract(self.sets[name], self.weights.recipe.eval_spec(), self.backbone)
        return self._features[name]

    def extract(self, files: Any, spec: ViewSpec, backbone: nn.Module) -> tuple[Tensor, Tensor]:
        """(N, D) float32 features by `backbone` of one view of every image, and (N,) labels, in file order."""
        recipe = self.weights.recipe
        with contextlib.closing(
            feature_loader(
                files,
                spec,
                batch_size=recipe.eval.batch_size,
                device=self.device,
                engine=recipe.data.engine,
                resize=recipe.data.resize,
                workers=recipe.data.workers,
            )
        ) as loader:
            features, labels = encode(backbone.float(), loader)
        return features.float(), labels

    def write(
        self,
        evaluator: str,
        top1: list[float],
        top5: list[float | None],
        protocol: dict[str, Any],
        seeds: list[int],
        command: str,
        extra: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Add an entry to results.json and return it; `extra` goes into it as it is."""
        recipe = self.weights.recipe
        entry = {
            "evaluator": evaluator,
            "weights": self.weights.origin,
            "top1": summarise(top1),
            "top5": summarise(top5),
            "seeds": seeds,
            "protocol": protocol,
            "train": self.names["train"],
            "test": self.names.get("test"),
            "data": [files.content_hash for files in self.sets.values()],
            "num_train": len(self.sets["train"]),
            "num_test": len(self.sets["test"]) if "test" in self.sets else None,
            "backbone": recipe.backbone.name,
            "method": recipe.method_name,
            "epochs": self.weights.epochs,
            "global_batch": recipe.train.batch_size,
            "views_per_step": sum(spec.count for spec in recipe.views.specs()[-1][1]),
            "train_seed": recipe.train.seed,
            "command": command,
            "date": now(),
            **(extra or {}),
        }
        RunFolder(self.weights.folder).add_result(entry)
        return entry


def _short(place: str | Path | list[str]) -> str:
    return " + ".join(Path(p).name for p in (place if isinstance(place, list) else [place]))
