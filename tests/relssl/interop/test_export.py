"""What is exported is loaded as its users would, and gives the run's features; what a format cannot hold is refused."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from pipelines.errors import ConfigError, InputError, MissingExtraError, RunError
from relssl import load_backbone as load
from relssl.config import recipe_from
from relssl.evaluate import evaluate_knn, open_weights
from relssl.interop import export, export_formats
from relssl.nets import build_backbone
from relssl.runfolder import RunFolder
from relssl.weights import save_backbone
from tests.relssl import tiny
from tests.relssl.interop import originals

onnx_only = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="ONNX is not installed",
)


def run_of(folder: Path, backbone: dict[str, Any], *, size: int = 12, **changes: Any) -> Path:
    """The folder of a run that has ended, whose backbone has statistics of its own."""
    views = tiny.recipe(folder)["views"]
    values = tiny.recipe(folder, backbone=backbone, eval__view={"size": size, "box": "whole"}, views=views, **changes)
    recipe = recipe_from(values, "test")
    path = folder / "run"
    path.mkdir(parents=True)
    RunFolder(path).describe(recipe, "relssl train tiny")
    torch.manual_seed(0)
    net = build_backbone(recipe.backbone.name, **recipe.backbone.options)
    net.load_state_dict(originals.random_tensors({name: list(t.shape) for name, t in net.state_dict().items()}))
    save_backbone(RunFolder(path).backbone, net, recipe, 3)
    return path


def features(net: nn.Module, size: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return x, net.eval()(x)


def test_safetensors_hold_any_backbone(tmp_path) -> None:
    run = run_of(tmp_path, {"name": "conv4", "width": 2, "norm": "split(2)"})
    out = tmp_path / 'of "us"' / "weights.safetensors"
    done = export(run, out, "safetensors", licence="cc-by-4.0")
    assert done.difference == 0
    namespace: dict[str, Any] = {}
    assert 'load_file("weights.safetensors")' in done.card.read_text()
    exec(done.snippet, namespace)  # the lines that a user is told to type
    x, ours = features(load(run))
    with torch.no_grad():
        assert torch.equal(namespace["model"](x), ours)


@pytest.mark.slow
def test_torchvision_takes_the_weights(tmp_path) -> None:
    from torchvision import models

    run = run_of(tmp_path, {"name": "resnet18"}, size=40)
    out = tmp_path / "weights.pth"
    export(run, out, "torchvision")
    model = models.resnet18(weights=None)
    fit = model.load_state_dict(torch.load(out, weights_only=True), strict=False)
    assert (fit.missing_keys, fit.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    model.fc = nn.Identity()
    _, ours = features(load(run), 40)
    assert torch.equal(features(model, 40)[1], ours)


@pytest.mark.parametrize(
    ("backbone", "suffix"),
    [
        pytest.param({"name": "resnet18"}, ".safetensors", marks=pytest.mark.slow),
        ({"name": "timm:vit_tiny_patch16_224", "img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24}, ".pth"),
    ],
)
def test_timm_takes_the_weights(tmp_path, backbone, suffix) -> None:
    import timm

    size = backbone.get("img_size", 40)
    run = run_of(tmp_path, backbone, size=size)
    out = tmp_path / f"weights{suffix}"
    done = export(run, out, "timm")
    options = {key: value for key, value in backbone.items() if key != "name"}
    name = backbone["name"].removeprefix("timm:")
    model = timm.create_model(name, num_classes=0, checkpoint_path=str(out), **options)
    _, ours = features(load(run), size)
    assert torch.equal(features(model, size)[1], ours)
    assert all(f"{key}={value}" in done.snippet for key, value in options.items())


@onnx_only
@pytest.mark.slow
@pytest.mark.parametrize("bakes", [False, True])
@pytest.mark.parametrize("name", ["conv4", "relicv2_resnet18"])
def test_onnx_runs_any_batch(tmp_path, name, bakes) -> None:
    import onnx
    import onnxruntime

    run = run_of(tmp_path, {"name": name, "width": 0.5}, size=20)
    out = tmp_path / "net.onnx"
    done = export(run, out, "onnx", bake_normalisation=bakes)
    assert done.difference < 1e-5
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    net = load(run)
    for count in (1, 2, 5):
        pixels = torch.rand(count, 3, 20, 20)
        normalised = (pixels - 0.5) / 0.25
        with torch.no_grad():
            ours = net(normalised)
        (theirs,) = session.run(None, {"images": (pixels if bakes else normalised).numpy()})
        assert (torch.from_numpy(theirs) - ours).abs().max() < 1e-4 * ours.abs().max()
    told = {prop.key: prop.value for prop in onnx.load(out).metadata_props}
    assert told["preparation"].endswith("RGB in [0, 1]") == bakes
    assert str(Path(export_formats.__file__).parents[2]).encode() not in out.read_bytes()  # nothing of this machine
    assert sorted(path.name for path in tmp_path.glob("*net*")) == ["net.onnx", "net.onnx.md"]


# -- refusals


@pytest.mark.parametrize(
    ("backbone", "format", "match"),
    [
        ({"name": "conv4"}, "torchvision", "torchvision has no conv4; use --format safetensors or onnx"),
        ({"name": "resnet32"}, "timm", "timm has no resnet32; use --format safetensors or onnx"),
        ({"name": "resnet18", "stem": "cifar", "width": 0.25}, "torchvision", "this one has the stem 'cifar'; use"),
        ({"name": "resnet18", "width": 0.25}, "timm", r"this one has 0\.25 times the width; use"),
        (
            {"name": "relicv2_resnet18", "width": 0.25},
            "torchvision",
            "pad as TensorFlow does.*use --format safetensors",
        ),
        ({"name": "relicv2_resnet18", "width": 0.25}, "timm", "pad as TensorFlow does"),
    ],
)
def test_backbones_that_a_format_cannot_hold(tmp_path, backbone, format, match) -> None:
    with pytest.raises(ConfigError, match=match):
        export(run_of(tmp_path, backbone), tmp_path / "out.pth", format)
    assert not list(tmp_path.glob("out*"))


def test_formats_and_names(tmp_path) -> None:
    run = run_of(tmp_path, {"name": "conv4"})
    with pytest.raises(ConfigError, match="did you mean 'torchvision'"):
        export(run, tmp_path / "out.pth", "torchvison")
    with pytest.raises(ConfigError, match=r"out\.bin does not end in \.safetensors"):
        export(run, tmp_path / "out.bin", "safetensors")
    with pytest.raises(ConfigError, match="--bake-normalisation is of onnx"):
        export(run, tmp_path / "out.safetensors", "safetensors", bake_normalisation=True)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        export(run, tmp_path / "folder.safetensors", "safetensors", force=True)
    export(run, tmp_path / "out.safetensors", "safetensors")
    with pytest.raises(ConfigError, match="exists; use --force"):
        export(run, tmp_path / "out.safetensors", "safetensors")
    export(run, tmp_path / "out.safetensors", "safetensors", force=True)


def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"this export needs onnx, .*pip install relssl\[export\]"):
        export(run_of(tmp_path, {"name": "conv4"}), tmp_path / "out.onnx", "onnx")


@pytest.mark.parametrize("fault", ["weights", "shape", "nan", "unreadable"])
def test_a_file_that_is_not_the_network_is_not_kept(tmp_path, monkeypatch, fault) -> None:
    def spoilt(self: Any, subject: Any, path: Path) -> Any:
        if fault == "unreadable":
            raise RuntimeError("protobuf parsing failed")
        if fault == "shape":
            return lambda x: subject.network(x)[:, :3]
        return lambda x: subject.network(x) * (float("nan") if fault == "nan" else 1.001)

    run = run_of(tmp_path, {"name": "conv4"})
    (tmp_path / "out.safetensors").write_text("what was there")
    monkeypatch.setattr(export_formats.Safetensors, "load", spoilt)
    match = "cannot be loaded again: protobuf" if fault == "unreadable" else "gives other features"
    with pytest.raises(RunError, match=match):
        export(run, tmp_path / "out.safetensors", "safetensors", force=True)
    assert (tmp_path / "out.safetensors").read_text() == "what was there"
    assert not [p for p in tmp_path.iterdir() if "writing" in p.name or p.suffix == ".md"]


@pytest.mark.parametrize("exists", [False, True])
def test_weights_whose_card_cannot_be_written_are_not_kept(tmp_path, exists) -> None:
    run, out = run_of(tmp_path, {"name": "conv4"}), tmp_path / "out.safetensors"
    if exists:
        out.write_text("what was there")
    (run / "results.json").write_text("damaged")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"results\.json is not a results file"):
        export(run, out, "safetensors", force=True)
    assert sorted(tmp_path.iterdir()) == before
    assert not exists or out.read_text() == "what was there"


def test_a_card_tells_the_hash_of_the_file_beside_it(tmp_path) -> None:
    done = export(run_of(tmp_path, {"name": "conv4"}), tmp_path / "out.safetensors", "safetensors")
    card = done.card.read_text()
    assert hashlib.sha256(done.path.read_bytes()).hexdigest() in card
    assert "| file | `out.safetensors`" in card
    assert "writing" not in card
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out.safetensors", "out.safetensors.md"]


def test_a_dead_backbone_is_no_export(tmp_path) -> None:
    run = run_of(tmp_path, {"name": "conv4"})
    weights = open_weights(run)
    nn.init.zeros_(weights.backbone.layer4.bn.weight)
    nn.init.zeros_(weights.backbone.layer4.bn.bias)
    save_backbone(RunFolder(run).backbone, weights.backbone, weights.recipe, 3)
    with pytest.raises(RunError, match="not finite, or all zero"):
        export(run, tmp_path / "out.safetensors", "safetensors")


# -- the model card


def card_of(done: Any) -> tuple[dict[str, Any], str]:
    _, front, text = done.card.read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_is_written_from_the_run(tmp_path) -> None:
    run = run_of(tmp_path, {"name": "conv4"})
    for name in ("train", "test"):
        tiny.write_data(tmp_path / f"{name}.beton", seed=len(name))
    done = export(run, tmp_path / "a.safetensors", "safetensors")
    front, text = card_of(done)
    assert front["license"] == "unknown"
    assert "Unmeasured" in text
    assert "**not stated**" in text
    evaluate_knn(open_weights(run), k=5)
    done = export(run, tmp_path / "b.safetensors", "safetensors", licence="apache-2.0")
    front, text = card_of(done)
    assert (front["license"], front["library_name"]) == ("apache-2.0", "pytorch")
    assert front["tags"] == ["self-supervised-learning", "ressl", "conv4"]
    assert "arXiv:2107.09282" in text
    assert re.search(
        r"\| kNN \| pretrained \| top-1 [\d.]+ %(, top-5 [\d.]+ %)? \| weighted, k = 5, temperature 0\.07", text
    )
    assert "| optimizer | sgd, rate 0.05, weight decay 0.0001, warmup cosine, warm-up 1 epochs |" in text
    assert "Images: resize to 12 x 12 pixels (bilinear); RGB in [0, 1], minus [0.5, 0.5, 0.5]" in text
    assert str(tmp_path) not in text  # places are nobody's business
    config = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert config["data"]["train"] == "train.beton"
    assert config["method"]["queue_size"] == 40


def test_the_card_of_imported_weights_says_so(tmp_path) -> None:
    from relssl.interop import import_backbone

    file = originals.write(tmp_path / "theirs.tar", originals.relational("conv4"))
    import_backbone(file, tmp_path / "b.safetensors", recipe="relational/cifar10_conv4_essential")
    _, text = card_of(export(tmp_path / "b.safetensors", tmp_path / "out.safetensors", "safetensors"))
    assert "Imported from `theirs.tar`" in text
    assert "It was trained by others" in text
    assert "| epochs | unknown |" in text
    assert "imported weights keep the terms of their authors" in text
    assert "| seed |" not in text


def test_the_card_has_the_results_of_its_own_weights(tmp_path) -> None:
    """A folder may hold several fine-tuned files, and checkpoints that were evaluated besides."""
    run = run_of(tmp_path, {"name": "conv4"})
    weights = open_weights(run)

    def add(top1: float, origin: str, **changes: Any) -> None:
        score = {"mean": top1, "std": 0.0, "values": [top1]}
        told = {"weights_file": None, "update": None, "epochs": 0 if origin == "random" else 3, "backbone": "conv4"}
        RunFolder(run).add_result({"evaluator": "knn", "weights": origin, "top1": score, **told, **changes})

    for name in ("first", "second", "unmeasured"):
        save_backbone(run / f"{name}.safetensors", weights.backbone, weights.recipe, 3, origin="finetuned")
    add(10.0, "random")
    add(11.0, "random", backbone="resnet18", protocol={"name": "of another network"})
    add(40.0, "pretrained")
    add(41.0, "pretrained", update=900)
    add(50.0, "finetuned", weights_file="first.safetensors")
    add(60.0, "finetuned", weights_file="second.safetensors")
    expected = {
        run: ["10.00", "40.00"],
        run / "first.safetensors": ["10.00", "50.00"],
        run / "second.safetensors": ["10.00", "60.00"],
        run / "unmeasured.safetensors": [],
    }
    for place, figures in expected.items():
        _, text = card_of(export(place, tmp_path / f"{place.stem}-out.safetensors", "safetensors"))
        assert re.findall(r"top-1 ([\d.]+) %", text) == figures
        assert ("Unmeasured" in text) == (not figures)


def test_the_light_package_has_load_backbone() -> None:
    code = "import sys, relssl; print(relssl.load_backbone.__name__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["load_backbone", "False"]
