"""A value whose gradient was computed along with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, autograd
from torch.autograd.function import once_differentiable


def attach_gradient(value: Tensor, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """`value` (0-d) as a function of `inputs` whose gradient with respect to input i is `grads[i]`.

    For losses that know their gradient in the forward pass: they run under `no_grad`, and nothing else is kept.
    Inputs of a narrow dtype are widened by the caller beforehand, so that the gradient is multiplied by a loss scale
    while it is wide, and rounded afterwards.  A second derivative is refused.
    """
    return _KnownGradient.apply(value, len(inputs), *inputs, *grads)


class _KnownGradient(autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        known = ctx.saved_tensors
        return None, None, *(grad * x for x in known), *[None] * len(known)
