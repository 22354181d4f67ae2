"""ReLICv2's objective against sums over images, negatives and pairs in float64, and against the recorded formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from relssl.losses import relicv2_loss
from tests.relssl import golden
from tests.relssl.counting import Allocations

SIZES = [(2, 1, 5, 3, 2), (1, 0, 2, 3, 1), (3, 2, 9, 4, 8), (2, 2, 12, 4, 1)]
ARRAYS = golden.load("relicv2_loss")
CASES = sorted({key.split("__")[0] for key in ARRAYS})


def sums(online, target, negatives, *, temperature, alpha, beta, form="transpose", stop_gradient=True):
    """Image by image and pair by pair."""
    online, target = F.normalize(online.double(), dim=2), F.normalize(target.detach().double(), dim=2)
    large = len(target)

    def distribution(anchors, others, b):
        candidates = [b, *negatives[b].tolist()]
        return torch.stack([anchors[b] @ others[c] / temperature for c in candidates]).softmax(0)

    total = 0
    for i, o in enumerate(online):
        for j, t in enumerate(target):
            for b in range(online.shape[1]):
                p = distribution(o, t, b)
                total = total - alpha * p[0].log() / online.shape[1]
                if form == "transpose":
                    q = distribution(t, o, b)
                elif i < large:
                    q = distribution(online[j], target[i], b)
                else:
                    continue
                entropy = (p * p.log()).sum()
                kl = (entropy.detach() if stop_gradient else entropy) - (p * q.log()).sum()
                total = total + beta * kl / online.shape[1]
    return total / (len(online) * large)


def operands(large, small, b, d, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    online = torch.randn(large + small, b, d, generator=generator, dtype=torch.float64)
    target = torch.randn(large, b, d, generator=generator, dtype=torch.float64)
    negatives = torch.stack([(torch.randperm(b - 1, generator=generator)[:n] + 1 + i) % b for i in range(b)])
    return online, target, negatives


def value_and_grad(loss, online, *args, **options):
    leaf = online.detach().clone().requires_grad_()
    value = loss(leaf, *args, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize(("large", "small", "b", "d", "n"), SIZES)
@pytest.mark.parametrize("form", ["transpose", "swap"])
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_loss_and_gradient_equal_the_sums(large, small, b, d, n, form, stop_gradient):
    given = operands(large, small, b, d, n)
    options = {"temperature": 0.3, "alpha": 0.3, "beta": 5.0, "form": form, "stop_gradient": stop_gradient}
    got, wanted = value_and_grad(relicv2_loss, *given, **options), value_and_grad(sums, *given, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("elements", [1, 120])
@pytest.mark.parametrize("form", ["transpose", "swap"])
def test_blocks_of_images_add_up(form, elements, monkeypatch):
    """Images one by one, and in blocks that do not divide the batch."""
    given = operands(2, 1, 11, 3, 3)
    options = {"temperature": 0.3, "alpha": 0.3, "beta": 5.0, "form": form}
    whole = value_and_grad(relicv2_loss, *given, **options)
    monkeypatch.setattr("relssl.losses.relicv2._CPU_BLOCK", elements)
    monkeypatch.setattr("relssl.losses.relicv2._MOST_BLOCKS", 11)
    torch.testing.assert_close(value_and_grad(relicv2_loss, *given, **options), whole, rtol=1e-12, atol=1e-14)


def test_candidates_are_not_kept():
    """Rows of all candidates of all crops would be many times the operands."""
    online, target, negatives = operands(4, 2, 512, 64, 10)
    with Allocations() as allocations:
        relicv2_loss(online.requires_grad_(), target, negatives, temperature=0.3, alpha=0.3, beta=5.0).backward()
    kept = (4 * 6 + 4 * 6) * 512 * 11 * 64 * 8  # by two loops over crops
    assert allocations.peak < kept / 4


@pytest.mark.parametrize("negatives", [10, 255])
def test_operations_do_not_grow_with_the_batch(negatives, monkeypatch):
    monkeypatch.setattr("relssl.losses.relicv2._CPU_BLOCK", 1)
    given = operands(4, 2, 256, 8, negatives)
    given[0].requires_grad_()
    with Allocations() as allocations:
        relicv2_loss(*given, temperature=0.3, alpha=0.3, beta=5.0).backward()
    assert allocations.operations < 16 * 120  # sixteen blocks, whatever the batch


@pytest.mark.parametrize("form", ["transpose", "swap"])
def test_gradcheck(form):
    online, target, negatives = operands(2, 1, 5, 3, 2)
    assert torch.autograd.gradcheck(
        lambda x: relicv2_loss(
            x, target, negatives, temperature=0.5, alpha=0.3, beta=2.0, form=form, stop_gradient=False
        ),
        online.requires_grad_(),
    )


@pytest.mark.evidence(
    "relicv2", "L0", "both readings of the invariance, with and without stop-gradient: values and gradients",
    golden="relicv2_loss", dtype="float64", tolerance=1e-10, gradient=True,
)  # fmt: skip
@pytest.mark.parametrize("name", CASES)
def test_the_recorded_formulas(name):
    data = golden.part(ARRAYS, f"{name}__")
    online, target, negatives = (golden.tensor(data[key]) for key in ("online", "target", "neg_idx"))
    tau, alpha, beta = (float(data[key]) for key in ("tau", "alpha", "beta"))
    assert len(target) == int(data["num_large"])

    def loss(a, b, form="transpose", stop_gradient=True):
        options = {"temperature": tau, "alpha": a, "beta": b, "form": form, "stop_gradient": stop_gradient}
        return value_and_grad(relicv2_loss, online, target, negatives, **options)

    wanted = {
        "total_A": loss(alpha, beta)[0],
        "total_B": loss(alpha, beta, "swap")[0],
        "contrastive": loss(1, 0)[0],
        "grad_contrastive": loss(1, 0)[1],
    }
    for form, letter in (("transpose", "A"), ("swap", "B")):
        wanted[f"kl{letter}"] = loss(0, 1, form)[0]
        wanted[f"grad_kl{letter}_sg"] = loss(0, 1, form, True)[1]
        wanted[f"grad_kl{letter}_full"] = loss(0, 1, form, False)[1]
    for key, value in wanted.items():
        np.testing.assert_allclose(value.numpy(), data[key], rtol=0, atol=1e-10, err_msg=key)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_narrow_operands_are_summed_in_float32(dtype, tolerance):
    online, target, negatives = operands(2, 1, 24, 8, 4)
    online, target = online.to(dtype), target.to(dtype)
    options = {"temperature": 0.3, "alpha": 0.3, "beta": 5.0}
    leaf = online.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = relicv2_loss(leaf, target, negatives, **options)
    (grad,) = torch.autograd.grad(value, leaf)
    assert (value.dtype, grad.dtype) == (torch.float32, dtype)
    expected, expected_grad = value_and_grad(sums, online.double(), target, negatives, **options)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (grad.double() - expected_grad).norm() <= tolerance * expected_grad.norm()


def test_the_target_carries_no_gradient():
    online, target, negatives = operands(2, 0, 4, 3, 2)
    target.requires_grad_()
    relicv2_loss(online.requires_grad_(), target, negatives, temperature=0.3, alpha=1, beta=1).backward()
    assert target.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(4, 4, 3)}, r"expected online \(L\+S, B, D\)"),
        ({"target": torch.zeros(2, 5, 3)}, "target"),
        ({"negatives": torch.zeros(4, 0, dtype=torch.int64)}, "n at least 1"),
        ({"negatives": torch.zeros(5, 1, dtype=torch.int64)}, r"negatives \(B, n\)"),
        ({"negatives": torch.zeros(4, 1)}, "int64 negatives"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"form": "both"}, "form must be transpose or swap, got 'both'"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    given = {
        "online": torch.zeros(3, 4, 3),
        "target": torch.zeros(2, 4, 3),
        "negatives": torch.ones(4, 1, dtype=torch.int64),
        "temperature": 0.3,
        "alpha": 1.0,
        "beta": 1.0,
    }
    given.update(change)
    with pytest.raises(ValueError, match=message):
        relicv2_loss(given.pop("online"), given.pop("target"), given.pop("negatives"), **given)
