"""One evaluation by two gloo processes, launched as users launch it, against one process."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from pipelines import beton
from relssl.cli import run as relssl_run
from relssl.config import load_recipe
from relssl.evaluators.linear import load_head
from relssl.runfolder import read_results
from relssl.train import train
from tests.pipelines.test_crop import smooth_images
from tests.pipelines.test_loader import damage, jpeg
from tests.relssl import tiny
from tests.relssl.test_distributed_training import ENVIRONMENT, ROOT

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "relssl", "eval"]
COMMANDS = {
    "linear": ["--protocol", "ressl_small", "--setting", "epochs=2", "--setting", "batch_size=20", "--seeds", "0"],
    "knn": ["--k", "3,5"],
    "retrieval": [],
    "probe": ["--setting", "least_updates=20", "--grid", "lr=0.1", "--grid", "weight_decay=0"],
    "fewlabel": ["--labels", "1,4", "--seeds", "0"],
}
TOLERANCE = 1e-4  # float32: a forward pass adds in another order for another size of the batch


def launch(*arguments):
    command = [*LAUNCHER, *(str(argument) for argument in arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """On pictures that are hard to tell: where every answer is right, a difference would not show."""
    folder = tmp_path_factory.mktemp("trained")
    train(load_recipe(tiny.write_recipe(folder, lighter=12), ["eval.online=null", "train.epochs=1"]), folder / "run")
    return folder / "run"


def figures(entry):
    """What an entry found, in percent, without recall beyond the nearest few, which is soon whole."""
    if "curve" in entry:
        return [point["top1"]["mean"] for point in entry["curve"]]
    return [(entry["top1"] or entry["scores"]["mAP"])["mean"]]


def without_circumstances(entry):
    return {key: value for key, value in entry.items() if key not in ("command", "date", "seconds", "picture")}


@pytest.mark.slow
@pytest.mark.parametrize("evaluator", COMMANDS)
def test_two_processes_find_what_one_finds(trained, tmp_path, evaluator):
    one, two = (shutil.copytree(trained, tmp_path / name) for name in ("one", "two"))
    options = COMMANDS[evaluator]
    assert relssl_run(["eval", evaluator, "--weights", str(one), *options]) == 0
    done = launch(evaluator, "--weights", two, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"{evaluator}, pretrained conv4, ") == 1  # the main process speaks, the other does not
    assert done.stderr.count("features of 48 test images") == 1
    found = [[without_circumstances(entry) for entry in read_results(folder)] for folder in (one, two)]
    assert len(found[0]) == len(found[1]) > 0
    assert all(0 < figure < 100 for entry in found[0] for figure in figures(entry))
    for a, b in zip(*found, strict=True):
        assert a == b
    command = read_results(two)[0]["command"]
    assert command.startswith(f"torchrun --nproc_per_node 2 -m relssl eval {evaluator} --weights")
    if evaluator == "linear":
        (head,) = (path.name for path in one.glob("head-*"))
        (weight, bias, _), (weight_of_two, bias_of_two, _) = load_head(one / head), load_head(two / head)
        torch.testing.assert_close(weight_of_two, weight, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(bias_of_two, bias, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow
def test_what_one_process_does_is_refused_to_several(trained):
    done = launch("finetune", "--weights", trained)
    assert done.returncode != 0
    assert "finetune is done by one process, and 2 were started; several share knn, linear" in done.stderr
    assert "Traceback" not in done.stderr.partition("ChildFailedError")[0].partition("torch/distributed")[0]


@pytest.mark.slow
def test_damage_that_one_process_meets_ends_them_all(trained, tmp_path):
    """The other waits for features that will never come."""
    bad = tmp_path / "bad.beton"
    images = smooth_images(48, 12, 12)
    beton.write(bad, ((jpeg(image), i % 2) for i, image in enumerate(images)), classes=tiny.CLASSES)
    damage(bad, [1])  # the second image is the second process's
    run = shutil.copytree(trained, tmp_path / "run")
    done = launch("knn", "--weights", run, "--test", bad)
    assert done.returncode != 0
    assert "bad.beton" in done.stderr
    assert done.stderr.count("\nrelssl: ") == 1
    assert read_results(run) == []


def test_a_launcher_of_one_process_changes_nothing(trained, monkeypatch, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert relssl_run(["eval", "finetune", "--weights", str(run), "--setting", "epochs=1", "--percent", "50"]) == 0
