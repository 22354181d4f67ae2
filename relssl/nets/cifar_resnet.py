"""ResNet-8, 32 and 56: the three-stage ResNets for 32 px images (He et al., CVPR 2016, section 4.2).

Depth 6 n + 2: a 3x3 stem with 16 channels and no max-pool, then n basic blocks at each of 16, 32 and 64 channels,
halving the size twice, and a global average: 64 features.  As in the code of relational reasoning (Patacchiola &
Storkey, NeurIPS 2020), the shortcut of a block that changes shape is a 1x1 projection with BatchNorm (option B),
where the paper pads with zeros.  State-dict names are that code's, which are torchvision's.
"""

from __future__ import annotations

from typing import Literal, overload

import torch.nn.functional as F
from torch import Tensor, nn

from relssl.nets.norm import BatchNorm2d
from relssl.nets.resnet import BasicBlock, conv, scaled_channels, stage


class CifarResNet(nn.Module):
    """See the module's docstring.  Convolutions start Kaiming-normal (fan-out, ReLU), BatchNorm at 1 and 0.

    Args:
        depth: blocks per stage, n.
        width: multiplies the channel counts 16, 32, 64; 1 is the published network.

    Attributes:
        feature_dim: D, 64 at width 1.
        stem_channels: channels of the stem map, which has the image's size; 16 at width 1.
    """

    def __init__(self, depth: int, *, width: float = 1) -> None:
        super().__init__()
        channels = [scaled_channels(c, width) for c in (16, 32, 64)]
        self.stem_channels, self.feature_dim = channels[0], channels[2]
        self.conv1 = conv(3, channels[0], 3)
        self.bn1 = BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(BasicBlock, channels[0], channels[0], channels[0], depth, stride=1)
        self.layer2 = stage(BasicBlock, channels[0], channels[1], channels[1], depth, stride=2)
        self.layer3 = stage(BasicBlock, channels[1], channels[2], channels[2], depth, stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @overload
    def forward(self, x: Tensor, return_stem: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, return_stem: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, return_stem: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        stem = self.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(stem)))
        features = F.adaptive_avg_pool2d(out, 1).flatten(1)
        return (features, stem) if return_stem else features


def resnet8(*, width: float = 1) -> CifarResNet:
    """77,392 parameters, 25 MFLOP per 32 px image."""
    return CifarResNet(1, width=width)


def resnet32(*, width: float = 1) -> CifarResNet:
    """466,256 parameters, 138 MFLOP per 32 px image."""
    return CifarResNet(5, width=width)


def resnet56(*, width: float = 1) -> CifarResNet:
    """855,120 parameters, 252 MFLOP per 32 px image."""
    return CifarResNet(9, width=width)
