"""Errors that a user may meet, each with the exit code that the command line gives it.

Every message says what was expected, what came, and what to do. Anything that is not one of these is a bug in relssl.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MEANT = 3  # names that a message suggests


class RelsslError(Exception):
    """Base of every error that is meant to be read by a user; `exit_code` is the status of the process."""

    exit_code = 1


class RunError(RelsslError):
    """A run that had started could not go on (non-finite loss, too many unreadable images, ...)."""

    exit_code = 1


class ConfigError(RelsslError):
    """A command line, a config, or a combination of settings that cannot work."""

    exit_code = 2


class MissingExtraError(ConfigError):
    """An optional package is not installed; the message names the extra and the system packages it needs."""


class InputError(RelsslError):
    """An input file, folder or image was refused: absent, empty, damaged, or not what it claims to be."""

    exit_code = 3


def unknown_name(what: str, name: object, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist: the nearest known one first, then all of them.

    Nearest are names that begin with what was typed, of which there may be several.
    """
    known = list(known)
    begun = [each for each in known if name and each.startswith(str(name))]
    near = begun[:_MEANT] or difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    return f"unknown {what}: {name!r}{hint} Known: {', '.join(known)}."
