"""How many keys to multiply rows with at a time, where the whole matrix of products is never wanted."""

from __future__ import annotations

import torch

# Elements of a tile of rows x keys: the L2 cache of a CPU core, and launches worth their while on a GPU.
_CPU_TILE, _GPU_TILE = 1 << 18, 1 << 25
# At least this many tiles, so that each stays far below rows x keys in a small batch as well.
_MIN_TILES = 8


def keys_per_tile(num_rows: int, num_keys: int, device: torch.device) -> int:
    """At least 1, at most an eighth of the keys (rounded up), and at most what suits the device."""
    elements = _CPU_TILE if device.type == "cpu" else _GPU_TILE
    return max(1, min(elements // num_rows, -(-num_keys // _MIN_TILES)))
