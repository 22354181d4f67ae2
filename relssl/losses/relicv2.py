"""ReLICv2's objective: every crop tells its image from others by the target's crops, and the relation is symmetric.

(Tomasev et al., "Pushing the limits of self-supervised ResNets", arXiv:2201.05119.) No code of it was ever released;
this is a reading of the paper's listing and of ReLIC's objective (arXiv:2010.07922), not a reproduction.

Legend: L large crops, V = L + S large and small crops, B images of all processes, n negatives per image, D features;
c(b) = image b, then its n negatives; o, t the normalised online and target embeddings; i an online crop, j a target's.

    p_ij(b) = softmax over c(b) of  o_i[b] . t_j[c(b)] / tau
    contrastive_ij = - mean_b log p_ij(b)[image b]
    invariance_ij  = mean_b KL( p_ij(b) || p'_ij(b) ),  p' = softmax of  t_j[b] . o_i[c(b)] / tau     form transpose
                                                        p' = p_ji, large crops only                  form swap
    loss = sum over i, j of ( alpha contrastive_ij + beta invariance_ij ) / (V L)

With `stop_gradient` the entropy of p in the KL is a constant; in form swap a crop with itself (i = j) then adds nothing
to the value, but the gradient of its cross-entropy, which sharpens p. A few negatives make plain matrices of
B x (n + 1); for many of them the products with all images are made, and picked from.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# From this share of all images on, products with all of them cost less than gathered rows.
_DENSE_SHARE = 0.25


def relicv2_loss(
    online: Tensor,
    target: Tensor,
    negatives: Tensor,
    *,
    temperature: float,
    alpha: float,
    beta: float,
    form: Literal["transpose", "swap"] = "transpose",
    stop_gradient: bool = True,
) -> Tensor:
    """The loss of a global batch; embeddings are normalised here.

    Sums and the loss are float32, float64 if an operand is; autocast does not reach inside. Gradient goes to `online`.

    Args:
        online: (L+S, B, D) raw embeddings of the large crops, then of the small ones.
        target: (L, B, D) raw embeddings of the large crops by the target network, constants.
        negatives: (B, n) int64, n at least 1: other images for each image, the same for all pairs of crops.
        temperature: tau > 0.
        alpha, beta: weights of the contrastive and the invariance term.
        form: where the second distribution of the invariance comes from; see the module's docstring.
        stop_gradient: no gradient through the entropy of p.

    Returns:
        0-d.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a temperature <= 0, an unknown form.
    """
    _check(online, target, negatives, temperature, form)
    wide = torch.promote_types(torch.promote_types(online.dtype, target.dtype), torch.float32)
    with torch.autocast(online.device.type, enabled=False):
        o_VBD = F.normalize(online.to(wide), dim=2)
        t_LBD = F.normalize(target.detach().to(wide), dim=2)
        candidates = torch.cat([torch.arange(len(negatives), device=negatives.device)[:, None], negatives], dim=1)
        log_p = [[_log_softmax(o, t, candidates, temperature) for t in t_LBD] for o in o_VBD]
        pairs, num_large = len(o_VBD) * len(t_LBD), len(t_LBD)
        contrastive = -torch.stack([entry[:, 0].mean() for row in log_p for entry in row]).sum()
        invariance = contrastive.new_zeros(())
        if beta:
            for i, row in enumerate(log_p):
                for j, log_p_ij in enumerate(row):
                    if form == "transpose":
                        swapped = _log_softmax(t_LBD[j], o_VBD[i], candidates, temperature)
                    elif i < num_large:
                        swapped = log_p[j][i]
                    else:
                        continue
                    invariance = invariance + _divergence(log_p_ij, swapped, stop_gradient)
        return (alpha * contrastive + beta * invariance) / pairs


def _log_softmax(anchors_BD: Tensor, others_BD: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """(B, n + 1) logarithms of each anchor's softmax over its candidates among the others."""
    if candidates.shape[1] >= _DENSE_SHARE * len(others_BD):
        products = (anchors_BD @ others_BD.T).gather(1, candidates)
    else:
        products = torch.einsum("bd,bkd->bk", anchors_BD, others_BD[candidates])
    return (products / temperature).log_softmax(1)


def _divergence(log_p: Tensor, log_q: Tensor, stop_gradient: bool) -> Tensor:
    """Mean over rows of KL(p || q)."""
    p = log_p.exp()
    entropy = (p * log_p).sum(1).mean()
    return (entropy.detach() if stop_gradient else entropy) - (p * log_q).sum(1).mean()


def _check(online: Tensor, target: Tensor, negatives: Tensor, temperature: float, form: str) -> None:
    shapes = f"online {tuple(online.shape)}, target {tuple(target.shape)}, negatives {tuple(negatives.shape)}"
    fits = online.dim() == target.dim() == 3 and online.shape[1:] == target.shape[1:] and len(online) >= len(target) > 0
    if not fits or not online.numel():
        raise ValueError(f"expected online (L+S, B, D) and target (L, B, D), neither empty; got {shapes}")
    if negatives.dim() != 2 or len(negatives) != online.shape[1] or not negatives.numel():
        raise ValueError(f"expected negatives (B, n), n at least 1; got {shapes}")
    if not (online.is_floating_point() and target.is_floating_point() and negatives.dtype == torch.int64):
        raise ValueError(
            f"expected floating-point embeddings, int64 negatives; got {online.dtype}, {target.dtype}, "
            f"{negatives.dtype}"
        )
    if not online.device == target.device == negatives.device:
        raise ValueError(
            f"all operands must be on one device; got {online.device}, {target.device}, {negatives.device}"
        )
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if form not in ("transpose", "swap"):
        raise ValueError(f"form must be transpose or swap, got {form!r}")
