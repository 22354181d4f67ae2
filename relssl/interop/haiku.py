"""Haiku's ResNets in torchvision's names: how ReLICv2's weights come over.

    <root>/~/initial_conv / w                                   conv1.weight, HWIO -> OIHW
    <root>/~/initial_batchnorm / scale, offset                  bn1.weight, bn1.bias, (1, 1, 1, C) -> (C,)
    <root>/~/initial_batchnorm/~/mean_ema / average             bn1.running_mean;  var_ema: bn1.running_var
    <root>/~/block_group_g/~/block_b/~/conv_k / w               layer{g+1}.b.conv{k+1}.weight, batchnorm_k likewise
    <root>/~/block_group_g/~/block_b/~/shortcut_conv / w        layer{g+1}.b.downsample.0.weight, shortcut_batchnorm: 1

Of a moving average `average` is what the network used; `hidden` and `counter` are how it was computed. Weights of
these networks belong into `relicv2_resnet*`: with torchvision's padding they are off by a fifth and more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import InputError

_NETWORKS = {"online.": ("online_params", "online_state"), "target.": ("target_params", "target_state")}
_STEM = "/~/initial_conv"
_BLOCK = re.compile(r"block_group_(\d)/~/block_(\d+)/~/(?:(shortcut)_)?(conv|batchnorm)(?:_(\d))?")
_NORM = {"scale": "weight", "offset": "bias"}
_AVERAGES = {"mean_ema": "running_mean", "var_ema": "running_var"}


def is_haiku(contents: Any) -> bool:
    return isinstance(contents, Mapping) and "experiment_state" in contents


def networks(contents: Mapping[str, Any], where: str) -> tuple[dict[str, Tensor], list[str]]:
    """The encoders of a checkpoint of ReLICv2 or BYOL: `online.*`, and `target.*` where there is one.

    Args:
        contents: with `experiment_state`, a dictionary or a named tuple of two-level dictionaries.

    Returns:
        Tensors by name, and the modules beside the encoder, which are not read.

    Raises:
        InputError: there is no encoder, or a name or shape that the map above does not have.
    """
    state = contents["experiment_state"]
    tensors, others = {}, set()
    for prefix, (params, statistics) in _NETWORKS.items():
        modules = {**_part(state, params), **_part(state, statistics)}
        if not modules and prefix != "online.":
            continue
        root = _root(modules, where)
        mine = {name: leaves for name, leaves in modules.items() if name.startswith(f"{root}/~/")}
        others |= {name.partition("/")[0] for name in modules.keys() - mine.keys()}
        tensors.update({f"{prefix}{name}": tensor for name, tensor in encoder(mine, where).items()})
    return tensors, sorted(others)


def encoder(modules: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Tensor]:
    """One network in torchvision's names, float32.

    Args:
        modules: parameters and moving averages, module -> name -> array; a leading axis of devices is taken off.

    Raises:
        InputError: a name or shape that is not in the map.
    """
    drop = _has_device_axis(modules)
    tensors: dict[str, Tensor] = {}
    for module, leaves in modules.items():
        for name, leaf in leaves.items():
            key = _torch_name(module.partition("/~/")[2], name, where)
            if key is not None:
                tensors[key] = _torch_layout(np.asarray(leaf), name, drop, f"{where}: {module} / {name}")
    return tensors


def _part(state: Any, name: str) -> Mapping[str, Any]:
    found = state.get(name) if isinstance(state, Mapping) else getattr(state, name, None)
    return {k: v for k, v in found.items() if isinstance(v, Mapping)} if isinstance(found, Mapping) else {}


def _root(modules: Mapping[str, Any], where: str) -> str:
    roots = [name.removesuffix(_STEM) for name in modules if name.endswith(_STEM)]
    if len(roots) != 1:
        seen = sorted({name.partition("/")[0] for name in modules})
        raise InputError(
            f"{where} has {len(roots)} ResNets of Haiku, expected one: its modules begin with "
            f"{', '.join(seen) or 'nothing'}"
        )
    return roots[0]


def _has_device_axis(modules: Mapping[str, Mapping[str, Any]]) -> bool:
    """One copy of each array per device lies in front; a convolution shows it."""
    return any(name.endswith(_STEM) and np.ndim(leaves.get("w", 0)) == 5 for name, leaves in modules.items())


def _torch_name(place: str, name: str, where: str) -> str | None:
    """None for what only computes an average."""
    place, _, average = place.rpartition("/~/") if place.endswith(tuple(_AVERAGES)) else (place, "", "")
    module = _module(place)
    if average:
        known: dict[str, str | None] = {"average": _AVERAGES[average], "hidden": None, "counter": None}
        if average == "mean_ema":
            known["counter"] = "num_batches_tracked"
    else:
        known = {"w": "weight"} if "conv" in place else dict(_NORM)
    if module is None or name not in known:
        raise InputError(f"{where} holds {place} / {name}, which no ResNet of ReLICv2 has")
    return None if known[name] is None else f"{module}.{known[name]}"


def _module(place: str) -> str | None:
    if place in ("initial_conv", "initial_batchnorm"):
        return "conv1" if place == "initial_conv" else "bn1"
    found = _BLOCK.fullmatch(place)
    if found is None:
        return None
    group, block, shortcut, kind, number = found.groups()
    block_name = f"layer{int(group) + 1}.{block}"
    if shortcut:
        return f"{block_name}.downsample.{'0' if kind == 'conv' else '1'}"
    return None if number is None else f"{block_name}.{'conv' if kind == 'conv' else 'bn'}{int(number) + 1}"


def _torch_layout(array: np.ndarray, name: str, drop: bool, what: str) -> Tensor:
    ranks = {"w": (4,), "counter": (0,)}.get(name, (2, 4))
    if array.ndim - drop not in ranks or array.dtype.kind not in "fiu":
        raise InputError(f"{what} has shape {list(array.shape)} of {array.dtype}, which no ResNet of ReLICv2 has")
    if drop:
        array = array[0]
    if name == "counter":
        return torch.tensor(int(array), dtype=torch.int64)
    array = array.transpose(3, 2, 0, 1) if name == "w" else array.reshape(-1)
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
