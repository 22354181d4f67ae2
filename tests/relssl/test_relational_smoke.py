"""Relational reasoning on real photographs: as good as the original's essential script in the same setting.

Conv4, K = 4, 64 images, binary cross-entropy, 5,000 images of CIFAR-10, 10 epochs; gates and curve from a run of the
original code. Random streams differ, so curves are compared, not digits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import beton
from relssl.config import load_recipe
from relssl.evaluate import evaluate_linear, open_weights
from relssl.recipes import recipe_path
from relssl.runfolder import RunFolder
from relssl.train import train
from tests.relssl import golden


def first_of_each_class(folder: Path, count: int) -> Iterator[tuple[bytes, int]]:
    for label, place in enumerate(sorted(folder.iterdir())):
        for path in sorted(place.glob("*.jpg"))[:count]:
            yield path.read_bytes(), label


@pytest.mark.slow
def test_it_learns_as_the_original_does(cifar_folder: Path, tmp_path: Path) -> None:
    original = json.loads((golden.FOLDER / "relational_smoke.json").read_text())
    gates, setting = original["suggested_gates"], original["config"]
    classes = sorted(path.name for path in (cifar_folder / "train").iterdir())
    for name, split, count in (("train", "train", 500), ("probe", "train", 1000), ("test", "test", 200)):
        beton.write(tmp_path / f"{name}.beton", first_of_each_class(cifar_folder / split, count), classes=classes)
    recipe = load_recipe(
        recipe_path("relational/cifar10_conv4_essential"),
        [f"data.train={tmp_path / 'train.beton'}", "data.test=null", "eval.online=null", "train.log_every=1"],
    )
    assert (recipe.train.epochs, recipe.train.batch_size) == (setting["epochs"], setting["batch_size"])
    assert train(recipe, tmp_path / "run") == 0

    records = RunFolder(tmp_path / "run").read_metrics()
    per_epoch = len(records) // 10
    assert per_epoch == setting["steps_per_epoch"]
    assert records[0]["loss"] == pytest.approx(original["first_step_loss"], abs=0.05)  # of another initialisation
    losses = [mean(r["loss"] for r in records[e * per_epoch : (e + 1) * per_epoch]) for e in range(10)]
    theirs = [epoch["loss"] for epoch in original["per_epoch"]]
    assert max(abs(a - b) for a, b in zip(losses, theirs, strict=True)) < 0.03, losses
    last = records[-per_epoch:]
    assert 100 * mean(r["pair_accuracy"] for r in last) >= gates["epoch_10_pair_acc_min"]
    assert losses[-1] <= gates["epoch_10_loss_max"]

    accuracy = {}
    for random_init in (False, True):
        weights = open_weights(tmp_path / "run", random_init=random_init)
        entry = evaluate_linear(
            weights, tmp_path / "probe.beton", tmp_path / "test.beton", protocol="relational", seeds=[0]
        )
        accuracy[random_init] = entry["top1"]["mean"]
    gain = accuracy[False] - accuracy[True]
    assert gain >= gates["linear_eval_gain_over_random_init_points_min_100_epochs"], accuracy


def mean(values: Iterator[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
