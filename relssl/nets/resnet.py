"""ResNet-18, 34 and 50 (He et al., CVPR 2016; "v1.5": a bottleneck strides in its 3x3) without classifier.

Names and shapes of the state dict are torchvision's without `fc`, so released weights load either way, and
rules that go by name (`bn`, `bias`) meet the names that the originals met.

Stems: "imagenet" 7x7 stride 2 and max-pool; "small" 3x3 stride 1, max-pool kept (64 px images); "cifar" 3x3
stride 1 and no max-pool (32 px).  Convolutions start Kaiming-normal (fan-out, ReLU), BatchNorm at 1 and 0;
the replaced 3x3 stem keeps PyTorch's default initialisation, as in ReSSL's small-data code, which swapped it
in after the fact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.errors import ConfigError
from relssl.nets.norm import BatchNorm2d

STEMS = ("imagenet", "cifar", "small")


def _conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; (B, Cin, H, W) -> (B, C, H / stride, W / stride)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.bn1 = BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(channels, channels, 3)
        self.bn2 = BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the channels, and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 1)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3, stride)
        self.bn2 = BatchNorm2d(channels)
        self.conv3 = _conv(channels, channels * self.expansion, 1)
        self.bn3 = BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + shortcut)


class ResNet(nn.Module):
    """Stem, four stages of residual blocks, global average pool.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks per stage.
        stem: see the module's docstring.
        width: multiplies every channel count; 1 is the published network.

    Attributes:
        feature_dim: D, 512 or 2048 at width 1.
        stem_channels: channels of the stem map, 64 at width 1.
    """

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], depths: Sequence[int], *, stem: str, width: float
    ) -> None:
        super().__init__()
        if stem not in STEMS:
            raise ConfigError(f"Unknown stem {stem!r}. Known: {', '.join(STEMS)}.")
        channels = [scaled_channels(c, width) for c in (64, 128, 256, 512)]
        self.stem_channels = self._in_channels = channels[0]
        self.feature_dim = channels[3] * block.expansion
        self.conv1 = _conv(3, channels[0], 7, 2) if stem == "imagenet" else _conv(3, channels[0], 3)
        self.bn1 = BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(block, channels[0], depths[0], stride=1)
        self.layer2 = self._stage(block, channels[1], depths[1], stride=2)
        self.layer3 = self._stage(block, channels[2], depths[2], stride=2)
        self.layer4 = self._stage(block, channels[3], depths[3], stride=2)
        keeps_default = self.conv1 if stem != "imagenet" else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not keeps_default:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(
        self, block: type[BasicBlock] | type[Bottleneck], channels: int, depth: int, stride: int
    ) -> nn.Sequential:
        out_channels = channels * block.expansion
        downsample = None
        if stride != 1 or self._in_channels != out_channels:
            downsample = nn.Sequential(_conv(self._in_channels, out_channels, 1, stride), BatchNorm2d(out_channels))
        blocks = [block(self._in_channels, channels, stride, downsample)]
        blocks += [block(out_channels, channels, 1, None) for _ in range(depth - 1)]
        self._in_channels = out_channels
        return nn.Sequential(*blocks)

    @overload
    def forward(self, x: Tensor, return_stem: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, return_stem: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, return_stem: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        stem = self.relu(self.bn1(self.conv1(x)))
        out = self.layer1(self.maxpool(stem))
        out = self.layer4(self.layer3(self.layer2(out)))
        features = F.adaptive_avg_pool2d(out, 1).flatten(1)
        return (features, stem) if return_stem else features


def scaled_channels(channels: int, width: float) -> int:
    """`channels * width`, which must be a whole number of at least 1.

    Raises:
        ConfigError: it is not.
    """
    number = isinstance(width, (int, float)) and not isinstance(width, bool)
    if not number or channels * width < 1 or (channels * width) % 1:
        raise ConfigError(f"width must turn {channels} channels into a whole number, at least 1; got width {width!r}.")
    return int(channels * width)


def resnet18(*, stem: str = "imagenet", width: float = 1) -> ResNet:
    """ResNet-18, 512 features, 11.2 M parameters."""
    return ResNet(BasicBlock, (2, 2, 2, 2), stem=stem, width=width)


def resnet34(*, stem: str = "imagenet", width: float = 1) -> ResNet:
    """ResNet-34, 512 features, 21.3 M parameters."""
    return ResNet(BasicBlock, (3, 4, 6, 3), stem=stem, width=width)


def resnet50(*, stem: str = "imagenet", width: float = 1) -> ResNet:
    """ResNet-50, 2048 features, 23.5 M parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), stem=stem, width=width)
