"""A whole training checkpoint of an original goes on training here: its networks, queue, optimizer and place."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.errors import ConfigError, InputError
from relssl import checkpoint
from relssl.build import build_method
from relssl.cli import run as command
from relssl.config import load_recipe
from relssl.evaluate import evaluate_knn, open_weights
from relssl.interop.foreign import open_foreign
from relssl.interop.importing import choose_recipe
from relssl.interop.resume import import_run, state_of_optimizer
from relssl.methods.base import DataInfo
from relssl.report import protocol_text
from relssl.runfolder import RunFolder
from relssl.train import train
from tests.relssl import tiny
from tests.relssl.interop import originals

SMALL_RESSL = partial(originals.ressl, arch="resnet18")

# The originals' prefixes, and ours; what is trained comes first.
NAMES = {
    "ressl": {
        "module.encoder_q.net.": "encoder.",
        "module.encoder_q.head.": "head.",
        "module.encoder_k.net.": "teacher.encoder.",
        "module.encoder_k.head.": "teacher.head.",
    },
    "wcl": {"module.net.": "encoder.", "module.head1.": "head1.", "module.head2.": "head2."},
    "resa": {
        "module.encoder.": "encoder.",
        "module.projector.": "projector.",
        "module.predictor.": "predictor.",
        "module.momentum_encoder.": "target.encoder.",
        "module.momentum_projector.": "target.projector.",
    },
}
VIEWS = {
    "ressl": [{"name": "teacher", "size": 12}, {"name": "student", "size": 12}],
    "wcl": [{"name": "view", "size": 12, "count": 2}],
    "resa": [{"name": "weak", "size": 12}, {"name": "strong", "size": 12}],
    "relational": [{"name": "view", "size": 12, "count": 3}],
}
OPTIM = {
    "ressl": {"name": "sgd", "lr": 0.05, "weight_decay": 1e-4, "exclude": "by_name"},
    "wcl": {"name": "lars", "lr": 0.075, "lr_scaling": "sqrt", "weight_decay": 1e-6, "exclude": "by_name"},
    "resa": {"name": "sgd", "lr": 0.5, "lr_scaling": "linear", "weight_decay": 1e-5},
    "relational": {"name": "adam", "lr": 1e-3, "schedule": {"name": "constant"}},
}


def recipe(folder: Path, method: str, **changes: Any) -> str:
    """A recipe of the method on 48 tiny images, with a backbone that the checkpoint replaces."""
    changes = {"train__epochs": 101, "train__drop_last": True, "eval__online": None, **changes}
    views = {"normalize": {"mean": [0.5] * 3, "std": [0.25] * 3}, "plan": VIEWS[method]}
    backbone = {"name": "conv4"}
    path = tiny.write_recipe(
        folder, views=views, method={"name": method}, backbone=backbone, optim=OPTIM[method], **changes
    )
    return str(path)


def brought_over(tmp_path: Path, method: str, contents: dict[str, Any], **options: Any) -> tuple[Path, Any]:
    """(run folder, its checkpoint)."""
    file = originals.write(tmp_path / "theirs.pth", contents)
    out = tmp_path / "run"
    for data in tmp_path.glob("*.beton*"):  # of a call before
        data.unlink()
    import_run(file, out, recipe=recipe(tmp_path, method), **options)
    (found,) = checkpoint.list_checkpoints(RunFolder(out).checkpoints)
    return out, checkpoint.load(found)


def go_on(out: Path) -> Any:
    """Train to the end; the last checkpoint."""
    assert train(load_recipe(out / "config.yaml"), out, resume=True) == 0
    return checkpoint.load(checkpoint.list_checkpoints(RunFolder(out).checkpoints)[-1])


@pytest.mark.parametrize(
    ("method", "make", "entry"),
    [
        ("ressl", SMALL_RESSL, "model"),
        pytest.param("wcl", originals.wcl, "model", marks=pytest.mark.slow),
        pytest.param("resa", originals.resa, "state_dict", marks=pytest.mark.slow),
    ],
)
def test_everything_is_taken_over(tmp_path, method, make, entry) -> None:
    contents = make()
    contents["epoch"] = 100
    _, saved = brought_over(tmp_path, method, contents)
    model = contents[entry]
    expected = {
        ours + name.removeprefix(theirs): tensor
        for theirs, ours in NAMES[method].items()
        for name, tensor in model.items()
        if name.startswith(theirs)
    }
    if method == "ressl":
        expected |= {"queue.keys": model["module.queue"].T, "queue.pointer": model["module.queue_ptr"]}
    assert saved.model.keys() == expected.keys()
    assert all(torch.equal(saved.model[name], tensor) for name, tensor in expected.items())
    assert (saved.position.epoch, saved.position.update, saved.position.total) == (100, 0, 300)

    # Numbers of the optimizer's parameters, in the order of the specified lists (each buffer holds its number).
    numbered = dict(enumerate(names_in_order(method)))
    assert len(saved.optimizer) == len(contents["optimizer"]["state"])
    for number, state in contents["optimizer"]["state"].items():
        theirs = next(prefix for prefix in NAMES[method] if numbered[number].startswith(prefix))
        name = NAMES[method][theirs] + numbered[number].removeprefix(theirs)
        assert torch.equal(saved.optimizer[f"{name}/momentum_buffer"], state["momentum_buffer"]), name


@pytest.mark.slow
@pytest.mark.parametrize(("method", "make"), [("ressl", SMALL_RESSL), ("wcl", originals.wcl), ("resa", originals.resa)])
def test_training_goes_on(tmp_path, method, make) -> None:
    contents = make()
    contents["epoch"] = 100
    out, saved = brought_over(tmp_path, method, contents)
    last = go_on(out)
    assert (last.position.epoch, last.position.total) == (101, 303)
    moved = [name for name in saved.model if not torch.equal(last.model[name], saved.model[name])]
    assert {"encoder.layer4.1.conv1.weight", "encoder.bn1.running_mean"} <= set(moved)
    assert last.optimizer.keys() == saved.optimizer.keys()
    if method == "ressl":
        assert int(last.model["queue.pointer"]) == 256 + 3 * 16
        assert torch.equal(last.model["queue.keys"][:256], saved.model["queue.keys"][:256])
    assert RunFolder(out).backbone.is_file()


def names_in_order(method: str) -> list[str]:
    """The lists of the specification, group after group."""
    if method == "resa":
        entries = originals.keys("resa")["full_checkpoint_state_dict"]
        return [n for n in entries if not n.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    spec = originals.keys(method)["archs"]["resnet18" if method == "ressl" else "resnet50"]
    prefix = "module." if method == "wcl" else ""
    return [prefix + name for group in spec["optimizer_groups"] for name in group["params_in_index_order"]]


@pytest.mark.parametrize("ids", ["numbers", "object ids"])
def test_relational_reasoning_goes_on_where_adam_was(tmp_path, ids) -> None:
    contents = originals.relational("conv4")
    if ids == "object ids":  # as PyTorch before 1.5 may have counted
        optimizer = contents["optimizer"]
        optimizer["state"] = {10**14 + 64 * i: state for i, state in optimizer["state"].items()}
        for group in optimizer["param_groups"]:
            group["params"] = [10**14 + 64 * i for i in group["params"]]
    out, saved = brought_over(tmp_path, "relational", contents)
    assert saved.position == checkpoint.Position(2, 1, 7)  # 7 updates of 3 an epoch
    states = list(contents["optimizer"]["state"].values())
    names = ["encoder.layer1.conv.weight", "encoder.layer1.bn.weight", "encoder.layer1.bn.bias"]
    for name, state in zip(names, states, strict=False):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(saved.optimizer[f"{name}/{moment}"], state[moment])
    assert torch.equal(saved.optimizer["relation.linear2.bias/exp_avg"], states[-1]["exp_avg"])
    assert float(saved.optimizer["relation.linear2.bias/step"]) == 7
    for theirs, ours in (("backbone", "encoder"), ("relation", "relation")):
        assert all(torch.equal(saved.model[f"{ours}.{name}"], t) for name, t in contents[theirs].items())

    path = out / "config.yaml"
    path.write_text(path.read_text().replace("epochs: 101", "epochs: 3"))
    last = go_on(out)
    assert last.position.total == 9
    assert float(last.optimizer["relation.linear2.bias/step"]) == 9


@pytest.mark.slow
def test_an_update_goes_on_with_the_momentum_that_came(tmp_path) -> None:
    """The first update is torch's own SGD with the imported buffers: the same as by hand."""
    contents = SMALL_RESSL()
    contents["epoch"] = 100
    out, saved = brought_over(tmp_path, "ressl", contents)
    without = dict(contents)
    del without["optimizer"]
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    out_fresh, saved_fresh = brought_over(fresh, "ressl", without, fresh_optimizer=True)
    assert saved_fresh.optimizer == {}
    for folder in (out, out_fresh):  # the same images
        path = folder / "config.yaml"
        path.write_text(path.read_text().replace("every_updates: 2", "every_updates: 1").replace("keep: 3", "keep: 9"))
    after, after_fresh = (first_update(folder) for folder in (out, out_fresh))
    name = "head.linear2.weight"
    rate = rate_of_update(out, 301)
    gap = after_fresh.model[name] - after.model[name]
    expected = rate * 0.9 * saved.optimizer[f"{name}/momentum_buffer"]
    assert expected.abs().max() > 1e-6
    assert (gap - expected).abs().max() <= 3e-8  # rounding of weights


def first_update(out: Path) -> Any:
    go_on(out)
    return checkpoint.load(RunFolder(out).checkpoints / "update-00000301")


def rate_of_update(out: Path, update: int) -> float:
    return next(r["lr"] for r in RunFolder(out).read_metrics() if r["kind"] == "train" and r["update"] == update)


def test_a_continued_run_says_where_it_comes_from(tmp_path) -> None:
    out, _ = brought_over(tmp_path, "relational", originals.relational("conv4"))
    told = json.loads((out / "imported.json").read_text())
    assert set(json.loads((out / "env.json").read_text())["training_data"]) == {"images", "hash"}
    assert (told["file"], told["source"], told["continued"]) == ("theirs.pth", "relational", True)
    weights = open_weights(out)
    assert weights.imported == told
    (entry,) = evaluate_knn(weights, tmp_path / "train.beton", tmp_path / "test.beton", k=5)
    assert (entry["imported"]["file"], entry["train_seed"]) == ("theirs.pth", None)
    assert entry["pretrained_on"] == "train.beton"
    assert "; continued from theirs.pth on train.beton; neighbours from train.beton" in protocol_text(entry)


def test_more_epochs_than_are_done_are_suggested(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("relssl.cli.interop.set_up_log", lambda: None)
    contents = SMALL_RESSL()
    contents["epoch"] = 122
    file, out = originals.write(tmp_path / "theirs.pth", contents), tmp_path / "run"
    options = ["--full", "--recipe", recipe(tmp_path, "ressl", train__epochs=3)]
    assert command(["import", str(file), str(out), *options]) == 0
    assert "to go on, import it with train.epochs=125, say" in capsys.readouterr().out


# -- what cannot go on


def refused(tmp_path: Path, method: str, contents: Any, error: type[Exception], match: str, **options: Any) -> None:
    with pytest.raises(error, match=match):
        brought_over(tmp_path, method, contents, **options)
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".*writing*"))


def test_a_file_without_an_optimizer(tmp_path) -> None:
    contents = SMALL_RESSL()
    del contents["optimizer"]
    refused(tmp_path, "ressl", contents, InputError, "holds no optimizer; add --fresh-optimizer")
    contents = SMALL_RESSL()
    del contents["epoch"]
    refused(tmp_path, "ressl", contents, ConfigError, "how many epochs are done; add --epoch N")
    _, saved = brought_over(tmp_path, "ressl", contents, epoch=5)
    assert saved.position.epoch == 5


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("counts", "groups of 78 and 49 parameters; expected 78 and 50"),
        ("state", "no state of parameters that are trained, of 1: "),
        ("entries", r"remembers exp_avg of encoder\.bn1\.weight; expected momentum_buffer, as sgd does"),
        ("shape", r"momentum_buffer of encoder\.bn1\.weight is not a finite tensor of shape \[4\]"),
        ("nothing", "no state of a torch optimizer: expected state and param_groups"),
    ],
)
def test_an_optimizer_of_something_else(opened, change, told) -> None:
    foreign, config, method = opened
    optimizer = copy.deepcopy(SMALL_RESSL()["optimizer"])
    if change == "counts":
        optimizer["param_groups"][1]["params"].pop()
    elif change == "state":
        optimizer["state"].popitem()
    elif change == "entries":
        optimizer["state"][0] = {"exp_avg": torch.zeros(4)}
    elif change == "shape":
        optimizer["state"][0] = {"momentum_buffer": torch.zeros(5)}
    else:
        optimizer = {"state": {}}
    with pytest.raises(InputError, match=told):
        state_of_optimizer(replace(foreign, entries={"optimizer": optimizer}), config, method)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A checkpoint, a recipe for it, and its method."""
    folder = tmp_path_factory.mktemp("opened")
    foreign = open_foreign(originals.write(folder / "x.pth", SMALL_RESSL()))
    chosen = choose_recipe(foreign, recipe(folder, "ressl"), [f"method.{k}={v}" for k, v in foreign.settings.items()])
    return foreign, chosen.recipe, build_method(chosen.recipe, DataInfo(48, 2, 16, 9, 3))


def test_half_a_training_state(tmp_path) -> None:
    contents = SMALL_RESSL()
    contents["model"] = {name: t for name, t in contents["model"].items() if "encoder_k" not in name}
    refused(
        tmp_path, "ressl", contents, InputError, r"no whole training state: encoder_k\.net, encoder_k\.head is missing"
    )


def test_formats_whose_training_cannot_go_on(tmp_path) -> None:
    file = originals.write_pickle(tmp_path / "x.pkl", originals.relicv2(devices=None))
    with pytest.raises(InputError, match="its released files hold the encoder"):
        import_run(file, tmp_path / "run")
    simclr = originals.relational("conv4")
    simclr["head"] = simclr.pop("relation")
    refused(tmp_path, "relational", simclr, InputError, "no source says how its optimizer counts")


def test_an_existing_folder_is_left_alone(tmp_path) -> None:
    brought_over(tmp_path, "relational", originals.relational("conv4"))
    with pytest.raises(ConfigError, match="exists; choose another folder"):
        brought_over(tmp_path, "relational", originals.relational("conv4"))


def test_sizes_come_from_the_file(tmp_path) -> None:
    """WCL's paper has narrower heads than its code; what the file has is what goes on."""
    out, _ = brought_over(tmp_path, "ressl", SMALL_RESSL())
    method = load_recipe(out / "config.yaml").method
    assert (method["hidden_dim"], method["embed_dim"], method["queue_size"]) == (256, 32, 8192)
