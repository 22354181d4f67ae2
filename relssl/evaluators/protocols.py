"""Protocols by name: a table of published numbers, any of which can be replaced, openly.

Recipes are checked with what stands here, so it is light: no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ValidationError

from pipelines.errors import ConfigError, unknown_name

Protocol = TypeVar("Protocol", bound=BaseModel)

# exp(1 / 0.0125) = 6e34 still fits float32, and exp(-1 / 0.0125) is still above zero
SMALLEST_TEMPERATURE = 0.0125


def usable_temperature(temperature: float) -> float:
    """The temperature of weighted kNN, if its weights can be had.

    Raises:
        ValueError: they cannot.
    """
    if not (math.isfinite(temperature) and temperature >= SMALLEST_TEMPERATURE):
        raise ValueError(
            f"kNN temperature must be at least {SMALLEST_TEMPERATURE} (below it the weights leave the range of float32)"
        )
    return temperature


Temperature = Annotated[float, AfterValidator(usable_temperature)]


def named_protocol(
    kind: str, model: type[Protocol], table: Mapping[str, Mapping[str, Any]], name: str, overrides: Mapping[str, Any]
) -> Protocol:
    """The protocol `name` of a table, with some numbers replaced; its `name` then ends in `(changed)`.

    Args:
        kind: what the protocols are of, for messages, such as `linear`.
        model: with a field `name`.

    Raises:
        ConfigError: unknown name or setting (the nearest known one is named), or a value that cannot be.
    """
    if name not in table:
        raise ConfigError(unknown_name(f"{kind} protocol", name, table))
    known = [field for field in model.model_fields if field != "name"]
    for key in overrides:
        if key not in known:
            raise ConfigError(unknown_name(f"setting of a {kind} protocol", key, known))
    original = model(name=name, **table[name])
    try:
        changed = model(**{**original.model_dump(), **overrides})
    except ValidationError as error:
        raise ConfigError(f"{kind} protocol {name}: {reasons(error)}") from None
    return original if changed == original else changed.model_copy(update={"name": f"{name} (changed)"})


def reasons(error: ValidationError) -> str:
    """What pydantic refused, in one line."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc']))}: {_words(e)}, got {e['input']!r}" if e["loc"] else _words(e)
        for e in error.errors()
    )


def _words(problem: Mapping[str, Any]) -> str:
    return str(problem["msg"]).removeprefix("Value error, ")
