"""RandAugment as batched torch operations, for `pipelines.colour` on an accelerator.

FixMatch's pool with PIL's meaning of every operation, which is one of 8-bit levels: an image is rounded to them first,
and each operation leaves levels again, the very ones that PIL leaves. The compiled form is in `pipelines.kernels`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipelines import kernels
from pipelines.draw import RANDAUGMENT_OPS, OpParams

Function = Callable[[Tensor, Tensor], Tensor]
Step = tuple[Function, np.ndarray, np.ndarray]  # function, rows (n,), coefficients (n, 6)

_NUM_CODES = 10 * (len(RANDAUGMENT_OPS) + 1)


def randaugment_steps(op: OpParams) -> list[Step]:
    """Samples that take operations of one kind at one place of their lists take them together."""
    rows = np.flatnonzero(op.apply)
    codes = op.value.reshape(-1, op.value.shape[-1])[rows]
    steps: list[Step] = [(_rounded, rows, codes)]
    for drawn in codes.T:
        kind, level = np.abs(drawn).astype(np.int64) // 10 - 1, np.abs(drawn).astype(np.int64) % 10
        for function, kinds, coefficients in _KINDS:
            mine = np.flatnonzero(np.isin(kind, kinds))
            values = np.zeros((len(mine), codes.shape[1]), np.float32)
            values[:, 0] = drawn[mine]
            if coefficients is not None:
                values[:, :3] = coefficients(kind[mine], level[mine])
            steps.append((function, rows[mine], values))
    return steps


def _levels(x: Tensor) -> Tensor:
    """(N, 3, S, S) in [0, 1] as whole numbers, still floating point."""
    return (x * 255.0 + 0.5).floor_().clamp_(0.0, 255.0)


def _rounded(x: Tensor, values: Tensor) -> Tensor:
    return _levels(x) / 255.0


def _autocontrast(x: Tensor, values: Tensor) -> Tensor:
    """In double precision, as PIL: what is cut off depends on the last bit."""
    levels = _levels(x).to(torch.float32 if x.device.type == "mps" else torch.float64)
    low, high = levels.amin((2, 3), keepdim=True), levels.amax((2, 3), keepdim=True)
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1.0)  # 255.0 / x would be 255.0 times 1 / x
    stretched = (levels * scale).add_(-low * scale).trunc_().clamp_(0.0, 255.0)
    return torch.where(high > low, stretched, levels).to(x.dtype) / 255.0


def _equalize(x: Tensor, values: Tensor) -> Tensor:
    levels = _levels(x).to(torch.int64).flatten(2)
    histogram = torch.zeros((*levels.shape[:2], 256), dtype=torch.int64, device=x.device)
    histogram.scatter_add_(2, levels, torch.ones_like(levels))
    brightest = histogram.gather(2, levels.amax(2, keepdim=True))
    step = (levels.shape[2] - brightest) // 255
    below = histogram.cumsum(2) - histogram
    table = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    equalized = torch.where(step > 0, table.gather(2, levels), levels)
    return equalized.view_as(x).to(x.dtype) / 255.0


def _blend(x: Tensor, values: Tensor) -> Tensor:
    """Levels between black, the mean of the luma times values[:, 1], or the luma times values[:, 2], and the image."""
    levels = _levels(x)
    whole = levels.to(torch.int32)
    luma = (whole[:, 0:1] * 19595 + whole[:, 1:2] * 38470 + whole[:, 2:3] * 7471 + 32768) >> 16
    pixels = x.shape[2] * x.shape[3]
    mean = (2 * luma.sum((1, 2, 3), keepdim=True) + pixels) // (2 * pixels)
    factor, of_mean, of_luma = (values[:, i].view(-1, 1, 1, 1) for i in range(3))
    return _between(mean.to(x.dtype) * of_mean + luma.to(x.dtype) * of_luma, levels, factor)


def _sharpness(x: Tensor, values: Tensor) -> Tensor:
    levels = _levels(x)
    side, smooth = x.shape[2], levels.clone()
    if side > 2:
        total = 4.0 * levels[:, :, 1:-1, 1:-1]
        for i in range(3):
            for j in range(3):
                total = total + levels[:, :, i : side - 2 + i, j : side - 2 + j]
        smooth[:, :, 1:-1, 1:-1] = ((2.0 * total + 13.0) / 26.0).floor_()
    return _between(smooth, levels, values[:, 0].view(-1, 1, 1, 1))


def _between(base: Tensor, levels: Tensor, factor: Tensor) -> Tensor:
    return (base + factor * (levels - base)).floor_() / 255.0


def _posterize(x: Tensor, values: Tensor) -> Tensor:
    step = values[:, 0].view(-1, 1, 1, 1)
    return (_levels(x) / step).floor_() * step / 255.0


def _solarise(x: Tensor, values: Tensor) -> Tensor:
    levels = _levels(x)
    return torch.where(levels < values[:, 0].view(-1, 1, 1, 1), levels, 255.0 - levels) / 255.0


def _warp(x: Tensor, values: Tensor) -> Tensor:
    """The nearest pixel, black outside, by the map of the code in values[:, 0]."""
    side = x.shape[-1]
    rows = values[:, 0].to(torch.int64) + _NUM_CODES
    a, b, c, d, e, f = _maps(side, x.device)[rows].view(-1, 6, 1, 1).unbind(1)
    at = torch.arange(side, device=x.device)
    column, row = (a * at + (b * at.view(-1, 1) + c)) >> 16, (d * at + (e * at.view(-1, 1) + f)) >> 16
    inside = (column >= 0) & (column < side) & (row >= 0) & (row < side)
    source = torch.where(inside, row * side + column, 0).flatten(1).unsqueeze(1).expand(-1, 3, -1)
    return x.flatten(2).gather(2, source).view_as(x) * inside.unsqueeze(1)


@functools.lru_cache(maxsize=64)
def _maps(side: int, device: torch.device) -> Tensor:
    """(2 n, 6) int64: `kernels.warp_coefficients` of every code c in row n + c."""
    codes = range(-_NUM_CODES, _NUM_CODES)
    maps = [kernels.warp_coefficients(abs(code) // 10 - 1, abs(code) % 10, code < 0, side) for code in codes]
    return torch.tensor(maps, dtype=torch.int64, device=device)


def _blend_coefficients(kind: np.ndarray, level: np.ndarray) -> np.ndarray:
    columns = [_factors(level), kind == kernels.CONTRAST, kind == kernels.COLOUR]
    return np.stack(columns, axis=1).astype(np.float32)


def _one(function: Callable[[int], float]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The coefficient of a level, from the function of the compiled form."""

    def coefficients(kind: np.ndarray, level: np.ndarray) -> np.ndarray:
        return np.array([[function(int(x)), 0, 0] for x in level], np.float32).reshape(-1, 3)

    return coefficients


def _factors(level: np.ndarray) -> np.ndarray:
    return np.array([kernels._factor(int(x)) for x in level], np.float32)


_KINDS: tuple[tuple[Function, tuple[int, ...], Callable[[np.ndarray, np.ndarray], np.ndarray] | None], ...] = (
    (_autocontrast, (kernels.AUTOCONTRAST,), None),
    (_equalize, (kernels.EQUALIZE,), None),
    (_blend, (kernels.BRIGHTNESS, kernels.CONTRAST, kernels.COLOUR), _blend_coefficients),
    (_sharpness, (kernels.SHARPNESS,), _one(kernels._factor)),
    (_posterize, (kernels.POSTERIZE,), _one(lambda level: 1 << kernels.posterize_bits_lost(level))),
    (_solarise, (kernels.SOLARISE_LEVELS,), _one(kernels.solarise_threshold)),
    (_warp, kernels.WARPS, None),
)
