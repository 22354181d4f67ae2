"""Evaluation inside training: any evaluator, at its own pace, and not a bit of the run changes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import time

import pytest
import torch
import yaml

from pipelines.errors import ConfigError
from relssl import checkpoint, dist, online
from relssl.config import Eval, load_recipe, recipe_from
from relssl.evaluate import Portion, evaluate_finetune, evaluate_linear, open_weights
from relssl.evaluators import finetune as tuning
from relssl.evaluators.heads import logistic_regression
from relssl.online import OnlineEvaluator
from relssl.online_options import online_settings
from relssl.runfolder import RunFolder
from relssl.train import train
from tests.relssl import tiny
from tests.relssl.dist_helpers import run_ranks
from tests.relssl.test_distributed_training import ENVIRONMENT, ROOT, TORCHRUN
from tests.relssl.test_train import Killed, assert_equal_states, final_state, losses, numbers

NAMES = ["knn", "linear", "retrieval", "probe", "fewlabel", "finetune", "label_free"]
QUICK = "probe: {options: {epochs: 1, least_updates: 4, lr: [0.1, 1.0], weight_decay: [0.0]}}"
FEW = "fewlabel: {options: {labels: [2, 4], percent: 50, seeds: [0, 1]}}"
TUNED = "finetune: {options: {protocol: plain, epochs: 1, batch_size: 16, percent: 50}}"
EVERYTHING = (
    "eval.online={every_epochs: 1, evaluators: "
    f"{{knn: {{}}, linear: {{}}, retrieval: {{}}, {QUICK}, {FEW}, {TUNED}, label_free: {{}}}}}}"
)


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
        (epoch, name) for epoch in (1, 2) for name in [*NAMES[:-1], "rankme"]
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
    assert records["probe"]["top1"] > 80
    assert records["probe"]["check_top1"] > 80
    few = {key: value for key, value in records["fewlabel"].items() if key.startswith("top1_at")}
    assert list(few) == ["top1_at_2", "top1_at_4", "top1_at_50_percent"]
    assert all(value > 50 for value in few.values())
    assert (records["finetune"]["num_train"], records["finetune"]["protocol"]) == (24, "plain (changed)")
    assert records["finetune"]["top1"] >= 50
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


@pytest.mark.parametrize(
    ("linear", "few_linear"),
    [({"protocol": "ressl_small", "epochs": 1}, {}), ({"protocol": "cached", "epochs": 5}, {"percent": 50, "draw": 2})],
)
def test_what_needs_the_images_measures_as_its_command_does(tmp_path, linear, few_linear):
    """On pictures that are hard to tell, where another seed or draw shows."""
    tiny.write_recipe(tmp_path, lighter=12)
    finetune = {"protocol": "plain", "epochs": 2, "batch_size": 16}
    few = {"percent": 50, "draw": 1}
    evaluators = {"linear": {"options": {**linear, **few_linear}}, "finetune": {"options": {**finetune, **few}}}
    records = run(tmp_path, "run", "train.epochs=1", f"eval.online={{evaluators: {json.dumps(evaluators)}}}")
    weights = open_weights(tmp_path / "run")

    def by_command(evaluate, protocol, seed, percent=None, draw=0):
        options = {key: value for key, value in protocol.items() if key != "protocol"}
        chosen = {"protocol": protocol["protocol"], "options": options, "portion": Portion(percent, None, draw)}
        entry = evaluate(weights, **chosen, seeds=[seed], device="cpu")
        return entry["evaluator"], entry["top1"]["mean"], entry["num_train"], entry["num_test"]

    expected = [by_command(evaluate_linear, linear, 0, **few_linear), by_command(evaluate_finetune, finetune, 0, **few)]
    others = [by_command(evaluate_finetune, finetune, seed, 50, draw)[1] for seed, draw in ((1, 1), (0, 0))]
    others.append(by_command(evaluate_finetune, finetune, 0)[1])
    assert expected[1][1] not in others
    assert [(r["evaluator"], r["top1"], r["num_train"], r["num_test"]) for r in records] == expected
    assert [r["num_train"] for r in records] == [24 if few_linear else 48, 24]


def test_few_labels_are_drawn_from_the_features(folder, monkeypatch):
    """A quarter of those that there are, not of all training images."""
    drawn = []

    def recorded(rows, index, *rest):
        drawn.append(len(index))
        return logistic_regression(rows, index, *rest)

    monkeypatch.setattr("relssl.evaluators.few_labels.logistic_regression", recorded)
    few = "evaluators: {fewlabel: {options: {percent: 25, seeds: [0, 1]}}}"
    run(folder, "run", "train.epochs=1", f"eval.online={{num_train: 32, {few}}}")
    assert drawn == [8, 8]


def test_one_that_cannot_measure_does_not_silence_the_others(folder):
    evaluators = "{retrieval: {options: {k: [99]}}, knn: {}}"
    records = run(folder, "run", "train.epochs=1", f"eval.online={{evaluators: {evaluators}}}")
    assert [r["evaluator"] for r in records] == ["knn"]
    assert "retrieval not evaluated: k = 99 neighbours" in (folder / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"), "CUDA out of memory."),
        (RuntimeError(""), "RuntimeError"),
    ],
)
def test_one_that_has_no_memory_does_not_end_the_run(folder, monkeypatch, error, problem):
    freed = []

    def failing(*args):
        raise error

    monkeypatch.setattr("relssl.online.finetune_on", failing)
    monkeypatch.setattr(OnlineEvaluator, "_free_memory", lambda self: freed.append(self))
    evaluators = "{finetune: {options: {protocol: plain}}, label_free: {}}"
    records = run(folder, "run", "train.epochs=1", f"eval.online={{evaluators: {evaluators}}}")
    assert [r["evaluator"] for r in records] == ["rankme"]
    assert len(freed) == 1
    assert f"finetune not evaluated: {problem}\n" in (folder / "run" / "log.txt").read_text()


def test_features_that_no_process_can_extract_end_the_run(folder, monkeypatch):
    """All extract them together: one that went on alone would leave the others waiting."""

    def failing(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("relssl.online.encode", failing)
    with pytest.raises(torch.OutOfMemoryError):
        run(folder, "run", "train.epochs=1")


def test_without_labels_the_label_free_measures_take_their_place(tmp_path):
    tiny.write_recipe(tmp_path, labels=False)
    records = run(tmp_path, "run", "train.epochs=1", "eval.online={evaluators: [linear, knn]}")
    assert [r["evaluator"] for r in records] == ["rankme"]


def test_a_resumed_run_evaluates_as_one_that_was_not_interrupted(folder):
    whole = run(folder, "run", "train.epochs=2", EVERYTHING)
    for path in sorted((folder / "run" / "checkpoints").iterdir())[-2:]:
        (path / "COMPLETE").unlink()
    assert run(folder, "run", "train.epochs=2", EVERYTHING, resume=True) == whole


TWO = "eval.online={every_epochs: 1, evaluators: {knn: {}, linear: {options: {epochs: 1}}}}"
BY_EPOCH = ["train.epochs=2", "train.checkpoint={every_epochs: 1, every_updates: null, keep: 1}"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A folder with the recipe, and `whole`: a run of two epochs with two evaluators after each."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    tiny.write_recipe(folder)
    run(folder, "whole", *BY_EPOCH, TWO)
    return folder


def kill_at_call(monkeypatch, owner, name, count):
    """The `count`-th call of a function kills the run."""
    original, calls = getattr(owner, name), []

    def dying(*args, **options):
        calls.append(1)
        if len(calls) == count:
            raise Killed
        return original(*args, **options)

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize("epoch", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", ["before", "between two records", "before the mark", "after"])
def test_a_run_killed_about_an_evaluation_makes_it_once(uninterrupted, tmp_path, monkeypatch, place, epoch):
    """Its checkpoint is there already; whoever reads metrics.jsonl afterwards sees each record once."""
    owner, name, count = {
        "before": (OnlineEvaluator, "run", epoch),
        "between two records": (RunFolder, "append_metrics", 5 * epoch),  # three updates and two evaluators an epoch
        "before the mark": (checkpoint, "mark_evaluated", epoch),
        "after": (RunFolder, "append_metrics", 6) if epoch == 1 else (OnlineEvaluator, "neighbour_sheet", 1),
    }[place]
    recipe = load_recipe(uninterrupted / "tiny.yaml", [*BY_EPOCH, TWO])
    with monkeypatch.context() as patched:
        kill_at_call(patched, owner, name, count)
        with pytest.raises(Killed):
            train(recipe, tmp_path / "cut")
    (kept,) = checkpoint.list_checkpoints(tmp_path / "cut" / "checkpoints")
    assert checkpoint.update_of(kept) == 3 * epoch
    assert checkpoint.load(kept).position == checkpoint.Position(epoch, 0, 3 * epoch)
    made = []
    original = OnlineEvaluator.run
    monkeypatch.setattr(OnlineEvaluator, "run", lambda *args, **more: made.append(1) or original(*args, **more))
    assert train(recipe, tmp_path / "cut", resume=True) == 0
    assert len(made) == 2 - epoch + (place != "after")
    assert numbers(tmp_path / "cut") == numbers(uninterrupted / "whole")
    assert_equal_states(final_state(tmp_path / "cut"), final_state(uninterrupted / "whole"))


LONG = "eval.online={every_epochs: 1, evaluators: {knn: {}, finetune: {options: {protocol: plain, epochs: 3}}}}"


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_signal_ends_a_long_evaluation_and_it_is_made_later(folder, monkeypatch, every):
    """With a checkpoint of the epoch before the evaluation, or none but the one that the signal asks for."""
    options = ["train.epochs=2", f"train.checkpoint={{every_epochs: {every}, every_updates: null}}", LONG]
    run(folder, "whole", *options)
    begun, original = [], tuning._train_epoch

    def signalled(model, head, optimizer, batches, *rest):
        begun.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return original(model, head, optimizer, batches, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(tuning, "_train_epoch", signalled)
        assert train(load_recipe(folder / "tiny.yaml", options), folder / "cut") == 128 + signal.SIGTERM
    assert len(begun) == 1
    assert {record["kind"] for record in RunFolder(folder / "cut").read_metrics()} == {"train"}
    log = (folder / "cut" / "log.txt").read_text()
    assert "epoch 1: the evaluation was cut short and will be made when the run goes on" in log
    assert "stopped at update 3 of 6 by SIGTERM; a checkpoint is written" in log
    run(folder, "cut", *options, resume=True)
    assert numbers(folder / "cut") == numbers(folder / "whole")
    assert_equal_states(final_state(folder / "cut"), final_state(folder / "whole"))


def test_a_signal_ends_the_evaluation_of_weights_that_are_not_trained(tmp_path, monkeypatch):
    plan = [{"name": "view", "size": 12}]
    tiny.write_recipe(tmp_path, method={"name": "random"}, views__plan=plan)
    original = tuning._train_epoch
    with monkeypatch.context() as patched:
        patched.setattr(tuning, "_train_epoch", lambda *args: os.kill(os.getpid(), signal.SIGINT) or original(*args))
        assert train(load_recipe(tmp_path / "tiny.yaml", [LONG]), tmp_path / "run") == 130
    assert not (tmp_path / "run" / "backbone.safetensors").exists()
    assert [r["evaluator"] for r in run(tmp_path, "run", LONG, resume=True)] == ["knn", "finetune"]


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
        ("{evaluators: {knn: {options: {k: [3, 4]}}}}", r"knn.k takes whole numbers from 1, got \[3, 4\]"),
        ("{evaluators: {knn: {options: {temperature: 0}}}}", "knn.temperature: kNN temperature must be .*, got 0"),
        ("{evaluators: {knn: {options: {temperature: 0.01}}}}", r"must be at least 0\.0125 .*, got 0\.01"),
        ("{evaluators: {knn: {options: {temperature: warm}}}}", "knn.temperature is a number, got 'warm'"),
        ("{evaluators: {retrieval: {options: {k: [0]}}}}", "retrieval.k takes whole numbers from 1, got 0"),
        ("{evaluators: {probe: {options: {lrr: [1]}}}}", "unknown setting of the fast probe: 'lrr'"),
        ("{evaluators: {probe: {options: {layer: [layer1]}}}}", "probe.layer: .* --follow RUN --grid layer"),
        ("{evaluators: {fewlabel: {options: {label: 3}}}}", "did you mean 'labels'"),
        ("{evaluators: {fewlabel: {options: {percent: 0}}}}", "fewlabel.percent is above 0 and at most 100, got 0"),
        ("{evaluators: {fewlabel: {options: {seeds: []}}}}", "at least one seed"),
        ("{evaluators: {finetune: {options: {protocol: plane}}}}", "fine-tuning protocol: 'plane'"),
        ("{evaluators: {finetune: {options: {percent: 101}}}}", "finetune.percent is above 0 and at most 100"),
        ("{evaluators: {linear: {options: {draw: 1}}}}", "linear.draw: 1 is one of the draws of percent"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_run(folder, online, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(folder / "tiny.yaml", [f"eval.online={online}"])


def test_a_temperature_that_is_no_number_is_refused():
    options = {"evaluators": {"knn": {"options": {"temperature": float("nan")}}}}
    with pytest.raises(ConfigError, match=r"knn\.temperature: kNN temperature must be at least 0\.0125 .*, got nan"):
        online_settings(Eval(view={"size": 12}, online=options))


def test_a_list_of_names_stands_for_their_defaults_and_survives_saving(folder):
    recipe = load_recipe(folder / "tiny.yaml", [EVERYTHING])
    assert recipe == recipe_from(yaml.safe_load(recipe.to_yaml()), "again")
    assert list(recipe.eval.online.evaluators.chosen()) == NAMES
    named = load_recipe(folder / "tiny.yaml", [f"eval.online.evaluators={NAMES}"])
    assert list(named.eval.online.evaluators.chosen()) == NAMES
    assert list(load_recipe(folder / "tiny.yaml").eval.online.evaluators.chosen()) == ["knn"]


@pytest.mark.slow
def test_two_processes_evaluate_as_one(folder):
    options = ["backbone.norm=sync", "train.precision=fp64", "train.epochs=1", EVERYTHING]
    one = run(folder, "one", *options)
    command = [*TORCHRUN, str(folder / "tiny.yaml"), *options, "--out", str(folder / "two")]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    two = [record for record in RunFolder(folder / "two").read_metrics() if record["kind"] == "eval"]
    assert len(one) == len(two) == 7
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=1e-6)


# -- two processes, of which the main one evaluates and the other waits


def _train_in_two(rank, recipe_file, out, options, meanwhile):
    """Train; `meanwhile` happens on the main process when the fine-tuning begins. The exit code."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"}
    os.environ.update(place, MASTER_ADDR="127.0.0.1")
    if rank == 0:
        original = tuning._train_epoch
        tuning._train_epoch = lambda *args: (meanwhile(), original(*args))[1]
    return train(load_recipe(recipe_file, options), out)


def _terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def _wait_long():
    online.monotonic = lambda: time.monotonic() + (dist.PATIENCE - online._MARGIN).total_seconds()


@pytest.mark.slow
def test_two_processes_leave_a_long_evaluation_together(folder):
    """Only the main process hears of the signal, and the other learns of it."""
    options = ["train.epochs=2", "train.checkpoint={every_epochs: 1, every_updates: null}", LONG]
    codes = run_ranks(_train_in_two, 2, folder / "tiny.yaml", folder / "run", options, _terminate)
    assert codes == [128 + signal.SIGTERM] * 2
    assert [path.name for path in checkpoint.list_checkpoints(folder / "run" / "checkpoints")] == ["update-00000003"]
    log = (folder / "run" / "log.txt").read_text()
    assert "on 2 process(es)" in log
    assert "stopped at update 3 of 6 by SIGTERM" in log
    records = [(r["epoch"], r["evaluator"]) for r in run(folder, "run", *options, resume=True)]
    assert records == [(1, "knn"), (1, "finetune"), (2, "knn"), (2, "finetune")]


@pytest.mark.slow
def test_an_evaluation_ends_before_the_patience_of_the_other_process(folder):
    codes = run_ranks(_train_in_two, 2, folder / "tiny.yaml", folder / "run", ["train.epochs=2", LONG], _wait_long)
    assert codes == [0, 0]
    records = [r for r in RunFolder(folder / "run").read_metrics() if r["kind"] == "eval"]
    made = [(r["epoch"], r["evaluator"]) for r in records]
    assert made == [(1, "knn"), (2, "knn"), (2, "finetune")]  # the clock starts anew with each evaluation
    log = (folder / "run" / "log.txt").read_text()
    said = "finetune not evaluated: the other processes have waited 1 h 45 min for the evaluation"
    assert log.count(said) == 1, log


def test_one_process_keeps_nobody_waiting(folder, monkeypatch):
    monkeypatch.setattr(online, "monotonic", itertools.count(0, 10_000).__next__)
    records = run(folder, "run", "train.epochs=1", LONG)
    assert [r["evaluator"] for r in records] == ["knn", "finetune"]
