"""LARS, parameter groups and schedules against the originals' numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.errors import ConfigError
from relssl.nets import build_backbone, ema_update
from relssl.optim import (
    Lars,
    build_optimizer,
    constant,
    cosine_ema,
    exponential,
    multistep,
    parameter_groups,
    scale_lr,
    warmup_cosine,
)
from tests.relssl import golden

LARS = golden.load("wcl_lars")


class Named(nn.Module):
    """Parameters under the golden file's names (dots become levels)."""

    def __init__(self, names, values):
        super().__init__()
        for name, value in zip(names, values, strict=True):
            module = self
            *path, leaf = str(name).split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(leaf, nn.Parameter(golden.tensor(value)))


@pytest.mark.evidence(
    "wcl", "part", "LARS: parameters and momentum after every step, and which parameters it leaves alone",
    golden="wcl_lars", dtype="float32", tolerance="1e-5",
)  # fmt: skip
@pytest.mark.parametrize("prefix", golden.cases(LARS))
def test_golden_lars(prefix):
    case = golden.part(LARS, prefix)
    names = [str(name) for name in case["names"]]
    net = Named(names, [case[f"p{k}_init"] for k in range(len(names))])
    parameters = dict(net.named_parameters())
    groups = parameter_groups(net, float(case["weight_decay"]), exclude="by_name")
    excluded = {id(p) for group in groups if not group["lars"] for p in group["params"]}
    assert [id(parameters[name]) in excluded for name in names] == case["excluded"].astype(bool).tolist()
    optimizer = build_optimizer(
        "lars",
        groups,
        lr=1.0,
        momentum=float(case["momentum"]),
        trust_coefficient=float(case["trust_coef"]),
        eps=float(case["eps"]),
    )
    for step, lr in enumerate(case["lr"]):
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        for k, name in enumerate(names):
            parameters[name].grad = golden.tensor(case[f"p{k}_grad"][step])
        optimizer.step()
        for k, name in enumerate(names):
            p = parameters[name]
            for found, key in ((p.detach(), "after"), (optimizer.state[p]["momentum_buffer"], "momentum")):
                expected = golden.tensor(case[f"p{k}_{key}"][step])
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_lars_leaves_gradients_alone_and_skips_what_has_none():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    a.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer = Lars([{"params": [a, b], "weight_decay": 0.1}], lr=0.5)
    optimizer.step()
    assert a.grad.tolist() == [1, 2, 3]
    assert b.tolist() == [1, 1, 1]
    assert b not in optimizer.state
    assert not torch.equal(a, b)
    assert float(optimizer.step(lambda: torch.tensor(4.0))) == 4.0


def test_lars_state_survives_saving():
    def train(steps, state=None):
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        optimizer = Lars(net.parameters(), lr=0.1, weight_decay=0.01)
        if state is not None:
            net.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        for step in steps:
            net(torch.full((1, 3), float(step))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return net.state_dict(), optimizer.state_dict()

    whole = train(range(4))[0]
    resumed = train(range(2, 4), train(range(2)))[0]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    "bad",
    [{"lr": -1.0}, {"momentum": 1.0}, {"momentum": -0.1}, {"eps": -1.0}, {"weight_decay": float("nan")}],
)
def test_lars_refuses(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Lars([nn.Parameter(torch.ones(1))], **{"lr": 0.1, **bad})


# ---- groups and optimizers


def test_by_name_decays_the_norm_scales_of_downsample_branches():
    """The originals' rule for ReSSL: 4 such tensors in a ResNet-50, 3 in a ResNet-18."""
    for name, count in (("resnet50", 4), ("resnet18", 3)):
        net = build_backbone(name)
        names = {id(p): n for n, p in net.named_parameters()}
        decayed, excluded = parameter_groups(net, 1e-4, "by_name")
        scales = [names[id(p)] for p in decayed["params"] if p.ndim == 1]
        assert len(scales) == count
        assert all(n.endswith("downsample.1.weight") for n in scales)
        assert (decayed["weight_decay"], decayed["lars"]) == (1e-4, True)
        assert (excluded["weight_decay"], excluded["lars"]) == (0.0, False)
        assert all("bn" in names[id(p)] or "bias" in names[id(p)] for p in excluded["params"])
        assert len(decayed["params"]) + len(excluded["params"]) == len(names)
        order = list(names)
        for group in (decayed, excluded):
            places = [order.index(id(p)) for p in group["params"]]
            assert places == sorted(places)


def test_the_other_rules():
    net = build_backbone("conv4")
    (everything,) = parameter_groups(net, 5e-4, "none")
    assert len(everything["params"]) == 12
    decayed, excluded = parameter_groups(net, 5e-4, "1d")
    assert {p.ndim for p in decayed["params"]} == {4}
    assert {p.ndim for p in excluded["params"]} == {1}
    net.layer1.requires_grad_(False)
    assert len(parameter_groups(net, 5e-4)[0]["params"]) == 9
    (only,) = parameter_groups(nn.Linear(2, 2, bias=False), 0.1, "1d")
    assert only["weight_decay"] == 0.1


def test_groups_refuse():
    net = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"Unknown exclusion 'name'\. Known: none, by_name, 1d\."):
        parameter_groups(net, 0.1, "name")
    with pytest.raises(ConfigError, match="weight_decay must be at least 0"):
        parameter_groups(net, -0.1)
    with pytest.raises(ConfigError, match="nothing to train"):
        parameter_groups(net.requires_grad_(False), 0.1)


def test_build_optimizer():
    net = nn.Linear(2, 2)
    groups = parameter_groups(net, 0.1, "1d")
    sgd = build_optimizer("sgd", groups, lr=0.3, nesterov=True)
    assert isinstance(sgd, torch.optim.SGD)
    assert [g["weight_decay"] for g in sgd.param_groups] == [0.1, 0.0]
    assert {(g["lr"], g["momentum"], g["nesterov"], g["dampening"]) for g in sgd.param_groups} == {(0.3, 0.9, True, 0)}
    assert type(build_optimizer("adam", groups, lr=0.1)) is torch.optim.Adam
    adamw = build_optimizer("adamw", groups, lr=0.1, betas=[0.8, 0.9])
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["betas"] == (0.8, 0.9)
    assert "lr" not in groups[0]  # the caller's groups are not written to
    for name in ("sgd", "adam", "adamw", "lars"):
        optimizer = build_optimizer(name, groups, lr=0.1)
        net(torch.ones(1, 2)).sum().backward()
        before = net.weight.clone()
        optimizer.step()
        assert not torch.equal(net.weight, before)


def test_build_optimizer_refuses():
    groups = parameter_groups(nn.Linear(2, 2), 0.1)
    with pytest.raises(ConfigError, match=r"unknown optimizer: 'adan'; did you mean .*Known: sgd, lars, adam, adamw"):
        build_optimizer("adan", groups, lr=0.1)
    with pytest.raises(ConfigError, match=r"unknown option of optimizer 'sgd': 'momentun'; did you mean 'momentum'"):
        build_optimizer("sgd", groups, lr=0.1, momentun=0.9)
    with pytest.raises(ConfigError, match="unknown option of optimizer 'adam': 'momentum'"):
        build_optimizer("adam", groups, lr=0.1, momentum=0.9)
    for name in ("sgd", "lars", "adam", "adamw"):
        with pytest.raises(ConfigError, match=f"Optimizer '{name}' refused its settings"):
            build_optimizer(name, groups, lr=-0.1)


# ---- schedules


def learning_rates(method):
    what = "learning rate of every step of a training"
    return pytest.mark.evidence(method, "part", what, golden=f"{method}_lr", dtype="float64", tolerance="1e-12")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("ressl_lr", marks=learning_rates("ressl")),
        pytest.param("wcl_lr", marks=learning_rates("wcl")),
    ],
)
def test_golden_learning_rates(name):
    arrays = golden.load(name)
    for prefix in golden.cases(arrays):
        case = golden.part(arrays, prefix)
        steps_per_epoch = int(case["iters_per_epoch"])
        total = int(case["epochs"]) * steps_per_epoch
        found = [
            warmup_cosine(
                step,
                base=float(case["base_lr"]),
                final=0.0,
                warmup_steps=int(case["warmup_epochs"]) * steps_per_epoch,
                total_steps=total,
            )
            for step in range(total)
        ]
        np.testing.assert_allclose(found, case["lr"], rtol=1e-12, atol=0)
        if "global_batch" in case:
            scaled = scale_lr(0.075, int(case["global_batch"]), "sqrt")
            np.testing.assert_allclose(scaled, case["base_lr"], rtol=1e-12)


@pytest.mark.evidence(
    "resa", "part", "learning rate and momentum of the teacher for every step of a training",
    golden="resa_schedules", dtype="float64", tolerance="1e-12",
)  # fmt: skip
def test_golden_resa_schedules():
    arrays = golden.load("resa_schedules")
    for prefix in sorted({key.split("__")[0] + "__" for key in arrays}):
        case = golden.part(arrays, prefix)
        steps_per_epoch = int(case["niter_per_epoch"])
        total = int(case["epochs"]) * steps_per_epoch
        lr = [
            warmup_cosine(
                step,
                base=float(case["base_lr"]),
                final=float(case["final_lr"]),
                warmup_steps=int(case["warmup_epochs"]) * steps_per_epoch,
                total_steps=total,
                inclusive_warmup=True,
            )
            for step in range(total)
        ]
        np.testing.assert_allclose(lr, case["lr"], rtol=1e-12, atol=1e-15)
        momentum = [cosine_ema(step, base=float(case["base_momentum"]), total_steps=total) for step in range(total)]
        np.testing.assert_allclose(momentum, case["momentum"], rtol=1e-12)


PLACES = {
    "conv.weight": "res_net/~/conv/w",
    "norm.weight": "res_net/~/initial_batchnorm/scale",
    "norm.bias": "res_net/~/initial_batchnorm/offset",
    "linear.weight": "projector/linear/w",
    "linear.bias": "projector/linear/b",
    "zero.weight": "projector/linear_zero/w",
}


class Tree(nn.Module):
    """The modules of the golden file's trees, with PyTorch's names and shapes."""

    def __init__(self, arrays, tree):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.linear, self.zero = nn.Linear(8, 6), nn.Linear(6, 4, bias=False)
        with torch.no_grad():
            for p, value in zip(self.parameters(), self.stored(arrays, tree), strict=True):
                p.copy_(value)

    def stored(self, arrays, tree):
        """What the file holds for each parameter: HWIO becomes OIHW, (in, out) becomes (out, in)."""
        for name, p in self.named_parameters():
            value = golden.tensor(arrays[f"{tree}/{PLACES[name]}"])
            value = value.permute(3, 2, 0, 1) if p.ndim == 4 else value.T if p.ndim == 2 else value
            yield value.reshape(p.shape)


@pytest.mark.evidence(
    "relicv2", "part", "LARS, learning rate, and the target after every step, on given gradients",
    golden="relicv2_optim", dtype="float32", tolerance="1e-6 of the largest entry",
)  # fmt: skip
def test_golden_relicv2_optimizer_and_target():
    arrays = golden.load("relicv2_optim")
    about = {key: value.item() for key, value in arrays.items() if value.ndim == 0}
    steps = {"warmup_steps": int(about["warmup_steps"]), "total_steps": int(about["total_steps"])}
    online, target = Tree(arrays, "params0"), Tree(arrays, "target0")
    optimizer = build_optimizer(
        "lars",
        parameter_groups(online, about["weight_decay"], exclude="1d"),
        lr=0.0,
        momentum=about["momentum"],
        trust_coefficient=about["eta"],
    )
    base = scale_lr(about["base_learning_rate"], int(about["batch_size"]), "linear")
    rates = [warmup_cosine(step, base=base, final=0.0, **steps) for step in range(len(arrays["lr"]))]
    np.testing.assert_allclose(rates, arrays["lr"], rtol=1e-6, atol=1e-9)
    momenta = [
        cosine_ema(step, base=about["base_ema"], total_steps=steps["total_steps"]) for step in range(len(arrays["ema"]))
    ]
    np.testing.assert_allclose(momenta, arrays["ema"], rtol=1e-6)
    count = len({key.split("/")[0] for key in arrays if key.startswith("grads")})
    assert count > 1
    for step in range(count):
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        for p, gradient in zip(online.parameters(), online.stored(arrays, f"grads{step}"), strict=True):
            p.grad = gradient.clone()
        optimizer.step()
        ema_update(target, online, momenta[step])
        for tree, net in ((f"params{step + 1}", online), (f"target{step + 1}", target)):
            for (name, p), expected in zip(net.named_parameters(), net.stored(arrays, tree), strict=True):
                limit = 1e-6 * max(float(expected.abs().max()), 0.1)  # 1 - momentum is a small float32 in the original
                assert (p.detach() - expected).abs().max() <= limit, f"{tree}/{name}"


def test_schedules_at_their_corners():
    curve = {"base": 1.0, "final": 0.1, "warmup_steps": 4, "total_steps": 10}
    assert warmup_cosine(0, **curve) == 0
    assert warmup_cosine(4, **curve) == 1
    assert warmup_cosine(10, **curve) == pytest.approx(0.1)
    assert warmup_cosine(99, **curve) == pytest.approx(0.1)
    assert warmup_cosine(3, **curve, inclusive_warmup=True) == 1
    assert warmup_cosine(0, base=1.0, final=0.0, warmup_steps=1, total_steps=5, inclusive_warmup=True) == 0
    assert warmup_cosine(0, base=1.0, final=0.0, warmup_steps=0, total_steps=5) == 1
    assert warmup_cosine(2, base=1.0, final=0.0, warmup_steps=4, total_steps=4) == 0.5
    assert warmup_cosine(4, base=1.0, final=0.0, warmup_steps=4, total_steps=4) == pytest.approx(0)
    assert constant(7, base=0.3) == 0.3
    steps = [multistep(s, base=1.0, milestones=(2, 4), gamma=0.5) for s in range(6)]
    assert steps == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert exponential(0, base=1e-2, final=1e-6, total_steps=4) == 1e-2
    assert exponential(2, base=1e-2, final=1e-6, total_steps=4) == pytest.approx(1e-4)
    assert exponential(4, base=1e-2, final=1e-6, total_steps=4) == pytest.approx(1e-6)
    assert cosine_ema(10, base=0.996, total_steps=10) == pytest.approx(1)


def test_scale_lr():
    assert scale_lr(0.05, 1024) == 0.05
    assert scale_lr(0.5, 1024, "linear") == 2.0
    assert scale_lr(0.075, 4096, "sqrt") == pytest.approx(4.8)
    with pytest.raises(ConfigError, match=r"Unknown lr scaling 'square'\. Known: none, linear, sqrt\."):
        scale_lr(0.1, 256, "square")
