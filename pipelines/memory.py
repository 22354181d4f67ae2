"""Memory for batches on the host, used again as soon as nobody holds a tensor in it.

A batch may be kept for as long as its user likes, so its memory cannot simply rotate; and fresh memory is expensive:
the system clears every page of it, for views of 224 pixels a tenth of the time in which they are made.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor


class Recycler:
    """Hands out tensors; keeps the memory of at most `keep` that were let go.

    Safe in any thread and without a lock, as memory comes back wherever a last reference happens to end: also in a
    thread that is just taking some, or in a forked process whose other threads are gone.
    """

    def __init__(self, keep: int = 8):
        self._free: deque[_Lease] = deque(maxlen=keep)  # its operations are atomic; a full one drops the oldest
        self._used: dict[int, tuple[_Lease, weakref.ref]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the CPU. Its memory comes back when the last tensor that shares it is gone."""
        size = math.prod(shape) * dtype.itemsize
        block = self._take(size)
        if block is None:
            block = np.empty(size, np.uint8)
        window = block.view()  # tensors keep this array alive, and its end is the end of the lease
        lease = _Lease(window, self._free.append)
        lease.block = block
        # Both callbacks are functions in C. Python drops an exception in a callback, so a KeyboardInterrupt that came
        # in one, while a consumer lets go of a batch, would be lost; but it can only come between bytecodes.
        self._used[id(lease)] = lease, weakref.ref(window, functools.partial(self._used.pop, id(lease)))
        return torch.from_numpy(window).view(dtype).view(shape)

    def _take(self, size: int) -> np.ndarray | None:
        for _ in range(len(self._free)):
            try:
                lease = self._free.popleft()
            except IndexError:  # another thread took the last one
                break
            if len(lease.block) == size:
                return lease.block
            self._free.append(lease)
        return None

    def clear(self) -> None:
        """Forget all memory, for good: what is in use is not kept when it is let go."""
        self._free = deque(maxlen=0)
        self._used.clear()


class _Lease(weakref.ref):
    """A reference to an array in use, which owns the memory of that array and outlives it."""

    __slots__ = ("block",)
    block: np.ndarray
