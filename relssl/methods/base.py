"""The contract between a method and the trainer: what a method is given, what it may do, and what it owns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from pipelines.batch import ViewBatch
from pipelines.errors import ConfigError
from relssl.dist import mix


@dataclass(frozen=True)
class DataInfo:
    """What a method may know of the data before the first batch. `num_classes` is None without labels."""

    num_samples: int
    num_classes: int | None
    global_batch: int
    total_updates: int
    updates_per_epoch: int


@dataclass(frozen=True)
class Step:
    """Where training is: plain numbers, the same on every rank."""

    update: int
    epoch: int
    micro: int = 0
    num_micro: int = 1
    seed: int = 0

    @property
    def is_last_micro(self) -> bool:
        return self.micro == self.num_micro - 1

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator keyed by (seed, update, micro, name): the same numbers on every rank and after a resume."""
        return torch.Generator().manual_seed(mix(self.seed, self.update, self.micro, name))


class MethodConfig(BaseModel):
    """Base of a method's settings: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str


class Method(nn.Module):
    """A self-supervised method. Its state is its parameters and persistent buffers, nothing else.

    Attributes:
        Config: pydantic model of the `method:` section of a recipe.
        VIEWS: view name -> (least, most) number of views; most may be None.
        NEEDS: what must hold before the first step, of `labels`, `dataset_pass`, `stem`, `square`, `full_batch`.
        ACCUMULATION: `exact` (micro-batches give the same update), `approximate` (must be asked for), `refused`.
        encoder: the backbone that is evaluated and exported.
    """

    Config: ClassVar[type[MethodConfig]]
    VIEWS: ClassVar[dict[str, tuple[int, int | None]]]
    NEEDS: ClassVar[frozenset[str]] = frozenset()
    ACCUMULATION: ClassVar[str] = "exact"
    encoder: nn.Module

    def __init__(self, make_backbone: Callable[[], nn.Module], config: Any, data: DataInfo):
        super().__init__()
        self.config = config
        self.data = data

    def forward(self, batch: ViewBatch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the local images (their mean, 0-d, float32 or float64) and 0-d detached metrics."""
        raise TypeError(f"{type(self).__name__} has no forward of its own")  # nn.Module's own message names no class

    def before_epoch(self, step: Step, encode: Callable[[], Tensor]) -> None:
        """Called before the first update of an epoch. `encode()` gives (N, D) float32 features in file order."""

    def after_update(self, step: Step) -> None:
        """Called after the optimizer has stepped; not after a skipped step."""


def check_views(method: type[Method], counts: dict[str, int], where: str = "views") -> None:
    """Refuse a view plan that a method cannot use.

    Args:
        counts: view name -> number of views in the plan.

    Raises:
        ConfigError: a name that is missing, too few or too many views, or a name that the method does not know.
    """
    needed = ", ".join(f"{name}: {_span(low, high)}" for name, (low, high) in method.VIEWS.items())
    for name, (low, high) in method.VIEWS.items():
        count = counts.get(name, 0)
        if count < low or (high is not None and count > high):
            raise ConfigError(f"{where}: got {count} {name!r} view(s); this method needs {needed}")
    for name in counts:
        if name not in method.VIEWS:
            raise ConfigError(f"{where}: this method has no view called {name!r}; it needs {needed}")


def _span(low: int, high: int | None) -> str:
    if high is None:
        return f"{low} or more"
    return str(low) if low == high else f"{low} to {high}"
