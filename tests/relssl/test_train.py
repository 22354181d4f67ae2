"""The trainer: whole runs, resuming bit for bit, signals, what a run folder holds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines import beton
from pipelines.errors import ConfigError, InputError, RunError
from relssl import checkpoint
from relssl.config import load_recipe
from relssl.methods.base import Method
from relssl.runfolder import RunFolder
from relssl.train import train
from relssl.weights import load_backbone
from tests.relssl import tiny

ROOT = Path(__file__).resolve().parents[2]
UPDATES = 9  # 3 epochs of 3


@pytest.fixture
def recipe_file(tmp_path):
    return tiny.write_recipe(tmp_path)


def run(recipe_file, out, *overrides, resume=False):
    return train(load_recipe(recipe_file, overrides), out, resume=resume)


def final_state(out):
    path = checkpoint.list_checkpoints(out / "checkpoints")[-1]
    return {  # clones: what is loaded stays mapped to the file
        **{f"model/{k}": v.clone() for k, v in load_file(path / "model.safetensors").items()},
        **{f"optimizer/{k}": v.clone() for k, v in load_file(path / "optimizer.safetensors").items()},
    }


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def losses(out):
    return [(r["update"], r["loss"]) for r in RunFolder(out).read_metrics() if r["kind"] == "train"]


def numbers(out):
    """All metrics but the timings."""
    timings = ("seconds", "images_per_second")
    return [{k: v for k, v in r.items() if k not in timings} for r in RunFolder(out).read_metrics()]


def test_a_run_leaves_what_it_promises(recipe_file, tmp_path):
    out = tmp_path / "run"
    assert run(recipe_file, out) == 0
    records = RunFolder(out).read_metrics()
    assert [r["update"] for r in records if r["kind"] == "train"] == list(range(1, UPDATES + 1))
    evaluations = [r for r in records if r["kind"] == "eval"]
    assert [r["epoch"] for r in evaluations] == [2, 3]
    assert evaluations[0]["evaluator"] == "knn"
    assert 0 <= evaluations[0]["top1"] <= 100
    first = records[0]
    assert first["lr"] == 0  # the warm-up starts at zero
    assert set(first["seconds"]) == {"wait", "forward", "backward", "optimizer"}
    found = load_backbone(out / "backbone.safetensors")
    assert found.epochs == 3
    state = final_state(out)
    for key, value in found.backbone.state_dict().items():
        assert torch.equal(value, state[f"model/encoder.{key}"])
    assert (out / "neighbours.png").is_file()
    assert (out / "views.png").is_file()
    assert "done: 9 updates" in (out / "log.txt").read_text()
    assert json.loads((out / "env.json").read_text())["torch"] == torch.__version__
    assert RunFolder(out).recipe() == load_recipe(recipe_file)
    assert len(checkpoint.list_checkpoints(out / "checkpoints")) == 3  # keep: 3
    assert not list(out.rglob("*.writing*"))


def test_a_run_says_what_it_was_trained_on(recipe_file, tmp_path):
    """By content; earlier runs by their checkpoints; where there is no hash, by the place."""
    data, folder = tmp_path / "train.beton", RunFolder(tmp_path / "run")
    run(recipe_file, folder.path, "eval.online=null", "train.epochs=1")
    with beton.open(data) as files:
        expected = {"images": tiny.COUNT, "hash": files.content_hash}
    assert json.loads(folder.environment.read_text())["training_data"] == expected
    folder.environment.write_text("{}")
    assert folder.training_data() == expected
    shutil.rmtree(folder.checkpoints)
    assert folder.training_data() is None
    beton.manifest_path(data).unlink()
    other = RunFolder(tmp_path / "other")
    run(recipe_file, other.path, "eval.online=null", "train.epochs=1")
    assert other.training_data() == {"images": tiny.COUNT, "hash": None, "files": [str(data.resolve())]}


def test_one_seed_gives_one_result_and_another_another(recipe_file, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(recipe_file, tmp_path / name, f"train.seed={seed}", "eval.online=null")
    a, b, c = (final_state(tmp_path / name) for name in "abc")
    assert_equal_states(a, b)
    assert not torch.equal(a["model/encoder.layer1.conv.weight"], c["model/encoder.layer1.conv.weight"])


class Killed(BaseException):
    """Ends a run as abruptly as a power cut would, as far as Python is concerned."""


@pytest.mark.parametrize(("after", "every"), [(1, 2), (2, 2), (3, 3), (5, 2), (6, 3), (7, 3), (8, 2)])
def test_a_run_killed_anywhere_ends_as_one_that_was_not(recipe_file, tmp_path, monkeypatch, after, every):
    """Checkpoints are written every second or third update and at the end of epochs (of three updates)."""
    every = f"train.checkpoint.every_updates={every}"
    run(recipe_file, tmp_path / "whole", every)
    from relssl import train as module

    original, count = module.run_update, [0]

    def dying(*args, **options):
        metrics = original(*args, **options)
        count[0] += 1
        if count[0] == after:
            raise Killed
        return metrics

    monkeypatch.setattr(module, "run_update", dying)
    with pytest.raises(Killed):
        run(recipe_file, tmp_path / "cut", every)
    monkeypatch.setattr(module, "run_update", original)
    run(recipe_file, tmp_path / "cut", every, resume=True)
    assert_equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")


def test_the_estimate_leaves_no_trace(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr("relssl.train._ESTIMATE_FROM", 10**9)
    run(recipe_file, tmp_path / "without")
    monkeypatch.setattr("relssl.train._ESTIMATE_FROM", 1)
    run(recipe_file, tmp_path / "with")
    assert "estimated time" in (tmp_path / "with" / "log.txt").read_text()
    assert "estimated time" not in (tmp_path / "without" / "log.txt").read_text()
    assert_equal_states(final_state(tmp_path / "without"), final_state(tmp_path / "with"))


def test_a_second_run_into_the_same_folder_is_refused(recipe_file, tmp_path):
    run(recipe_file, tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run already; continue it with --resume auto"):
        run(recipe_file, tmp_path / "run")


def test_resuming_a_finished_run_changes_nothing(recipe_file, tmp_path):
    run(recipe_file, tmp_path / "run")
    before, metrics = final_state(tmp_path / "run"), (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run(recipe_file, tmp_path / "run", resume=True) == 0
    assert_equal_states(before, final_state(tmp_path / "run"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics


def test_resuming_with_another_configuration_is_refused(recipe_file, tmp_path):
    run(recipe_file, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"another configuration.*optim.lr: 0.05 -> 0.1"):
        run(recipe_file, tmp_path / "run", "optim.lr=0.1", resume=True)
    run(recipe_file, tmp_path / "run", "train.log_every=2", "eval.online=null", resume=True)  # these do no harm


def damage_checkpoint(path):
    file = path / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def test_a_damaged_checkpoint_is_passed_over(recipe_file, tmp_path):
    """The one before it is taken, and the run ends as if nothing had happened; with none left it is refused."""
    run(recipe_file, tmp_path / "run")
    whole = final_state(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    damage_checkpoint(checkpoint.list_checkpoints(folder)[-1])
    run(recipe_file, tmp_path / "run", resume=True)
    assert "passing over a damaged checkpoint" in (tmp_path / "run" / "log.txt").read_text()
    assert_equal_states(whole, final_state(tmp_path / "run"))
    for path in checkpoint.list_checkpoints(folder):
        damage_checkpoint(path)
    with pytest.raises(InputError, match="SHA-256 differs"):
        run(recipe_file, tmp_path / "run", resume=True)


def test_a_checkpoint_that_was_not_finished_is_not_seen(recipe_file, tmp_path):
    run(recipe_file, tmp_path / "run")
    newest = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    (newest / "COMPLETE").unlink()
    assert newest not in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")


def test_a_full_disk_leaves_the_earlier_checkpoints(recipe_file, tmp_path, monkeypatch):
    run(recipe_file, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    before = checkpoint.list_checkpoints(folder)
    saved = checkpoint.load(before[-1])

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    saved.position = checkpoint.Position(9, 0, 99)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(folder, saved, keep=1)
    assert checkpoint.list_checkpoints(folder) == before
    assert sorted(folder.iterdir()) == before


def test_a_loss_that_is_not_finite_stops_the_run(recipe_file, tmp_path):
    with pytest.raises(RunError, match=r"the loss is (nan|inf) at update \d+\. The last good checkpoint is"):
        run(recipe_file, tmp_path / "run", "optim.lr=1e30", "optim.schedule.warmup_epochs=0", "eval.online=null")


def test_data_without_labels_is_measured_without_labels(tmp_path):
    recipe_file = tiny.write_recipe(tmp_path, labels=False)
    run(recipe_file, tmp_path / "run")
    evaluation = [r for r in RunFolder(tmp_path / "run").read_metrics() if r["kind"] == "eval"][-1]
    assert evaluation["evaluator"] == "rankme"
    assert evaluation["rankme"] >= 1
    assert evaluation["uniformity"] <= 0


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [("adam", "constant"), ("adamw", "exponential"), ("lars", "multistep"), ("sgd", "warmup_cosine")],
)
def test_optimizers_and_schedules_resume(tmp_path, optimizer, schedule):
    optim = {
        "name": optimizer,
        "lr": 0.01,
        "weight_decay": 1e-3,
        "exclude": "1d",
        "schedule": {"name": schedule, "final": 0.001, "milestones": [1, 2]},
    }
    recipe_file = tiny.write_recipe(tmp_path, optim=optim)
    run(recipe_file, tmp_path / "whole", "eval.online=null")
    run(recipe_file, tmp_path / "cut", "eval.online=null")
    for path in checkpoint.list_checkpoints(tmp_path / "cut" / "checkpoints")[-2:]:
        (path / "COMPLETE").unlink()
    run(recipe_file, tmp_path / "cut", "eval.online=null", resume=True)
    assert_equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))


@pytest.mark.parametrize(
    "override", ["train.precision=bf16", "train.clip_norm=0.1", "train.precision=fp64", "backbone.norm=local"]
)
def test_settings_that_change_the_arithmetic_do(recipe_file, tmp_path, override):
    run(recipe_file, tmp_path / "plain", "eval.online=null")
    run(recipe_file, tmp_path / "run", override, "eval.online=null")
    plain, values = ([loss for _, loss in losses(tmp_path / name)] for name in ("plain", "run"))
    assert plain != values
    assert plain == pytest.approx(values, rel=0.2)


def test_channels_last_reaches_the_backbone(recipe_file, tmp_path, monkeypatch):
    from relssl.methods.ressl import Method

    orders = []
    original = Method.forward

    def watched(self, batch, step):
        view, weight = batch.views["teacher"][0], self.encoder.layer2.conv.weight
        orders.append([x.is_contiguous(memory_format=torch.channels_last) for x in (view, weight)])
        return original(self, batch, step)

    monkeypatch.setattr(Method, "forward", watched)
    for wanted in (True, False):
        orders.clear()
        run(recipe_file, tmp_path / str(wanted), f"train.channels_last={str(wanted).lower()}", "eval.online=null")
        assert orders == [[wanted, wanted]] * UPDATES


def test_float16_on_a_cpu_is_refused(recipe_file, tmp_path):
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        run(recipe_file, tmp_path / "run", "train.precision=fp16")


def test_a_skipped_step_does_not_reach_the_method(recipe_file):
    """A gradient scaler skips steps with infinite gradients; `after_update` must not see them."""
    from relssl.build import build_method, make_optimizer
    from relssl.methods.base import DataInfo, Step
    from relssl.train import run_update

    recipe = load_recipe(recipe_file)
    method = build_method(recipe, DataInfo(48, 2, 16, 9, 3))
    calls = []
    method.after_update = calls.append
    views = {"teacher": (torch.randn(16, 3, 12, 12),), "student": (torch.randn(16, 3, 12, 12),)}
    from pipelines.batch import ViewBatch

    place = torch.arange(16)
    optimizer = make_optimizer(recipe.optim, method)
    for skipped, expected in ((True, 0), (False, 1)):
        optimizer.step_was_skipped = skipped
        batch = ViewBatch(views, place, place, place)
        run_update(method, optimizer, [batch], Step(0, 0), schedule=lambda update: 0.1, num_images=16)
        assert len(calls) == expected


def test_random_numbers_of_a_step_depend_on_its_place_alone(recipe_file, monkeypatch):
    """Whatever drew from torch's global generator before, as a resumed run has not."""
    from pipelines.batch import ViewBatch
    from relssl.build import build_method, make_optimizer
    from relssl.methods.base import DataInfo, Step
    from relssl.methods.ressl import Method
    from relssl.train import run_update

    drawn = []
    original = Method.forward

    def drawing(self, batch, step):
        drawn.append(torch.rand(3))
        return original(self, batch, step)

    monkeypatch.setattr(Method, "forward", drawing)
    recipe = load_recipe(recipe_file)
    method = build_method(recipe, DataInfo(48, 2, 16, 9, 3))
    optimizer = make_optimizer(recipe.optim, method)
    place, x = torch.arange(16), torch.randn(16, 3, 12, 12)
    for update in (4, 4, 5):
        torch.rand(7)
        batch = ViewBatch({"teacher": (x,), "student": (x,)}, place, place, place)
        run_update(method, optimizer, [batch], Step(update, 1), schedule=lambda update: 0.1, num_images=16)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_mended_command_may_use_the_folder_of_one_that_was_refused(recipe_file, tmp_path):
    for bad in ("data.train=absent.beton", "train.batch_size=64"):
        with pytest.raises((ConfigError, InputError)):
            run(recipe_file, tmp_path / "run", bad, "method.queue_size=64")
    assert run(recipe_file, tmp_path / "run") == 0


def test_a_folder_in_use_is_refused(recipe_file, tmp_path):
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(ConfigError, match="another process is training into"):
        run(recipe_file, tmp_path / "run")


def test_weights_that_are_not_finite_are_never_saved(recipe_file, tmp_path, monkeypatch):
    """An update whose loss was finite may leave weights that are not."""

    def break_weights(self, step):
        if step.update == 4:
            self.encoder.layer2.conv.weight.data[0] = float("nan")

    monkeypatch.setattr(Method, "after_update", break_weights)
    recipe = load_recipe(recipe_file, ["train.checkpoint.every_updates=1", "train.log_every=1000"])
    with pytest.raises(RunError, match=r"encoder\.layer2\.conv\.weight of the model's state is not finite at update 5"):
        train(recipe, tmp_path / "run")
    assert checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name.endswith("4")
    options = ["train.checkpoint.every_updates=null", "train.checkpoint.every_epochs=null"]
    with pytest.raises(RunError, match="the loss is nan at update 6"):  # without a checkpoint in between
        train(load_recipe(recipe_file, options), tmp_path / "other")


def test_resuming_on_other_data_is_refused(recipe_file, tmp_path):
    run(recipe_file, tmp_path / "run")
    for path in (tmp_path / "train.beton", tmp_path / "train.beton.json"):
        path.unlink()
    tiny.write_data(tmp_path / "train.beton", seed=5)
    with pytest.raises(InputError, match=r"is not the data that .* was trained on"):
        run(recipe_file, tmp_path / "run", resume=True)


def test_one_unreadable_image_does_not_end_a_run(recipe_file, tmp_path):
    """Training replaces it, the online measure leaves it out, the pictures go without it."""
    from pipelines import beton
    from tests.pipelines.test_crop import smooth_images
    from tests.pipelines.test_loader import damage, jpeg

    path = tmp_path / "jpegs.beton"
    images = smooth_images(48, 12, 12)
    beton.write(path, ((jpeg(image), i % 2) for i, image in enumerate(images)), classes=tiny.CLASSES)
    damage(path, [0])
    assert run(recipe_file, tmp_path / "run", f"data.train={path}") == 0
    records = RunFolder(tmp_path / "run").read_metrics()
    assert records[-2]["unreadable_images"] == 1 or records[-1].get("unreadable_images") == 1
    assert [r["epoch"] for r in records if r["kind"] == "eval"] == [2, 3]
    assert (tmp_path / "run" / "views.png").is_file()


def test_a_measure_that_cannot_be_had_does_not_end_a_run(recipe_file, tmp_path):
    """Test labels of a class that the training data does not have."""
    from pipelines import beton
    from tests.pipelines.test_crop import smooth_images

    beton.write(tmp_path / "one.beton", ((image, 0) for image in smooth_images(48, 12, 12)), classes=["only"])
    data = [f"data.train={tmp_path / 'one.beton'}", f"data.test={tmp_path / 'one.beton'}"]
    assert run(recipe_file, tmp_path / "run", *data) == 0
    assert "not evaluated" in (tmp_path / "run" / "log.txt").read_text()


def test_clipping_bounds_the_step(recipe_file, tmp_path):
    """With plain SGD and a tiny norm the parameters move by at most lr * norm."""
    options = ["eval.online=null", "train.epochs=1", "optim.momentum=0", "optim.weight_decay=0"]
    options += ["optim.schedule.warmup_epochs=0", "train.checkpoint.every_updates=1"]
    run(recipe_file, tmp_path / "run", "train.clip_norm=1e-6", *options)
    paths = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    first, last = (load_file(path / "model.safetensors") for path in (paths[0], paths[-1]))
    moved = max((last[k] - first[k]).abs().max() for k in first if k.startswith("head."))
    assert moved <= 2 * 0.05 * 1e-6 + 1e-8


def test_accumulation_equals_one_batch_where_statistics_allow(tmp_path):
    """Split BN with whole groups, no shuffle, float64: two micro-batches are one batch."""
    changes = {"train__precision": "fp64", "method__shuffle": False, "train__accumulation": "approximate"}
    recipe_file = tiny.write_recipe(tmp_path, **changes)
    run(recipe_file, tmp_path / "one", "eval.online=null")
    run(recipe_file, tmp_path / "two", "eval.online=null", "train.num_micro=2")
    one, two = final_state(tmp_path / "one"), final_state(tmp_path / "two")
    for key in one:
        if "weight" in key or "bias" in key:
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-12)


# -- whole processes


def start(recipe_file, out, *more):
    command = [sys.executable, "-m", "relssl", "train", str(recipe_file), "--out", str(out), "--resume", "auto", *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_update(process, update):
    for line in process.stdout:
        if f"update {update}/" in line:
            return
    pytest.fail(f"the run ended before update {update}")


@pytest.mark.slow
def test_signals_and_sigkill_resume_to_the_same_end(recipe_file, tmp_path):
    epochs = "train.epochs=60"
    whole = start(recipe_file, tmp_path / "whole", epochs, "eval.online=null")
    assert whole.communicate()[0]
    assert whole.returncode == 0
    for number, code, update in (
        (signal.SIGINT, 130, 3),
        (signal.SIGTERM, 143, 20),
        (signal.SIGUSR1, 75, 50),
        (signal.SIGKILL, -9, 90),
    ):
        process = start(recipe_file, tmp_path / "cut", epochs, "eval.online=null")
        wait_for_update(process, update)
        os.kill(process.pid, number)
        rest = process.communicate()[0]
        assert process.returncode == code, rest
        if code > 0:
            assert "a checkpoint is written" in rest
    last = start(recipe_file, tmp_path / "cut", epochs, "eval.online=null")
    text = last.communicate()[0]
    assert last.returncode == 0, text
    assert "resuming at epoch" in text
    assert_equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
