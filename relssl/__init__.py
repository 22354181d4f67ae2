"""relssl: a fast trainer for relational self-supervised learning."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from relssl._version import __version__

if TYPE_CHECKING:
    from torch import nn

__all__ = ["__version__", "load_backbone"]


def load_backbone(path: str | Path) -> nn.Module:
    """The backbone of a run folder or of a backbone file, on the CPU, in evaluation mode.

    It takes normalised images, (B, 3, S, S), and gives features, (B, D); D is its `feature_dim`. Mean and standard
    deviation are those of the recipe: `relssl.weights.load_backbone` gives it too.

    Raises:
        InputError: there is none, or it does not fit its recipe.
    """
    from relssl.evaluate import open_weights  # torch and all the rest, only when it is called

    return open_weights(Path(path)).backbone.eval()


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


def share_cores() -> None:
    """Let waiting threads spin only briefly before they sleep, unless the user has decided otherwise.

    On cores that anything else uses too, OpenMP's spinning threads take away the time of the very thread they wait
    for: a training step on two shared cores ran 4 times slower. It must be set before torch is loaded.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


_check_neighbours()
if sys.argv[:1] == ["-m"]:  # `python -m relssl.train` loads torch before the program begins
    share_cores()
