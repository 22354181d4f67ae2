"""Backbones, heads, and the state that methods keep beside them.

A backbone is any module with this interface; `build_backbone` makes the ones relssl knows, and a test or a
user may pass another:

    backbone(x)                    x (B, 3, H, W) -> features (B, D)
    backbone(x, return_stem=True)  -> features (B, D), stem map (B, C, H', W') after the first conv-BN-ReLU
    backbone.feature_dim           D
    backbone.stem_channels         C
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from pipelines.errors import ConfigError, unknown_name
from relssl.nets.conv4 import Conv4
from relssl.nets.ema import ema_update, make_teacher
from relssl.nets.heads import MLPHead
from relssl.nets.norm import BatchNorm1d, BatchNorm2d, NormKind, parse_norm, set_norm
from relssl.nets.queue import KeyQueue
from relssl.nets.resnet import resnet18, resnet34, resnet50

__all__ = [
    "BACKBONES",
    "BatchNorm1d",
    "BatchNorm2d",
    "KeyQueue",
    "MLPHead",
    "NormKind",
    "build_backbone",
    "ema_update",
    "make_teacher",
    "parse_norm",
    "set_norm",
]

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "conv4": Conv4,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
}


def build_backbone(name: str, **options: object) -> nn.Module:
    """A freshly initialised backbone (from torch's global generator), float32, on the CPU.

    Args:
        name: `conv4`, `resnet18`, `resnet34` or `resnet50`.
        options: conv4 takes `width`; the ResNets take `stem` ("imagenet", "cifar" or "small") and `width`.

    Raises:
        ConfigError: an unknown name or option (the known ones are listed), or a value that the backbone
            refuses.
    """
    if name not in BACKBONES:
        raise ConfigError(unknown_name("backbone", name, BACKBONES))
    builder = BACKBONES[name]
    known = inspect.signature(builder).parameters
    for option in options:
        if option not in known:
            raise ConfigError(unknown_name(f"option of backbone {name!r}", option, known))
    return builder(**options)
