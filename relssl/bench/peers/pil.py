"""What the papers' code does: torchvision's first transforms on PIL images, one image at a time."""

from __future__ import annotations

import io
import math
import random
from typing import Any

from PIL import Image, ImageFilter
from torchvision import transforms as T
from torchvision.transforms.functional import InterpolationMode

from pipelines.errors import ConfigError
from pipelines.views import ViewSpec
from relssl.bench.peers import Job
from relssl.bench.peers.dataloader import DataLoaderPeer, stored_pixels


class Peer(DataLoaderPeer):
    """The original pipeline of a plan. Raw pixels are taken as they are, as the originals do with CIFAR."""

    title = "PIL + torchvision v1"

    def __init__(self, job: Job):
        def make_transform(spec: ViewSpec) -> T.Compose:
            return transform(spec, tensor=T.PILToTensor() if job.measure == "crops" else T.ToTensor())

        super().__init__(job, decode, make_transform)
        self.how = f"PIL, {self.how}"


class Blur:
    """Gaussian blur whose radius is drawn uniformly from `sigma`; PIL approximates it by box blurs."""

    def __init__(self, sigma: tuple[float, float]):
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


def decode(files: Any, index: int) -> Image.Image:
    """One stored sample as a PIL image."""
    if files.is_jpeg[index]:
        return Image.open(io.BytesIO(files.payload(index).tobytes())).convert("RGB")
    return Image.fromarray(stored_pixels(files, index))


def transform(spec: ViewSpec, *, tensor: Any) -> T.Compose:
    """A view as the papers' code writes it down.

    Args:
        tensor: turns the PIL image into a tensor.

    Raises:
        ConfigError: an operation of which there is no original in torchvision.
    """
    steps = [*_crop(spec)]
    if spec.flip:
        steps.append(T.RandomHorizontalFlip(spec.flip))
    steps += [_operation(name, p, options, spec.name) for name, p, options in spec.ops]
    steps.append(tensor)
    if spec.normalize is not None:
        steps.append(T.Normalize(*spec.normalize))
    return T.Compose(steps)


def _crop(spec: ViewSpec) -> list[Any]:
    how = InterpolationMode(spec.interpolation)
    options = spec.box_options
    if spec.box_kind == "random_resized":
        return [T.RandomResizedCrop(spec.size, options["scale"], options["ratio"], interpolation=how)]
    if spec.box_kind == "center":
        return [T.Resize(options["resize"], interpolation=how), T.CenterCrop(spec.size)]
    if spec.box_kind == "whole":
        return [T.Resize((spec.size, spec.size), interpolation=how)]
    raise ConfigError(f"view {spec.name!r}: torchvision v1 has no box {spec.box_kind!r}")


def _operation(name: str, p: float, options: Any, view: str) -> Any:
    if name == "jitter":
        return T.RandomApply([T.ColorJitter(**options)], p)
    if name == "grey":
        return T.RandomGrayscale(p)
    if name == "blur":
        return T.RandomApply([Blur(options["sigma"])], p)
    if name == "solarise":
        return T.RandomSolarize(threshold(options["threshold"]), p)
    raise ConfigError(f"view {view!r}: torchvision v1 has no operation {name!r}")


def threshold(share: float) -> int:
    """The least 8-bit value that is inverted: the first at or above a share of 255."""
    return math.ceil(round(share * 255, 6))
