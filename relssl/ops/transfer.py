"""What is drawn on the host, on the device."""

from __future__ import annotations

import torch
from torch import Tensor


def from_host(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`; to CUDA through pinned memory, because a copy from other memory waits for all
    the work that was handed to the device before."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
