"""Checkpoints with the originals' exact key lists come in with the features of the network that they were made from."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import sys
import types
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from typer.main import get_command

import relssl
from pipelines.errors import ConfigError, InputError
from relssl.cli import run as command
from relssl.compare import compare
from relssl.evaluate import evaluate_knn, open_weights
from relssl.interop import haiku, import_checkpoint
from relssl.interop.foreign import open_foreign
from relssl.interop.formats import SOURCES
from relssl.interop.importing import choose_recipe, import_backbone
from relssl.interop.keys import backbone_shapes, identify
from relssl.nets import build_backbone
from relssl.nets.resnet import BasicBlock, Bottleneck, ResNet
from relssl.recipes import list_recipes
from relssl.report import protocol_text
from relssl.runfolder import read_results
from relssl.weights import load_backbone
from tests.relssl import golden, tiny
from tests.relssl.interop import originals


def images(side: int = 33, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def features(state: dict[str, Tensor], metadata: dict[str, Any], x: Tensor) -> Tensor:
    """Of the network that the imported state dict goes into, every entry of it."""
    net = build_backbone(metadata["architecture"], **metadata["options"])
    net.load_state_dict(state)
    with torch.no_grad():
        return net.eval()(x)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std(0).max() > 1e-3 * theirs.abs().max()  # features that tell images apart
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# -- features equal the source network's


BRANCHES = [
    (originals.ressl, "model", "ressl", None, "online", "module.encoder_q.net."),
    (originals.ressl, "model", "ressl", "teacher", "teacher", "module.encoder_k.net."),
    (partial(originals.ressl, arch="resnet18"), "model", "ressl", None, "online", "module.encoder_q.net."),
    (partial(originals.ressl, arch="resnet34"), "model", "ressl", None, "online", "module.encoder_q.net."),
    (originals.wcl, "model", "wcl", None, "online", "module.net."),
    (originals.resa, "state_dict", "resa", None, "teacher", "module.momentum_encoder."),
    (originals.resa, "state_dict", "resa", "online", "online", "module.encoder."),
]


@pytest.mark.parametrize(("make", "entry", "source", "branch", "named", "prefix"), BRANCHES)
def test_torch_checkpoints(tmp_path, make, entry, source, branch, named, prefix) -> None:
    contents = make()
    file = originals.write(tmp_path / "any-name.bin", contents)
    state, metadata = import_checkpoint(file, branch=branch)
    assert (metadata["source"], metadata["branch"], metadata["epoch"]) == (source, named, contents["epoch"])
    original = originals.part(contents[entry], prefix)
    assert_same(features(state, metadata, images()), originals.resnet_features(original, images()))


@pytest.mark.parametrize("arch", ["conv4", "resnet8", "resnet32", "resnet56"])
def test_relational_tar_files(tmp_path, arch) -> None:
    contents = originals.relational(arch)
    state, metadata = import_checkpoint(originals.write(tmp_path / "x.tar", contents))
    assert (metadata["method"], metadata["architecture"]) == ("relational", arch)
    assert metadata["updates"] == 7  # Adam's
    reference = originals.conv4_features if arch == "conv4" else partial(originals.resnet_features, stem="three stages")
    assert_same(features(state, metadata, images(32)), reference(contents["backbone"], images(32)))


def test_relational_resnet34(tmp_path) -> None:
    contents = originals.relational("resnet34", originals.shrunk)
    state, metadata = import_checkpoint(originals.write(tmp_path / "x.tar", contents))
    assert_same(features(state, metadata, images()), originals.resnet_features(contents["backbone"], images()))


def test_files_of_pytorch_before_1_6(tmp_path) -> None:
    contents = originals.relational("conv4")
    torch.save(contents, tmp_path / "x.tar", _use_new_zipfile_serialization=False)
    state, metadata = import_checkpoint(tmp_path / "x.tar")
    assert_same(features(state, metadata, images(32)), originals.conv4_features(contents["backbone"], images(32)))


def test_the_essential_script_numbers_its_layers(tmp_path) -> None:
    shapes = originals.keys("relational")["_essential_script"]["backbone"]
    numbered = originals.random_tensors(shapes)
    state, metadata = import_checkpoint(originals.write(tmp_path / "backbone.tar", numbered))
    assert metadata["kind"] == "backbone of relational reasoning's essential script"
    named = {name.replace(".0.", ".conv.").replace(".1.", ".bn."): tensor for name, tensor in numbered.items()}
    assert_same(features(state, metadata, images(32)), originals.conv4_features(named, images(32)))


@pytest.mark.parametrize("devices", [None, 2])
def test_haiku_pickles(tmp_path, devices) -> None:
    contents = originals.relicv2(devices=devices)
    file = originals.write_pickle(tmp_path / "pretrain.pkl", contents)
    state, metadata = import_checkpoint(file)
    assert (metadata["source"], metadata["architecture"]) == ("relicv2", "relicv2_resnet50")
    assert metadata["unread"] == ["predictor", "projector"]
    assert metadata["updates"] == 5000
    original = torch_names(contents["experiment_state"], devices is not None)
    assert_same(features(state, metadata, images(32)), originals.resnet_features(original, images(32), same=True))
    with_torchvisions_padding = originals.resnet_features(original, images(32))
    assert (features(state, metadata, images(32)) - with_torchvisions_padding).abs().max() > 0.05


def torch_names(state: dict[str, Any], has_devices: bool) -> dict[str, Tensor]:
    """The map of names once more, written down as a table."""
    out = {}
    modules = {**state["online_params"], **state["online_state"]}
    for module, leaves in modules.items():
        if not module.startswith("res_net50/~/"):
            continue
        place = module.removeprefix("res_net50/~/").split("/~/")
        moment = {"mean_ema": "running_mean", "var_ema": "running_var"}.get(place[-1])
        place = place[:-1] if moment else place
        if place[0].startswith("block_group"):
            base = f"layer{int(place[0][-1]) + 1}.{place[1].split('_')[1]}."
            kind = place[2]
            if kind.startswith("shortcut"):
                base += "downsample.0" if kind == "shortcut_conv" else "downsample.1"
            else:
                base += kind[:-2].replace("batchnorm", "bn") + str(int(kind[-1]) + 1)
        else:
            base = {"initial_conv": "conv1", "initial_batchnorm": "bn1"}[place[0]]
        for name, array in leaves.items():
            array = array[0] if has_devices else array
            if name == "w":
                out[f"{base}.weight"] = torch.from_numpy(array.transpose(3, 2, 0, 1).copy())
            elif name in ("scale", "offset"):
                out[f"{base}.{'weight' if name == 'scale' else 'bias'}"] = torch.from_numpy(array.reshape(-1))
            elif name == "average":
                out[f"{base}.{moment}"] = torch.from_numpy(array.reshape(-1))
    return out


ARRAYS = golden.load("relicv2_resnet")
CASES = sorted({key.split("/")[0] for key in ARRAYS})


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_the_original_haiku_networks_features(tmp_path, case, number) -> None:
    """Arrays of the original's run through a pickle, the restricted reader and the map of names."""
    from relssl.interop.reading import read_foreign

    parts: dict[str, dict[str, dict[str, np.ndarray]]] = {"online_params": {}, "online_state": {}}
    for part, ours in (("params", "online_params"), ("state", "online_state")):
        for key, array in golden.part(ARRAYS, f"{case}/{part}/").items():
            module, _, name = key.rpartition("/")
            parts[ours].setdefault(module, {})[name] = array
    file = originals.write_pickle(tmp_path / "x.pkl", {"experiment_state": parts, "step": 1})
    tensors, _ = haiku.networks(read_foreign(file), "x.pkl")
    state = originals.part(tensors, "online.")
    bottleneck = "layer1.0.conv3.weight" in state
    expansion = 4 if bottleneck else 1
    outputs = [len(state[f"layer{i}.0.conv{3 if bottleneck else 2}.weight"]) for i in range(1, 5)]
    depths = [len({k.split(".")[1] for k in state if k.startswith(f"layer{i}.")}) for i in range(1, 5)]
    block = partial(Bottleneck if bottleneck else BasicBlock, same=True)
    channels = [len(state["conv1.weight"]), *(out // expansion for out in outputs)]
    net = ResNet(block, depths, expansion=expansion, haiku=True, channels=channels)
    net.load_state_dict(state)
    x = golden.tensor(ARRAYS[f"{case}/images{number}"]).permute(0, 3, 1, 2)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        found = net.eval()((x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)).numpy()
    wanted = ARRAYS[f"{case}/features{number}"]
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_the_encoder_file_of_resa(tmp_path) -> None:
    contents = originals.resa_encoder()
    file = originals.write(tmp_path / "resa_only.pth", contents)
    state, metadata = import_checkpoint(file, "resa")
    assert_same(features(state, metadata, images()), originals.resnet_features(contents, images()))
    with pytest.raises(InputError, match=r"bare network.*--from resa"):
        import_checkpoint(file)
    nested = originals.write(tmp_path / "nested.pth", {"state_dict": contents})
    assert import_checkpoint(nested, "resa").metadata["architecture"] == "resnet50"
    assert import_checkpoint(nested, "wcl").metadata["method"] == "wcl"  # whoever says so


def test_the_small_data_code_of_ressl_numbers_its_layers(tmp_path) -> None:
    shapes = originals.keys("ressl")["archs"]["resnet18"]["model"]
    encoder = {
        name.removeprefix("module.encoder_q.net."): originals.shrunk(entry["shape"])
        for name, entry in shapes.items()
        if name.startswith("module.encoder_q.net.")
    }
    encoder["conv1.weight"] = [4, 3, 3, 3]
    named = originals.random_tensors(encoder)
    for first_stage, stem in ((3, "cifar"), (4, "small")):
        places = {"conv1": "0", "bn1": "1", **{f"layer{i + 1}": str(first_stage + i) for i in range(4)}}
        numbered = {}
        for name, tensor in named.items():
            part, _, rest = name.partition(".")
            numbered[f"net.net.{places[part]}.{rest}"] = tensor
            numbered[f"encoder_k.net.{places[part]}.{rest}"] = tensor + 1
        model = {**numbered, "head_q.linear1.weight": torch.zeros(2, 2), "queue": torch.zeros(8, 16)}
        model = {**model, "queue_ptr": torch.zeros(1, dtype=torch.int64)}
        state, metadata = import_checkpoint(originals.write(tmp_path / f"{stem}.pth", {"model": model, "epoch": 800}))
        assert metadata["options"]["stem"] == stem
        assert metadata["unread"] == ["head_q", "queue", "queue_ptr"]
        assert_same(features(state, metadata, images(16)), originals.resnet_features(named, images(16), stem=stem))


@pytest.mark.slow  # hundreds of megabytes
@pytest.mark.parametrize(
    ("make", "entry", "prefix", "arch"),
    [
        (originals.ressl, "model", "module.encoder_q.net.", "resnet50"),
        (partial(originals.ressl, arch="resnet18"), "model", "module.encoder_q.net.", "resnet18"),
        (originals.wcl, "model", "module.net.", "resnet50"),
        (originals.resa, "state_dict", "module.momentum_encoder.", "resnet50"),
        (partial(originals.relational, "resnet34"), "backbone", "", "resnet34"),
    ],
)
def test_full_size_against_torchvision(tmp_path, make, entry, prefix, arch) -> None:
    contents = make(scale=originals.as_they_are)
    state, metadata = import_checkpoint(originals.write(tmp_path / "x.pth", contents))
    source = torchvision.models.get_model(arch, weights=None)
    source.fc = torch.nn.Identity()
    source.load_state_dict(originals.part(contents[entry], prefix))
    with torch.no_grad():
        assert_same(features(state, metadata, images(64)), source.eval()(images(64)))


@pytest.mark.slow
def test_full_size_haiku_pickle(tmp_path) -> None:
    contents = originals.relicv2(originals.as_they_are, devices=None)
    state, metadata = import_checkpoint(originals.write_pickle(tmp_path / "x.pkl", contents))
    original = torch_names(contents["experiment_state"], has_devices=False)
    assert_same(features(state, metadata, images(64)), originals.resnet_features(original, images(64), same=True))


# -- what pickles of Haiku may ask for


@pytest.fixture
def foreign_modules(monkeypatch: pytest.MonkeyPatch):
    """Modules of the names that pickles ask for, so that such pickles can be made here; gone before they are read."""

    def make(module: str, **names: Any) -> None:
        for parent in (module[:i] for i, letter in enumerate(module) if letter == "."):
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        made = types.ModuleType(module)
        for name, value in names.items():
            value.__module__, value.__qualname__ = module, name
            setattr(made, name, value)
        monkeypatch.setitem(sys.modules, module, made)

    return make


class FlatMapping(dict):
    def __reduce__(self) -> tuple[Any, ...]:
        return FlatMapping, (dict(self),)


class _ByolExperimentState(NamedTuple):
    online_params: Any
    target_params: Any
    online_state: Any
    target_state: Any
    opt_state: Any


class ScaleByLarsState(NamedTuple):
    mu: Any


def _create_array(make: Any, arguments: Any, state: Any, attributes: Any = None) -> Any: ...


def _reconstruct_array(make: Any, arguments: Any, state: Any, of_jax: Any) -> Any: ...


class Wrapped:
    """An array that is pickled as dill or JAX does."""

    def __init__(self, array: np.ndarray, function: Any) -> None:
        self.array, self.function = array, function

    def __reduce__(self) -> tuple[Any, ...]:
        last = {"weak_type": False} if self.function is _reconstruct_array else None
        return self.function, (*self.array.__reduce__(), last)


@pytest.mark.parametrize("function", [_create_array, _reconstruct_array])
def test_byols_named_tuple_of_flat_mappings(tmp_path, foreign_modules, function) -> None:
    foreign_modules("haiku._src.data_structures", FlatMapping=FlatMapping)
    foreign_modules("byol.byol_experiment", _ByolExperimentState=_ByolExperimentState)
    foreign_modules("byol.utils.optimizers", ScaleByLarsState=ScaleByLarsState)
    foreign_modules("dill._dill", _create_array=_create_array)
    foreign_modules("jax._src.array", _reconstruct_array=_reconstruct_array)
    parts = originals.relicv2(devices=None)["experiment_state"]

    def flat(modules: dict[str, Any], factor: float = 1.0) -> FlatMapping:
        def leaf(array: np.ndarray) -> Wrapped:
            return Wrapped(np.asarray(array * array.dtype.type(factor)), function)

        return FlatMapping({m: FlatMapping({n: leaf(a) for n, a in leaves.items()}) for m, leaves in modules.items()})

    state = _ByolExperimentState(
        flat(parts["online_params"]),
        flat(parts["online_params"], 2.0),
        flat(parts["online_state"]),
        flat(parts["online_state"]),
        (ScaleByLarsState(np.zeros(2)),),
    )
    file = originals.write_pickle(tmp_path / "byol.pkl", {"experiment_state": state, "step": np.int64(3), "rng": None})
    online, metadata = import_checkpoint(file)
    assert metadata["updates"] == 3
    expected = torch_names(parts, has_devices=False)
    assert online.keys() - expected.keys() == {k for k in online if k.endswith("num_batches_tracked")}
    assert all(torch.equal(online[name], tensor) for name, tensor in expected.items())
    target = import_checkpoint(file, branch="teacher").state_dict
    assert torch.equal(target["conv1.weight"], 2 * expected["conv1.weight"])


class MadeOtherwise:
    """As JAX writes an array, but with another function to make it."""

    def __init__(self, make: Any, function: Any) -> None:
        self.make, self.function = make, function

    def __reduce__(self) -> tuple[Any, ...]:
        last = {"weak_type": False} if self.function is _reconstruct_array else None
        return self.function, (self.make, ((2,), "f4"), np.zeros(2, np.float32).__reduce__()[2], last)


@pytest.mark.parametrize("function", [_create_array, _reconstruct_array])
@pytest.mark.parametrize(
    ("make", "named"),
    [(np.ndarray, "numpy.ndarray"), (np.dtype, "numpy.dtype"), ("a word", "<class 'str'>"), (dict, "dict")],
)
def test_arrays_are_made_by_numpys_function_alone(tmp_path, foreign_modules, function, make, named) -> None:
    foreign_modules("dill._dill", _create_array=_create_array)
    foreign_modules("jax._src.array", _reconstruct_array=_reconstruct_array)
    file = originals.write_pickle(tmp_path / "x.pkl", {"experiment_state": MadeOtherwise(make, function)})
    with pytest.raises(InputError, match=rf"refused: this pickle asks for .*{named}"):
        import_checkpoint(file)


# -- strictness


SMALL_RESSL = partial(originals.ressl, arch="resnet18")
CHANGES = [
    *((SMALL_RESSL, change) for change in ("missing", "head", "extra", "shape", "block")),
    (originals.wcl, "head"),
    (originals.resa, "head"),
    (originals.resa, "block"),
]


@pytest.mark.parametrize(("make", "change"), CHANGES)
def test_a_name_too_many_or_too_few(tmp_path, make, change) -> None:
    contents = make()
    model = contents.get("model", contents.get("state_dict"))
    backbone = next(name for name in model if name.endswith("layer2.0.conv1.weight"))
    if change == "missing":
        del model[backbone]
        named = "layer2.0.conv1.weight"
    elif change == "head":
        named = next(name for name in model if ".linear1.weight" in name or "projector.0.weight" in name)
        del model[named]
        named = named.removeprefix("module.")
    elif change == "extra":
        model["module.fc.weight"] = torch.zeros(2, 2)
        named = "fc.weight"
    elif change == "shape":
        model[backbone] = torch.zeros(4, 4, 1, 1)
        named = r"layer2.0.conv1.weight \[4, 4, 1, 1\] for"
    else:
        for name in [name for name in model if ".layer4.1." in name]:
            del model[name]
        named = "layer4.1.conv1.weight"
    file = originals.write(tmp_path / "x.pth", contents)
    with pytest.raises(InputError, match=named) as refused:
        import_checkpoint(file)
    assert str(file) in str(refused.value)
    wanted = {"extra": "unexpected 1: ", "shape": "other shapes 1: "}.get(change, "missing ")
    assert wanted in str(refused.value)


def test_many_missing_names_are_counted(tmp_path) -> None:
    contents = originals.wcl()
    for name in [name for name in contents["model"] if ".layer1." in name]:
        del contents["model"][name]
    with pytest.raises(InputError, match=r"missing 60: layer1\.0\.conv1\.weight, .* and 55 more"):
        import_checkpoint(originals.write(tmp_path / "x.pth", contents))


def test_a_file_of_one_encoder_with_its_prefix(tmp_path) -> None:
    """Parts may be left out whole, not in part."""
    model = {name: t for name, t in originals.resa()["state_dict"].items() if ".momentum_encoder." in name}
    file = originals.write(tmp_path / "x.pth", {"state_dict": model})
    assert import_checkpoint(file).metadata["branch"] == "teacher"
    with pytest.raises(InputError, match="does not hold the online branch, only: teacher"):
        import_checkpoint(file, branch="online")
    with pytest.raises(ConfigError, match="has no branch 'student'"):
        import_checkpoint(file, branch="student")


def test_a_wrong_source_is_named(tmp_path) -> None:
    file = originals.write(tmp_path / "wcl-200.pth", originals.ressl(arch="resnet18"))  # as READMEs once had it
    with pytest.raises(
        InputError, match=r"no checkpoint of wcl but a training checkpoint of ReSSL.*encoder_q\. \(124\)"
    ):
        import_checkpoint(file, "wcl")
    with pytest.raises(ConfigError, match=r"unknown source: 'rel'; did you mean 'relicv2' or 'relational'\?"):
        open_foreign(originals.write(tmp_path / "x.pth", originals.relational("conv4")), "rel")
    with pytest.raises(ConfigError, match="did you mean 'ressl'"):
        import_checkpoint(file, "resl")
    pickled = originals.write_pickle(tmp_path / "x.pkl", originals.relicv2())
    with pytest.raises(InputError, match="no checkpoint of resa but a Haiku checkpoint of ReLICv2"):
        import_checkpoint(pickled, "resa")


def test_what_was_seen_is_listed(tmp_path) -> None:
    contents = {
        "model": {"visual.conv.weight": torch.zeros(2), "visual.b": torch.zeros(2), "logit_scale": torch.ones(())}
    }
    with pytest.raises(
        InputError, match=r"keys begin with visual\. \(2\), logit_scale\. Expected keys of ressl: encoder"
    ):
        import_checkpoint(originals.write(tmp_path / "clip.pt", contents))
    for strange, told in (
        ([torch.zeros(2)], "holds a list"),
        ({"args": 1, "best": 2.0}, "its entries are args, best"),
        ({"model": {"a": torch.zeros(1), "b": "text"}}, "no tensors: 1: b"),
    ):
        with pytest.raises(InputError, match=told):
            import_checkpoint(originals.write(tmp_path / "x.pth", strange))


def test_numbers_that_cannot_be_weights(tmp_path) -> None:
    contents = originals.ressl(arch="resnet18")
    key = "module.encoder_q.net.bn1.weight"
    contents["model"][key] = torch.full((4,), torch.nan)
    with pytest.raises(InputError, match=r"not finite, in 1: encoder_q\.net\.bn1\.weight"):
        import_checkpoint(originals.write(tmp_path / "x.pth", contents))
    contents["model"][key] = torch.ones(1).expand(4)  # larger than what the file holds
    with pytest.raises(InputError, match=r"encoder_q\.net\.bn1\.weight is no ordinary tensor"):
        import_checkpoint(originals.write(tmp_path / "x.pth", contents))


@pytest.mark.parametrize("kind", [torch.int8, torch.bool])
def test_whole_numbers_are_no_weights(tmp_path, kind) -> None:
    contents = originals.ressl(arch="resnet18")
    for key in ("module.encoder_k.net.conv1.weight", "module.encoder_q.net.layer4.1.bn2.running_mean"):
        contents["model"][key] = contents["model"][key].to(kind)
    told = r"whole numbers where the backbone has .*, in 2: encoder_q\.net\.layer4\.1\.bn2\.running_mean \({0}\)"
    with pytest.raises(InputError, match=told.format(str(kind).removeprefix("torch."))):
        import_checkpoint(originals.write(tmp_path / "x.pth", contents))


def test_negative_variances_are_refused(tmp_path) -> None:
    contents = originals.ressl(arch="resnet18")
    contents["model"]["module.encoder_k.net.bn1.running_var"][1] = -1e-3
    told = r"negative variances, in 1: encoder_k\.net\.bn1\.running_var"
    with pytest.raises(InputError, match=told):
        import_checkpoint(originals.write(tmp_path / "x.pth", contents))
    contents["model"]["module.encoder_k.net.bn1.running_var"][1] = 0.0
    import_checkpoint(originals.write(tmp_path / "x.pth", contents))


def test_a_foreign_module_in_the_haiku_network(tmp_path) -> None:
    contents = originals.relicv2(devices=None)
    params = contents["experiment_state"]["online_params"]
    params["res_net50/~/logits"] = {"w": np.zeros((2, 2), np.float32)}
    with pytest.raises(InputError, match="holds logits / w, which no ResNet of ReLICv2 has"):
        import_checkpoint(originals.write_pickle(tmp_path / "x.pkl", contents))
    del params["res_net50/~/logits"]
    del params["res_net50/~/block_group_3/~/block_1/~/conv_1"]
    with pytest.raises(InputError, match=r"relicv2_resnet50.*missing 1: layer4\.1\.conv2\.weight"):
        import_checkpoint(originals.write_pickle(tmp_path / "x.pkl", contents))
    params["res_net50/~/initial_conv"]["w"] = np.zeros((7, 7, 3), np.float32)
    with pytest.raises(InputError, match=r"initial_conv / w has shape \[7, 7, 3\]"):
        import_checkpoint(originals.write_pickle(tmp_path / "x.pkl", contents))
    with pytest.raises(InputError, match="0 ResNets of Haiku, expected one"):
        import_checkpoint(originals.write_pickle(tmp_path / "y.pkl", {"experiment_state": {"online_params": {}}}))


# -- files that are something else


@pytest.mark.parametrize(
    ("contents", "told"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title>", "it is a web page"),
        (b"\n  <html>Quota exceeded</html>", "confirm the download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "pointer of Git LFS"),
        (b"\x1f\x8b\x08\x00rest", "it is an archive"),
        (b"\x20\x00\x00\x00\x00\x00\x00\x00{}", "looks like safetensors"),
        (b"ustar?", "it begins with"),
        (b"PK\x03\x04 and no more", "damaged or incomplete"),
        (b"\x80\x02}q\x00(X\x03", "damaged pickle"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, contents, told) -> None:
    file = tmp_path / "ressl-200.pth"
    file.write_bytes(contents)
    with pytest.raises(InputError, match=told) as refused:
        import_checkpoint(file)
    assert str(file) in str(refused.value)


def test_a_download_that_was_cut_off(tmp_path) -> None:
    for name, whole in (
        ("x.pth", originals.write(tmp_path / "a", originals.relational("conv4")).read_bytes()),
        ("x.pkl", originals.write_pickle(tmp_path / "b", originals.relicv2()).read_bytes()),
    ):
        (tmp_path / name).write_bytes(whole[: 2 * len(whole) // 3])
        with pytest.raises(InputError, match="damaged"):
            import_checkpoint(tmp_path / name)
    with pytest.raises(InputError, match="cannot open"):
        import_checkpoint(tmp_path / "absent.pth")


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch was-run",)


@pytest.mark.parametrize("form", ["zip", "before 1.6", "haiku"])
def test_code_in_a_file_is_refused_by_name(tmp_path, monkeypatch, form) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "x.pth"
    contents = {"model": Runs(), "experiment_state": Runs()}
    if form == "haiku":
        file.write_bytes(pickle.dumps(contents, 2))
    else:
        torch.save(contents, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(InputError, match=r"x\.pth: refused: this \w+ asks for (posix|nt)\.system") as refused:
        import_checkpoint(file)
    assert "plain data" in str(refused.value)
    assert not (tmp_path / "was-run").exists()


def test_an_old_pytorch_reads_nothing_of_others(tmp_path, monkeypatch) -> None:
    file = originals.write(tmp_path / "x.tar", originals.relational("conv4"))
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ConfigError, match=r"PyTorch 2\.9\.1\+cpu cannot read such files safely; install PyTorch 2\.10"):
        import_checkpoint(file)


# -- recipes, and the file that is written


def foreign(tmp_path: Path, contents: Any, source: str = "auto") -> Any:
    return open_foreign(originals.write(tmp_path / "x.pth", contents), source)


def test_a_recipe_that_fits_is_found(tmp_path) -> None:
    found = choose_recipe(foreign(tmp_path, originals.relational("resnet56")), "relational/cifar100_resnet56")
    assert (found.name, found.certainty) == ("relational/cifar100_resnet56", "given")
    assert found.recipe.about.paper is not None
    with pytest.raises(ConfigError, match=r"--recipe relational/cifar100_resnet56 \| relational/cifar10_resnet56"):
        choose_recipe(foreign(tmp_path, originals.relational("resnet56")))
    with pytest.raises(ConfigError, match=r"recipe of resa, and .* is a training checkpoint of relational reasoning"):
        choose_recipe(foreign(tmp_path, originals.relational("conv4")), "resa/cifar10_cpu")


def test_recipes_of_the_released_files(tmp_path) -> None:
    """What is asked for and what is known, by what the file says of itself."""

    def of(contents: Any, **settings: Any) -> Any:  # the released files are 16 times as wide
        opened = foreign(tmp_path, contents)
        return replace(opened, architecture=("resnet50", {}), settings=settings)

    found = choose_recipe(of(originals.ressl(), hidden_dim=4096, embed_dim=512, queue_size=131072))
    assert (found.name, found.certainty) == ("ressl/imagenet_resnet50", "assumed")
    assert "ressl/imagenet_resnet50_5crop" in found.others
    released, papers = {"hidden_dim": 4096, "embed_dim": 256}, {"hidden_dim": 2048, "embed_dim": 128}
    for sizes, epochs, name in ((released, 100, "100ep"), (released, 200, "200ep"), (papers, 100, "100ep_paper")):
        found = choose_recipe(replace(of(originals.wcl(), **sizes), epoch=epochs))
        assert (found.name, found.certainty) == (f"wcl/imagenet_resnet50_{name}", "the only one that fits")
    with pytest.raises(ConfigError, match=r"resa/imagenet_resnet50_bs1024_100ep \| resa/imagenet_resnet50_bs256_100ep"):
        choose_recipe(of(originals.resa(), hidden_dim=2048, embed_dim=512, predictor=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("relicv2_resnet50", {"width": 4}),
        ("relicv2_resnet101", {}),
        ("relicv2_resnet200", {"width": 2}),
        ("resnet50", {"width": 2}),
        ("resnet18", {"stem": "cifar"}),
        ("conv4", {"width": 0.5}),
    ],
)
def test_architectures_are_told_by_their_shapes(name, options) -> None:
    shapes = backbone_shapes(name, options)
    assert identify(shapes, "x", haiku=name.startswith("relicv2")) == (name, options)


def test_the_lines_of_the_documentation_can_be_typed() -> None:
    from relssl.cli import app

    options = {o for p in get_command(app).commands["import"].params for o in p.opts if o.startswith("--")}
    text = (Path(relssl.__file__).parents[1] / "docs/checkpoints.md").read_text()
    lines = [shlex.split(line) for line in re.findall(r"`(relssl import [^`]+)`", text)]
    assert len(lines) > 10
    for line in lines:
        values = dict(pairwise(line))
        assert values.get("--recipe", list_recipes()[0]) in list_recipes(), line
        assert values.get("--from", "auto") in ("auto", *SOURCES)
        assert {word for word in line if word.startswith("--")} <= options
        assert line[3].endswith(".safetensors")


def test_a_recipe_takes_the_files_backbone(tmp_path) -> None:
    opened = foreign(tmp_path, originals.ressl(arch="resnet18"))
    with pytest.raises(ConfigError, match=r"no recipe of it has its backbone \(resnet18, width 0\.0625\)"):
        choose_recipe(opened)
    found = choose_recipe(opened, "ressl/imagenet_resnet50", ["train.batch_size=64"])
    assert (found.recipe.backbone.name, found.replaced) == ("resnet18", "resnet50")
    assert found.recipe.backbone.options == {"width": 0.0625}
    assert (found.recipe.backbone.norm, found.recipe.train.batch_size) == ("split(8)", 64)
    assert found.recipe.about.paper is None


def test_recipes_that_have_almost_its_backbone_are_told_from_it(tmp_path) -> None:
    for width, told in ((1, "not cifar or small as in"), (0.0625, "not cifar or small and width 0.0625, not 1")):
        net = build_backbone("resnet18", width=width)
        with pytest.raises(ConfigError, match=rf"Its resnet18 has stem imagenet, {told}.* ressl/cifar10_resnet18"):
            choose_recipe(foreign(tmp_path, net.state_dict(), "ressl"))
    net = build_backbone("resnet18", stem="small", width=0.0625)
    with pytest.raises(ConfigError, match=r"Its resnet18 has width 0\.0625, not 1 as in"):
        choose_recipe(foreign(tmp_path, net.state_dict(), "ressl"))


def test_a_stem_that_keys_do_not_tell_is_asked_for(tmp_path) -> None:
    net = build_backbone("resnet18", stem="small", width=0.0625)
    opened = foreign(tmp_path, net.state_dict(), "ressl")
    with pytest.raises(ConfigError, match=r"do not say whether a max-pool follows.*backbone\.stem=cifar\|small"):
        choose_recipe(opened, "ressl/imagenet_resnet50")
    assert choose_recipe(opened, "ressl/stl10_resnet18").recipe.backbone.options["stem"] == "small"


def test_the_file_is_evaluated_like_a_run(tmp_path) -> None:
    """From a checkpoint to a figure, which says where its weights come from and nothing that nobody knows."""
    contents = originals.relational("conv4")
    file = originals.write(tmp_path / "theirs.tar", contents)
    out = tmp_path / "weights" / "backbone.safetensors"
    import_backbone(file, out, recipe="relational/cifar10_conv4_essential", epoch=10)
    found = load_backbone(out)
    assert (found.epochs, found.recipe.backbone.name) == (10, "conv4")
    assert found.imported is not None
    assert (found.imported["file"], found.imported["source"]) == ("theirs.tar", "relational")
    train, test = (tiny.write_data(tmp_path / f"{name}.beton", seed=i) for i, name in enumerate(("train", "test")))
    weights = open_weights(out)
    assert weights.origin == "pretrained"
    (entry,) = evaluate_knn(weights, train, test, k=5)
    assert entry["imported"]["sha256"] == found.imported["sha256"]
    assert (entry["epochs"], entry["train_seed"], entry["global_batch"]) == (10, None, 64)
    assert entry["pretrained_on"] is None
    unknown = "imported from theirs.tar, which does not say on what it was pre-trained; neighbours from train.beton"
    assert unknown in protocol_text(entry)
    contents["backbone"]["layer1.conv.weight"] *= 2
    other = originals.write(tmp_path / "others.tar", contents)
    import_backbone(other, tmp_path / "weights" / "b.safetensors", recipe="relational/cifar10_cpu", epoch=10)
    evaluate_knn(open_weights(tmp_path / "weights" / "b.safetensors"), train, test, k=5)
    assert len(read_results(tmp_path / "weights")) == 2  # another file's figure does not replace it
    rows = compare([tmp_path / "weights"]).rows
    assert [row.label for row in rows] == ["weights (theirs.tar)", "weights (others.tar)"]
    net = relssl.load_backbone(out)
    assert not net.training
    with torch.no_grad():
        assert_same(net(images(32)), originals.conv4_features(originals.relational("conv4")["backbone"], images(32)))


def test_the_command_does_not_call_imported_weights_random(tmp_path, capsys) -> None:
    out = tmp_path / "b.safetensors"
    file = originals.write(tmp_path / "theirs.tar", originals.relational("conv4"))
    import_backbone(file, out, recipe="relational/cifar10_cpu", epoch=10)
    data = [str(tiny.write_data(tmp_path / f"{name}.beton", seed=i)) for i, name in enumerate(("train", "test"))]
    for more, told in (
        ([], "imported from theirs.tar, which does not say on what it was pre-trained; neighbours from train.beton"),
        (["--random-init"], "random weights; neighbours from train.beton"),
    ):
        assert command(["eval", "knn", "--weights", str(out), "--train", data[0], "--test", data[1], *more]) == 0
        assert f"\n{told}; tested on test.beton\n" in capsys.readouterr().out


def test_an_unknown_number_of_epochs_is_no_random_network(tmp_path) -> None:
    out = tmp_path / "b.safetensors"
    file = originals.write(tmp_path / "x.tar", originals.relational("conv4"))
    import_backbone(file, out, recipe="relational/cifar10_cpu")
    weights = open_weights(out)
    assert (weights.epochs, weights.origin) == (None, "pretrained")
    opened = originals.write(tmp_path / "y.pth", originals.ressl(arch="resnet18"))
    with pytest.raises(ConfigError, match="says that it has 3 epochs; --epoch 5 would not be true"):
        import_backbone(opened, out, recipe="ressl/imagenet_resnet50", epoch=5)


def test_what_an_assumed_recipe_says_of_the_training_is_left_out(tmp_path) -> None:
    out = tmp_path / "b.safetensors"
    file = originals.write(tmp_path / "x.tar", originals.relational("conv4"))
    import_backbone(file, out, recipe="relational/cifar10_cpu")
    weights = open_weights(out)
    assert weights.imported is not None
    weights.imported["recipe_is"] = "assumed"
    train, test = (tiny.write_data(tmp_path / f"{name}.beton", seed=i) for i, name in enumerate(("train", "test")))
    (entry,) = evaluate_knn(weights, train, test, k=5)
    assert (entry["global_batch"], entry["views_per_step"], entry["train_seed"]) == (None, None, None)
    assert json.loads(json.dumps(entry)) == entry
