"""NT-Xent, SimCLR's loss (Chen et al., arXiv:2002.05709, eq. 1), streamed: no rows x rows matrix.

Legend: B images, n = 2 B rows z (view 1, then view 2), M extra keys k, D features, pos(i) the other view of row i.

    s_ij = z_i . z_j / tau,   t_ij = z_i . k_j / tau,      lse_i = log( sum_{j != i} exp s_ij + sum_j exp t_ij )
    loss_i = lse_i - s_i,pos(i)

Reductions of the n rows, each with its weights c_i = d loss / d loss_i:

    mean      mean_i loss_i                          c_i = 1 / n
    log_mean  - log mean_i exp(-loss_i)              c_i = softmax_i(-loss_i)

`log_mean` is what the SimCLR of the relational-reasoning repository minimises: the logarithm of the mean
probability of the positives, instead of the mean of the logarithms.

With p_ij = exp(s_ij - lse_i), a row of z is pulled as a row and as a key of the others:

    d loss / d z_i = 1/tau [ sum_j (c_i p_ij + c_j p_ji) z_j + sum_j c_i p^t_ij k_j - (c_i + c_pos(i)) z_pos(i) ]

s is symmetric, so p_ji = exp(s_ij - lse_j) comes from the same tile.  One pass over the keys gives lse, a second one
the gradient, both in the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from relssl.ops.known_gradient import attach_gradient
from relssl.ops.tiles import keys_per_tile

REDUCTIONS = ("mean", "log_mean")


def nt_xent(
    view1: Tensor,
    view2: Tensor,
    *,
    temperature: float,
    extra_keys: Tensor | None = None,
    reduction: Literal["mean", "log_mean"] = "mean",
) -> Tensor:
    """Tell each row's other view from all other rows, and from `extra_keys`.

    Rows are used as they come (callers pass L2-normalised ones).  Sums and the loss are float32, float64 if any
    operand is; autocast does not reach inside.  Gradient goes to both views, each in its dtype.

    Args:
        view1, view2: (B, D), row i of both from image i.
        temperature: tau > 0.
        extra_keys: (M, D), further negatives of every row, constants: the other ranks' rows in WCL.
        reduction: `mean` as in the paper, or `log_mean` (see the module's docstring).

    Returns:
        The loss, 0-d.  A single image without extra keys has nothing to be told from: 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, no rows, a temperature <= 0, an unknown
            reduction.
    """
    _check(view1, view2, extra_keys, temperature, reduction)
    wide = torch.promote_types(torch.promote_types(view1.dtype, view2.dtype), torch.float32)
    if extra_keys is not None:
        wide = torch.promote_types(wide, extra_keys.dtype)
    with torch.autocast(view1.device.type, enabled=False):
        rows = torch.cat([view1.to(wide), view2.to(wide)])
        loss, grad = _nt_xent(rows, extra_keys, temperature, reduction)
        return loss if grad is None else attach_gradient(loss, [rows], [grad])


def _check(view1: Tensor, view2: Tensor, extra_keys: Tensor | None, temperature: float, reduction: str) -> None:
    operands = {"view1": view1, "view2": view2}
    if extra_keys is not None:
        operands["extra_keys"] = extra_keys
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in operands.items())
    if any(x.dim() != 2 for x in operands.values()) or view1.shape != view2.shape or view1.numel() == 0:
        raise ValueError(f"expected view1 and view2 of one shape (B, D), neither empty; got {shapes}")
    if len({x.shape[1] for x in operands.values()}) > 1:
        raise ValueError(f"extra_keys must be (M, D) with the views' number of features D; got {shapes}")
    if not all(x.is_floating_point() for x in operands.values()):
        kinds = ", ".join(f"{name} {x.dtype}" for name, x in operands.items())
        raise ValueError(f"expected floating-point tensors; got {kinds}")
    if len({x.device for x in operands.values()}) > 1:
        places = ", ".join(f"{name} on {x.device}" for name, x in operands.items())
        raise ValueError(f"all operands must be on one device; got {places}")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")


@torch.no_grad()
def _nt_xent(
    rows_ND: Tensor, extra_MD: Tensor | None, temperature: float, reduction: str
) -> tuple[Tensor, Tensor | None]:
    extra_MD = rows_ND[:0] if extra_MD is None else extra_MD
    scaled_ND = rows_ND / temperature
    positives_ND = rows_ND.roll(len(rows_ND) // 2, 0)
    lse_N = _log_sum_exp(scaled_ND, rows_ND, extra_MD)
    loss_N = lse_N - (scaled_ND * positives_ND).sum(1)
    if reduction == "mean":
        loss, share_N = loss_N.mean(), torch.full_like(loss_N, 1 / len(loss_N))
    else:
        loss, share_N = math.log(len(loss_N)) - torch.logsumexp(-loss_N, 0), torch.softmax(-loss_N, 0)
    if not rows_ND.requires_grad:
        return loss, None
    grad_ND = (share_N + share_N.roll(len(rows_ND) // 2)).neg_().unsqueeze(1) * positives_ND
    for tile_NC, keys_CD, columns in _tiles(scaled_ND, rows_ND, extra_MD):
        pull_NC = (tile_NC - lse_N[:, None]).exp_().mul_(share_N[:, None])
        if columns is not None:
            pull_NC += tile_NC.sub_(lse_N[columns]).exp_().mul_(share_N[columns])
        grad_ND.addmm_(pull_NC, keys_CD)
    return loss, grad_ND.div_(temperature)


def _log_sum_exp(scaled_ND: Tensor, rows_ND: Tensor, extra_MD: Tensor) -> Tensor:
    lse_N = scaled_ND.new_full((len(scaled_ND),), -torch.inf)
    for tile_NC, _, _ in _tiles(scaled_ND, rows_ND, extra_MD):
        lse_N = torch.logaddexp(lse_N, tile_NC.logsumexp(1))
    return lse_N


def _tiles(scaled_ND: Tensor, rows_ND: Tensor, extra_MD: Tensor) -> Iterator[tuple[Tensor, Tensor, slice | None]]:
    """Products with some keys at a time, those keys, and which rows they are (None: extra keys)."""
    chunk = keys_per_tile(len(rows_ND), len(rows_ND) + len(extra_MD), rows_ND.device)
    for start in range(0, len(rows_ND), chunk):
        keys_CD = rows_ND[start : start + chunk]
        tile_NC = scaled_ND @ keys_CD.T
        tile_NC.diagonal(-start).fill_(-torch.inf)
        yield tile_NC, keys_CD, slice(start, start + chunk)
    for start in range(0, len(extra_MD), chunk):
        keys_CD = extra_MD[start : start + chunk].to(rows_ND.dtype)
        yield scaled_ND @ keys_CD.T, keys_CD, None
