"""Evaluating a run: entries in results.json, files beside the weights, few labels, other data, following a run."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_file

from dataset_tools.convert import convert
from pipelines import beton
from pipelines.errors import ConfigError, InputError, RunError
from relssl import checkpoint
from relssl.cli import run as command
from relssl.compare import compare
from relssl.config import load_recipe
from relssl.encode import feature_batches
from relssl.evaluate import (
    Portion,
    evaluate_finetune,
    evaluate_heads,
    evaluate_knn,
    evaluate_linear,
    evaluate_retrieval,
    evaluated_as,
    follow_run,
    open_weights,
)
from relssl.evaluate import follow as following
from relssl.evaluate.task import Task
from relssl.evaluators.finetune import finetune_protocol
from relssl.evaluators.linear import load_head
from relssl.report import write_report
from relssl.runfolder import RunFolder, read_results
from relssl.train import _claimed, train
from tests.relssl import tiny

QUICK = {"epochs": 2, "batch_size": 16}


@pytest.fixture(autouse=True)
def log_as_found():
    """Commands set up the program's log, which the next test neither hears nor writes to."""
    logger = logging.getLogger("relssl")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch with three checkpoints; its data has names."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = tiny.write_recipe(folder)
    for name in ("train", "test"):
        with beton.open(folder / f"{name}.beton") as files:
            pixels, labels = [files.decode(i) for i in range(len(files))], files.labels.tolist()
        names = [f"{tiny.CLASSES[y]}/{tiny.CLASSES[y]}_{i}.png" for i, y in enumerate(labels)]
        samples = list(zip(names, pixels, labels, strict=True))
        convert(samples, folder / f"{name}.beton", classes=tiny.CLASSES, force=True)
    options = ["train.epochs=1", "train.checkpoint.every_updates=1", "train.checkpoint.keep=9", "eval.online=null"]
    train(load_recipe(recipe, options), folder / "run")
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def write_classes(path, labels, side=12, classes=None):
    """One pixel is of the name: files of other names hold other images."""
    images = [np.full((side, side, 3), 20 * y + i, np.uint8) for i, y in enumerate(labels)]
    for image in images:
        image[0, 0] = zlib.crc32(path.stem.encode()) % 256
    convert(((str(i), x, y) for i, (x, y) in enumerate(zip(images, labels, strict=True))), path, classes=classes)
    return path


def only(folder, pattern):
    (place,) = folder.glob(pattern)
    return place


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("evaluator", ["knn", "linear"])
def test_a_damaged_test_image_ends_an_evaluation_and_is_named(run, trained, tmp_path, capsys, evaluator):
    path = shutil.copy(trained / "test.beton", tmp_path / "bad.beton")
    pixels = [np.full((12, 12, 3), 7, np.uint8)] * 4
    convert([(f"dark/{i}.jpg", x, 0) for i, x in enumerate(pixels)], path, classes=tiny.CLASSES, force=True, mode="jpg")
    with beton.open(path) as files:
        start, size = int(files.files[0].offsets[2]), int(files.files[0].sizes[2])
    raw = bytearray(path.read_bytes())
    raw[start + 20 : start + size] = bytes(size - 20)
    path.write_bytes(raw)
    assert command(["eval", evaluator, "--weights", str(run), "--test", str(path), "--device", "cpu"]) == 3
    said = capsys.readouterr().err
    assert "replaced" not in said
    assert "at most" not in said
    assert "bad.beton: sample 2: " in said
    assert "(dark/2.jpg). No image may be left out here: run `relssl verify`" in said


@pytest.mark.parametrize("evaluator", ["linear", "finetune"])
@pytest.mark.parametrize(("select", "told"), [("best", " (changed), best of 2 epochs)\n"), ("last", " (changed))\n")])
def test_which_epoch_is_reported_is_said(run, capsys, evaluator, select, told):
    options = [f"--setting={key}={value}" for key, value in {**QUICK, "select": select}.items()]
    assert command(["eval", evaluator, "--weights", str(run), "--seeds", "0", "--device", "cpu", *options]) == 0
    assert told in capsys.readouterr().out
    if evaluator == "linear":
        head = only(run, "head-*-seed0.safetensors")
        assert command(["eval", "linear", "--weights", str(run), "--head", str(head), "--device", "cpu"]) == 0
        assert "(cached (changed), saved head)\n" in capsys.readouterr().out


# -- kNN


def test_each_k_is_an_entry(run):
    entries = evaluate_knn(open_weights(run), k=[3, 9])
    assert [(e["protocol"]["name"], e["protocol"]["k"]) for e in entries] == [
        ("weighted kNN, k = 3", 3),
        ("weighted kNN, k = 9", 9),
    ]
    assert read_results(run) == entries
    page = write_report(run).read_text()
    assert "kNN (weighted kNN, k = 3) top-1" in page
    with pytest.raises(ConfigError, match=r"k = 100 neighbours asked for, .* 48"):
        evaluate_knn(open_weights(run), protocol="dino")


def test_knn_has_a_view_of_its_own(trained, run):
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["eval"]["knn"] = {"k": 5, "view": {"size": 10, "box": "whole", "interpolation": "bicubic"}}
    (run / "backbone.safetensors").unlink()  # its header has the recipe, too
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    (entry,) = evaluate_knn(open_weights(run))
    assert (entry["view"]["size"], entry["view"]["interpolation"]) == (10, "bicubic")
    assert evaluate_linear(open_weights(run), options=QUICK)["view"]["size"] == 12


# -- few labels


def test_a_share_of_the_labels(run):
    entry = evaluate_linear(open_weights(run), options=QUICK, seeds=[0], portion=Portion(percent=25, seed=3))
    assert (entry["num_train"], entry["subset"]) == (12, "25 %, draw 3")
    assert only(run, "head-cached-changed-25pct-draw3-*-seed0.safetensors").name == entry["saved"][0]
    (entry,) = evaluate_knn(open_weights(run), portion=Portion(percent=25))
    assert (entry["num_train"], entry["subset"]) == (12, "25 %, draw 0")


def test_a_published_list(run, tmp_path):
    (tmp_path / "few.txt").write_text("dark_0.png\nlight_1.png\ndark_2.png\nlight_3.png\n")
    portion = Portion(listing=tmp_path / "few.txt")
    (entry,) = evaluate_knn(open_weights(run), k=3, portion=portion)
    assert (entry["num_train"], entry["subset"]) == (4, "few.txt")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "few.txt").write_text("dark_10.png\nlight_11.png\nlight_3.png\n")
    evaluate_knn(open_weights(run), k=3, portion=Portion(listing=tmp_path / "other" / "few.txt"))
    assert [e["num_train"] for e in read_results(run)] == [4, 3]  # lists of one name are not one list
    with pytest.raises(ConfigError, match=r"k = 5 neighbours asked for, .* 4\."):
        evaluate_knn(open_weights(run), portion=portion)
    (tmp_path / "few.txt").write_text("dark_0.png\ndark_2.png\n")
    with pytest.raises(InputError, match=r"train.beton \(few.txt\) has no image of 1 of the classes of .*: light"):
        evaluate_knn(open_weights(run), k=2, portion=portion)


def test_random_weights_are_called_that(run, capsys):
    assert command(["eval", "knn", "--weights", str(run), "--random-init"]) == 0
    assert "random weights; neighbours from train.beton; tested on test.beton" in capsys.readouterr().out
    assert read_results(run)[0]["pretrained_on"] is None


def test_two_ways_to_choose_labels_are_one_too_many(run, tmp_path, capsys):
    with pytest.raises(ConfigError, match="--draw 3 is one of the draws of --percent"):
        Portion(seed=3)
    with pytest.raises(ConfigError, match="give one of them"):
        Portion(percent=1, listing=tmp_path / "few.txt")
    assert command(["eval", "linear", "--weights", str(run), "--percent", "1", "--subset", "x.txt"]) == 2
    assert command(["eval", "knn", "--weights", str(run), "--percent", "1"]) == 2
    assert "1 % of 48 images are 0, fewer than the 2 classes" in capsys.readouterr().err


def test_classes_of_one_image_are_mentioned(run, caplog):
    with caplog.at_level("INFO", logger="relssl.evaluate"):
        evaluate_linear(open_weights(run), options=QUICK, seeds=[0], portion=Portion(percent=5))
    assert "note: 2 classes have a single training image" in caplog.text


# -- fine-tuning


def finetune(run, **changes):
    call = {"protocol": "plain", "options": QUICK, "seeds": [0]} | changes
    return evaluate_finetune(open_weights(run), **call)


def test_finetuning_keeps_weights_and_head(run):
    entry = finetune(run, seeds=[0, 1], portion=Portion(percent=50))
    assert (entry["evaluator"], entry["weights"], entry["num_train"]) == ("finetune", "pretrained", 24)
    assert len(entry["top1"]["values"]) == 2
    place = only(run, "finetuned-plain-changed-50pct-draw0-*-seed0.safetensors")
    assert entry["saved"][0] == place.name
    tuned, before = open_weights(place), open_weights(run)
    assert (tuned.origin, tuned.epochs) == ("finetuned", 1)
    assert not same_weights(tuned.backbone, before.backbone)
    head = only(run, "finetuned-head-plain-changed-50pct-draw0-*-seed0.safetensors")
    again = evaluate_heads(tuned, [head])
    assert again["top1"]["values"] == entry["top1"]["values"][:1]
    assert (again["evaluator"], again["weights"], again["subset"]) == ("finetune", "finetuned", "50 %, draw 0")
    with pytest.raises(InputError, match="was trained on other weights of conv4 than these"):
        evaluate_heads(before, [head])
    page = write_report(run).read_text()
    assert "fine-tuning (plain (changed), 50 %, draw 0) top-1" in page
    assert "saved head, fine-tuned weights" in page
    assert "(backbone)" in page


@pytest.mark.parametrize("augment", [False, True])
def test_finetuning_goes_without_a_rest_of_one_image(run, caplog, augment):
    """The last map of these images is one pixel, of which one image has no batch statistics."""
    options = {"epochs": 1, "batch_size": 47, "augment": augment}
    with caplog.at_level("INFO", logger="relssl.evaluate"):
        entry = finetune(run, options=options)
    assert entry["num_train"] == 48
    assert "note: batches of 47 leave 1 of 48 images over, others in each epoch; they are left out" in caplog.text
    caplog.clear()
    finetune(run, options={**options, "drop_last": True})
    finetune(run, options={**options, "batch_size": 46})
    assert "left out" not in caplog.text


def test_a_linear_probe_takes_a_rest_of_one_image(run, monkeypatch):
    """Its backbone is frozen: no batch statistics are taken."""
    sizes = []
    monkeypatch.setattr(
        "relssl.evaluate.linear.feature_batches",
        lambda backbone, loader: (sizes.append(len(batch[2])) or batch for batch in feature_batches(backbone, loader)),
    )
    options = {"epochs": 1, "batch_size": 47}
    evaluate_linear(open_weights(run), protocol="ressl_small", options=options, device="cpu")
    assert sizes == [47, 1, 47, 1]  # two seeds


@pytest.mark.parametrize("augment", [False, True])
def test_one_image_is_nothing_to_finetune_on(run, tmp_path, augment):
    one, other = (tiny.write_data(tmp_path / f"{name}.beton", count=1, seed=len(name)) for name in ("one", "other"))
    message = r"one\.beton: 1 image\(s\) to train on \(all\), and a batch needs at least 2\. Give"
    with pytest.raises(InputError, match=message):
        finetune(run, options={**QUICK, "augment": augment}, train=one, test=other)


def test_finetuning_is_a_function_of_its_seed(run, trained, tmp_path):
    other = Path(shutil.copytree(trained / "run", tmp_path / "other"))
    first, second = finetune(run), finetune(other)
    assert first["top1"] == second["top1"]
    (name,) = first["saved"]
    assert second["saved"] == [name]
    assert same_weights(open_weights(run / name).backbone, open_weights(other / name).backbone)
    finetune(run, seeds=[1])
    assert not same_weights(
        open_weights(run / name).backbone, open_weights(run / name.replace("seed0", "seed1")).backbone
    )


def test_an_interrupted_finetuning_leaves_nothing(run, monkeypatch, capsys):
    from relssl.evaluators import finetune as module

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_test", interrupted)
    before = sorted(run.rglob("*"))
    assert command(["eval", "finetune", "--weights", str(run), "--setting", "epochs=1"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("relssl")]


def views_of(run, **changes):
    """The training views that a fine-tuning by `protocol` would have, with eval.linear.`plan`."""
    weights = open_weights(run)
    plan = changes.get("plan")
    linear = weights.recipe.eval.linear.model_copy(update={"plan": plan})
    section = weights.recipe.eval.model_copy(update={"linear": linear})
    weights.recipe = weights.recipe.model_copy(update={"eval": section})
    with Task(weights, None, None, "cpu") as task:
        (spec,) = task.training_views(finetune_protocol(changes["protocol"]).crop)
        return spec


def test_training_views_are_the_recipes_or_the_protocols(run):
    plan = [{"size": 10, "flip": 0.1}]
    assert (views_of(run, protocol="resa", plan=plan).size, views_of(run, protocol="resa", plan=plan).flip) == (10, 0.1)
    spec = views_of(run, protocol="resa")
    assert (spec.size, spec.box_kind, spec.box_options["scale"], spec.flip) == (12, "random_resized", (0.08, 1.0), 0.5)
    assert (spec.interpolation, spec.antialias) == ("bilinear", True)
    for other in (plan, None):
        spec = views_of(run, protocol="relicv2", plan=other)
        assert (spec.size, spec.box_kind, spec.interpolation, spec.antialias) == (12, "byol", "bicubic", False)
    padded = [{"size": 12, "box": {"pad_crop": {"padding": 2}}}]
    assert views_of(run, protocol="relicv2", plan=padded).box_kind == "pad_crop"


def test_without_training_views_images_are_as_they_are_tested(run, caplog):
    with caplog.at_level("INFO", logger="relssl.evaluate"):
        finetune(run)
        assert "the recipe has no training views for this protocol: random resized crops of 12 pixels" in caplog.text
        caplog.clear()
        finetune(run, protocol="relational")
        assert "crops" not in caplog.text


# -- saved heads


def test_a_saved_head_is_tested_without_training(run, trained, tmp_path, capsys):
    entry = evaluate_linear(open_weights(run), protocol="relational", options={"epochs": 2}, seeds=[0, 1])
    heads = [only(run, f"head-relational-changed-*-seed{seed}.safetensors") for seed in (0, 1)]
    again = evaluate_heads(open_weights(run), heads)
    assert again["top1"] == entry["top1"]
    assert again["protocol"]["name"] == "relational (changed), saved head"
    assert (again["train"], again["num_train"], again["seeds"]) == ("train.beton", 48, [0, 1])
    other = tiny.write_data(tmp_path / "other.beton", seed=8, count=20)
    assert command(["eval", "linear", "--weights", str(run), "--head", str(heads[0]), "--test", str(other)]) == 0
    assert "trained on train.beton; tested on other.beton" in capsys.readouterr().out
    assert command(["eval", "linear", "--weights", str(run), "--head", str(heads[0]), "--percent", "1"]) == 2
    assert "leave --percent out" in capsys.readouterr().err
    assert command(["eval", "linear", "--weights", str(run), "--head", str(heads[0]), "--draw", "1"]) == 2
    assert "leave --draw out" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="two of these heads are of seed 0"):
        evaluate_heads(open_weights(run), [heads[0], heads[1], heads[0]])
    assert [e["num_test"] for e in read_results(run)] == [48, 48, 20]


def test_a_head_of_an_earlier_version_is_believed_beside_its_weights_only(run, tmp_path):
    evaluate_linear(open_weights(run), options=QUICK, seeds=[0])
    head = only(run, "head-cached-changed-*-seed0.safetensors")
    weight, bias, about = load_head(head)
    del about["weights"]
    header = {"relssl": json.dumps(about)}
    for place in (head, tmp_path / "head.safetensors"):
        save_file({"weight": weight, "bias": bias}, place, metadata=header)
    assert evaluate_heads(open_weights(run), [head])["top1"]["mean"] > 0
    with pytest.raises(InputError, match="does not say on which weights it was trained, and does not lie beside these"):
        evaluate_heads(open_weights(run), [tmp_path / "head.safetensors"])


def test_a_head_that_does_not_belong_is_refused(run, tmp_path):
    evaluate_linear(open_weights(run), options=QUICK, seeds=[0])
    evaluate_linear(open_weights(run), protocol="relational", options=QUICK, seeds=[0])
    head = only(run, "head-cached-changed-*-seed0.safetensors")
    with pytest.raises(InputError, match="was trained on other weights"):
        evaluate_heads(open_weights(run, random_init=True), [head])
    with pytest.raises(ConfigError, match=r"different protocols, cached .* and relational"):
        evaluate_heads(open_weights(run), [head, only(run, "head-relational-changed-*-seed0.safetensors")])
    three = write_classes(tmp_path / "three.beton", [0, 1, 2] * 4, classes=["a", "b", "c"])
    with pytest.raises(InputError, match=r"tells 2 classes apart \(dark, light, ...\) and three.beton has 3"):
        evaluate_heads(open_weights(run), [head], three)
    unnamed = write_classes(tmp_path / "unnamed.beton", [0, 1, 2] * 4)
    with pytest.raises(InputError, match="label 2 found, but there are only 2 classes"):
        evaluate_heads(open_weights(run), [head], unnamed)


def test_a_head_belongs_to_the_view_that_it_was_trained_on(run, trained, tmp_path, capsys):
    recipe = tiny.recipe(trained, eval__view={"size": 8, "box": "whole"})
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    like = ["--recipe", str(tmp_path / "small.yaml")]
    assert command(["eval", "linear", "--weights", str(run), *like, "--seeds", "0"]) == 0
    (entry,) = read_results(run)
    assert f"saved: {entry['saved'][0]}" in capsys.readouterr().out
    test = ["eval", "linear", "--weights", str(run), "--head", str(run / entry["saved"][0])]
    assert command(test) == 3
    assert (
        "was trained on images prepared as size 8, and these are prepared as size 12; give" in capsys.readouterr().err
    )
    assert command([*test, *like]) == 0
    assert read_results(run)[-1]["top1"]["values"] == entry["top1"]["values"]


# -- what one evaluation leaves, another leaves alone


def test_evaluations_that_differ_in_anything_leave_files_and_entries_of_their_own(run, trained, tmp_path):
    other = tiny.write_data(tmp_path / "train.beton", seed=5)  # of the same name
    plans = [[{"size": 12, "box": {"random_resized": {"scale": [low, 1.0]}}}] for low in (0.1, 0.9)]
    recipes = [tiny.recipe(trained, eval__linear={"protocol": "ressl_small", "plan": plan}) for plan in plans]
    for name, recipe in zip("ab", recipes, strict=True):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    calls = [
        {},
        {"train": other},
        {"options": {"lr": 0.1}},
        {"options": {"lr": 0.001}},
        {"portion": Portion(50, None, 1)},
        {"test": other},
        *({"like": name, "options": {"epochs": 1}} for name in "ab"),
    ]
    saved = []
    for call in calls:
        weights, like = open_weights(run), call.pop("like", None)
        if like is not None:
            weights = evaluated_as(weights, load_recipe(tmp_path / f"{like}.yaml"))
        saved += evaluate_linear(weights, **call, seeds=[0], device="cpu")["saved"]
    assert saved[0] == "head-seed0.safetensors"
    assert len(set(saved)) == len(calls)
    assert all((run / name).is_file() for name in saved)
    entries = read_results(run)
    assert [entry["saved"][0] for entry in entries] == saved
    assert [entry["training_views"] is None for entry in entries] == [True] * 6 + [False] * 2
    assert [entry["training_views"][0]["scale"] for entry in entries[6:]] == [[0.1, 1.0], [0.9, 1.0]]
    evaluate_linear(open_weights(run), trained / "train.beton", trained / "test.beton", seeds=[0])  # named, and its own
    assert len(read_results(run)) == len(calls)


def test_lists_of_one_name_are_told_apart_by_what_they_name(run, trained, tmp_path):
    with beton.open(trained / "train.beton") as files:
        names = files.names
    saved = []
    for folder, chosen in (("a", names[:20]), ("b", names[20:40])):
        (tmp_path / folder).mkdir()
        place = tmp_path / folder / "few.txt"
        place.write_text("\n".join(chosen))
        saved += evaluate_linear(open_weights(run), options=QUICK, seeds=[0], portion=Portion(listing=place))["saved"]
    assert len(set(saved)) == 2


def test_files_without_a_manifest_are_told_apart_by_their_place(run, tmp_path):
    saved = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        other = tiny.write_data(tmp_path / name / "other.beton", seed=ord(name))
        beton.manifest_path(other).unlink()
        saved += evaluate_linear(open_weights(run), other, options=QUICK, seeds=[0])["saved"]
    assert len(set(saved)) == 2


def test_pictures_of_other_data_lie_apart(run, tmp_path, capsys):
    other = tiny.write_data(tmp_path / "train.beton", seed=5)
    pictures = [evaluate_retrieval(open_weights(run), train=train)["picture"] for train in (None, other)]
    assert Path(pictures[0]).name == "retrieval.png"
    assert len(set(pictures)) == 2
    assert all(Path(picture).is_file() for picture in pictures)
    page = write_report(run).read_text()
    assert page.count('alt="Test images with the images found for them"') == 2
    assert page.count(", pretrained weights: test images, and what their features find") == 2
    assert command(["eval", "retrieval", "--follow", str(run), "--sheet", str(tmp_path / "s.png")]) == 2
    assert "leave --sheet out" in capsys.readouterr().err


# -- other data


def test_across_data_sets(run, trained, tmp_path, capsys):
    """Pre-trained on one, trained and tested on another, prepared as the other's recipe says."""
    for name in ("b-train", "b-test"):
        write_classes(tmp_path / f"{name}.beton", [0, 1, 2] * 8, side=16, classes=["x", "y", "z"])
    recipe = tiny.recipe(trained)
    recipe["views"]["normalize"] = {"mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2]}
    recipe["eval"]["view"]["size"] = 16
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["--train", str(tmp_path / "b-train.beton"), "--test", str(tmp_path / "b-test.beton")]
    assert command(["eval", "linear", "--weights", str(run), *arguments, "--recipe", str(tmp_path / "b.yaml")]) == 0
    assert "pre-trained on train.beton; trained on b-train.beton; tested on b-test.beton" in capsys.readouterr().out
    (entry,) = read_results(run)
    assert (entry["pretrained_on"], entry["train"], entry["test"]) == ("train.beton", "b-train.beton", "b-test.beton")
    assert (entry["view"]["size"], entry["view"]["normalize"][0]) == (16, [0.4, 0.4, 0.4])
    assert only(run, "head-b-train-*-seed0.safetensors").name == entry["saved"][0]
    assert "pre-trained on train.beton; trained on b-train.beton" in write_report(run).read_text()


def test_a_test_on_the_images_that_were_trained_on_is_refused(run, trained, tmp_path):
    copy = shutil.copy(trained / "train.beton", tmp_path / "copy.beton")
    shutil.copy(trained / "train.beton.json", tmp_path / "copy.beton.json")
    for evaluate in (evaluate_knn, evaluate_linear, evaluate_finetune, evaluate_retrieval):
        with pytest.raises(InputError, match=r"train.beton and copy.beton hold the same images: .* --test"):
            evaluate(open_weights(run), test=Path(copy))
    assert read_results(run) == []


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(run, device, capsys):
    assert command(["eval", "knn", "--weights", str(run), "--device", device]) == 2
    assert "--device" in capsys.readouterr().err


def test_damaged_results_are_found_before_the_work(run, capsys, monkeypatch):
    (run / "results.json").write_text("{")
    monkeypatch.setattr("relssl.evaluate.task.encode", None)  # nothing is encoded
    assert command(["eval", "knn", "--weights", str(run)]) == 3
    assert "is not a results file of relssl" in capsys.readouterr().err


@pytest.mark.parametrize("evaluator", ["linear", "probe", "fewlabel", "finetune"])
def test_a_seed_that_is_given_twice_is_refused(run, evaluator, capsys):
    assert command(["eval", evaluator, "--weights", str(run), "--seeds", "0,1,0"]) == 2
    assert "--seeds has a seed twice" in capsys.readouterr().err


@pytest.mark.parametrize("side", ["train", "test"])
def test_labels_beyond_the_classes_of_the_other_side_are_refused(run, tmp_path, side):
    """Only one side says how many classes there are."""
    named = write_classes(tmp_path / "named.beton", [0, 1] * 6, classes=["a", "b"])
    numbered = write_classes(tmp_path / "numbered.beton", [*range(7), 0])
    data = (numbered, named) if side == "train" else (named, numbered)
    for evaluate in (evaluate_knn, evaluate_linear, evaluate_finetune, evaluate_retrieval):
        with pytest.raises(InputError, match=r"numbered.beton has labels up to 6, and the classes are 2 \(a, b\)"):
            evaluate(open_weights(run), *data)
    fits = write_classes(tmp_path / "fits.beton", [0, 1] * 6)
    (entry,) = evaluate_knn(open_weights(run), fits, named, k=3)
    assert (entry["num_train"], entry["num_test"]) == (12, 12)


def test_another_recipe_changes_evaluation_only(run, trained):
    weights = open_weights(run)
    recipe = load_recipe(trained / "tiny.yaml", ["eval.knn.k=2", "train.epochs=77"])
    changed = evaluated_as(weights, recipe)
    assert changed.recipe.eval.knn.k == 2
    assert changed.recipe.train.epochs == weights.recipe.train.epochs == 1


@pytest.mark.parametrize("names", [None, ["a", "b", "c"]])
def test_other_classes_in_training_and_test_are_refused(run, tmp_path, names):
    two = write_classes(tmp_path / "two.beton", [0, 1] * 6, classes=names and names[:2])
    three = write_classes(tmp_path / "three.beton", [0, 1, 2] * 4, classes=names)
    expected = (
        r"different classes: 2 \(a, b\) against 3 \(a, b, c\)" if names else "no image of 1 of the classes of .*: 2"
    )
    for evaluate in (evaluate_knn, evaluate_linear, evaluate_finetune, evaluate_retrieval):
        with pytest.raises(InputError, match=expected):
            evaluate(open_weights(run), two, three)


# -- which weights, which images


def test_two_files_of_weights_in_one_folder_keep_their_figures_and_heads(run):
    """As after fine-tuning with two amounts of labels, or two imports."""
    for name in ("first", "second"):
        shutil.copy(run / "backbone.safetensors", run / f"{name}.safetensors")
        weights = open_weights(run / f"{name}.safetensors")
        evaluate_knn(weights, k=[3])
        evaluate_linear(weights, protocol="cached", options=QUICK, seeds=[0])
    found = [(entry["evaluator"], entry["weights_file"]) for entry in read_results(run)]
    assert found == [(e, f"{name}.safetensors") for name in ("first", "second") for e in ("knn", "linear")]
    assert len(list(run.glob("head-*first-*.safetensors"))) == len(list(run.glob("head-*second-*.safetensors"))) == 1
    page = write_report(run).read_text()
    assert "kNN (first.safetensors)" in page
    assert "kNN (second.safetensors)" in page


def test_two_sizes_of_images_are_two_figures(run):
    weights = open_weights(run)
    evaluate_knn(weights, k=[3])
    larger = weights.recipe.model_copy(deep=True)
    larger.eval.view["size"] = 16
    evaluate_knn(evaluated_as(weights, larger), k=[3])
    page = write_report(run).read_text()
    assert "kNN (12 px)" in page
    assert "kNN (16 px)" in page
    columns = compare([run, shutil.copytree(run, run.with_name("other"))]).columns
    assert [column.label for column in columns] == ["kNN (12 px)", "kNN (16 px)"]


# -- retrieval


def test_retrieval_is_an_entry_and_a_picture(run, trained):
    entry = evaluate_retrieval(open_weights(run), k=(1, 3), num_queries=4)
    assert list(entry["scores"]) == ["mAP", "R@1", "R@3"]
    assert entry["top1"] is None
    (knn,) = evaluate_knn(open_weights(run), k=1)
    assert entry["scores"]["R@1"]["mean"] == pytest.approx(knn["top1"]["mean"])
    with Image.open(run / "retrieval.png") as sheet:
        assert sheet.height > sheet.width / 3
    evaluate_retrieval(open_weights(run, random_init=True), k=(1, 3))
    assert "retrieval R@3" in write_report(run).read_text()
    assert not list(run.glob("*writing*"))
    for sheet in (run / "sheet.txt", run / "nowhere" / "sheet.png"):
        with pytest.raises(ConfigError, match=r"a picture is written as \.png, \.jpg, \.jpeg into a folder"):
            evaluate_retrieval(open_weights(run), k=(1, 3), sheet=sheet)
    evaluate_retrieval(open_weights(run), k=(1, 3), within=True)
    page = write_report(run).read_text()
    assert "retrieval (among the training images, train.beton) mAP" in page
    assert "retrieval (among the test images) mAP" in page
    assert {path.name for path in run.glob("retrieval*")} == {
        "retrieval.png",
        "retrieval-random.png",
        "retrieval-within.png",
    }
    assert page.count("test images, and what their features find") == 3


def test_retrieval_within_the_queries(run, tmp_path, capsys):
    entry = evaluate_retrieval(open_weights(run), within=True, num_queries=0)
    assert (entry["train"], entry["num_train"], entry["num_test"]) == (None, None, 48)
    assert not (run / "retrieval.png").exists()
    single = write_classes(tmp_path / "single.beton", [0, 0, 0, 1], classes=["many", "one"])
    with pytest.raises(InputError, match=r"1 classes have a single image.*: one"):
        evaluate_retrieval(open_weights(run), test=single, within=True, k=(1,))
    assert command(["eval", "retrieval", "--weights", str(run), "--within", "--percent", "5"]) == 2
    assert "leave --train, --percent and --subset out" in capsys.readouterr().err


# -- checkpoints and following


def test_a_checkpoint_can_be_evaluated_by_its_place(run):
    first, *_, last = checkpoint.list_checkpoints(run / "checkpoints")
    weights = open_weights(first)
    assert (weights.update, weights.folder) == (1, run)
    assert same_weights(open_weights(last).backbone, open_weights(run).backbone)
    assert not same_weights(weights.backbone, open_weights(run).backbone)
    (entry,) = evaluate_knn(weights)
    assert entry["update"] == 1


def updates(run):
    return [entry["update"] for entry in read_results(run)]


def knn_of(weights):
    return evaluate_knn(weights, command="follow")


def test_folders_that_hold_what_was_meant_are_told(run, tmp_path):
    with pytest.raises(InputError, match=rf"holds checkpoints: give one of {run}/\S+update-00000001, .*; or .*{run}$"):
        open_weights(run / "checkpoints")
    with pytest.raises(InputError, match=rf"has no config.yaml. It holds runs: give one of {run}$"):
        open_weights(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no config.yaml$"):
        open_weights(tmp_path / "empty")


def test_following_a_run_that_has_ended_goes_through_its_checkpoints_once(run):
    assert follow_run(run, knn_of, evaluator="knn", command="follow") == 3
    assert updates(run) == [1, 2, 3]
    assert follow_run(run, knn_of, evaluator="knn", command="follow") == 0
    page = write_report(run).read_text()
    assert "kNN top-1 of checkpoints" in page
    assert "weights of update 3" in page


def test_following_goes_on_where_it_stopped(run):
    def interrupted(weights):
        if weights.update == 2:
            raise KeyboardInterrupt
        return knn_of(weights)

    with pytest.raises(KeyboardInterrupt):
        follow_run(run, interrupted, evaluator="knn", command="follow")
    assert updates(run) == [1]
    assert follow_run(run, knn_of, evaluator="knn", command="follow") == 2
    assert updates(run) == [1, 2, 3]


def test_following_waits_while_the_run_trains(run, tmp_path, monkeypatch):
    """The run writes its second and third checkpoint while it is followed, deletes the first, and ends."""
    (run / "backbone.safetensors").unlink()
    first, second, third = checkpoint.list_checkpoints(run / "checkpoints")
    for path in (second, third):
        shutil.move(path, tmp_path / path.name)
    lock = FileLock(run / ".lock")
    lock.acquire()

    def appear():
        shutil.move(tmp_path / second.name, second)

    def appear_and_end():
        shutil.rmtree(first)
        shutil.move(tmp_path / third.name, third)
        (run / "backbone.safetensors").touch()
        lock.release()

    meanwhile = [lambda: None, appear, appear_and_end]
    monkeypatch.setattr(following.time, "sleep", lambda seconds: meanwhile.pop(0)())
    assert follow_run(run, knn_of, evaluator="knn", command="follow") == 3
    assert updates(run) == [1, 2, 3]
    assert not meanwhile


def test_a_checkpoint_deleted_while_it_is_read_is_let_go(run, monkeypatch, caplog):
    original = checkpoint.load

    def deleted(path):
        if path.name.endswith("2"):
            shutil.rmtree(path)
        return original(path)

    monkeypatch.setattr(checkpoint, "load", deleted)
    with caplog.at_level("INFO", logger="relssl.evaluate"):
        assert follow_run(run, knn_of, evaluator="knn", command="follow") == 2
    assert updates(run) == [1, 3]
    assert "is gone: the run deleted it" in caplog.text


def test_a_damaged_checkpoint_is_passed_over_once(run, caplog):
    path = checkpoint.list_checkpoints(run / "checkpoints")[1] / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with caplog.at_level("INFO", logger="relssl.evaluate"):
        assert follow_run(run, knn_of, evaluator="knn", command="follow") == 2
    assert caplog.text.count("passing over a checkpoint") == 1


def broken_at(update, error):
    def evaluate(weights):
        if weights.update == update:
            raise error
        return knn_of(weights)

    return evaluate


@pytest.mark.parametrize("error", [InputError("row 3 holds NaN"), RunError("the loss became nan")])
def test_a_checkpoint_that_cannot_be_evaluated_is_passed_over(run, caplog, error):
    told = r"2 checkpoints of .* evaluated and 1 passed over, .*: update-00000002; the log says why"
    with caplog.at_level("INFO", logger="relssl.evaluate"), pytest.raises(InputError, match=told):
        follow_run(run, broken_at(2, error), evaluator="knn", command="follow")
    assert updates(run) == [1, 3]
    assert caplog.text.count("passing over") == 1
    assert f"update-00000002, which cannot be evaluated: {error}" in caplog.text
    assert follow_run(run, knn_of, evaluator="knn", command="follow") == 1  # the same command tries it again
    assert updates(run) == [1, 3, 2]


def test_what_is_wrong_with_every_checkpoint_ends_the_following_at_once(run):
    with pytest.raises(InputError, match=r"^no label"):
        follow_run(run, broken_at(1, InputError("no label")), evaluator="knn", command="follow")
    with pytest.raises(ConfigError, match=r"^k = 99"):
        follow_run(run, broken_at(2, ConfigError("k = 99")), evaluator="knn", command="follow")
    assert updates(run) == [1]


def test_the_command_ends_with_the_code_of_what_it_passed_over(run, capsys):
    path = checkpoint.list_checkpoints(run / "checkpoints")[1]
    saved = checkpoint.load(path)
    for key, tensor in saved.model.items():
        saved.model[key] = torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor.clone()
    shutil.rmtree(path)
    checkpoint.save(run / "checkpoints", saved, keep=3)
    assert command(["eval", "knn", "--follow", str(run), "--k", "3"]) == 3
    assert "2 checkpoints of" in capsys.readouterr().err
    assert updates(run) == [1, 3]


def test_what_cannot_be_followed_is_named(run, tmp_path, capsys):
    with pytest.raises(InputError, match="not a run folder"):
        follow_run(tmp_path, knn_of, evaluator="knn", command="follow")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match="is not in training and has no checkpoint"):
        follow_run(run, knn_of, evaluator="knn", command="follow")
    assert command(["eval", "knn", "--weights", str(run), "--follow", str(run)]) == 2
    assert command(["eval", "knn"]) == 2
    assert command(["eval", "knn", "--follow", str(run), "--random-init"]) == 2
    assert capsys.readouterr().err.count("give") == 3


def test_a_run_is_followed_by_its_command(run, capsys):
    assert command(["eval", "knn", "--follow", str(run), "--k", "3"]) == 0
    text = capsys.readouterr().out
    assert "knn, pretrained conv4 at update 3, 48 train and 48 test images" in text
    assert "3 checkpoints evaluated" in text


def test_whether_a_run_is_in_training(run):
    assert not following._is_in_training(run)
    with FileLock(run / ".lock"):
        assert following._is_in_training(run)
    assert not following._is_in_training(run.parent)  # nothing to hold


def test_a_trainer_bears_being_looked_at(run, monkeypatch):
    """A look holds the run's lock for a moment; a trainer that starts just then tries again."""
    look = FileLock(run / ".lock")
    look.acquire()
    monkeypatch.setattr(time, "sleep", lambda seconds: look.release())
    folder = RunFolder(run)
    with _claimed(folder, folder.recipe(), resume=True):
        assert following._is_in_training(run)


# -- results.json


def test_evaluations_at_the_same_time_lose_nothing(tmp_path):
    def add(evaluator):
        for seed in range(10):
            RunFolder(tmp_path).add_result({"evaluator": evaluator, "seeds": [seed]})

    threads = [threading.Thread(target=add, args=(name,)) for name in ("knn", "linear")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_results(tmp_path)) == 20
