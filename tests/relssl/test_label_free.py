"""RankMe, alignment, uniformity, neighbours: against direct float64 formulas, and at their known extremes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipelines.errors import ConfigError, InputError
from relssl.evaluators import features as blocks
from relssl.evaluators import label_free
from relssl.evaluators.label_free import alignment, neighbours_of, rankme, uniformity


def features(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(200, 16), (10, 40), (2, 3)])
def test_rankme_equals_the_formula(monkeypatch, shape):
    monkeypatch.setattr(label_free, "ROWS_PER_PRODUCT", 7)
    x = features(*shape) * torch.linspace(0.01, 2, shape[1])
    sigma = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert rankme(x) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_rankme_extremes():
    assert rankme(torch.eye(12)) == pytest.approx(12, rel=1e-4)
    assert rankme(torch.ones(30, 8)) == pytest.approx(1, abs=1e-4)
    assert rankme(torch.eye(12) * 1e-20) == pytest.approx(12, rel=1e-4)


def test_rankme_is_repeatable_and_takes_half_precision():
    x = features(100, 8)
    assert rankme(x) == rankme(x.clone())
    assert rankme(x.half()) == pytest.approx(rankme(x), rel=1e-3)


def test_alignment_equals_the_formula():
    x, y = features(50, 6, 1), features(50, 6, 2)
    unit = [z.double() / z.double().norm(dim=1, keepdim=True) for z in (x, y)]
    assert alignment(x, y) == pytest.approx(float((unit[0] - unit[1]).square().sum(1).mean()), rel=1e-5)
    assert alignment(x, 3 * x) == pytest.approx(0, abs=1e-12)
    assert alignment(x, -x) == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize(("query_block", "key_block"), [(512, 16_384), (3, 5), (4, 4)])
def test_uniformity_equals_the_formula_whatever_the_blocks(monkeypatch, query_block, key_block):
    monkeypatch.setattr(label_free, "QUERY_BLOCK", query_block)
    monkeypatch.setattr(label_free, "KEY_BLOCK", key_block)
    x = features(23, 6)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    pairs = [math.exp(-2 * float((unit[i] - unit[j]).square().sum())) for i in range(23) for j in range(i + 1, 23)]
    assert uniformity(x) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)


def test_uniformity_of_collapsed_features_is_zero():
    assert uniformity(torch.ones(9, 4)) == pytest.approx(0, abs=1e-5)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(opposite) == pytest.approx(-8, rel=1e-5)


def test_neighbours_leave_the_query_out(monkeypatch):
    monkeypatch.setattr(blocks, "QUERY_BLOCK", 2)
    monkeypatch.setattr(blocks, "KEY_BLOCK", 3)
    x = features(20, 5)
    unit = torch.nn.functional.normalize(x, dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-2)
    queries = torch.tensor([0, 19, 7, 7])
    index, found = neighbours_of(x, queries, k=4)
    expected = similarity[queries].topk(4, dim=1)
    assert torch.equal(index, expected.indices)
    torch.testing.assert_close(found, expected.values)


def test_duplicates_find_each_other():
    x = features(6, 4)
    x[4] = x[1]
    index, similarity = neighbours_of(x, torch.tensor([1, 4]), k=5)
    assert similarity[:, 0].tolist() == pytest.approx([1, 1])
    assert index[:, 0].tolist() == [4, 1]
    assert sorted(index[0].tolist()) == [0, 2, 3, 4, 5]


NAN = torch.full((4, 3), torch.nan)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rankme(NAN), InputError, "NaN"),
        (lambda: uniformity(NAN), InputError, "NaN"),
        (lambda: alignment(torch.ones(4, 3), NAN), InputError, "NaN"),
        (lambda: neighbours_of(NAN, torch.tensor([0]), k=1), InputError, "NaN"),
        (lambda: rankme(torch.zeros(4, 3)), InputError, "collapsed"),
        (lambda: uniformity(torch.zeros(4, 3)), InputError, "collapsed"),
        (lambda: rankme(torch.ones(1, 3)), InputError, "two images"),
        (lambda: uniformity(torch.ones(1, 3)), InputError, "two images"),
        (lambda: uniformity(torch.ones(4, 3), t=0), ConfigError, "t <= 20"),
        (lambda: alignment(torch.ones(4, 3), torch.ones(5, 3)), InputError, "4 and 5"),
        (lambda: alignment(torch.ones(4, 3), torch.ones(4, 2)), InputError, "wide"),
        (lambda: neighbours_of(torch.ones(4, 3), torch.tensor([0]), k=4), ConfigError, "k = 4 .* 3"),
        (lambda: neighbours_of(torch.ones(4, 3), torch.tensor([4]), k=1), ConfigError, "between 0 and 3"),
        (
            lambda: neighbours_of(torch.ones(4, 3), torch.tensor([], dtype=torch.int64), k=1),
            ConfigError,
            "no query",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
