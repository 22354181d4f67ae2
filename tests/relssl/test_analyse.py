"""Probe, few-label curve and analysis of a trained run: commands, entries in results.json, files, the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipelines import beton
from relssl.cli import run as relssl_run
from relssl.config import load_recipe
from relssl.evaluate import Portion
from relssl.evaluators.heads import logistic_regression
from relssl.evaluators.probe import ProbeProtocol
from relssl.pictures import neighbour_sheet
from relssl.report import write_report
from relssl.report_analysis import _last
from relssl.runfolder import read_results
from relssl.train import train
from tests.relssl import tiny

QUICK = ["--setting", "least_updates=20", "--grid", "lr=0.03,0.3", "--grid", "weight_decay=0,1e-3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three epochs on 48 pictures of two classes."""
    folder = tmp_path_factory.mktemp("trained")
    train(load_recipe(tiny.write_recipe(folder), ["eval.online=null"]), folder / "run")
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the trained run, without results."""
    return shutil.copytree(trained / "run", tmp_path / "run")


@pytest.fixture
def quick(monkeypatch):
    protocol = ProbeProtocol(lr=(0.1,), weight_decay=(0.0,), penalty=(1e-2,), least_updates=20)
    monkeypatch.setattr("relssl.evaluate.analysis.probe_protocol", lambda: protocol)


def relssl(capsys, *arguments):
    code = relssl_run([str(a) for a in arguments])
    out = capsys.readouterr()
    return code, out.out + out.err


def test_the_probe_as_a_command(capsys, run):
    code, text = relssl(capsys, "eval", "probe", "--weights", run, *QUICK, "--seeds", "0,1")
    assert code == 0, text
    assert "probe, pretrained conv4, 48 train and 48 test images: top-1 " in text
    assert "seed 1: picked lr " in text
    assert "of 4 heads on 10 held-out training images" in text
    assert "tested after training it again on all 48" in text
    assert "check: logistic regression by L-BFGS, top-1 " in text
    assert "time: features " in text
    (entry,) = read_results(run)
    assert (entry["evaluator"], entry["seeds"]) == ("probe", [0, 1])
    assert len(entry["top1"]["values"]) == len(entry["check"]["top1"]["values"]) == len(entry["picked"]) == 2
    assert entry["top1"]["mean"] > 60  # light against dark
    assert entry["protocol"]["name"] == "fast probe (changed)"
    assert entry["picked"][0]["num_fit"] == 38
    assert {"layer", "lr", "weight_decay", "top1"} == entry["picked"][0]["grid"][0].keys()
    page = write_report(run).read_text()
    assert "fast probe top-1" in page
    assert "picked on 20 % of the training images, held out (seed 0: lr 0." in page


def test_the_probe_takes_a_share_of_the_labels_and_another_recipe(capsys, run, tmp_path):
    other = tiny.recipe(tmp_path, eval__view={"size": 8, "box": "whole"})
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    few = ["--percent", "50", "--draw", "1", "--recipe", tmp_path / "other.yaml"]
    code, text = relssl(capsys, "eval", "probe", "--weights", run, *QUICK, *few)
    assert code == 0, text
    assert "probe, pretrained conv4, 24 train and 48 test images: top-1 " in text
    assert "trained on train.beton (50 %, draw 1); tested on test.beton" in text
    (entry,) = read_results(run)
    assert (entry["subset"], entry["num_train"], entry["view"]["size"]) == ("50 %, draw 1", 24, 8)


def test_few_labels_are_those_of_the_same_share(capsys, run, trained, monkeypatch):
    """`fewlabel --percent P --seeds S` trains on the images of `--percent P --draw S`."""
    drawn = []
    monkeypatch.setattr(
        "relssl.evaluators.few_labels.logistic_regression",
        lambda rows, index, *rest: drawn.append(index.tolist()) or logistic_regression(rows, index, *rest),
    )
    code, text = relssl(capsys, "eval", "fewlabel", "--weights", run, "--percent", "25", "--seeds", "0,3")
    assert code == 0, text
    with beton.open(trained / "train.beton") as files:
        assert drawn == [Portion(25, None, seed).of(files).ids.tolist() for seed in (0, 3)]


def test_curves_of_other_amounts_stand_beside_each_other(capsys, run):
    for labels in ("1,4", "2", "2"):
        code, text = relssl(capsys, "eval", "fewlabel", "--weights", run, "--labels", labels, "--seeds", "0")
        assert code == 0, text
    assert [entry["protocol"]["amounts"] for entry in read_results(run)] == [["1 a class", "4 a class"], ["2 a class"]]


def test_few_labels_can_be_drawn_from_a_list(capsys, run, trained, tmp_path):
    names = [f"{i}.png" for i in range(tiny.COUNT)]
    with beton.open(trained / "train.beton") as files:
        samples = [(files.decode(i), int(files.labels[i])) for i in range(len(files))]
    beton.write(tmp_path / "named.beton", samples, classes=tiny.CLASSES, names=names)
    (tmp_path / "list.txt").write_text("\n".join(names[:20]))
    given = ["--train", tmp_path / "named.beton", "--subset", tmp_path / "list.txt", "--labels", "1", "--seeds", "0"]
    code, text = relssl(capsys, "eval", "fewlabel", "--weights", run, *given)
    assert code == 0, text
    assert "20 train and 48 test images" in text
    (entry,) = read_results(run)
    assert (entry["subset"], entry["num_train"]) == ("list.txt", 20)


@pytest.mark.parametrize("evaluator", ["probe", "fewlabel", "analysis"])
def test_checkpoints_can_be_followed(capsys, run, evaluator, quick):
    options = {"probe": QUICK, "fewlabel": ["--labels", "1"], "analysis": ["--map", "none"]}[evaluator]
    command = "analyse" if evaluator == "analysis" else evaluator
    code, text = relssl(capsys, "eval", command, "--follow", run, *options)
    assert code == 0, text
    assert "3 checkpoints evaluated" in text
    assert "pretrained conv4 at update 8, 48 train and 48 test images" in text
    followed = [e["update"] for e in read_results(run) if e["evaluator"] == evaluator]
    assert followed == [6, 8, 9]
    if evaluator == "analysis":
        results = json.loads((run / "results.json").read_text())
        results["results"] = [e for e in results["results"] if (e["evaluator"], e["update"]) != ("analysis", 8)]
        (run / "results.json").write_text(json.dumps(results))
        again = relssl(capsys, "eval", command, "--follow", run, *options)[1]
        assert "1 checkpoints evaluated" in again  # its few-label curve alone does not make it done
    code, text = relssl(capsys, "eval", command, "--follow", run, *options)
    assert (code, "0 checkpoints evaluated" in text) == (0, True)


def test_the_probe_of_several_layers(capsys, run):
    grid = [*QUICK, "--grid", "layer=layer1,layer4,features", "--setting", "refit=false"]
    code, text = relssl(capsys, "eval", "probe", "--weights", run, *grid)
    assert code == 0, text
    assert "of 12 heads" in text
    assert ", layer " in text
    assert "tested as trained on the other 38" in text
    assert {row["layer"] for row in read_results(run)[0]["picked"][0]["grid"]} == {"layer1", "layer4", "features"}
    code, text = relssl(capsys, "eval", "probe", "--weights", run, "--grid", "layer=layer9")
    assert code == 2
    assert "unknown layer: 'layer9'; did you mean" in text


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--grid", "lr"], 2, "--grid takes lr=0.1,0.3"),
        (["--grid", "learning_rate=1"], 2, "unknown setting of the fast probe: 'learning_rate'"),
        (["--grid", "lr=fast"], 2, "lr.0"),
        (["--seeds", "-1"], 2, "--seeds takes whole numbers"),
        (["--setting", "held_out=2"], 2, "held_out"),
        (["--train", "unlabelled.beton"], 3, "unlabelled.beton: 48 of 48 images have no label"),
        (["--train", "single.beton"], 3, "every class has one labelled image only (2 images, 2 classes)"),
    ],
)
def test_probes_that_cannot_be(capsys, run, monkeypatch, options, code, message):
    monkeypatch.chdir(run.parent)
    tiny.write_data(Path("unlabelled.beton"), labels=False)
    tiny.write_data(Path("single.beton"), count=2)
    found, text = relssl(capsys, "eval", "probe", "--weights", run, *options)
    assert found == code, text
    assert message in text
    assert read_results(run) == []


def test_few_labels_as_a_command(capsys, run):
    code, text = relssl(
        capsys, "eval", "fewlabel", "--weights", run, "--labels", "1,4", "--percent", "50,100", "--seeds", "3,4"
    )
    assert code == 0, text
    (entry,) = read_results(run)
    assert [(p["per_class"], p["percent"], p["images"]) for p in entry["curve"]] == [
        (1, None, 2),
        (4, None, 8),
        (None, 50.0, 24),
        (None, 100.0, 48),
    ]
    assert (entry["evaluator"], entry["seeds"], entry["top1"]) == ("fewlabel", [3, 4], None)
    lines = {line.split("  ")[0] for line in text.splitlines()}
    assert {"1 a class", "4 a class", "50 %", "100 %"} <= lines
    code, text = relssl(capsys, "eval", "fewlabel", "--weights", run, "--labels", "25")
    assert code == 2
    assert "class dark has 24 images: take at most 24" in text
    code, text = relssl(capsys, "eval", "fewlabel", "--weights", run, "--percent", "ten")
    assert code == 2
    assert "--percent takes numbers" in text


def test_an_analysis_leaves_numbers_and_pictures(capsys, run, quick):
    code, text = relssl(capsys, "eval", "analyse", "--weights", run, "--map", "tsne", "--map-images", "30")
    assert code == 0, text
    assert "RankMe " in text
    assert "files: analysis/confusion.json, analysis/map.json, analysis/neighbours.png" in text
    few, entry = read_results(run)
    assert (few["evaluator"], entry["evaluator"]) == ("fewlabel", "analysis")
    assert [p["per_class"] for p in few["curve"]] == [1, 2, 5, 10, 20, None]
    free = entry["label_free"]
    assert 1 <= free["rankme"] <= 48
    assert free["uniformity"] < 0 < free["alignment"] < 4
    assert [row["class"] for row in entry["per_class"]] == tiny.CLASSES
    assert sum(row["images"] for row in entry["per_class"]) == 48
    confusion = json.loads((run / "analysis/confusion.json").read_text())
    assert confusion["classes"] == tiny.CLASSES
    right = confusion["counts"][0][0] + confusion["counts"][1][1]
    assert entry["classifier"]["top1"] == pytest.approx(100 * right / 48)
    places = json.loads((run / "analysis/map.json").read_text())
    assert (places["kind"], len(places["x"]), len(places["label"])) == ("tsne", 30, 30)
    for name in ("confusion.svg", "map.svg"):
        picture = ElementTree.fromstring((run / "analysis" / name).read_text())
        assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    with Image.open(run / "analysis/neighbours.png") as picture:
        assert picture.height > 10 * 96
    assert not list((run / "analysis").glob(".*"))


def test_random_weights_are_analysed_beside_the_trained_ones(capsys, run, quick):
    for more in ([], ["--random-init"]):
        code, text = relssl(capsys, "eval", "analyse", "--weights", run, "--map", "none", "--no-few-labels", *more)
        assert code == 0, text
    assert [(e["evaluator"], e["weights"]) for e in read_results(run)] == [
        ("analysis", "pretrained"),
        ("analysis", "random"),
    ]
    assert (run / "analysis-random/confusion.json").is_file()
    page = write_report(run).read_text()
    assert "alignment of two crops" in page
    assert "<th>random initialisation</th><th>pre-trained</th></tr>" in page


def test_analyses_of_several_weights_lie_apart_and_the_finished_ones_are_shown(capsys, run, quick):
    checkpoint = min((run / "checkpoints").iterdir())
    for weights in (run, checkpoint):  # the checkpoint last
        code, text = relssl(capsys, "eval", "analyse", "--weights", weights, "--map", "none", "--no-few-labels")
        assert code == 0, text
    finished, older = read_results(run)
    assert (finished["update"], older["update"]) == (None, int(checkpoint.name.removeprefix("update-")))
    assert finished["files"]["confusion"] == "analysis/confusion.json"
    assert older["files"]["confusion"] == f"analysis-update{older['update']:08d}/confusion.json"
    assert (run / older["files"]["confusion"]).is_file()
    assert _last([finished, older], "analysis", "pretrained") == finished
    assert _last([older], "analysis", "pretrained") == older


def test_an_analysis_without_labels(capsys, run, tmp_path, monkeypatch):
    drawn = []

    def record(rows, **told):
        drawn.append((rows, told["similarities"]))
        return neighbour_sheet(rows, **told)

    monkeypatch.setattr("relssl.evaluate.analysis.neighbour_sheet", record)
    data = tiny.write_data(tmp_path / "unlabelled.beton", labels=False)
    arguments = ["--train", data, "--test", data, "--map", "tsne"]
    code, text = relssl(capsys, "eval", "analyse", "--weights", run, *arguments)
    assert code == 0, text
    (folder,) = (path.name for path in run.glob("analysis-unlabelled-*"))
    assert f"files: {folder}/map.json, {folder}/neighbours.png" in text
    (entry,) = read_results(run)
    assert set(entry["files"]) == {"map", "neighbours"}
    assert "classifier" not in entry
    assert json.loads((run / folder / "map.json").read_text())["label"] is None
    page = write_report(run).read_text()
    assert "t-SNE of the features of 48 test images" in page
    assert "Confusions" not in page
    ((rows, similarities),) = drawn  # the data is its own test set: no image is its own neighbour
    assert not any(np.array_equal(query, found) for query, neighbours in rows for found in neighbours)
    assert all(0 < value < 1 + 1e-5 for line in similarities for value in line)


@pytest.mark.parametrize(
    ("num_classes", "said", "entries"),
    [
        (1, "all training images have the same label: no confusion matrix and no few-label curve", ["analysis"]),
        (12, "every class has a single training image, so nothing can be held out", ["fewlabel", "analysis"]),
    ],
)
def test_an_analysis_with_too_few_labels_for_a_classifier(
    capsys, monkeypatch, run, tmp_path, num_classes, said, entries
):
    images = np.random.default_rng(0).integers(0, 255, (12, 12, 12, 3), dtype=np.uint8)
    data, test = tmp_path / "few.beton", tmp_path / "test.beton"
    for place, side in ((data, images), (test, 255 - images)):
        beton.write(place, ((x, i % num_classes) for i, x in enumerate(side)), classes=[*"abcdefghijkl"][:num_classes])
    lines = []
    monkeypatch.setattr("relssl.evaluate.analysis.log.info", lambda line, *values: lines.append(line % values))
    code, text = relssl(capsys, "eval", "analyse", "--weights", run, "--train", data, "--test", test, "--map", "tsne")
    assert code == 0, text
    assert "\n".join(lines).count(said) == 1
    found = read_results(run)
    assert [entry["evaluator"] for entry in found] == entries
    assert set(found[-1]["files"]) == {"map", "neighbours"}
    assert found[-1]["label_free"]["rankme"] >= 1
    page = write_report(run).read_text()
    assert "t-SNE of the features of 12 test images" in page


def test_an_analysis_of_a_run_that_has_no_test_data(capsys, tmp_path):
    recipe = tiny.write_recipe(tmp_path, labels=False, data={"train": str(tmp_path / "train.beton")})
    train(load_recipe(recipe, ["train.epochs=1", "eval.online=null"]), tmp_path / "run")
    code, text = relssl(capsys, "eval", "analyse", "--weights", tmp_path / "run", "--map", "none")
    assert code == 0, text
    assert "48 train and no test images" in text
    (entry,) = read_results(tmp_path / "run")
    assert (entry["test"], entry["num_test"]) == (None, None)


def test_an_unknown_map_is_refused_before_any_work(capsys, run):
    code, text = relssl(capsys, "eval", "analyse", "--weights", run, "--map", "pca")
    assert code == 2
    assert "got 'pca'" in text
    assert not (run / "analysis").exists()


def test_diverged_weights_are_refused(capsys, run):
    path = run / "backbone.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    tensors["layer4.bn.bias"][0] = torch.nan
    save_file(tensors, path, metadata=metadata)
    for evaluator in ("probe", "fewlabel", "analyse"):
        code, text = relssl(capsys, "eval", evaluator, "--weights", run)
        assert code == 3, text
        assert "NaN or infinite" in text
    assert read_results(run) == []
