"""ReSA's Sinkhorn assignments and cross-entropy against the matrix forms in float64 and the original's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from relssl import dist
from relssl.losses import assignment_cross_entropy, sinkhorn_assign
from tests.relssl import golden
from tests.relssl.dist_helpers import run_ranks

ARRAYS = golden.load("resa_loss")
CASES = sorted({key.split("__")[0] for key in ARRAYS if key.endswith("__h_online")})
SINKHORN = sorted({key.split("__")[0] for key in ARRAYS if key.endswith("__n_iterations")})


def matrix_sinkhorn(scores: Tensor, temperature: float, iterations: int) -> Tensor:
    """As the original states it: prototypes x samples, alternately normalised, in float64."""
    q = (scores.double() / temperature).exp().T
    prototypes, samples = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True) * prototypes
        q /= q.sum(0, keepdim=True) * samples
    return (q * samples).T


def matrix_cross_entropy(online, target, assign, temperature):
    logits = online.double() @ target.double().T / temperature
    return -(assign.double() * logits.log_softmax(1)).sum(1).mean()


def unit(n, d, seed):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def value_and_grad(loss, online, *args, **options):
    leaf = online.detach().clone().requires_grad_()
    value = loss(leaf, *args, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


# -- Sinkhorn ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (6, 10), (10, 6), (1, 5), (5, 1)])
@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("temperature", [0.05, 0.02, 0.5])
def test_assignments_are_those_of_the_matrix_form(shape, iterations, temperature):
    scores = unit(shape[0], 7, 1) @ unit(shape[1], 7, 2).T
    assign = sinkhorn_assign(scores, temperature=temperature, iterations=iterations)
    torch.testing.assert_close(assign, matrix_sinkhorn(scores, temperature, iterations), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(assign.sum(1), torch.ones(shape[0], dtype=torch.float64))


@pytest.mark.parametrize("case", SINKHORN)
def test_assignments_are_the_originals(case):
    data = golden.part(ARRAYS, f"{case}__")
    assign = sinkhorn_assign(
        golden.tensor(data["scores"]), temperature=float(data["temp"]), iterations=int(data["n_iterations"])
    )
    np.testing.assert_allclose(assign, data["assign"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_scores_neither_overflow_nor_lose_digits(temperature, dtype):
    features = torch.cat([unit(16, 4, 1), -unit(16, 4, 1)])  # opposite ones, too
    scores = (features @ features.T).to(dtype)
    before = scores.clone()
    with torch.autocast("cpu", torch.bfloat16):
        assign = sinkhorn_assign(scores, temperature=temperature)
    assert assign.dtype == torch.float32
    torch.testing.assert_close(assign.double(), matrix_sinkhorn(scores, temperature, 3), rtol=2e-4, atol=1e-5)
    assert torch.equal(scores, before)


def test_large_scores_do_not_overflow():
    scores = 300 * torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    assert sinkhorn_assign(scores, temperature=1.0).isfinite().all()


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (torch.zeros(3), {}, r"scores \(B, N\)"),
        (torch.zeros(0, 3), {}, "not empty"),
        (torch.zeros(2, 2, dtype=torch.int64), {}, "int64"),
        (torch.zeros(2, 2), {"temperature": 0}, "temperature must be positive"),
        (torch.zeros(2, 2), {"iterations": 0}, "iterations must be at least 1"),
    ],
)
def test_scores_that_cannot_be_assigned_are_refused(scores, options, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_assign(scores, **options)


# -- cross-entropy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("b", "n", "d"), [(8, 8, 5), (3, 17, 4), (1, 1, 2), (5, 40, 3)])
@pytest.mark.parametrize("temperature", [0.4, 0.05])
@pytest.mark.parametrize("mass", [1.0, 2.5])
def test_loss_and_gradient_equal_the_matrix_form(b, n, d, temperature, mass):
    online, target = unit(b, d, 1), unit(n, d, 2)
    assign = mass * sinkhorn_assign(unit(b, 6, 3) @ unit(n, 6, 4).T)
    got = value_and_grad(assignment_cross_entropy, online, target, assign, temperature=temperature)
    wanted = value_and_grad(matrix_cross_entropy, online, target, assign, temperature=temperature)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    target, assign = unit(9, 4, 2), sinkhorn_assign(unit(5, 6, 3) @ unit(9, 6, 4).T)
    online = unit(5, 4, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: assignment_cross_entropy(x, target, assign, temperature=0.4), online)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_narrow_operands_are_summed_in_float32(dtype, tolerance):
    online, target = unit(20, 8, 1).to(dtype), unit(30, 8, 2).to(dtype)
    assign = sinkhorn_assign(unit(20, 6, 3) @ unit(30, 6, 4).T).float()
    with torch.autocast("cpu", torch.bfloat16):
        value, grad = value_and_grad(assignment_cross_entropy, online, target, assign, temperature=0.4)
    assert (value.dtype, grad.dtype) == (torch.float32, dtype)
    expected, expected_grad = value_and_grad(matrix_cross_entropy, online, target, assign, temperature=0.4)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (grad.double() - expected_grad).norm() <= tolerance * expected_grad.norm()


def test_only_the_online_rows_carry_gradient():
    online, target = unit(4, 3, 1).requires_grad_(), unit(4, 3, 2).requires_grad_()
    assign = torch.full((4, 4), 0.25, dtype=torch.float64).requires_grad_()
    (3 * assignment_cross_entropy(online, target, assign, temperature=0.4)).backward()
    assert (target.grad, assign.grad) == (None, None)
    _, once = value_and_grad(matrix_cross_entropy, online, target.detach(), assign.detach(), temperature=0.4)
    torch.testing.assert_close(online.grad, 3 * once)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(5, 2)}, r"expected online \(B, D\), target \(N, D\)"),
        ({"assign": torch.zeros(5, 4)}, r"assign \(5, 4\)"),
        ({"online": torch.zeros(4, 3, dtype=torch.int64)}, "floating-point"),
        ({"temperature": -1.0}, "temperature must be positive"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    given = {"online": torch.zeros(4, 3), "target": torch.zeros(5, 3), "assign": torch.zeros(4, 5), "temperature": 0.4}
    given.update(change)
    with pytest.raises(ValueError, match=message):
        assignment_cross_entropy(given.pop("online"), given.pop("target"), given.pop("assign"), **given)


# -- the original ------------------------------------------------------------------------------------------------------


def resa_loss(rank: int, data: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """One rank's scores, assignments, loss and gradient, from the arrays of a rank."""
    data = {key: value if value.ndim == 0 else value[rank] for key, value in data.items()}
    z_online = golden.tensor(data["z_online"]).requires_grad_()
    encoding = F.normalize(golden.tensor(data["h_online"][0]), dim=1)
    encodings = dist.gather(F.normalize(golden.tensor(data["h_momentum"][0]), dim=1))
    targets = [dist.gather(F.normalize(golden.tensor(z), dim=1)) for z in data["z_momentum"]]
    scores = encoding @ encodings.T
    assign = sinkhorn_assign(scores)
    pairs = [
        assignment_cross_entropy(F.normalize(z, dim=1), target, assign, temperature=float(data["temp"]))
        for q, z in enumerate(z_online)
        for v, target in enumerate(targets)
        if v != q
    ]
    loss = torch.stack(pairs).mean()
    loss.backward()
    return {"scores": scores, "assign": assign, "loss": loss.detach(), "grad_z_online": z_online.grad}


def compare(results: list[dict[str, Tensor]], data: dict[str, np.ndarray]) -> None:
    for rank, result in enumerate(results):
        for key, rtol, atol in (
            ("scores", 0, 1e-6),
            ("assign", 1e-4, 1e-5),
            ("loss", 1e-5, 0),
            ("grad_z_online", 1e-4, 1e-6),
        ):
            np.testing.assert_allclose(result[key].numpy(), data[key][rank], rtol=rtol, atol=atol, err_msg=key)


@pytest.mark.evidence(
    "resa", "L0", "scores, assignments, loss and its gradient, two views and multi-crop",
    golden="resa_loss", dtype="float32", tolerance="loss 1e-5, assignments 1e-5 + 1e-4, gradient 1e-4", gradient=True,
)  # fmt: skip
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("dist")])
def test_everything_equals_the_original(case):
    data = {key: value if key == "temp" else value[None] for key, value in golden.part(ARRAYS, f"{case}__").items()}
    compare([resa_loss(0, data)], data)


def _in_two(rank: int, folder: str, case: str) -> dict[str, Tensor]:
    with np.load(Path(folder) / "resa_loss.npz") as arrays:
        return resa_loss(rank, golden.part(dict(arrays), f"{case}__"))


@pytest.mark.slow
@pytest.mark.evidence(
    "resa", "L0", "the same in two processes",
    golden="resa_loss", dtype="float32", tolerance="loss 1e-5, assignments 1e-5 + 1e-4, gradient 1e-4", gradient=True,
)  # fmt: skip
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("dist")])
def test_two_processes_equal_the_original(case):
    data = golden.part(ARRAYS, f"{case}__")
    compare(run_ranks(_in_two, len(data["loss"]), str(golden.FOLDER), case), data)


def _rows_of(rank: int, scores: Tensor, temperature: float) -> Tensor:
    half = len(scores) // 2
    return sinkhorn_assign(scores[rank * half : (rank + 1) * half], temperature=temperature)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.05, 0.02])
def test_two_processes_balance_as_one(temperature):
    scores = unit(12, 5, 1) @ unit(12, 5, 2).T
    two = torch.cat(run_ranks(_rows_of, 2, scores, temperature))
    torch.testing.assert_close(two, sinkhorn_assign(scores, temperature=temperature), rtol=1e-12, atol=1e-14)
