"""What is measured: plans of views by name, and the ratios that they are meant to reach.

The named cases hold the augmentations that the papers share; any recipe is a case too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipelines.errors import ConfigError, unknown_name
from pipelines.views import ViewSpec

MEASURES = ("crops", "views")
MEASURE_TITLES = {"crops": "decode + crops", "views": "complete views"}

_STRONG_OPS = (
    ("jitter", 0.8, {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}),
    ("grey", 0.2),
    ("blur", 0.5, {"sigma": (0.1, 2.0)}),
    ("solarise", 0.2),
)
# Relational Reasoning on CIFAR-10: its own strengths and normalisation, neither blur nor solarise.
_RELATIONAL_OPS = (
    ("jitter", 0.8, {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}),
    ("grey", 0.2),
)
_RELATIONAL_NORMALIZE = ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
# ReSSL's five student crops: sides in pixels and shares of the image's area.
_FIVE_SIZES = {224: (0.2, 1.0), 192: (0.172, 0.86), 160: (0.143, 0.715), 128: (0.114, 0.571), 96: (0.086, 0.429)}


@dataclass(frozen=True)
class Case:
    """A plan under a name.

    Attributes:
        targets: (measure, peer) -> how many times as fast as the peer we mean to be, from stored JPEG.
        raw_targets: the same for a data file of raw pixels, where the peers read JPEG.
    """

    name: str
    plan: tuple[ViewSpec, ...]
    targets: Mapping[tuple[str, str], float] = field(default_factory=dict)
    raw_targets: Mapping[tuple[str, str], float] = field(default_factory=dict)


def _strong(size: int, scale: tuple[float, float], count: int = 1) -> ViewSpec:
    return ViewSpec("view", size, count, box={"random_resized": {"scale": scale}}, flip=0.5, ops=_STRONG_OPS)


CASES = {
    "2x224": Case(
        "2x224",
        (_strong(224, (0.2, 1.0), count=2),),
        {("crops", "decode"): 0.7, ("crops", "ffcv"): 2.0, ("views", "pil"): 4.0},
        {("views", "pil"): 10.0},
    ),
    "5sizes": Case(
        "5sizes",
        tuple(_strong(size, scale) for size, scale in _FIVE_SIZES.items()),
        {("crops", "ffcv"): 4.0, ("views", "pil"): 5.0},
    ),
    "cifar-k32": Case(
        "cifar-k32",
        (ViewSpec("view", 32, 32, flip=0.5, ops=_RELATIONAL_OPS, normalize=_RELATIONAL_NORMALIZE),),
        {("views", "pil"): 40.0},
        {("views", "pil"): 40.0},
    ),
}


def find_cases(name: str) -> list[Case]:
    """The case of this name, or those of a recipe (by name or file): one for each of its phases.

    Raises:
        ConfigError: neither is there; the message names the nearest.
    """
    from relssl.config import load_recipe
    from relssl.recipes import list_recipes, recipe_path

    if name in CASES:
        return [CASES[name]]
    recipes = list_recipes()
    if Path(name).is_file():
        path = Path(name)
    elif name.removesuffix(".yaml").removeprefix("configs/") in recipes:
        path = recipe_path(name)
    else:
        raise ConfigError(unknown_name("case", name, [*CASES, *recipes]))
    phases = load_recipe(path).views.specs()
    return [
        Case(name if until is None else f"{name} until epoch {until}", tuple(plan))
        for until, plan in phases
    ]  # fmt: skip


def crops_only(plan: Sequence[ViewSpec]) -> list[ViewSpec]:
    """The same crops and flips without anything after them."""
    return [replace(spec, ops=(), normalize=None) for spec in plan]


def num_views(plan: Sequence[ViewSpec]) -> int:
    """Views of each image."""
    return sum(spec.count for spec in plan)
