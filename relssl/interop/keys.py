"""Which names and shapes a network has, and how those in a file differ from them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pipelines.errors import ConfigError, InputError
from relssl.nets import build_backbone

Shapes = Mapping[str, tuple[int, ...]]

_THREE_STAGES = ("resnet8", "resnet32", "resnet56")
_BASIC = ("resnet18", "resnet34")
_BOTTLENECK = ("resnet50", "resnet101", "resnet152", "resnet200")
_SHOWN = 5


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_keys(expected: Shapes, got: Shapes, where: str, what: str) -> None:
    """Refuse names that are missing, too many, or of another shape.

    Raises:
        InputError: lists them, the first few of each kind and how many there are.
    """
    missing = [name for name in expected if name not in got]
    unexpected = [name for name in got if name not in expected]
    others = [f"{n} {list(got[n])} for {list(expected[n])}" for n in expected if n in got and got[n] != expected[n]]
    if missing or unexpected or others:
        raise InputError(
            f"{where} does not fit {what}, which has {len(expected)} entries: missing {few(missing)}; "
            f"unexpected {few(unexpected)}; other shapes {few(others)}"
        )


def few(names: list[str]) -> str:
    """`3: a, b, c`, or the first few and how many more; `none`."""
    if not names:
        return "none"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)}: {', '.join(names[:_SHOWN])}{more}"


def summary(names: Iterable[str]) -> str:
    """What names begin with, and how many do: `encoder. (318), queue`."""
    names = list(names)
    counts = Counter(name.partition(".")[0] + ("." if "." in name else "") for name in names)
    shown = [f"{begin} ({count})" if count > 1 else begin for begin, count in counts.most_common()]
    return ", ".join(shown[: 2 * _SHOWN]) + (", ..." if len(shown) > 2 * _SHOWN else "") or "nothing"


def identify(shapes: Shapes, where: str, *, haiku: bool = False) -> tuple[str, dict[str, Any]]:
    """The backbone that has exactly these names and shapes, for `build_backbone`.

    A 3x3 stem of a four-stage ResNet comes back as `stem: cifar`: the names do not say whether a max-pool follows.

    Args:
        haiku: of ReLICv2's kind.

    Raises:
        InputError: none has; names what is missing or too many against the nearest one.
    """
    name, options = _nearest(shapes, haiku)
    try:
        expected = backbone_shapes(name, options)
    except ConfigError as error:  # a width that is no whole number of channels
        raise InputError(f"{where} has no backbone that relssl knows: {error}") from None
    check_keys(expected, shapes, where, f"{name}{_told(options)}")
    return name, options


def backbone_shapes(name: str, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a backbone's state dict."""
    return shapes_of(_backbone_state(name, json.dumps(options)))


def fractions_of(name: str, options: Mapping[str, Any]) -> list[str]:
    """Names of a backbone's state dict that hold floating-point numbers: all but its counters."""
    state = _backbone_state(name, json.dumps(options))
    return [key for key, tensor in state.items() if tensor.is_floating_point()]


@cache
def _backbone_state(name: str, options: str) -> Mapping[str, Tensor]:
    with torch.device("meta"):
        return build_backbone(name, **json.loads(options)).state_dict()


def _nearest(shapes: Shapes, haiku: bool) -> tuple[str, dict[str, Any]]:
    stages = {name.split(".")[0] for name in shapes if name.startswith("layer")}
    if any(name.startswith("layer1.conv.") for name in shapes):
        return "conv4", _width(shapes, "layer1.conv.weight", 8)
    if "layer4" not in stages and stages:
        return _by_depth(_THREE_STAGES, shapes), _width(shapes, "conv1.weight", 16)
    names = _BOTTLENECK if any(".conv3." in name for name in shapes) else _BASIC
    options = _width(shapes, "conv1.weight", 64)
    if haiku:
        return _by_depth(tuple(f"relicv2_{name}" for name in names), shapes), options
    if shapes.get("conv1.weight", (0, 0, 7, 7))[2:] == (3, 3):
        options["stem"] = "cifar"
    return _by_depth(names, shapes), options


def _width(shapes: Shapes, first: str, channels: int) -> dict[str, Any]:
    width = shapes.get(first, (channels,))[0] / channels
    return {} if width == 1 else {"width": int(width) if width.is_integer() else width}


def _by_depth(names: tuple[str, ...], shapes: Shapes) -> str:
    """The name whose numbers of blocks are nearest."""
    depths = _depths(shapes)
    return min(names, key=lambda name: sum(abs(a - b) for a, b in zip(_depths_of(name), depths, strict=True)))


def _depths_of(name: str) -> tuple[int, ...]:
    return _depths(backbone_shapes(name, {}))


def _depths(shapes: Shapes) -> tuple[int, ...]:
    """Blocks in each of four stages."""
    blocks = {tuple(name.split(".")[:2]) for name in shapes if name.startswith("layer")}
    return tuple(sum(stage == f"layer{i}" for stage, *_ in blocks) for i in range(1, 5))


def _told(options: Mapping[str, Any]) -> str:
    return f" ({', '.join(f'{key} {value}' for key, value in options.items())})" if options else ""
