"""Weighted kNN against the published classifier's output, a loop written from the formula, and bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.errors import ConfigError, InputError
from relssl.evaluators import features as blocks
from relssl.evaluators import knn
from relssl.evaluators.knn import knn_accuracies, knn_accuracy, knn_protocol, weighted_knn

GOLDEN = Path(__file__).parent.parent / "golden" / "knn.npz"


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def loop_scores(train_x, train_y, test_x, k, temperature, num_classes):
    """The formula, one test image at a time, in float64."""
    scores = np.zeros((len(test_x), num_classes))
    for i, query in enumerate(test_x.double().numpy()):
        similarity = train_x.double().numpy() @ query
        for j in np.argsort(-similarity)[:k]:
            scores[i, train_y[j]] += np.exp(similarity[j] / temperature)
    return scores


@pytest.mark.evidence(
    "shared", "part", "weighted kNN of the ReSA repository: right images of top-1 and top-5, k = 5 to 25",
    golden="knn", dtype="float32", tolerance="exact",
)  # fmt: skip
@pytest.mark.parametrize("case", ["c10", "c100"])
def test_equals_the_published_classifier(case):
    golden = np.load(GOLDEN)
    arrays = {
        name: torch.from_numpy(golden[f"{case}__{name}"])
        for name in ("train_features", "train_labels", "test_features", "test_labels")
    }
    for place, k in enumerate(golden[f"{case}__ks"]):
        accuracy = knn_accuracy(
            arrays["train_features"],
            arrays["train_labels"],
            arrays["test_features"],
            arrays["test_labels"],
            k=int(k),
            temperature=float(golden[f"{case}__T"]),
            num_classes=int(golden[f"{case}__num_classes"]),
        )
        num_test = len(arrays["test_labels"])
        for name, expected in (("top1", golden[f"{case}__top1"]), ("top5", golden[f"{case}__top5_strict"])):
            assert round(accuracy[name] * num_test / 100) == round(float(expected[place]) * num_test / 100)
            assert accuracy[name] == pytest.approx(float(expected[place]), abs=1e-9)


@pytest.mark.parametrize(("num_train", "num_test", "k"), [(40, 7, 5), (41, 1, 41), (3, 9, 1)])
def test_scores_equal_a_loop_whatever_the_blocks(monkeypatch, num_train, num_test, k):
    train_x, test_x = rows(num_train, 6, 0), rows(num_test, 6, 1)
    train_y = torch.arange(num_train) % 3
    expected = loop_scores(train_x, train_y, test_x, k, 0.07, 4)
    for query_block, key_block in ((512, 16_384), (2, 7), (1, 1)):
        monkeypatch.setattr(blocks, "QUERY_BLOCK", query_block)
        monkeypatch.setattr(blocks, "KEY_BLOCK", key_block)
        scores = weighted_knn(train_x, train_y, test_x, k=k, temperature=0.07, num_classes=4)
        assert scores.dtype == torch.float32
        assert scores.shape == (num_test, 4)
        np.testing.assert_allclose(scores.numpy(), expected, rtol=2e-5)
        assert (scores[:, 3] == 0).all()


def test_a_class_without_a_vote_is_never_in_the_top_five():
    train_x = torch.eye(6)
    train_y = torch.arange(6)
    test_x = torch.eye(6)[:1]
    wrong = knn_accuracy(train_x, train_y, test_x, torch.tensor([5]), k=2, num_classes=6)
    right = knn_accuracy(train_x, train_y, test_x, torch.tensor([0]), k=2, num_classes=6)
    assert wrong == {"top1": 0.0, "top5": 0.0}
    assert right == {"top1": 100.0, "top5": 100.0}


def test_features_of_any_length_are_normalised():
    train_x, test_x = rows(50, 8, 2), rows(20, 8, 3)
    train_y, test_y = torch.arange(50) % 5, torch.arange(20) % 5
    scaled = train_x * torch.linspace(0.1, 9, 50)[:, None]
    assert knn_accuracy(scaled, train_y, test_x * 3, test_y, k=4) == knn_accuracy(train_x, train_y, test_x, test_y, k=4)


def test_half_precision_and_autocast_do_not_change_float32_arithmetic():
    train_x, test_x = rows(60, 16, 4), rows(30, 16, 5)
    train_y = torch.arange(60) % 6
    plain = weighted_knn(train_x, train_y, test_x, k=9, num_classes=6)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(weighted_knn(train_x, train_y, test_x, k=9, num_classes=6), plain)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert weighted_knn(train_x.half(), train_y, test_x.half(), k=9, num_classes=6).dtype == torch.float32
    assert weighted_knn(train_x.double(), train_y, test_x.double(), k=9, num_classes=6).dtype == torch.float64


def test_fewer_than_five_classes_have_no_top5():
    train_x, train_y = rows(12, 4, 6), torch.arange(12) % 3
    assert knn_accuracy(train_x, train_y, train_x, train_y, k=1) == {"top1": 100.0, "top5": None}


def test_a_row_of_zeros_is_allowed_beside_others():
    train_x = rows(10, 4, 7)
    train_x[3] = 0
    scores = weighted_knn(train_x, torch.arange(10) % 2, train_x, k=3, num_classes=2)
    assert torch.isfinite(scores).all()


BAD = {
    "unlabelled": ({"train_y": torch.full((20,), -1)}, InputError, "no label"),
    "some unlabelled": (
        {"test_y": torch.tensor([0, 1, -1, 0, 1])},
        InputError,
        r"test labels: 1 of 5 images have no label \(label -1\), .*: every image needs one\. Convert .*eval analyse",
    ),
    "k too large": ({"k": 21}, ConfigError, "k = 21 .* 20"),
    "k zero": ({"k": 0}, ConfigError, "k = 0"),
    "temperature": ({"temperature": 0.0}, ConfigError, r"temperature must be at least 0\.0125 .*, got 0\.0"),
    "nan": ({"test_x": torch.full((5, 4), torch.nan)}, InputError, "NaN"),
    "collapsed": ({"train_x": torch.zeros(20, 4)}, InputError, "zero"),
    "one class": ({"train_y": torch.zeros(20, dtype=torch.int64)}, InputError, "one class"),
    "width": ({"test_x": torch.ones(5, 3)}, InputError, "4 wide .* 3"),
    "label beyond classes": ({"num_classes": 1}, InputError, "only 1 classes"),
    "length": ({"train_y": torch.zeros(19, dtype=torch.int64)}, InputError, "20 labels"),
    "float labels": ({"train_y": torch.zeros(20)}, InputError, "integer labels"),
    "empty": (
        {"test_x": torch.ones(0, 4), "test_y": torch.ones(0, dtype=torch.int64)},
        InputError,
        "at least one row",
    ),
    "integers": ({"test_x": torch.ones(5, 4, dtype=torch.int64)}, InputError, "floating-point"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, error, message = BAD[name]
    call = {
        "train_x": rows(20, 4, 8),
        "train_y": torch.arange(20) % 2,
        "test_x": rows(5, 4, 9),
        "test_y": torch.arange(5) % 2,
        "k": 3,
    } | change
    with pytest.raises(error, match=message):
        knn_accuracy(call.pop("train_x"), call.pop("train_y"), call.pop("test_x"), call.pop("test_y"), **call)


@pytest.mark.parametrize("case", ["c10", "c100"])
def test_every_k_of_the_published_classifier_in_one_pass(case):
    golden = np.load(GOLDEN)
    arrays = [
        torch.from_numpy(golden[f"{case}__{name}"])
        for name in ("train_features", "train_labels", "test_features", "test_labels")
    ]
    protocol = knn_protocol("resa")
    assert list(protocol.k) == golden[f"{case}__ks"].tolist()
    assert protocol.temperature == float(golden[f"{case}__T"])
    found = knn_accuracies(*arrays, protocol=protocol, num_classes=int(golden[f"{case}__num_classes"]))
    assert [scores["top1"] for scores in found] == pytest.approx(golden[f"{case}__top1"].tolist(), abs=1e-9)
    assert [scores["top5"] for scores in found] == pytest.approx(golden[f"{case}__top5_strict"].tolist(), abs=1e-9)


def test_several_k_are_each_what_it_would_be_alone(monkeypatch):
    train_x, test_x = rows(60, 6, 0), rows(23, 6, 1)
    train_y, test_y = torch.arange(60) % 7, torch.arange(23) % 7
    protocol = knn_protocol(None, k=(9, 1, 20))
    for block in (8_192, 5):
        monkeypatch.setattr(knn, "VOTE_BLOCK", block)
        found = knn_accuracies(train_x, train_y, test_x, test_y, protocol=protocol)
        assert found == [knn_accuracy(train_x, train_y, test_x, test_y, k=k) for k in (9, 1, 20)]


def test_equal_votes_by_euclidean_distance():
    """The CIFAR code of ReSA: torch.cdist, five nearest, the most frequent label, the lowest of equals."""
    generator = torch.Generator().manual_seed(0)
    train_x = 30 + torch.randn(80, 5, generator=generator) * torch.tensor([1.0, 9, 1, 4, 1])
    test_x = 30 + torch.randn(40, 5, generator=generator) * torch.tensor([1.0, 9, 1, 4, 1])
    train_y = torch.randint(6, (80,), generator=generator)
    test_y = torch.randint(6, (40,), generator=generator)
    nearest = torch.cdist(test_x.double(), train_x.double()).topk(5, largest=False).indices
    predicted = torch.stack([train_y[row].bincount(minlength=6).argmax() for row in nearest])
    expected = 100 * float((predicted == test_y).double().mean())
    (found,) = knn_accuracies(train_x, train_y, test_x, test_y, protocol=knn_protocol("resa_cifar"))
    assert found["top1"] == pytest.approx(expected)
    (weighted,) = knn_accuracies(train_x, train_y, test_x, test_y, protocol=knn_protocol(None, k=(5,)))
    assert weighted != found


def test_named_settings_are_those_of_the_released_codes():
    assert knn_protocol("dino").k == (10, 20, 100, 200)
    assert knn_protocol("dino").temperature == knn_protocol("resa").temperature == 0.07
    assert knn_protocol("dino", k=(3,)).name == "dino (changed)"
    assert (knn_protocol(None, k=(3,)).name, knn_protocol(None, k=(3,)).k) == ("weighted kNN", (3,))
    with pytest.raises(ConfigError, match="unknown kNN protocol: 'dina'; did you mean 'dino'"):
        knn_protocol("dina")
    for temperature in (0.0, 0.0124, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"kNN temperature must be at least 0.0125 .*, got {temperature}"):
            knn_protocol("dino", temperature=temperature)
        with pytest.raises(ConfigError, match=f"kNN temperature must be at least 0.0125 .*, got {temperature}"):
            weighted_knn(*[torch.eye(2), torch.arange(2), torch.eye(2)], k=1, temperature=temperature, num_classes=2)
    assert knn_protocol("dino", temperature=0.0125).temperature == 0.0125
    with pytest.raises(ConfigError, match=r"kNN: distance euclidean takes no temperature, got 0\.07"):
        knn_protocol("resa_cifar", temperature=0.07)
    with pytest.raises(ConfigError, match="kNN: k"):
        knn_protocol("dino", k=())
    train = rows(30, 4, 0), torch.arange(30) % 3
    with pytest.raises(ConfigError, match=r"k = 100 neighbours asked for, .* 30"):
        knn_accuracies(*train, *train, protocol=knn_protocol("dino"))
