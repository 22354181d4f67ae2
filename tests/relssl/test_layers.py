"""Features of several layers in one pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipelines.errors import ConfigError
from relssl.evaluate.layers import Layers
from relssl.nets import build_backbone

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def backbone():
    return build_backbone("conv4").eval()


def test_layers_are_averaged_maps_beside_the_features(backbone):
    stack = Layers(backbone, ["layer2", "features", "layer1.conv"])
    with torch.no_grad():
        parts = stack.split(stack(IMAGES), 32)
        stem = backbone.layer1.conv(IMAGES)
        second = backbone.layer2(nn.functional.avg_pool2d(backbone.layer1(IMAGES), 2))
    assert list(parts) == ["layer2", "features", "layer1.conv"]
    assert stack.widths(32) == {"layer2": 16, "features": 64, "layer1.conv": 8}
    torch.testing.assert_close(parts["layer1.conv"], stem.mean(dim=(2, 3)))
    torch.testing.assert_close(parts["layer2"], second.mean(dim=(2, 3)))
    torch.testing.assert_close(parts["features"], backbone(IMAGES))


def test_no_hook_stays_behind(backbone):
    Layers(backbone, ["layer3"]).widths(32)
    assert not any(module._forward_hooks for module in backbone.modules())


def test_a_resnets_layers_have_torchvisions_names():
    stack = Layers(build_backbone("resnet18", stem="cifar", width=0.25).eval(), ["layer3", "layer4.0", "features"])
    assert list(stack.widths(32)) == ["layer3", "layer4.0", "features"]


class Odd(nn.Module):
    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape, self.inner, self.idle = shape, nn.Identity(), nn.Linear(2, 2)

    def forward(self, x):
        self.inner(torch.zeros(len(x), *self.shape))
        return torch.zeros(len(x), 2)


def test_tokens_are_averaged_and_other_shapes_refused():
    assert Layers(Odd((7, 5)), ["inner"]).widths(4) == {"inner": 5}
    with pytest.raises(ConfigError, match=r"the layer inner gives \(1,\)"):
        Layers(Odd(()), ["inner"]).widths(4)


def test_names_that_do_not_exist_or_do_nothing(backbone):
    with pytest.raises(ConfigError, match="unknown layer: 'layer5'; did you mean 'layer4'"):
        Layers(backbone, ["layer5"])
    with pytest.raises(ConfigError, match="named twice"):
        Layers(backbone, ["layer1", "layer1"])
    with pytest.raises(ConfigError, match="idle takes no part"):
        Layers(Odd((3,)), ["idle"]).widths(4)
