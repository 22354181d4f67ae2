"""relssl: a fast trainer for relational self-supervised learning."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from relssl._version import __version__

__all__ = ["__version__"]


def _check_neighbours() -> None:
    """`python -m relssl` puts the working directory first on the path, where a user's own folder may hide ours."""
    home = Path(__file__).resolve().parent.parent
    for name in ("pipelines", "dataset_tools"):
        spec = find_spec(name)
        places = [Path(p).resolve() for p in (spec.submodule_search_locations or [])] if spec else []
        if home / name not in places:
            found = places[0] if places else "nothing"
            message = (
                f"relssl needs its own package {name!r} at {home / name}, but Python finds {found}. "
                f"Is there a folder called {name}/ in the working directory? Rename it, or run from another folder."
            )
            if sys.argv[:1] == ["-m"]:  # `python -m relssl`: a sentence, no traceback
                print(f"relssl: {message}", file=sys.stderr)
                raise SystemExit(2)
            raise ImportError(message)


_check_neighbours()
