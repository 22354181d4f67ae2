"""The backbone under evaluation: of a run, of a checkpoint, of a file, or the one that a run started from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

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
