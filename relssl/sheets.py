"""`relssl views`: a picture of what a recipe's views look like, originals on the left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset_tools.saliency import saliency
from pipelines import beton
from pipelines.errors import InputError
from pipelines.loader import ViewLoader
from pipelines.subset import spread
from pipelines.views import ViewSpec, expand
from relssl.config import Recipe
from relssl.pictures import check_place, save_picture, sheet


def draw_views(recipe: Recipe, out: Path, *, num_images: int = 8, epoch: int = 0, num_draws: int = 1) -> Path:
    """Write a sheet of the views of some images of the training data.

    Args:
        num_images: evenly spaced over the data.
        epoch: which epoch's plan and draw.
        num_draws: rows per image, each the draw of another epoch.

    Raises:
        ConfigError: `out` is no place for a picture.
    """
    check_place(out)
    with beton.open(recipe.data.train) as files:
        chosen = spread(files, num_images)
        with ViewLoader(
            chosen,
            recipe.views.specs(),
            global_batch=len(chosen),
            engine=recipe.data.engine,
            resize=recipe.data.resize,
            seed=recipe.train.seed,
            shuffle=False,
            max_unreadable=1.0,
        ) as loader:
            drawn = []
            for e in range(epoch, epoch + num_draws):
                loader.set_position(e, 0)
                batch = next(iter(loader))
                drawn.append(_columns(loader.plan_of(e), batch.views))
            rows = [
                (_label(chosen, i), [original, *[view[i] for view in columns]])
                for i in range(len(chosen))
                if (original := _decoded(chosen, i)) is not None
                for columns in drawn
            ]
            titles = ["original", *[spec.name for spec in expand(loader.plan_of(epoch))]]
    name = recipe.method_name
    picture = sheet(rows, column_titles=titles, title=f"{name}: views, epoch {epoch}, seed {recipe.train.seed}")
    save_picture(picture, out)
    return out


def draw_saliency(data: Path, out: Path, *, num_images: int = 40) -> Path:
    """Write a sheet of images of a `.beton` file with their saliency, its mask, and the image with a grey background:
    two images a row, evenly spaced over the file. One that cannot be decoded is left out.

    Raises:
        ConfigError: `out` is no place for a picture.
        InputError: no image can be decoded.
    """
    check_place(out)
    found = []
    with beton.open(data) as files:
        chosen = spread(files, num_images)
        for i in range(len(chosen)):
            pixels = _decoded(chosen, i)
            if pixels is not None:
                found.append(_saliency_cells(pixels))
    if not found:
        raise InputError(f"{data}: none of {len(chosen)} images can be decoded")
    rows = [("", [cell for cells in found[i : i + 2] for cell in cells]) for i in range(0, len(found), 2)]
    titles = ["image", "saliency", "mask", "masked"]
    picture = sheet(
        rows,
        column_titles=titles * min(len(found), 2),
        title="Saliency by minimum barrier distance",
        caption="a mask that is light all over: no subject was found, the whole image is foreground",
        fit_first_column=False,
    )
    save_picture(picture, out)
    return out


def _saliency_cells(pixels: np.ndarray, side: int = 192) -> list[np.ndarray]:
    """The four pictures of an image, reduced or enlarged to a longer side of `side` pixels."""
    found = saliency(pixels)
    scale = side / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    image = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    grey = np.asarray(Image.fromarray((found.map * 255 + 0.5).astype(np.uint8)).resize(size))
    mask = np.asarray(Image.fromarray(found.mask).resize(size, Image.Resampling.NEAREST))[..., None]
    return [
        image,
        np.repeat(grey[..., None], 3, axis=2),
        np.repeat(mask, 3, axis=2).astype(np.uint8) * 225,  # not white, as the page is
        np.where(mask, image, 128).astype(np.uint8),
    ]


def _columns(plan: Sequence[ViewSpec], views: dict[str, tuple[Tensor, ...]]) -> list[np.ndarray]:
    """uint8 (B, S, S, 3) per view in plan order, normalisation undone."""
    taken = dict.fromkeys(views, 0)
    columns = []
    for spec in expand(plan):
        view = views[spec.name][taken[spec.name]].float()
        taken[spec.name] += 1
        if spec.normalize is not None:
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in spec.normalize)
            view = view * std + mean
        pixels = (view.clamp(0, 1) * 255 + 0.5).to(torch.uint8)
        columns.append(pixels.permute(0, 2, 3, 1).contiguous().numpy())
    return columns


def _decoded(files: Any, index: int) -> np.ndarray | None:
    """The original, or None for an image that cannot be read: its row is left out."""
    try:
        return np.asarray(files.decode(index))
    except InputError:
        return None


def _label(files: Any, index: int) -> str:
    label = int(files.labels[index])
    if label < 0:
        return ""
    return files.classes[label] if files.classes else str(label)
