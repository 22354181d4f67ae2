"""Matrix products with all their digits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in true float32: no autocast, no TF32, whatever the training loop has switched on.

    TF32 keeps 10 bits of a similarity. At temperature 0.07 that moves a neighbour's weight by about a percent, and of
    near neighbours it makes another one the nearest: results would depend on a speed setting.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
