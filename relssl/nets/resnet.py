"""torchvision's ResNets (He et al., CVPR 2016; "v1.5": a bottleneck strides in its 3x3) without classifier.

ResNet-18 to 152, ResNeXt (Xie et al., CVPR 2017) and wide ResNets (Zagoruyko & Komodakis, BMVC 2016).  Names and
shapes of the state dict are torchvision's without `fc`, so released weights load either way, and rules that go by
name (`bn`, `bias`) meet the names that the originals met.

Stems: "imagenet" 7x7 stride 2 and max-pool; "small" 3x3 stride 1, max-pool kept (64 px images); "cifar" 3x3
stride 1 and no max-pool (32 px).  Convolutions start Kaiming-normal (fan-out, ReLU), BatchNorm at 1 and 0;
the replaced 3x3 stem keeps PyTorch's default initialisation, as in ReSSL's small-data code, which swapped it
in after the fact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, overload

import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.errors import ConfigError
from relssl.nets.norm import BatchNorm2d

STEMS = ("imagenet", "cifar", "small")
# (in_channels, channels, stride, downsample) -> block
Block = Callable[[int, int, int, nn.Module | None], nn.Module]


def conv(in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias whose output is the input's size over the stride, rounded up."""
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; (B, Cin, H, W) -> (B, C, H / stride, W / stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the channels, and a shortcut.

    The 3x3 has `channels * group_width / 64` channels in each of `groups` groups.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        downsample: nn.Module | None,
        *,
        groups: int = 1,
        group_width: int = 64,
    ) -> None:
        super().__init__()
        inner = channels * group_width // 64 * groups
        self.conv1 = conv(in_channels, inner, 1)
        self.bn1 = BatchNorm2d(inner)
        self.conv2 = conv(inner, inner, 3, stride, groups)
        self.bn2 = BatchNorm2d(inner)
        self.conv3 = conv(inner, channels * 4, 1)
        self.bn3 = BatchNorm2d(channels * 4)
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
        block: makes a block.
        depths: blocks per stage.
        expansion: a block's output channels over its nominal ones: 4 for bottlenecks.
        stem: see the module's docstring.
        width: multiplies every channel count; 1 is the published network.

    Attributes:
        feature_dim: D, 512 or 2048 at width 1.
        stem_channels: channels of the stem map, 64 at width 1.
    """

    def __init__(self, block: Block, depths: Sequence[int], *, expansion: int, stem: str, width: float) -> None:
        super().__init__()
        if stem not in STEMS:
            raise ConfigError(f"Unknown stem {stem!r}. Known: {', '.join(STEMS)}.")
        channels = [scaled_channels(c, width) for c in (64, 128, 256, 512)]
        outputs = [c * expansion for c in channels]
        self.stem_channels, self.feature_dim = channels[0], outputs[3]
        self.conv1 = conv(3, channels[0], 7, 2) if stem == "imagenet" else conv(3, channels[0], 3)
        self.bn1 = BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = stage(block, channels[0], channels[0], outputs[0], depths[0], stride=1)
        self.layer2 = stage(block, outputs[0], channels[1], outputs[1], depths[1], stride=2)
        self.layer3 = stage(block, outputs[1], channels[2], outputs[2], depths[2], stride=2)
        self.layer4 = stage(block, outputs[2], channels[3], outputs[3], depths[3], stride=2)
        keeps_default = self.conv1 if stem != "imagenet" else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not keeps_default:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

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


def stage(
    block: Block, in_channels: int, channels: int, out_channels: int, depth: int, *, stride: int
) -> nn.Sequential:
    """`depth` blocks, the first with the stride and, where shapes change, a 1x1 projection as its shortcut."""
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(conv(in_channels, out_channels, 1, stride), BatchNorm2d(out_channels))
    blocks = [block(in_channels, channels, stride, downsample)]
    blocks += [block(out_channels, channels, 1, None) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


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
    """512 features, 11.2 M parameters."""
    return ResNet(BasicBlock, (2, 2, 2, 2), expansion=1, stem=stem, width=width)


def resnet34(*, stem: str = "imagenet", width: float = 1) -> ResNet:
    """512 features, 21.3 M parameters."""
    return ResNet(BasicBlock, (3, 4, 6, 3), expansion=1, stem=stem, width=width)


def resnet50(*, stem: str = "imagenet", width: float = 1) -> ResNet:
    """2048 features, 23.5 M parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), expansion=4, stem=stem, width=width)


def resnet101(*, stem: str = "imagenet", width: float = 1) -> ResNet:
    """2048 features, 42.5 M parameters."""
    return ResNet(Bottleneck, (3, 4, 23, 3), expansion=4, stem=stem, width=width)


def resnet152(*, stem: str = "imagenet", width: float = 1) -> ResNet:
    """2048 features, 58.1 M parameters."""
    return ResNet(Bottleneck, (3, 8, 36, 3), expansion=4, stem=stem, width=width)


def resnext50_32x4d(*, stem: str = "imagenet", width: float = 1) -> ResNet:
    """32 groups of 4 channels; 2048 features, 23.0 M parameters."""
    block = partial(Bottleneck, groups=32, group_width=4)
    return ResNet(block, (3, 4, 6, 3), expansion=4, stem=stem, width=width)


def resnext101_32x8d(*, stem: str = "imagenet", width: float = 1) -> ResNet:
    """32 groups of 8 channels; 2048 features, 86.7 M parameters."""
    block = partial(Bottleneck, groups=32, group_width=8)
    return ResNet(block, (3, 4, 23, 3), expansion=4, stem=stem, width=width)


def resnext101_64x4d(*, stem: str = "imagenet", width: float = 1) -> ResNet:
    """64 groups of 4 channels; 2048 features, 81.4 M parameters."""
    block = partial(Bottleneck, groups=64, group_width=4)
    return ResNet(block, (3, 4, 23, 3), expansion=4, stem=stem, width=width)


def wide_resnet50_2(*, stem: str = "imagenet", width: float = 1) -> ResNet:
    """ResNet-50 with 3x3 convolutions twice as wide (`width` widens all); 2048 features, 66.8 M parameters."""
    return ResNet(partial(Bottleneck, group_width=128), (3, 4, 6, 3), expansion=4, stem=stem, width=width)


def wide_resnet101_2(*, stem: str = "imagenet", width: float = 1) -> ResNet:
    """ResNet-101 with 3x3 convolutions twice as wide; 2048 features, 124.8 M parameters."""
    return ResNet(partial(Bottleneck, group_width=128), (3, 4, 23, 3), expansion=4, stem=stem, width=width)
