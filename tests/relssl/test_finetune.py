"""Fine-tuning against a plain loop with torch's layers, optimizers and schedules; protocols, seeds, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pipelines.errors import ConfigError, InputError, RunError
from relssl.evaluators.finetune import FINETUNE_PROTOCOLS, FinetuneProtocol, finetune, finetune_protocol
from relssl.evaluators.linear import cached_batches

NUM_CLASSES, DIM, SIDE = 5, 6, 4


class Small(nn.Module):
    """A convolution, batch normalisation and dropout: everything that differs between training and testing."""

    feature_dim = DIM

    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, DIM, 3), nn.BatchNorm2d(DIM)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.norm(self.conv(x)).relu().mean(dim=(2, 3)))


def small(**options):
    torch.manual_seed(5)
    return Small(**options)


def broken():
    net = small()
    torch.nn.init.constant_(net.conv.bias, torch.nan)
    return net


def pictures(n, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % NUM_CLASSES
    base = torch.randn(NUM_CLASSES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(77))
    return base[labels] + 0.7 * torch.randn(n, 3, SIDE, SIDE, generator=generator), labels


def batches_of(images, labels, size, seed=0):
    """Whole images in the order that cached features would have."""
    order = cached_batches(torch.arange(1.0, len(images) + 1)[:, None], labels, size, seed)
    return lambda epoch: ((images[x[:, 0].long() - 1], y) for x, y in order(epoch)), len(order)


def run(protocol, *, seed=0, backbone=None, train=None, test=None, **changes):
    images, labels = train or pictures(40, 1)
    batches, count = batches_of(images, labels, protocol.batch_size)
    test = test or pictures(30, 2)
    call = {
        "backbone": backbone or small(),
        "train_batches": batches,
        "num_batches_per_epoch": count,
        "test_batches": lambda: [(test[0][:20], test[1][:20]), (test[0][20:], test[1][20:])],
        "feature_dim": DIM,
        "num_classes": NUM_CLASSES,
        "protocol": protocol,
        "seed": seed,
        "device": "cpu",
    } | changes
    return finetune(**call)


@pytest.mark.parametrize(
    "protocol",
    [
        FinetuneProtocol(lr_backbone=0.1, lr_head=0.5, epochs=3, batch_size=16, select="last"),
        FinetuneProtocol(
            lr_backbone=2.0, lr_head=8.0, lr_scaling="linear", epochs=4, batch_size=16, schedule="cosine_epochs",
            nesterov=True, weight_decay=1e-3, select="last",
        ),
        FinetuneProtocol(
            optimizer="adam", lr_backbone=1e-2, lr_head=1e-3, momentum=0, weight_decay=1e-2, epochs=4, batch_size=16,
            schedule="drops", drops=(0.5, 0.75), select="last",
        ),
    ],
    ids=["cosine", "epochs", "drops"],
)  # fmt: skip
def test_equals_a_plain_loop(protocol):
    """The same first weights, torch's optimizers with two groups, its schedulers, train mode in training."""
    still = run(protocol.model_copy(update={"lr_backbone": 0.0, "lr_head": 0.0, "weight_decay": 0.0}))
    model, head = small(), nn.Linear(DIM, NUM_CLASSES)
    head.load_state_dict({"weight": still.weight, "bias": still.bias})
    factor = protocol.batch_size / 256 if protocol.lr_scaling == "linear" else 1
    groups = [
        {"params": model.parameters(), "lr": protocol.lr_backbone * factor},
        {"params": head.parameters(), "lr": protocol.lr_head * factor},
    ]
    if protocol.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, weight_decay=protocol.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            groups, momentum=0.9, nesterov=protocol.nesterov, weight_decay=protocol.weight_decay
        )
    batches, count = batches_of(*pictures(40, 1), protocol.batch_size)
    schedule = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, protocol.epochs * count),
        "cosine_epochs": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, protocol.epochs),
        "drops": lambda: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3], 0.1),
    }[protocol.schedule]()
    model.train()
    for epoch in range(protocol.epochs):
        for x, y in batches(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(model(x)), y).backward()
            optimizer.step()
            if protocol.schedule == "cosine":
                schedule.step()
        if protocol.schedule != "cosine":
            schedule.step()
    found = run(protocol)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(found.backbone.state_dict()[key], value, rtol=0, atol=2e-6)
    torch.testing.assert_close(found.weight, head.weight.detach(), rtol=0, atol=2e-6)
    test_x, test_y = pictures(30, 2)
    hit = (head(model.eval()(test_x)).argmax(1) == test_y).float().mean()
    assert found.top1 == pytest.approx(100 * float(hit))
    assert found.top5 == 100  # of five classes


def test_the_statistics_of_normalisation_move_and_the_given_backbone_does_not():
    backbone = small().eval().requires_grad_(False)
    before = copy.deepcopy(backbone.state_dict())
    found = run(FinetuneProtocol(lr_backbone=0.1, lr_head=0.1, epochs=2, batch_size=16), backbone=backbone)
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert not torch.equal(found.backbone.norm.running_mean, before["norm.running_mean"])
    assert not torch.equal(found.backbone.conv.weight, before["conv.weight"])
    assert not found.backbone.training


def test_the_seed_decides_everything_and_global_randomness_is_untouched():
    protocol = FinetuneProtocol(lr_backbone=0.1, lr_head=0.3, epochs=2, batch_size=8)
    backbone = small(dropout=0.5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run(protocol, seed=4, backbone=backbone)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = run(protocol, seed=4, backbone=backbone), run(protocol, seed=5, backbone=backbone)
    assert torch.equal(first.backbone.conv.weight, again.backbone.conv.weight)
    assert first.curve == again.curve
    assert not torch.equal(first.backbone.conv.weight, other.backbone.conv.weight)


def test_best_and_last():
    """A protocol that reports the last epoch is tested once; one that reports the best keeps its weights."""
    noisy = FinetuneProtocol(lr_backbone=3.0, lr_head=20.0, schedule="constant", epochs=10, batch_size=8)
    best = run(noisy)
    tops = [record["top1"] for record in best.curve]
    assert tops[-1] < max(tops) == best.top1
    assert best.best["epoch"] == tops.index(max(tops)) + 1
    test_x, test_y = pictures(30, 2)
    logits = best.backbone(test_x) @ best.weight.T + best.bias
    assert 100 * float((logits.argmax(1) == test_y).float().mean()) == pytest.approx(best.top1)
    calls = []

    def test_batches():
        calls.append(1)
        return [pictures(30, 2)]

    last = run(noisy.model_copy(update={"select": "last"}), test_batches=test_batches)
    assert len(calls) == 1
    assert "top1" not in last.curve[0]
    assert last.top1 == last.last["top1"] == tops[-1]


def test_named_protocols_are_what_the_authors_wrote():
    resa = finetune_protocol("resa")
    assert (resa.lr_backbone, resa.lr_head, resa.lr_scaling, resa.epochs, resa.batch_size) == (
        2e-4, 40.0, "linear", 20, 256,
    )  # fmt: skip
    assert (resa.momentum, resa.nesterov, resa.weight_decay, resa.init_std, resa.zero_bias) == (
        0.9,
        False,
        0,
        0.01,
        True,
    )
    assert (resa.schedule, resa.select, resa.augment) == ("cosine_epochs", "best", True)
    assert resa.rates_at(0, 7) == resa.rates_at(6, 7) == (2e-4, 40.0)
    assert resa.rates_at(70, 7) == pytest.approx((1e-4, 20.0))
    relational = finetune_protocol("relational")
    assert (relational.optimizer, relational.weight_decay, relational.augment) == ("adam", 1e-5, False)
    assert [relational.rates_at(epoch, 1)[0] for epoch in (0, 49, 50, 74, 75)] == pytest.approx(
        [1e-3, 1e-3, 1e-4, 1e-4, 1e-5]
    )
    assert [relational.rates_at(epoch, 1)[1] for epoch in (0, 50)] == pytest.approx([1e-4, 1e-5])
    released = finetune_protocol("relational_as_released")
    assert released.rates_at(99, 1) == (1e-3, 1e-4)
    relicv2 = finetune_protocol("relicv2")
    assert relicv2.rates_at(0, 3) == pytest.approx((1.2, 1.2))
    assert (relicv2.nesterov, relicv2.epochs, relicv2.batch_size, relicv2.drop_last) == (True, 100, 1024, True)
    assert all(finetune_protocol(name).name == name for name in FINETUNE_PROTOCOLS)
    assert finetune_protocol("resa", epochs=3).name == "resa (changed)"
    short = finetune_protocol("relational", epochs=9)
    assert [short.rates_at(epoch, 1)[0] for epoch in (3, 4, 5, 6)] == pytest.approx([1e-3, 1e-4, 1e-4, 1e-5])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rsa", {}, "unknown fine-tuning protocol: 'rsa'; did you mean 'resa'"),
        ("resa", {"lr": 3}, "unknown setting of a fine-tuning protocol: 'lr'"),
        ("resa", {"epochs": 0}, "epochs: .*got 0"),
        ("resa", {"drops": (0.5,)}, "drops belong to schedule: drops"),
        ("relational", {"drops": (0.75, 0.5)}, "increasing"),
        ("relational", {"momentum": 0.9}, "momentum"),
        ("resa", {"momentum": 0, "nesterov": True}, "nesterov"),
    ],
)
def test_bad_protocols_are_named(name, change, message):
    with pytest.raises(ConfigError, match=message):
        finetune_protocol(name, **change)


QUICK = FinetuneProtocol(lr_backbone=0.01, lr_head=0.1, epochs=1, batch_size=16)
IMAGES, LABELS = pictures(40, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: run(QUICK, train_batches=lambda epoch: [(IMAGES, LABELS - 1)]), InputError, "no label"),
        (lambda: run(QUICK, test=(IMAGES, LABELS - 1)), InputError, "no label"),
        (
            lambda: run(QUICK, train=(IMAGES[:33], LABELS[:33])),
            InputError,
            "batch 3 of epoch 1 has 1 image, and batch statistics need two; leave a rest of one image out",
        ),
        (lambda: run(QUICK, num_classes=4), InputError, "label 4 found, but there are only 4 classes"),
        (lambda: run(QUICK, num_classes=1), InputError, "two classes"),
        (lambda: run(QUICK, num_batches_per_epoch=0), InputError, "no training image"),
        (lambda: run(QUICK, num_batches_per_epoch=2), ValueError, "3 batches, 2 were announced"),
        (lambda: run(QUICK, test_batches=list), InputError, "no test image"),
        (lambda: run(QUICK, seed=-1), ConfigError, "seed"),
        (lambda: run(QUICK, backbone=broken()), InputError, r"1 tensors of the backbone .* the first is conv\.bias"),
        (
            lambda: run(QUICK, train=(IMAGES * torch.nan, LABELS)),
            RunError,
            "the loss became nan in epoch 1 at lr 0.0025",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
