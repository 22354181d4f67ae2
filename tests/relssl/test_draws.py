"""Held-out splits: balanced, seeded, and refused where they cannot be."""

from __future__ import annotations

import pytest
import torch

from pipelines.errors import ConfigError, InputError
from relssl.evaluators.draws import held_out_split

LABELS = torch.tensor([0] * 10 + [1] * 5 + [2] * 3 + [3])[
    torch.randperm(19, generator=torch.Generator().manual_seed(0))
]


def test_a_split_holds_every_row_once_and_a_share_of_every_class():
    fit, held = held_out_split(LABELS, 0.2, seed=0)
    assert sorted([*fit.tolist(), *held.tolist()]) == list(range(19))
    assert fit.tolist() == sorted(fit.tolist())
    assert torch.bincount(LABELS[held], minlength=4).tolist() == [2, 1, 1, 0]  # a single image stays for training


def test_no_class_is_held_out_whole():
    labels = torch.tensor([0, 0, 1, 1])
    _, held = held_out_split(labels, 0.9, seed=0)
    assert torch.bincount(labels[held]).tolist() == [1, 1]


def test_the_seed_decides_and_global_randomness_is_untouched():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = held_out_split(LABELS, 0.3, seed=1)[1]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert torch.equal(first, held_out_split(LABELS, 0.3, seed=1)[1])
    others = {tuple(held_out_split(LABELS, 0.3, seed=s)[1].tolist()) for s in range(10)}
    assert len(others) > 5


def test_nothing_can_be_held_out_of_single_images():
    with pytest.raises(InputError, match=r"one labelled image only \(3 images, 3 classes\)"):
        held_out_split(torch.tensor([0, 4, 2]), 0.2, seed=0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_share_lies_between_nothing_and_all(fraction):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        held_out_split(LABELS, fraction, seed=0)


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match="seed must be 0 or more"):
        held_out_split(LABELS, 0.2, seed=-1)
