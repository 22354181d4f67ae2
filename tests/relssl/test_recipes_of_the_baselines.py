"""The recipes of relational reasoning and its baselines hold what the original's scripts and README say."""

from __future__ import annotations

import pytest

from relssl.config import Recipe, load_recipe
from relssl.recipes import list_recipes, recipe_path

METHODS = ("relational", "simclr", "deepcluster", "deepinfomax", "rotation", "supervised")
NAMES = [
    name
    for name in list_recipes()
    if name.split("/")[0] in METHODS and not name.endswith("_cpu") and not name.endswith("_essential")
]
# data: side, mean, std, padding, classes
DATA = {
    "cifar10": (32, (0.491, 0.482, 0.447), (0.247, 0.243, 0.262), 4, 10),
    "cifar100": (32, (0.507, 0.487, 0.441), (0.267, 0.256, 0.276), 4, 100),
    "tiny_imagenet": (64, (0.5,) * 3, (0.25,) * 3, 8, 200),
    "slimagenet": (64, (0.5,) * 3, (0.25,) * 3, 8, 1000),
    "stl10": (96, (0.5,) * 3, (0.5,) * 3, 12, 10),
}
# method: optimizer, lr, batch, drop_last
SETTINGS = {
    "relational": ("adam", 1e-3, 64, False),
    "simclr": ("adam", 1e-3, 128, False),
    "rotation": ("adam", 1e-3, 128, False),
    "deepcluster": ("adam", 1e-3, 128, False),
    "deepinfomax": ("adam", 1e-4, 128, True),
    "supervised": ("sgd", 0.1, 128, False),
}
JITTER = ("jitter", 0.8, {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2})


def split(name: str) -> tuple[str, str, Recipe]:
    method, _, rest = name.partition("/")
    data = rest.rpartition("_")[0]
    return method, data, load_recipe(recipe_path(name))


def epochs_of(method: str, data: str, name: str) -> int:
    if name.endswith("resnet56"):
        return 500  # the released models
    return 300 if data == "stl10" or (method == "relational" and data == "slimagenet") else 200


@pytest.mark.slow
def test_every_method_has_every_data_set() -> None:
    assert {tuple(split(name)[:2]) for name in NAMES} == {(method, data) for method in METHODS for data in DATA}


@pytest.mark.parametrize("name", NAMES)
def test_optimization_is_the_originals(name: str) -> None:
    method, data, recipe = split(name)
    optimizer, lr, batch, drop_last = SETTINGS[method]
    assert (recipe.optim.name, recipe.optim.lr, recipe.optim.weight_decay) == (optimizer, lr, 0.0)
    assert (recipe.train.batch_size, recipe.train.drop_last) == (batch, drop_last)
    assert recipe.train.epochs == epochs_of(method, data, name)
    schedule = recipe.optim.schedule
    if method == "supervised":
        assert (schedule.name, schedule.gamma, recipe.optim.momentum) == ("multistep", 0.1, 0.9)
        assert schedule.milestones == [recipe.train.epochs // 2, recipe.train.epochs * 3 // 4]
    else:
        assert schedule.name == "constant"
    assert recipe.backbone.norm == "local"
    assert (recipe.eval.linear.protocol, recipe.eval.linear.options) == ("relational", {})


@pytest.mark.parametrize("name", NAMES)
def test_views_are_the_originals(name: str) -> None:
    method, data, recipe = split(name)
    side, mean, std, padding, classes = DATA[data]
    ((_, (view,)),) = recipe.views.specs()
    assert (view.size, view.normalize, view.flip, view.interpolation) == (side, (mean, std), 0.5, "bilinear")
    assert recipe.eval_spec().size == side
    assert recipe.eval_spec().box_kind == "whole"
    if method in ("relational", "simclr"):
        assert view.count == (32 if method == "relational" else 2)
        assert view.box == {"random_resized": {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}}
        assert view.ops == (JITTER, ("grey", 0.2, {}))
    elif method == "deepinfomax" or (method, data) == ("supervised", "stl10"):
        assert view.box_kind == "whole"
        assert [op[0] for op in view.ops] == ([] if method == "deepinfomax" else ["affine", "erase"])
    else:
        assert (view.box, view.ops) == ({"pad_crop": {"padding": padding}}, ())
    if method == "deepcluster":
        assert recipe.method["num_clusters"] == 10 * classes
    if data == "stl10":
        assert recipe.data.train == ("stl10-train.beton" if method == "supervised" else "stl10-unlabeled.beton")
        assert (recipe.data.probe or recipe.data.train) == "stl10-train.beton"
