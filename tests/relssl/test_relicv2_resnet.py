"""ReLICv2's encoder against the original Haiku networks, weights converted by the specified map of names."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from relssl.nets import build_backbone
from relssl.nets.resnet import BasicBlock, Bottleneck, ResNet, SameConv2d, SameMaxPool2d
from tests.relssl import golden

ARRAYS = golden.load("relicv2_resnet")
CASES = sorted({key.split("/")[0] for key in ARRAYS})
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORM = {"scale": "weight", "offset": "bias"}


def torch_name(module: str) -> str:
    """`tiny_res_net/~/block_group_1/~/block_0/~/conv_1` -> `layer2.0.conv2`."""
    parts = module.split("/~/")[1:]
    if parts[0].startswith("initial"):
        return "conv1" if parts[0] == "initial_conv" else "bn1"
    group, block, kind = int(parts[0][-1]), int(parts[1].rpartition("_")[2]), parts[2]
    prefix = f"layer{group + 1}.{block}."
    if kind.startswith("shortcut"):
        return prefix + ("downsample.0" if kind == "shortcut_conv" else "downsample.1")
    return prefix + ("conv" if kind.startswith("conv") else "bn") + str(int(kind[-1]) + 1)


def state_of(case: str, part: str) -> dict[str, Tensor]:
    state = {}
    for key, value in golden.part(ARRAYS, f"{case}/{part}/").items():
        module, _, name = key.rpartition("/")
        if name == "w":
            state[f"{torch_name(module)}.weight"] = golden.tensor(value.transpose(3, 2, 0, 1))
        elif name in NORM:
            state[f"{torch_name(module)}.{NORM[name]}"] = golden.tensor(value.reshape(-1))
        elif name == "average":
            module, _, moment = module.rpartition("/~/")
            moment = {"mean_ema": "running_mean", "var_ema": "running_var"}[moment]
            state[f"{torch_name(module)}.{moment}"] = golden.tensor(value.reshape(-1))
    return state


def original(case: str, *, same: bool = True) -> ResNet:
    """The network of the recorded shapes with the recorded weights."""
    state = {**state_of(case, "params"), **state_of(case, "state")}
    bottleneck = "layer1.0.conv3.weight" in state
    expansion = 4 if bottleneck else 1
    outputs = [len(state[f"layer{i}.0.conv{3 if bottleneck else 2}.weight"]) for i in range(1, 5)]
    depths = [len({k.split(".")[1] for k in state if k.startswith(f"layer{i}.")}) for i in range(1, 5)]
    block = partial(Bottleneck if bottleneck else BasicBlock, same=same)
    net = ResNet(
        block, depths, expansion=expansion, haiku=same,
        channels=[len(state["conv1.weight"]), *(out // expansion for out in outputs)],
    )  # fmt: skip
    counters = {key: value for key, value in net.state_dict().items() if key.endswith("num_batches_tracked")}
    if same:
        net.load_state_dict({**state, **counters})
    else:
        net.load_state_dict(state, strict=False)
    return net


def images(case: str, number: int) -> Tensor:
    x = golden.tensor(ARRAYS[f"{case}/images{number}"]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


@pytest.mark.evidence(
    "relicv2", "part", "features of the original's encoder, evaluation mode, even and odd sides",
    golden="relicv2_resnet", dtype="float32", tolerance="1e-5 of the largest feature",
)  # fmt: skip
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_features_equal_the_originals(case: str, number: int) -> None:
    net = original(case).eval()
    with torch.no_grad():
        features = net(images(case, number)).numpy()
    wanted = ARRAYS[f"{case}/features{number}"]
    assert np.abs(features - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("case", CASES)
def test_training_features_equal_the_originals(case: str) -> None:
    net = original(case).train()
    with torch.no_grad():
        features = net(images(case, 0)).numpy()
    wanted = ARRAYS[f"{case}/features0_train"]
    assert np.abs(features - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_torchvisions_padding_would_not_do() -> None:
    """The network that ignores how TensorFlow pads is far off: the difference is worth its classes."""
    case = next(case for case in CASES if f"{case}/features0" in ARRAYS)
    with torch.no_grad():
        features = original(case, same=False).eval()(images(case, 0)).numpy()
    wanted = ARRAYS[f"{case}/features0"]
    assert np.abs(features - wanted).max() > 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("side", [7, 8, 9, 224])
@pytest.mark.parametrize(("size", "stride"), [(3, 2), (7, 2), (3, 1), (5, 3)])
def test_same_padding_rounds_up(side: int, size: int, stride: int) -> None:
    """out = ceil(n / s); total = max((out - 1) s + k - n, 0), the odd pixel after the image."""
    x = torch.arange(side, dtype=torch.float32).repeat(1, 1, side, 1)
    conv = SameConv2d(1, 1, size, stride, bias=False)
    torch.nn.init.zeros_(conv.weight)
    conv.weight.data[0, 0, size // 2] = 1  # sums along one line of the image
    out = -(-side // stride)
    before = max((out - 1) * stride + size - side, 0) // 2
    row = [
        sum(float(x[0, 0, 0, c]) for c in range(i * stride - before, i * stride - before + size) if 0 <= c < side)
        for i in range(out)
    ]
    assert conv(x).shape[-2:] == (out, out)
    assert conv(x)[0, 0, out // 2].tolist() == row
    pooled = SameMaxPool2d(size, stride)(-x - 1)[0, 0, 0]  # a padding of zeros would win
    assert pooled.tolist() == [-max(i * stride - before, 0) - 1 for i in range(out)]


@pytest.mark.parametrize(("width", "features"), [(1, 2048), (2, 4096)])
def test_width_multiplies_every_channel(width: int, features: int) -> None:
    with torch.device("meta"):
        net = build_backbone("relicv2_resnet50", width=width)
    assert net.feature_dim == features
    assert net.layer1[0].conv2.weight.shape == (64 * width, 64 * width, 3, 3)


def test_it_starts_as_haiku_does() -> None:
    torch.manual_seed(0)
    net = build_backbone("relicv2_resnet18")
    weight = net.layer4[1].conv2.weight
    bound = 2 * weight[0].numel() ** -0.5
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.99 * bound
    assert "layer1.0.downsample.0.weight" in net.state_dict()  # a projection where torchvision has none
    assert (net.layer1[0].bn2.weight == 1).all()
    with torch.device("meta"):
        names = dict(build_backbone("relicv2_resnet50").named_parameters())
    assert sum(p.numel() for p in names.values()) == 23_508_032
    assert len([name for name in names if "bn" not in name and "downsample.1" not in name]) == 53
    assert (build_backbone("resnet50", zero_init_residual=True).layer1[0].bn3.weight == 0).all()
    assert (build_backbone("resnet18", zero_init_residual=True).layer1[0].bn2.weight == 0).all()


def test_resas_cifar_stem_has_a_border() -> None:
    net = build_backbone("resnet18", stem="cifar_padded").eval()
    _, stem = net(torch.zeros(2, 3, 32, 32), return_stem=True)
    assert stem.shape == (2, 64, 34, 34)
    assert sum(p.numel() for p in net.parameters()) == 11_168_832
