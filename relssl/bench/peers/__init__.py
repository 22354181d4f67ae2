"""Who makes views in a benchmark: ours, and what people use otherwise. One file each; `start_peer` finds it by name.

A peer is `<name>.py` here (`torchvision_v2.py` for `torchvision-v2`) with a class `Peer(Job)`. Whatever it makes is
made of the same images, in random order, on the same cores, in batches of the same size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipelines.errors import ConfigError, MissingExtraError, unknown_name
from pipelines.views import ViewSpec

# name -> what takes part in a table of crops, of complete views
PEERS = {
    "decode": ("crops",),
    "ffcv": ("crops",),
    "pil": ("crops", "views"),
    "torchvision-v2": ("crops", "views"),
    "kornia": ("views",),
}


@dataclass(frozen=True)
class Job:
    """One measurement, the same for everybody.

    Attributes:
        files: an open data set (`BetonSet` or `Subset`).
        plan: the views; for `crops` without colour operations and normalisation.
        measure: `crops` (8-bit, decoded and cropped) or `views` (complete, floating point, on the device).
        cores: how many this process is bound to; threads or worker processes that a peer may run.
        batch: images of a batch.
    """

    files: Any
    plan: Sequence[ViewSpec]
    measure: str
    device: torch.device
    cores: int
    batch: int


class PeerBase:
    """A maker of views.

    Attributes:
        title: how tables call it.
        how: one line about how it is run here.
        FORKS: its first pass starts worker processes. They come before anybody's threads, which do not survive that.
    """

    title: str
    how: str
    FORKS: ClassVar[bool] = False

    def __init__(self, job: Job):
        self.job = job

    def batches(self, num_images: int) -> Iterator[tuple[int, list[Tensor]]]:
        """One pass over `num_images` images, a multiple of the batch, in an order of its own.

        Yields the number of images of a batch B and its views in plan order, (B, 3, S, S) each, which may be
        overwritten when the next batch is asked for.
        """
        raise NotImplementedError(f"{type(self).__name__} makes no batches")

    def close(self) -> None:
        """End threads and processes. Nobody uses it afterwards."""


def start_peer(name: str, job: Job) -> PeerBase:
    """The peer of this name, ready for `job`.

    Raises:
        ConfigError: unknown, or it cannot make these views; MissingExtraError: its package is not installed.
        InputError: it cannot read this storage.
    """
    check_peer_name(name)
    if name != "decode":
        _refuse_byol(job.plan, name)
    peer: PeerBase = import_module(f"relssl.bench.peers.{name.replace('-', '_')}").Peer(job)
    return peer


def _refuse_byol(plan: Sequence[ViewSpec], peer: str) -> None:
    """What is called by a name that peers know, and is another thing in BYOL's dialect."""
    for spec in plan:
        if not spec.antialias:
            raise ConfigError(f"view {spec.name!r}: {peer} has no resize without antialiasing")
        if any(name == "blur" and options["kernel"] != "torchvision" for name, _, options in spec.ops):
            raise ConfigError(f"view {spec.name!r}: {peer} has no blur with BYOL's kernel")


def check_peer_name(name: str) -> None:
    if name not in PEERS:
        raise ConfigError(unknown_name("peer", name, PEERS))


def optional_module(name: str, peer: str) -> Any:
    """Import a package that we do not depend on.

    Raises:
        MissingExtraError: it is not installed, or does not load.
    """
    try:
        return import_module(name)
    except (ImportError, OSError) as error:
        package = name.split(".")[0]
        raise MissingExtraError(f"{peer} is not measured: {package} cannot be imported ({error})") from None
