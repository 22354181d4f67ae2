"""Rows of features: precision, unit length, and how far they lie apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or float64 where it is: what losses are computed in under autocast."""
    return x if x.dtype == torch.float64 else x.float()


def unit_rows(x: Tensor) -> Tensor:
    """L2-normalised rows, at least in float32: similarities divided by a small temperature need the digits.

    Shape:
        (N, D) -> (N, D), float32, or float64 for float64
    """
    return F.normalize(at_least_float32(x), dim=1)


@torch.no_grad()
def spread(x: Tensor) -> Tensor:
    """How far the directions of the rows of x (N, D) lie apart: 1 = all over the sphere, 0 = collapsed to a point.

    The standard deviation over the rows of the entries of `unit_rows(x)`, averaged over D, times sqrt(D); 0-d.
    """
    return unit_rows(x).std(dim=0, correction=0).mean() * x.shape[1] ** 0.5
