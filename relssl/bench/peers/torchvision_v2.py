"""torchvision's second transforms at their best: 8-bit tensors in memory order H x W x 3, one image at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import InterpolationMode

from pipelines.errors import ConfigError
from pipelines.views import ViewSpec
from relssl.bench.peers import Job
from relssl.bench.peers.dataloader import DataLoaderPeer, stored_pixels
from relssl.bench.peers.pil import threshold


class Peer(DataLoaderPeer):
    """`decode_jpeg`, antialiased 8-bit crop, colour on 8-bit tensors; converted and normalised at the end."""

    title = "torchvision v2"

    def __init__(self, job: Job):
        def make_transform(spec: ViewSpec) -> v2.Compose:
            return transform(spec, to_float=job.measure == "views")

        super().__init__(job, decode, make_transform)
        self.how = f"8-bit tensors, {self.how}"


def decode(files: Any, index: int) -> Tensor:
    """(3, H, W) uint8 whose memory is H x W x 3, the order in which torchvision resizes fastest."""
    if files.is_jpeg[index]:
        return decode_jpeg(torch.from_numpy(np.array(files.payload(index))), mode=ImageReadMode.RGB)
    return torch.from_numpy(stored_pixels(files, index)).permute(2, 0, 1)


def transform(spec: ViewSpec, *, to_float: bool) -> v2.Compose:
    """A view in `transforms.v2`.

    Raises:
        ConfigError: v2 has no such operation.
    """
    steps = [*_crop(spec)]
    if spec.flip:
        steps.append(v2.RandomHorizontalFlip(spec.flip))
    steps += [_operation(name, p, options, spec.name) for name, p, options in spec.ops]
    if to_float:
        steps.append(v2.ToDtype(torch.float32, scale=True))
    if spec.normalize is not None:
        steps.append(v2.Normalize(*spec.normalize))
    return v2.Compose(steps)


def _crop(spec: ViewSpec) -> list[Any]:
    how: dict[str, Any] = {"interpolation": InterpolationMode(spec.interpolation), "antialias": True}
    options = spec.box_options
    if spec.box_kind == "random_resized":
        return [v2.RandomResizedCrop(spec.size, options["scale"], options["ratio"], **how)]
    if spec.box_kind == "center":
        return [v2.Resize(options["resize"], **how), v2.CenterCrop(spec.size)]
    if spec.box_kind == "whole":
        return [v2.Resize((spec.size, spec.size), **how)]
    raise ConfigError(f"view {spec.name!r}: torchvision v2 has no box {spec.box_kind!r}")


def _operation(name: str, p: float, options: Any, view: str) -> Any:
    if name == "jitter":
        return v2.RandomApply([v2.ColorJitter(**options)], p)
    if name == "grey":
        return v2.RandomGrayscale(p)
    if name == "blur":
        return v2.RandomApply([v2.GaussianBlur(blur_taps(options["sigma"]), options["sigma"])], p)
    if name == "solarise":
        return v2.RandomSolarize(threshold(options["threshold"]), p)
    raise ConfigError(f"view {view!r}: torchvision v2 has no operation {name!r}")


def blur_taps(sigma: tuple[float, float]) -> int:
    """Taps of a kernel that reaches three of the largest sigmas to each side; fewer would be another blur."""
    return 2 * math.ceil(3 * sigma[1]) + 1
