"""Protocols by name: a table of published numbers, any of which can be replaced, openly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipelines.errors import ConfigError, unknown_name

Protocol = TypeVar("Protocol", bound=BaseModel)


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
        f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" if e["loc"] else e["msg"]
        for e in error.errors()
    )
