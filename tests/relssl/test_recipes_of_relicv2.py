"""The recipes of ReLICv2 hold what is known of the paper, and say what is assumed; one of them removes backgrounds."""

from __future__ import annotations

import pytest

from pipelines.views import ViewSpec
from relssl.config import Recipe, load_recipe
from relssl.recipes import list_recipes, recipe_path

NAMES = [name for name in list_recipes() if name.startswith("relicv2/imagenet")]
MASKS = "relicv2/imagenet_resnet50_1000ep_masks"
# epochs: lr, weight decay, momentum of the target
PRESETS = {1000: (0.3, 1.5e-6, 0.996), 100: (0.45, 1e-6, 0.99)}
# What is in no public source, and so is named as assumed at the top of a recipe.
ASSUMED = (
    "crop scales",
    "temperature",
    "alpha",
    "beta",
    "negatives",
    "batch",
    "rate",
    "weight decay",
    "momentum",
    "epochs",
)


def recipe(name: str) -> Recipe:
    return load_recipe(recipe_path(name))


def plan(name: str) -> list[ViewSpec]:
    (phase,) = recipe(name).views.specs()
    return list(phase[1])


def test_there_is_one_recipe_with_masks() -> None:
    assert MASKS in NAMES
    assert [name for name in NAMES if any(spec.mask_p for spec in plan(name))] == [MASKS]


@pytest.mark.parametrize("name", NAMES)
def test_views(name: str) -> None:
    """Section 2: 4 large and 2 small crops, BYOL's two kinds of colours by turns; only large ones lose backgrounds."""
    large, small = ([spec for spec in plan(name) if spec.name == wanted] for wanted in ("large", "small"))
    assert [(spec.size, spec.count, spec.box_options["scale"]) for spec in large] == [(224, 2, (0.14, 1.0))] * 2
    assert [(spec.size, spec.count, spec.box_options["scale"]) for spec in small] == [(96, 1, (0.05, 0.14))] * 2
    assert {spec.mask_p for spec in large} == {0.1 if name == MASKS else 0.0}
    assert {spec.mask_p for spec in small} == {0.0}
    for first, second in (large, small):
        for spec in (first, second):
            assert (spec.flip, spec.interpolation, spec.antialias) == (0.5, "bicubic", False)
            assert spec.ops[0] == (
                "jitter_byol",
                0.8,
                {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
            )
            assert spec.ops[1][:2] == ("grey", 0.2)
        assert [op[:2] for op in first.ops[2:]] == [("blur", 1.0)]
        assert [op[:2] for op in second.ops[2:]] == [("blur", 0.1), ("solarise", 0.2)]


@pytest.mark.parametrize("name", NAMES)
def test_method_and_optimization(name: str) -> None:
    """Sections 3 to 5."""
    given = recipe(name)
    method = given.method_config()
    assert (method.hidden_dim, method.embed_dim, method.predictor) == (4096, 256, True)
    assert (method.temperature, method.alpha, method.beta, method.num_negatives) == (0.3, 0.3, 5.0, 10)
    assert (given.optim.lr, given.optim.weight_decay, method.momentum) == PRESETS[given.train.epochs]
    assert (given.optim.name, given.optim.exclude, given.optim.lr_scaling) == ("lars", "1d", "linear")
    assert (given.train.batch_size, given.optim.schedule.warmup_epochs, given.backbone.norm) == (4096, 10, "sync")


@pytest.mark.parametrize("name", NAMES)
def test_assumptions_are_called_so(name: str) -> None:
    top = recipe_path(name).read_text().partition("\nabout:")[0].replace("\n# ", " ")
    listed = top.partition("Not in any public source, and so assumed: ")[2].partition(".")[0]
    for quantity in (*ASSUMED, *(("mask_p",) if name == MASKS else ())):
        assert quantity in listed
    assert "assum" in recipe(name).about.paper.source or recipe(name).about.paper.value is None


def test_the_papers_figure_stands_beside_the_recipe_that_removes_backgrounds() -> None:
    assert {name: recipe(name).about.paper.value for name in NAMES if recipe(name).about.paper.value} == {MASKS: 77.1}


def test_the_recipe_with_masks_is_the_other_one_but_for_them() -> None:
    """And it says how to make them."""
    ours, other = (recipe(name).model_dump() for name in (MASKS, MASKS.removesuffix("_masks")))
    for view in ours["views"]["plan"]:
        view.pop("mask_p", None)
    for key in ("views", "method", "backbone", "optim", "train", "eval"):
        assert ours[key] == other[key]
    assert f"relssl saliency imagenet-train.beton {ours['data']['train']}" in recipe_path(MASKS).read_text()
