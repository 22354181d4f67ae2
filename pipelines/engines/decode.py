"""One stored sample -> (3, H, W) uint8 tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from pipelines import jpeg
from pipelines.errors import InputError, RelsslError, RunError


def decode_sample(files: Any, index: int) -> Tensor:
    """Decode sample `index`; the memory order is H x W x 3, so `.permute(1, 2, 0)` is contiguous.

    Raises:
        InputError: the stored bytes are not an image of the stored size, cannot be read, or were not written for
            this sample.
    """
    payload = np.require(files.payload(index), requirements="W")  # as torch wants it; no copy of what beton reads
    height, width = int(files.heights[index]), int(files.widths[index])
    if not files.is_jpeg[index]:
        return torch.from_numpy(payload.reshape(height, width, 3)).permute(2, 0, 1)
    try:
        header = jpeg.read_header(payload)
        found = header.height, header.width
        if found == (height, width):  # a decoder allocates what the header claims, were it gigabytes
            image = decode_jpeg(torch.from_numpy(payload), mode=ImageReadMode.RGB)
            found = image.shape[1], image.shape[2]
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{place(files, index)} cannot be decoded: {error}") from None
    if found != (height, width):
        raise InputError(f"{place(files, index)} is {found} pixels, but the file says {(height, width)}")
    return image


def place(files: Any, index: int) -> str:
    """How messages name a sample: by its number in its own file."""
    file, local = files.locate(index)
    return f"sample {local} of {file.path}"


@contextmanager
def naming(files: Any, index: int) -> Iterator[None]:
    """Turn an error that nobody expected into a RunError that names the sample it came from."""
    try:
        yield
    except RelsslError:
        raise
    except Exception as error:
        raise RunError(f"{place(files, index)}: {type(error).__name__}: {error}") from error
