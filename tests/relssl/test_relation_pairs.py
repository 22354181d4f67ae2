"""The relation head's loss against lists of pairs in float64, and against the original code's numbers."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipelines.errors import ConfigError
from relssl.losses import relation_pairs_loss
from relssl.nets import RelationHead, set_norm
from relssl.ops import view_pairs
from tests.relssl import golden
from tests.relssl.counting import Allocations

AGGREGATIONS = ["cat", "sum", "mean", "max"]


def pair_list(views, images):
    """(left row, right row, target) of every pair, by the paper's code: rolls with a running shift."""
    pairs, shift = [], 1
    for i in range(views):
        for j in range(i + 1, views):
            pairs += [(i * images + n, j * images + n, 1.0) for n in range(images)]
            pairs += [(i * images + n, j * images + (n - shift) % images, 0.0) for n in range(images)]
            shift = shift + 1 if shift + 1 < images else 1
    left, right, target = zip(*pairs, strict=True)
    return torch.tensor(left), torch.tensor(right), torch.tensor(target, dtype=torch.float64)


def reference(features, head, views, loss="focal"):
    """Every pair in its own row, every formula written out; returns loss, accuracy, (mean, unbiased variance)."""
    left, right, target = pair_list(views, len(features) // views)
    a, b = features[left], features[right]
    pair = {
        "cat": lambda: torch.cat([a, b], dim=1),
        "sum": lambda: a + b,
        "mean": lambda: 0.5 * (a + b),
        "max": lambda: torch.where(a >= b, a, b),
    }[head.aggregation]()
    hidden = pair @ head.linear1.weight.T + head.linear1.bias
    mean, var = hidden.mean(0), hidden.var(0, correction=0)
    used = (mean, var) if head.training else (head.bn1.running_mean, head.bn1.running_var)
    normal = (hidden - used[0]) / (used[1] + head.bn1.eps).sqrt() * head.bn1.weight + head.bn1.bias
    logit = (torch.where(normal > 0, normal, 0.01 * normal) @ head.linear2.weight.T + head.linear2.bias)[:, 0]
    probability = torch.sigmoid(logit)
    p_t = target * probability + (1 - target) * (1 - probability)
    zero = torch.zeros_like(logit)
    bce = torch.logaddexp(zero, torch.where(target == 1, -logit, logit))
    terms = bce if loss == "bce" else 0.5 * (1 - p_t) ** 2 * bce
    accuracy = ((probability > 0.5) == (target == 1)).double().mean()
    return terms.mean(), accuracy, (mean, var * len(left) / (len(left) - 1))


def make(views, images, dim, hidden=8, aggregation="cat", dtype=torch.float64, training=True):
    """Features that are sometimes equal to one another (0 after a ReLU), a head with nothing at its default."""
    generator = torch.Generator().manual_seed(views * 1000 + images * 10 + dim)
    head = RelationHead(dim, hidden, aggregation).double()
    for tensor in [*head.parameters(), head.bn1.running_mean]:
        tensor.data.normal_(generator=generator)
    head.bn1.running_var.uniform_(0.5, 2.0, generator=generator)
    features = torch.randn(views * images, dim, generator=generator, dtype=torch.float64).relu_()
    return features.to(dtype).requires_grad_(), head.to(dtype).train(training)


def value_and_grads(function, features, head, *args, **options):
    value, *rest = function(features, head, *args, **options)
    return value, rest[0], torch.autograd.grad(value, [features, *head.parameters()])


def relative(a, b):
    return float(((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).detach())


# ---- the pairs

PAIRS = golden.load("relational_loss")
CASES = sorted({key.split("__")[0] for key in PAIRS if key.endswith("__targets")})
SIZES = [(2, 2), (3, 2), (6, 2), (2, 3), (4, 8), (6, 5), (9, 3), (8, 7), (5, 16)]


@pytest.mark.parametrize("case", CASES)
def test_the_reference_pairs_are_the_originals(case):
    left, right, target = pair_list(int(PAIRS[f"{case}__K"]), int(PAIRS[f"{case}__N"]))
    assert np.array_equal(left, PAIRS[f"{case}__pair_left"])
    assert np.array_equal(right, PAIRS[f"{case}__pair_right"])
    assert np.array_equal(target, PAIRS[f"{case}__targets"])


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize(("views", "images"), SIZES)
def test_tiles_are_the_pairs_in_order(views, images, chunk):
    left, right, target = pair_list(views, images)
    rows = torch.arange(views * images).view(views, images)
    tiles = list(view_pairs.pair_tiles(views, images, chunk=chunk, device=rows.device))
    assert len(tiles) == -(-views * (views - 1) // 2 // chunk)
    lefts = torch.cat([tile.lefts(rows) for tile in tiles])  # (P, N)
    rights = torch.cat([tile.rights(rows) for tile in tiles], dim=1)  # (2, P, N)
    assert torch.equal(lefts.unsqueeze(1).expand(-1, 2, -1).flatten(), left)
    assert torch.equal(rights.transpose(0, 1).flatten(), right)
    assert torch.equal(target.view(-1, 2, images)[:, 0], torch.ones(lefts.shape, dtype=torch.float64))


@pytest.mark.parametrize(("views", "images"), SIZES)
def test_what_tiles_add_back_goes_to_the_elements_it_came_from(views, images):
    left, right, _ = pair_list(views, images)
    rows = torch.randn(len(left), 3, dtype=torch.float64)
    blocks = rows.view(-1, 2, images, 3).transpose(0, 1)
    found = [torch.zeros(views, images, 3, dtype=torch.float64) for _ in range(2)]
    start = 0
    for tile in view_pairs.pair_tiles(views, images, chunk=2, device=rows.device):
        part = blocks[:, start : start + len(tile.left_view)]
        tile.add_to_lefts(found[0], part)
        tile.add_to_rights(found[1], part)
        start += len(tile.left_view)
    for total, index in zip(found, (left, right), strict=True):
        expected = torch.zeros(views * images, 3, dtype=torch.float64).index_add_(0, index, rows)
        torch.testing.assert_close(total.flatten(0, 1), expected)


@pytest.mark.parametrize(("views", "images"), [*SIZES, (32, 64), (12, 4)])
def test_sums_of_partners_without_pairs(views, images):
    left, right, _ = pair_list(views, images)
    x = torch.randn(views * images, 2, dtype=torch.float64)
    for function, index, partner in (
        (view_pairs.sum_of_rights, left, right),
        (view_pairs.sum_of_lefts, right, left),
    ):
        expected = torch.zeros_like(x).index_add_(0, index, x[partner])
        torch.testing.assert_close(function(x.view(views, images, 2)).flatten(0, 1), expected, rtol=1e-12, atol=1e-12)
    left_times, right_times = view_pairs.multiplicities(views, x)
    for times, index in ((left_times, left), (right_times, right)):
        assert torch.equal(times.flatten().repeat_interleave(images), torch.bincount(index, minlength=len(x)).double())


def test_runs_are_few():
    assert len(view_pairs._runs(32, 64)[0]) == 37  # of 496 view pairs
    assert len(view_pairs._runs(4, 64)[0]) == 3


def test_default_chunk():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [view_pairs.default_chunk(k, 64, cpu) for k in (2, 4, 8, 32)] == [1, 1, 4, 8]
    assert [view_pairs.default_chunk(k, 64, cuda) for k in (2, 4, 8, 32)] == [1, 1, 4, 62]
    assert view_pairs.default_chunk(32, 100_000, cpu) == 1


# ---- against the reference

SHAPES = [  # K, N, D, H, chunk_views
    (4, 8, 6, 16, None),
    (2, 2, 3, 5, None),
    (2, 3, 4, 5, 1),
    (3, 2, 4, 7, 2),
    (6, 5, 7, 9, 4),  # the shift falls back to 1 inside a view; the chunk divides nothing
    (9, 3, 1, 4, 100),  # more than there are
    (5, 17, 3, 1, 3),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss", ["focal", "bce"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("views", "images", "dim", "hidden", "chunk"), SHAPES)
def test_float64_equals_the_list_of_pairs(views, images, dim, hidden, chunk, aggregation, loss, training):
    features, head = make(views, images, dim, hidden, aggregation, training=training)
    before = copy.deepcopy(head)
    expected, accuracy, (mean, var) = reference(features, head, views, loss)
    expected_grads = torch.autograd.grad(expected, [features, *head.parameters()])
    value, hits, grads = value_and_grads(relation_pairs_loss, features, head, views=views, loss=loss, chunk_views=chunk)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    assert abs(float(hits) - float(accuracy)) < 1e-6
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)
    old, new = before.bn1, head.bn1
    torch.testing.assert_close(new.running_mean, old.running_mean.lerp(mean, 0.1) if training else old.running_mean)
    torch.testing.assert_close(new.running_var, old.running_var.lerp(var, 0.1) if training else old.running_var)
    assert int(new.num_batches_tracked) == (1 if training else 0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_head_itself_judges_pairs_alike(aggregation, training):
    """`forward` on a list of pairs, through torch's BatchNorm."""
    features, head = make(5, 4, 6, 8, aggregation, training=training)
    left, right, target = pair_list(5, 4)
    twin = copy.deepcopy(head)
    expected = F.binary_cross_entropy_with_logits(twin(features[left], features[right]), target)
    expected_grads = torch.autograd.grad(expected, [features, *twin.parameters()])
    value, _, grads = value_and_grads(relation_pairs_loss, features, head, views=5, loss="bce")
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)
    for found, buffer in zip(head.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, buffer)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_bias_in_front_of_batchnorm_gets_a_gradient_of_zero(aggregation):
    """Not rounding noise, which Adam would turn into steps of the full learning rate."""
    features, head = make(4, 8, 6, 16, aggregation, torch.float32)
    relation_pairs_loss(features, head, views=4)[0].backward()
    assert torch.equal(head.linear1.bias.grad, torch.zeros(16))
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_float32(aggregation):
    features, head = make(8, 16, 32, 64, aggregation, torch.float32)
    wide, wide_head = features.detach().double().requires_grad_(), copy.deepcopy(head).double()
    expected, _, grads = value_and_grads(reference, wide, wide_head, 8)
    value, _, found = value_and_grads(relation_pairs_loss, features, head, views=8)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=5e-6, atol=0)
    names = ["features", *dict(head.named_parameters())]
    for name, grad, expected_grad in zip(names, found, grads, strict=True):
        # Pre-activations within rounding of 0 may take the other slope: upstream of the LeakyReLU that shows.
        if name != "linear1.bias":
            assert relative(grad, expected_grad) < 1e-4, name
    wide_loss = relation_pairs_loss(wide, wide_head, views=8)[0]
    torch.testing.assert_close(wide_loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(head.bn1.running_var.double(), wide_head.bn1.running_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_large_common_offset_does_not_spoil_the_statistics(aggregation):
    """E[h^2] - E[h]^2 in float32 would leave no digit of the variance here."""
    features, head = make(6, 9, 8, 16, aggregation, torch.float32)
    features = features.detach() + 3000.0
    expected, _, (_, var) = reference(features.double(), copy.deepcopy(head).double(), 6)
    head.bn1.momentum = 1.0
    value, _ = relation_pairs_loss(features, head, views=6)
    assert relative(head.bn1.running_var, var.detach()) < 1e-3
    torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_features_against_float64_on_the_same_rounded_numbers(aggregation, dtype):
    features, head = make(6, 9, 16, 32, aggregation, torch.float32)
    narrow = features.detach().to(dtype).requires_grad_()
    expected, _, expected_grads = value_and_grads(
        reference, narrow.detach().double().requires_grad_(), copy.deepcopy(head).double(), 6
    )
    value, _, grads = value_and_grads(relation_pairs_loss, narrow, head, views=6)
    assert (value.dtype, grads[0].dtype) == (torch.float32, dtype)
    assert {grad.dtype for grad in grads[1:]} == {torch.float32}
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert relative(grads[0], expected_grads[0]) < 5e-3  # the rounding of the returned gradient
    assert relative(grads[1], expected_grads[1]) < 1e-4


def test_float64_anywhere_makes_the_sums_float64():
    features, head = make(4, 5, 6)
    for x, module in ((features.float(), head), (features, copy.deepcopy(head).float())):
        value, _, grads = value_and_grads(relation_pairs_loss, x.detach().requires_grad_(), module, views=4)
        assert value.dtype == torch.float64
        assert [grad.dtype for grad in grads] == [x.dtype, *(p.dtype for p in module.parameters())]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_autocast_does_not_reach_inside(aggregation):
    features, head = make(4, 9, 16, 32, aggregation, torch.float32)
    outside = value_and_grads(relation_pairs_loss, features, copy.deepcopy(head), views=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = value_and_grads(relation_pairs_loss, features, head, views=4)
    assert torch.equal(inside[0], outside[0])
    assert all(torch.equal(a, b) for a, b in zip(inside[2], outside[2], strict=True))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", ["focal", "bce"])
def test_collapsed_features_and_huge_logits_stay_finite(aggregation, loss):
    features, head = make(4, 6, 5, 8, aggregation, torch.float32)
    collapsed = torch.ones_like(features).requires_grad_()
    expected = reference(collapsed.double(), copy.deepcopy(head).double(), 4, loss)
    value, accuracy, grads = value_and_grads(relation_pairs_loss, collapsed, head, views=4, loss=loss)
    # The variance is 0, so rounding is divided by the root of BatchNorm's eps.
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-3, atol=0)
    assert float(accuracy) == 0.5
    assert all(bool(grad.isfinite().all()) for grad in grads)
    head.linear2.weight.data.mul_(1e4)
    value, _, grads = value_and_grads(relation_pairs_loss, features, head, views=4, loss=loss)
    assert value.isfinite()
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_known_values_at_a_logit_of_zero():
    features, head = make(3, 4, 5)
    nn.init.zeros_(head.linear2.weight)
    nn.init.zeros_(head.linear2.bias)
    for loss, expected in (("focal", 0.5 * 0.25 * np.log(2)), ("bce", np.log(2))):
        value, accuracy = relation_pairs_loss(features, head, views=3, loss=loss)
        assert abs(value.item() - expected) < 1e-12
        assert float(accuracy) == 0.5  # all are called "not the same image"


# ---- gradient


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss", ["focal", "bce"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradcheck(aggregation, loss, training):
    """Of everything at once, the head being anything with its attributes; no difference crosses a kink here."""
    _, head = make(3, 3, 2, 3, aggregation, training=training)
    features = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def function(x, weight, bias, scale, shift, out_weight, out_bias):
        norm = SimpleNamespace(weight=scale, bias=shift, eps=1e-5, running_mean=mean, running_var=var)
        parts = {
            "linear1": SimpleNamespace(weight=weight, bias=bias, in_features=weight.shape[1]),
            "bn1": norm,
            "linear2": SimpleNamespace(weight=out_weight, bias=out_bias),
            "aggregation": aggregation,
            "negative_slope": 0.2,
            "training": training,
            "move_statistics": lambda mean, var: None,
        }
        return relation_pairs_loss(x, SimpleNamespace(**parts), views=3, loss=loss, chunk_views=2)[0]

    mean, var = head.bn1.running_mean, head.bn1.running_var
    assert torch.autograd.gradcheck(function, (features, *head.parameters()))


@pytest.mark.parametrize("aggregation", ["cat", "max"])
@pytest.mark.parametrize("factor", [0.0, -2.5, 65536.0])
def test_the_gradient_of_the_output_is_respected(aggregation, factor):
    features, head = make(4, 5, 6, 8, aggregation)
    _, _, expected = value_and_grads(reference, features, head, 4)
    (relation_pairs_loss(features, head, views=4)[0] * factor).backward()
    for x, grad in zip([features, *head.parameters()], expected, strict=True):
        torch.testing.assert_close(x.grad, grad * factor, rtol=1e-9, atol=1e-12 * max(1.0, abs(factor)))


def test_a_loss_scale_rescues_gradients_that_float16_cannot_hold():
    features, head = make(6, 400, 4, 8, dtype=torch.float32)
    head.linear2.weight.data.mul_(0.02)
    narrow = features.detach().half()
    expected = value_and_grads(reference, narrow.double().requires_grad_(), copy.deepcopy(head).double(), 6)[2][0]
    errors = {}
    for scale in (1, 4096):
        leaf = narrow.clone().requires_grad_()
        (relation_pairs_loss(leaf, head, views=6)[0] * scale).backward()
        errors[scale] = relative(leaf.grad.double() / scale, expected)
    assert errors[4096] < 1e-3 < errors[1]


@pytest.mark.parametrize("aggregation", ["cat", "max"])
def test_gradient_goes_where_it_is_wanted_only(aggregation):
    features, head = make(4, 5, 6, 8, aggregation)
    _, _, expected = value_and_grads(reference, features, head, 4)
    head.requires_grad_(False)
    relation_pairs_loss(features, head, views=4)[0].backward()
    torch.testing.assert_close(features.grad, expected[0], rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in head.parameters())
    head.requires_grad_(True)
    relation_pairs_loss(features.detach(), head, views=4)[0].backward()
    torch.testing.assert_close(head.linear1.weight.grad, expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("aggregation", ["cat", "max"])
def test_without_gradient_it_is_a_number_and_the_statistics_still_move(aggregation):
    features, head = make(4, 5, 6, 8, aggregation)
    expected, _, (mean, _) = reference(features, head, 4)
    head.bn1.momentum = 1.0
    with torch.no_grad(), Allocations() as seen:
        value, accuracy = relation_pairs_loss(features, head, views=4)
    assert not value.requires_grad
    assert not accuracy.requires_grad
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(head.bn1.running_mean, mean)
    with Allocations() as with_gradient:
        relation_pairs_loss(features, head, views=4)
    assert seen.operations < 0.7 * with_gradient.operations


def test_double_backward_is_refused():
    features, head = make(3, 4, 5)
    value = relation_pairs_loss(features, head, views=3)[0]
    (grad,) = torch.autograd.grad(value.square(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_inputs_may_be_overwritten_before_backward():
    features, head = make(3, 4, 5)
    _, _, expected = value_and_grads(reference, features, head, 3)
    buffer = features.detach().clone()
    leaf = buffer.requires_grad_()
    value = relation_pairs_loss(leaf, head, views=3)[0]
    with torch.no_grad():
        buffer.fill_(torch.nan)
        head.linear1.weight.fill_(torch.nan)
    value.backward()
    torch.testing.assert_close(leaf.grad, expected[0], rtol=1e-9, atol=1e-12)


def test_cumulative_momentum():
    features, head = make(3, 4, 5)
    head.bn1.momentum = None
    head.bn1.reset_running_stats()
    means = [reference(x, head, 3)[2][0] for x in (features, 2 * features)]
    for x in (features, 2 * features):
        relation_pairs_loss(x, head, views=3)
    torch.testing.assert_close(head.bn1.running_mean, (means[0] + means[1]) / 2)


# ---- memory


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("views", "images", "chunk"), [(32, 8, None), (8, 32, None), (6, 5, 1), (12, 2, None)])
def test_nothing_as_large_as_pairs_times_hidden_is_ever_made(views, images, chunk, aggregation):
    """The rows themselves, (K + 1) N x H in the prefix sums, or a tile are the largest."""
    features, head = make(views, images, 4, 64, aggregation, torch.float32)
    pairs = views * (views - 1) * images
    with Allocations() as seen:
        relation_pairs_loss(features, head, views=views, chunk_views=chunk)[0].backward()
    tile = 2 * images * (chunk or view_pairs.default_chunk(views, images, features.device))
    assert 0 < seen.largest <= max((views + 1) * images, tile) * 64 <= 0.3 * pairs * 64
    with Allocations() as seen:
        reference(features.double(), head.double(), views)[0].backward()
    assert seen.largest >= pairs * 64  # the counter does see such arrays


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_peak_memory_is_a_tenth_of_the_list_of_pairs(aggregation):
    """32 views and 256 hidden units, as published, of 16 images."""
    left, right, target = (x.float() if x.is_floating_point() else x for x in pair_list(32, 16))
    features, head = make(32, 16, 64, 256, aggregation, torch.float32)
    with Allocations() as naive:
        F.binary_cross_entropy_with_logits(head(features[left], features[right]), target).backward()
    features.grad = None
    head.zero_grad()
    with Allocations() as ours:
        relation_pairs_loss(features, head, views=32, loss="bce")[0].backward()
    assert 0 < ours.peak < 0.1 * naive.peak


# ---- the original code's numbers


def golden_head(case, aggregation):
    part = golden.part(PAIRS, f"{case}_{aggregation}__")
    state = {key: golden.tensor(x, torch.float32) for key, x in golden.part(part, "head.").items()}
    head = RelationHead(int(PAIRS[f"{case}__D"]), aggregation=aggregation)
    head.load_state_dict({**state, "bn1.num_batches_tracked": torch.tensor(0)})
    features = golden.tensor(PAIRS[f"{case}__features"], torch.float32).requires_grad_()
    return features, head, part


@pytest.mark.evidence(
    "relational", "L0", "focal and BCE, four aggregations: loss, all gradients, running statistics, pair accuracy",
    golden="relational_loss",
    tolerance={"float32": "loss 1e-5, gradient 2e-4", "float64": "loss 1e-12, gradient 2e-4 (stored in float32)"},
    gradient=True,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", ["focal", "bce"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("case", CASES)
def test_golden_loss_gradients_and_statistics(case, aggregation, loss, dtype):
    features, head, part = golden_head(case, aggregation)
    features, head = features.detach().to(dtype).requires_grad_(), head.to(dtype)
    value, accuracy = relation_pairs_loss(features, head, views=int(PAIRS[f"{case}__K"]), loss=loss)
    value.backward()
    single = dtype == torch.float32
    expected = part[f"loss_{loss}" if single else f"loss_{loss}_f64"]
    torch.testing.assert_close(value.double(), golden.tensor(expected).double(), rtol=1e-5 if single else 1e-12, atol=0)
    assert abs(100 * float(accuracy) - float(part["acc_all"])) < 1e-3
    tolerance = {"rtol": 2e-4, "atol": 2e-6}
    grad = golden.tensor(part[f"{loss}.grad_features"], dtype)
    torch.testing.assert_close(features.grad, grad, **tolerance)
    parameters = dict(head.named_parameters())
    grads = golden.part(part, f"{loss}.grad_head.")
    assert set(grads) == set(parameters)
    for name, grad in grads.items():
        torch.testing.assert_close(parameters[name].grad, golden.tensor(grad, dtype), **tolerance)
    for name in ("running_mean", "running_var"):
        found, after = getattr(head.bn1, name), golden.tensor(part[f"bn1.{name}_after"], dtype)
        torch.testing.assert_close(found, after, rtol=1e-5, atol=1e-6)
    assert int(head.bn1.num_batches_tracked) == 1


@pytest.mark.evidence(
    "relational", "L0", "the head's logits of the original's pairs, training and evaluation mode",
    golden="relational_loss", dtype="float32", tolerance="2e-5",
)  # fmt: skip
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("case", CASES)
def test_golden_logits(case, aggregation):
    features, head, part = golden_head(case, aggregation)
    left, right = (golden.tensor(PAIRS[f"{case}__pair_{side}"]) for side in ("left", "right"))
    with torch.no_grad():
        found = head.eval()(features[left], features[right])
        torch.testing.assert_close(found, golden.tensor(part["pred_eval"]), rtol=0, atol=2e-5)
        found = head.train()(features[left], features[right])
        torch.testing.assert_close(found, golden.tensor(part["pred"]), rtol=0, atol=2e-5)


# ---- the head, bad input


def test_the_head_has_the_originals_names_and_shapes():
    shapes = {name: tuple(x.shape) for name, x in RelationHead(24).state_dict().items()}
    assert shapes == {
        "linear1.weight": (256, 48),
        "linear1.bias": (256,),
        "bn1.weight": (256,),
        "bn1.bias": (256,),
        "bn1.running_mean": (256,),
        "bn1.running_var": (256,),
        "bn1.num_batches_tracked": (),
        "linear2.weight": (1, 256),
        "linear2.bias": (1,),
    }
    for aggregation in ("sum", "mean", "max"):
        assert RelationHead(24, 10, aggregation).linear1.weight.shape == (10, 24)


def test_the_heads_batchnorm_stays_local():
    head = set_norm(nn.Sequential(RelationHead(4), nn.BatchNorm1d(3)), "split(4)")
    assert str(head[0].bn1.kind) == "local"
    assert str(head[1].kind) == "split(4)"


def test_the_head_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match=r"unknown aggregation: 'means'; did you mean 'mean'\? Known: cat, sum, mean"):
        RelationHead(4, aggregation="means")
    with pytest.raises(ConfigError, match="sizes of at least 1; got 0 features"):
        RelationHead(0)


@pytest.mark.parametrize(
    ("shape", "options", "match"),
    [
        ((8, 6), {"views": 1}, "at least 2 views of each image, got views=1"),
        ((8, 6), {"views": 3}, r"a multiple of views=3; got 8\. Concatenate the views"),
        ((4, 6), {"views": 4}, r"at least 2 images, got N=1 \(K=4\): leave this batch out"),
        ((0, 6), {"views": 4}, "at least 2 images, got N=0"),
        ((8, 5), {"views": 4}, r"the head \(cat\) takes 6 features, got 5"),
        ((8,), {"views": 4}, r"expected floating-point features \(K\*N, D\), got \(8,\)"),
        ((8, 6), {"views": 4, "loss": "hinge"}, "loss must be one of focal, bce; got 'hinge'"),
        ((8, 6), {"views": 4, "chunk_views": 0}, "chunk_views must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(shape, options, match):
    with pytest.raises(ValueError, match=match):
        relation_pairs_loss(torch.zeros(shape), RelationHead(6), **options)


def test_wrong_dtypes_devices_and_heads_are_refused():
    head = RelationHead(6)
    with pytest.raises(ValueError, match=r"expected floating-point features .* torch.int64"):
        relation_pairs_loss(torch.zeros(8, 6, dtype=torch.int64), head, views=4)
    with pytest.raises(ValueError, match="features on meta, but the head is on cpu"):
        relation_pairs_loss(torch.zeros(8, 6, device="meta"), head, views=4)
    head.aggregation = "product"
    with pytest.raises(ValueError, match="aggregation must be one of cat, sum, mean, max; got 'product'"):
        relation_pairs_loss(torch.zeros(8, 6), head, views=4)
    head = RelationHead(6).eval()
    head.bn1.running_mean = None
    with pytest.raises(ValueError, match="needs running statistics"):
        relation_pairs_loss(torch.zeros(8, 6), head, views=4)
