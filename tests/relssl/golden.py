"""Where the golden arrays are: numbers that the original code (or the papers' formulas, in float64) produced.

`RELSSL_GOLDEN` names another folder with files of the same names, so that the tests can be run on another
set.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(os.environ.get("RELSSL_GOLDEN", Path(__file__).parent.parent / "golden"))


def load(name: str) -> dict[str, np.ndarray]:
    """All arrays of `<name>.npz`."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return dict(arrays)


def cases(arrays: dict[str, np.ndarray]) -> list[str]:
    """The prefixes `c0_`, `c1_`, ... of a file that counts its cases."""
    return [f"c{i}_" for i in range(int(arrays["n_cases"]))]


def part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose key begins with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def tensor(array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
    return torch.from_numpy(np.array(array)).to(dtype)
