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
to the value, but the gradient of its cross-entropy, which sharpens p.

The candidates of one image are (n + 1) x D numbers, of every crop: kept for a backward pass, those of a large batch
outweigh all else. So images are taken some at a time, all pairs of crops together, and the gradient with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from relssl.ops.known_gradient import attach_gradient

# Elements of the largest tensor of a block of images: a few MB on a CPU, launches worth their while on a GPU.
_CPU_BLOCK, _GPU_BLOCK = 1 << 20, 1 << 25
# Each block adds to the gradient of all images, so there are at most so many of them.
_MOST_BLOCKS = 16
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
    return relicv2_terms(
        online,
        target,
        negatives,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        form=form,
        stop_gradient=stop_gradient,
    )[0]


def relicv2_terms(
    online: Tensor,
    target: Tensor,
    negatives: Tensor,
    *,
    temperature: float,
    alpha: float,
    beta: float,
    form: Literal["transpose", "swap"] = "transpose",
    stop_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`relicv2_loss`, and beside it the contrastive and the invariance term without weights and without gradient.

    With `beta` 0 the invariance is not computed, and 0.
    """
    _check(online, target, negatives, temperature, form)
    wide = torch.promote_types(torch.promote_types(online.dtype, target.dtype), torch.float32)
    with torch.autocast(online.device.type, enabled=False):
        o_VBD = F.normalize(online.to(wide), dim=2)
        t_LBD = F.normalize(target.detach().to(wide), dim=2)
        candidates = torch.cat([torch.arange(len(negatives), device=negatives.device)[:, None], negatives], dim=1)
        objective = _Objective(temperature, alpha, beta, form, stop_gradient)
        terms, grad = _in_blocks(o_VBD, t_LBD, candidates, objective)
        loss = alpha * terms[0] + beta * terms[1]
        return loss if grad is None else attach_gradient(loss, [o_VBD], [grad]), *terms


def _in_blocks(
    o_VBD: Tensor, t_LBD: Tensor, candidates_BC: Tensor, objective: _Objective
) -> tuple[Tensor, Tensor | None]:
    """Both terms (2,) and, where it is wanted, the gradient of the loss with respect to `o_VBD`."""
    wants_gradient = torch.is_grad_enabled() and o_VBD.requires_grad
    o_BVD = o_VBD.detach().transpose(0, 1).contiguous().requires_grad_(wants_gradient)
    t_BLD = t_LBD.transpose(0, 1).contiguous()
    terms, grad_BVD = o_BVD.new_zeros(2), torch.zeros_like(o_BVD)
    step = _images_per_block(o_BVD, t_BLD, candidates_BC)
    for start in range(0, len(candidates_BC), step):
        block = slice(start, start + step)
        with torch.set_grad_enabled(wants_gradient):
            contrastive, invariance = objective.sums(o_BVD, t_BLD, block, candidates_BC[block])
            loss = objective.alpha * contrastive + objective.beta * invariance
        terms += torch.stack([contrastive, invariance]).detach()
        if wants_gradient:
            grad_BVD += torch.autograd.grad(loss, o_BVD)[0]
    count = o_BVD.shape[0] * o_BVD.shape[1] * t_BLD.shape[1]
    return terms / count, (grad_BVD / count).transpose(0, 1) if wants_gradient else None


def _images_per_block(o_BVD: Tensor, t_BLD: Tensor, candidates_BC: Tensor) -> int:
    images, crops, dim = o_BVD.shape
    of_an_image = crops * (
        t_BLD.shape[1] * images if _is_dense(candidates_BC, images) else candidates_BC.shape[1] * dim
    )
    elements = _CPU_BLOCK if o_BVD.device.type == "cpu" else _GPU_BLOCK
    return max(elements // of_an_image, -(-images // _MOST_BLOCKS))


def _is_dense(candidates_bC: Tensor, images: int) -> bool:
    return candidates_bC.shape[1] >= _DENSE_SHARE * images


@dataclass(frozen=True)
class _Objective:
    temperature: float
    alpha: float
    beta: float
    form: str
    stop_gradient: bool

    def sums(self, o_BVD: Tensor, t_BLD: Tensor, block: slice, candidates_bC: Tensor) -> tuple[Tensor, Tensor]:
        """The contrastive term and the invariance, summed over a block of images and all pairs of crops."""
        log_p_bVLC = self._log_softmax(o_BVD[block], t_BLD, candidates_bC)
        contrastive = -log_p_bVLC[..., 0].sum()
        if not self.beta:
            return contrastive, torch.zeros_like(contrastive)
        if self.form == "transpose":
            log_q_bVLC = self._log_softmax(t_BLD[block], o_BVD, candidates_bC).transpose(1, 2)
        else:
            log_p_bVLC = log_p_bVLC[:, : t_BLD.shape[1]]  # large crops only
            log_q_bVLC = log_p_bVLC.transpose(1, 2)
        p = log_p_bVLC.exp()
        entropy = (p * log_p_bVLC).sum()
        return contrastive, (entropy.detach() if self.stop_gradient else entropy) - (p * log_q_bVLC).sum()

    def _log_softmax(self, anchors_bID: Tensor, others_BJD: Tensor, candidates_bC: Tensor) -> Tensor:
        """(b, I, J, C) logarithms of every anchor's softmax over its candidates among the others of every crop."""
        if _is_dense(candidates_bC, len(others_BJD)):
            places = candidates_bC[:, None, None].expand(-1, anchors_bID.shape[1], others_BJD.shape[1], -1)
            products = torch.einsum("bid,njd->bijn", anchors_bID, others_BJD).gather(3, places)
        else:
            products = torch.einsum("bid,bcjd->bijc", anchors_bID, others_BJD[candidates_bC])
        return (products / self.temperature).log_softmax(3)


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
