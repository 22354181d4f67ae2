"""RotNet (Gidaris et al., ICLR 2018, arXiv:1803.07728), as the baseline of Self-Supervised Relational Reasoning.

views: view (1)

x_r = view turned by r quarter turns counter-clockwise, r = 0..3
loss = CE( classifier(encoder(x_r)), r )                      one forward of all 4 B images
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.batch import ViewBatch
from pipelines.errors import ConfigError
from relssl.methods import base
from relssl.ops.rows import at_least_float32, spread


class RotationConfig(base.MethodConfig):
    name: str = "rotation"


class Method(base.Method):
    Config = RotationConfig
    VIEWS: ClassVar = {"view": (1, 1)}

    def __init__(self, make_backbone: Callable[[], Any], config: RotationConfig, data: base.DataInfo):
        super().__init__(make_backbone, config, data)
        self.encoder = make_backbone()
        self.classifier = nn.Linear(self.encoder.feature_dim, 4)

    def forward(self, batch: ViewBatch, step: base.Step) -> tuple[Tensor, dict[str, Tensor]]:
        x, quarter_turns = rotations(batch.views["view"][0])
        features = self.encoder(x)
        logits = at_least_float32(self.classifier(features))
        accuracy = (logits.argmax(1) == quarter_turns).float().mean()
        return F.cross_entropy(logits, quarter_turns), {"accuracy": accuracy, "features_spread": spread(features)}


def rotations(x: Tensor) -> tuple[Tensor, Tensor]:
    """All images at 0, 90, 180 and 270 degrees, counter-clockwise, block by block.

    Shape:
        (B, 3, S, S) -> (4 B, 3, S, S), quarter turns (4 B,) int64

    Raises:
        ConfigError: images that are not square.
    """
    if x.shape[2] != x.shape[3]:
        raise ConfigError(
            f"rotation turns images on their side, so they must be square; got {tuple(x.shape[2:])} pixels"
        )
    turned = torch.cat([torch.rot90(x, turns, (2, 3)) for turns in range(4)])
    if x.is_contiguous(memory_format=torch.channels_last):
        turned = turned.contiguous(memory_format=torch.channels_last)
    return turned, torch.arange(4, device=x.device).repeat_interleave(len(x))
