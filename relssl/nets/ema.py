"""The teacher: a copy of the student whose parameters follow it as an exponential moving average."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def make_teacher(student: Module) -> Module:
    """A deep copy, parameters and buffers equal, whose parameters take no gradient."""
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    return teacher


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, over parameters only.

    Buffers are left alone: the teacher's BatchNorm statistics come from its own forward passes (ReSSL, BYOL,
    ReSA).

    Args:
        momentum: in [0, 1]; 1 keeps the teacher.

    Raises:
        ValueError: momentum outside [0, 1], or the modules' parameters differ in number or shape.
    """
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    old: list[Tensor] = list(teacher.parameters())
    new: list[Tensor] = list(student.parameters())
    if [p.shape for p in old] != [p.shape for p in new]:
        raise ValueError(
            f"teacher and student must have the same parameters, got {len(old)} and {len(new)} tensors"
            + (" of different shapes" if len(old) == len(new) else "")
        )
    if old:
        torch._foreach_lerp_(old, new, 1.0 - momentum)
