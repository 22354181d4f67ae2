"""From a checked recipe to the objects that train: method, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pipelines.errors import ConfigError
from relssl import dist
from relssl.config import Optim, Recipe
from relssl.dist import mix
from relssl.methods import load_method
from relssl.methods.base import DataInfo, Method
from relssl.nets import build_backbone, set_norm
from relssl.optim import build_optimizer, constant, exponential, multistep, parameter_groups, scale_lr, warmup_cosine


def build_method(recipe: Recipe, data: DataInfo) -> Method:
    """The method of a recipe with its initial weights, equal on every rank and for every world size."""
    torch.manual_seed(mix(recipe.train.seed, "init"))
    options = recipe.backbone.options
    method_class = load_method(str(recipe.method["name"]))
    _check_needs(method_class, recipe, data)
    method = method_class(lambda: build_backbone(recipe.backbone.name, **options), recipe.method_config(), data)
    set_norm(method, recipe.backbone.norm, num_micro=recipe.train.num_micro)
    return method


def _check_needs(method: type[Method], recipe: Recipe, data: DataInfo) -> None:
    """What only shows when data and processes are there."""
    name = recipe.method["name"]
    if "labels" in method.NEEDS and data.num_classes is None:
        raise ConfigError(
            f"method {name} needs a label for every image, but some images of {recipe.data.train} have none; "
            "convert a data set with labels (folders by class), or choose a self-supervised method"
        )
    if "equal_shares" in method.NEEDS and dist.world_size() > 1 and not recipe.train.drop_last:
        raise ConfigError(
            f"method {name} needs as many images on each of the {dist.world_size()} processes: "
            "set train.drop_last: true"
        )


def make_optimizer(optim: Optim, method: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a recipe over a method's trainable parameters."""
    known: dict[str, dict[str, Any]] = {
        "sgd": {"momentum": optim.momentum, "nesterov": optim.nesterov},
        "lars": {"momentum": optim.momentum, "trust_coefficient": optim.trust_coefficient},
        "adam": {"betas": optim.betas, "eps": optim.eps},
        "adamw": {"betas": optim.betas, "eps": optim.eps},
    }
    options = known[optim.name]
    return build_optimizer(
        optim.name, parameter_groups(method, optim.weight_decay, optim.exclude), lr=optim.lr, **options
    )


def make_schedule(optim: Optim, per_epoch: int, total: int, global_batch: int) -> Callable[[int], float]:
    """Update -> learning rate, for a recipe and a length of training in updates."""
    base, final = (scale_lr(rate, global_batch, optim.lr_scaling) for rate in (optim.lr, optim.final_lr))
    schedule = optim.schedule
    if schedule.name == "warmup_cosine":
        return lambda update: warmup_cosine(
            update,
            base=base,
            final=final,
            warmup_steps=round(schedule.warmup_epochs * per_epoch),
            total_steps=total,
            inclusive_warmup=schedule.inclusive_warmup,
        )
    if schedule.name == "multistep":
        milestones = [epoch * per_epoch for epoch in schedule.milestones]
        return lambda update: multistep(update, base=base, milestones=milestones, gamma=schedule.gamma)
    if schedule.name == "exponential":
        return lambda update: exponential(update, base=base, final=final, total_steps=total)
    return lambda update: constant(update, base=base)


def check_buildable(recipe: Recipe) -> None:
    """Build everything without memory or data, so that what cannot be built is refused before a run starts.

    Raises:
        ConfigError: whatever the backbone, the method, its batch statistics or the optimizer refuse.
    """
    many = 2**40  # images: what depends on the data set is checked when it is opened
    batch = recipe.train.batch_size
    data = DataInfo(many, 2, batch, recipe.train.epochs * (many // batch), many // batch)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        method = build_method(recipe, data)
        make_optimizer(recipe.optim, method)
        _check_sizes(recipe, method)


def _check_sizes(recipe: Recipe, method: Method) -> None:
    """Whether the backbone takes views of the sizes that the recipe makes: on tensors without memory."""
    sizes = {spec.size for _, plan in recipe.views.specs() for spec in plan} | {recipe.eval_spec().size}
    for size in sorted(sizes):
        try:
            method.encoder.eval()(torch.empty(2, 3, size, size))
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"backbone {recipe.backbone.name} cannot take views of {size} pixels: {reason}; make them larger, or "
                "choose another backbone"
            ) from None
