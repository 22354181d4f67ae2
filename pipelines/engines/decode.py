"""One stored sample -> (3, H, W) uint8 tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from pipelines.errors import InputError


def decode_sample(files: Any, index: int) -> Tensor:
    """Decode sample `index`; the memory order is H x W x 3, so `.permute(1, 2, 0)` is contiguous.

    Raises:
        InputError: the stored bytes are not an image of the stored size.
    """
    payload = files.payload(index)
    height, width = int(files.heights[index]), int(files.widths[index])
    if not files.is_jpeg[index]:
        # A copy: torch tensors are writable and the file is mapped read-only.
        pixels = torch.from_numpy(np.array(payload).reshape(height, width, 3))
        return pixels.permute(2, 0, 1)
    try:
        image = decode_jpeg(torch.from_numpy(np.array(payload)), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise InputError(f"{_place(files, index)} cannot be decoded: {error}") from None
    if tuple(image.shape) != (3, height, width):
        raise InputError(
            f"{_place(files, index)} is {tuple(image.shape)[1:]} pixels, but the file says {(height, width)}"
        )
    return image


def _place(files: Any, index: int) -> str:
    file, local = files.locate(index)
    return f"sample {local} of {file.path}"
