"""The queue of past teacher keys that ReSSL compares with (arXiv:2107.09282; from MoCo, arXiv:1911.05722)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.errors import ConfigError


class KeyQueue(nn.Module):
    """K unit rows, overwritten oldest first.

    Rows are keys, (K, D), the layout that the streaming loss reads; released checkpoints store (D, K).

    Args:
        size: K.
        dim: D.
        generator: draws the initial rows (standard normal, then L2-normalised); torch's global one if None.

    Attributes:
        keys: buffer (K, D) float32.
        pointer: buffer (1,) int64, the row that the next key overwrites.

    Raises:
        ConfigError: size or dim below 1.
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ConfigError(f"A key queue needs size >= 1 and dim >= 1; got size {size}, dim {dim}.")
        self.register_buffer("keys", F.normalize(torch.randn(size, dim, generator=generator), dim=1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Overwrite the oldest rows, going on at row 0 after row K - 1.

        All ranks must push the same rows, so push what `dist.gather` returned.  Nothing is normalised here,
        and the place is worked out on the device, without waiting for it.

        Args:
            keys: (G, D), any floating dtype; stored in the queue's.

        Raises:
            ValueError: not (G, D).
            ConfigError: G > K, when keys of one update would overwrite each other.
        """
        size, dim = self.keys.shape
        if keys.dim() != 2 or keys.shape[1] != dim:
            raise ValueError(f"push takes keys of shape (G, {dim}), got {tuple(keys.shape)}")
        if len(keys) > size:
            raise ConfigError(
                f"A queue of {size} keys cannot take {len(keys)} at once. "
                "Use a queue at least as long as the global batch."
            )
        rows = (self.pointer + torch.arange(len(keys), device=self.pointer.device)) % size
        self.keys.index_copy_(0, rows, keys.to(self.keys))
        self.pointer.copy_((self.pointer + len(keys)) % size)

    def extra_repr(self) -> str:
        return f"size={self.keys.shape[0]}, dim={self.keys.shape[1]}"
