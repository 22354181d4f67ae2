"""Linear classifiers on features that were computed once: many heads in one pass, and logistic regression.

Training a linear head takes little arithmetic and much fetching of features. Heads that differ in learning rate
and weight decay only can share everything but their weights: each batch is read once and multiplied with one
(H, C, D) matrix. The gradient of softmax cross-entropy is written out, so no autograd graph is kept.

Legend: N images, b batch, D feature width, C classes, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from relssl.evaluators.draws import generator
from relssl.evaluators.features import check_features, check_labels, standardisation
from relssl.ops.precision import full_precision

HEAD_BYTES = 256 * 2**20  # weights, gradients, momenta and logits of the heads that are trained at once
LOGIT_BYTES = 64 * 2**20  # of a block of images
ROWS = 8_192
HISTORY = 20  # pairs that L-BFGS remembers
SMALLEST_GRADIENT = 1e-5  # L-BFGS ends here: the largest entry of the gradient of the mean loss,
SMALLEST_CHANGE = 1e-9  # or the change of the mean loss, or of the largest weight


@dataclass(frozen=True)
class Rows:
    """Labelled features on one device, standardised when they are read, so that no second copy exists.

    `shift` and `scale` (D,) are the mean and 1/std of all rows of the features that `labelled_rows` was given.
    """

    features: Tensor
    labels: Tensor
    shift: Tensor
    scale: Tensor

    def read(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """(b, D) standardised features and (b,) labels."""
        return (self.features[index].to(self.scale.dtype) - self.shift) * self.scale, self.labels[index]

    def blocks(self, index: Tensor, size: int = ROWS) -> Iterator[tuple[Tensor, Tensor]]:
        """Everything in `index`, `size` rows at a time."""
        return (self.read(part) for part in index.split(max(size, 1)))

    def like(self, features: Tensor, labels: Tensor) -> Rows:
        """Other images, standardised by the same numbers."""
        device, dtype = self.features.device, self.features.dtype
        return Rows(features.to(device, dtype), labels.to(device), self.shift, self.scale)


def labelled_rows(features: Tensor, labels: Tensor, num_classes: int, name: str, device: torch.device | str) -> Rows:
    """Features (N, D) and labels (N,) checked, on the device, with the numbers that standardise them.

    Raises:
        InputError: NaN or infinite features, features that are zero throughout, labels missing or out of range.
    """
    features = check_features(features, f"{name} features")
    labels = check_labels(labels, len(features), num_classes, f"{name} labels")
    shift, scale = (x.to(device, features.dtype) for x in standardisation(features.split(ROWS)))
    return Rows(features.to(device), labels.to(device), shift, scale)


def train_heads(
    rows: Rows,
    index: Tensor,
    num_classes: int,
    lr: Sequence[float],
    weight_decay: Sequence[float],
    *,
    updates: int,
    batch_size: int,
    momentum: float,
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """SGD with momentum on H linear heads at once, from zero, each with its own learning rate and weight decay.

    The learning rate falls to zero by a cosine over all updates. Weight decay is the L2 penalty's gradient, as in
    torch.optim.SGD, on weights, not on biases. Batches are those of shuffled passes over `index` (a pass may end
    inside a batch), the same for all heads, a function of `seed`.

    Args:
        rows: see `labelled_rows`.
        index: the rows to train on, int64.
        lr, weight_decay: H numbers each.
        batch_size: at most; all rows where there are fewer.

    Yields:
        weight (h, C, D) and bias (h, C) of one head after the other in the order given, as many heads at a time as
        HEAD_BYTES allows.
    """
    width = rows.features.shape[1]
    item = rows.scale.element_size()
    batch_size = min(batch_size, len(index))
    bytes_per_head = item * num_classes * (3 * (width + 1) + 3 * batch_size)
    size = max(1, HEAD_BYTES // bytes_per_head)
    for first in range(0, len(lr), size):
        yield _train_some(
            rows,
            index,
            num_classes,
            rows.scale.new_tensor(lr[first : first + size]),
            rows.scale.new_tensor(weight_decay[first : first + size]),
            _batches(index, batch_size, updates, generator(seed, "order of batches")),
            updates,
            momentum,
        )


def _train_some(
    rows: Rows,
    index: Tensor,
    num_classes: int,
    lr: Tensor,
    weight_decay: Tensor,
    batches: Iterator[Tensor],
    updates: int,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    weight = rows.scale.new_zeros((len(lr), num_classes, rows.features.shape[1]))
    bias = rows.scale.new_zeros((len(lr), num_classes))
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    with torch.no_grad(), full_precision(weight.device):
        for update, batch in enumerate(batches):
            x, y = rows.read(batch.to(weight.device))
            _, weight_gradient, bias_gradient = loss_and_gradient(x, y, weight, bias)
            weight_gradient.div_(len(y)).addcmul_(weight, weight_decay[:, None, None])
            weight_velocity.mul_(momentum).add_(weight_gradient)
            bias_velocity.mul_(momentum).add_(bias_gradient, alpha=1 / len(y))
            step = -0.5 * (1 + math.cos(math.pi * update / updates)) * lr
            weight.addcmul_(weight_velocity, step[:, None, None])
            bias.addcmul_(bias_velocity, step[:, None])
    return weight, bias


def _batches(index: Tensor, size: int, updates: int, source: torch.Generator) -> Iterator[Tensor]:
    order = index.new_empty(0)
    for _ in range(updates):
        if len(order) < size:
            order = torch.cat([order, index[torch.randperm(len(index), generator=source).to(index.device)]])
        yield order[:size]
        order = order[size:]


def loss_and_gradient(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy summed over a batch (H,), and its gradients (H, C, D) and (H, C).

    Args:
        x: (b, D).
        y: (b,) int64.
        weight: (H, C, D).
        bias: (H, C).
    """
    heads, classes, width = weight.shape
    image = torch.arange(len(y), device=y.device)
    log_p = _logits(x, weight, bias).log_softmax(dim=1)
    loss = -log_p[:, y, image].sum(dim=1)
    residual = log_p.exp_()
    residual[:, y, image] -= 1
    residual = residual.view(heads * classes, len(x))
    return loss, (residual @ x).view(heads, classes, width), residual.sum(dim=1).view(heads, classes)


def _logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(H, C, b). With images last, the softmax over a few classes is several times as fast on a CPU."""
    heads, classes, width = weight.shape
    flat = torch.addmm(bias.reshape(-1, 1), weight.reshape(heads * classes, width), x.T)
    return flat.view(heads, classes, len(x))


@torch.no_grad()
def score_heads(rows: Rows, index: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Top-1 accuracy in percent (H,) and mean cross-entropy (H,) of heads on some rows, float64, on the CPU."""
    heads, classes, _ = weight.shape
    size = LOGIT_BYTES // (weight.element_size() * heads * classes)
    hits, loss = torch.zeros(heads, dtype=torch.float64), torch.zeros(heads, dtype=torch.float64)
    with full_precision(weight.device):
        for x, y in rows.blocks(index.to(weight.device), size):
            log_p = _logits(x, weight, bias).log_softmax(dim=1)
            hits += (log_p.argmax(dim=1) == y).sum(dim=1).cpu()
            loss -= log_p[:, y, torch.arange(len(y), device=y.device)].sum(dim=1).cpu().double()
    return 100 * hits / len(index), loss / len(index)


@torch.no_grad()
def predictions(rows: Rows, weight: Tensor, bias: Tensor, most: int = 1) -> Tensor:
    """The `most` likeliest classes of every image, likeliest first: int64 (N, most) on the CPU.

    Args:
        weight: (C, D), of one head, for standardised features.
        bias: (C,).
    """
    size = LOGIT_BYTES // (weight.element_size() * len(weight))
    everything = torch.arange(len(rows.labels), device=weight.device)
    with full_precision(weight.device):
        found = [
            _logits(x, weight[None], bias[None])[0].topk(most, dim=0).indices.T.cpu()
            for x, _ in rows.blocks(everything, size)
        ]
    return torch.cat(found)


@torch.no_grad()
def logistic_regression(
    rows: Rows,
    index: Tensor,
    num_classes: int,
    penalty: float,
    *,
    start: tuple[Tensor, Tensor] | None = None,
    iterations: int = 100,
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS: the minimum of mean cross-entropy + penalty / 2 * |weight|^2.

    The bias is not penalised. With n rows, scikit-learn's C is 1 / (n * penalty). Full batches, read in blocks;
    nothing is random. It ends at a gradient of 1e-5 or after `iterations`.

    Args:
        start: weight and bias to begin at, zero by default.

    Returns:
        weight (C, D) and bias (C,), for standardised features, on the device of `rows`.
    """
    width = rows.features.shape[1]
    if start is None:
        start = rows.scale.new_zeros((num_classes, width)), rows.scale.new_zeros(num_classes)
    weight, bias = start[0].clone(), start[1].clone()
    index = index.to(weight.device)
    search = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        max_eval=2 * iterations,
        history_size=HISTORY,
        tolerance_grad=SMALLEST_GRADIENT,
        tolerance_change=SMALLEST_CHANGE,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss = 0.5 * penalty * weight.square().sum()
        weight.grad, bias.grad = penalty * weight, torch.zeros_like(bias)
        for x, y in rows.blocks(index):
            part, weight_gradient, bias_gradient = loss_and_gradient(x, y, weight[None], bias[None])
            loss = loss + part[0] / len(index)
            weight.grad.add_(weight_gradient[0], alpha=1 / len(index))
            bias.grad.add_(bias_gradient[0], alpha=1 / len(index))
        return loss

    with full_precision(weight.device):
        search.step(closure)
    return weight, bias
