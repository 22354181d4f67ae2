"""Everything after the crop: jitter, grey, blur, solarise, normalise; in torch, batched, for every engine.

Each sample has its own parameters and its own order of the four jitter operations. Samples that take the same
operation at the same moment are gathered, changed, and put back, so no work is done twice and nothing waits for the
device: which samples take what is known on the host. Formulas are torchvision's float functionals; hue is the
branch-free form derived in the data-path notes (no division, no HSV). Reductions run over one axis at a time, which
keeps every image's bits independent of the batch it is in.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.draw import JITTER_OPS, OpParams, ViewParams
from pipelines.views import ViewSpec

GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision's rgb_to_grayscale


def colour(crops: Tensor, params: ViewParams, spec: ViewSpec, out: Tensor) -> None:
    """Turn 8-bit crops into a normalised view.

    Args:
        crops: (B, S, S, 3) uint8 on the device.
        params: what was drawn for this view.
        spec: the view; its normalisation is applied last.
        out: (B, S, S, 3) floating point on the same device, overwritten.
    """
    planes = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 255.0
    for op in params.ops:
        rows = np.flatnonzero(op.apply)
        if len(rows):
            _OPERATIONS[op.name](planes, op, rows)
    if spec.normalize is not None:
        mean, std = (_channels(tuple(values), planes.device) for values in spec.normalize)
        planes = (planes - mean) / std
    out.copy_(planes.permute(0, 2, 3, 1))


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of host values on a device. For CUDA through pinned memory, so that the copy waits for nothing."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@functools.lru_cache(maxsize=64)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def _jitter(planes: Tensor, op: OpParams, rows: np.ndarray) -> None:
    """torchvision's ColorJitter: four operations, each sample in its own order. planes is changed in place."""
    functions = (_brightness, _contrast, _saturation, _hue)
    factors, order = op.values["factors"], op.values["order"]
    for place in range(len(JITTER_OPS)):
        for kind, function in enumerate(functions):
            chosen = rows[order[rows, place] == kind]
            neutral = 0.0 if JITTER_OPS[kind] == "hue" else 1.0
            chosen = chosen[factors[chosen, kind] != neutral]
            if len(chosen):
                at = on_device(chosen, planes.device)
                factor = on_device(factors[chosen, kind], planes.device).view(-1, 1, 1, 1)
                planes[at] = function(planes[at], factor)


def _luma(x: Tensor) -> Tensor:
    r, g, b = GREY_WEIGHTS
    return (x[:, 0:1] * r + x[:, 1:2] * g) + x[:, 2:3] * b


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(max=1.0)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _luma(x).mean(-1, keepdim=True).mean(-2, keepdim=True)
    return (x * factor + mean * (1.0 - factor)).clamp_(0.0, 1.0)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor + _luma(x) * (1.0 - factor)).clamp_(0.0, 1.0)


def _hue(x: Tensor, factor: Tensor) -> Tensor:
    """Rotate the hue by `factor` turns, in [-1/2, 1/2].

    With v = max, m = min, c = v - m, the hue in sixths times c is q (below), and each channel is m plus c times a
    clipped triangle wave of period 6c. Grey pixels (c = 0) come out as m without a special case.
    """
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    low = torch.minimum(torch.minimum(r, g), b)
    chroma = value - low
    q = torch.where(value == r, g - b, torch.where(value == g, (b - r) + 2 * chroma, (r - g) + 4 * chroma))
    q = q + factor.view(-1, 1, 1) * 6.0 * chroma
    period = 6.0 * chroma

    def channel(shift: float) -> Tensor:
        z = (q + shift * chroma).abs_()
        wave = torch.minimum(z, period - z).abs_()
        return low + torch.minimum((wave - chroma).clamp_(min=0.0), chroma)

    return torch.stack([channel(-3.0), channel(1.0), channel(-1.0)], dim=1)


def _grey(planes: Tensor, op: OpParams, rows: np.ndarray) -> None:
    at = on_device(rows, planes.device)
    planes[at] = _luma(planes[at]).expand(-1, 3, -1, -1)


def _blur(planes: Tensor, op: OpParams, rows: np.ndarray) -> None:
    """Separable Gaussian, reflected borders, as many taps as four sigmas need: samples of one radius go together."""
    sigma = op.values["sigma"]
    side = planes.shape[-1]
    radius = np.minimum(np.ceil(4 * sigma[rows]).astype(np.int64), side - 1)
    for r in np.unique(radius):
        chosen = rows[radius == r]
        at = on_device(chosen, planes.device)
        planes[at] = _gaussian(planes[at], on_device(sigma[chosen], planes.device), int(r))


def _gaussian(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    side = x.shape[-1]
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=torch.float32)
    weight = torch.exp(-0.5 * (offsets / sigma.view(-1, 1)) ** 2)
    weight = (weight / weight.sum(-1, keepdim=True)).view(len(x), -1, 1, 1, 1)
    padded = F.pad(x, (radius, radius, 0, 0), mode="reflect")
    x = sum((padded[..., d : d + side] * weight[:, d] for d in range(2 * radius + 1)), torch.zeros_like(x))
    padded = F.pad(x, (0, 0, radius, radius), mode="reflect")
    return sum((padded[..., d : d + side, :] * weight[:, d] for d in range(2 * radius + 1)), torch.zeros_like(x))


def _solarise(planes: Tensor, op: OpParams, rows: np.ndarray) -> None:
    at = on_device(rows, planes.device)
    threshold = on_device(op.values["threshold"][rows], planes.device).view(-1, 1, 1, 1)
    chosen = planes[at]
    planes[at] = torch.where(chosen >= threshold, 1.0 - chosen, chosen)


_OPERATIONS = {"jitter": _jitter, "grey": _grey, "blur": _blur, "solarise": _solarise}
