"""The backbone under evaluation: of a run, of a checkpoint, of a file, or the one that a run started from."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.errors import InputError
from relssl import checkpoint
from relssl.config import Recipe
from relssl.dist import mix
from relssl.methods import load_method
from relssl.nets import build_backbone
from relssl.runfolder import RunFolder
from relssl.weights import load_backbone

log = logging.getLogger("relssl.evaluate")


@dataclass
class Weights:
    """A backbone under evaluation. `origin` is `pretrained`, `random` or `finetuned`; results go into `folder`.

    `update` is that of the checkpoint that it was read from, None for a backbone that is nobody's work in progress.
    Of imported weights, or of a run that continues imported ones, `imported` says where they come from; `epochs` may
    then be unknown. `file` is the name of a weights file that is not its run's own `backbone.safetensors`: fine-tuned
    or imported ones, of which a folder may hold several. `borrowed` says that the section `eval` and the normalisation
    of `recipe` are those of another one.
    """

    backbone: nn.Module
    recipe: Recipe
    origin: str
    epochs: int | None
    folder: Path
    update: int | None = None
    imported: dict[str, Any] | None = None
    file: str | None = None
    borrowed: bool = False

    @property
    def tags(self) -> list[str]:
        """For names of what lies in `folder`: what tells these weights from the finished backbone of the run."""
        tags = [
            "" if self.origin == "pretrained" else self.origin,
            "" if self.file is None else Path(self.file).stem,
            "" if self.update is None else f"update{self.update:08d}",
        ]
        return [tag for tag in tags if tag]


def open_weights(path: Path, *, random_init: bool = False) -> Weights:
    """The backbone of a run folder, of one of its checkpoints (`RUN/checkpoints/update-...`) or of a weights file.

    A run that has not ended is evaluated at its newest checkpoint. With `random_init` the backbone is the one that
    the run started from.

    Raises:
        InputError: there are no weights, or they do not fit their recipe.
    """
    if path.is_dir():
        if path.parent.name == "checkpoints" and (path.parent.parent / "config.yaml").is_file():
            return from_checkpoint(RunFolder(path.parent.parent), path)
        folder = RunFolder(path)
        recipe = folder.recipe()
        if random_init:
            return Weights(initial_backbone(recipe), recipe, "random", 0, path)
        if folder.backbone.is_file():
            return _from_file(folder.backbone)
        return _newest(folder)
    if not path.exists():
        raise InputError(f"there are no weights at {path}; expected a run folder or a backbone.safetensors")
    found = _from_file(path)
    if random_init:
        return Weights(initial_backbone(found.recipe), found.recipe, "random", 0, path.parent)
    return found


def _from_file(path: Path) -> Weights:
    found = load_backbone(path)
    origin = found.origin or ("random" if found.epochs == 0 else "pretrained")  # 0: a method that trains nothing
    folder = RunFolder(path.parent)
    is_own = path == folder.backbone
    imported = found.imported or (folder.provenance() if is_own else None)
    file = None if is_own else path.name
    return Weights(found.backbone, found.recipe, origin, found.epochs, path.parent, imported=imported, file=file)


def initial_backbone(recipe: Recipe) -> nn.Module:
    """The backbone that a run of this recipe starts from: a method builds its encoder first."""
    torch.manual_seed(mix(recipe.train.seed, "init"))
    return build_backbone(recipe.backbone.name, **recipe.backbone.options)


def evaluated_as(weights: Weights, other: Recipe) -> Weights:
    """The same backbone, its images prepared and its protocols chosen as in another recipe: across data sets.

    Taken over are the section `eval` and the normalisation; everything that says how the backbone was trained stays.
    """
    own = weights.recipe
    views = own.views.model_copy(update={"normalize": other.views.normalize})
    return replace(weights, recipe=own.model_copy(update={"views": views, "eval": other.eval}), borrowed=True)


def _newest(folder: RunFolder) -> Weights:
    found = checkpoint.list_checkpoints(folder.checkpoints)
    if not found:
        raise InputError(
            f"{folder.path} has neither a backbone nor a checkpoint yet; train it first, or use --random-init to "
            "evaluate the initial weights"
        )
    log.info("the run has not ended: evaluating %s", found[-1])
    return from_checkpoint(folder, found[-1])


def from_checkpoint(folder: RunFolder, path: Path) -> Weights:
    """The backbone that is evaluated, out of one checkpoint of a run.

    Raises:
        InputError: the checkpoint is not whole, is gone, or does not fit the run's recipe.
    """
    recipe = folder.recipe()
    saved = checkpoint.load(path)
    prefix = f"{load_method(folder.method_place(recipe)).EVALUATED}."
    tensors = {k.removeprefix(prefix): v for k, v in saved.model.items() if k.startswith(prefix)}
    backbone = build_backbone(recipe.backbone.name, **recipe.backbone.options)
    checkpoint.load_model(backbone, tensors, str(path))
    position = saved.position
    return Weights(
        backbone, recipe, "pretrained", position.epoch, folder.path, position.total, imported=folder.provenance()
    )
