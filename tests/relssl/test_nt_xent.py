"""The streaming NT-Xent against the paper's sums in float64, and against the original codes' numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from relssl.losses import nt_xent
from relssl.ops.tiles import keys_per_tile
from tests.relssl import golden
from tests.relssl.counting import Allocations


def loop_reference(view1, view2, temperature, extra_keys=None, reduction="mean"):
    """SimCLR's equation 1 row by row and key by key, in float64, with further negatives and both reductions."""
    rows = [*view1.double(), *view2.double()]
    extra = [] if extra_keys is None else [*extra_keys.double()]
    losses = []
    for i, row in enumerate(rows):
        keys = [row @ key / temperature for j, key in enumerate(rows) if j != i]
        keys += [row @ key / temperature for key in extra]
        positive = row @ rows[(i + len(view1)) % len(rows)] / temperature
        losses.append(torch.logsumexp(torch.stack(keys), 0) - positive)
    losses = torch.stack(losses)
    return (
        losses.mean() if reduction == "mean" else -torch.logsumexp(-losses, 0) + torch.tensor(len(rows)).double().log()
    )


def naive(view1, view2, *, temperature, extra_keys=None, reduction="mean"):
    """The same with the whole matrix, in the operands' dtype."""
    rows = torch.cat([view1, view2])
    logits = rows @ rows.T / temperature
    logits = logits.masked_fill(torch.eye(len(rows), dtype=torch.bool), -torch.inf)
    if extra_keys is not None:
        logits = torch.cat([logits, rows @ extra_keys.T / temperature], dim=1)
    positives = torch.arange(len(rows)).roll(len(view1))
    losses = F.cross_entropy(logits, positives, reduction="none")
    return losses.mean() if reduction == "mean" else -(-losses).exp().mean().log()


def rows(n, d, seed, scale=None):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=1) if scale is None else x * scale


def operands(b, d, m=0, scale=None):
    return rows(b, d, 1, scale), rows(b, d, 2, scale), rows(m, d, 3, scale) if m else None


def value_and_grads(loss, view1, view2, **options):
    leaves = [view1.detach().clone().requires_grad_(), view2.detach().clone().requires_grad_()]
    value = loss(*leaves, **options)
    return value.detach(), torch.autograd.grad(value, leaves)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


# ---- against the formula

REDUCTIONS = ["mean", "log_mean"]
SHAPES = [(4, 8, 0), (2, 3, 1), (1, 4, 3), (5, 7, 13), (41, 6, 0), (13, 1, 37), (33, 16, 401)]  # B, D, M


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("m", [0, 5])
def test_the_two_references_agree(m, reduction):
    view1, view2, extra = operands(4, 3, m)
    found = naive(view1, view2, temperature=0.2, extra_keys=extra, reduction=reduction)
    torch.testing.assert_close(found, loop_reference(view1, view2, 0.2, extra, reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
@pytest.mark.parametrize(("b", "d", "m"), SHAPES)
def test_float64_equals_the_formula(b, d, m, temperature, reduction):
    view1, view2, extra = operands(b, d, m)
    options = {"temperature": temperature, "extra_keys": extra, "reduction": reduction}
    expected, expected_grads = value_and_grads(naive, view1, view2, **options)
    value, grads = value_and_grads(nt_xent, view1, view2, **options)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scale", [1e-3, 3.0, 40.0])
def test_rows_that_are_not_normalised_are_right_too(scale, reduction):
    """Products reach tens of thousands, and the rows' sums are hundreds of powers of e apart."""
    view1, view2, extra = operands(9, 6, 5, scale)
    options = {"temperature": 0.5, "extra_keys": extra}
    expected = loop_reference(view1, view2, 0.5, extra, reduction)
    value, grads = value_and_grads(nt_xent, view1, view2, **options, reduction=reduction)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
    assert all(bool(grad.isfinite().all()) for grad in grads)
    if reduction == "mean":
        for grad, expected_grad in zip(grads, value_and_grads(naive, view1, view2, **options)[1], strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_collapsed_rows(reduction):
    """All rows alike: every one of the n - 1 others is as good as the positive."""
    view = F.normalize(torch.ones(6, 4, dtype=torch.float64), dim=1)
    value, grads = value_and_grads(nt_xent, view, view, temperature=0.1, reduction=reduction)
    torch.testing.assert_close(value, torch.tensor(11.0, dtype=torch.float64).log())
    assert all(float(grad.abs().max()) < 1e-12 for grad in grads)


def test_a_single_image_has_nothing_to_be_told_from():
    view1, view2, _ = operands(1, 4)
    value, grads = value_and_grads(nt_xent, view1, view2, temperature=0.1)
    assert abs(float(value)) < 1e-14
    assert all(float(grad.abs().max()) < 1e-13 for grad in grads)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_narrow_operands_against_float64_on_the_same_rounded_rows(dtype, tolerance, reduction):
    narrow = [x.to(dtype) for x in operands(65, 32, 50)]
    options = {"temperature": 0.1, "reduction": reduction}
    expected, expected_grads = value_and_grads(
        naive, narrow[0].double(), narrow[1].double(), extra_keys=narrow[2].double(), **options
    )
    value, grads = value_and_grads(nt_xent, narrow[0], narrow[1], extra_keys=narrow[2], **options)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=5e-6, atol=0)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        assert relative(grad, expected_grad) < tolerance


def test_each_view_gets_its_own_dtype_and_float64_anywhere_makes_the_sums_float64():
    view1, view2, extra = operands(5, 4, 3)
    value, grads = value_and_grads(nt_xent, view1.half(), view2.float(), temperature=0.1, extra_keys=extra)
    assert value.dtype == torch.float64
    assert [grad.dtype for grad in grads] == [torch.float16, torch.float32]


def test_autocast_does_not_reach_inside():
    view1, view2, extra = (x.float() for x in operands(20, 16, 9))
    outside = value_and_grads(nt_xent, view1, view2, temperature=0.1, extra_keys=extra)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = value_and_grads(nt_xent, view1, view2, temperature=0.1, extra_keys=extra)
    assert torch.equal(inside[0], outside[0])
    assert all(torch.equal(a, b) for a, b in zip(inside[1], outside[1], strict=True))


# ---- gradient


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("b", "d", "m"), [(3, 4, 0), (5, 3, 11), (1, 3, 4)])
def test_gradcheck(b, d, m, reduction):
    view1, view2, extra = operands(b, d, m, scale=0.5)
    options = {"temperature": 0.3, "extra_keys": extra, "reduction": reduction}
    inputs = (view1.requires_grad_(), view2.requires_grad_())
    assert torch.autograd.gradcheck(lambda *views: nt_xent(*views, **options), inputs)


def test_extra_keys_are_constants():
    view1, view2, extra = (x.requires_grad_() for x in operands(4, 5, 6))
    nt_xent(view1, view2, temperature=0.1, extra_keys=extra).backward()
    assert extra.grad is None
    assert view1.grad is not None


def test_a_view_without_gradient_is_a_constant():
    view1, view2, _ = operands(4, 5)
    _, expected = value_and_grads(naive, view1, view2, temperature=0.1)
    view1.requires_grad_()
    nt_xent(view1, view2, temperature=0.1).backward()
    torch.testing.assert_close(view1.grad, expected[0], rtol=1e-9, atol=1e-12)
    assert view2.grad is None


@pytest.mark.parametrize("factor", [0.0, -2.5, 65536.0])
def test_the_gradient_of_the_output_is_respected(factor):
    view1, view2, extra = operands(4, 5, 6)
    _, expected = value_and_grads(naive, view1, view2, temperature=0.1, extra_keys=extra)
    view1.requires_grad_()
    (nt_xent(view1, view2, temperature=0.1, extra_keys=extra) * factor).backward()
    torch.testing.assert_close(view1.grad, expected[0] * factor, rtol=1e-9, atol=1e-12 * max(1.0, abs(factor)))


def test_a_loss_scale_rescues_gradients_that_float16_cannot_hold():
    view1, view2 = (x.half() for x in operands(2048, 16)[:2])
    expected = value_and_grads(nt_xent, view1.double(), view2.double(), temperature=20.0)[1][0]
    errors = {}
    for scale in (1, 1024):
        leaf = view1.clone().requires_grad_()
        (nt_xent(leaf, view2, temperature=20.0) * scale).backward()
        errors[scale] = relative(leaf.grad.double() / scale, expected)
    assert errors[1024] < 1e-3 < errors[1]


def test_double_backward_is_refused_and_no_grad_gives_a_number():
    view1, view2, _ = operands(4, 5)
    view1.requires_grad_()
    loss = nt_xent(view1, view2, temperature=0.1)
    (grad,) = torch.autograd.grad(loss.square(), view1, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with torch.no_grad(), Allocations() as seen:
        value = nt_xent(view1, view2, temperature=0.1)
    assert not value.requires_grad
    with Allocations() as with_gradient:
        nt_xent(view1, view2, temperature=0.1)
    assert seen.operations < 0.7 * with_gradient.operations
    assert torch.equal(value, loss.detach())


# ---- memory


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("b", "m"), [(64, 0), (16, 300), (256, 0), (5, 7)])
def test_nothing_as_large_as_rows_times_keys_is_ever_made(b, m, reduction):
    view1, view2, extra = operands(b, 2, m)
    view1.requires_grad_()
    options = {"temperature": 0.1, "extra_keys": extra, "reduction": reduction}
    with Allocations() as seen:
        nt_xent(view1, view2, **options).backward()
    assert 0 < seen.largest <= 0.3 * 2 * b * (2 * b + m)
    with Allocations() as naively:
        naive(view1, view2, **options).backward()
    assert naively.largest >= 2 * b * (2 * b + m)  # the counter does see such matrices
    if b == 256:
        assert seen.peak < 0.25 * naively.peak


def test_default_keys_per_tile():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [keys_per_tile(n, n, cpu) for n in (2, 9, 512, 8192, 10**6)] == [1, 2, 64, 32, 1]
    assert [keys_per_tile(n, n, cuda) for n in (2, 512, 8192, 65536)] == [1, 64, 1024, 512]


# ---- the original codes' numbers

BASELINES, WCL = golden.load("baselines"), golden.load("wcl_loss")


def simclr_of_the_relational_repository(embeddings, temperature):
    """Its formula: rows 2i and 2i + 1 are the views of an image; a whole sum over cosines, less exp(1/t) for the
    row itself; the log of the mean."""
    cosines = F.cosine_similarity(embeddings[:, None], embeddings[None], dim=2)
    similar = (cosines / temperature).exp()
    partner = torch.arange(len(embeddings)) ^ 1
    q = similar[torch.arange(len(embeddings)), partner] / (similar.sum(1) - math.exp(1 / temperature))
    return -q.mean().log()


@pytest.mark.evidence(
    "simclr", "L0", "the repository's loss (log of the mean) and its gradient; value of the paper's (mean of the logs)",
    golden="baselines", dtype="float32", tolerance="loss 1e-5, gradient 1e-4", gradient=True,
)  # fmt: skip
@pytest.mark.parametrize("temperature", ["0.5", "0.1"])
@pytest.mark.parametrize("case", ["simclr0", "simclr1"])
def test_golden_simclr_of_the_relational_repository(case, temperature):
    """At t = 0.1 the original loses digits by taking exp(1/t) = 22,026 off a float32 sum again; its formula in
    float64 and ours agree, and differ from its numbers by as much as allowed here."""
    tau = float(temperature)
    loses = temperature == "0.1"
    raw = golden.tensor(BASELINES[f"{case}__embeddings"]).requires_grad_()
    unit = F.normalize(raw, dim=1)
    found = nt_xent(unit[::2], unit[1::2], temperature=tau, reduction="log_mean")
    expected = golden.tensor(BASELINES[f"{case}__loss_t{temperature}"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-6 if loses else 0)
    (grad,) = torch.autograd.grad(found, raw)
    expected = golden.tensor(BASELINES[f"{case}__grad_t{temperature}"])
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 if loses else 1e-6)
    found = nt_xent(*F.normalize(raw, dim=1).view(-1, 2, raw.shape[1]).unbind(1), temperature=tau)
    expected = golden.tensor(BASELINES[f"{case}__ntxent_mean_t{temperature}"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)

    wide = raw.detach().double().requires_grad_()
    expected = simclr_of_the_relational_repository(wide, tau)
    found = nt_xent(
        *F.normalize(wide, dim=1).view(-1, 2, wide.shape[1]).unbind(1), temperature=tau, reduction="log_mean"
    )
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, wide)[0], torch.autograd.grad(expected, wide)[0], rtol=1e-6, atol=1e-9
    )


@pytest.mark.evidence(
    "wcl", "part", "instance loss (NT-Xent over all processes) and its gradient, of one rank and of two",
    golden="wcl_loss", dtype="float32", tolerance="loss 1e-5, gradient 1e-4 of its largest entry", gradient=True,
)  # fmt: skip
@pytest.mark.parametrize("prefix", golden.cases(WCL))
def test_golden_instance_loss_of_wcl(prefix):
    """The other ranks' rows are further keys, without gradient."""
    case = golden.part(WCL, prefix)
    heads = golden.tensor(case["head1"])  # (W, 2, N, C), unit rows
    for rank in range(int(case["world_size"])):
        others = torch.cat([heads[:rank], heads[rank + 1 :]]).flatten(0, 2)
        own = heads[rank].clone().requires_grad_()
        temperature = round(float(case["temperature"]), 6)
        loss = nt_xent(own[0], own[1], temperature=temperature, extra_keys=others if len(others) else None)
        torch.testing.assert_close(loss, golden.tensor(case["ntxent_loss"][rank]), rtol=1e-5, atol=2e-6)
        loss.backward()
        expected = golden.tensor(case["grad_head1"][rank])
        torch.testing.assert_close(own.grad, expected, rtol=0, atol=1e-4 * float(expected.abs().max()) + 1e-6)


def test_the_golden_file_holds_a_case_of_two_ranks():
    assert any(int(WCL[f"{prefix}world_size"]) == 2 for prefix in golden.cases(WCL))


# ---- bad input


@pytest.mark.parametrize(
    ("view1", "view2", "extra", "match"),
    [
        ((4, 3), (5, 3), None, r"of one shape \(B, D\), neither empty; got view1 \(4, 3\), view2 \(5, 3\)"),
        ((4, 3), (4, 2), None, "of one shape"),
        ((0, 3), (0, 3), None, "neither empty"),
        ((4,), (4,), None, "of one shape"),
        ((2, 4, 3), (2, 4, 3), None, "of one shape"),
        ((4, 3), (4, 3), (5, 2), r"number of features D; got .* extra_keys \(5, 2\)"),
        ((4, 3), (4, 3), (3,), r"of one shape .* extra_keys \(3,\)"),
    ],
)
def test_wrong_shapes_are_refused(view1, view2, extra, match):
    with pytest.raises(ValueError, match=match):
        nt_xent(
            torch.zeros(view1),
            torch.zeros(view2),
            temperature=0.1,
            extra_keys=None if extra is None else torch.zeros(extra),
        )


def test_wrong_dtypes_devices_temperatures_and_reductions_are_refused():
    view1, view2, extra = operands(4, 3, 2)
    with pytest.raises(ValueError, match=r"floating-point tensors; got .* extra_keys torch.int64"):
        nt_xent(view1, view2, temperature=0.1, extra_keys=extra.long())
    with pytest.raises(ValueError, match=r"on one device; got .* view2 on meta"):
        nt_xent(view1, view2.to("meta"), temperature=0.1)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be positive"):
            nt_xent(view1, view2, temperature=temperature)
    with pytest.raises(ValueError, match="reduction must be one of mean, log_mean; got 'sum'"):
        nt_xent(view1, view2, temperature=0.1, reduction="sum")


def test_no_extra_keys_and_none_are_the_same():
    view1, view2, _ = operands(4, 3)
    empty = view1.new_zeros((0, 3))
    assert torch.equal(nt_xent(view1, view2, temperature=0.1, extra_keys=empty), nt_xent(view1, view2, temperature=0.1))
