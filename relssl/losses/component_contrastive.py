"""WCL's graph loss: images that hang together in a graph of nearest neighbours attract each other.

(Zheng et al., "Weakly Supervised Contrastive Learning", ICCV 2021, arXiv:2110.04770.)

Legend: N keys (the images of all processes), n anchors (those of this one), D features, g(i) the key of anchor i.

    nearest_neighbours      every image points at its most similar other image
    connected_components    images that are joined by such pointers, in any direction, get one label
    component_contrastive   P_i = the other keys with anchor i's label
                            loss_i = - 1/|P_i| sum_{j in P_i} log( exp s_ij / sum_{j != g(i)} exp s_ij )

With s_ij = f_i . k_j / tau and C_c the sum of the keys of component c, the positives need no matrix:

    loss_i = lse_{j != g(i)} s_ij - f_i . (C_c(i) - k_g(i)) / (tau |P_i|)
    d loss_i / d f_i = 1/tau [ sum_j p_ij k_j - (C_c(i) - k_g(i)) / |P_i| ]

The products with the keys are made some keys at a time, twice: once for the lse, once for the gradient, both in the
forward pass. Labels stand for the N x N mask of the original code, and nothing leaves the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from relssl.ops.known_gradient import attach_gradient
from relssl.ops.precision import full_precision
from relssl.ops.tiles import keys_per_tile


@torch.no_grad()
def nearest_neighbours(features: Tensor) -> Tensor:
    """The most similar other row of each row, by product; of equals the first.

    In float32 at least, and without TF32: products of fewer digits turn neighbours around.

    Shape:
        (N, D), N at least 2 -> (N,) int64

    Raises:
        ValueError: not (N, D) with two rows or more.
    """
    if features.dim() != 2 or len(features) < 2 or not features.is_floating_point():
        raise ValueError(
            f"expected floating-point features (N, D) of at least two images; got {features.dtype} "
            f"{tuple(features.shape)}"
        )
    with full_precision(features.device):
        rows_ND = features.to(torch.promote_types(features.dtype, torch.float32))
        found = []
        step = keys_per_tile(len(rows_ND), len(rows_ND), rows_ND.device)
        for start in range(0, len(rows_ND), step):
            products = rows_ND[start : start + step] @ rows_ND.T
            products.diagonal(start).fill_(-torch.inf)
            found.append(products.argmax(1))
        return torch.cat(found)


@torch.no_grad()
def connected_components(neighbours: Tensor) -> Tensor:
    """Components of the undirected graph in which every node has an edge to `neighbours` of it.

    Pointer doubling: after k rounds each node holds the least of the 2^k nodes on its way and points 2^k further, and
    after ceil(log2 N) rounds every way has gone round its component's only cycle. No synchronisation with the host.

    Shape:
        (N,) int64, each in 0..N-1 -> (N,) int64, the least node of the component's cycle

    Raises:
        ValueError: not a one-dimensional int64 tensor.
    """
    if neighbours.dim() != 1 or neighbours.dtype != torch.int64:
        raise ValueError(f"expected neighbours (N,) int64; got {neighbours.dtype} {tuple(neighbours.shape)}")
    pointer = neighbours
    least = torch.arange(len(neighbours), device=neighbours.device)
    for _ in range(max(len(neighbours) - 1, 0).bit_length()):
        least = torch.minimum(least, least[pointer])
        pointer = pointer[pointer]
    return least[pointer]


def component_contrastive(
    anchors: Tensor, keys: Tensor, labels: Tensor, *, offset: int = 0, temperature: float
) -> Tensor:
    """Pull each anchor towards the keys with its label, away from all others; its own key counts as neither.

    Rows are used as they come (callers pass L2-normalised ones). Sums and the loss are float32, float64 if an operand
    is; autocast does not reach inside. Gradient goes to the anchors alone: keys are constants, as in the original,
    whose gathered features carry none even for their own process.

    Args:
        anchors: (n, D); anchor i is row `offset + i` of the keys, seen with a gradient.
        keys: (N, D), N at least 2.
        labels: (N,) int64 in 0..N-1, as `connected_components` gives them. A key alone with its label attracts
            nothing; its row then only pushes.
        temperature: tau > 0.

    Returns:
        The mean over the anchors, 0-d.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an offset that leaves the keys, a
            temperature <= 0.
    """
    _check(anchors, keys, labels, offset, temperature)
    wide = torch.promote_types(torch.promote_types(anchors.dtype, keys.dtype), torch.float32)
    with torch.autocast(anchors.device.type, enabled=False):
        rows = anchors.to(wide)
        loss, grad = _component_contrastive(rows, keys.to(wide), labels, offset, temperature)
        return loss if grad is None else attach_gradient(loss, [rows], [grad])


def _check(anchors: Tensor, keys: Tensor, labels: Tensor, offset: int, temperature: float) -> None:
    shapes = f"anchors {tuple(anchors.shape)}, keys {tuple(keys.shape)}, labels {tuple(labels.shape)}"
    fits = anchors.dim() == keys.dim() == 2 and anchors.shape[1] == keys.shape[1] and labels.shape == keys.shape[:1]
    if not fits or not len(anchors) or len(keys) < 2:
        raise ValueError(f"expected anchors (n, D), keys (N, D), labels (N,) with N of at least 2; got {shapes}")
    if not (anchors.is_floating_point() and keys.is_floating_point() and labels.dtype == torch.int64):
        raise ValueError(
            f"expected floating-point anchors and keys, int64 labels; got {anchors.dtype}, {keys.dtype}, {labels.dtype}"
        )
    if not anchors.device == keys.device == labels.device:
        raise ValueError(f"all operands must be on one device; got {anchors.device}, {keys.device}, {labels.device}")
    if not 0 <= offset <= len(keys) - len(anchors):
        raise ValueError(f"anchors are keys offset ... offset + n - 1, but offset is {offset}; got {shapes}")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


@torch.no_grad()
def _component_contrastive(
    rows_nD: Tensor, keys_ND: Tensor, labels_N: Tensor, offset: int, temperature: float
) -> tuple[Tensor, Tensor | None]:
    mine = slice(offset, offset + len(rows_nD))
    sums_ND = torch.zeros_like(keys_ND).index_add_(0, labels_N, keys_ND)
    sizes_N = keys_ND.new_zeros(len(keys_ND)).index_add_(0, labels_N, keys_ND.new_ones(len(keys_ND)))
    others_n1 = (sizes_N[labels_N[mine]] - 1).clamp_(min=1).unsqueeze(1)
    positives_nD = (sums_ND[labels_N[mine]] - keys_ND[mine]) / others_n1
    scaled_nD = rows_nD / temperature
    lse_n = scaled_nD.new_full((len(rows_nD),), -torch.inf)
    for tile_nC, _ in _tiles(scaled_nD, keys_ND, offset):
        lse_n = torch.logaddexp(lse_n, tile_nC.logsumexp(1))
    loss = (lse_n - (scaled_nD * positives_nD).sum(1)).mean()
    if not rows_nD.requires_grad:
        return loss, None
    grad_nD = -positives_nD
    for tile_nC, keys_CD in _tiles(scaled_nD, keys_ND, offset):
        grad_nD.addmm_(tile_nC.sub_(lse_n[:, None]).exp_(), keys_CD)
    return loss, grad_nD.div_(temperature * len(rows_nD))


def _tiles(scaled_nD: Tensor, keys_ND: Tensor, offset: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Products with some keys at a time, an anchor's own key left out, and those keys."""
    step = keys_per_tile(len(scaled_nD), len(keys_ND), keys_ND.device)
    for start in range(0, len(keys_ND), step):
        keys_CD = keys_ND[start : start + step]
        tile_nC = scaled_nD @ keys_CD.T
        tile_nC.diagonal(offset - start).fill_(-torch.inf)
        yield tile_nC, keys_CD
