"""Many linear heads at once against torch's own layer and optimizer one by one; L-BFGS against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipelines.errors import InputError
from relssl.evaluators import heads
from relssl.evaluators.heads import (
    labelled_rows,
    logistic_regression,
    loss_and_gradient,
    predictions,
    score_heads,
    train_heads,
)

NUM_CLASSES, DIM = 5, 7


def blobs(n: int, seed: int, spread: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 points around one corner per class, on scales that differ by feature."""
    centres = torch.randn(NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    labels = torch.arange(n) % NUM_CLASSES
    noise = torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (centres[labels] + spread * noise) * torch.logspace(-2, 2, DIM, dtype=torch.float64) + 3, labels


def rows_of(n: int = 60, seed: int = 0):
    return labelled_rows(*blobs(n, seed), NUM_CLASSES, "train", "cpu")


def train(rows, lr, weight_decay, index=None, **changes):
    options = {"updates": 30, "batch_size": 16, "momentum": 0.9, "seed": 0} | changes
    index = torch.arange(len(rows.labels)) if index is None else index
    parts = list(train_heads(rows, index, NUM_CLASSES, lr, weight_decay, **options))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def plain_loop(rows, lr, weight_decay, index, updates, batch_size, momentum, seed):
    """torch's layer, optimizer and scheduler on the same batches."""
    layer = torch.nn.Linear(DIM, NUM_CLASSES, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    groups = [{"params": [layer.weight], "weight_decay": weight_decay}, {"params": [layer.bias]}]
    optimizer = torch.optim.SGD(groups, lr, momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    source = heads.generator(seed, "order of batches")
    size = min(batch_size, len(index))
    order = torch.cat([index[torch.randperm(len(index), generator=source)] for _ in range(updates)])
    features = (rows.features - rows.features.mean(dim=0)) / rows.features.std(dim=0, unbiased=False)
    for update in range(updates):
        batch = order[update * size : (update + 1) * size]
        optimizer.zero_grad()
        F.cross_entropy(layer(features[batch]), rows.labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return layer.weight.detach(), layer.bias.detach()


@pytest.mark.parametrize(("momentum", "batch_size"), [(0.9, 16), (0.0, 1000)])
def test_heads_trained_at_once_equal_a_plain_loop_for_each(momentum, batch_size):
    rows, index = rows_of(), torch.arange(3, 60, 2)
    lr, decay = [0.01, 0.5, 0.1], [0.0, 0.1, 1e-3]
    options = {"updates": 30, "batch_size": batch_size, "momentum": momentum, "seed": 4}
    weight, bias = train(rows, lr, decay, index, **options)
    for head in range(3):
        expected = plain_loop(rows, lr[head], decay[head], index, **options)
        torch.testing.assert_close(weight[head], expected[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(bias[head], expected[1], rtol=0, atol=1e-10)


def test_one_head_at_a_time_is_the_same(monkeypatch):
    rows, lr, decay = rows_of(), [0.01, 0.5, 0.1, 0.2], [0.0, 0.1, 1e-3, 0.0]
    together = train(rows, lr, decay)
    monkeypatch.setattr(heads, "HEAD_BYTES", 1)
    parts = list(
        train_heads(rows, torch.arange(60), NUM_CLASSES, lr, decay, updates=30, batch_size=16, momentum=0.9, seed=0)
    )
    assert [len(p[0]) for p in parts] == [1, 1, 1, 1]
    torch.testing.assert_close(together[0], torch.cat([p[0] for p in parts]), rtol=0, atol=1e-12)


def test_as_many_heads_at_once_as_the_memory_allows(monkeypatch):
    per_head = 8 * NUM_CLASSES * (3 * (DIM + 1) + 3 * 16)
    monkeypatch.setattr(heads, "HEAD_BYTES", 2 * per_head + 1)
    options = {"updates": 1, "batch_size": 16, "momentum": 0.9, "seed": 0}
    parts = train_heads(rows_of(), torch.arange(60), NUM_CLASSES, [0.1] * 5, [0.0] * 5, **options)
    assert [len(weight) for weight, _ in parts] == [2, 2, 1]


def test_the_gradient_is_autograds():
    x, y = blobs(11, 3)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, NUM_CLASSES, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, NUM_CLASSES, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = [F.cross_entropy(x @ w.T + b, y, reduction="sum") for w, b in zip(weight, bias, strict=True)]
    torch.stack(expected).sum().backward()
    loss, weight_gradient, bias_gradient = loss_and_gradient(x, y, weight.detach(), bias.detach())
    torch.testing.assert_close(loss, torch.stack(expected).detach())
    torch.testing.assert_close(weight_gradient, weight.grad)
    torch.testing.assert_close(bias_gradient, bias.grad)


def test_the_seed_decides_the_batches():
    rows = rows_of()
    first = train(rows, [0.1], [0.0], seed=1)[0]
    assert torch.equal(first, train(rows, [0.1], [0.0], seed=1)[0])
    assert not torch.equal(first, train(rows, [0.1], [0.0], seed=2)[0])


def test_a_separable_toy_problem_is_learnt():
    x, y = torch.eye(4, dtype=torch.float64).repeat(5, 1), torch.arange(4).repeat(5)
    rows = labelled_rows(x, y, 4, "train", "cpu")
    weight, bias = next(
        train_heads(rows, torch.arange(20), 4, [0.5, 2.0], [0, 0], updates=40, batch_size=8, momentum=0.9, seed=0)
    )
    top1, loss = score_heads(rows, torch.arange(20), weight, bias)
    assert top1.tolist() == [100, 100]
    assert float(loss.max()) < 0.05
    assert predictions(rows, weight[0], bias[0], 2)[:4, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("block", [10**9, 1])
def test_scores_are_those_of_plain_formulas(monkeypatch, block):
    monkeypatch.setattr(heads, "LOGIT_BYTES", block)
    rows, index = rows_of(), torch.arange(0, 60, 3)
    weight, bias = train(rows, [0.05, 0.3], [0.0, 0.0], updates=3)
    top1, loss = score_heads(rows, index, weight, bias)
    x, y = rows.read(index)
    for head in range(2):
        logits = x @ weight[head].T + bias[head]
        assert float(top1[head]) == pytest.approx(100 * float((logits.argmax(1) == y).double().mean()))
        assert float(loss[head]) == pytest.approx(float(F.cross_entropy(logits, y)))
    everything = (rows.features - rows.shift) * rows.scale @ weight[0].T + bias[0]
    assert torch.equal(predictions(rows, weight[0], bias[0], 3), everything.topk(3, dim=1).indices)


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_logistic_regression_equals_scikit_learn(monkeypatch, penalty):
    from sklearn.linear_model import LogisticRegression

    monkeypatch.setattr(heads, "ROWS", 13)
    monkeypatch.setattr(heads, "SMALLEST_GRADIENT", 1e-10)
    monkeypatch.setattr(heads, "SMALLEST_CHANGE", 1e-16)
    rows = rows_of()
    index = torch.arange(0, 60, 2)
    weight, bias = logistic_regression(rows, index, NUM_CLASSES, penalty, iterations=500)
    x, y = rows.read(index)
    strength = 1 / (len(index) * penalty)
    peer = LogisticRegression(C=strength, solver="newton-cg", tol=1e-10, max_iter=1000).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(weight.numpy(), peer.coef_, atol=1e-5)
    offset = peer.intercept_ - peer.intercept_.mean()  # a common shift of all classes changes nothing
    np.testing.assert_allclose((bias - bias.mean()).numpy(), offset, atol=1e-5)


def test_a_start_near_the_end_ends_at_the_same_place():
    rows, index = rows_of(), torch.arange(60)
    cold = logistic_regression(rows, index, NUM_CLASSES, 1e-2)
    warm = logistic_regression(rows, index, NUM_CLASSES, 1e-2, start=cold)
    torch.testing.assert_close(cold[0], warm[0], rtol=0, atol=1e-3)


def test_a_constant_feature_does_no_harm():
    x, y = blobs(40, 0)
    x[:, 2] = 1e6
    rows = labelled_rows(x, y, NUM_CLASSES, "train", "cpu")
    weight, _ = train(rows, [0.1], [0.0])
    assert torch.isfinite(weight).all()
    assert float(weight[0][:, 2].abs().max()) == 0


def test_bad_features_are_refused():
    x, y = blobs(10, 0)
    x[3, 1] = math.nan
    with pytest.raises(InputError, match="train features: row 3 holds NaN"):
        labelled_rows(x, y, NUM_CLASSES, "train", "cpu")
    with pytest.raises(InputError, match="have no label"):
        labelled_rows(blobs(10, 0)[0], torch.full((10,), -1), NUM_CLASSES, "train", "cpu")
