"""Backbones and heads: the originals' names, shapes, initialisation and numbers."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn

from pipelines.errors import ConfigError, MissingExtraError
from relssl.nets import BACKBONES, MLPHead, build_backbone, set_norm
from tests.relssl import golden

ARRAYS = golden.load("backbones")
# Golden backbones that relssl builds, by how their weights are given.
STORED = sorted({key.split("__")[0] for key in ARRAYS if "__param." in key} & set(BACKBONES))
FILLED = sorted({key.split("__")[0] for key in ARRAYS if "__det_shape" in key} & set(BACKBONES))


def load_stored(name):
    net = build_backbone(name)
    state = {key: golden.tensor(value, torch.float32) for key, value in golden.part(ARRAYS, f"{name}__param.").items()}
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return net


def test_the_golden_file_covers_what_it_should():
    assert STORED == ["conv4", "resnet32", "resnet8"]
    assert FILLED == ["resnet34", "resnet56"]


@pytest.mark.evidence(
    "shared", "part", "conv4, resnet8, resnet32: features, two gradients, running statistics",
    golden="backbones", dtype="float32", tolerance="1e-4, gradients of resnet32 1e-3",
)  # fmt: skip
@pytest.mark.parametrize("name", STORED)
def test_golden_features_gradients_and_running_statistics(name):
    net = load_stored(name)
    x = golden.tensor(ARRAYS[f"{name}__x"], torch.float32)
    tolerance = {"rtol": 1e-4, "atol": 2e-5}
    net.eval()
    torch.testing.assert_close(net(x), golden.tensor(ARRAYS[f"{name}__feat_eval"]), **tolerance)
    net.train()
    features = net(x)
    torch.testing.assert_close(features, golden.tensor(ARRAYS[f"{name}__feat_train"]), **tolerance)
    (features * golden.tensor(ARRAYS[f"{name}__cotangent"])).sum().backward()
    grad_tolerance = {"rtol": 1e-3, "atol": 1e-4} if name == "resnet32" else tolerance
    grads, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    expected_grads = golden.part(ARRAYS, f"{name}__grad.")
    expected_buffers = golden.part(ARRAYS, f"{name}__after.")
    assert len(expected_grads) >= 2
    assert len(expected_buffers) >= 4
    for key, value in expected_grads.items():
        torch.testing.assert_close(grads[key].grad, golden.tensor(value), **grad_tolerance)
    for key, value in expected_buffers.items():
        torch.testing.assert_close(buffers[key], golden.tensor(value), **tolerance)


def deterministic_fill(net):
    """The golden file's rule: entry i of the state dict, flat element j, a sine of a sine (see its
    README)."""
    for i, tensor in enumerate(net.state_dict().values()):
        if not tensor.is_floating_point():
            continue
        key = list(net.state_dict())[i]
        j = torch.arange(tensor.numel(), dtype=torch.float64)
        s = torch.sin(43758.5453 * torch.sin(12.9898 * (j + 1) + 78.233 * (i + 1))).view(tensor.shape)
        if tensor.dim() == 4:
            fan_out = tensor.shape[0] * tensor.shape[2] * tensor.shape[3]
            s = s * 2**0.5 * (2 / fan_out) ** 0.5
        elif key.endswith(("weight", "running_var")):
            s = 1 + 0.1 * s
        else:
            s = 0.1 * s
        tensor.copy_(s)


@pytest.mark.evidence(
    "shared", "part", "resnet34, resnet56: features, evaluation and training mode",
    golden="backbones", dtype="float32", tolerance="1e-5 of the largest; training 2e-4",
)  # fmt: skip
@pytest.mark.parametrize("name", FILLED)
def test_golden_features_of_a_deterministic_fill(name):
    net = build_backbone(name)
    with torch.no_grad():
        deterministic_fill(net)
        shape = [int(n) for n in ARRAYS[f"{name}__det_shape"]]
        j = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        x = torch.sin(0.7 * j + 3 * torch.sin(0.013 * j)).view(shape).float()
        expected = golden.tensor(ARRAYS[f"{name}__det_feat_eval"])
        torch.testing.assert_close(net.eval()(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        expected = golden.tensor(ARRAYS[f"{name}__det_feat_train"])
        torch.testing.assert_close(net.train()(x), expected, rtol=0, atol=1e-4 if name == "resnet56" else 2e-4)


TORCHVISION = sorted(name for name in BACKBONES if hasattr(torchvision.models, name))


def test_every_resnet_of_torchvision_is_here():
    listed = {name for name in torchvision.models.list_models(torchvision.models) if "resne" in name}
    assert listed == set(TORCHVISION)


@pytest.mark.parametrize("name", TORCHVISION)
def test_resnets_have_torchvisions_names_and_shapes(name):
    with torch.device("meta"):
        ours, theirs = build_backbone(name), getattr(torchvision.models, name)()
    theirs.fc = nn.Identity()
    expected = {key: x.shape for key, x in theirs.state_dict().items()}
    assert list(ours.state_dict()) == list(expected)
    assert {key: x.shape for key, x in ours.state_dict().items()} == expected
    ours = [m for m in ours.modules() if isinstance(m, nn.Conv2d)]
    theirs = [m for m in theirs.modules() if isinstance(m, nn.Conv2d)]
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.stride, mine.padding, mine.groups) == (other.stride, other.padding, other.groups)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnext50_32x4d"])
def test_resnets_are_torchvisions_without_fc(name):
    ours, theirs = build_backbone(name), getattr(torchvision.models, name)()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 48, 40)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "dim", "stem", "stem_size", "parameters"),
    [
        ("conv4", {}, 64, 8, 32, 24_648),
        ("conv4", {"width": 2}, 128, 16, 32, 97_680),
        ("resnet8", {}, 64, 16, 32, 77_392),
        ("resnet32", {}, 64, 16, 32, 466_256),
        ("resnet56", {}, 64, 16, 32, 855_120),
        ("resnet8", {"width": 0.5}, 32, 8, 32, None),
        ("resnet18", {}, 512, 64, 16, 11_176_512),
        ("resnet18", {"stem": "cifar"}, 512, 64, 32, 11_176_512 - 64 * 3 * (49 - 9)),
        ("resnet18", {"stem": "small", "width": 0.25}, 128, 16, 32, None),
        ("resnet34", {}, 512, 64, 16, 21_284_672),
        ("resnet50", {}, 2048, 64, 16, 23_508_032),
        ("resnet101", {"stem": "cifar", "width": 0.125}, 256, 8, 32, None),
        ("resnext50_32x4d", {"stem": "small", "width": 0.5}, 1024, 32, 32, None),
        ("wide_resnet50_2", {"stem": "cifar", "width": 0.125}, 256, 8, 32, None),
    ],
)
def test_interface(name, options, dim, stem, stem_size, parameters):
    net = build_backbone(name, **options)
    x = torch.randn(2, 3, 32, 32)
    features, stem_map = net(x, return_stem=True)
    assert features.shape == (2, dim)
    assert stem_map.shape == (2, stem, stem_size, stem_size)
    assert (net.feature_dim, net.stem_channels) == (dim, stem)
    assert (stem_map >= 0).all()
    if parameters is not None:
        assert sum(p.numel() for p in net.parameters()) == parameters
    net.eval()
    assert torch.equal(net(x), net(x, return_stem=True)[0])


@pytest.mark.parametrize(("stem", "factor"), [("imagenet", 4), ("small", 2), ("cifar", 1)])
def test_stems_shrink_as_their_names_say(stem, factor):
    net = build_backbone("resnet18", stem=stem, width=0.125)
    sizes = []
    net.layer1.register_forward_hook(lambda module, args, out: sizes.append(out.shape[-1]))
    net(torch.randn(1, 3, 64, 64).repeat(2, 1, 1, 1))
    assert sizes == [64 // factor]


def test_odd_sizes_are_floored_in_conv4():
    assert build_backbone("conv4")(torch.randn(2, 3, 19, 25)).shape == (2, 64)


def test_initialisation():
    torch.manual_seed(0)
    net = build_backbone("resnet18")
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert abs(float(module.weight.detach().std()) / (2 / fan_out) ** 0.5 - 1) < 0.05, name
        elif isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all() and (module.bias == 0).all()), name
    torch.manual_seed(0)
    replaced = build_backbone("resnet18", stem="cifar").conv1.weight.detach()
    bound = (3 * 9) ** -0.5  # PyTorch's default: uniform, not normal
    assert float(replaced.abs().max()) <= bound
    assert abs(float(replaced.std()) / (bound / 3**0.5) - 1) < 0.05
    first = build_backbone("resnet8", width=32).conv1.weight.detach()  # no stem replaced: normal like the rest
    assert abs(float(first.std()) / (2 / (512 * 9)) ** 0.5 - 1) < 0.05
    assert float(first.abs().max()) > 3 * float(first.std())
    conv4 = build_backbone("conv4", width=8)
    assert abs(float(conv4.layer4.conv.weight.detach().std()) / (2 / (512 * 9)) ** 0.5 - 1) < 0.02
    torch.manual_seed(5)
    first = build_backbone("conv4").layer1.conv.weight
    torch.manual_seed(5)
    assert torch.equal(first, build_backbone("conv4").layer1.conv.weight)


@pytest.mark.parametrize("name", ["conv4", "resnet8", "resnet18"])
@pytest.mark.parametrize("kind", ["local", "split(2)"])
def test_channels_last_changes_the_layout_only(name, kind):
    torch.manual_seed(0)
    net = set_norm(build_backbone(name, width=0.25), kind).double()
    x = torch.randn(8, 3, 64, 64, dtype=torch.float64)  # large enough for a variance in the last stage
    expected = net(x)
    (expected * torch.arange(expected.numel()).view_as(expected)).sum().backward()
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net.to(memory_format=torch.channels_last)
    found = net(x.contiguous(memory_format=torch.channels_last))
    (found * torch.arange(found.numel()).view_as(found)).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for p, grad in zip(net.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_a_backbone_compiles_into_one_graph():
    net = set_norm(build_backbone("conv4"), "split(2)").double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    expected = net(x)
    net.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(net(x), expected)


def test_unknown_names_and_options_list_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown backbone: 'resnet-18'; did you mean 'resnet18'\? Known: conv4, "):
        build_backbone("resnet-18")
    with pytest.raises(ConfigError, match=r"unknown backbone: 'vit'\. Known: conv4, resnet8, .*, timm:<name>\.$"):
        build_backbone("vit")
    with pytest.raises(ConfigError, match=r"unknown option of backbone 'resnet8': 'stem'\. Known: width\."):
        build_backbone("resnet8", stem="cifar")
    with pytest.raises(ConfigError, match=r"unknown option of backbone 'resnet18': 'stemm'; did you mean 'stem'"):
        build_backbone("resnet18", stemm="cifar")
    with pytest.raises(ConfigError, match=r"unknown option of backbone 'conv4': 'stem'\. Known: width\."):
        build_backbone("conv4", stem="cifar")
    with pytest.raises(ConfigError, match=r"Unknown stem 'cifar10'\. Known: imagenet, cifar, small, cifar_padded\."):
        build_backbone("resnet18", stem="cifar10")
    for zero in (1, "no", None):
        with pytest.raises(ConfigError, match=f"zero_init_residual is true or false, got {zero!r}"):
            build_backbone("resnet18", zero_init_residual=zero)
    for width in (0, -1, 0.3, "2", True, None):
        with pytest.raises(ConfigError, match="whole number"):
            build_backbone("conv4", width=width)


# ---- timm


class StandIn(nn.Module):
    """What the wrapper uses of a timm model: pooled features, the list of maps, features and maps in one pass."""

    def __init__(self, size=16, width=4):
        super().__init__()
        self.size, self.num_features, self.head_hidden_size = size, 99, width
        self.conv = nn.Conv2d(3, width, 3, stride=2)
        self.feature_info = [{"num_chs": width, "reduction": 2, "module": "conv"}]

    def forward_intermediates(self, x, indices, output_fmt):
        if x.shape[-1] != self.size:
            raise AssertionError(f"Input height ({x.shape[-2]}) doesn't match model ({self.size}).")
        assert (indices, output_fmt) == ([0], "NCHW")
        stem = self.conv(x)
        return 2 * stem, [stem]

    def forward_head(self, x):
        return x.mean((2, 3))

    def forward(self, x):
        return self.forward_head(self.forward_intermediates(x, [0], "NCHW")[0])


@pytest.fixture
def stand_in(monkeypatch):
    """A timm with one model; the tests with the real one need the extra `export`."""

    def create_model(name, pretrained, num_classes, **options):
        assert (name, pretrained, num_classes) == ("little_net", False, 0)
        return StandIn(**options)

    names = ["little_net", "vit_tiny_patch16_224"]
    module = SimpleNamespace(__version__="1", is_model=names.__contains__, list_models=lambda: names)
    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)


@pytest.mark.usefixtures("stand_in")
def test_a_timm_model_has_the_interface_of_a_backbone():
    net = build_backbone("timm:little_net", width=6)
    features, stem = net(torch.ones(2, 3, 16, 16), return_stem=True)
    assert features.shape == (2, net.feature_dim) == (2, 6)
    assert stem.shape == (2, net.stem_channels, 7, 7)
    assert torch.equal(net(torch.ones(2, 3, 16, 16)), features)
    assert list(net.state_dict()) == ["net.conv.weight", "net.conv.bias"]


@pytest.mark.usefixtures("stand_in")
def test_what_timm_refuses_is_an_error_of_the_config():
    with pytest.raises(ConfigError, match=r"timm 1 has no model 'litle_net'; did you mean little_net\?"):
        build_backbone("timm:litle_net")
    with pytest.raises(ConfigError, match=r"timm 1 has no model 'hf-hub:someone/else'\. "):
        build_backbone("timm:hf-hub:someone/else")
    with pytest.raises(ConfigError, match=r"takes no option 'pretrained'"):
        build_backbone("timm:little_net", pretrained=True)
    with pytest.raises(ConfigError, match=r"timm refuses .*'depth': 3.* of 'little_net': .*unexpected keyword"):
        build_backbone("timm:little_net", depth=3)
    net = build_backbone("timm:little_net")
    for return_stem in (False, True):
        with pytest.raises(ConfigError, match=r"images of \(8, 8\) pixels: Input height .* img_size"):
            net(torch.ones(2, 3, 8, 8), return_stem=return_stem)


@pytest.mark.usefixtures("stand_in")
def test_a_timm_model_without_a_map_says_so_when_one_is_asked_for():
    net = build_backbone("timm:little_net")
    net.net.forward_intermediates = lambda x, indices, output_fmt: (x, [x.flatten(2)])
    with pytest.raises(ConfigError, match=r"'little_net' gives \(2, 3, 256\), not a stem map"):
        net(torch.ones(2, 3, 16, 16), return_stem=True)
    net.net.feature_info = []
    with pytest.raises(ConfigError, match="gives no stem map"):
        net.stem_channels  # noqa: B018


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"need timm, .* extra `export`: pip install relssl\[export\]"):
        build_backbone("timm:resnet18")


@pytest.mark.parametrize(
    ("name", "options", "dim", "stem"),
    [
        ("resnet10t", {}, 512, (64, 16)),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4, "depth": 2}, 192, (192, 8)),
        ("convnext_atto", {"depths": (1, 1, 1, 1)}, 320, (40, 8)),
        ("mobilenetv3_small_050", {}, 1024, (16, 16)),  # its num_features is not what it returns
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "window_size": 4, "depths": (1, 1, 1, 1)}, 768, (96, 8)),
    ],
)
def test_models_of_the_real_timm(name, options, dim, stem):
    timm = pytest.importorskip("timm", reason="timm is not installed (extra `export`)")
    torch.manual_seed(0)
    net = build_backbone(f"timm:{name}", **options)
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=0, **options)
    assert {key.removeprefix("net."): x for key, x in net.state_dict().items()}.keys() == theirs.state_dict().keys()
    theirs.load_state_dict({key.removeprefix("net."): x for key, x in net.state_dict().items()})
    x = torch.randn(2, 3, 32, 32)
    net.eval()
    features, stem_map = net(x, return_stem=True)
    assert torch.equal(features, net(x))
    assert torch.equal(features, theirs.eval()(x))
    assert features.shape == (2, dim) == (2, net.feature_dim)
    assert stem_map.shape == (2, *stem, stem[1])
    assert net.stem_channels == stem[0]


def test_errors_of_the_real_timm():
    pytest.importorskip("timm", reason="timm is not installed (extra `export`)")
    with pytest.raises(ConfigError, match=r"has no model 'vit_tiny_patch16'; did you mean .*vit_tiny_patch16_224"):
        build_backbone("timm:vit_tiny_patch16")
    with pytest.raises(ConfigError, match=r"timm refuses the options .*unexpected keyword argument 'width'"):
        build_backbone("timm:resnet10t", width=2)
    with pytest.raises(ConfigError, match=r"images of \(32, 32\) pixels"):
        build_backbone("timm:vit_tiny_patch16_224", depth=1)(torch.zeros(1, 3, 32, 32))


# ---- heads


def test_head():
    head = MLPHead(6, 10, 4)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "linear1.weight": (10, 6),
        "linear1.bias": (10,),
        "linear2.weight": (4, 10),
        "linear2.bias": (4,),
    }
    x = torch.randn(3, 6)
    hidden = (x @ head.linear1.weight.T + head.linear1.bias).clamp(min=0)
    torch.testing.assert_close(head(x), hidden @ head.linear2.weight.T + head.linear2.bias)
