"""The default engine: torchvision's JPEG decoder and our antialiased resize in a pool of threads.

Both release the GIL, so threads scale without copies between processes.
"""

from __future__ import annotations

from torch import Tensor

from pipelines.engines.decode import decode_sample
from pipelines.engines.threads import ThreadedEngine


class Engine(ThreadedEngine):
    """See `pipelines.engines`."""

    def decode(self, index: int) -> Tensor:
        return decode_sample(self.files, index)
