"""ReLICv2's negatives, target and views."""

from __future__ import annotations

import pytest
import torch

from pipelines.batch import ViewBatch
from pipelines.errors import ConfigError
from relssl.methods.base import DataInfo, Step
from relssl.methods.relicv2 import Method, ReLICv2Config, draw_negatives
from relssl.nets import build_backbone
from relssl.optim import cosine_ema

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("images", "count"), [(2, 1), (6, 3), (9, 7), (50, 10)])
def test_negatives_are_other_images_and_each_at_most_once(images: int, count: int) -> None:
    drawn = draw_negatives(images, count, generator(), CPU)
    assert drawn.shape == (images, count)
    for row, others in enumerate(drawn.tolist()):
        assert len(set(others)) == count
        assert set(others) <= set(range(images)) - {row}


def test_negatives_are_uniform() -> None:
    images, count, rounds = 7, 3, 4000
    drawn = torch.stack([draw_negatives(images, count, generator(seed), CPU) for seed in range(rounds)])
    for row in range(images):
        share = torch.bincount(drawn[:, row].flatten(), minlength=images) / rounds
        expected = torch.full((images,), count / (images - 1)).index_fill(0, torch.tensor(row), 0.0)
        assert (share - expected).abs().max() < 0.04  # 5 standard deviations
    pairs = (drawn[:, 0, :, None] == 1).any(1) & (drawn[:, 0, :, None] == 2).any(1)
    assert pairs.float().mean().item() == pytest.approx(3 * 2 / (6 * 5), abs=0.035)  # without replacement


@pytest.mark.parametrize("count", [None, 4])
def test_all_others_where_there_are_no_more(count: int | None) -> None:
    drawn = draw_negatives(5, count, generator(), CPU)
    assert drawn.tolist() == [[i for i in range(5) if i != row] for row in range(5)]


def test_more_negatives_than_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_negatives is 5, but among the 5 images"):
        draw_negatives(5, 5, generator(), CPU)
    with pytest.raises(ConfigError, match="among the 8 images that are compared each has only 7 others"):
        method(num_negatives=8)


def test_a_loss_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha and beta are both 0"):
        method(alpha=0, beta=0)


def test_both_terms_are_told() -> None:
    loss, metrics = method(num_negatives=3)(batch(), Step(0, 0))
    told = 0.3 * metrics["contrastive_loss"] + 5.0 * metrics["invariance_loss"]
    assert loss.item() == pytest.approx(told.item(), rel=1e-6)
    assert metrics["contrastive_loss"] > 0
    assert metrics["invariance_loss"] > 0


def method(**settings: object) -> Method:
    torch.manual_seed(0)
    config = ReLICv2Config(**{"hidden_dim": 16, "embed_dim": 8, "num_negatives": 5, **settings})
    return Method(lambda: build_backbone("conv4"), config, DataInfo(64, None, 8, 20, 8))


def batch(small: int = 1) -> ViewBatch:
    place = torch.arange(8)
    large = tuple(torch.randn(8, 3, 16, 16, generator=generator(v)) for v in (0, 1))
    views = {"large": large, "small": tuple(torch.randn(8, 3, 10, 10, generator=generator(9)) for _ in range(small))}
    return ViewBatch({k: v for k, v in views.items() if v}, place, place, place)


def test_small_views_pass_the_online_network_alone() -> None:
    net = method()
    seen: dict[str, list[int]] = {"online": [], "target": []}
    net.encoder.register_forward_hook(lambda m, x, out: seen["online"].append(x[0].shape[-1]))
    net.target["encoder"].register_forward_hook(lambda m, x, out: seen["target"].append(x[0].shape[-1]))
    net(batch(), Step(0, 0))
    assert seen == {"online": [16, 16, 10], "target": [16, 16]}
    assert net(batch(small=0), Step(0, 0))[0].isfinite()


def test_the_target_follows_after_the_update() -> None:
    net = method(momentum=0.9)
    before = [p.clone() for p in net.target.parameters()]
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    net.after_update(Step(update=5, epoch=0))
    momentum = cosine_ema(5, base=0.9, total_steps=20)
    for old, new in zip(before, net.target.parameters(), strict=True):
        torch.testing.assert_close(new, old + (1 - momentum))
    assert not any(p.requires_grad for p in net.target.parameters())


def test_without_a_predictor() -> None:
    net = method(predictor=False, num_negatives=None, invariance="swap")
    loss, _ = net(batch(), Step(0, 0))
    loss.backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    assert not any(name.startswith("predictor") for name, _ in net.named_parameters())


def test_the_negatives_are_a_function_of_the_step() -> None:
    net = method(num_negatives=3)
    first, again, other = (float(net(batch(), Step(u, 0))[0].detach()) for u in (0, 0, 1))
    assert first == again
    assert first != other
