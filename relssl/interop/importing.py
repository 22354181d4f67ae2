"""From a checkpoint of the original codes to a backbone that `relssl eval` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pipelines.errors import ConfigError
from relssl.checkpoint import load_model
from relssl.config import Recipe, apply_override, load_recipe, read_yaml, recipe_from
from relssl.interop.foreign import Foreign, open_foreign
from relssl.interop.keys import backbone_shapes
from relssl.nets import build_backbone
from relssl.recipes import list_recipes, recipe_path
from relssl.weights import save_backbone

_SMALL_STEMS = ("cifar", "small", "cifar_padded")
_DEFAULTS = {"stem": "imagenet", "width": 1}  # of a backbone, where its options do not say


class Imported(NamedTuple):
    """A backbone's state dict in the names of `relssl.nets`, and what is known of where it comes from."""

    state_dict: dict[str, Tensor]
    metadata: dict[str, Any]


def import_checkpoint(path: str | Path, source: str = "auto", branch: str | None = None) -> Imported:
    """The backbone in a checkpoint of ReSSL, WCL, ReLICv2, ReSA or relational reasoning.

    Args:
        source: which code wrote it, of `relssl.interop.formats.SOURCES`; `auto` finds it out by the keys.
        branch: `online` or `teacher`; None takes the one that the original evaluates (of ReSA the teacher's, else the
            online one).

    Returns:
        (state dict, metadata). `build_backbone(metadata["architecture"], **metadata["options"])` makes the network that
        takes it.

    Raises:
        InputError: the file is refused: damaged, of no known layout, asking for code, with a name or shape that does
            not belong there, or without that branch.
        ConfigError: no such source or branch.
    """
    foreign = open_foreign(path, source)
    return Imported(foreign.backbone(branch), foreign.metadata(branch))


@dataclass(frozen=True)
class Chosen:
    """The recipe of an imported checkpoint.

    Attributes:
        name: of the recipe.
        recipe: with the file's architecture.
        certainty: `given`, `the only one that fits`, or `assumed` among several that evaluate alike.
        others: those several, without this one.
        replaced: the backbone that the recipe had before it got the file's.
    """

    name: str
    recipe: Recipe
    certainty: str
    others: tuple[str, ...] = ()
    replaced: str | None = None


def import_backbone(
    path: Path,
    out: Path,
    *,
    source: str = "auto",
    branch: str | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    epoch: int | None = None,
) -> tuple[Foreign, Chosen]:
    """Write the backbone of a checkpoint to a file that `relssl eval` takes.

    Args:
        out: the `.safetensors` file to write.
        recipe: name or file of the recipe whose views and protocols belong to it; None takes the one that fits.
        overrides: `key.sub=value` of the recipe.
        epoch: epochs of training, where the file does not say.

    Raises:
        InputError: see `import_checkpoint`.
        ConfigError: several recipes fit and evaluate differently, none fits, or the one that is given does not.
    """
    foreign = open_foreign(path, source)
    chosen = choose_recipe(foreign, recipe, overrides)
    epochs = epochs_of(foreign, epoch)
    backbone = build_backbone(chosen.recipe.backbone.name, **chosen.recipe.backbone.options)
    load_model(backbone, foreign.backbone(branch), str(path))
    origin = {**foreign.metadata(branch), "recipe": chosen.name, "recipe_is": chosen.certainty, "continued": False}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_backbone(out, backbone, chosen.recipe, epochs, imported=origin)
    return foreign, chosen


def epochs_of(foreign: Foreign, given: int | None) -> int | None:
    """Epochs of training by the file, or by whoever knows.

    Raises:
        ConfigError: the two differ.
    """
    if given is not None and foreign.epoch not in (None, given):
        raise ConfigError(f"{foreign.path} says that it has {foreign.epoch} epochs; --epoch {given} would not be true")
    return foreign.epoch if given is None else given


def choose_recipe(foreign: Foreign, wanted: str | None = None, overrides: Sequence[str] = ()) -> Chosen:
    """The recipe that says how images are prepared for a checkpoint, and how it is evaluated.

    Raises:
        ConfigError: see `import_backbone`.
    """
    if wanted is not None:
        return _given(foreign, wanted, overrides)
    fitting = {name: recipe for name, recipe in _recipes_of(foreign.layout.method).items() if _fits(recipe, foreign)}
    for says_so in (_has_its_sizes, _has_its_epochs):
        fitting = {name: recipe for name, recipe in fitting.items() if says_so(recipe, foreign)} or fitting
    first, *others = fitting or [""]
    if not fitting or len({_evaluation(recipe) for recipe in fitting.values()}) > 1:
        raise ConfigError(_which(foreign, list(fitting)))
    recipe = load_recipe(recipe_path(first), overrides) if overrides else fitting[first]
    if not others:
        return Chosen(first, recipe, "the only one that fits")
    return Chosen(first, recipe, "assumed", tuple(others))


def _given(foreign: Foreign, wanted: str, overrides: Sequence[str]) -> Chosen:
    path = Path(wanted) if Path(wanted).is_file() else recipe_path(wanted)
    values = read_yaml(path)
    for override in overrides:
        apply_override(values, override)
    recipe = recipe_from(values, str(path))
    method = foreign.layout.method
    if method is not None and recipe.method_name != method:
        raise ConfigError(
            f"{wanted} is a recipe of {recipe.method_name}, and {foreign.path} is a {foreign.layout.kind}; choose a "
            f"recipe of {method}"
        )
    if _fits(recipe, foreign):
        return Chosen(wanted, load_recipe(path, overrides), "given")
    name, options = _architecture_for(recipe, foreign)
    changes = [*overrides, f"backbone.name={name}"]
    changes += [f"backbone.{key}={value}" for key, value in options.items()]
    kept = {"name", "norm", *options}
    values["backbone"] = {k: v for k, v in values["backbone"].items() if k in kept}
    for change in changes:
        apply_override(values, change)
    values["about"] = {}  # it reproduces no published row any more
    adapted = recipe_from(values, str(path))
    adapted.check()
    return Chosen(wanted, adapted, "given", replaced=recipe.backbone.name)


def _architecture_for(recipe: Recipe, foreign: Foreign) -> tuple[str, dict[str, Any]]:
    """The file's architecture, with a stem of the recipe where shapes leave several."""
    name, options = foreign.architecture
    if options.get("stem") == "cifar" and "stem" not in foreign.layout.options:
        stem = recipe.backbone.options.get("stem")
        if stem not in _SMALL_STEMS:
            raise ConfigError(
                f"{foreign.path} holds a {name} with a 3x3 stem, and its keys do not say whether a max-pool follows; "
                f"choose a recipe that does, or add backbone.name={name} and backbone.stem={'|'.join(_SMALL_STEMS)}"
            )
        options = {**options, "stem": stem}
    return name, options


@cache
def _recipes_of(method: str | None) -> dict[str, Recipe]:
    names = [name for name in list_recipes() if name.partition("/")[0] == method]
    return {name: recipe_from(read_yaml(recipe_path(name)), name) for name in names}


def _fits(recipe: Recipe, foreign: Foreign) -> bool:
    """Whether the recipe's backbone has the names and shapes, and what else the file says of it."""
    name, options = foreign.architecture
    theirs = recipe.backbone.options
    if recipe.backbone.name != name or any(theirs.get(k) != v for k, v in foreign.layout.options.items()):
        return False
    return backbone_shapes(name, theirs) == backbone_shapes(name, options)


def _has_its_sizes(recipe: Recipe, foreign: Foreign) -> bool:
    """Whether the method's sizes are those of the file's heads, as far as it has any."""
    own = recipe.method_config()
    return all(getattr(own, key) == value for key, value in foreign.settings.items())


def _has_its_epochs(recipe: Recipe, foreign: Foreign) -> bool:
    return recipe.train.epochs == foreign.epoch


def _evaluation(recipe: Recipe) -> str:
    """What a figure depends on besides the weights."""
    parts = [recipe.views.normalize, recipe.eval.knn, recipe.eval.linear, recipe.eval.finetune]
    options = sorted((k, v) for k, v in recipe.backbone.options.items() if k != "zero_init_residual")
    return repr([[part.model_dump(mode="json") for part in parts], recipe.eval.view, options])


def _which(foreign: Foreign, fitting: list[str]) -> str:
    name, options = foreign.architecture
    told = name + "".join(f", {key} {value}" for key, value in options.items())
    if fitting:
        return (
            f"{foreign.path} is a {foreign.layout.kind} ({told}); {len(fitting)} recipes have this backbone and "
            f"prepare or evaluate images differently. Say which it was trained with: --recipe {' | '.join(fitting)}"
        )
    recipes = list(_recipes_of(foreign.layout.method))
    known = " | ".join(recipes) if recipes else "NAME, see relssl configs"
    return (
        f"{foreign.path} is a {foreign.layout.kind}, and no recipe of it has its backbone ({told}).{_near(foreign)} "
        f"Say whose views and protocols it takes, and the backbone is replaced: --recipe {known}"
    )


def _near(foreign: Foreign) -> str:
    """A sentence on the recipes with a backbone of this name, whose list would else contradict that none has it."""
    name, options = foreign.architecture
    near = {r: v.backbone.options for r, v in _recipes_of(foreign.layout.method).items() if v.backbone.name == name}
    parts = []
    for key, default in _DEFAULTS.items():
        own = options.get(key, default)
        unclear = _SMALL_STEMS if own in _SMALL_STEMS and key not in foreign.layout.options else (own,)
        others = {str(theirs.get(key, default)) for theirs in near.values()} - {str(value) for value in unclear}
        if others:
            parts.append(f"{key} {own}, not {' or '.join(sorted(others))}")
    return f" Its {name} has {' and '.join(parts)} as in {', '.join(near)}." if parts else ""
