"""Softmax of rows against a long list of keys, without ever holding the rows x keys matrix.

Legend: R rows, K keys, D features, C keys of one chunk.

    lse_i = log sum_j exp(x_i . k_j)             out_i = sum_j softmax_j(x_i . k_j) k_j

Attention whose values are its keys.  The keys go by in chunks.  The online form keeps per row a running
maximum m, sum l and weighted sum o, rescaled whenever the maximum grows (Milakov & Gimelshein,
arXiv:1805.02867; Rabe & Staats, arXiv:2112.05682): right for any rows.  The bounded form replaces m by an
upper bound that the caller knows, which saves the maximum and the rescaling: 5 kernels per chunk instead of
14, though on a CPU the two take the same time.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows x chunk in float32 should fit the L2 cache; on a GPU larger chunks also mean fewer launches.
_CPU_CHUNK, _GPU_CHUNK = 1024, 8192
# At least this many chunks, so that the tile stays far below rows x keys for a short list of keys as well.
_MIN_CHUNKS = 8


@torch.no_grad()
def softmax_barycentre(
    rows: Tensor, keys: Tensor, *, chunk: int | None = None, bound: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and barycentre of `keys` under the softmax of each row's products with them.

    Args:
        rows: (R, D), already divided by their temperatures, float32 or float64: sums are made in this dtype.
        keys: (K, D), K >= 1, any floating dtype (converted chunk by chunk).
        chunk: keys per step; chosen from the device and K if None.
        bound: (R, 1) upper bounds of the rows' products, for the bounded form.  A product more than about 88
            above its bound overflows and turns the row into NaN, one more than about 87 below it counts as
            nothing.

    Returns:
        lse (R,), out (R, D), in the dtype of `rows`; no gradient.
    """
    chunk = default_chunk(len(keys), keys.device) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if bound is None:
        return _online(rows, keys, chunk)
    return _bounded(rows, keys, chunk, bound)


def default_chunk(num_keys: int, device: torch.device) -> int:
    """Keys per step: an eighth of them, at most what suits the device."""
    largest = _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK
    return max(1, min(largest, -(-num_keys // _MIN_CHUNKS)))


def _online(rows_RD: Tensor, keys_KD: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    peak_R1 = rows_RD.new_full((len(rows_RD), 1), -torch.inf)
    sum_R1 = torch.zeros_like(peak_R1)
    out_RD = torch.zeros_like(rows_RD)
    for keys_CD in keys_KD.split(chunk):
        keys_CD = keys_CD.to(rows_RD.dtype)
        tile_RC = rows_RD @ keys_CD.T
        new_peak_R1 = torch.maximum(peak_R1, tile_RC.amax(dim=1, keepdim=True))
        decay_R1 = (peak_R1 - new_peak_R1).exp_()
        tile_RC.sub_(new_peak_R1).exp_()
        sum_R1.mul_(decay_R1).add_(tile_RC.sum(dim=1, keepdim=True))
        out_RD.mul_(decay_R1).addmm_(tile_RC, keys_CD)
        peak_R1 = new_peak_R1
    return (peak_R1 + sum_R1.log()).squeeze(1), out_RD.div_(sum_R1)


def _bounded(rows_RD: Tensor, keys_KD: Tensor, chunk: int, bound_R1: Tensor) -> tuple[Tensor, Tensor]:
    sum_R1 = rows_RD.new_zeros((len(rows_RD), 1))
    out_RD = torch.zeros_like(rows_RD)
    for keys_CD in keys_KD.split(chunk):
        keys_CD = keys_CD.to(rows_RD.dtype)
        tile_RC = torch.addmm(-bound_R1, rows_RD, keys_CD.T).exp_()
        sum_R1.add_(tile_RC.sum(dim=1, keepdim=True))
        out_RD.addmm_(tile_RC, keys_CD)
    return (bound_R1 + sum_R1.log()).squeeze(1), out_RD.div_(sum_R1)
