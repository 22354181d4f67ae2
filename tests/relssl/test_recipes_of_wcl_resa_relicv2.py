"""Recipes of WCL and ReSA hold what the authors' codes say; those of ReLICv2, what is public or named as assumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipelines.views import ViewSpec
from relssl.build import make_schedule
from relssl.config import Recipe, load_recipe, read_yaml, recipe_from
from relssl.evaluators.linear import LinearProtocol, linear_protocol
from relssl.recipes import list_recipes, recipe_path

# recipe: epochs, width of the heads and what they give, linear top-1
WCL = {
    "wcl/imagenet_resnet50_100ep": (100, 4096, 256, 68.5),
    "wcl/imagenet_resnet50_200ep": (200, 4096, 256, 70.5),
    "wcl/imagenet_resnet50_800ep": (800, 4096, 256, None),
    "wcl/imagenet_resnet50_100ep_paper": (100, 2048, 128, 68.1),
    "wcl/imagenet_resnet50_200ep_paper": (200, 2048, 128, 70.3),
    "wcl/imagenet_resnet50_800ep_paper": (800, 2048, 128, 72.2),
}
# recipe: epochs, batch, highest rate, warm-up in epochs, rate of the probe, linear and kNN top-1
RESA = {
    "resa/imagenet_resnet50_bs256_100ep": (100, 256, 0.5, 2, 10.0, 71.9, 64.6),
    "resa/imagenet_resnet50_bs256_200ep": (200, 256, 0.5, 2, 10.0, 73.4, 67.1),
    "resa/imagenet_resnet50_bs1024_100ep": (100, 1024, 2.0, 10, 40.0, 71.3, 63.3),
    "resa/imagenet_resnet50_bs1024_200ep": (200, 1024, 2.0, 10, 40.0, 73.8, 67.6),
    "resa/imagenet_resnet50_bs1024_800ep": (800, 1024, 1.6, 10, 40.0, 75.2, 69.9),
    "resa/imagenet_resnet50_bs256_100ep_multicrop": (100, 256, 0.5, 2, 10.0, None, None),
}
# recipe: mean, standard deviation of pre-training
RESA_CIFAR = {
    "resa/cifar10_resnet18": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "resa/cifar100_resnet18": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
# recipe: network, its width, epochs, linear top-1, whether a source has it
RELICV2 = {
    "relicv2/imagenet_resnet50_100ep": ("resnet50", 1, 100, None, True),
    "relicv2/imagenet_resnet50_1000ep": ("resnet50", 1, 1000, 77.1, True),
    "relicv2/imagenet_resnet50_2x_1000ep": ("resnet50", 2, 1000, 79.0, False),
    "relicv2/imagenet_resnet50_4x_1000ep": ("resnet50", 4, 1000, 79.4, False),
    "relicv2/imagenet_resnet101_1000ep": ("resnet101", 1, 1000, 78.7, False),
    "relicv2/imagenet_resnet152_1000ep": ("resnet152", 1, 1000, 79.3, False),
    "relicv2/imagenet_resnet200_1000ep": ("resnet200", 1, 1000, 79.8, True),
    "relicv2/imagenet_resnet200_2x_1000ep": ("resnet200", 2, 1000, 80.6, False),
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RATIO = (3 / 4, 4 / 3)
PER_EPOCH = 50  # updates; any number shows the schedule
JITTER = ("jitter", 0.8, {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1})
GREY = ("grey", 0.2, {})
BLUR = ("blur", 0.5, {"sigma": (0.1, 2.0), "kernel": "torchvision"})
SOLARISE = ("solarise", 0.2, {"threshold": 128 / 255})  # PIL's threshold of 128


def load(name: str) -> Recipe:
    """Without the check that it can be built, which `test_config` makes for every recipe."""
    return recipe_from(read_yaml(recipe_path(name)), name)


def view(
    name: str, size: int, scale: tuple[float, float], *ops: Any, box: str = "random_resized", **more: Any
) -> ViewSpec:
    values = {"box": {box: {"scale": scale, "ratio": RATIO}}, "flip": 0.5, "normalize": IMAGENET, "ops": list(ops)}
    return ViewSpec.from_dict({"name": name, "size": size, **values, **more})


def rates(recipe: Recipe) -> Callable[[int], float]:
    """Update -> learning rate, with `PER_EPOCH` updates an epoch."""
    return make_schedule(recipe.optim, PER_EPOCH, PER_EPOCH * recipe.train.epochs, recipe.train.batch_size)


def plain_evaluation(recipe: Recipe) -> LinearProtocol:
    """The linear protocol of a recipe whose images are evaluated as torchvision's examples do it."""
    whole = {"name": "image", "size": 224, "box": {"center": {"resize": 256}}, "normalize": IMAGENET}
    assert recipe.eval_spec() == ViewSpec.from_dict(whole)
    assert recipe.linear_specs() == [view("image", 224, (0.08, 1.0))]
    return linear_protocol(recipe.eval.linear.protocol, **recipe.eval.linear.options)


def test_every_recipe_is_held_to_a_table() -> None:
    tables = {**WCL, **RESA, **RESA_CIFAR, **RELICV2}
    here = {name for name in list_recipes() if name.split("/")[0] in ("wcl", "resa", "relicv2")}
    assert {name for name in here if not name.endswith(("_cpu", "_masks"))} == tables.keys()


@pytest.mark.parametrize("name", WCL)
def test_wcl_is_the_codes(name: str) -> None:
    recipe, (epochs, hidden, embed, top1) = load(name), WCL[name]
    method, optim, rate = recipe.method_config(), recipe.optim, rates(recipe)
    assert (method.hidden_dim, method.embed_dim, method.temperature) == (hidden, embed, 0.1)
    assert (recipe.backbone.name, recipe.backbone.options, recipe.backbone.norm) == ("resnet50", {}, "sync")
    assert (optim.name, optim.momentum, optim.trust_coefficient, optim.weight_decay) == ("lars", 0.9, 1e-3, 1e-6)
    assert optim.exclude == "by_name"
    assert [rate(PER_EPOCH * epoch) for epoch in (0, 5, 10, epochs)] == pytest.approx([0, 2.4, 4.8, 0])
    assert rate(PER_EPOCH * (10 + epochs) // 2) == pytest.approx(2.4)
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.drop_last) == (epochs, 4096, True)
    assert (recipe.train.precision, recipe.train.clip_norm) == ("fp32", None)
    paper = recipe.about.paper
    assert paper is not None
    assert paper.value == top1


@pytest.mark.parametrize("name", WCL)
def test_views_of_wcl_are_weak_for_ten_epochs_and_then_strong(name: str) -> None:
    weak = ("jitter", 0.8, {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1})
    strong = ("jitter", 0.8, {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2})
    assert load(name).views.specs() == [
        (10, [view("view", 224, (0.2, 1.0), weak, GREY, BLUR, count=2)]),
        (None, [view("view", 224, (0.08, 1.0), strong, GREY, BLUR, count=2)]),
    ]


@pytest.mark.parametrize("name", WCL)
def test_the_probe_of_wcl_is_the_codes(name: str) -> None:
    probe = plain_evaluation(load(name))
    assert (probe.lr_at(0, 10), probe.schedule, probe.epochs, probe.batch_size) == (3.2, "cosine", 80, 4096)
    assert (probe.optimizer, probe.momentum, probe.nesterov, probe.weight_decay) == ("sgd", 0.9, True, 0.0)
    assert (probe.init_std, probe.zero_bias, probe.select) == (0.01, True, "best")


def check_resa(recipe: Recipe, highest: float, warmup: int, weight_decay: float) -> None:
    """What ImageNet and CIFAR have in common."""
    method, optim, rate = recipe.method_config(), recipe.optim, rates(recipe)
    assert (method.hidden_dim, method.embed_dim) == (2048, 512)
    assert (method.momentum, method.temperature) == (0.996, 0.4)
    assert (method.sinkhorn_temperature, method.sinkhorn_iterations) == (0.05, 3)
    assert recipe.backbone.norm == "sync"
    assert (optim.name, optim.momentum, optim.nesterov, optim.exclude) == ("sgd", 0.9, False, "none")
    assert optim.weight_decay == weight_decay
    last = warmup * PER_EPOCH - 1  # the warm-up reaches the highest rate, which then comes again
    assert [rate(update) for update in (0, last, last + 1)] == pytest.approx([0, highest, highest])
    assert rate(PER_EPOCH * recipe.train.epochs) == pytest.approx(highest / 10)
    assert rate(PER_EPOCH * (warmup + recipe.train.epochs) // 2) == pytest.approx(0.55 * highest)
    assert (recipe.train.drop_last, recipe.train.clip_norm) == (True, None)


@pytest.mark.parametrize("name", RESA)
def test_resa_is_the_codes(name: str) -> None:
    recipe, (epochs, batch, highest, warmup, probe_lr, top1, knn) = load(name), RESA[name]
    check_resa(recipe, highest, warmup, 1e-5)
    assert recipe.method_config().predictor
    assert (recipe.backbone.name, recipe.backbone.options) == ("resnet50", {"zero_init_residual": True})
    assert (recipe.train.epochs, recipe.train.batch_size) == (epochs, batch)
    assert recipe.train.precision == "auto"  # the code's is fp16 with a gradient scaler
    probe = plain_evaluation(recipe)
    assert [probe.lr_at(epoch, 1) for epoch in (0, 59, 60, 80)] == pytest.approx(
        [probe_lr * x for x in (1, 1, 0.1, 0.01)]
    )
    assert (probe.schedule, probe.epochs, probe.batch_size) == ("multistep", 100, 256)
    assert (probe.optimizer, probe.momentum, probe.nesterov, probe.weight_decay) == ("sgd", 0.9, False, 0.0)
    assert (probe.init_std, probe.zero_bias, probe.select) == (0.01, True, "best")
    assert recipe.eval.knn.temperature == 0.07
    assert recipe.eval.knn.k in (5, 10, 15, 20, 25)
    paper = recipe.about.paper
    assert paper is not None
    assert paper.value == top1
    assert knn is None or f"kNN top-1 there: {knn} at T = 0.07" in recipe_path(name).read_text()


@pytest.mark.parametrize("name", RESA)
def test_views_of_resa_are_the_codes(name: str) -> None:
    scale = (0.32, 1.0) if name.endswith("_multicrop") else (0.2, 1.0)
    ((until, plan),) = load(name).views.specs()
    weak, strong, *small = plan
    assert until is None
    assert weak == view("weak", 224, scale)
    assert strong == view("strong", 224, scale, JITTER, GREY, BLUR, SOLARISE, interpolation="bicubic")
    crops = view("strong", 96, (0.05, 0.32), JITTER, GREY, BLUR, count=8, interpolation="bicubic")
    assert small == ([crops] if name.endswith("_multicrop") else [])


@pytest.mark.parametrize("name", RESA_CIFAR)
def test_resa_for_cifar_is_the_codes(name: str) -> None:
    recipe, normalize = load(name), RESA_CIFAR[name]
    check_resa(recipe, 0.3, 2, 1e-4)
    assert not recipe.method_config().predictor
    assert (recipe.backbone.name, recipe.backbone.options) == ("resnet18", {"stem": "cifar_padded"})
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.precision) == (1000, 256, "fp32")
    strong = (JITTER, GREY, SOLARISE)
    assert recipe.views.specs() == [
        (
            None,
            [
                view("weak", 32, (0.2, 1.0), normalize=normalize),
                view("strong", 32, (0.2, 1.0), *strong, interpolation="bicubic", normalize=normalize),
            ],
        )
    ]
    assert (recipe.eval_spec().size, recipe.eval_spec().box_kind) == (32, "whole")
    assert recipe.eval_spec().normalize == ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))  # for CIFAR-100, too
    assert (recipe.eval.linear.protocol, recipe.eval.knn.protocol) == ("resa_cifar", "resa_cifar")
    online = recipe.eval.online
    assert online is not None
    assert online.every_epochs == 5
    paper = recipe.about.paper
    assert paper is not None
    assert paper.value is None


# What no source of ReLICv2 has: everything but the networks and the evaluation.
SECTIONS = {
    "views.plan": ("count", "size", "box", "interpolation", "antialias", "flip", "ops", "mask_p"),
    "method": (
        *("hidden_dim", "embed_dim", "predictor", "momentum", "temperature"),
        *("alpha", "beta", "num_negatives", "invariance", "stop_gradient"),
    ),
    "backbone": ("norm",),
    "optim": ("name", "lr", "lr_scaling", "momentum", "weight_decay", "exclude", "schedule"),
    "train": ("epochs", "batch_size"),
}
ASSUMED = {f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys}


@pytest.mark.parametrize("name", RELICV2)
def test_relicv2_is_what_was_assumed(name: str) -> None:
    recipe, (network, width, epochs, _, _) = load(name), RELICV2[name]
    momentum, lr, weight_decay = (0.996, 0.3, 1.5e-6) if epochs == 1000 else (0.99, 0.45, 1e-6)
    method, optim, rate = recipe.method_config(), recipe.optim, rates(recipe)
    assert (method.hidden_dim, method.embed_dim, method.predictor, method.momentum) == (4096, 256, True, momentum)
    assert (method.temperature, method.alpha, method.beta, method.num_negatives) == (0.3, 0.3, 5.0, 10)
    assert (method.invariance, method.stop_gradient) == ("transpose", True)
    assert recipe.backbone.name == f"relicv2_{network}"
    assert (recipe.backbone.options.get("width", 1), recipe.backbone.norm) == (width, "sync")
    assert (optim.name, optim.momentum, optim.trust_coefficient) == ("lars", 0.9, 1e-3)
    assert (optim.weight_decay, optim.exclude) == (weight_decay, "1d")
    assert [rate(PER_EPOCH * epoch) for epoch in (0, 5, 10, epochs)] == pytest.approx([0, 8 * lr, 16 * lr, 0])
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.drop_last) == (epochs, 4096, True)


@pytest.mark.parametrize("name", RELICV2)
def test_views_of_relicv2_are_byols_by_turns(name: str) -> None:
    jitter = ("jitter_byol", *JITTER[1:])
    blur = {"sigma": (0.1, 2.0), "kernel": "byol"}
    kinds = (
        [jitter, GREY, ("blur", 1.0, blur)],
        [jitter, GREY, ("blur", 0.1, blur), ("solarise", 0.2, {"threshold": 0.5})],
    )
    tensorflow = {"box": "byol", "interpolation": "bicubic", "antialias": False}
    ((until, plan),) = load(name).views.specs()
    assert until is None
    assert plan == [
        *(view("large", 224, (0.14, 1.0), *ops, count=2, **tensorflow) for ops in kinds),
        *(view("small", 96, (0.05, 0.14), *ops, count=1, **tensorflow) for ops in kinds),
    ]
    assert {spec.mask_p for spec in plan} == {0}


@pytest.mark.parametrize("name", RELICV2)
def test_the_probe_of_relicv2_is_the_codes(name: str) -> None:
    recipe = load(name)
    tensorflow = {"interpolation": "bicubic", "antialias": False}
    whole = {
        "name": "image",
        "size": 224,
        "box": {"byol_center": {"share": 0.875}},
        "normalize": IMAGENET,
        **tensorflow,
    }
    assert recipe.eval_spec() == ViewSpec.from_dict(whole)
    assert recipe.linear_specs() == [view("image", 224, (0.08, 1.0), box="byol", **tensorflow)]
    probe = linear_protocol(recipe.eval.linear.protocol, **recipe.eval.linear.options)
    assert (probe.lr_at(0, 10), probe.schedule, probe.epochs, probe.batch_size) == (1.2, "cosine", 100, 1024)
    assert (probe.optimizer, probe.momentum, probe.nesterov, probe.weight_decay) == ("sgd", 0.9, True, 0.0)
    assert (probe.init_std, probe.zero_bias, probe.select) == ("haiku", True, "last")


@pytest.mark.parametrize("name", RELICV2)
def test_what_is_assumed_of_relicv2_is_named(name: str) -> None:
    recipe, (_, _, _, top1, is_read) = load(name), RELICV2[name]
    assert recipe.about.assumptions.keys() == ASSUMED
    given = set(read_yaml(recipe_path(name))["method"]) - {"name"}
    assert {f"method.{key}" for key in given} <= ASSUMED
    paper = recipe.about.paper
    assert paper is not None
    assert paper.value == top1
    assert paper.source.startswith("assumption: ") is not is_read
    assert top1 is None or "without masks" in paper.row


def test_the_smoke_recipe_of_relicv2_names_what_it_assumes_of_the_loss() -> None:
    recipe = load("relicv2/cifar10_cpu")
    sizes = {"method.hidden_dim", "method.embed_dim", "method.momentum"}  # ours, for a small network and few epochs
    assert recipe.about.assumptions.keys() == {key for key in ASSUMED if key.startswith("method.")} - sizes


def test_the_recipe_with_masks_is_the_other_one_but_for_them() -> None:
    """One large crop in ten loses its background, no small one does; and the recipe says how masks are made."""
    masks, without = (load_recipe(recipe_path(f"relicv2/imagenet_resnet50_1000ep{end}")) for end in ("_masks", ""))
    (_, plan), (_, other) = (recipe.views.specs()[0] for recipe in (masks, without))
    assert [spec.mask_p for spec in plan] == [0.1, 0.1, 0.0, 0.0]
    assert [replace(spec, mask_p=0) for spec in plan] == list(other)
    same = {"method", "backbone", "optim", "train", "eval"}
    assert masks.model_dump(include=same) == without.model_dump(include=same)
    told = recipe_path("relicv2/imagenet_resnet50_1000ep_masks").read_text()
    assert f"relssl saliency imagenet-train.beton {masks.data.train}" in told
