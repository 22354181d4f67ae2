"""Two gloo processes through the real trainer, launched as users launch it, against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines.loader import ViewLoader
from relssl.build import build_method
from relssl.config import load_recipe
from relssl.dist import mix
from relssl.recipes import recipe_path
from relssl.runfolder import RunFolder
from relssl.train import data_info, train
from tests.relssl import tiny
from tests.relssl.test_train import assert_equal_states, final_state
from tests.relssl.wcl_in_one_process import wcl_loss_of_two_processes

ROOT = Path(__file__).resolve().parents[2]
UPDATES = 21  # 7 epochs of 3
TOLERANCE = 1e-10  # float64; the order of summation differs


ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "relssl.train"]


def launch(arguments):
    """torchrun with two CPU processes; `accelerate launch --cpu` would silently start one."""
    command = [*TORCHRUN, *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


def options(norm):
    return [f"backbone.norm={norm}", "train.precision=fp64", "train.epochs=7", "train.checkpoint.every_updates=null"]


def on_tiny_data(folder):
    """Overrides of a recipe for CIFAR-10."""
    for split, seed in (("train", 0), ("test", 1)):
        tiny.write_data(folder / f"{split}.beton", seed=seed, side=32)
    return [
        f"data.train={folder / 'train.beton'}", f"data.test={folder / 'test.beton'}", "data.engine=resident",
        "eval.online=null", "train.precision=fp64",
    ]  # fmt: skip


def assert_close_states(folder):
    """The runs `one` and `two` ended with the same parameters, buffers and optimizer state."""
    one, two = final_state(folder / "one"), final_state(folder / "two")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=TOLERANCE, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["sync", "split(2)"])
def test_two_processes_equal_one(tmp_path, norm):
    recipe_file = tiny.write_recipe(tmp_path)
    train(load_recipe(recipe_file, options(norm)), tmp_path / "one")
    done = launch([str(recipe_file), *options(norm), "--out", str(tmp_path / "two")])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 process(es)" in done.stderr
    assert_close_states(tmp_path)
    records = [RunFolder(tmp_path / name).read_metrics() for name in ("one", "two")]
    for a, b in zip(*records, strict=True):
        assert a["update"] == b["update"]
        for measure in ("loss", "top1"):
            assert a.get(measure, 0) == pytest.approx(b.get(measure, 0), abs=1e-9)
    assert records[0][-1]["update"] == UPDATES


@pytest.mark.slow
@pytest.mark.parametrize("method", ["resa", "relicv2"])
def test_two_processes_of_another_method_equal_one(method, tmp_path):
    """Methods that gather their targets, from the method's own recipe."""
    more = [*on_tiny_data(tmp_path), "train.epochs=2", "train.batch_size=16", "backbone.norm=sync"]
    train(load_recipe(recipe_path(f"{method}/cifar10_cpu"), more), tmp_path / "one")
    done = launch([f"{method}/cifar10_cpu", *more, "--out", str(tmp_path / "two")])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 process(es)" in done.stderr
    assert_close_states(tmp_path)


@pytest.mark.slow
def test_two_processes_of_wcl_take_the_mean_of_their_gradients(tmp_path):
    """Each holds the other's images constant, so one process does not equal two; one plain step shows the gradient."""
    size = ["train.epochs=1", f"train.batch_size={tiny.COUNT}", "backbone.norm=sync"]
    plain = ["optim.name=sgd", "optim.lr=0.5", "optim.lr_scaling=none", "optim.momentum=0", "optim.weight_decay=0"]
    more = [*on_tiny_data(tmp_path), *size, *plain, "optim.schedule={name: constant}"]
    recipe = load_recipe(recipe_path("wcl/cifar10_cpu"), more)
    done = launch(["wcl/cifar10_cpu", *more, "--out", str(tmp_path / "two")])
    assert done.returncode == 0, done.stdout + done.stderr
    with ViewLoader(
        recipe.data.train, recipe.views.specs(), global_batch=tiny.COUNT, engine="resident", dtype=torch.float64,
        device=torch.device("cpu"), seed=recipe.train.seed,
    ) as loader:  # fmt: skip
        torch.manual_seed(mix(recipe.train.seed, "init"))
        method = build_method(recipe, data_info(recipe, loader)).double().train()
        wcl_loss_of_two_processes(method, next(iter(loader))).backward()
    after = final_state(tmp_path / "two")
    for key, parameter in method.named_parameters():
        expected = parameter.detach() - 0.5 * parameter.grad
        torch.testing.assert_close(
            after[f"model/{key}"], expected, rtol=0, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.slow
def test_two_processes_resume_to_the_same_end(tmp_path):
    """The same world size, local statistics: bit for bit."""
    recipe_file = tiny.write_recipe(tmp_path, backbone={"name": "conv4", "norm": "local"})
    whole = launch([str(recipe_file), "--out", str(tmp_path / "whole")])
    first = launch([str(recipe_file), "--out", str(tmp_path / "cut")])
    assert whole.returncode == first.returncode == 0, whole.stderr + first.stderr
    for path in sorted((tmp_path / "cut" / "checkpoints").iterdir())[-2:]:
        (path / "COMPLETE").unlink()
    resumed = launch([str(recipe_file), "--out", str(tmp_path / "cut"), "--resume", "auto"])
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at epoch" in resumed.stderr
    assert_equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))


@pytest.mark.slow
def test_two_processes_stop_together_at_a_signal_and_go_on(tmp_path):
    recipe_file = tiny.write_recipe(tmp_path)
    arguments = [str(recipe_file), "train.epochs=40", "eval.online=null", "--resume", "auto", "--out"]
    whole = launch([*arguments, str(tmp_path / "whole")])
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [*TORCHRUN, *arguments, str(tmp_path / "cut")],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if "update 12/" in line:
            process.terminate()
            break
    rest = process.communicate(timeout=120)[0]
    assert "by SIGTERM; a checkpoint is written" in rest, rest
    assert not (tmp_path / "cut" / "backbone.safetensors").exists()
    resumed = launch([*arguments, str(tmp_path / "cut")])
    assert resumed.returncode == 0, resumed.stderr
    assert_equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))


@pytest.mark.slow
def test_a_config_error_in_every_process_ends_with_its_code(tmp_path):
    recipe_file = tiny.write_recipe(tmp_path)
    done = launch([str(recipe_file), "train.batch_size=15", "backbone.norm=local", "--out", str(tmp_path / "run")])
    assert done.returncode != 0
    assert "the global batch of 15 images does not divide into 2" in done.stderr
    assert "exitcode  : 2" in done.stderr


@pytest.mark.slow
def test_what_the_main_process_refuses_ends_all_with_one_sentence(tmp_path):
    recipe_file = tiny.write_recipe(tmp_path)
    train(load_recipe(recipe_file), tmp_path / "run")
    done = launch([str(recipe_file), "--out", str(tmp_path / "run")])
    assert done.returncode != 0
    assert done.stderr.count("holds a run already") == 1
    assert "ConfigError" not in done.stderr


@pytest.mark.slow
def test_accumulation_over_two_processes(tmp_path):
    """Two processes with two micro-batches each equal one process with two, shuffle and all."""
    recipe_file = tiny.write_recipe(tmp_path, backbone={"name": "conv4", "norm": "split(4)"})
    more = ["train.precision=fp64", "train.num_micro=2", "train.accumulation=approximate"]
    train(load_recipe(recipe_file, more), tmp_path / "one")
    done = launch([str(recipe_file), *more, "--out", str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr
    assert_close_states(tmp_path)
