"""Memory for batches on the host, used again as soon as nobody holds a tensor in it.

A batch may be kept for as long as its user likes, so its memory cannot simply rotate; and fresh memory is expensive:
the system clears every page of it, for views of 224 pixels a tenth of the time in which they are made.
"""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor


class Recycler:
    """Hands out tensors; keeps the memory of at most `keep` that were let go."""

    def __init__(self, keep: int = 8):
        self._keep = keep
        self._free: list[np.ndarray] = []
        self._lock = threading.RLock()  # re-entrant: memory may come back while a thread is in here

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the CPU. Its memory comes back when the last tensor that shares it is gone."""
        size = math.prod(shape) * dtype.itemsize
        block = self._take(size)
        if block is None:
            block = np.empty(size, np.uint8)
        lease = block.view()  # tensors keep this array alive, and its end is the end of the lease
        weakref.finalize(lease, self._give_back, block).atexit = False
        return torch.from_numpy(lease).view(dtype).view(shape)

    def _take(self, size: int) -> np.ndarray | None:
        with self._lock:
            for place, block in enumerate(self._free):
                if len(block) == size:
                    return self._free.pop(place)
        return None

    def _give_back(self, block: np.ndarray) -> None:
        with self._lock:
            self._free.append(block)
            del self._free[: -self._keep]

    def clear(self) -> None:
        """Forget all memory that is free; what is in use is not kept when it comes back."""
        with self._lock:
            self._keep = 0
            self._free.clear()
