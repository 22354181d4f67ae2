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
from typing import Any

from torch import nn

from pipelines.errors import ConfigError, unknown_name
from relssl.nets.cifar_resnet import resnet8, resnet32, resnet56
from relssl.nets.conv4 import Conv4
from relssl.nets.ema import ema_update, make_teacher
from relssl.nets.heads import DeepMLPHead, MLPHead, NormMLPHead, RelationHead
from relssl.nets.norm import BatchNorm1d, BatchNorm2d, NormKind, parse_norm, set_norm
from relssl.nets.queue import KeyQueue
from relssl.nets.resnet import RESNETS
from relssl.nets.timm_backbone import PREFIX as TIMM
from relssl.nets.timm_backbone import TimmBackbone

__all__ = [
    "BACKBONES",
    "BatchNorm1d",
    "BatchNorm2d",
    "DeepMLPHead",
    "KeyQueue",
    "MLPHead",
    "NormKind",
    "NormMLPHead",
    "RelationHead",
    "build_backbone",
    "ema_update",
    "make_teacher",
    "parse_norm",
    "set_norm",
]

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "conv4": Conv4,
    "resnet8": resnet8,
    "resnet32": resnet32,
    "resnet56": resnet56,
    **RESNETS,
}


def build_backbone(name: str, **options: Any) -> nn.Module:
    """A freshly initialised backbone (from torch's global generator), float32, on the CPU.

    Args:
        name: one of `BACKBONES`, or `timm:<name>` for any architecture of timm (extra `export`).
        options: conv4 and the three-stage ResNets (8, 32, 56) take `width`, the other ResNets `stem` ("imagenet",
            "cifar", "small" or "cifar_padded"), `width` and `zero_init_residual`, ReLICv2's (`relicv2_resnet50`, ...)
            `width`; those of a timm model go to `timm.create_model`.

    Raises:
        ConfigError: an unknown name or option (the known ones are listed), or a value that the backbone refuses.
        MissingExtraError: a timm model without timm.
    """
    if name.startswith(TIMM):
        return TimmBackbone(name.removeprefix(TIMM), **options)
    if name not in BACKBONES:
        raise ConfigError(unknown_name("backbone", name, [*BACKBONES, f"{TIMM}<name>"]))
    builder = BACKBONES[name]
    known = inspect.signature(builder).parameters
    for option in options:
        if option not in known:
            raise ConfigError(unknown_name(f"option of backbone {name!r}", option, known))
    return builder(**options)
