"""Antialiased crop-and-resize: one meaning, three ways to compute it.

A crop takes the box of an image (pixels outside it do not exist), resizes it to `resized` with the antialiased
triangle filter of PIL and torchvision, keeps the square at `offset`, and mirrors it when asked. The result is
rounded to 8 bits, as PIL does. `crop_small` is a numba kernel for data sets that live in memory on the CPU,
`crop_matmul` two batched matrix products for the same on an accelerator, `crop_tensor` torchvision's kernel for
one decoded image of any size.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from pipelines.draw import ViewParams

# No reassociation and no contraction: the same bits on every x86-64 processor.
_STRICT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"nnan", "ninf", "nsz"}}


@numba.njit(**_STRICT)
def _taps(n_in, n_resized, offset, size, mirrored, start, weight):  # type: ignore[no-untyped-def]
    """Fill start[size] and weight[size, :] for one axis; returns the largest number of taps.

    Support and rounding follow PIL: centre (o + 1/2) * scale, radius max(scale, 1), rows sum to one.
    """
    scale = n_in / n_resized
    radius = max(scale, 1.0)
    most = 0
    for o in range(size):
        at = size - 1 - o if mirrored else o
        centre = (o + offset + 0.5) * scale
        first = max(int(centre - radius + 0.5), 0)
        last = min(int(centre + radius + 0.5), n_in)
        total = 0.0
        for t in range(first, last):
            total += max(0.0, 1.0 - abs(t - centre + 0.5) / radius)
        for t in range(first, last):
            weight[at, t - first] = np.float32(max(0.0, 1.0 - abs(t - centre + 0.5) / radius) / total)
        for t in range(last - first, weight.shape[1]):
            weight[at, t] = np.float32(0.0)
        start[at] = first
        most = max(most, last - first)
    return most


@numba.njit(cache=True, **_STRICT)
def _crop_small(images, ids, box, resized, offset, flip, out, taps):  # type: ignore[no-untyped-def]
    """images (N, H, W, 3) uint8; out (B, S, S, 3) uint8; horizontal pass first, rows contiguous."""
    size = out.shape[1]
    start_x, start_y = np.empty(size, np.int64), np.empty(size, np.int64)
    weight_x, weight_y = np.empty((size, taps), np.float32), np.empty((size, taps), np.float32)
    rows = np.empty((images.shape[1], size * 3), np.float32)
    line = np.empty(size * 3, np.float32)
    half = np.float32(0.5)
    for b in range(len(ids)):
        image = images[ids[b]]
        top, left, height, width = box[b, 0], box[b, 1], box[b, 2], box[b, 3]
        taps_y = _taps(height, resized[b, 0], offset[b, 0], size, False, start_y, weight_y)
        taps_x = _taps(width, resized[b, 1], offset[b, 1], size, flip[b], start_x, weight_x)
        first = height
        last = 0
        for y in range(size):  # only the rows that the vertical pass will read
            first = min(first, start_y[y])
            last = max(last, min(start_y[y] + taps_y, height))
        for y in range(first, last):
            for x in range(size):
                r = g = b_ = np.float32(0.0)
                for t in range(min(taps_x, width - start_x[x])):
                    w = weight_x[x, t]
                    at = left + start_x[x] + t
                    r += w * np.float32(image[top + y, at, 0])
                    g += w * np.float32(image[top + y, at, 1])
                    b_ += w * np.float32(image[top + y, at, 2])
                rows[y, 3 * x] = r
                rows[y, 3 * x + 1] = g
                rows[y, 3 * x + 2] = b_
        for y in range(size):
            line[:] = np.float32(0.0)
            for t in range(min(taps_y, height - start_y[y])):
                w = weight_y[y, t]
                for i in range(size * 3):
                    line[i] += w * rows[start_y[y] + t, i]
            for x in range(size):
                for c in range(3):
                    out[b, y, x, c] = np.uint8(min(line[3 * x + c] + half, np.float32(255.0)))


def crop_small(images: np.ndarray, ids: np.ndarray, params: ViewParams, out: np.ndarray) -> None:
    """Crop images of one in-memory array, bilinear.

    Args:
        images: (N, H, W, 3) uint8, C-contiguous; smaller images lie in the top left corner.
        ids: (B,) int64 rows of `images`.
        params: the boxes; they must lie inside the images, which `draw` guarantees.
        out: (B, S, S, 3) uint8, overwritten.
    """
    scale = max(float((params.box[:, 2:] / params.resized).max()), 1.0)
    taps = 2 * int(np.ceil(scale)) + 2
    _crop_small(images, ids, params.box, params.resized, params.offset, params.flip, out, taps)


def crop_matmul(images: Tensor, ids: Tensor, params: ViewParams) -> Tensor:
    """Crop images of one in-memory tensor by two batched matrix products, bilinear.

    Args:
        images: (N, H, W, 3) uint8 on any device.
        ids: (B,) int64 rows of `images`, on the same device.
        params: the boxes.

    Returns:
        (B, S, S, 3) uint8 on the device of `images`.
    """
    height, width = images.shape[1:3]
    weight_y = _interpolation_matrix(params, 0, height, images.device)
    weight_x = _interpolation_matrix(params, 1, width, images.device)
    batch = images[ids].to(weight_y.dtype)
    rows = torch.einsum("bow,bhwc->bhoc", weight_x, batch)
    crops = torch.einsum("boh,bhxc->boxc", weight_y, rows)
    return (crops + 0.5).clamp_(0, 255).to(torch.uint8)


def _interpolation_matrix(params: ViewParams, axis: int, length: int, device: torch.device) -> Tensor:
    """(B, S, length) float32 weights of one axis (0 = rows, 1 = columns), zero outside the box."""

    precision = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no doubles

    def column(values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values.astype(np.float64)).to(precision)
        tensor = tensor.pin_memory() if device.type == "cuda" else tensor
        return tensor.to(device, non_blocking=True).view(-1, 1, 1)

    low, n_in = column(params.box[:, axis]), column(params.box[:, axis + 2])
    scale = n_in / column(params.resized[:, axis])
    radius = scale.clamp(min=1.0)
    out = torch.arange(params.size, dtype=precision, device=device).view(1, -1, 1)
    if axis == 1:
        out = torch.where(column(params.flip) > 0, params.size - 1 - out, out)
    centre = (out + column(params.offset[:, axis]) + 0.5) * scale
    at = torch.arange(length, dtype=precision, device=device).view(1, 1, -1) - low
    first = (centre - radius + 0.5).floor().clamp(min=0)
    last = torch.minimum((centre + radius + 0.5).floor(), n_in)
    weight = (1 - (at + 0.5 - centre).abs() / radius).clamp(min=0)
    weight = torch.where((at >= first) & (at < last), weight, torch.zeros((), dtype=weight.dtype, device=device))
    return (weight / weight.sum(-1, keepdim=True)).float()


def crop_tensor(image: Tensor, params: ViewParams, row: int, out: Tensor) -> None:
    """Crop one decoded image with torchvision's antialiased 8-bit kernel, bilinear or bicubic.

    Args:
        image: (3, H, W) uint8; fastest when its memory is H x W x 3, as JPEG decoders leave it.
        params, row: the boxes and which of them.
        out: (S, S, 3) uint8, overwritten.
    """
    top, left, height, width = (int(v) for v in params.box[row])
    crop = image[:, top : top + height, left : left + width].unsqueeze(0)
    resized = tuple(int(v) for v in params.resized[row])
    if crop.shape[-2:] != resized:
        # A contiguous channels-last source is what the fast 8-bit kernel wants: a third of the time of a view.
        crop = crop.contiguous(memory_format=torch.channels_last)
        crop = torch.nn.functional.interpolate(crop, resized, mode=params.interpolation, antialias=True)
    y, x = (int(v) for v in params.offset[row])
    square = crop[0, :, y : y + params.size, x : x + params.size]
    if params.flip[row]:
        square = square.flip(-1)
    out.copy_(square.permute(1, 2, 0))
