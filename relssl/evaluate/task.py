"""What every evaluation shares: labelled training and test data, features extracted once, an entry in results.json."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from pipelines import beton
from pipelines.errors import ConfigError, InputError
from pipelines.loader import ViewLoader
from pipelines.subset import Subset, balanced, listed
from pipelines.views import ViewSpec
from relssl import dist
from relssl.encode import encode, feature_loader, frozen_copy
from relssl.evaluate.weights import Weights
from relssl.evaluators.features import no_label, summarise
from relssl.evaluators.linear import Crop
from relssl.runfolder import RunFolder, now

log = logging.getLogger("relssl.evaluate")


_SHOWN = 5


@dataclass(frozen=True)
class Portion:
    """Which training images are used: those of a list of names, or a share drawn by `seed`, equal for every class."""

    percent: float | None = None
    listing: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.percent is not None and self.listing is not None:
            raise ConfigError("--percent and --subset both choose the training images; give one of them")
        if self.seed and self.percent is None:
            raise ConfigError(f"--draw {self.seed} is one of the draws of --percent; give --percent, too")

    def of(self, files: Any) -> Any:
        """Those images of an open data set."""
        if self.listing is not None:
            return listed(files, self.listing)
        return files if self.percent is None else balanced(files, self.percent, self.seed)

    @property
    def is_all(self) -> bool:
        return self.percent in (None, 100) and self.listing is None

    def __str__(self) -> str:
        if self.listing is not None:
            return self.listing.name
        return "all" if self.is_all else f"{self.percent:g} %, draw {self.seed}"

    @property
    def tag(self) -> str:
        """For the names of files; empty for all images."""
        if self.is_all:
            return ""
        return self.listing.stem if self.listing is not None else f"{self.percent:g}pct-draw{self.seed}"


ALL = Portion()


class Task:
    """The data of one evaluation and the features already extracted from it.

    Args:
        train, test: `.beton` files; the recipe's own when None.
        view: how images are prepared; the recipe's `eval.view` when None.
        portion: which of the training images are used.
        trains: False for an evaluation that has no training images.
        needs_labels: False where the data may lack labels (`labelled` is then false), and a test set.
    """

    def __init__(
        self,
        weights: Weights,
        train: Path | None,
        test: Path | None,
        device: str,
        *,
        view: ViewSpec | None = None,
        portion: Portion = ALL,
        trains: bool = True,
        needs_labels: bool = True,
    ):
        self.weights, self.portion = weights, portion
        self.view = view or weights.recipe.eval_spec()
        self.device = _device(device)
        self.backbone = frozen_copy(weights.backbone, self.device)
        data = weights.recipe.data
        test_place = test or data.test
        if test_place is None and needs_labels:
            raise ConfigError("no test data: give --test FILE.beton, or set data.test in the recipe")
        places: dict[str, Any] = {"train": train or data.probe or data.train} if trains else {}
        if test_place is not None:
            places["test"] = test_place
        self.places = places
        self.opened: dict[str, Any] = {}
        self.num_classes = 0
        self._training_views: dict[Crop, list[ViewSpec]] = {}
        self._features: dict[str, tuple[Tensor, Tensor]] = {}
        try:
            self._open(places, needs_labels)
        except BaseException:
            self.close()
            raise

    def _open(self, places: dict[str, Any], needs_labels: bool) -> None:
        for name, place in places.items():
            self.opened[name] = beton.open(place)
        self.names = {name: _short(place) for name, place in places.items()}
        self.sets = dict(self.opened)
        if "train" in self.sets:
            self.sets["train"] = self.portion.of(self.sets["train"])
        labels = {name: files.labels for name, files in self.sets.items()}
        self.labelled = len(labels) == 2 and all((values >= 0).all() for values in labels.values())
        if len(self.opened) == 2 and self._is_tested_on_itself():
            what = f"{self.names['train']} and {self.names['test']} hold the same images"
            if needs_labels:
                raise InputError(
                    f"{what}: an accuracy on images that were trained on says nothing. Give other images with --test "
                    "(`relssl eval retrieval --within` looks images up among themselves)"
                )
            log.info("note: %s: nothing that compares labels is measured", what)
            self.labelled = False
        if not self.labelled and not needs_labels:
            return
        for name, values in labels.items():
            if (values < 0).any():
                raise no_label(self.names[name], int((values < 0).sum()), len(values))
        if "train" in self.sets:
            self._check_classes(labels["train"], labels["test"])
        self.num_classes = int(max(values.max() for values in labels.values())) + 1

    def _is_tested_on_itself(self) -> bool:
        train, test = self.opened["train"].content_hash, self.opened["test"].content_hash
        return train is not None and train == test

    def _check_classes(self, train: np.ndarray, test: np.ndarray) -> None:
        known = {name: files.classes for name, files in self.sets.items()}
        if known["train"] and known["test"] and list(known["train"]) != list(known["test"]):
            raise InputError(
                f"{self.names['train']} and {self.names['test']} have different classes: "
                f"{len(known['train'])} ({_some(known['train'])}) against {len(known['test'])} "
                f"({_some(known['test'])})"
            )
        names = known["train"] or known["test"] or []
        for name, values in {"train": train, "test": test}.items():  # one of the two may have no names
            if names and (values >= len(names)).any():
                raise InputError(
                    f"{self.names[name]} has labels up to {values.max()}, and the classes are {len(names)} "
                    f"({_some(names)}). Were train and test made with the same list of classes?"
                )
        lacking = [names[c] if names else str(c) for c in np.setdiff1d(test, train)]
        if lacking:
            chosen = "" if self.portion.is_all else f" ({self.portion})"
            raise InputError(
                f"{self.names['train']}{chosen} has no image of {len(lacking)} of the classes of "
                f"{self.names['test']}: {_some(lacking)}. Give training images of every class"
            )
        single = int((np.bincount(train) == 1).sum())
        if single:
            log.info("note: %d classes have a single training image", single)

    def __enter__(self) -> Task:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for files in self.opened.values():
            files.close()

    @property
    def batch_size(self) -> int:
        return self.weights.recipe.eval.batch_size

    def training_views(self, crop: Crop) -> list[ViewSpec]:
        """The augmented view that a protocol trains on: the recipe's plan, unless there is none or it crops as another
        protocol does; then the protocol's crop, with its default scale, and flips."""
        if crop not in self._training_views:
            self._training_views[crop] = self._find_training_views(crop)
        return self._training_views[crop]

    def _find_training_views(self, crop: Crop) -> list[ViewSpec]:
        kind, other = ("random_resized", "byol") if crop == "torchvision" else ("byol", "random_resized")
        own = self.weights.recipe.linear_specs()
        if own is not None and all(spec.box_kind != other for spec in own):
            return own
        log.info(
            "the recipe has no training views for this protocol: %s crops of %d pixels (scale 0.08 to 1) and flips",
            "BYOL's random" if crop == "byol" else "random resized",
            self.view.size,
        )
        plain: dict[str, Any] = {"interpolation": "bicubic", "antialias": False} if crop == "byol" else {}
        return [ViewSpec("image", self.view.size, box={kind: {}}, flip=0.5, normalize=self.view.normalize, **plain)]

    def shuffled(
        self, specs: list[ViewSpec], batch_size: int, seed: int, *, drop_last: bool, least_batch: int = 1
    ) -> ViewLoader:
        """A loader of training views in an order of its own in every epoch, shared out among the processes.

        The caller closes it. Without `drop_last` the last batch of an epoch is smaller; one of fewer images than
        `least_batch` (in each process), others in each epoch, is left out, and the log says so.

        Raises:
            InputError: there are fewer training images than that in all.
        """
        files, data, world = self.sets["train"], self.weights.recipe.data, dist.world_size()
        least = least_batch * world
        if len(files) < least:
            raise InputError(
                f"{self.names['train']}: {len(files)} image(s) to train on ({self.portion}), and a batch needs at "
                f"least {least}. Give more labelled images"
            )
        rest = len(files) % batch_size
        if len(files) < batch_size:
            log.info("note: one batch of %d images, all there are, instead of %d", len(files), batch_size)
        elif 0 < rest < least and not drop_last:
            log.info(
                "note: batches of %d leave %d of %d images over, others in each epoch; they are left out, for a batch "
                "needs at least %d",
                batch_size,
                rest,
                len(files),
                least,
            )
        return ViewLoader(
            files,
            [(None, specs)],
            global_batch=min(batch_size, len(files)),
            engine=data.engine,
            resize=data.resize,
            device=self.device,
            seed=seed,
            rank=dist.rank(),
            world_size=world,
            drop_last=drop_last,
            workers=data.workers,
            least_share=least_batch,
        )

    def name_for(self, kind: str, *told: str, untold: Sequence[Any] = (), seed: int | None = None) -> str:
        """The name, without a suffix, of what an evaluation leaves in the folder, such as `head-seed0`.

        What differs from the recipe is in it, in words or by a digest, so that no evaluation overwrites the file of
        another.

        Args:
            told: what else it says in words.
            untold: what else tells it from others.
        """
        untold = [*untold, *self._untold()]
        digest = blake2b(json.dumps(untold, sort_keys=True).encode(), digest_size=4).hexdigest() if untold else ""
        other_train = "train" in self.opened and not self._is_own("train")
        parts = [
            kind,
            *self.weights.tags,
            *told,
            Path(self.names["train"]).stem if other_train else "",
            self.portion.tag,
            digest,
            "" if seed is None else f"seed{seed}",
        ]
        return "-".join(re.sub(r"[^\w.+-]+", "_", part) for part in parts if part)

    def place_for(self, kind: str, protocol: BaseModel, own: BaseModel, seed: int) -> Path:
        """Where a file of one seed goes.

        Args:
            protocol: what was used, with a `name`.
            own: the recipe's.
        """
        name = "" if protocol == own else str(getattr(protocol, "name", ""))
        untold = [protocol.model_dump(mode="json")] if name.endswith(" (changed)") else []
        told = name.replace(" (changed)", "-changed")
        return self.weights.folder / f"{self.name_for(kind, told, untold=untold, seed=seed)}.safetensors"

    def _untold(self) -> list[Any]:
        """What tells this evaluation from others of the recipe, and words do not."""
        found: list[Any] = [
            files.content_hash or [str(path) for path in _resolved(self.places[name])]
            for name, files in self.opened.items()
            if not self._is_own(name)
        ]
        if self.portion.listing is not None:
            found.append(self._chosen())
        if self.weights.borrowed:
            recipe = self.weights.recipe
            found += [recipe.eval.model_dump(mode="json", exclude={"online"}), recipe.eval_spec().normalize]
        return found

    def _is_own(self, name: str) -> bool:
        """Whether a data set is that of the recipe."""
        data = self.weights.recipe.data
        own = data.test if name == "test" else data.probe or data.train
        return own is not None and _resolved(own) == _resolved(self.places[name])

    def features(self, name: str) -> tuple[Tensor, Tensor]:
        """(N, D) float32 features and (N,) labels of the un-augmented images, extracted once."""
        if name not in self._features:
            log.info("features of %d %s images", len(self.sets[name]), name)
            self._features[name] = self.extract(self.sets[name], self.view, self.backbone)
        return self._features[name]

    def extract(self, files: Any, view: ViewSpec, backbone: nn.Module) -> tuple[Tensor, Tensor]:
        """(N, D) float32 features by `backbone` of one view of every image, and (N,) labels, in file order."""
        with self._loader(files, view) as loader:
            features, labels = encode(backbone.float(), loader)
        return features.float(), labels

    @contextlib.contextmanager
    def unaugmented(self, name: str) -> Iterator[ViewLoader]:
        """A loader of the un-augmented images in file order."""
        with self._loader(self.sets[name], self.view) as loader:
            yield loader

    def _loader(self, files: Any, view: ViewSpec) -> contextlib.closing[ViewLoader]:
        data = self.weights.recipe.data
        return contextlib.closing(
            feature_loader(
                files,
                view,
                batch_size=self.batch_size,
                device=self.device,
                engine=data.engine,
                resize=data.resize,
                workers=data.workers,
            )
        )

    def _identity(self) -> list[str | None]:
        """Hashes of the data files, and of which training images were chosen."""
        hashes = [files.content_hash for files in self.opened.values()]
        return hashes if self._chosen() is None else [*hashes, self._chosen()]

    def _chosen(self) -> str | None:
        """A hash of which training images were chosen; None for all."""
        chosen = self.sets.get("train")
        return blake2b(chosen.ids.tobytes(), digest_size=16).hexdigest() if isinstance(chosen, Subset) else None

    def write(
        self,
        evaluator: str,
        top1: list[float],
        top5: list[float | None],
        protocol: dict[str, Any],
        seeds: list[int],
        command: str,
        extra: dict[str, Any] | None = None,
        *,
        training_views: Sequence[ViewSpec] | None = None,
    ) -> dict[str, Any]:
        """Add an entry to results.json and return it; `extra` goes into it as it is.

        Args:
            training_views: augmented views that were trained on.
        """
        recipe = self.weights.recipe
        entry: dict[str, Any] = {
            "evaluator": evaluator,
            "weights": self.weights.origin,
            "weights_file": self.weights.file,
            "top1": summarise(top1),
            "top5": summarise(top5),
            "seeds": seeds,
            "protocol": protocol,
            "train": self.names.get("train"),
            "test": self.names.get("test"),
            "subset": None if self.portion.is_all else str(self.portion),
            "data": self._identity(),
            "num_train": len(self.sets["train"]) if "train" in self.sets else None,
            "num_test": len(self.sets["test"]) if "test" in self.sets else None,
            "pretrained_on": None if self.weights.origin == "random" else _short(recipe.data.train),
            "view": view_text(self.view),
            "own_normalisation": not self.weights.borrowed,
            "training_views": None if training_views is None else [view_text(spec) for spec in training_views],
            "backbone": recipe.backbone.name,
            "method": recipe.method_name,
            "epochs": self.weights.epochs,
            "update": self.weights.update,
            "global_batch": recipe.train.batch_size,
            "views_per_step": sum(spec.count for spec in recipe.views.specs()[-1][1]),
            "train_seed": recipe.train.seed,
            "command": command,
            "date": now(),
            **(extra or {}),
        }
        entry.update(_of_imported(self.weights))
        return RunFolder(self.weights.folder).add_result(entry) if dist.rank() == 0 else entry


def _of_imported(weights: Weights) -> dict[str, Any]:
    """Where imported weights come from; what only their authors know is not taken from the recipe."""
    origin = weights.imported
    if origin is None:
        return {}
    known = {key: origin.get(key) for key in ("file", "sha256", "source", "branch", "recipe", "recipe_is", "continued")}
    unknown = ["train_seed"]
    if origin.get("recipe_is") == "assumed":
        unknown += ["global_batch", "views_per_step"]
    if not origin.get("continued"):
        unknown.append("pretrained_on")  # the recipe's data is what one would train on here
    return {"imported": known, **dict.fromkeys(unknown)}


def _short(place: str | Path | list[str]) -> str:
    return " + ".join(Path(p).name for p in (place if isinstance(place, list) else [place]))


def _device(name: str) -> torch.device:
    """`auto` is a GPU where there is one.

    Raises:
        ConfigError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device is auto, cpu, cuda, cuda:1, ...; got {name!r}") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"--device {name}: this machine has {count or 'no'} CUDA device{'s' * (count != 1)}")
    return device


def _resolved(place: str | Path | list[str]) -> list[Path]:
    return [Path(p).resolve() for p in (place if isinstance(place, list) else [place])]


def view_text(spec: ViewSpec) -> dict[str, Any]:
    """What tells a view from another, for results.json; of an un-augmented one the last three are left out."""
    said = {
        "size": spec.size,
        "box": spec.box_kind,
        **spec.box_options,
        "interpolation": spec.interpolation,
        "antialias": spec.antialias,
        "normalize": spec.normalize,
    }
    augmented = {"flip": spec.flip, "ops": spec.ops, "mask_p": spec.mask_p}
    return said | {key: value for key, value in augmented.items() if value}


def _some(names: Any) -> str:
    return ", ".join(map(str, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
