"""The program as a user meets it: real commands in real processes, their output and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relssl.cli import run
from relssl.runfolder import read_results
from tests.relssl import tiny
from tests.relssl.interop import originals

ROOT = Path(__file__).resolve().parents[1]


def relssl(capsys, *arguments):
    """Run a command in this process: (exit code, everything it printed)."""
    code = run([str(a) for a in arguments])
    out = capsys.readouterr()
    return code, out.out + out.err


def process(*arguments, cwd=ROOT, path=""):
    command = [sys.executable, "-m", "relssl", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path} if path else None
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def pictures(tmp_path):
    """Two classes of small PNGs."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def test_help_lists_every_verb(capsys):
    code, text = relssl(capsys, "--help")
    assert code == 0
    verbs = ("convert", "verify", "saliency", "views", "configs", "validate", "train", "eval", "report", "demo")
    for verb in (*verbs, "doctor", "import", "export"):
        assert verb in text


@pytest.mark.parametrize("verb", [["bench", "step"], ["bench", "budget"]])
def test_verbs_of_later_versions_are_refused_by_name(capsys, verb):
    code, text = relssl(capsys, *verb)
    assert code == 2
    assert f"relssl {verb[0]}" in text
    assert "not in this version yet" in text


def test_a_wrong_option_is_a_usage_error(capsys):
    code, text = relssl(capsys, "convert", "--colour", "x", "y")
    assert code == 2
    assert "--colour" in text


def test_convert_and_verify(capsys, pictures, tmp_path):
    out = tmp_path / "out.beton"
    code, text = relssl(capsys, "convert", pictures, out)
    assert code == 0, text
    assert "20 images, 2 classes" in text
    assert f"next: relssl verify {out}" in text
    code, text = relssl(capsys, "verify", out)
    assert code == 0
    assert "is sound" in text
    code, text = relssl(capsys, "convert", pictures, out)
    assert code == 2
    assert "--force" in text
    code, _ = relssl(capsys, "convert", pictures, out, "--force", "--no-labels")
    assert code == 0
    raw = bytearray(out.read_bytes())
    raw[len(raw) // 2] ^= 255
    out.write_bytes(raw)
    code, text = relssl(capsys, "verify", out)
    assert code == 3, text


@pytest.mark.parametrize("what", ["absent", "empty"])
def test_sources_that_are_nothing(capsys, tmp_path, what):
    source = tmp_path / "source"
    if what == "empty":
        source.mkdir()
    code, text = relssl(capsys, "convert", source, tmp_path / "out.beton")
    assert code == 3
    assert str(source) in text
    assert not (tmp_path / "out.beton").exists()


def test_configs_lists_and_copies(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text = relssl(capsys, "configs")
    assert code == 0
    assert "ressl/cifar10_resnet18\n" in text
    code, text = relssl(capsys, "configs", "--copy", "ressl/cifar10_cpu")
    assert code == 0
    assert (tmp_path / "cifar10_cpu.yaml").is_file()
    assert relssl(capsys, "configs", "--copy", "ressl/cifar10_cpu")[0] == 2
    code, text = relssl(capsys, "validate", "cifar10_cpu.yaml", "train.epochs=3")
    assert code == 0
    assert "3 epochs" in text
    code, text = relssl(capsys, "validate", "ressl/cifar11")
    assert code == 2
    assert "ressl/cifar10" in text


def test_the_schema_is_json(capsys):
    code, text = relssl(capsys, "schema")
    assert code == 0
    assert "optim" in json.loads(text)["properties"]


def test_train_evaluate_and_report(capsys, tmp_path, monkeypatch):
    recipe = tiny.write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, text = relssl(capsys, "train", recipe, "--out", "run")
    assert code == 0, text
    assert "report: run/report.html" in text
    assert "next: relssl eval knn --weights run" in text
    code, text = relssl(capsys, "train", recipe, "--out", "run")
    assert code == 2
    assert "--resume auto" in text
    for more in ([], ["--random-init"]):
        for evaluator in ("knn", "linear"):
            code, text = relssl(capsys, "eval", evaluator, "--weights", "run", *more)
            assert code == 0, text
            assert f"{evaluator}, {'random' if more else 'pretrained'} conv4, 48 train and 48 test images" in text
    results = read_results(Path("run"))
    assert [(r["evaluator"], r["weights"]) for r in results] == [
        ("knn", "pretrained"),
        ("linear", "pretrained"),
        ("knn", "random"),
        ("linear", "random"),
    ]
    assert len(results[1]["top1"]["values"]) == 2  # two probe seeds
    assert results[1]["epochs"] == 3
    assert results[3]["epochs"] == 0
    assert Path("run/head-seed0.safetensors").is_file()
    code, text = relssl(capsys, "report", "run")
    assert code == 0
    page = Path("run/report.html").read_text()
    assert "conv4" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is fetched


def test_eval_takes_a_weights_file_and_other_data(capsys, tmp_path, monkeypatch):
    recipe = tiny.write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert relssl(capsys, "train", recipe, "--out", "run")[0] == 0
    Path("elsewhere").mkdir()
    shutil.copy("run/backbone.safetensors", "elsewhere/weights.safetensors")
    other = tiny.write_data(tmp_path / "other.beton", seed=7, count=20)
    arguments = ["--weights", "elsewhere/weights.safetensors", "--test", other, "--k", "3"]
    code, text = relssl(capsys, "eval", "knn", *arguments)
    assert code == 0, text
    (entry,) = read_results(Path("elsewhere"))
    assert (entry["test"], entry["num_test"], entry["protocol"]["k"]) == ("other.beton", 20, 3)


def test_eval_by_a_papers_protocol_trains_on_augmented_views(capsys, tmp_path, monkeypatch):
    changes = {
        "eval__linear": {"protocol": "ressl_small", "options": {"epochs": 2}, "plan": [{"size": 12, "flip": 0.5}]}
    }
    recipe = tiny.write_recipe(tmp_path, **changes)
    monkeypatch.chdir(tmp_path)
    assert relssl(capsys, "train", recipe, "--out", "run")[0] == 0
    code, text = relssl(capsys, "eval", "linear", "--weights", "run", "--seeds", "0", "--setting", "lr=0.1")
    assert code == 0, text
    protocol = read_results(Path("run"))[0]["protocol"]
    assert (protocol["name"], protocol["lr"], protocol["augment"]) == ("ressl_small (changed)", 0.1, True)


def test_other_settings_of_a_measure_stand_beside_it(capsys, tmp_path, monkeypatch):
    recipe = tiny.write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert relssl(capsys, "train", recipe, "--out", "run")[0] == 0
    for k in (3, 9, 3):
        assert relssl(capsys, "eval", "knn", "--weights", "run", "--k", k)[0] == 0
    assert [r["protocol"]["k"] for r in read_results(Path("run"))] == [9, 3]
    assert read_results(Path("run"))[0]["command"] == "relssl eval knn --weights run --k 9"


def test_the_demos_advice_works_on_a_folder_of_classes(capsys, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert relssl(capsys, "convert", pictures, "images.beton", "--no-labels")[0] == 0
    data = ["data.train=images.beton", "data.test=null"]
    code, text = relssl(capsys, "views", "ressl/cifar10_resnet18", *data)
    assert code == 0, text
    small = ["train.epochs=6", "train.batch_size=16", "backbone={name: conv4}"]
    code, text = relssl(capsys, "train", "ressl/cifar10_resnet18", *data, *small, "--out", "runs/mine")
    assert code == 0, text
    assert "rankme" in text


def test_a_full_disk_is_a_sentence(capsys, tmp_path, monkeypatch):
    recipe = tiny.write_recipe(tmp_path)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("relssl.checkpoint.save_file", full)
    code, text = relssl(capsys, "train", recipe, "--out", tmp_path / "run")
    assert code == 1
    assert "relssl: [Errno 28] No space left on device" in text


def test_a_run_whose_config_was_edited_wrongly(capsys, tmp_path):
    recipe = tiny.write_recipe(tmp_path)
    assert relssl(capsys, "train", recipe, "--out", tmp_path / "run")[0] == 0
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("queue_size", "queue_sise"))
    config.write_text(config.read_text().replace("optim:", "optimm:"))
    code, text = relssl(capsys, "eval", "knn", "--weights", tmp_path / "run")
    assert code == 2
    assert "did you mean 'optim'" in text


def test_evaluating_what_is_not_there(capsys, tmp_path):
    code, text = relssl(capsys, "eval", "knn", "--weights", tmp_path / "absent")
    assert code == 3
    assert "there are no weights at" in text
    recipe = tiny.write_recipe(tmp_path)
    from relssl.config import load_recipe
    from relssl.runfolder import RunFolder

    (tmp_path / "run").mkdir()
    RunFolder(tmp_path / "run").describe(load_recipe(recipe), "test")
    code, text = relssl(capsys, "eval", "knn", "--weights", tmp_path / "run")
    assert code == 3
    assert "neither a backbone nor a checkpoint yet" in text


def test_evaluating_without_labels(capsys, tmp_path):
    recipe = tiny.write_recipe(tmp_path, labels=False)
    assert relssl(capsys, "train", recipe, "--out", tmp_path / "run")[0] == 0
    code, text = relssl(capsys, "eval", "linear", "--weights", tmp_path / "run")
    assert code == 3
    assert "train.beton: 48 of 48 images have no label (label -1), and this evaluation compares labels: every" in text
    assert "`relssl eval analyse`" in text


def test_a_damaged_weights_file_is_refused(capsys, tmp_path):
    file = tmp_path / "backbone.safetensors"
    file.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00garbage")
    code, text = relssl(capsys, "eval", "knn", "--weights", file)
    assert code == 3
    assert "cannot read weights" in text
    assert "it is not a safetensors file, or was cut off. Expected a run folder" in text


def test_a_batch_larger_than_the_data(capsys, tmp_path):
    recipe = tiny.write_recipe(tmp_path)
    code, text = relssl(
        capsys, "train", recipe, "train.batch_size=64", "method.queue_size=64", "--out", tmp_path / "run"
    )
    assert code == 2
    assert "larger than the data set, which has 48" in text


def test_a_damaged_data_file(capsys, tmp_path):
    recipe = tiny.write_recipe(tmp_path)
    raw = (tmp_path / "train.beton").read_bytes()
    (tmp_path / "train.beton").write_bytes(raw[: len(raw) // 2])
    code, text = relssl(capsys, "train", recipe, "--out", tmp_path / "run")
    assert code == 3
    assert "train.beton" in text


def test_several_seeds_are_several_runs(capsys, tmp_path):
    recipe = tiny.write_recipe(tmp_path)
    code, text = relssl(capsys, "train", recipe, "--out", tmp_path / "run", "--seeds", "1,2")
    assert code == 0, text
    for seed in (1, 2):
        assert (tmp_path / f"run-seed{seed}" / "backbone.safetensors").is_file()
    code, text = relssl(capsys, "train", recipe, "--seeds", "one")
    assert code == 2
    assert "whole numbers" in text


def test_views_draws_a_sheet(capsys, tmp_path):
    recipe = tiny.write_recipe(tmp_path)
    out = tmp_path / "sheet.png"
    code, text = relssl(capsys, "views", recipe, "--out", out, "--images", "3", "--draws", "2")
    assert code == 0, text
    with Image.open(out) as picture:
        assert picture.width > 4 * 64  # original, teacher, two students
        assert picture.height > 6 * 64
    code, text = relssl(capsys, "views", recipe, "--out", tmp_path / "sheet.txt")
    assert code == 2
    assert "a picture is written as .png, .jpg, .jpeg into a folder that exists; got" in text


def test_weights_come_in_and_go_out(capsys, tmp_path):
    """A checkpoint of somebody else, evaluated, exported, and gone on with."""
    theirs = originals.write(tmp_path / "theirs.tar", originals.relational("conv4"))
    backbone = tmp_path / "backbone.safetensors"
    code, text = relssl(capsys, "import", theirs, backbone)
    assert code == 2
    assert "--recipe relational/cifar10_conv4_essential | relational/cifar10_cpu" in text
    recipe = ["--recipe", "relational/cifar10_cpu"]
    code, text = relssl(capsys, "import", theirs, tmp_path / "run", *recipe)
    assert code == 2
    assert "add --full" in text
    code, text = relssl(capsys, "import", theirs, backbone, *recipe, "--epoch", "200")
    assert code == 0, text
    assert "training checkpoint of relational reasoning, conv4, 200 epochs, as given; 33 entries, all fit" in text
    assert f"next: relssl eval knn --weights {backbone}" in text
    assert relssl(capsys, "import", theirs, backbone, *recipe)[0] == 2  # it exists
    data = [tiny.write_data(tmp_path / f"{name}.beton", seed=i) for i, name in enumerate(("train", "test"))]
    code, text = relssl(capsys, "eval", "knn", "--weights", backbone, "--train", data[0], "--test", data[1], "--k", "5")
    assert code == 0, text
    assert "knn, pretrained conv4" in text
    code, text = relssl(capsys, "export", backbone, tmp_path / "out.safetensors", "--format", "safetensors")
    assert code == 0, text
    assert f'model.load_state_dict(load_file("{tmp_path}/out.safetensors"))' in text
    assert "| kNN | pretrained |" in (tmp_path / "out.safetensors.md").read_text()
    code, text = relssl(capsys, "export", backbone, tmp_path / "out.pth", "--format", "torchvision")
    assert code == 2
    assert "torchvision has no conv4" in text
    own = ["data.test=null", f"data.train={data[0]}", "train.batch_size=16", "eval.online=null", "train.epochs=3"]
    code, text = relssl(capsys, "import", theirs, tmp_path / "run", "--full", *recipe, *own)
    assert code == 0, text
    assert "at epoch 2 of 3 (update 7), with its optimizer" in text
    config = tmp_path / "run" / "config.yaml"
    code, text = relssl(capsys, "train", config, "--out", tmp_path / "run", "--resume", "auto")
    assert code == 0, text
    assert "resuming at epoch 2, update 1 of 3" in text
    assert relssl(capsys, "import", theirs, tmp_path / "run", "--full", *recipe, *own)[0] == 2


def test_a_page_in_place_of_a_checkpoint(capsys, tmp_path):
    page = tmp_path / "ressl-200.pth"
    page.write_text("<!DOCTYPE html><html>Google Drive can't scan this file for viruses</html>")
    code, text = relssl(capsys, "import", page, tmp_path / "backbone.safetensors")
    assert code == 3
    assert "it is a web page" in text
    assert not (tmp_path / "backbone.safetensors").exists()


def test_masks_from_data_to_views(capsys, tmp_path):
    recipe = tiny.write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("name: student", "name: student\n    mask_p: 0.5"))
    code, text = relssl(capsys, "views", recipe, "--out", tmp_path / "a.png")
    assert code == 2
    assert "make masks with relssl saliency" in text
    out, sheet = tmp_path / "masked.beton", tmp_path / "saliency.png"
    code, text = relssl(capsys, "saliency", tmp_path / "train.beton", out, "--sheet", tmp_path / "no" / "sheet.png")
    assert code == 2
    assert not out.exists(), "masks are computed before it is known that the picture cannot be written"
    code, text = relssl(capsys, "saliency", tmp_path / "train.beton", out, "--sheet", sheet, "--images", "5")
    assert code == 0, text
    assert "images/s" in text
    assert f"sheet: {sheet}" in text
    with Image.open(sheet) as picture:
        assert picture.width > 8 * 128  # two images in a row, in four pictures
    code, text = relssl(capsys, "verify", out)
    assert code == 0
    assert "with masks" in text
    code, text = relssl(capsys, "views", recipe, f"data.train={out}", "--out", tmp_path / "a.png")
    assert code == 0, text
    code, text = relssl(capsys, "saliency", out)
    assert code == 2
    assert "--sheet" in text
    code, text = relssl(capsys, "saliency", tmp_path / "train.beton", out)
    assert code == 2
    assert "--force" in text


def test_convert_takes_masks(capsys, pictures, tmp_path):
    masks = tmp_path / "masks" / "cat"
    masks.mkdir(parents=True)
    for i in range(10):
        Image.fromarray(np.full((20, 24), 255, dtype=np.uint8)).save(masks / f"{i}.jpg")
    code, text = relssl(capsys, "convert", pictures, tmp_path / "a.beton", "--masks", masks.parent)
    assert code == 0, text
    assert "masks: 10 from" in text
    assert "10 x no mask file: dog/0.png" in text
    code, text = relssl(capsys, "convert", pictures, tmp_path / "b.beton", "--masks", tmp_path / "absent")
    assert code == 3
    assert "expected a folder of masks" in text


def test_doctor_runs(capsys):
    code, text = relssl(capsys, "doctor")
    assert code in (0, 1)
    assert "torch" in text


def test_a_folder_called_pipelines_is_named(tmp_path):
    """A user's own folder may hide ours under `python -m relssl`."""
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").write_text("")
    done = process("doctor", cwd=tmp_path, path=str(ROOT))
    assert done.returncode == 2
    assert "Is there a folder called pipelines/ in the working directory?" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_program_in_its_own_process(tmp_path):
    done = process("validate", "ressl/digits_demo")
    assert done.returncode == 0, done.stderr
    assert "is valid" in done.stdout
    done = process("validate", "ressl/digits_demo", "optim.lr=fast")
    assert done.returncode == 2
    assert "optim.lr" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_demo_from_start_to_end(tmp_path):
    done = process("demo", "--out", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    table = [line.split() for line in done.stdout.splitlines()]
    rows = {line[0]: line for line in table if line and line[0] in ("kNN", "linear")}
    assert set(rows) == {"kNN", "linear"}
    for row in rows.values():
        numbers = [float(x) for x in row[1:] if x.replace(".", "").replace("+", "").isdigit()]
        assert numbers[-1] >= 10, row  # the gain
    assert (tmp_path / "demo" / "run" / "report.html").is_file()
    again = process("demo", "--out", tmp_path / "demo")  # nothing left to train
    assert again.returncode == 0, again.stderr
    assert "update 50/" not in again.stderr


@pytest.mark.slow
def test_real_photographs_from_folder_to_numbers(cifar_subset, tmp_path):
    """CIFAR-10 JPEGs -> .beton -> ReSSL -> kNN and linear, by the commands of the README."""
    for split in ("train", "test"):
        done = process("convert", cifar_subset / split, tmp_path / f"{split}.beton")
        assert done.returncode == 0, done.stderr
        assert "10 classes" in done.stdout
    data = [f"data.train={tmp_path / 'train.beton'}", f"data.test={tmp_path / 'test.beton'}"]
    small = ["train.epochs=2", "train.batch_size=64", "method.queue_size=256"]
    done = process("train", "ressl/cifar10_cpu", *data, *small, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for evaluator in ("knn", "linear"):
        done = process("eval", evaluator, "--weights", tmp_path / "run")
        assert done.returncode == 0, done.stderr
        assert "300 train and 100 test images" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ressl/imagenet_resnet50", "ressl/imagenet_resnet50_5crop"])
def test_views_of_real_photographs(imagenet_folder, tmp_path, recipe):
    done = process("convert", imagenet_folder, tmp_path / "images.beton")
    assert done.returncode == 0, done.stderr
    assert "500 images, no labels" in done.stdout
    data = f"data.train={tmp_path / 'images.beton'}"
    done = process("views", recipe, data, "--out", tmp_path / "views.png", "--images", "4")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.height > 400
