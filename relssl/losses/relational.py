"""ReSSL's relational cross-entropy (arXiv:2107.09282, as in its released code), streamed over the queue.

Legend: V student crops, B images, K queue length, D features; s student rows, t teacher rows, q queue.

    p^t_i = softmax_j(t_i . q_j / tau_t)        p^s_i = softmax_j(s_i . q_j / tau_s)
    loss  = mean_i  - sum_j p^t_ij log p^s_ij

Because p^t_i sums to one, the student's log-softmax leaves only a log-sum-exp and the teacher's barycentre
o^t_i = sum_j p^t_ij q_j, and the gradient is a difference of two barycentres:

    loss_i             = lse_j(s_i . q_j / tau_s) - s_i . o^t_i / tau_s
    d loss_i / d s_i   = (o^s_i - o^t_i) / tau_s

So student and teacher rows, stacked, pass over the queue once, no batch x queue matrix is ever held, and the
gradient is known in the forward pass: backward is one product, and the queue may be overwritten as soon as
the loss is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from relssl.ops.softmax_barycentre import softmax_barycentre

# exp(-2 / tau) must stay a normal float32 number, and with it every term of the sums that matters.
_MIN_BOUNDED_TAU = 0.025


def relational_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    queue: Tensor,
    *,
    tau_student: float = 0.1,
    tau_teacher: float = 0.04,
    normalised: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy of the teacher's and the student's similarities to the queue, mean over student rows.

    Rows are used as they come (callers pass L2-normalised ones).  Sums and the loss are float32, float64 if
    any operand is; autocast does not reach inside.  Gradient goes to `student` only, in its dtype.

    Args:
        student: (V*B, D) crop-major: all images of crop 1, then of crop 2, ...
        teacher: (B, D), one row per image, used for every crop.
        queue: (K, D), the keys as they were before this step.
        tau_student, tau_teacher: temperatures, any > 0.
        normalised: a promise that all rows have unit length; then no running maximum is needed for
            temperatures >= 0.025.  Saves kernel launches on a GPU.  If the promise is broken badly enough to
            overflow, the loss is NaN, not wrong.
        chunk: queue rows per step; chosen by device and K if None.

    Returns:
        The loss, 0-d.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an empty operand, a temperature <= 0.
    """
    _check(student, teacher, queue)
    for name, tau in (("tau_student", tau_student), ("tau_teacher", tau_teacher)):
        if not 0.0 < tau < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {tau}")
    bounded = normalised and min(tau_student, tau_teacher) >= _MIN_BOUNDED_TAU
    with torch.autocast(student.device.type, enabled=False):
        return _RelationalCrossEntropy.apply(
            student, teacher.detach(), queue.detach(), float(tau_student), float(tau_teacher), bounded, chunk
        )


def _check(student: Tensor, teacher: Tensor, queue: Tensor) -> None:
    operands = {"student": student, "teacher": teacher, "queue": queue}
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in operands.items())
    if any(x.dim() != 2 for x in operands.values()):
        raise ValueError(f"expected student (V*B, D), teacher (B, D), queue (K, D); got {shapes}")
    if len({x.shape[1] for x in operands.values()}) > 1:
        raise ValueError(f"student, teacher and queue must have the same number of features D; got {shapes}")
    if any(x.numel() == 0 for x in operands.values()):
        raise ValueError(f"student, teacher and queue must not be empty; got {shapes}")
    if len(student) % len(teacher):
        raise ValueError(
            f"student must have V*B rows for the teacher's B, V a whole number; got {shapes}. "
            "Concatenate the crops of the same images along the first axis."
        )
    if not all(x.is_floating_point() for x in operands.values()):
        kinds = ", ".join(f"{name} {x.dtype}" for name, x in operands.items())
        raise ValueError(f"student, teacher and queue must be floating-point tensors; got {kinds}")
    if len({x.device for x in operands.values()}) > 1:
        places = ", ".join(f"{name} on {x.device}" for name, x in operands.items())
        raise ValueError(f"student, teacher and queue must be on one device; got {places}")


class _RelationalCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_SD: Tensor,
        teacher_BD: Tensor,
        queue_KD: Tensor,
        tau_student: float,
        tau_teacher: float,
        bounded: bool,
        chunk: int | None,
    ) -> Tensor:
        wide = torch.promote_types(torch.promote_types(student_SD.dtype, teacher_BD.dtype), queue_KD.dtype)
        wide = torch.promote_types(wide, torch.float32)
        num_student, num_teacher = len(student_SD), len(teacher_BD)
        crops = num_student // num_teacher
        logit_rows_SD = student_SD.to(wide) / tau_student
        rows_RD = torch.cat([logit_rows_SD, teacher_BD.to(wide) / tau_teacher])
        bound_R1 = None
        if bounded:
            bound_R1 = rows_RD.new_full((len(rows_RD), 1), 1.0 / tau_student)
            bound_R1[num_student:] = 1.0 / tau_teacher
        lse_R, out_RD = softmax_barycentre(rows_RD, queue_KD, chunk=chunk, bound=bound_R1)

        student_out_SD, teacher_out_BD = out_RD.split([num_student, num_teacher])
        target_SD = teacher_out_BD.repeat(crops, 1)
        loss_S = lse_R[:num_student] - (logit_rows_SD * target_SD).sum(dim=1)
        # Kept wide: without its loss scale the gradient of a large batch would underflow in float16.
        ctx.save_for_backward((student_out_SD - target_SD).div_(tau_student * num_student))
        ctx.dtype = student_SD.dtype
        return loss_S.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_student_SD,) = ctx.saved_tensors
        return (grad * grad_student_SD).to(ctx.dtype), None, None, None, None, None, None
