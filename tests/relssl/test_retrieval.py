"""Retrieval against scikit-learn and a ranking written out in float64; tiles, ties, and what cannot be scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from pipelines.errors import ConfigError, InputError
from relssl.evaluators import retrieval
from relssl.evaluators.retrieval import retrieval_scores


def blobs(n, seed, classes=4, dim=6, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    labels[:classes] = torch.arange(classes)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    return centres[labels] + spread * torch.randn(n, dim, generator=generator), labels


def reference(query_x, query_y, gallery_x, gallery_y, ks, own=False):
    """One query at a time, in float64, with scikit-learn's average precision."""
    query_x, gallery_x = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (query_x, gallery_x))
    precisions, hits = [], dict.fromkeys(ks, 0)
    for i, (x, y) in enumerate(zip(query_x, query_y, strict=True)):
        similarity, relevant = (gallery_x @ x).numpy(), (gallery_y == y).numpy()
        if own:
            similarity, relevant = np.delete(similarity, i), np.delete(relevant, i)
        precisions.append(average_precision_score(relevant, similarity))
        order = np.argsort(-similarity)
        for k in ks:
            hits[k] += relevant[order[:k]].any()
    return 100 * np.mean(precisions), {k: 100 * hit / len(query_x) for k, hit in hits.items()}


@pytest.mark.parametrize("tile", [2**25, 1, 150])
def test_equals_scikit_learn_whatever_the_tiles(monkeypatch, tile):
    monkeypatch.setattr(retrieval, "TILE", tile)
    (qx, qy), (gx, gy) = blobs(30, 0), blobs(60, 1)
    expected_map, expected_recall = reference(qx, qy, gx, gy, (1, 5, 10))
    found = retrieval_scores(qx, qy, gx, gy)
    assert found["map"] == pytest.approx(expected_map, abs=1e-4)
    assert found["recall"] == pytest.approx(expected_recall)
    assert 30 < found["recall"][1] < found["recall"][10] < 100.1


@pytest.mark.parametrize("tile", [2**25, 70])
def test_without_a_gallery_each_query_is_looked_up_among_the_others(monkeypatch, tile):
    monkeypatch.setattr(retrieval, "TILE", tile)
    x, y = blobs(40, 2)
    expected_map, expected_recall = reference(x, y, x, y, (1, 3, 39), own=True)
    found = retrieval_scores(x, y, k=(1, 3, 39))
    assert found["map"] == pytest.approx(expected_map, abs=1e-4)
    assert found["recall"] == pytest.approx(expected_recall)
    assert found["recall"][39] == 100


def test_float64_stays_float64():
    (qx, qy), (gx, gy) = blobs(30, 0), blobs(60, 1)
    expected, _ = reference(qx, qy, gx, gy, (1,))
    assert retrieval_scores(qx.double(), qy, gx.double(), gy)["map"] == pytest.approx(expected, abs=1e-10)


def test_equal_similarities_count_together_and_their_order_plays_no_part():
    """Collapsed features: every image is as near as any other, so precision is the share of the class."""
    gallery = torch.ones(8, 3)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    found = retrieval_scores(torch.ones(2, 3), torch.tensor([0, 1]), gallery, labels, k=(1, 5, 6, 8))
    assert found["map"] == pytest.approx(100 * (3 / 8 + 5 / 8) / 2)
    assert found["recall"] == {1: 0.0, 5: 50.0, 6: 100.0, 8: 100.0}  # 5 and 3 irrelevant images count as nearer
    backwards = retrieval_scores(torch.ones(2, 3), torch.tensor([0, 1]), gallery, labels.flip(0), k=(1, 5, 6, 8))
    assert backwards == found


def test_two_equally_near_relevant_images_are_a_hit_at_one():
    gallery = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]])
    found = retrieval_scores(torch.tensor([[1.0, 0]]), torch.tensor([0]), gallery, torch.tensor([0, 0, 1]), k=(1,))
    assert found == {"map": 100.0, "recall": {1: 100.0}}


def test_perfect_features_are_perfect_and_autocast_changes_nothing():
    x, y = torch.eye(5).repeat(4, 1), torch.arange(5).repeat(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert retrieval_scores(x, y, k=(1,)) == {"map": 100.0, "recall": {1: 100.0}}


X, Y = blobs(20, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: retrieval_scores(X, Y, X, Y, k=(1, 21)), ConfigError, "k = 21 neighbours .* between 1 and .* 20"),
        (lambda: retrieval_scores(X, Y, k=(20,)), ConfigError, "k = 20 neighbours .* from, 19"),
        (lambda: retrieval_scores(X, Y, X, Y, k=(0,)), ConfigError, "k = 0"),
        (lambda: retrieval_scores(X / 0, Y), InputError, "query features: row 0 holds NaN"),
        (lambda: retrieval_scores(X, Y, X * torch.nan, Y), InputError, "gallery features: row 0 holds NaN"),
        (lambda: retrieval_scores(0 * X, Y), InputError, "zero"),
        (lambda: retrieval_scores(X, Y - 1), InputError, "have no label"),
        (lambda: retrieval_scores(X, Y, X[:, :2], Y), InputError, "2 wide"),
        (
            lambda: retrieval_scores(X, torch.cat([Y[:-1] % 2, torch.tensor([3])]), class_names=list("abcd")),
            InputError,
            "1 classes have a single image, .* d. Look queries up in a gallery",
        ),
        (lambda: retrieval_scores(X, Y, X, Y % 3), InputError, "1 classes of the queries have no image .*: 3"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
