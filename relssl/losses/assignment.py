"""ReSA's loss: the similarities of encodings, made into assignments, are what the embeddings are to agree with.

(Weng et al., "Clustering Properties of Self-Supervised Learning", ICML 2025, arXiv:2501.18452, as in its code.)

Legend: B images of this process, N targets (the images of all processes), D features.

    sinkhorn_assign             A = exp(scores / T);  some rounds: columns sum to 1 over all processes, then rows
    assignment_cross_entropy    loss_i = - sum_n A_in log softmax_n( e_i . t_n / tau )

With r_i = sum_n A_in (1 after Sinkhorn) and p the softmax, nothing of B x N is kept for backward:

    loss_i = r_i lse_n( e_i . t_n / tau ) - e_i . (A t)_i / tau
    d loss_i / d e_i = ( r_i sum_n p_in t_n - (A t)_i ) / tau
"""

from __future__ import annotations

import torch
from torch import Tensor

from relssl import dist
from relssl.ops.known_gradient import attach_gradient
from relssl.ops.softmax_barycentre import softmax_barycentre


@torch.no_grad()
def sinkhorn_assign(scores: Tensor, *, temperature: float = 0.05, iterations: int = 3) -> Tensor:
    """Assign each image to the targets so that the targets share the images about equally.

    Sums are made of logarithms, so no temperature overflows or loses a column, and in float32 at least: scores near 1
    that were rounded to bfloat16 change exp(score / 0.05) by a tenth. With several processes every one calls it with
    its own rows; sums over images go over all of them.

    Args:
        scores: (B, N) similarities of this process's images with all targets.
        temperature: T > 0.
        iterations: rounds, at least 1.

    Returns:
        (B, N) float32, or float64 for float64; rows sum to 1, columns only nearly to B W / N.

    Raises:
        ValueError: scores that are not (B, N) floating-point, a temperature <= 0, iterations below 1.
    """
    if scores.dim() != 2 or not scores.numel() or not scores.is_floating_point():
        raise ValueError(f"expected floating-point scores (B, N), not empty; got {scores.dtype} {tuple(scores.shape)}")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    with torch.autocast(scores.device.type, enabled=False):
        logits_BN = scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature
        for _ in range(iterations):
            logits_BN -= dist.gather(logits_BN.logsumexp(0)[None]).logsumexp(0)
            logits_BN -= logits_BN.logsumexp(1, keepdim=True)
        return logits_BN.exp_()


def assignment_cross_entropy(online: Tensor, target: Tensor, assign: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of the softmax over targets against given assignments.

    Rows are used as they come (callers pass L2-normalised ones). Sums and the loss are float32, float64 if an operand
    is; autocast does not reach inside. Gradient goes to `online` alone.

    Args:
        online: (B, D).
        target: (N, D), constants.
        assign: (B, N), constants; rows need not sum to 1.
        temperature: tau > 0.

    Returns:
        The mean over the B rows, 0-d.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a temperature <= 0.
    """
    _check(online, target, assign, temperature)
    wide = torch.promote_types(torch.promote_types(online.dtype, target.dtype), torch.float32)
    with torch.autocast(online.device.type, enabled=False):
        rows = online.to(wide)
        loss, grad = _assignment_cross_entropy(rows, target.to(wide), assign.to(wide), temperature)
        return loss if grad is None else attach_gradient(loss, [rows], [grad])


@torch.no_grad()
def _assignment_cross_entropy(
    rows_BD: Tensor, target_ND: Tensor, assign_BN: Tensor, temperature: float
) -> tuple[Tensor, Tensor | None]:
    scaled_BD = rows_BD / temperature
    lse_B, barycentre_BD = softmax_barycentre(scaled_BD, target_ND)
    mass_B, assigned_BD = assign_BN.sum(1), assign_BN @ target_ND
    loss = (mass_B * lse_B - (scaled_BD * assigned_BD).sum(1)).mean()
    if not rows_BD.requires_grad:
        return loss, None
    grad_BD = (mass_B[:, None] * barycentre_BD - assigned_BD) / (temperature * len(rows_BD))
    return loss, grad_BD


def _check(online: Tensor, target: Tensor, assign: Tensor, temperature: float) -> None:
    shapes = f"online {tuple(online.shape)}, target {tuple(target.shape)}, assign {tuple(assign.shape)}"
    fits = online.dim() == target.dim() == 2 and online.shape[1] == target.shape[1]
    if not fits or not online.numel() or not target.numel() or assign.shape != (len(online), len(target)):
        raise ValueError(f"expected online (B, D), target (N, D), assign (B, N), none empty; got {shapes}")
    if not (online.is_floating_point() and target.is_floating_point() and assign.is_floating_point()):
        raise ValueError(f"expected floating-point tensors; got {online.dtype}, {target.dtype}, {assign.dtype}")
    if not online.device == target.device == assign.device:
        raise ValueError(f"all operands must be on one device; got {online.device}, {target.device}, {assign.device}")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
