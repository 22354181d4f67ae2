"""Evaluation inside training: any evaluator, at its own pace, and not a bit of the run changes."""

from __future__ import annotations

import subprocess

import pytest
import yaml

from pipelines.errors import ConfigError
from relssl.config import load_recipe, recipe_from
from relssl.runfolder import RunFolder
from relssl.train import train
from tests.relssl import tiny
from tests.relssl.test_distributed_training import ENVIRONMENT, ROOT, TORCHRUN
from tests.relssl.test_train import assert_equal_states, final_state, losses

EVERYTHING = "eval.online={every_epochs: 1, evaluators: [knn, linear, retrieval, label_free]}"


def run(folder, name, *overrides, **options):
    recipe = load_recipe(folder / "tiny.yaml", overrides)
    assert train(recipe, folder / name, **options) == 0
    return [record for record in RunFolder(folder / name).read_metrics() if record["kind"] == "eval"]


@pytest.fixture
def folder(tmp_path):
    tiny.write_recipe(tmp_path)
    return tmp_path


def test_evaluating_changes_no_bit_of_what_is_trained(folder):
    short = "train.epochs=2"
    assert run(folder, "without", short, "eval.online=null") == []
    records = run(folder, "with", short, EVERYTHING)
    assert [(r["epoch"], r["evaluator"]) for r in records] == [
        (epoch, name) for epoch in (1, 2) for name in ("knn", "linear", "retrieval", "rankme")
    ]
    assert_equal_states(final_state(folder / "without"), final_state(folder / "with"))
    assert losses(folder / "without") == losses(folder / "with")


def test_what_each_evaluator_says(folder):
    records = {r["evaluator"]: r for r in run(folder, "run", "train.epochs=1", EVERYTHING)}
    assert 0 <= records["knn"]["top1"] <= 100
    assert "rankme" not in records["knn"]  # it stands in a record of its own
    assert records["linear"]["num_train"] == records["linear"]["num_test"] == 48
    assert records["linear"]["top1"] > 80  # light and dark pictures
    retrieval = records["retrieval"]
    assert 0 < retrieval["recall_at_1"] <= retrieval["recall_at_5"] <= retrieval["recall_at_10"] <= 100
    assert 40 < retrieval["map"] <= 100
    assert records["rankme"]["rankme"] >= 1
    assert "linear  top1" in (folder / "run" / "log.txt").read_text()


def test_each_has_its_own_pace_and_options(folder):
    evaluators = "{knn: {every_epochs: 1, options: {k: 3}}, linear: {options: {epochs: 1}}}"
    records = run(folder, "run", f"eval.online={{every_epochs: 2, num_train: 20, evaluators: {evaluators}}}")
    assert [(r["epoch"], r["evaluator"]) for r in records] == [
        (1, "knn"),
        (2, "knn"),
        (2, "linear"),
        (3, "knn"),
        (3, "linear"),  # the last epoch is always evaluated
    ]
    assert {r["k"] for r in records if r["evaluator"] == "knn"} == {3}
    assert {r["num_train"] for r in records} == {20}
    assert "rankme" in records[0]


def test_one_that_cannot_measure_does_not_silence_the_others(folder):
    evaluators = "{retrieval: {options: {k: [99]}}, knn: {}}"
    records = run(folder, "run", "train.epochs=1", f"eval.online={{evaluators: {evaluators}}}")
    assert [r["evaluator"] for r in records] == ["knn"]
    assert "retrieval not evaluated: k = 99 neighbours" in (folder / "run" / "log.txt").read_text()


def test_without_labels_the_label_free_measures_take_their_place(tmp_path):
    tiny.write_recipe(tmp_path, labels=False)
    records = run(tmp_path, "run", "train.epochs=1", "eval.online={evaluators: [linear, knn]}")
    assert [r["evaluator"] for r in records] == ["rankme"]


def test_a_resumed_run_evaluates_as_one_that_was_not_interrupted(folder):
    whole = run(folder, "run", "train.epochs=2", EVERYTHING)
    for path in sorted((folder / "run" / "checkpoints").iterdir())[-2:]:
        (path / "COMPLETE").unlink()
    assert run(folder, "run", "train.epochs=2", EVERYTHING, resume=True) == whole


@pytest.mark.parametrize(
    ("online", "message"),
    [
        ("{evaluators: [knn, linar]}", "unknown evaluator: 'linar'; did you mean 'linear'"),
        ("{evaluators: {linar: {}}}", "unknown key in eval.online.evaluators: 'linar'; did you mean 'linear'"),
        ("{evaluators: {knn: {every_epoch: 3}}}", "did you mean 'every_epochs'"),
        ("{evaluators: {knn: {options: {kk: 3}}}}", "unknown option of eval.online.evaluators.knn: 'kk'"),
        ("{evaluators: {linear: {options: {lrr: 3}}}}", "unknown setting of a linear protocol: 'lrr'"),
        ("{evaluators: {label_free: {options: {k: 3}}}}", "unknown option of eval.online.evaluators.label_free: 'k'"),
        ("{every_epochs: 0}", "eval.online.every_epochs"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_run(folder, online, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(folder / "tiny.yaml", [f"eval.online={online}"])


def test_a_list_of_names_stands_for_their_defaults_and_survives_saving(folder):
    recipe = load_recipe(folder / "tiny.yaml", [EVERYTHING])
    assert recipe == recipe_from(yaml.safe_load(recipe.to_yaml()), "again")
    assert list(recipe.eval.online.evaluators.chosen()) == ["knn", "linear", "retrieval", "label_free"]
    assert list(load_recipe(folder / "tiny.yaml").eval.online.evaluators.chosen()) == ["knn"]


@pytest.mark.slow
def test_two_processes_evaluate_as_one(folder):
    options = ["backbone.norm=sync", "train.precision=fp64", "train.epochs=1", EVERYTHING]
    one = run(folder, "one", *options)
    command = [*TORCHRUN, str(folder / "tiny.yaml"), *options, "--out", str(folder / "two")]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    two = [record for record in RunFolder(folder / "two").read_metrics() if record["kind"] == "eval"]
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=1e-6)
