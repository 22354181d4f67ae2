"""Conv4: the small backbone of relational reasoning (Patacchiola & Storkey, NeurIPS 2020), good for a CPU.

Four stages of 3x3 convolution, BatchNorm, ReLU and pooling: 2x2 average (floored at odd sizes) in the first
three, global average in the last.  24,648 parameters, 2.2 MFLOP per 32 px image, 64 non-negative features.
State-dict names are the original's, `layer{1..4}.{conv,bn}.*`.
"""

from __future__ import annotations

from typing import Literal, overload

import torch.nn.functional as F
from torch import Tensor, nn

from relssl.nets.norm import BatchNorm2d
from relssl.nets.resnet import scaled_channels


class ConvStage(nn.Module):
    """3x3 convolution without bias, BatchNorm, ReLU; (B, Cin, H, W) -> (B, C, H, W)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn = BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Conv4(nn.Module):
    """See the module's docstring.

    Args:
        width: multiplies the channel counts 8, 16, 32, 64; 1 is the published network.

    Attributes:
        feature_dim: D, 64 at width 1.
        stem_channels: channels of the stem map (stage 1 before its pooling), 8 at width 1.
    """

    def __init__(self, *, width: float = 1) -> None:
        super().__init__()
        channels = [scaled_channels(c, width) for c in (8, 16, 32, 64)]
        self.stem_channels, self.feature_dim = channels[0], channels[3]
        self.layer1 = ConvStage(3, channels[0])
        self.layer2 = ConvStage(channels[0], channels[1])
        self.layer3 = ConvStage(channels[1], channels[2])
        self.layer4 = ConvStage(channels[2], channels[3])

    @overload
    def forward(self, x: Tensor, return_stem: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, return_stem: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, return_stem: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        stem = self.layer1(x)
        out = self.layer2(F.avg_pool2d(stem, 2))
        out = self.layer3(F.avg_pool2d(out, 2))
        out = self.layer4(F.avg_pool2d(out, 2))
        features = F.adaptive_avg_pool2d(out, 1).flatten(1)
        return (features, stem) if return_stem else features
