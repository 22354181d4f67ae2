"""Which labelled images are held out of the training set to choose settings on.

Balanced over classes, and a function of (labels, seed) alone. Legend: N images.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

from pipelines.errors import ConfigError, InputError


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator keyed by both; torch reads 32 bits of a seed, so they are hashed.

    Raises:
        ConfigError: a negative seed.
    """
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, got {seed}")
    digest = blake2b(f"evaluation/{name}/{seed}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def held_out_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to choose settings on: `fraction` of every class, rounded, but at least one image.

    A class with a single image keeps it for training.

    Args:
        labels: (N,) int64, 0 or more.
        fraction: between 0 and 1.

    Returns:
        two int64 tensors on the CPU, increasing, that together hold every row once.

    Raises:
        ConfigError: the fraction or the seed is out of range.
        InputError: no class has two images, so that nothing can be held out.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"the held-out share must lie between 0 and 1, got {fraction}")
    counts = torch.bincount(labels.cpu())
    quota = (counts * fraction).round().long().clamp(min=1)
    quota = torch.minimum(quota, (counts - 1).clamp(min=0))
    if not quota.any():
        raise InputError(
            f"every class has one labelled image only ({len(labels)} images, {int((counts > 0).sum())} classes), so "
            "nothing can be held out to choose settings on. Give more labelled images, or use `relssl eval linear` "
            "or `relssl eval fewlabel`, which choose nothing"
        )
    held = _first_of_each_class(labels.cpu(), quota, generator(seed, "held out"))
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    is_held[held] = True
    return (~is_held).nonzero().squeeze(1), held


def _first_of_each_class(labels: Tensor, quota: Tensor, source: torch.Generator) -> Tensor:
    """The first `quota[c]` rows of each class c in a random order, as increasing rows."""
    shuffled = torch.randperm(len(labels), generator=source)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = torch.bincount(labels, minlength=len(quota))
    first = counts.cumsum(0) - counts
    place = torch.arange(len(labels)) - first[labels[by_class]]
    return by_class[place < quota[labels[by_class]]].sort().values
