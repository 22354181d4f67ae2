"""Kornia as its users run it: crops from the workers of a DataLoader, colour on whole batches on the device.

Each image has its own factors, but the four jitter operations come in one order for the batch: Kornia offers no
other. On the CPU it computes with as many threads as others use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.errors import ConfigError
from pipelines.views import ViewSpec, expand
from relssl.bench.cases import crops_only
from relssl.bench.cores import torch_threads
from relssl.bench.peers import Job, optional_module
from relssl.bench.peers.dataloader import DataLoaderPeer
from relssl.bench.peers.torchvision_v2 import blur_taps, decode, transform


class Peer(DataLoaderPeer):
    """The crops of torchvision v2, the fastest way to them in a DataLoader, then Kornia's operations."""

    title = "kornia"

    def __init__(self, job: Job):
        augmentation = optional_module("kornia.augmentation", self.title)
        self.colour = [batch_transform(spec, augmentation).to(job.device) for spec in expand(job.plan)]

        def make_transform(spec: ViewSpec) -> Any:
            return transform(crops_only([spec])[0], to_float=False)

        super().__init__(job, decode, make_transform)
        self.how = f"torchvision v2 crops, {self.how}; colour by kornia in batches on {job.device.type}"

    def batches(self, num_images: int) -> Iterator[tuple[int, list[Tensor]]]:
        with torch_threads(self.job.cores), torch.no_grad():
            yield from super().batches(num_images)

    def finish(self, view: Tensor, number: int) -> Tensor:
        finished: Tensor = self.colour[number](view.float().div_(255))
        return finished


def batch_transform(spec: ViewSpec, augmentation: Any) -> nn.Sequential:
    """Everything after the crop, for (B, 3, S, S) in [0, 1].

    Raises:
        ConfigError: Kornia has no such operation.
    """
    steps = [_operation(name, p, options, spec.name, augmentation) for name, p, options in spec.ops]
    if spec.normalize is not None:
        mean, std = (torch.tensor(values) for values in spec.normalize)
        steps.append(augmentation.Normalize(mean, std))
    return nn.Sequential(*steps)


def _operation(name: str, p: float, options: Any, view: str, augmentation: Any) -> Any:
    if name == "jitter":
        return augmentation.ColorJitter(**options, p=p)
    if name == "grey":
        return augmentation.RandomGrayscale(p=p)
    if name == "blur":
        taps = blur_taps(options["sigma"])
        return augmentation.RandomGaussianBlur((taps, taps), options["sigma"], p=p)
    if name == "solarise":
        share = options["threshold"]
        return augmentation.RandomSolarize(thresholds=(share, share), additions=(0.0, 0.0), p=p)
    raise ConfigError(f"view {view!r}: kornia has no operation {name!r}")
