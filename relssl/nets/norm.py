"""Batch normalisation over a rank's images, over groups of images, or over all ranks: one class, any device.

`BatchNorm1d` and `BatchNorm2d` are torch's, with the same state-dict keys and the same evaluation mode; only
*which images share statistics in training* differs, and `set_norm` chooses it for a whole module:

- `local`     the rank's batch: torch's own kernel, untouched.
- `split(n)`  n groups in the *global* batch, as ReSSL's small-data recipe wants (8 splits).
- `sync`      the global batch.  torch's SyncBatchNorm does the same but refuses CPU tensors.

Which images form a group of `split(n)`: the image at position p of the global batch is in group p mod n.
Micro-batch m of A on rank r of W holds, as its local image j, the position

    p = m + A (r + W j) = (m + A r) + A W j,        0 <= m + A r < A W.

When A W divides n, write n = A W s.  Then p mod n = (m + A r) + A W (j mod s), because the first term is
smaller than A W.  So every group lies whole within one rank and one micro-batch, there it is the local images
with equal `j mod s`, and s = n / (A W) is all a layer needs to know.  Normalisation is the same for every A
and W, with no communication.

Running statistics move once per forward pass: by the mean over groups of the groups' mean and unbiased
variance (split, averaged over ranks too), by the global mean and unbiased variance (sync), by the rank's own
(local; rank 0's are the ones saved).  They are equal on every rank under split and sync, and equal for every
W; with A > 1 they move A times per update.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable would import all of dynamo here and now
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from pipelines.errors import ConfigError
from relssl import dist


class NormKind(NamedTuple):
    """A parsed `norm:` setting; `splits` counts the groups of the global batch (0 unless `name` is split)."""

    name: Literal["local", "split", "sync"]
    splits: int = 0

    def __str__(self) -> str:
        return f"split({self.splits})" if self.name == "split" else self.name


def parse_norm(kind: str | NormKind) -> NormKind:
    """Read `local`, `split(n)` or `sync`.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(kind, NormKind):
        return kind
    if kind == "local":
        return NormKind("local")
    if kind == "sync":
        return NormKind("sync")
    match = re.fullmatch(r"split\(\s*([1-9][0-9]*)\s*\)", kind) if isinstance(kind, str) else None
    if match is None:
        raise ConfigError(f"norm must be 'local', 'sync' or 'split(n)', such as 'split(8)'; got {kind!r}.")
    return NormKind("split", int(match[1]))


def set_norm(module: nn.Module, kind: str | NormKind, num_micro: int = 1) -> nn.Module:
    """Set every BatchNorm inside `module`, in place; plain `nn.BatchNorm1d/2d` are replaced by ours.

    Parameters and buffers stay the same tensors, so optimizers and EMA copies keep working.  Modules with an
    attribute `norm_locked = True` stay local, with everything inside them.

    Args:
        kind: `local`, `split(n)` (n groups in the global batch) or `sync`.
        num_micro: micro-batches per update (accumulation).

    Returns:
        `module`, or its replacement when it is itself a plain BatchNorm.

    Raises:
        ConfigError: n is not divisible by world size x num_micro, or a BatchNorm is of a sort that has only
            local statistics here (3-d, lazy, torch's own SyncBatchNorm).
    """
    parsed = parse_norm(kind)
    local_splits = _local_splits(parsed, num_micro)
    replaced: dict[nn.Module, nn.Module] = {}

    def visit(child: nn.Module) -> nn.Module:
        if getattr(child, "norm_locked", False):
            return child
        if isinstance(child, _BatchNorm):
            if child not in replaced:
                replaced[child] = _as_ours(child, parsed)
            norm = replaced[child]
            if isinstance(norm, _GroupedStatistics):
                norm.kind, norm.local_splits = parsed, local_splits
            return norm
        for name, grandchild in child._modules.items():  # named_children() skips the second use of a module
            if grandchild is not None:
                child._modules[name] = visit(grandchild)
        return child

    return visit(module)


def _local_splits(kind: NormKind, num_micro: int) -> int:
    if kind.name != "split":
        return 1
    parts = dist.world_size() * num_micro
    if kind.splits % parts:
        raise ConfigError(
            f"norm {kind}: the number of splits must be divisible by world size x accumulation = "
            f"{dist.world_size()} x {num_micro} = {parts}, so that every group stays whole. "
            f"Use a multiple of {parts} splits, or fewer processes or micro-batches."
        )
    return kind.splits // parts


def _as_ours(norm: _BatchNorm, kind: NormKind) -> nn.Module:
    if isinstance(norm, _GroupedStatistics):
        return norm
    ours: type[BatchNorm1d] | type[BatchNorm2d]
    if type(norm) is nn.BatchNorm1d:
        ours = BatchNorm1d
    elif type(norm) is nn.BatchNorm2d:
        ours = BatchNorm2d
    elif kind.name == "local":
        return norm
    else:
        raise ConfigError(f"norm {kind} knows BatchNorm1d and BatchNorm2d, but the model has a {type(norm).__name__}.")
    new = ours(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta")
    for name, parameter in norm._parameters.items():
        new.register_parameter(name, parameter)
    for name, buffer in norm._buffers.items():
        new.register_buffer(name, buffer)
    new.train(norm.training)
    return new


class _GroupedStatistics(_BatchNorm):
    """The training forward pass for the three kinds; everything else is torch's."""

    kind: NormKind = NormKind("local")
    local_splits: int = 1

    def forward(self, input: Tensor) -> Tensor:
        uses_batch = self.training or self.running_mean is None
        several_ranks = dist.world_size() > 1
        if uses_batch and self.kind.name == "split" and (several_ranks or self.local_splits > 1):
            return self._split_forward(input)
        if uses_batch and self.kind.name == "sync" and several_ranks:
            return self._sync_forward(input)
        return super().forward(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"

    def _split_forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        groups = self.local_splits
        if len(x) % groups:
            raise ConfigError(
                f"norm {self.kind}: {len(x)} images per process and micro-batch do not make {groups} equal "
                f"groups. Make the batch a multiple of {self.kind.splits} and drop the last, smaller one."
            )
        if x.numel() == groups * self.num_features:
            raise ConfigError(
                f"norm {self.kind}: one value per channel in each group has no variance; got input "
                f"{tuple(x.shape)}. Use a larger batch or fewer splits."
            )
        weight = None if self.weight is None else self.weight.repeat(groups)
        bias = None if self.bias is None else self.bias.repeat(groups)
        # Momentum 1 turns "running" buffers into this batch's group statistics, at no further cost.
        mean = var = None
        if self.running_mean is not None and self.running_var is not None:
            mean = self.running_mean.new_zeros(groups * self.num_features)
            var = self.running_var.new_zeros(groups * self.num_features)
        out = F.batch_norm(_fold(x, groups), mean, var, weight, bias, True, 1.0, self.eps)
        if mean is not None and var is not None:
            stats = torch.stack([mean.view(groups, -1).mean(0), var.view(groups, -1).mean(0)])
            if dist.world_size() > 1:
                stats = _rank_mean(stats)
            self.move_running_stats(stats[0], stats[1])
        return _unfold(out, groups)

    @_disable_dynamo
    def _sync_forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        out, mean, var = _SyncBatchNorm.apply(x, self.weight, self.bias, self.eps)
        self.move_running_stats(mean, var)
        return out

    @torch.no_grad()
    def move_running_stats(self, mean: Tensor, var: Tensor) -> None:
        """One step of the moving averages, with torch's meaning of `momentum` (None = cumulative average)."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), factor)
        self.running_var.lerp_(var.to(self.running_var), factor)


class BatchNorm1d(_GroupedStatistics, nn.BatchNorm1d):
    """`nn.BatchNorm1d` whose training statistics follow `set_norm`; input (N, C) or (N, C, L)."""


class BatchNorm2d(_GroupedStatistics, nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics follow `set_norm`; input (N, C, H, W)."""


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _fold(x: Tensor, groups: int) -> Tensor:
    """(N, C, ...) -> (N / groups, groups * C, ...), image j's channels in block `j mod groups`.

    A view of a contiguous input.  A channels-last input costs one copy in runs of C and stays channels-last,
    so the fast kernels for that layout are used.
    """
    if groups == 1:
        return x
    if not _channels_last(x):
        return x.reshape(len(x) // groups, groups * x.shape[1], *x.shape[2:])
    q, c, h, w = len(x) // groups, *x.shape[1:]
    return x.unflatten(0, (q, groups)).permute(0, 3, 4, 1, 2).reshape(q, h, w, groups * c).permute(0, 3, 1, 2)


def _unfold(x: Tensor, groups: int) -> Tensor:
    """The inverse of `_fold`, with the layout kept."""
    if groups == 1:
        return x
    if not _channels_last(x):
        return x.reshape(len(x) * groups, x.shape[1] // groups, *x.shape[2:])
    if torch.compiler.is_compiling():
        return _unfold_channels_last(x, groups)
    return _UnfoldChannelsLast.apply(x, groups)


def _unfold_channels_last(x: Tensor, groups: int) -> Tensor:
    q, c, h, w = len(x), x.shape[1] // groups, *x.shape[2:]
    out = x.permute(0, 2, 3, 1).unflatten(3, (groups, c)).permute(0, 3, 1, 2, 4)
    return out.reshape(q * groups, h, w, c).permute(0, 3, 1, 2)


class _UnfoldChannelsLast(torch.autograd.Function):
    """`_unfold_channels_last` whose result is a tensor of its own, not a view.

    The in-place ReLU that usually follows would otherwise be differentiated by way of two more copies (a
    whole Conv4 step took 1.6 times as long).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int) -> Tensor:
        ctx.groups = groups
        q, c, h, w = len(x), x.shape[1] // groups, *x.shape[2:]
        shape = (q * groups, c, h, w)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        out.unflatten(0, (q, groups)).copy_(x.unflatten(1, (groups, c)))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _fold(grad, ctx.groups), None


@_disable_dynamo
def _rank_mean(stats: Tensor) -> Tensor:
    """The mean over ranks; adds in rank order, so that every rank gets the same bits."""
    return dist.gather(stats.unsqueeze(0)).mean(0)


class _SyncBatchNorm(torch.autograd.Function):
    """Batch normalisation over the rows of all ranks.

    Each rank sends (count, mean, variance) per channel once; they are merged by Chan, Golub & LeVeque (1979),
    weighted by count, which avoids the cancellation of E[x^2] - E[x]^2.  With x^ = (x - mean) / sigma the
    gradient of the sum of all ranks' losses is

        dx = w / sigma (dy - mean(dy) - x^ mean(dy x^)),      means over the rows of all ranks,

    while the gradients of weight and bias are the rank's own sums (DDP averages those).  Statistics are
    float32, or float64 for float64 input.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        dims = [d for d in range(x.dim()) if d != 1]
        total, mean, var = _global_statistics(x.to(wide), dims)
        inv_std = torch.rsqrt(var + eps)
        scale = inv_std if weight is None else inv_std * weight.to(wide)
        out = (x - _per_channel(mean, x)).mul_(_per_channel(scale, x))
        if bias is not None:
            out.add_(_per_channel(bias, x))
        ctx.save_for_backward(x, weight, mean, inv_std, total)
        ctx.dims = dims
        unbiased = var * (total / (total - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return out.to(x.dtype), mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, inv_std, total = ctx.saved_tensors
        dy = grad.to(mean.dtype)
        centred = x - _per_channel(mean, x)
        sum_dy = dy.sum(ctx.dims)
        sum_dy_xhat = (dy * centred).sum(ctx.dims) * inv_std
        grad_weight = grad_bias = None
        if weight is not None:
            grad_weight, grad_bias = sum_dy_xhat.to(weight.dtype), sum_dy.to(weight.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            means = dist.all_reduce_sum(torch.stack([sum_dy, sum_dy_xhat])) / total
            scale = inv_std if weight is None else inv_std * weight.to(mean.dtype)
            slope = _per_channel(means[1] * inv_std, x)
            dx = (dy - _per_channel(means[0], x)).sub_(centred.mul_(slope)).mul_(_per_channel(scale, x))
            grad_x = dx.to(x.dtype)
        return grad_x, grad_weight, grad_bias, None


def _global_statistics(rows: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and biased variance per channel of all ranks' rows, the same bits on every rank."""
    var, mean = torch.var_mean(rows, dims, correction=0)
    count = torch.full_like(mean, rows.numel() // rows.shape[1])
    counts_WC, means_WC, vars_WC = dist.gather(torch.stack([count, mean, var]).unsqueeze(0)).unbind(1)
    total = counts_WC.sum(0)
    share_WC = counts_WC / total
    mean = (share_WC * means_WC).sum(0)
    var = (share_WC * (vars_WC + (means_WC - mean).square())).sum(0)
    return total, mean, var


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))
