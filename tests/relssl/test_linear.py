"""The linear probe against a plain loop with torch's layer and schedules; seeds, protocols, head files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from pipelines.errors import ConfigError, InputError, RunError
from relssl.evaluators.features import summarise
from relssl.evaluators.linear import (
    PROTOCOLS,
    LinearProtocol,
    cached_batches,
    head_accuracy,
    initial_head,
    linear_protocol,
    load_head,
    save_head,
    train_linear_probe,
)
from relssl.weights import FORMAT

NUM_CLASSES, DIM = 6, 5


def blobs(n: int, seed: int, spread: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around one corner of a fixed random simplex per class."""
    centres = torch.randn(NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % NUM_CLASSES
    noise = torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed))
    return centres[labels] + spread * noise, labels


def probe(protocol: LinearProtocol, *, seed: int = 0, train=None, test=None, **changes):
    train, test = train or blobs(50, 1), test or blobs(30, 2)
    batches = cached_batches(*train, protocol.batch_size, seed)
    call = {
        "train_batches": batches,
        "num_batches_per_epoch": len(batches),
        "test": test,
        "feature_dim": DIM,
        "num_classes": NUM_CLASSES,
        "protocol": protocol,
        "seed": seed,
        "device": "cpu",
    } | changes
    return train_linear_probe(**call)


@pytest.mark.parametrize(
    "protocol",
    [
        LinearProtocol(lr=0.5, epochs=4, batch_size=16, init_std=0.01, zero_bias=True, dtype="fp64", select="last"),
        LinearProtocol(lr=0.2, epochs=4, batch_size=16, nesterov=True, weight_decay=0.01, dtype="fp64", select="last"),
        LinearProtocol(
            lr=2.0,
            epochs=4,
            batch_size=16,
            schedule="multistep",
            milestones=(1, 3),
            dtype="fp64",
            select="last",
        ),
        LinearProtocol(
            lr=8.0,
            lr_scaling="linear",
            epochs=2,
            batch_size=16,
            schedule="constant",
            dtype="fp64",
            select="last",
        ),
    ],
    ids=["cosine", "nesterov", "multistep", "scaled"],
)
def test_equals_a_plain_loop(protocol):
    """From the same first weights (found with a vanishing lr), torch's layer, optimizer and schedulers."""
    still = probe(protocol.model_copy(update={"lr": 1e-300, "weight_decay": 0.0}))
    layer = torch.nn.Linear(DIM, NUM_CLASSES, dtype=torch.float64)
    layer.load_state_dict({"weight": still.weight, "bias": still.bias})
    base = protocol.lr * (protocol.batch_size / 256 if protocol.lr_scaling == "linear" else 1)
    optimizer = torch.optim.SGD(
        layer.parameters(),
        base,
        protocol.momentum,
        weight_decay=protocol.weight_decay,
        nesterov=protocol.nesterov,
    )
    batches = cached_batches(*blobs(50, 1), 16, 0)
    per_step = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, protocol.epochs * len(batches))
    per_epoch = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(protocol.milestones), 0.1)
    for epoch in range(protocol.epochs):
        for x, y in batches(epoch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x.double()), y).backward()
            optimizer.step()
            if protocol.schedule == "cosine":
                per_step.step()
        if protocol.schedule == "multistep":
            per_epoch.step()
    result = probe(protocol)
    torch.testing.assert_close(result.weight, layer.weight.detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(result.bias, layer.bias.detach(), rtol=0, atol=1e-9)


def test_initial_weights_follow_the_protocol():
    labels = torch.arange(12) % NUM_CLASSES
    wide = torch.randn(12, 2000, generator=torch.Generator().manual_seed(0)), labels
    still = {"lr": 1e-30, "epochs": 1, "batch_size": 16}
    normal = probe(LinearProtocol(**still, init_std=0.01, zero_bias=True), train=wide, test=wide, feature_dim=2000)
    assert float(normal.weight.std()) == pytest.approx(0.01, rel=0.03)
    assert float(normal.weight.abs().max()) > 0.03
    assert normal.bias.abs().max() < 1e-20  # one step at lr 1e-30 away from zero
    default = probe(LinearProtocol(**still), train=wide, test=wide, feature_dim=2000)
    bound = 2000**-0.5
    assert 0.99 * bound < float(default.weight.abs().max()) <= bound
    assert 0 < float(default.bias.abs().max()) <= bound


@pytest.mark.parametrize("width", [512, 2048])
def test_haikus_initial_weights_follow_the_width_of_the_features(width):
    """hk.Linear: normal, of standard deviation 1 / sqrt(width), cut at twice that; a bias of zeros."""
    labels = torch.arange(12) % NUM_CLASSES
    data = torch.randn(12, width, generator=torch.Generator().manual_seed(0)), labels
    still = linear_protocol("relicv2", lr=1e-30, lr_scaling="none", epochs=1, batch_size=16)
    head = probe(still, train=data, test=data, feature_dim=width)
    scaled = head.weight * width**0.5
    assert 1.9 < float(scaled.abs().max()) < 2 + 1e-6
    assert float(scaled.std()) == pytest.approx(0.880, abs=0.03)  # of a normal distribution that is cut at two
    assert head.bias.abs().max() < 1e-20


def test_the_seed_decides_everything_and_global_randomness_is_untouched():
    protocol = LinearProtocol(lr=0.3, epochs=3, batch_size=8)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = probe(protocol, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = probe(protocol, seed=4), probe(protocol, seed=5)
    assert torch.equal(first.weight, again.weight)
    assert first.curve == again.curve
    assert not torch.equal(first.weight, other.weight)


def test_cached_batches_cover_every_image_once_in_an_order_of_seed_and_epoch():
    x, y = torch.arange(1.0, 12).repeat(2, 1).T, torch.arange(11)
    batches = cached_batches(x, y, 4, seed=3)
    assert len(batches) == 3

    def orders(seed, epoch):
        found = list(cached_batches(x, y, 4, seed)(epoch))
        assert [len(labels) for _, labels in found] == [4, 4, 3]
        assert all(torch.equal(features[:, 0] - 1, labels.float()) for features, labels in found)
        return torch.cat([labels for _, labels in found]).tolist()

    assert sorted(orders(3, 0)) == list(range(11))
    assert orders(3, 0) == orders(3, 0) == torch.cat([labels for _, labels in batches(0)]).tolist()
    assert len({tuple(orders(seed, epoch)) for seed in (0, 1, 2**32) for epoch in (0, 1)}) == 6


def test_standardising_is_folded_into_the_saved_weights():
    train, test = blobs(200, 1), blobs(60, 2)
    scale, shift = torch.tensor([1e3, 1e-3, 1.0, 50.0, 1e-2]), torch.tensor([5e3, 0.0, -7.0, 1.0, 2.0])
    odd_train, odd_test = (train[0] * scale + shift, train[1]), (test[0] * scale + shift, test[1])
    protocol = linear_protocol("cached", epochs=5, batch_size=64, lr=0.1, dtype="fp64")
    plain, odd = probe(protocol, train=train, test=test), probe(protocol, train=odd_train, test=odd_test)
    assert plain.top1 == odd.top1 > 85
    logits = odd_test[0].double() @ odd.weight.T + odd.bias
    assert 100 * float((logits.argmax(1) == test[1]).double().mean()) == pytest.approx(odd.top1)
    torch.testing.assert_close(logits, test[0].double() @ plain.weight.T + plain.bias, rtol=0, atol=1e-3)


def test_a_constant_feature_does_not_break_standardising():
    (x, y), test = blobs(60, 1), blobs(30, 2)
    x, test_x = x.clone(), test[0].clone()
    x[:, 0], test_x[:, 0] = 0.1, 0.1
    result = probe(linear_protocol("cached", epochs=20), train=(x, y), test=(test_x, test[1]))
    assert math.isfinite(result.curve[-1]["loss"])
    assert torch.isfinite(result.weight).all()
    assert result.top1 > 60


def test_best_and_last_are_both_kept():
    """With a large constant lr the accuracy goes up and down, so the best epoch is not the last."""
    noisy = LinearProtocol(lr=40.0, schedule="constant", epochs=12, batch_size=8, select="best")
    train, test = blobs(50, 1, spread=1.5), blobs(30, 2, spread=1.5)
    best = probe(noisy, train=train, test=test)
    last = probe(noisy.model_copy(update={"select": "last"}), train=train, test=test)
    tops = [record["top1"] for record in best.curve]
    assert tops[-1] < max(tops)
    assert best.top1 == max(tops) == best.best["top1"]
    assert best.best["epoch"] == tops.index(max(tops)) + 1
    assert last.top1 == tops[-1] == best.last["top1"]
    assert last.best == best.best
    for result in (best, last):
        logits = test[0] @ result.weight.T + result.bias
        assert 100 * float((logits.argmax(1) == test[1]).float().mean()) == pytest.approx(result.top1)


def test_top5_counts_the_five_largest_and_does_not_exist_below_five_classes():
    test = torch.randn(60, DIM, generator=torch.Generator().manual_seed(0)), torch.arange(60) % NUM_CLASSES
    result = probe(LinearProtocol(lr=1e-30, epochs=1, batch_size=50, init_std=1.0), test=test)
    logits = test[0] @ result.weight.T + result.bias
    rank = (logits > logits.gather(1, test[1][:, None])).sum(1)
    assert result.top5 == pytest.approx(100 * float((rank < 5).float().mean()))
    assert result.top5 < 100
    small = (torch.randn(9, DIM), torch.arange(9) % 3)
    assert probe(LinearProtocol(lr=0.1, epochs=1, batch_size=4), train=small, test=small, num_classes=3).top5 is None


def test_features_made_in_inference_mode_and_progress():
    records = []
    with torch.inference_mode():
        train, test = blobs(50, 1), blobs(30, 2)
        result = probe(LinearProtocol(lr=0.3, epochs=3, batch_size=16), train=train, test=test, progress=records.append)
    live = train_linear_probe(
        lambda epoch: [train],
        1,
        test,
        DIM,
        NUM_CLASSES,
        LinearProtocol(lr=0.3, epochs=2, batch_size=50),
        0,
        "cpu",
    )
    assert records == result.curve
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert live.curve[1]["loss"] < live.curve[0]["loss"]


def test_named_protocols_are_what_the_authors_wrote():
    imagenet = linear_protocol("ressl_imagenet")
    assert (imagenet.lr, imagenet.momentum, imagenet.nesterov, imagenet.weight_decay) == (
        0.3,
        0.9,
        False,
        0.0,
    )
    assert (imagenet.epochs, imagenet.batch_size, imagenet.init_std, imagenet.zero_bias) == (
        100,
        256,
        0.01,
        True,
    )
    assert (imagenet.schedule, imagenet.select, imagenet.augment) == ("cosine", "best", True)
    small, steps = linear_protocol("ressl_small"), linear_protocol("ressl_small_steps")
    assert (small.lr, small.schedule, small.nesterov, small.weight_decay) == (0.2, "cosine", True, 0.0)
    assert (steps.lr, steps.milestones, steps.gamma, steps.epochs) == (30.0, (60, 80), 0.1, 100)
    assert [steps.lr_at(10 * epoch, 10) for epoch in (0, 59, 60, 80)] == pytest.approx([30, 30, 3, 0.3])
    assert imagenet.lr_at(0, 7) == 0.3
    assert imagenet.lr_at(350, 7) == pytest.approx(0.15)
    assert 0 < imagenet.lr_at(699, 7) < 1e-5
    assert not linear_protocol("cached").augment
    assert all(linear_protocol(name).name == name for name in PROTOCOLS)


def test_a_changed_protocol_says_so():
    assert linear_protocol("ressl_small", epochs=100).name == "ressl_small"
    assert linear_protocol("ressl_small", epochs=5).name == "ressl_small (changed)"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("resl_small", {}, "did you mean 'ressl_small'"),
        ("cached", {"epoch": 3}, "unknown setting of a linear protocol: 'epoch'; did you mean 'epochs'"),
        ("cached", {"epochs": 0}, "epochs: .*got 0"),
        ("cached", {"lr": "fast"}, "lr: .*got 'fast'"),
        ("relicv2", {"init_std": -1}, "init_std.*: .*got -1"),
        ("relicv2", {"init_std": "haikku"}, "init_std.*'haiku'"),
        ("cached", {"momentum": 0.0, "nesterov": True}, "nesterov"),
        ("cached", {"milestones": (3,)}, "milestones"),
        ("ressl_small_steps", {"milestones": (80, 60)}, "increase"),
    ],
)
def test_bad_protocols_are_named(name, change, message):
    with pytest.raises(ConfigError, match=message):
        linear_protocol(name, **change)


QUICK = LinearProtocol(lr=0.1, epochs=1, batch_size=16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: probe(QUICK, train=(blobs(50, 1)[0], torch.full((50,), -1))), InputError, "no label"),
        (lambda: probe(QUICK, test=(blobs(30, 2)[0], torch.full((30,), -1))), InputError, "no label"),
        (lambda: probe(QUICK, test=(torch.full((30, DIM), torch.nan), blobs(30, 2)[1])), InputError, "NaN"),
        (lambda: probe(QUICK, train=(blobs(50, 1)[0] / 0, blobs(50, 1)[1])), InputError, "NaN or infinite"),
        (lambda: probe(QUICK, test=(torch.ones(30, 3), blobs(30, 2)[1])), InputError, "3 wide"),
        (lambda: probe(QUICK, train=(torch.ones(50, 3), blobs(50, 1)[1])), InputError, "3 wide"),
        (lambda: probe(QUICK, num_classes=4), InputError, "label 5 found"),
        (
            lambda: probe(QUICK, num_classes=1, test=(torch.ones(2, DIM), torch.zeros(2).long())),
            InputError,
            "two classes",
        ),
        (lambda: probe(QUICK, num_batches_per_epoch=0), InputError, "no training image"),
        (lambda: probe(QUICK, num_batches_per_epoch=3), ValueError, "4 batches, 3 were announced"),
        (lambda: probe(QUICK, seed=-1), ConfigError, "seed"),
        (
            lambda: probe(
                LinearProtocol(lr=1e30, epochs=3, batch_size=8),
                train=(blobs(50, 1)[0] * 1e10, blobs(50, 1)[1]),
            ),
            RunError,
            "lower it",
        ),
        (lambda: cached_batches(*blobs(10, 0), 0, 0), ConfigError, "batch size"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_head_survives_saving(tmp_path):
    result = probe(QUICK)
    path = save_head(
        tmp_path / "head.safetensors",
        result,
        classes=["a", "b"],
        backbone="conv4",
        protocol=QUICK,
        seed=3,
        extra={"method": "ressl"},
    )
    weight, bias, about = load_head(path)
    assert torch.equal(weight, result.weight)
    assert torch.equal(bias, result.bias)
    assert about["classes"] == ["a", "b"]
    assert about["protocol"]["lr"] == 0.1
    assert about["method"] == "ressl"
    assert about["best"] == json.loads(json.dumps(result.best))
    assert about["seed"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["head.safetensors"]


def test_a_damaged_or_foreign_head_is_refused(tmp_path):
    path = save_head(
        tmp_path / "head.safetensors", probe(QUICK), classes=None, backbone="conv4", protocol=QUICK, seed=0
    )
    whole = path.read_bytes()
    for damaged in (whole[:-5], b"", b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            load_head(path)
    save_file({"conv1.weight": torch.ones(2)}, path)
    with pytest.raises(InputError, match=r"not a linear head .*: it holds conv1.weight and does not say what it is"):
        load_head(path)
    save_file({f"conv{i}.weight": torch.ones(2) for i in range(9)}, path)
    with pytest.raises(InputError, match=r"it holds conv0.weight, conv1.weight, conv2.weight and 6 more and does"):
        load_head(path)
    save_file({"conv1.weight": torch.ones(2)}, path, metadata={"format": FORMAT})
    with pytest.raises(InputError, match="is a backbone: give it as --weights"):
        load_head(path)
    with pytest.raises(InputError, match="no linear head"):
        load_head(tmp_path / "absent.safetensors")


def test_summarise():
    assert summarise([40.0, 42.0]) == {"mean": 41.0, "std": pytest.approx(2**0.5), "values": [40.0, 42.0]}
    assert summarise([40.0])["std"] == 0.0
    assert summarise([None, None]) is None
    assert summarise([]) is None


def test_exponential_decay_equals_torchs_scheduler_with_adam():
    """The CIFAR code of ReSA: one factor from epoch to epoch, whole batches only."""
    protocol = linear_protocol("resa_cifar", epochs=4, batch_size=16, dtype="fp64")
    still = probe(protocol.model_copy(update={"lr": 1e-300, "final": 1e-301, "weight_decay": 0.0}))
    layer = torch.nn.Linear(DIM, NUM_CLASSES, dtype=torch.float64)
    layer.load_state_dict({"weight": still.weight, "bias": still.bias})
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2, weight_decay=5e-6)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=(1e-6 / 1e-2) ** (1 / 4))
    batches = cached_batches(*blobs(50, 1), 16, 0, drop_last=True)
    assert len(batches) == 3
    for epoch in range(4):
        for x, y in batches(epoch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x.double()), y).backward()
            optimizer.step()
        schedule.step()
    found = probe(protocol, train_batches=batches, num_batches_per_epoch=3)
    torch.testing.assert_close(found.weight, layer.weight.detach(), rtol=0, atol=1e-9)


def test_haikus_initial_weights_are_cut_at_two_standard_deviations():
    weight, bias = initial_head(
        400, 500, init_std="haiku", zero_bias=True, seed=0, device=torch.device("cpu"), dtype=torch.float64
    )
    assert 0.0999 < float(weight.detach().abs().max()) <= 2 / 400**0.5
    assert float(weight.detach().std()) == pytest.approx(0.8796 * 400**-0.5, rel=0.01)  # of a normal cut at 2
    assert not bias.any()


def test_the_protocols_of_resa_cifar_and_relicv2():
    cifar, relicv2 = linear_protocol("resa_cifar"), linear_protocol("relicv2")
    assert (cifar.optimizer, cifar.lr, cifar.final, cifar.weight_decay) == ("adam", 1e-2, 1e-6, 5e-6)
    assert (cifar.epochs, cifar.batch_size, cifar.init_std, cifar.select, cifar.augment) == (
        500,
        1000,
        None,
        "last",
        False,
    )
    assert cifar.lr_at(0, 50) == 1e-2
    assert cifar.lr_at(250 * 50 + 49, 50) == pytest.approx(1e-4)
    assert relicv2.lr_at(0, 10) == pytest.approx(1.2)
    assert (relicv2.nesterov, relicv2.init_std, relicv2.drop_last, relicv2.select) == (True, "haiku", True, "last")


@pytest.mark.parametrize(("count", "expected"), [(50, [16, 16, 16]), (48, [16, 16, 16]), (9, [9])])
def test_whole_batches_only_unless_there_is_one_only(count, expected):
    batches = cached_batches(*blobs(count, 1), 16, 0, drop_last=True)
    assert [len(y) for _, y in batches(0)] == expected
    assert len(batches) == len(expected)


def test_a_saved_head_is_tested_as_it_was(tmp_path):
    result = probe(linear_protocol("cached", epochs=3, batch_size=16))
    path = save_head(tmp_path / "h.safetensors", result, classes=None, backbone="conv4", protocol=QUICK, seed=0)
    weight, bias, _ = load_head(path)
    x, y = blobs(30, 2)
    assert head_accuracy(x, y, weight, bias) == {"top1": result.top1, "top5": result.top5}
    with pytest.raises(InputError, match="5 wide and the backbone's are 3"):
        head_accuracy(x[:, :3], y, weight, bias)
    with pytest.raises(InputError, match="label 5 found"):
        head_accuracy(x, y, weight[:5], bias[:5])
    with pytest.raises(InputError, match="NaN"):
        head_accuracy(x * torch.nan, y, weight, bias)
