"""From a training checkpoint of the original codes to a run folder in which `relssl train` goes on.

Networks, heads, teacher, queue and optimizer are taken over, and the place in the schedule. Not taken over, because no
original saves them: random numbers (ours are keyed by place), and the state of a gradient scaler. ReLICv2's files hold
the encoder only, and of the relational repository's baselines no source says how their optimizers count parameters.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.errors import ConfigError, InputError
from pipelines.loader import ViewLoader
from relssl import checkpoint
from relssl.build import build_method
from relssl.checkpoint import Position, Saved
from relssl.config import Recipe
from relssl.interop.foreign import Foreign, open_foreign
from relssl.interop.formats import begins
from relssl.interop.importing import Chosen, choose_recipe, epochs_of
from relssl.interop.keys import few
from relssl.methods.base import Method
from relssl.runfolder import RunFolder, write_atomically
from relssl.train import data_identity, data_info

# What an optimizer remembers of each parameter.
_REMEMBERED = {
    "sgd": {"momentum_buffer"},
    "lars": {"momentum_buffer"},
    "adam": {"step", "exp_avg", "exp_avg_sq"},
}


def import_run(
    path: Path,
    out: Path,
    *,
    source: str = "auto",
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    epoch: int | None = None,
    fresh_optimizer: bool = False,
    command: str = "",
) -> tuple[Foreign, Chosen, Position]:
    """Make a run folder from a training checkpoint.

    Args:
        out: the run folder, which must not exist.
        recipe: name or file of the recipe to go on with; None takes the one that fits.
        overrides: `key.sub=value` of the recipe, such as `data.train=FILE.beton`.
        epoch: epochs done, where the file does not say.
        fresh_optimizer: begin with an empty optimizer, for a file that holds none.

    Raises:
        InputError: the file is refused, or holds no whole training state.
        ConfigError: no recipe, the wrong one, no place in the schedule, or a folder that exists.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; choose another folder for the run")
    foreign = open_foreign(path, source)
    _check_whole(foreign)
    chosen = _chosen(foreign, recipe, overrides)
    saved = training_state(foreign, chosen.recipe, epoch=epochs_of(foreign, epoch), fresh_optimizer=fresh_optimizer)
    work = out.with_name(f".{out.name}.writing")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        folder = RunFolder(work)
        folder.describe(chosen.recipe, command, saved.extra["data"])
        origin = {**foreign.metadata(), "recipe": chosen.name, "recipe_is": chosen.certainty, "continued": True}
        write_atomically(folder.imported, json.dumps(origin, indent=1))
        checkpoint.save(folder.checkpoints, saved, keep=1)
        work.replace(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return foreign, chosen, saved.position


def _chosen(foreign: Foreign, recipe: str | None, overrides: Sequence[str]) -> Chosen:
    """The recipe, with the sizes that the file has where they are not its own."""
    chosen = choose_recipe(foreign, recipe, overrides)
    if chosen.others:
        raise ConfigError(
            f"{', '.join([chosen.name, *chosen.others])} all fit {foreign.path}, and train differently; say which it "
            "was trained with: --recipe NAME"
        )
    own = chosen.recipe.method_config()
    differing = {key: value for key, value in foreign.settings.items() if getattr(own, key) != value}
    if differing.get("aggregation") == "sum" and own.aggregation != "cat":
        del differing["aggregation"]  # sum, mean and max have the same shapes
    if not differing:
        return chosen
    sizes = [f"method.{key}={json.dumps(value)}" for key, value in differing.items()]
    return choose_recipe(foreign, chosen.name, [*overrides, *sizes])


def training_state(
    foreign: Foreign, recipe: Recipe, *, epoch: int | None = None, fresh_optimizer: bool = False
) -> Saved:
    """A checkpoint of ours with everything that the file holds, on the data of a recipe.

    Raises:
        InputError, ConfigError: see `import_run`.
    """
    data = recipe.data
    with ViewLoader(
        data.train,
        recipe.views.specs(),
        global_batch=recipe.train.batch_size,
        num_micro=recipe.train.num_micro,
        engine=data.engine,
        resize=data.resize,
        drop_last=recipe.train.drop_last,
        workers=data.workers,
    ) as loader:
        method = build_method(recipe, data_info(recipe, loader))
        per_epoch, identity = loader.updates_per_epoch, data_identity(loader)
    checkpoint.load_model(method, state_of_method(foreign), str(foreign.path))
    optimizer = {} if fresh_optimizer else state_of_optimizer(foreign, recipe, method)
    position = _position(foreign, epoch, per_epoch)
    return Saved(method.state_dict(), optimizer, position, {"scaler": None, "data": identity})


def state_of_method(foreign: Foreign) -> dict[str, Tensor]:
    """The whole state of the method: the file's tensors in our names."""
    layout = foreign.layout
    state = {}
    for name, tensor in foreign.tensors.items():
        theirs, ours = next(pair for pair in layout.groups.items() if begins(name, pair[0]))
        state[ours + name.removeprefix(theirs)] = tensor.T if name in layout.transposed else tensor
    return state


def state_of_optimizer(foreign: Foreign, recipe: Recipe, method: Method) -> dict[str, Tensor]:
    """The optimizer's state as `checkpoint.optimizer_tensors` has it.

    The file numbers its parameters; the numbers are resolved by their order, in which the original made its groups.

    Raises:
        InputError: none is there, or its parameters are not those of the method.
    """
    where = f"{foreign.path}: optimizer"
    entry = foreign.entries.get("optimizer")
    if not isinstance(entry, Mapping):
        raise InputError(
            f"{foreign.path} holds no optimizer; add --fresh-optimizer to go on with an empty one, whose momentum "
            "fills up again within some updates"
        )
    names = _names_by_number(foreign, entry, method, where)
    parameters = {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}
    remembered = _REMEMBERED.get(recipe.optim.name, set())
    tensors: dict[str, Tensor] = {}
    seen = set()
    for number, state in entry["state"].items():
        name = names.get(number, "")
        if name not in parameters or not isinstance(state, Mapping):
            continue  # a teacher's parameters are listed, and never change
        values = {key: value for key, value in state.items() if value is not None}
        if values.keys() != remembered:
            raise InputError(
                f"{where} remembers {', '.join(sorted(values)) or 'nothing'} of {name}; expected "
                f"{', '.join(sorted(remembered))}, as {recipe.optim.name} does, the optimizer of the recipe"
            )
        seen.add(name)
        tensors.update(_entries(name, values, parameters[name], where))
    if missing := sorted(parameters.keys() - seen):
        raise InputError(f"{where} holds no state of parameters that are trained, of {few(missing)}")
    return tensors


def _names_by_number(foreign: Foreign, entry: Mapping[str, Any], method: Method, where: str) -> dict[int, str]:
    """What each number of the file's optimizer stands for, in our names."""
    groups, expected = _numbers(entry, where), _groups(foreign.layout.optimizer, method)
    if [len(group) for group in groups] != [len(group) for group in expected]:
        raise InputError(
            f"{where} has groups of {_counts(groups)} parameters; expected {_counts(expected)}, as a "
            f"{foreign.layout.kind} has"
        )
    pairs = zip(chain.from_iterable(groups), chain.from_iterable(expected), strict=True)
    return dict(pairs)


def _entries(name: str, values: Mapping[str, Any], parameter: Tensor, where: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in values.items():
        if key == "step":
            yield f"{name}/{key}", torch.tensor(float(value))
        elif not isinstance(value, Tensor) or value.shape != parameter.shape or not bool(value.isfinite().all()):
            raise InputError(f"{where}: {key} of {name} is not a finite tensor of shape {list(parameter.shape)}")
        else:
            yield f"{name}/{key}", value.detach().float()


def _groups(rule: str | None, method: nn.Module) -> list[list[str]]:
    """Names of the parameters in the order in which the original hands them to its optimizer."""
    names = [name for name, _ in method.named_parameters()]
    if rule == "by_name":
        excluded = [name for name in names if "bn" in name or "bias" in name]
        return [excluded, [name for name in names if name not in set(excluded)]]
    if rule == "by_part":
        return [[n for n in names if n.startswith("encoder.")], [n for n in names if not n.startswith("encoder.")]]
    return [names]


def _numbers(entry: Mapping[str, Any], where: str) -> list[list[int]]:
    groups, state = entry.get("param_groups"), entry.get("state")
    if isinstance(groups, list) and isinstance(state, Mapping):
        numbers = [group.get("params") if isinstance(group, Mapping) else None for group in groups]
        whole = [group for group in numbers if isinstance(group, list) and all(isinstance(n, int) for n in group)]
        if len(whole) == len(groups):
            return whole
    raise InputError(f"{where} is no state of a torch optimizer: expected state and param_groups")


def _counts(groups: list[list[Any]]) -> str:
    return " and ".join(str(len(group)) for group in groups)


def _check_whole(foreign: Foreign) -> None:
    layout = foreign.layout
    absent = [
        prefix.rstrip(".")
        for prefix in layout.groups
        if not any(begins(name, prefix) for name in foreign.tensors) and prefix != "predictor."
    ]
    if not layout.groups or layout.optimizer is None:
        raise InputError(
            f"{foreign.path} is a {layout.kind}, of which training cannot go on: {_why_not(layout.source)}. Import its "
            "backbone instead, without --full"
        )
    if absent:
        raise InputError(
            f"{foreign.path} holds no whole training state: {', '.join(absent)} is missing. Import its backbone "
            "instead, without --full"
        )


def _why_not(source: str) -> str:
    if source == "relicv2":
        return "its released files hold the encoder, and its pre-training was never released"
    return "it holds no whole training state, or no source says how its optimizer counts parameters"


def _position(foreign: Foreign, epoch: int | None, per_epoch: int) -> Position:
    """The place in the schedule, in updates of the recipe on its data."""
    if epoch is not None:
        return Position(epoch, 0, epoch * per_epoch)
    if foreign.updates is not None:
        return Position(*divmod(foreign.updates, per_epoch), foreign.updates)
    raise ConfigError(f"{foreign.path} does not say how many epochs are done; add --epoch N")
