"""WCL's graph and its loss against SciPy, the papers' sums in float64, and the original code's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components as scipy_components
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from relssl.losses import component_contrastive, connected_components, nearest_neighbours, nt_xent
from tests.relssl import golden
from tests.relssl.counting import Allocations

ARRAYS = golden.load("wcl_loss")


def loop_reference(anchors, keys, labels, temperature, offset=0):
    """The original's mask form, row by row, in float64; keys carry no gradient."""
    anchors, keys = anchors.double(), keys.detach().double()
    losses = []
    for i, row in enumerate(anchors):
        others = [j for j in range(len(keys)) if j != i + offset]
        logits = torch.stack([row @ keys[j] / temperature for j in others])
        positives = [k for k, j in enumerate(others) if labels[j] == labels[i + offset]]
        if positives:
            losses.append(torch.logsumexp(logits, 0) - logits[positives].mean())
        else:
            losses.append(torch.logsumexp(logits, 0))
    return torch.stack(losses).mean()


def rows(n, d, seed=0):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def labels_of(n, groups, seed=0):
    drawn = torch.randint(groups, (n,), generator=torch.Generator().manual_seed(seed))
    return connected_components(_ring(drawn))


def _ring(groups: Tensor) -> Tensor:
    """Pointers that join the members of each group."""
    pointer = torch.arange(len(groups))
    for group in groups.unique():
        members = (groups == group).nonzero().flatten()
        pointer[members] = members.roll(-1)
    return pointer


def value_and_grad(loss, anchors, *args, **options):
    leaf = anchors.detach().clone().requires_grad_()
    value = loss(leaf, *args, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


# -- neighbours --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 9, 100, 700])
def test_neighbours_are_the_most_similar_others(n):
    x = rows(n, 5)
    products = x @ x.T
    products.fill_diagonal_(-torch.inf)
    assert torch.equal(nearest_neighbours(x), products.argmax(1))
    assert torch.equal(nearest_neighbours(x.float()), products.float().argmax(1))


def test_equal_rows_are_neighbours_but_nobody_is_its_own():
    x = torch.ones(6, 4)
    found = nearest_neighbours(x)
    assert (found != torch.arange(6)).all()
    assert (connected_components(found) == connected_components(found)[0]).all()


def test_autocast_turns_no_neighbour_around():
    x = rows(200, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_neighbours(x), nearest_neighbours(x.clone()))
    close = torch.tensor([[1.0, 0.0], [0.9999, 0.0141], [0.9998, 0.02]])
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_neighbours(close).tolist() == [1, 2, 1]


class ProductPrecision(TorchDispatchMode):
    """The precision that is set whenever a matrix product is made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.mm:
            self.seen.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


def test_neighbours_are_found_without_tf32_whatever_the_training_has_set():
    """TF32 itself needs a GPU; what asks for it can be seen anywhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with ProductPrecision() as products:
            nearest_neighbours(rows(20, 4).float())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(products.seen) == {"highest"}


@pytest.mark.parametrize("x", [torch.zeros(1, 3), torch.zeros(4), torch.zeros(3, 3, dtype=torch.int64)])
def test_what_has_no_neighbours_is_refused(x):
    with pytest.raises(ValueError, match="of at least two images; got"):
        nearest_neighbours(x)


# -- components --------------------------------------------------------------------------------------------------------


def scipy_labels(pointer):
    n = len(pointer)
    graph = coo_matrix((np.ones(n), (np.arange(n), pointer.numpy())), shape=(n, n))
    return scipy_components(graph, directed=False)[1]


def same_partition(a, b):
    return len(set(zip(a, b, strict=True))) == len(set(a)) == len(set(b))


def graphs():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 3, 7, 8, 9, 64, 65, 513):
        yield torch.randint(n, (n,), generator=generator)  # any pointers
        yield torch.randperm(n, generator=generator)  # cycles of all lengths
        yield torch.arange(n).roll(1)  # one cycle
        chain = (torch.arange(n) - 1).clamp(min=0)
        yield chain
        order = torch.randperm(n, generator=generator)
        shuffled = torch.empty_like(chain)
        shuffled[order] = order[chain]
        yield shuffled
        yield torch.zeros(n, dtype=torch.int64)  # a star


def test_components_are_scipys():
    for pointer in graphs():
        labels = connected_components(pointer)
        assert same_partition(labels.tolist(), scipy_labels(pointer).tolist())
        assert torch.equal(labels[labels], labels)  # a label is the number of a member


def test_components_take_the_rounds_that_they_need():
    """A chain of n nodes is the longest way; one round less splits it."""
    chain = (torch.arange(1025) - 1).clamp(min=0)
    assert connected_components(chain).unique().numel() == 1


@pytest.mark.parametrize("pointer", [torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64)])
def test_pointers_that_are_none_are_refused(pointer):
    with pytest.raises(ValueError, match=r"expected neighbours \(N,\) int64; got"):
        connected_components(pointer)


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "total", "offset", "d", "groups"), [(12, 12, 0, 6, 4), (5, 13, 6, 3, 3), (9, 9, 0, 4, 9), (1, 2, 1, 3, 1)]
)
@pytest.mark.parametrize("temperature", [0.1, 0.02, 1.0])
def test_loss_and_gradient_equal_the_sums(n, total, offset, d, groups, temperature):
    keys, labels = rows(total, d), labels_of(total, groups)
    anchors = keys[offset : offset + n]
    options = {"offset": offset, "temperature": temperature}
    value, grad = value_and_grad(component_contrastive, anchors, keys, labels, **options)
    expected, expected_grad = value_and_grad(loop_reference, anchors, keys, labels, **options)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    keys, labels = rows(7, 4), labels_of(7, 3)
    anchors = keys[2:6].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: component_contrastive(x, keys, labels, offset=2, temperature=0.3), anchors
    )


def test_keys_carry_no_gradient():
    keys = rows(6, 3).requires_grad_()
    loss = component_contrastive(keys, keys, labels_of(6, 2), temperature=0.5)
    (grad,) = torch.autograd.grad(loss, keys)
    _, anchors_only = value_and_grad(loop_reference, keys, keys, labels_of(6, 2), temperature=0.5)
    torch.testing.assert_close(grad, anchors_only)
    assert not component_contrastive(rows(6, 3), keys, labels_of(6, 2), temperature=0.5).requires_grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_narrow_operands_are_summed_in_float32(dtype, tolerance):
    keys, labels = rows(40, 16).to(dtype), labels_of(40, 9)
    value, grad = value_and_grad(component_contrastive, keys[:20], keys, labels, temperature=0.1)
    assert (value.dtype, grad.dtype) == (torch.float32, dtype)
    expected, expected_grad = value_and_grad(loop_reference, keys[:20], keys, labels, temperature=0.1)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (grad.double() - expected_grad).norm() <= tolerance * expected_grad.norm()


def test_autocast_and_a_loss_scale_do_not_reach_inside():
    keys, labels = rows(30, 8).float(), labels_of(30, 5)
    plain = value_and_grad(component_contrastive, keys, keys, labels, temperature=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = value_and_grad(component_contrastive, keys, keys, labels, temperature=0.1)
    assert torch.equal(plain[0], inside[0])
    assert torch.equal(plain[1], inside[1])
    leaf = keys.clone().requires_grad_()
    (1024 * component_contrastive(leaf, keys, labels, temperature=0.1)).backward()
    torch.testing.assert_close(leaf.grad, 1024 * plain[1])


def test_the_matrix_is_never_made():
    keys, labels = rows(512, 8).float(), labels_of(512, 40)
    leaf = keys.clone().requires_grad_()
    with Allocations() as seen:
        labels = connected_components(nearest_neighbours(keys))
        component_contrastive(leaf, keys, labels, temperature=0.1).backward()
    assert seen.largest <= 512 * 512 / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(6, 4)}, r"expected anchors \(n, D\), keys \(N, D\)"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels \(5,\)"),
        ({"labels": torch.zeros(6)}, "int64 labels; got"),
        ({"offset": 3}, "but offset is 3"),
        ({"offset": -1}, "but offset is -1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"anchors": torch.zeros(0, 3)}, "expected anchors"),
        (
            {"anchors": torch.zeros(1, 3), "keys": torch.zeros(1, 3), "labels": torch.zeros(1, dtype=torch.int64)},
            "N of at least 2",
        ),
    ],
)  # fmt: skip
def test_operands_that_do_not_fit_are_refused(change, message):
    given = {
        "anchors": torch.zeros(4, 3),
        "keys": torch.zeros(6, 3),
        "labels": torch.zeros(6, dtype=torch.int64),
        "temperature": 0.1,
    }
    given.update(change)
    with pytest.raises(ValueError, match=message):
        component_contrastive(given.pop("anchors"), given.pop("keys"), given.pop("labels"), **given)


# -- the original ------------------------------------------------------------------------------------------------------


@pytest.mark.evidence(
    "wcl", "L0", "neighbours and components (exact), both losses and their gradients, one and two ranks",
    golden="wcl_loss", dtype="float32", tolerance="loss 1e-5, gradient 1e-4", gradient=True,
)  # fmt: skip
@pytest.mark.parametrize("case", golden.cases(ARRAYS))
def test_everything_equals_the_original(case):
    data = golden.part(ARRAYS, case)
    tau, world = float(data["temperature"]), int(data["world_size"])
    head1, head2 = golden.tensor(data["head1"]), golden.tensor(data["head2"])  # (W, 2, N, C)
    per_rank = head1.shape[2]
    gathered = [head2[:, view].flatten(0, 1) for view in (0, 1)]
    labels = []
    for view in (0, 1):
        found = nearest_neighbours(gathered[view])
        assert (found.numpy() == data["nn_index"][view]).all()
        labels.append(connected_components(found))
        assert ((labels[view][:, None] == labels[view]).numpy() == data["mask"][view]).all()
    for rank in range(world):
        views1 = [head1[rank, v].clone().requires_grad_() for v in (0, 1)]
        views2 = [head2[rank, v].clone().requires_grad_() for v in (0, 1)]
        others = torch.cat([head1[r, v] for v in (0, 1) for r in range(world) if r != rank] or [head1[0, 0, :0]])
        instance = nt_xent(*views1, temperature=tau, extra_keys=others)
        graph = (
            sum(
                component_contrastive(views2[v], gathered[v], labels[1 - v], offset=rank * per_rank, temperature=tau)
                for v in (0, 1)
            )
            / 2
        )
        total = instance + graph
        for got, name in ((instance, "ntxent_loss"), (graph, "graph_loss"), (total, "total_loss")):
            np.testing.assert_allclose(got.detach(), data[name][rank], rtol=1e-5, atol=2e-6, err_msg=name)
        total.backward()
        for leaves, name in ((views1, "grad_head1"), (views2, "grad_head2")):
            for v in (0, 1):
                wanted = data[name][rank, v]
                limit = 1e-4 * np.abs(wanted).max() + 1e-6
                assert np.abs(leaves[v].grad.numpy() - wanted).max() <= limit, name
