"""ReSSL's streaming loss against the paper's formula in float64, and against the original code's numbers.

The two-rank cases run as two gloo processes through the same pieces as a training step: the loss of the
rank's own rows against the queue as it was, then `KeyQueue.push` of the gathered keys.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from relssl import dist
from relssl.losses import relational_cross_entropy
from relssl.nets import KeyQueue
from relssl.ops.softmax_barycentre import default_chunk, softmax_barycentre
from tests.relssl import golden
from tests.relssl.dist_helpers import run_ranks


def loop_reference(student, teacher, queue, tau_student=0.1, tau_teacher=0.04):
    """The formula, row by row and key by key, in float64."""
    student, teacher, queue = student.double(), teacher.double(), queue.double()
    total = 0.0
    for i, row in enumerate(student):
        target = torch.softmax(torch.stack([teacher[i % len(teacher)] @ q for q in queue]) / tau_teacher, 0)
        logits = torch.stack([row @ q for q in queue]) / tau_student
        total = total - sum(t * (a - torch.logsumexp(logits, 0)) for t, a in zip(target, logits, strict=True))
    return total / len(student)


def naive(student, teacher, queue, tau_student=0.1, tau_teacher=0.04):
    """The same with whole matrices, in the operands' dtype."""
    target = torch.softmax(teacher @ queue.T / tau_teacher, dim=1).repeat(len(student) // len(teacher), 1)
    return -(target * torch.log_softmax(student @ queue.T / tau_student, dim=1)).sum(1).mean()


def rows(n, d, seed, scale=None):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=1) if scale is None else x * scale


def operands(b, v, k, d, peaked=False, scale=None):
    student, teacher, queue = rows(v * b, d, 1, scale), rows(b, d, 2, scale), rows(k, d, 3, scale)
    if peaked:  # each teacher row has a near copy in the queue, so the target is nearly one-hot
        queue[:: max(k // b, 1)][:b] = F.normalize(teacher[: len(queue[:: max(k // b, 1)][:b])] + 0.02, dim=1)
    return student, teacher, queue


def value_and_grad(loss, student, *others, **options):
    leaf = student.clone().requires_grad_()
    value = loss(leaf, *others, **options)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


# ---- against the formula


def test_the_two_references_agree():
    student, teacher, queue = operands(3, 2, 7, 4)
    torch.testing.assert_close(naive(student, teacher, queue), loop_reference(student, teacher, queue))


SHAPES = [  # b, v, k, d, chunk
    (4, 1, 64, 8, None),
    (5, 3, 41, 7, 16),  # chunk does not divide K
    (3, 2, 1271, 16, 401),
    (3, 1, 10, 8, 100),  # chunk > K
    (2, 2, 1, 5, None),  # a single key: the loss is 0
    (1, 5, 9, 1, 1),
    (13, 3, 1001, 64, None),
]


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize(("b", "v", "k", "d", "chunk"), SHAPES)
def test_float64_equals_the_formula(b, v, k, d, chunk, peaked, normalised):
    student, teacher, queue = operands(b, v, k, d, peaked)
    expected, expected_grad = value_and_grad(naive, student, teacher, queue)
    value, grad = value_and_grad(relational_cross_entropy, student, teacher, queue, normalised=normalised, chunk=chunk)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tau_student", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("tau_teacher", [0.2, 0.025, 0.02, 0.01, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_temperature(tau_student, tau_teacher, dtype):
    """Below 0.025 a promise of unit rows must not lead to the bounded form, whose terms would all
    underflow."""
    temperatures = {"tau_student": tau_student, "tau_teacher": tau_teacher}
    student, teacher, queue = (x.to(dtype) for x in operands(4, 2, 37, 6))
    expected, expected_grad = value_and_grad(naive, student.double(), teacher.double(), queue.double(), **temperatures)
    value, grad = value_and_grad(relational_cross_entropy, student, teacher, queue, normalised=True, **temperatures)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
    assert relative(grad, expected_grad) < (1e-10 if dtype == torch.float64 else 2e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_rows_that_are_not_normalised_are_right_too(scale):
    """Products reach thousands here: the running maximum keeps every exponent at or below 0."""
    student, teacher, queue = operands(4, 2, 53, 6, scale=scale)
    expected, expected_grad = value_and_grad(naive, student, teacher, queue)
    value, grad = value_and_grad(relational_cross_entropy, student, teacher, queue, chunk=10)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)
    single = relational_cross_entropy(student.float(), teacher.float(), queue.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_broken_promise_of_unit_rows_is_never_silently_wrong():
    """Right while float32 holds the exponents, NaN beyond; nothing in between."""
    student, teacher, queue = (x.float() for x in operands(4, 1, 53, 6))
    for scale in (0.1, 1.3, 1.8, 3.0, 10.0, 100.0):
        value = relational_cross_entropy(student * scale, teacher * scale, queue, normalised=True)
        expected = naive(student.double() * scale, teacher.double() * scale, queue.double())
        assert value.isnan() or abs(value - expected) < 1e-4 * abs(expected) + 1e-6
    assert value.isnan()


@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(
    ("dtype", "out_tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)]
)
def test_narrow_operands_against_float64_on_the_same_rounded_rows(dtype, out_tolerance, normalised, peaked):
    narrow = [x.to(dtype) for x in operands(16, 3, 1021, 64, peaked)]
    expected, expected_grad = value_and_grad(naive, *(x.double() for x in narrow))
    value, grad = value_and_grad(relational_cross_entropy, *narrow, normalised=normalised)
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=5e-6, atol=5e-6)
    assert relative(grad, expected_grad) < out_tolerance  # the rounding of the returned gradient

    value, grad = value_and_grad(relational_cross_entropy, narrow[0].float(), *narrow[1:])
    assert grad.dtype == torch.float32  # float32 student rows against narrow keys: as after F.normalize
    assert relative(grad, expected_grad) < 5e-6


def test_float64_anywhere_makes_the_sums_float64():
    student, teacher, queue = operands(3, 2, 17, 5)
    value, grad = value_and_grad(relational_cross_entropy, student.float(), teacher, queue.float())
    assert (value.dtype, grad.dtype) == (torch.float64, torch.float32)


def test_autocast_does_not_reach_inside():
    student, teacher, queue = (x.float() for x in operands(4, 2, 101, 16))
    outside = value_and_grad(relational_cross_entropy, student, teacher, queue)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = value_and_grad(relational_cross_entropy, student, teacher, queue)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


# ---- gradient


@pytest.mark.parametrize(("b", "v", "k", "d", "chunk"), [(3, 1, 11, 4, 4), (4, 2, 37, 8, None), (5, 3, 23, 5, 7)])
@pytest.mark.parametrize("normalised", [False, True])
def test_gradcheck(b, v, k, d, chunk, normalised):
    student, teacher, queue = operands(b, v, k, d)
    student = student.mul(0.9).requires_grad_()
    options = {"chunk": chunk, "normalised": normalised}
    assert torch.autograd.gradcheck(lambda s: relational_cross_entropy(s, teacher, queue, **options), student)


def test_gradient_reaches_the_student_only():
    student, teacher, queue = (x.requires_grad_() for x in operands(3, 2, 17, 5))
    relational_cross_entropy(student, teacher, queue).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert queue.grad is None


def test_the_queue_may_be_overwritten_before_backward():
    student, teacher, queue = operands(4, 2, 37, 6)
    _, expected = value_and_grad(naive, student, teacher, queue)
    leaf = student.clone().requires_grad_()
    loss = relational_cross_entropy(leaf, teacher, queue)
    queue.fill_(torch.nan)
    teacher.zero_()
    loss.backward()
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("factor", [0.0, -2.5, 65536.0])
def test_the_gradient_of_the_output_is_respected(factor):
    student, teacher, queue = operands(4, 2, 37, 6)
    _, expected = value_and_grad(naive, student, teacher, queue)
    leaf = student.clone().requires_grad_()
    (relational_cross_entropy(leaf, teacher, queue) * factor).backward()
    torch.testing.assert_close(leaf.grad, expected * factor, rtol=1e-10, atol=1e-12)


def test_a_loss_scale_rescues_gradients_that_float16_cannot_hold():
    """16,384 rows: entries of the gradient are near 5e-6, where float16 has steps of 6e-8."""
    narrow = [x.half() for x in operands(4096, 4, 64, 16)]
    expected = value_and_grad(naive, *(x.double() for x in narrow), tau_student=1.0)[1]
    errors = {}
    for scale in (1, 1024):
        leaf = narrow[0].clone().requires_grad_()
        (relational_cross_entropy(leaf, *narrow[1:], tau_student=1.0) * scale).backward()
        errors[scale] = relative(leaf.grad.double() / scale, expected)
    assert errors[1024] < 1e-3 < errors[1]


def test_double_backward_is_refused():
    student, teacher, queue = operands(3, 1, 17, 5)
    student.requires_grad_()
    loss = relational_cross_entropy(student, teacher, queue)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(loss.square(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_without_gradient_it_is_just_a_number():
    student, teacher, queue = operands(3, 2, 17, 5)
    with torch.no_grad():
        value = relational_cross_entropy(student.requires_grad_(), teacher, queue)
    assert not value.requires_grad
    torch.testing.assert_close(value, naive(student, teacher, queue).detach())


# ---- memory


class LargestOutput(TorchDispatchMode):
    """The largest number of elements that any operation produced."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("b", "v", "k"), [(16, 1, 4096), (16, 5, 512), (8, 2, 100), (16, 1, 64)])
def test_nothing_as_large_as_batch_times_queue_is_ever_made(b, v, k, normalised):
    student, teacher, queue = operands(b, v, k, 4)
    student.requires_grad_()
    with LargestOutput() as seen:
        relational_cross_entropy(student, teacher, queue, normalised=normalised).backward()
    assert 0 < seen.elements <= 0.3 * v * b * k
    with LargestOutput() as seen:
        naive(student, teacher, queue).backward()
    assert seen.elements >= v * b * k  # the counter does see such matrices


def test_default_chunk():
    cpu = torch.device("cpu")
    assert [default_chunk(k, cpu) for k in (1, 8, 9, 4096, 131072)] == [1, 1, 2, 512, 1024]
    assert default_chunk(131072, torch.device("cuda")) == 8192


def test_softmax_barycentre_returns_both_sums():
    x, keys = rows(5, 6, 0) * 20, rows(31, 6, 1)
    lse, out = softmax_barycentre(x, keys, chunk=4)
    torch.testing.assert_close(lse, torch.logsumexp(x @ keys.T, 1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out, torch.softmax(x @ keys.T, 1) @ keys, rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        softmax_barycentre(x, keys, chunk=0)


# ---- bad input


@pytest.mark.parametrize(
    ("student", "teacher", "queue", "match"),
    [
        ((5, 4), (2, 4), (8, 4), r"V\*B rows .* student \(5, 4\), teacher \(2, 4\)"),
        ((1, 4), (2, 4), (8, 4), r"V\*B rows"),
        ((4, 4), (2, 4), (4, 8), r"same number of features D; got .* queue \(4, 8\)"),
        ((4, 4), (2, 3), (8, 4), "same number of features"),
        ((4, 4), (2, 4), (0, 4), r"must not be empty; got .* queue \(0, 4\)"),
        ((0, 4), (2, 4), (8, 4), "must not be empty"),
        ((4, 4), (0, 4), (8, 4), "must not be empty"),
        ((4, 0), (2, 0), (8, 0), "must not be empty"),
        ((4,), (2, 4), (8, 4), r"expected student \(V\*B, D\)"),
        ((2, 2, 4), (2, 4), (8, 4), r"expected student \(V\*B, D\)"),
    ],
)
def test_wrong_shapes_are_refused(student, teacher, queue, match):
    with pytest.raises(ValueError, match=match):
        relational_cross_entropy(torch.zeros(student), torch.zeros(teacher), torch.zeros(queue))


def test_wrong_dtypes_temperatures_devices_and_chunks_are_refused():
    student, teacher, queue = operands(2, 2, 8, 4)
    with pytest.raises(ValueError, match=r"floating-point tensors; got .* queue torch.int64"):
        relational_cross_entropy(student, teacher, queue.long())
    for tau in (0.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="tau_teacher must be positive"):
            relational_cross_entropy(student, teacher, queue, tau_teacher=tau)
        with pytest.raises(ValueError, match="tau_student must be positive"):
            relational_cross_entropy(student, teacher, queue, tau_student=tau)
    with pytest.raises(ValueError, match=r"on one device; got .* queue on meta"):
        relational_cross_entropy(student, teacher, queue.to("meta"))
    with pytest.raises(ValueError, match="chunk"):
        relational_cross_entropy(student, teacher, queue, chunk=0)


# ---- the original code's numbers

ARRAYS = golden.load("ressl_loss")
CASES = golden.cases(ARRAYS)


def replay(rank, prefix):
    """All steps of one golden case, as this rank lives them."""
    case = golden.part(ARRAYS, prefix)
    keys, pointer = golden.tensor(case["queue_before"]).T.contiguous(), int(case["ptr_before"])
    queue = KeyQueue(*keys.shape)
    queue.keys.copy_(keys)
    queue.pointer.fill_(pointer)
    temperatures = {
        "tau_student": round(float(case["tau_s"]), 6),
        "tau_teacher": round(float(case["tau_t"]), 6),
    }
    steps = []
    for step in range(int(case["steps"])):
        raw = golden.tensor(case["student_raw"][step, rank]).requires_grad_()  # (V, N, C)
        student = F.normalize(raw, dim=-1)
        student.retain_grad()
        teacher = F.normalize(golden.tensor(case["teacher_raw"][step, rank]), dim=-1)
        loss = relational_cross_entropy(student.flatten(0, 1), teacher, queue.keys, **temperatures)
        queue.push(dist.gather(teacher))
        loss.backward()
        steps.append(
            {
                "student": student.detach(),
                "teacher": teacher,
                "loss": loss.detach(),
                "grad_student": student.grad,
                "grad_student_raw": raw.grad,
                "queue_after": queue.keys.T.clone(),
                "ptr_after": queue.pointer[0].clone(),
            }
        )
    return steps


@pytest.mark.evidence(
    "ressl", "L0", "loss, its gradient, and the queue after each step; in one process and in two",
    golden="ressl_loss", dtype="float32", tolerance="loss 1e-5, gradient 1e-4 of its largest entry", gradient=True,
)  # fmt: skip
@pytest.mark.parametrize("prefix", CASES)
def test_golden_losses_gradients_and_queue(prefix):
    case = golden.part(ARRAYS, prefix)
    world = int(case["world_size"])
    results = run_ranks(replay, world, prefix) if world > 1 else [replay(0, prefix)]
    assert len(results) == case["loss"].shape[1]
    for rank, steps in enumerate(results):
        assert len(steps) == case["loss"].shape[0]
        for step, found in enumerate(steps):
            expected = {name: golden.tensor(case[name][step, rank]) for name in ("student", "teacher", "loss")}
            for name in ("student", "teacher"):
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
            torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=2e-6)
            for name in ("grad_student", "grad_student_raw"):
                grad = golden.tensor(case[name][step, rank])
                tolerance = 1e-4 * float(grad.abs().max()) + 1e-6
                torch.testing.assert_close(found[name], grad, rtol=0, atol=tolerance)
            torch.testing.assert_close(
                found["queue_after"], golden.tensor(case["queue_after"][step]), rtol=0, atol=1e-6
            )
            assert int(found["ptr_after"]) == int(case["ptr_after"][step])


def test_the_golden_file_holds_a_case_of_two_ranks():
    assert any(int(ARRAYS[f"{prefix}world_size"]) == 2 for prefix in CASES)
