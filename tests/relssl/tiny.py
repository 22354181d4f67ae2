"""A recipe and data so small that a whole run takes a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pipelines import beton

COUNT = 48
CLASSES = ["dark", "light"]


def write_data(
    path: Path, *, labels: bool = True, seed: int = 0, count: int = COUNT, side: int = 12, lighter: int = 95
) -> Path:
    """`count` smooth pictures, the odd ones (class 1) lighter, by so much that they are easily told."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 160, (count, 4, 4, 3), dtype=np.uint8)
    images = [np.array(Image.fromarray(s).resize((side, side), Image.Resampling.BICUBIC)) for s in small]
    samples = [
        (np.clip(im.astype(int) + lighter * (i % 2), 0, 255).astype(np.uint8), i % 2) for i, im in enumerate(images)
    ]
    beton.write(path, ((im, y if labels else None) for im, y in samples), classes=CLASSES if labels else None)
    return path


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """A ReSSL recipe on data in `folder`; `changes` are `section__key` = value."""
    values: dict[str, Any] = {
        "data": {"train": str(folder / "train.beton"), "test": str(folder / "test.beton"), "engine": "resident"},
        "views": {
            "normalize": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
            "plan": [
                {"name": "teacher", "size": 12, "box": {"random_resized": {"scale": [0.4, 1.0]}}, "flip": 0.5},
                {
                    "name": "student",
                    "size": 12,
                    "box": {"random_resized": {"scale": [0.4, 1.0]}},
                    "ops": [["jitter", 0.8, {"brightness": 0.4, "hue": 0.1}], ["grey", 0.2]],
                },
                {"name": "student", "size": 10},
            ],
        },
        "method": {"name": "ressl", "hidden_dim": 16, "embed_dim": 8, "queue_size": 40, "momentum": 0.9},
        "backbone": {"name": "conv4", "norm": "split(2)"},
        "optim": {
            "name": "sgd",
            "lr": 0.05,
            "weight_decay": 1e-4,
            "schedule": {"name": "warmup_cosine", "warmup_epochs": 1},
        },
        "train": {
            "epochs": 3,
            "batch_size": 16,
            "log_every": 1,
            "checkpoint": {"every_epochs": 1, "every_updates": 2, "keep": 3},
        },
        "eval": {
            "view": {"size": 12, "box": "whole"},
            "online": {"every_epochs": 2},
            "knn": {"k": 5},
            "linear": {"protocol": "cached", "options": {"epochs": 3}, "seeds": [0, 1]},
        },
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values[section][name] = value
        else:
            values[section] = value
    return values


def write_recipe(folder: Path, *, labels: bool = True, lighter: int = 95, **changes: Any) -> Path:
    """Data and recipe file in `folder`."""
    write_data(folder / "train.beton", labels=labels, lighter=lighter)
    write_data(folder / "test.beton", labels=labels, seed=1, lighter=lighter)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, **changes), sort_keys=False))
    return path
