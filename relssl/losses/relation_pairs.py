"""The pair loss of Self-Supervised Relational Reasoning (Patacchiola & Storkey, NeurIPS 2020), as in its code.

Legend: K views of N images, R = K (K-1) N pairs, D features, H hidden units, C view pairs of one tile.

    h = W aggregate(f_left, f_right) + c        y = BatchNorm(h), statistics over all R pairs
    z = w . LeakyReLU(y) + e                    loss = mean over pairs of focal(z, t) or BCE(z, t)

t is 1 for two views of one image and 0 for views of two images; `relssl.ops.view_pairs` has the pairing rule.

`cat`, `sum` and `mean` factor: h = u_left + v_right, with one row of u and v per view and image.  Therefore

- the first layer costs K N rows instead of R;
- the statistics are exact without listing pairs: how often each row occurs gives the mean, and with centred u, v

      R var = sum_k w_k sum_n u^2 + sum_k r_k sum_n v^2 + 2 sum u . g,      g = sum of a row's right partners;

- BatchNorm folds into the rows, y = u' + v', and a tile of pairs is a gather, an addition, a ReLU and a product:
  with slope a, LeakyReLU(y) = a y + (1-a) ReLU(y), whose linear part again is one number per row.

`max` does not factor: its pairs stay D wide outside the tile, and are gathered three times.  Its statistics follow
from mean and covariance of the aggregated pairs, var = diag(W Cov W^T).

Loss and gradient come out together, tile by tile, and only the gradient is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relssl.ops.known_gradient import attach_gradient
from relssl.ops.view_pairs import (
    PairTile,
    default_chunk,
    multiplicities,
    pair_tiles,
    sum_of_lefts,
    sum_of_rights,
)

# How many times D features the first layer takes.
_AGGREGATED = {"cat": 2, "sum": 1, "mean": 1, "max": 1}


class PairHead(Protocol):
    """What the loss reads of a head; `relssl.nets.RelationHead` is one."""

    @property
    def linear1(self) -> nn.Linear: ...
    @property
    def bn1(self) -> nn.BatchNorm1d: ...
    @property
    def linear2(self) -> nn.Linear: ...
    @property
    def aggregation(self) -> str: ...
    @property
    def negative_slope(self) -> float: ...
    @property
    def training(self) -> bool: ...
    def move_statistics(self, mean: Tensor, unbiased_var: Tensor) -> None: ...


def relation_pairs_loss(
    features: Tensor,
    head: PairHead,
    *,
    views: int,
    loss: Literal["focal", "bce"] = "focal",
    chunk_views: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of the relation head on all pairs of a batch, without a pairs x hidden array.

    A head in training mode normalises with the statistics of the R = K (K-1) N pairs and moves its running ones
    once, as the original's does; one in evaluation mode uses its running statistics.  Sums and the loss are
    float32, float64 if features or weights are; autocast does not reach inside.  Every parameter gets a gradient;
    that of `linear1.bias` is exactly zero in training mode, where BatchNorm takes the bias out again.

    Args:
        features: (K*N, D) view-major: all images of view 0, then of view 1, ...; raw, as the backbone gives them.
        head: takes D features.
        views: K, at least 2; N must be at least 2 as well.
        loss: `focal` (gamma 2, alpha 0.5: the mean of 0.5 (1 - p_t)^2 BCE) or `bce`.
        chunk_views: view pairs, of 2 N rows each, that pass through the head at once; chosen by device and sizes
            if None.  1 takes least memory, K (K-1) / 2 fewest kernel launches.

    Returns:
        The loss, 0-d, and the share of pairs whose relation is told rightly, 0-d, in [0, 1], without gradient.

    Raises:
        ValueError: K or N below 2, rows that are no multiple of K, another D than the head's, dtypes or devices
            that do not fit, an unknown loss or aggregation, chunk_views below 1.
    """
    _check(features, head, views, loss, chunk_views)
    images = len(features) // views
    wide = torch.promote_types(torch.promote_types(features.dtype, head.linear1.weight.dtype), torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        inputs = _inputs(features, head, wide)
        frame = _Frame(
            views=views,
            images=images,
            chunk=default_chunk(views, images, features.device) if chunk_views is None else chunk_views,
            terms=_LOSSES[loss],
            aggregation=head.aggregation,
            slope=head.negative_slope,
            eps=head.bn1.eps,
            running=None if head.training else _running_statistics(head.bn1, wide),
            wants_grad=torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
        )
        result = _on_max(inputs, frame) if head.aggregation == "max" else _on_sums(inputs, frame)
        if head.training:
            head.move_statistics(result.mean, result.var * (frame.rows / (frame.rows - 1)))
        value = attach_gradient(result.loss, inputs, result.grads) if result.grads else result.loss
    return value, result.accuracy


class _Inputs(NamedTuple):
    """Everything with a gradient, in the dtype of the sums."""

    features: Tensor  # (K*N, D)
    weight: Tensor  # (H, D), for cat (H, 2D)
    bias: Tensor  # (H,)
    gamma: Tensor  # (H,) BatchNorm's scale
    beta: Tensor  # (H,) and its shift
    out_weight: Tensor  # (H,)
    out_bias: Tensor  # ()


class _Frame(NamedTuple):
    """What holds for the whole call."""

    views: int
    images: int
    chunk: int
    terms: Callable[[Tensor], tuple[Tensor, Tensor]]
    aggregation: str
    slope: float
    eps: float
    running: tuple[Tensor, Tensor] | None  # mean and variance to normalise with; None: those of the pairs
    wants_grad: bool

    @property
    def rows(self) -> int:
        return self.views * (self.views - 1) * self.images

    def tiles(self, device: torch.device) -> Iterator[PairTile]:
        return pair_tiles(self.views, self.images, chunk=self.chunk, device=device)


class _Result(NamedTuple):
    loss: Tensor
    accuracy: Tensor
    mean: Tensor  # (H,) of h, those used
    var: Tensor  # (H,) biased
    grads: tuple[Tensor, ...]  # one for each of _Inputs; empty when none is wanted


def _inputs(features: Tensor, head: PairHead, wide: torch.dtype) -> _Inputs:
    out_weight, out_bias = head.linear2.weight.squeeze(0), head.linear2.bias.squeeze(0)
    parameters = (head.linear1.weight, head.linear1.bias, head.bn1.weight, head.bn1.bias, out_weight, out_bias)
    return _Inputs(*(x.to(wide) for x in (features, *parameters)))


def _running_statistics(norm: nn.BatchNorm1d, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a head in evaluation mode needs running statistics: its bn1 keeps none")
    return norm.running_mean.to(wide), norm.running_var.to(wide)


def _check(features: Tensor, head: PairHead, views: int, loss: str, chunk_views: int | None) -> None:
    if loss not in _LOSSES:
        raise ValueError(f"loss must be one of {', '.join(_LOSSES)}; got {loss!r}")
    if head.aggregation not in _AGGREGATED:
        raise ValueError(f"the head's aggregation must be one of {', '.join(_AGGREGATED)}; got {head.aggregation!r}")
    if chunk_views is not None and chunk_views < 1:
        raise ValueError(f"chunk_views must be at least 1, got {chunk_views}")
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(f"expected floating-point features (K*N, D), got {tuple(features.shape)} {features.dtype}")
    if views < 2:
        raise ValueError(f"pairs need at least 2 views of each image, got views={views}")
    images, rest = divmod(len(features), views)
    if rest:
        raise ValueError(
            f"features must have K*N rows, a multiple of views={views}; got {len(features)}. "
            "Concatenate the views along the first axis, all images of one view after the other."
        )
    if images < 2:
        raise ValueError(f"negative pairs need at least 2 images, got N={images} (K={views}): leave this batch out")
    takes, dim = head.linear1.in_features, features.shape[1]
    if takes != _AGGREGATED[head.aggregation] * dim:
        raise ValueError(
            f"the head ({head.aggregation}) takes {takes // _AGGREGATED[head.aggregation]} features, got {dim}"
        )
    if features.device != head.linear1.weight.device:
        raise ValueError(f"features on {features.device}, but the head is on {head.linear1.weight.device}")


# ---- the loss of one logit, value and slope, as functions of the logit times the sign that makes it right


def _focal(logit: Tensor) -> tuple[Tensor, Tensor]:
    bce, wrong = -F.logsigmoid(logit), torch.sigmoid(-logit)
    weight = 0.5 * wrong.square()
    return weight * bce, -weight * (2 * (1 - wrong) * bce + wrong)


def _bce(logit: Tensor) -> tuple[Tensor, Tensor]:
    return -F.logsigmoid(logit), -torch.sigmoid(-logit)


_LOSSES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"focal": _focal, "bce": _bce}


class _Score:
    """Adds up loss and hits over the tiles."""

    def __init__(self, frame: _Frame, like: Tensor) -> None:
        self._frame = frame
        self._loss, self._hits = like.new_zeros(()), like.new_zeros((), dtype=torch.int64)

    def add(self, logits: Tensor) -> Tensor:
        """Count logits (2, C, N), those of positives first; returns the gradient of the mean loss in them."""
        signed = torch.stack([logits[0], -logits[1]])
        terms, slopes = self._frame.terms(signed)
        self._loss += terms.sum()
        self._hits += (signed[0] > 0).sum() + (signed[1] >= 0).sum()  # a logit of 0 says "not the same image"
        slopes[1].neg_()
        return slopes.div_(self._frame.rows)

    def result(self, mean: Tensor, var: Tensor, *grads: Tensor) -> _Result:
        return _Result(self._loss / self._frame.rows, self._hits / self._frame.rows, mean, var, grads)


# ---- cat, sum, mean: the first layer factors


@torch.no_grad()
def _on_sums(x: _Inputs, frame: _Frame) -> _Result:
    left_weight, right_weight = _halves(x.weight, frame.aggregation)
    left = torch.addmm(x.bias, x.features, left_weight.T).unflatten(0, (frame.views, frame.images))  # (K, N, H)
    right = (x.features @ right_weight.T).unflatten(0, (frame.views, frame.images))
    mean, var = _centre(left, right, frame)
    inv_std = torch.rsqrt(var + frame.eps)
    scale = x.gamma * inv_std
    score, sums = _pass_over_sums((left * scale).add_(x.beta), right * scale, x, frame)
    if sums is None:
        return score.result(mean, var)

    grad_beta = sums.left.sum((0, 1))
    grad_gamma = ((sums.left * left).sum((0, 1)) + (sums.right * right).sum((0, 1))) * inv_std
    grad_bias = scale * grad_beta
    if frame.running is None:
        tilt = grad_gamma * inv_std
        left_times, right_times = multiplicities(frame.views, left)
        sums.left.sub_(_pull(left, left_times, sum_of_rights(right), tilt, grad_beta), alpha=1 / frame.rows)
        sums.right.sub_(_pull(right, right_times, sum_of_lefts(left), tilt, grad_beta), alpha=1 / frame.rows)
        grad_bias = torch.zeros_like(x.bias)
    grad_left, grad_right = (rows.mul_(scale).flatten(0, 1) for rows in (sums.left, sums.right))
    grad_features = (grad_left @ left_weight).addmm_(grad_right, right_weight)
    grad_weight = _join(grad_left.T @ x.features, grad_right.T @ x.features, frame.aggregation)
    return score.result(
        mean, var, grad_features, grad_weight, grad_bias, grad_gamma, grad_beta, sums.out_weight, sums.out_bias
    )


def _halves(weight: Tensor, aggregation: str) -> tuple[Tensor, Tensor]:
    """The first layer's weights for the left and for the right element."""
    if aggregation == "cat":
        left, right = weight.chunk(2, dim=1)
        return left, right
    each = weight / 2 if aggregation == "mean" else weight
    return each, each


def _join(left: Tensor, right: Tensor, aggregation: str) -> Tensor:
    """The gradient of the weights from the gradients of their `_halves`."""
    if aggregation == "cat":
        return torch.cat([left, right], dim=1)
    return (left + right) / 2 if aggregation == "mean" else left + right


def _centre(left: Tensor, right: Tensor, frame: _Frame) -> tuple[Tensor, Tensor]:
    """Take the mean of h out of the rows, in place; returns mean and variance of h.

    Each side loses its own mean, or the variance would be a small difference of large numbers.
    """
    if frame.running is not None:
        left -= frame.running[0]
        return frame.running
    left_times, right_times = multiplicities(frame.views, left)
    left_mean = (left_times * left.sum(1, keepdim=True)).sum((0, 1)) / frame.rows
    right_mean = (right_times * right.sum(1, keepdim=True)).sum((0, 1)) / frame.rows
    left -= left_mean
    right -= right_mean
    squares = sum_of_rights(right).mul_(2).addcmul_(left_times, left).mul_(left).sum((0, 1))
    squares += (right_times * right).mul_(right).sum((0, 1))
    return left_mean + right_mean, (squares / frame.rows).clamp_min_(0)


def _pull(rows: Tensor, times: Tensor, partners: Tensor, tilt: Tensor, shift: Tensor) -> Tensor:
    """BatchNorm's mean and variance in the gradient of one side's rows, times R; overwrites `partners`."""
    return partners.addcmul_(times, rows).mul_(tilt).addcmul_(times, shift)


class _Sums(NamedTuple):
    """Gradients that one pass over the pairs adds up: in y by left and by right element, in the second layer."""

    left: Tensor  # (K, N, H)
    right: Tensor  # (K, N, H)
    out_weight: Tensor  # (H,)
    out_bias: Tensor  # ()


def _pass_over_sums(left: Tensor, right: Tensor, x: _Inputs, frame: _Frame) -> tuple[_Score, _Sums | None]:
    """Loss and gradients of pairs y = left + right, rows (K, N, H) that are normalised already.

    Only the ReLU needs H numbers per pair; its gradient is a mask.
    """
    score, slope = _Score(frame, left), frame.slope
    left_linear, right_linear = slope * (left @ x.out_weight) + x.out_bias, slope * (right @ x.out_weight)  # (K, N)
    left_active, right_active = torch.zeros_like(left), torch.zeros_like(right)
    left_grad, right_grad = torch.zeros_like(left_linear), torch.zeros_like(right_linear)
    relu_grad = torch.zeros_like(x.out_weight)
    for tile in frame.tiles(left.device):
        relu = tile.rights(right).add_(tile.lefts(left)).clamp_min_(0)  # (2, C, N, H)
        logits = (relu @ x.out_weight).mul_(1 - slope).add_(tile.lefts(left_linear)).add_(tile.rights(right_linear))
        grad = score.add(logits)
        if not frame.wants_grad:
            continue
        relu_grad.addmv_(relu.flatten(0, 2).T, grad.flatten())
        active = relu.gt_(0).mul_(grad.unsqueeze(3))
        for sums, rows in ((left_active, active), (left_grad, grad)):
            tile.add_to_lefts(sums, rows)
        for sums, rows in ((right_active, active), (right_grad, grad)):
            tile.add_to_rights(sums, rows)
    if not frame.wants_grad:
        return score, None
    out_weight_grad = relu_grad.mul_(1 - slope)
    for rows, active, grad in ((left, left_active, left_grad), (right, right_active, right_grad)):
        out_weight_grad.addmv_(rows.flatten(0, 1).T, grad.flatten(), alpha=slope)
        active.mul_(1 - slope).add_(grad.unsqueeze(2), alpha=slope).mul_(x.out_weight)
    return score, _Sums(left_active, right_active, out_weight_grad, left_grad.sum())


# ---- max: it does not


@torch.no_grad()
def _on_max(x: _Inputs, frame: _Frame) -> _Result:
    """With m the aggregated pair and s = gamma / std: y = (s W) m + beta + s (c - mean of h).

    One pass over the pairs for the moments of m, one for the loss and the gradients in s W and in y, one to bring
    back to the rows what goes through the moments.  A maximum commutes with taking the mean of m out of the rows.
    """
    rows = x.features.unflatten(0, (frame.views, frame.images))  # (K, N, D)
    if frame.running is None:
        centre, cov = _moments(rows, frame)
        rows = rows - centre
        weighted_cov = x.weight @ cov
        mean = torch.addmv(x.bias, x.weight, centre)
        var, offset = (weighted_cov * x.weight).sum(1).clamp_min_(0), torch.zeros_like(mean)
    else:
        mean, var = frame.running
        offset = x.bias - mean
    inv_std = torch.rsqrt(var + frame.eps)
    scale = x.gamma * inv_std
    score, sums = _pass_over_max(rows, x.weight * scale[:, None], x.beta + scale * offset, x, frame)
    if sums is None:
        return score.result(mean, var)

    grad_scale = (sums.weight * x.weight).sum(1) + sums.shift * offset
    grad_gamma, grad_bias = grad_scale * inv_std, scale * sums.shift
    grad_weight = sums.weight * scale[:, None]
    if frame.running is None:
        grad_var = -0.5 * grad_scale * scale * inv_std.square()
        grad_weight.addcmul_(weighted_cov, grad_var[:, None], value=2)
        grad_cov = (x.weight.T * grad_var) @ x.weight
        _pull_max(sums.rows, rows, 2 * grad_cov / frame.rows, -(grad_bias @ x.weight) / frame.rows, frame)
        grad_bias = torch.zeros_like(x.bias)
    return score.result(
        *(mean, var, sums.rows.flatten(0, 1), grad_weight, grad_bias, grad_gamma),
        *(sums.shift, sums.out_weight, sums.out_bias),
    )


def _larger(tile: PairTile, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The element-wise maximum of each pair, (2, C, N, D), and where it is the left element's (ties too)."""
    left, right = tile.lefts(rows), tile.rights(rows)
    return torch.maximum(left, right), left >= right


def _add_to_winners(tile: PairTile, total: Tensor, grad: Tensor, left_wins: Tensor) -> None:
    """The gradient of a maximum goes to the element it came from; at a tie to the left one, as in the original."""
    tile.add_to_lefts(total, grad * left_wins)
    tile.add_to_rights(total, grad.masked_fill_(left_wins, 0))


def _moments(rows: Tensor, frame: _Frame) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of the aggregated pairs; tiles are merged as Chan et al. (1979) do."""
    dim, seen = rows.shape[2], 0
    mean, squares = rows.new_zeros(dim), rows.new_zeros((dim, dim))
    for tile in frame.tiles(rows.device):
        larger = _larger(tile, rows)[0].flatten(0, 2)
        count, tile_mean = len(larger), larger.mean(0)
        larger -= tile_mean
        step = tile_mean - mean
        squares.addmm_(larger.T, larger).addr_(step, step, alpha=count * seen / (count + seen))
        mean += step * (count / (count + seen))
        seen += count
    return mean, squares / seen


class _MaxSums(NamedTuple):
    """Gradients that one pass over the pairs adds up."""

    rows: Tensor  # (K, N, D), but for what goes through the moments
    weight: Tensor  # (H, D) of the folded first layer
    shift: Tensor  # (H,) of its shift, hence of beta
    out_weight: Tensor  # (H,)
    out_bias: Tensor  # ()


def _pass_over_max(
    rows: Tensor, weight: Tensor, shift: Tensor, x: _Inputs, frame: _Frame
) -> tuple[_Score, _MaxSums | None]:
    """Loss and gradients of pairs y = weight . larger + shift."""
    score = _Score(frame, rows)
    sums = _MaxSums(*(torch.zeros_like(y) for y in (rows, weight, shift, x.out_weight, x.out_bias)))
    for tile in frame.tiles(rows.device):
        larger, left_wins = _larger(tile, rows)
        larger_TD = larger.flatten(0, 2)
        hidden_TH = F.leaky_relu_(torch.addmm(shift, larger_TD, weight.T), frame.slope)
        grad = score.add((hidden_TH @ x.out_weight + x.out_bias).view(larger.shape[:3]))
        if not frame.wants_grad:
            continue
        sums.out_weight.addmv_(hidden_TH.T, grad.flatten())
        sums.out_bias.add_(grad.sum())
        slopes_TH = hidden_TH.gt_(0).mul_(1 - frame.slope).add_(frame.slope)
        grad_TH = slopes_TH.mul_(x.out_weight).mul_(grad.view(-1, 1))
        sums.shift.add_(grad_TH.sum(0))
        sums.weight.addmm_(grad_TH.T, larger_TD)
        _add_to_winners(tile, sums.rows, (grad_TH @ weight).view_as(larger), left_wins)
    return score, sums if frame.wants_grad else None


def _pull_max(total: Tensor, rows: Tensor, by_row: Tensor, shift: Tensor, frame: _Frame) -> None:
    """Add m . by_row + shift of every pair to the gradient of the element that m came from."""
    for tile in frame.tiles(rows.device):
        larger, left_wins = _larger(tile, rows)
        _add_to_winners(tile, total, torch.addmm(shift, larger.flatten(0, 2), by_row).view_as(larger), left_wins)
