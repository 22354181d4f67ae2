"""A backbone in a file: safetensors weights, and in the header everything needed to use them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from pipelines.errors import ConfigError, InputError
from relssl.checkpoint import load_model
from relssl.config import Recipe, recipe_from
from relssl.nets import build_backbone

FORMAT = "relssl-backbone-1"


@dataclass
class BackboneFile:
    """A backbone with its recipe and how far it was trained. `origin` is None unless it says more than that.

    Attributes:
        epochs: None for imported weights whose file did not say.
        imported: where imported weights come from (`relssl.interop`); None for ours.
    """

    backbone: nn.Module
    recipe: Recipe
    epochs: int | None
    origin: str | None = None
    imported: dict[str, Any] | None = None


def save_backbone(
    path: Path,
    backbone: nn.Module,
    recipe: Recipe,
    epochs: int | None,
    *,
    origin: str | None = None,
    imported: Mapping[str, Any] | None = None,
) -> None:
    """Write a backbone's state dict with its recipe in the header; the file appears whole or not at all.

    Args:
        origin: `finetuned` for weights that have seen labels since.
        imported: where weights of somebody else come from.
    """
    tensors = {k: v.detach().to("cpu").contiguous().clone() for k, v in backbone.state_dict().items()}
    told = "" if epochs is None else str(epochs)
    header = {"format": FORMAT, "recipe": recipe.model_dump_json(), "epochs": told}
    if origin is not None:
        header["origin"] = origin
    if imported is not None:
        header["imported"] = json.dumps(imported)
    work = path.with_name(f".{path.name}.writing")
    work.write_bytes(save(tensors, metadata=header))  # save_file would make it unreadable for anybody else
    work.replace(path)


def digest_of(backbone: nn.Module) -> str:
    """A hash of every parameter and buffer by name: whether a head was trained on these very weights."""
    digest = hashlib.blake2b(digest_size=16)
    for key, value in sorted(backbone.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_backbone(path: Path) -> BackboneFile:
    """Read what `save_backbone` wrote; every key must fit.

    Raises:
        InputError: not such a file, or weights that do not fit its own recipe.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, SafetensorError) as error:
        reason = error if isinstance(error, OSError) else "it is not a safetensors file, or was cut off"
        raise InputError(
            f"cannot read weights from {path}: {reason}. Expected a run folder or its backbone.safetensors; a "
            "checkpoint of another code comes in by relssl import"
        ) from None
    if header.get("format") != FORMAT:
        raise InputError(
            f"{path} is not a backbone written by relssl (its header says {header.get('format', 'nothing')!r}); "
            "expected the backbone.safetensors of a run"
        )
    try:
        recipe = recipe_from(json.loads(header["recipe"]), f"the recipe in {path}")
        epochs = int(header["epochs"]) if header["epochs"] else None
        imported = json.loads(header["imported"]) if "imported" in header else None
    except (KeyError, ValueError, ConfigError) as error:
        raise InputError(f"the header of {path} is damaged: {error}") from None
    backbone = build_backbone(recipe.backbone.name, **recipe.backbone.options)
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    backbone.to(dtype)
    load_model(backbone, tensors, str(path))
    return BackboneFile(backbone, recipe, epochs, header.get("origin"), imported)
