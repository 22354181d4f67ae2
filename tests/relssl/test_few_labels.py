"""Accuracy against labels: what is drawn, what is trained, what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from pipelines.errors import ConfigError, InputError
from pipelines.subset import balanced_rows
from relssl.evaluators.features import summarise
from relssl.evaluators.few_labels import Amount, few_label_curve, usual_amounts
from relssl.evaluators.heads import labelled_rows, logistic_regression, score_heads

NUM_CLASSES, DIM = 4, 6


def blobs(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    centres = 2 * torch.randn(NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    labels = torch.arange(n) % NUM_CLASSES
    noise = torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return centres[labels] + 2 * noise, labels


TRAIN, TEST = blobs(200, 1), blobs(80, 2)


def curve(amounts, seeds=(0, 1, 2), train=TRAIN, test=TEST, **changes):
    return few_label_curve(*train, *test, num_classes=NUM_CLASSES, amounts=amounts, seeds=seeds, **changes)


def test_each_point_is_logistic_regression_on_seeded_draws():
    (point,) = curve([Amount(per_class=3)])
    rows = labelled_rows(*TRAIN, NUM_CLASSES, "train", "cpu")
    top1 = []
    for seed in range(3):
        index = torch.from_numpy(balanced_rows(TRAIN[1].numpy(), seed, per_class=3))
        weight, bias = logistic_regression(rows, index, NUM_CLASSES, 0.1 * DIM / 12)
        top1.append(float(score_heads(rows.like(*TEST), torch.arange(80), weight[None], bias[None])[0]))
    assert point == {"per_class": 3, "percent": None, "images": 12, "top1": summarise(top1)}
    assert point["top1"]["std"] > 0


def test_more_labels_more_accuracy_and_fewest_come_first():
    lines = []
    points = curve([Amount(percent=100.0), Amount(per_class=1), Amount(percent=10.0)], progress=lines.append)
    assert [p["images"] for p in points] == [4, 20, 200]
    assert points[0]["top1"]["mean"] < points[1]["top1"]["mean"] < points[2]["top1"]["mean"]
    assert [len(p["top1"]["values"]) for p in points] == [3, 3, 1]  # all labels are one draw
    assert lines[0].startswith("1 a class (4 labels): top-1 ")
    assert lines[2].startswith("100 % (200 labels)")


def test_usual_amounts_go_as_far_as_the_smallest_class():
    labels = torch.tensor([0] * 60 + [1] * 12 + [3] * 100)
    assert [a.text for a in usual_amounts(labels)] == ["1 a class", "2 a class", "5 a class", "10 a class", "100 %"]
    assert [a.text for a in usual_amounts(torch.tensor([0, 1]))] == ["100 %"]
    many = torch.arange(1000).repeat_interleave(120)
    assert [a.text for a in usual_amounts(many)][-2:] == ["50 a class", "100 a class"]  # 120,000 are not few


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"amounts": []}, ConfigError, "at least one amount"),
        ({"amounts": [Amount(per_class=51)]}, ConfigError, "class 0 has 50 images: take at most 50"),
        ({"amounts": [Amount(per_class=1)], "seeds": []}, ConfigError, "one seed"),
        ({"amounts": [Amount(per_class=1)], "train": (TRAIN[0], torch.full((200,), -1))}, InputError, "no label"),
        ({"amounts": [Amount(per_class=1)], "train": (TRAIN[0], 0 * TRAIN[1])}, InputError, "the same label"),
        ({"amounts": [Amount(per_class=1)], "test": (TEST[0] * math.nan, TEST[1])}, InputError, "NaN"),
        ({"amounts": [Amount(per_class=1)], "test": (TEST[0][:, 1:], TEST[1])}, InputError, "wide"),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        curve(**arguments)
