"""torchvision's ResNets (He et al., CVPR 2016; "v1.5": a bottleneck strides in its 3x3) without classifier.

ResNet-18 to 200, ResNeXt (Xie et al., CVPR 2017) and wide ResNets (Zagoruyko & Komodakis, BMVC 2016).  Names and
shapes of the state dict are torchvision's without `fc`, so released weights load either way, and rules that go by
name (`bn`, `bias`) meet the names that the originals met.

Stems: "imagenet" 7x7 stride 2 and max-pool; "small" 3x3 stride 1, max-pool kept (64 px images); "cifar" 3x3
stride 1 and no max-pool (32 px); "cifar_padded" the same with a border of one more pixel (ReSA's CIFAR code: 32 px
give maps of 34).  Convolutions start Kaiming-normal (fan-out, ReLU), BatchNorm at 1 and 0; the replaced 3x3 stem
keeps PyTorch's default initialisation, as in ReSSL's small-data code, which swapped it in after the fact.
`zero_init_residual` starts the last BatchNorm of each block at 0.

`relicv2_resnet*` are the ResNets of ReLICv2's code, made with Haiku: TensorFlow's "SAME" padding, which is uneven
where a stride meets an even size, a projection in every stage's first block, truncated-normal convolutions, the
last BatchNorm of a bottleneck at 0.  Weights of one kind in a network of the other are off by a fifth and more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.errors import ConfigError
from relssl.nets.norm import BatchNorm2d

STEMS = ("imagenet", "cifar", "small", "cifar_padded")
# (in_channels, channels, stride, downsample) -> block
Block = Callable[..., nn.Module]


def conv(
    in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1, *, same: bool = False
) -> nn.Conv2d:
    """A convolution without bias whose output is the input's size over the stride, rounded up.

    `same` pads as TensorFlow does, which differs where a larger kernel strides.
    """
    if same and stride > 1 and size > 1:
        return SameConv2d(in_channels, out_channels, size, stride, groups=groups, bias=False)
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, groups=groups, bias=False)


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "SAME" padding: the output is the input's size over the stride, rounded up, and
    an odd pixel of padding goes to the right and the bottom."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, _same_padding(input, self.kernel_size[0], self.stride[0])))


class SameMaxPool2d(nn.MaxPool2d):
    """Max-pooling with TensorFlow's "SAME" padding."""

    def forward(self, input: Tensor) -> Tensor:
        padding = _same_padding(input, int(self.kernel_size), int(self.stride))  # type: ignore[arg-type]
        return super().forward(F.pad(input, padding, value=-torch.inf))


def _same_padding(x: Tensor, size: int, stride: int) -> list[int]:
    """Left, right, top, bottom."""
    padding = []
    for side in (x.shape[3], x.shape[2]):
        total = max((-(-side // stride) - 1) * stride + size - side, 0)
        padding += [total // 2, total - total // 2]
    return padding


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; (B, Cin, H, W) -> (B, C, H / stride, W / stride)."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None, *, same: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride, same=same)
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
        same: bool = False,
    ) -> None:
        super().__init__()
        inner = channels * group_width // 64 * groups
        self.conv1 = conv(in_channels, inner, 1)
        self.bn1 = BatchNorm2d(inner)
        self.conv2 = conv(inner, inner, 3, stride, groups, same=same)
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
        zero_init_residual: the last BatchNorm of each block starts at 0, so that blocks start as their shortcuts.
        haiku: ReLICv2's kind, see the module's docstring.
        channels: nominal ones of the stem and the four stages.

    Attributes:
        feature_dim: D, 512 or 2048 at width 1.
        stem_channels: channels of the stem map, 64 at width 1.
    """

    def __init__(
        self,
        block: Block,
        depths: Sequence[int],
        *,
        expansion: int,
        stem: str = "imagenet",
        width: float = 1,
        zero_init_residual: bool = False,
        haiku: bool = False,
        channels: Sequence[int] = (64, 64, 128, 256, 512),
    ) -> None:
        super().__init__()
        if stem not in STEMS:
            raise ConfigError(f"Unknown stem {stem!r}. Known: {', '.join(STEMS)}.")
        if not isinstance(zero_init_residual, bool):
            raise ConfigError(f"zero_init_residual is true or false, got {zero_init_residual!r}.")
        first, *nominal = (scaled_channels(c, width) for c in channels)
        outputs = [c * expansion for c in nominal]
        self.stem_channels, self.feature_dim = first, outputs[3]
        self.conv1 = conv(3, first, 7, 2, same=haiku) if stem == "imagenet" else conv(3, first, 3)
        if stem == "cifar_padded":
            self.conv1.padding = (2, 2)
        self.bn1 = BatchNorm2d(first)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = _max_pool(stem, same=haiku)
        stages, before = [], first
        for i, (inner, out, depth) in enumerate(zip(nominal, outputs, depths, strict=True)):
            stride = 1 if i == 0 else 2
            stages.append(stage(block, before, inner, out, depth, stride=stride, projects=haiku))
            before = out
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self._initialise(keeps_default=stem != "imagenet", zero_init_residual=zero_init_residual, haiku=haiku)

    def _initialise(self, *, keeps_default: bool, zero_init_residual: bool, haiku: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and haiku:
                std = module.weight[0].numel() ** -0.5  # of the normal distribution before it is cut at twice that
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            elif isinstance(module, nn.Conv2d) and not (module is self.conv1 and keeps_default):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck) and (zero_init_residual or haiku):
                nn.init.zeros_(module.bn3.weight)
            elif isinstance(module, BasicBlock) and zero_init_residual:
                nn.init.zeros_(module.bn2.weight)

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
    block: Block,
    in_channels: int,
    channels: int,
    out_channels: int,
    depth: int,
    *,
    stride: int,
    projects: bool = False,
) -> nn.Sequential:
    """`depth` blocks, the first with the stride and, where shapes change or it `projects`, a 1x1 as its shortcut."""
    downsample = None
    if projects or stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(conv(in_channels, out_channels, 1, stride), BatchNorm2d(out_channels))
    blocks = [block(in_channels, channels, stride, downsample)]
    blocks += [block(out_channels, channels, 1, None) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


def _max_pool(stem: str, *, same: bool) -> nn.Module:
    if stem.startswith("cifar"):
        return nn.Identity()
    return SameMaxPool2d(3, stride=2) if same else nn.MaxPool2d(3, stride=2, padding=1)


def scaled_channels(channels: int, width: float) -> int:
    """`channels * width`, which must be a whole number of at least 1.

    Raises:
        ConfigError: it is not.
    """
    number = isinstance(width, (int, float)) and not isinstance(width, bool)
    if not number or channels * width < 1 or (channels * width) % 1:
        raise ConfigError(f"width must turn {channels} channels into a whole number, at least 1; got width {width!r}.")
    return int(channels * width)


def _torchvision(block: Block, depths: Sequence[int], *, expansion: int) -> Callable[..., ResNet]:
    def build(*, stem: str = "imagenet", width: float = 1, zero_init_residual: bool = False) -> ResNet:
        return ResNet(block, depths, expansion=expansion, stem=stem, width=width, zero_init_residual=zero_init_residual)

    return build


def _haiku(block: Block, depths: Sequence[int], *, expansion: int) -> Callable[..., ResNet]:
    def build(*, width: float = 1) -> ResNet:
        return ResNet(partial(block, same=True), depths, expansion=expansion, width=width, haiku=True)

    return build


_BASIC = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}  # 512 features; 11.2 and 21.3 M parameters
_BOTTLENECK = {  # 2048 features; 23.5, 42.5, 58.1 and 62.7 M parameters
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
    "resnet200": (3, 24, 36, 3),
}
_OTHERS: dict[
    str, tuple[Sequence[int], dict[str, Any]]
] = {  # 2048 features; 23.0, 86.7, 81.4, 66.8 and 124.8 M parameters
    "resnext50_32x4d": ((3, 4, 6, 3), {"groups": 32, "group_width": 4}),
    "resnext101_32x8d": ((3, 4, 23, 3), {"groups": 32, "group_width": 8}),
    "resnext101_64x4d": ((3, 4, 23, 3), {"groups": 64, "group_width": 4}),
    "wide_resnet50_2": ((3, 4, 6, 3), {"group_width": 128}),  # 3x3 twice as wide; `width` widens all
    "wide_resnet101_2": ((3, 4, 23, 3), {"group_width": 128}),
}
# name -> builder, which takes the options of `ResNet` that a recipe may give
RESNETS: dict[str, Callable[..., ResNet]] = {
    **{name: _torchvision(BasicBlock, depths, expansion=1) for name, depths in _BASIC.items()},
    **{name: _torchvision(Bottleneck, depths, expansion=4) for name, depths in _BOTTLENECK.items()},
    **{
        name: _torchvision(partial(Bottleneck, **options), depths, expansion=4)
        for name, (depths, options) in _OTHERS.items()
    },
    **{f"relicv2_{name}": _haiku(BasicBlock, depths, expansion=1) for name, depths in _BASIC.items()},
    **{f"relicv2_{name}": _haiku(Bottleneck, depths, expansion=4) for name, depths in _BOTTLENECK.items()},
}
