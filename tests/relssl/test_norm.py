"""BatchNorm: torch's own under `local`, whole groups under `split(n)`, the global batch under `sync`.

The statements about many processes and micro-batches are proved by comparison with one process that holds the
global batch in position order.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipelines.errors import ConfigError
from relssl import dist
from relssl.nets import BatchNorm1d, BatchNorm2d, parse_norm, set_norm
from tests.relssl.dist_helpers import run_ranks

G, C, N_SPLITS = 24, 5, 4  # global batch, channels, splits: 6 images a group


def layer(kind="local", cls=BatchNorm2d, dtype=torch.float64, num_micro=1, **options):
    """A BatchNorm whose weights and running statistics are not at their defaults."""
    norm = cls(C, **options).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(C, generator=generator) + 0.5)
    return set_norm(norm, kind, num_micro)


def images(*shape, dtype=torch.float64, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * x + torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)) * 0.2 + 5).to(dtype)


def loss_of(y, position):
    """Not symmetric in the images, so that a mixed-up order shows."""
    weight = torch.cos(torch.arange(y[0].numel(), dtype=y.dtype)).view(y[0].shape)
    return (y.sin() * weight * (1 + position.to(y.dtype)).view(-1, *[1] * (y.dim() - 1))).flatten(1).sum(1)


def split_reference(x, norm, groups):
    """Group by group, from the definition."""
    out = torch.empty_like(x)
    means, variances = [], []
    for g in range(groups):
        rows = x[g::groups].transpose(0, 1).flatten(1)
        mean, var = rows.mean(1), rows.var(1, correction=0)
        shape = (1, -1, *[1] * (x.dim() - 2))
        normalised = (x[g::groups] - mean.view(shape)) / (var.view(shape) + norm.eps).sqrt()
        out[g::groups] = normalised * norm.weight.view(shape) + norm.bias.view(shape)
        means.append(mean)
        variances.append(rows.var(1, correction=1))
    return out, torch.stack(means).mean(0), torch.stack(variances).mean(0)


# ---- settings


def test_parse_norm():
    assert parse_norm("local") == ("local", 0)
    assert parse_norm("sync") == ("sync", 0)
    assert parse_norm("split(8)") == ("split", 8)
    assert str(parse_norm("split( 8 )")) == "split(8)"
    assert parse_norm(parse_norm("split(8)")) == ("split", 8)


@pytest.mark.parametrize("kind", ["", "batch", "split", "split()", "split(0)", "split(-1)", "split(8", "Sync", None, 8])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(ConfigError, match="'local', 'sync' or 'split"):
        parse_norm(kind)


def test_set_norm_reaches_every_batch_norm_and_keeps_the_tensors():
    shared = nn.BatchNorm2d(4)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.Sequential(shared, BatchNorm2d(4)), nn.BatchNorm1d(4), shared)
    before = dict(net.named_parameters(remove_duplicate=False)) | dict(net.named_buffers(remove_duplicate=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net.eval()
    assert set_norm(net, "split(8)", num_micro=2) is net
    norms = [m for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    assert [type(m) for m in norms] == [BatchNorm2d, BatchNorm2d, BatchNorm1d]
    assert all(m.kind == ("split", 8) and m.local_splits == 4 and not m.training for m in norms)
    assert net[1] is net[2][0] is net[4]
    after = dict(net.named_parameters(remove_duplicate=False)) | dict(net.named_buffers(remove_duplicate=False))
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert {id(p) for p in net.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    assert copy.deepcopy(net)[1].kind == ("split", 8)


def test_set_norm_of_a_bare_layer_returns_the_replacement():
    norm = nn.BatchNorm1d(4, eps=1e-3, momentum=0.2, affine=False)
    ours = set_norm(norm, "sync")
    assert isinstance(ours, BatchNorm1d)
    assert (ours.eps, ours.momentum, ours.affine) == (1e-3, 0.2, False)
    assert list(ours.state_dict()) == list(norm.state_dict())


def test_a_locked_module_stays_local():
    head = nn.Sequential(nn.Linear(4, 4), BatchNorm1d(4))
    head.norm_locked = True
    net = nn.ModuleDict({"body": nn.Sequential(BatchNorm1d(4)), "head": head})
    set_norm(net, "split(2)")
    assert net["body"][0].kind == ("split", 2)
    assert net["head"][1].kind == ("local", 0)


def test_what_cannot_be_set_is_refused():
    with pytest.raises(ConfigError, match="divisible by world size x accumulation = 1 x 3 = 3"):
        set_norm(layer(), "split(4)", num_micro=3)
    with pytest.raises(ConfigError, match="BatchNorm3d"):
        set_norm(nn.Sequential(nn.BatchNorm3d(2)), "sync")
    assert isinstance(set_norm(nn.Sequential(nn.BatchNorm3d(2)), "local")[0], nn.BatchNorm3d)


def test_a_batch_that_does_not_make_equal_groups_is_refused():
    with pytest.raises(ConfigError, match=r"6 images .* do not make 4 equal groups"):
        layer("split(4)")(images(6, C, 2, 2))
    with pytest.raises(ConfigError, match="no variance"):
        layer("split(4)", BatchNorm1d)(images(4, C))
    with pytest.raises(ValueError, match="4D"):
        layer("split(4)")(images(8, C))


# ---- one process


@pytest.mark.parametrize("kind", ["local", "sync", "split(1)"])
@pytest.mark.parametrize("training", [True, False])
def test_one_group_is_torchs_own_batch_norm_bit_for_bit(kind, training):
    ours = layer(kind, dtype=torch.float32).train(training)
    torchs = nn.BatchNorm2d(C)
    torchs.load_state_dict(ours.state_dict())
    torchs.train(training)
    x = images(6, C, 3, 3, dtype=torch.float32)
    assert torch.equal(ours(x), torchs(x))
    for (name, a), b in zip(ours.state_dict().items(), torchs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_split_in_evaluation_is_torchs_own():
    norm = layer("split(4)").eval()
    x = images(7, C, 3, 3)  # need not be divisible
    y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, norm.eps)
    assert torch.equal(norm(x), y)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [(shape, "channels_last") for shape in ((24, C, 3, 4), (24, C, 1, 1), (8, C, 2, 2))]
    + [(shape, layout) for shape in ((24, C, 3, 4), (24, C), (24, C, 7)) for layout in ("contiguous", "strided")],
)
def test_split_normalises_each_group_and_averages_their_statistics(shape, layout):
    cls = BatchNorm2d if len(shape) == 4 else BatchNorm1d
    norm = layer("split(4)", cls)
    old_mean, old_var = norm.running_mean.clone(), norm.running_var.clone()
    x = images(*shape)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.stack([x, -x], dim=-1)[..., 0]
    out = norm(x)
    expected, mean, var = split_reference(x, norm, 4)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_mean, 0.9 * old_mean + 0.1 * mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, 0.9 * old_var + 0.1 * var, rtol=1e-12, atol=1e-12)
    assert norm.num_batches_tracked == 1
    if layout == "channels_last":
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_split_gradients_and_the_relu_in_place_that_follows(layout):
    x = images(8, C, 2, 3).contiguous(memory_format=layout)
    position = torch.arange(8)

    def grads(forward):
        norm = layer("split(4)")
        leaf = x.clone().requires_grad_()
        y = F.relu(forward(norm, leaf), inplace=True)
        loss_of(y, position).sum().backward()
        return leaf.grad, norm.weight.grad, norm.bias.grad

    ours = grads(lambda norm, leaf: norm(leaf))
    expected = grads(lambda norm, leaf: split_reference(leaf, norm, 4)[0] + 0.0)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_split_of_half_precision_input_keeps_statistics_in_float32(dtype, layout):
    """Autocast hands over narrow images and wide weights.  A mean of 1000 would be off by 4 if summed in
    bfloat16."""
    norm = layer("split(4)", dtype=torch.float32, momentum=1.0)
    x = (images(24, C, 4, 4, dtype=torch.float32) + 1000).to(dtype).contiguous(memory_format=layout)
    out = norm(x)
    _, mean, var = split_reference(x.double(), norm.double(), 4)
    assert out.dtype == dtype
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-3, atol=0)


def test_cumulative_average_and_missing_parts():
    x = images(8, C, 2, 2)
    cumulative = layer("split(4)", momentum=None)
    _, mean, _ = split_reference(x, cumulative, 4)
    cumulative(x)
    torch.testing.assert_close(cumulative.running_mean, mean)
    cumulative(x + 2)
    torch.testing.assert_close(cumulative.running_mean, mean + 1)

    bare = set_norm(BatchNorm2d(C, affine=False, track_running_stats=False).double(), "split(4)")
    unit = layer("split(4)")
    with torch.no_grad():
        unit.weight.fill_(1), unit.bias.zero_()
    expected, *_ = split_reference(x, unit, 4)
    torch.testing.assert_close(bare(x), expected)
    torch.testing.assert_close(bare.eval()(x), expected)


def test_a_compiled_split_layer_gives_the_same_numbers():
    """Through the tracing front end only: the code generator needs a compiler that a test machine may
    lack."""
    norm, x = layer("split(4)"), images(8, C, 2, 2).contiguous(memory_format=torch.channels_last)
    eager = copy.deepcopy(norm)
    leaf, leaf2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = torch.compile(norm, backend="aot_eager", fullgraph=True)(leaf)
    expected = eager(leaf2)
    torch.testing.assert_close(out, expected)
    loss_of(out, torch.arange(8)).sum().backward()
    loss_of(expected, torch.arange(8)).sum().backward()
    torch.testing.assert_close(leaf.grad, leaf2.grad)
    torch.testing.assert_close(norm.running_var, eager.running_var)


# ---- accumulation and processes, against one process with the global batch


def one_pass(kind, x, cls):
    """Output, gradients and running statistics of one process that sees the global batch at once."""
    norm = layer(kind, cls)
    leaf = x.clone().requires_grad_()
    y = norm(leaf)
    loss_of(y, torch.arange(len(x))).mean().backward()
    return {"y": y.detach(), "dx": leaf.grad, "dw": norm.weight.grad, "db": norm.bias.grad} | {
        name: buffer.clone() for name, buffer in norm.named_buffers()
    }


def shared_out(rank, kind, num_micro, shapes, layout):
    """The same by W processes and A micro-batches; gradients averaged over both, as training does."""
    out = {}
    for shape in shapes:
        x = images(*shape).contiguous(memory_format=layout if len(shape) == 4 else torch.contiguous_format)
        norm = layer(kind, BatchNorm2d if len(shape) == 4 else BatchNorm1d, num_micro=num_micro)
        world = dist.world_size()
        y, dx = torch.zeros_like(x), torch.zeros_like(x)
        for micro in range(num_micro):
            position = dist.local_slice(torch.arange(len(x)), micro=micro, num_micro=num_micro)
            leaf = x[position].clone().requires_grad_()
            out_local = norm(leaf)
            (loss_of(out_local, position).mean() / num_micro).backward()
            # A rank's loss is the mean of its own rows; the run's loss is the mean over ranks.
            y[position], dx[position] = out_local.detach(), leaf.grad / world
        total = {"y": y, "dx": dx, "dw": norm.weight.grad / world, "db": norm.bias.grad / world}
        total = {name: dist.all_reduce_sum(value) for name, value in total.items()}
        out[str(shape)] = total | {name: buffer.clone() for name, buffer in norm.named_buffers()}
    return out


SHAPES = [(G, C, 3, 2), (G, C), (G, C, 3)]


@pytest.mark.parametrize("num_micro", [1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_split_groups_are_the_same_images_however_the_batch_is_shared_out(world, num_micro):
    arguments = (f"split({N_SPLITS})", num_micro, SHAPES, torch.channels_last)
    results = run_ranks(shared_out, world, *arguments) if world > 1 else [shared_out(0, *arguments)]
    for shape in SHAPES:
        expected = one_pass(f"split({N_SPLITS})", images(*shape), BatchNorm2d if len(shape) == 4 else BatchNorm1d)
        for result in results:
            found = result[str(shape)]
            for name in ("y", "dx", "dw", "db"):
                torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)
            if num_micro == 1:  # with accumulation they move once per micro-batch
                for name in ("running_mean", "running_var", "num_batches_tracked"):
                    torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)
            for name in ("running_mean", "running_var"):
                assert torch.equal(found[name], results[0][str(shape)][name])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sync_equals_one_process_with_the_global_batch(layout):
    results = run_ranks(shared_out, 2, "sync", 1, SHAPES, layout)
    for shape in SHAPES:
        expected = one_pass("sync", images(*shape), BatchNorm2d if len(shape) == 4 else BatchNorm1d)
        for result in results:
            for name, value in result[str(shape)].items():
                torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)
        for name in ("running_mean", "running_var"):
            assert torch.equal(results[0][str(shape)][name], results[1][str(shape)][name])


def _sync_corners(rank):
    """Unequal batches, an offset that breaks E[x^2] - E[x]^2, half precision, no affine, evaluation mode,
    gradcheck."""
    out = {}
    x = images(9, C, 2, 2)
    uneven = x[:3] if rank == 0 else x[3:]
    norm = layer("sync")
    out["uneven"] = (norm(uneven).detach(), norm.running_var.clone())

    far = layer("sync", dtype=torch.float32)
    rows = (images(8, C, 2, 2, dtype=torch.float32) + 4096)[rank::2]
    out["far"] = far(rows).detach()
    out["eval"] = far.eval()(rows).detach()

    narrow = layer("sync", dtype=torch.float32)
    leaf = x[rank::2][:4].bfloat16().requires_grad_()
    y = narrow(leaf)
    loss_of(y.float(), torch.arange(4)).sum().backward()
    out["narrow"] = (
        y.dtype == leaf.grad.dtype == torch.bfloat16,
        narrow.running_mean.clone(),
        y.detach().float(),
    )

    bare = set_norm(BatchNorm1d(C, affine=False).double(), "sync")
    out["bare"] = bare(x[rank::2][:4].mean((2, 3))).detach()
    relu = F.relu(layer("sync")(x[rank::2][:4].requires_grad_()), inplace=True)
    relu.sum().backward()
    return out


def test_sync_corner_cases():
    first, second = run_ranks(_sync_corners, 2)
    x = images(9, C, 2, 2)
    reference = layer()
    expected = reference(x).detach()
    torch.testing.assert_close(torch.cat([first["uneven"][0], second["uneven"][0]]), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first["uneven"][1], reference.running_var, rtol=1e-12, atol=1e-12)

    rows = images(8, C, 2, 2, dtype=torch.float32) + 4096
    expected = layer()(rows.double())
    # float32 holds 4096 + x to 2e-4, so do not ask for more than the input's own resolution.
    torch.testing.assert_close(first["far"].double(), expected[::2], rtol=0, atol=2e-3)
    torch.testing.assert_close(second["far"].double(), expected[1::2], rtol=0, atol=2e-3)
    assert not torch.allclose(first["eval"], first["far"])

    rows = torch.stack([x[0::2][:4], x[1::2][:4]]).bfloat16().double()
    reference = layer()
    expected = reference(rows.flatten(0, 1)).view(rows.shape)
    for rank, result in enumerate((first, second)):
        assert result["narrow"][0]
        torch.testing.assert_close(result["narrow"][1].double(), reference.running_mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(result["narrow"][2].double(), expected[rank], rtol=1e-2, atol=1e-2)

    rows = torch.cat([x[0::2][:4], x[1::2][:4]]).mean((2, 3))
    expected = F.batch_norm(rows, None, None, training=True)
    torch.testing.assert_close(torch.cat([first["bare"], second["bare"]]), expected, rtol=1e-12, atol=1e-12)


def _compiled(rank):
    """The collectives stay outside the graph, so the layer compiles into two or more of them."""
    out = {}
    for kind in ("sync", "split(4)"):
        norm, x = layer(kind), images(8, C, 2, 2)[rank::2]
        eager = copy.deepcopy(norm)
        found = torch.compile(norm, backend="aot_eager")(x.clone().requires_grad_())
        out[kind] = [(found.detach(), eager(x).detach()), (norm.running_var, eager.running_var)]
    return out


@pytest.mark.slow
def test_compiled_layers_on_two_processes():
    for result in run_ranks(_compiled, 2):
        for pairs in result.values():
            for found, expected in pairs:
                torch.testing.assert_close(found, expected.clone())


def _refusals(rank):
    try:
        set_norm(BatchNorm2d(2), "split(3)")
    except ConfigError as error:
        return str(error)
    return ""


def test_splits_that_ranks_would_cut_are_refused():
    for message in run_ranks(_refusals, 2):
        assert "world size x accumulation = 2 x 1 = 2" in message
