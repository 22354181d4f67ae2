"""The contract between a method and the trainer: what a method is given, what it may do, and what it owns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from pipelines.batch import ViewBatch
from pipelines.errors import ConfigError
from pipelines.views import ViewSpec, view_counts
from relssl.dist import mix

KNOWN_NEEDS = ("labels", "one_size", "full_batch", "equal_shares")
ACCUMULATIONS = ("exact", "approximate", "refused")
PROCESS_KINDS = ("joint", "local", "constants")


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
        NEEDS: what must hold before the first step, of `KNOWN_NEEDS`:
            `labels` (every image has one), `one_size` (all views of a name have one size), `full_batch` (no smaller
            last batch), `equal_shares` (as many images on every process: no smaller last batch when there are
            several).
        ACCUMULATION: `exact` (micro-batches give the same update, provided that the batch statistics do),
            `approximate` (must be asked for), `refused`.
        PROCESSES: what several processes give, of `PROCESS_KINDS`: `joint` (what one gives on the same global batch),
            `local` (images are compared within a process: what as many micro-batches give), `constants` (compared with
            all, but the others' embeddings carry no gradient).
        TRAINS: False for a method that has nothing to train; the trainer saves its encoder and stops.
        encoder: the backbone (`relssl.nets`) that is trained; built before anything else.
        EVALUATED: the submodule that is evaluated and exported, the encoder unless a method says otherwise.
    """

    Config: ClassVar[type[MethodConfig]]
    VIEWS: ClassVar[dict[str, tuple[int, int | None]]]
    NEEDS: ClassVar[frozenset[str]] = frozenset()
    ACCUMULATION: ClassVar[str] = "exact"
    PROCESSES: ClassVar[str] = "joint"
    TRAINS: ClassVar[bool] = True
    EVALUATED: ClassVar[str] = "encoder"
    encoder: Any

    def __init__(self, make_backbone: Callable[[], nn.Module], config: Any, data: DataInfo):
        super().__init__()
        self.config = config
        self.data = data

    @property
    def evaluated(self) -> nn.Module:
        """The backbone that is evaluated and exported."""
        return self.get_submodule(self.EVALUATED)

    def forward(self, batch: ViewBatch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the local images (their mean, 0-d, float32 or float64) and 0-d detached metrics.

        A metric called `<tensor>_spread` (`relssl.ops.rows.spread`) is watched: the run stops when it falls to zero.
        """
        raise TypeError(f"{type(self).__name__} has no forward of its own")  # nn.Module's own message names no class

    def before_epoch(self, step: Step, encode: Callable[[], Tensor]) -> None:
        """Called before the first update of an epoch. `encode()` gives (N, D) float32 features in file order."""

    def after_update(self, step: Step) -> None:
        """Called after the optimizer has stepped; not after a skipped step."""


def check_plan(method: type[Method], plan: Sequence[ViewSpec], where: str = "views") -> None:
    """Refuse a view plan that a method cannot use.

    Raises:
        ConfigError: a name that is missing or that the method does not know, too few or too many views, or views
            of several sizes where the method stacks them.
    """
    counts = view_counts(plan)
    needed = ", ".join(f"{name}: {_span(low, high)}" for name, (low, high) in method.VIEWS.items()) or "no views"
    for name, (low, high) in method.VIEWS.items():
        count = counts.get(name, 0)
        if count < low or (high is not None and count > high):
            raise ConfigError(f"{where}: got {count} {name!r} view(s); this method needs {needed}")
    for name in counts:
        if name not in method.VIEWS:
            raise ConfigError(f"{where}: this method has no view called {name!r}; it needs {needed}")
    if "one_size" in method.NEEDS:
        for name in counts:
            sizes = sorted({spec.size for spec in plan if spec.name == name})
            if len(sizes) > 1:
                raise ConfigError(
                    f"{where}: this method needs all {name!r} views of one size, got "
                    f"{', '.join(map(str, sizes))} pixels"
                )


def _span(low: int, high: int | None) -> str:
    if high is None:
        return f"{low} or more"
    return str(low) if low == high else f"{low} to {high}"
