"""Where the recipes are: the YAML files of `configs/`, found by name in a checkout and when installed.

A recipe's name is its path below `configs/` without `.yaml`: `ressl/cifar10_resnet18`. The installed package
carries the folder as `relssl/configs`; in a source checkout (`pip install -e` too) it stands beside `relssl`.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from pipelines.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent


def recipe_root() -> Path:
    """The folder that holds the recipes; `ConfigError` when the installation lost it."""
    for root in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if root.is_dir():
            return root
    raise ConfigError(
        f"the recipes are missing: expected them in {_PACKAGE / 'configs'}. "
        "Install relssl again, or give the path of a YAML file instead of a name."
    )


def list_recipes() -> list[str]:
    """Names of all recipes, sorted: `["ressl/cifar10_cpu", "ressl/cifar10_resnet18", ...]`."""
    root = recipe_root()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.glob("*/*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of the recipe `name` (`ressl/cifar10_resnet18`, a trailing `.yaml` is allowed).

    Only names are looked up here; a path of the user's own is the caller's business.

    Raises:
        ConfigError: there is no such recipe; the message names the nearest ones.
    """
    known = list_recipes()
    wanted = name.removesuffix(".yaml").removeprefix("configs/")
    if wanted in known:
        return recipe_root() / f"{wanted}.yaml"
    hint = _suggestion(wanted, known)
    raise ConfigError(f"there is no recipe {name!r}. {hint} `relssl configs` lists all of them.")


def _suggestion(wanted: str, known: list[str]) -> str:
    """Nearest names first: those that end in the wanted one (method left out), else those spelled alike."""
    near = [name for name in known if name.rpartition("/")[2] == wanted]
    near = near or difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else f"{len(known)} recipes are known, none alike."
