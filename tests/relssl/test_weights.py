"""A backbone in a file: round trip, and refusal of what does not fit."""

from __future__ import annotations

import json
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipelines.errors import InputError
from relssl.config import load_recipe
from relssl.evaluate import initial_backbone
from relssl.methods.base import DataInfo
from relssl.train import build_method
from relssl.weights import load_backbone, save_backbone
from tests.relssl import tiny


@pytest.fixture
def recipe(tmp_path):
    return load_recipe(tiny.write_recipe(tmp_path))


def test_round_trip(recipe, tmp_path):
    backbone = initial_backbone(recipe)
    save_backbone(tmp_path / "b.safetensors", backbone, recipe, 7)
    found = load_backbone(tmp_path / "b.safetensors")
    assert found.epochs == 7
    assert found.recipe == recipe
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(found.backbone.eval()(x), backbone.eval()(x))
    assert stat.S_IMODE((tmp_path / "b.safetensors").stat().st_mode) & stat.S_IRUSR


def test_the_initial_backbone_is_the_one_that_training_starts_from(recipe):
    method = build_method(recipe, DataInfo(48, 2, 16, 9, 3))
    theirs = method.encoder.state_dict()
    for key, value in initial_backbone(recipe).state_dict().items():
        assert torch.equal(value, theirs[key])


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_refused(recipe, tmp_path, change):
    """Never evaluate random weights by mistake."""
    file = tmp_path / "b.safetensors"
    save_backbone(file, initial_backbone(recipe), recipe, 1)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    key = next(iter(tensors))
    if change == "missing":
        del tensors[key]
    elif change == "unexpected":
        tensors["extra.weight"] = torch.zeros(1)
    else:
        tensors[key] = torch.zeros(3)
    save_file(tensors, file, metadata=header)
    with pytest.raises(InputError, match="does not fit this model"):
        load_backbone(file)


def test_a_file_of_somebody_else_is_refused(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors", metadata={"format": json.dumps("pt")})
    with pytest.raises(InputError, match="not a backbone written by relssl"):
        load_backbone(tmp_path / "other.safetensors")
