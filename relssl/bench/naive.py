"""The losses as a textbook has them: whole matrices and lists of pairs, gradients by autograd.

What `relssl bench losses` races ours against. Written from the formulas of the papers, and never used in training.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from relssl.nets import RelationHead


def relational_cross_entropy(
    student: Tensor, teacher: Tensor, queue: Tensor, *, tau_student: float = 0.1, tau_teacher: float = 0.04
) -> Tensor:
    """ReSSL: cross-entropy between two softmaxes over the queue, both of them rows x queue.

    The original's two copies of the queue, which it overwrites before backward, are left out.

    Args:
        student: (V*B, D) crop-major.
        teacher: (B, D), a constant.
        queue: (K, D), a constant.
    """
    with torch.no_grad():
        target = torch.softmax(teacher @ queue.T / tau_teacher, dim=1).repeat(len(student) // len(teacher), 1)
    return -(target * torch.log_softmax(student @ queue.T / tau_student, dim=1)).sum(1).mean()


def nt_xent(view1: Tensor, view2: Tensor, *, temperature: float) -> Tensor:
    """SimCLR: cross-entropy of the whole 2B x 2B matrix without its diagonal; views (B, D)."""
    rows = torch.cat([view1, view2])
    logits = (rows @ rows.T / temperature).masked_fill(
        torch.eye(len(rows), dtype=torch.bool, device=rows.device), -torch.inf
    )
    return F.cross_entropy(logits, torch.arange(len(rows), device=rows.device).roll(len(view1)))


def component_labels(features: Tensor) -> Tensor:
    """WCL's graph: each row points at the most similar other one, and what hangs together gets one label.

    By the whole matrix and SciPy, on the CPU. Products are float32 at least: narrower ones point elsewhere.

    Shape:
        (N, D) -> (N,) int64
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = len(features)
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        rows = features.to(torch.promote_types(features.dtype, torch.float32))
        nearest = (rows @ rows.T).fill_diagonal_(-torch.inf).argmax(1).cpu().numpy()
    graph = coo_matrix(([1] * count, (range(count), nearest)), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    return torch.from_numpy(labels).to(features.device, torch.int64)


def component_contrastive(anchors: Tensor, keys: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """WCL: the positives of an anchor are the other keys with its label, by N x N masks.

    Args:
        anchors: (N, D).
        keys: (N, D), constants: the same rows without gradient.
        labels: (N,) of `component_labels`, no label alone.
    """
    itself = torch.eye(len(keys), dtype=torch.bool, device=keys.device)
    positives = ((labels[:, None] == labels) & ~itself).float()
    log_p = torch.log_softmax((anchors @ keys.T / temperature).masked_fill(itself, -torch.inf), dim=1)
    return -((positives * log_p.masked_fill(itself, 0)).sum(1) / positives.sum(1)).mean()


def sinkhorn_assign(scores: Tensor, *, temperature: float = 0.05, iterations: int = 3) -> Tensor:
    """ReSA: (B, N) scores to assignments by normalising columns and rows in turn. Overflows for small temperatures."""
    with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
        assign = torch.exp(scores / temperature)
        for _ in range(iterations):
            assign = assign / assign.sum(0)
            assign = assign / assign.sum(1, keepdim=True)
        return assign


def assignment_cross_entropy(online: Tensor, target: Tensor, assign: Tensor, *, temperature: float) -> Tensor:
    """ReSA: cross-entropy of the softmax over targets against assignments (B, N), which is B x N, too."""
    return -(assign * torch.log_softmax(online @ target.T / temperature, dim=1)).sum(1).mean()


def relicv2_loss(
    online: Tensor,
    target: Tensor,
    negatives: Tensor,
    *,
    temperature: float,
    alpha: float,
    beta: float,
    gathers: bool = False,
) -> Tensor:
    """ReLICv2: the listing's two loops over crops.

    Each pair makes the products with all images and picks from them or, with `gathers`, gathers the candidates' rows.

    Args:
        online: (V, B, D) raw embeddings, large crops first.
        target: (L, B, D) raw embeddings, constants.
        negatives: (B, n) int64.
    """
    candidates = torch.cat([torch.arange(len(negatives), device=negatives.device)[:, None], negatives], dim=1)

    def log_softmax(anchors: Tensor, others: Tensor) -> Tensor:
        if gathers:
            products = (anchors[:, None] * others[candidates]).sum(2)
        else:
            products = (anchors @ others.T).gather(1, candidates)
        return torch.log_softmax(products / temperature, dim=1)

    online, target = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=2) for x in (online, target))
    total = online.new_zeros(())
    for o in online:
        for t in target:
            log_p = log_softmax(o, t)
            p = log_p.exp()
            divergence = (p * log_p).sum(1).detach() - (p * log_softmax(t, o)).sum(1)
            total = total + (beta * divergence - alpha * log_p[:, 0]).mean()
    return total / (len(online) * len(target))


def looped_pairs_loss(features: Tensor, head: RelationHead, views: int) -> Tensor:
    """Relational reasoning as its paper lists the pairs: view pair by view pair, negatives by a roll.

    Args:
        features: (K*N, D) view-major.
    """
    images = len(features) // views
    rows = features.unflatten(0, (views, images))
    blocks = []
    for left, right, shift in view_pairs(views, images):
        blocks.append(_aggregate(rows[left], rows[right], head.aggregation))
        blocks.append(_aggregate(rows[left], rows[right].roll(shift, 0), head.aggregation))
    return _focal(torch.cat(blocks), _targets(len(blocks), images, features), head)


def gathered_pairs_loss(
    features: Tensor, head: RelationHead, views: int, pairs: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The same with one gather for each side of all pairs: what a careful user would write.

    Args:
        pairs: of `pair_rows`, which do not change from step to step.
    """
    images = len(features) // views
    left, right = pair_rows(views, images, features.device) if pairs is None else pairs
    aggregated = _aggregate(features[left], features[right], head.aggregation)
    return _focal(aggregated, _targets(len(left) // images, images, features), head)


def pair_rows(views: int, images: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows of the left and of the right elements of all K (K-1) N pairs, in blocks of N: positive, negative, ..."""
    image = torch.arange(images)
    lefts, rights = [], []
    for left, right, shift in view_pairs(views, images):
        lefts += [left * images + image] * 2
        rights += [right * images + image, right * images + (image - shift) % images]
    return torch.cat(lefts).to(device), torch.cat(rights).to(device)


def view_pairs(views: int, images: int) -> Iterator[tuple[int, int, int]]:
    """(left view, right view, roll of the negatives): the roll counts 1, 2, ..., N-1, 1, ... over the view pairs."""
    shift = 1
    for left in range(views):
        for right in range(left + 1, views):
            yield left, right, shift
            shift = shift % (images - 1) + 1


def _aggregate(left: Tensor, right: Tensor, kind: str) -> Tensor:
    if kind == "cat":
        return torch.cat([left, right], dim=1)
    if kind == "max":
        return torch.maximum(left, right)
    return (left + right) / 2 if kind == "mean" else left + right


def _targets(blocks: int, images: int, like: Tensor) -> Tensor:
    """1 for a block of positives, 0 for the block of negatives that follows it."""
    return torch.tensor([1.0, 0.0], device=like.device).repeat(blocks // 2).repeat_interleave(images)


def _focal(pairs: Tensor, target: Tensor, head: RelationHead) -> Tensor:
    """The head on the aggregated pairs (R, D or 2D), then the focal loss with gamma 2 and alpha 0.5."""
    hidden = F.leaky_relu(head.bn1(head.linear1(pairs)), head.negative_slope)
    logit = head.linear2(hidden).squeeze(1)
    target = target.to(logit.dtype)
    probability = torch.sigmoid(logit)
    p_t = probability * target + (1 - probability) * (1 - target)
    return (0.5 * (1 - p_t) ** 2 * F.binary_cross_entropy_with_logits(logit, target, reduction="none")).mean()
