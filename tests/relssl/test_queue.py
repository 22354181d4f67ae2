"""The queue of keys and the moving-average teacher."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.errors import ConfigError
from relssl.nets import KeyQueue, ema_update, make_teacher
from tests.relssl import golden


def numbered(*numbers, dim=3):
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1).expand(-1, dim)


def test_a_new_queue_holds_unit_rows_from_the_given_generator():
    queue = KeyQueue(64, 8, torch.Generator().manual_seed(1))
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(64))
    assert torch.equal(queue.keys, KeyQueue(64, 8, torch.Generator().manual_seed(1)).keys)
    assert not torch.equal(queue.keys, KeyQueue(64, 8, torch.Generator().manual_seed(2)).keys)
    normal = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(queue.keys, normal / normal.norm(dim=1, keepdim=True))
    assert {name: (tuple(b.shape), b.dtype) for name, b in queue.state_dict().items()} == {
        "keys": ((64, 8), torch.float32),
        "pointer": ((1,), torch.int64),
    }
    assert not list(queue.parameters())


@pytest.mark.parametrize(("size", "pushes"), [(5, [2, 2, 2, 5, 1, 0, 3]), (4, [4, 4]), (7, [3] * 9), (1, [1, 1])])
def test_push_overwrites_the_oldest_and_wraps(size, pushes):
    queue = KeyQueue(size, 3)
    ring = queue.keys.clone().numpy()
    number, place = 0, 0
    for count in pushes:
        queue.push(numbered(*range(number, number + count)))
        for i in range(count):
            ring[(place + i) % size] = number + i
        number, place = number + count, (place + count) % size
        np.testing.assert_array_equal(queue.keys.numpy(), ring)
        assert queue.pointer.tolist() == [place]


def test_push_takes_other_dtypes_and_leaves_no_graph():
    queue = KeyQueue(4, 3)
    queue.push(numbered(1, 2).double().requires_grad_())
    queue.push(numbered(3).bfloat16())
    assert queue.keys.dtype == torch.float32
    assert not queue.keys.requires_grad
    assert queue.keys[:3, 0].tolist() == [1, 2, 3]
    assert KeyQueue(4, 3).double().keys.dtype == torch.float64


def test_what_does_not_fit_is_refused_and_nothing_is_lost():
    queue = KeyQueue(4, 3)
    before = queue.keys.clone()
    with pytest.raises(ConfigError, match="queue of 4 keys cannot take 5"):
        queue.push(torch.zeros(5, 3))
    for wrong in (torch.zeros(2, 4), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"shape \(G, 3\)"):
            queue.push(wrong)
    assert torch.equal(queue.keys, before)
    for size, dim in ((0, 3), (3, 0), (-1, 3)):
        with pytest.raises(ConfigError, match="size >= 1 and dim >= 1"):
            KeyQueue(size, dim)


# ---- teacher


def test_a_teacher_is_a_frozen_copy():
    student = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    teacher = make_teacher(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert teacher.training
    for (name, a), b in zip(student.state_dict().items(), teacher.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
        assert a.data_ptr() != b.data_ptr(), name


def ema_net(arrays, prefix):
    """The golden file's tiny net: Linear, BatchNorm, Linear, sizes read from the arrays."""
    first, last = arrays[f"{prefix}0.weight"].shape, arrays[f"{prefix}2.weight"].shape
    return nn.Sequential(nn.Linear(first[1], first[0]), nn.BatchNorm1d(first[0]), nn.Linear(last[1], last[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_ema(dtype):
    arrays = golden.load("ressl_loss")
    student, teacher = ema_net(arrays, "ema_q0_").to(dtype), ema_net(arrays, "ema_k0_").to(dtype)
    teacher.requires_grad_(False)
    names = [name for name, _ in teacher.named_parameters()]
    assert set(golden.part(arrays, "ema_k_")) == set(names)
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            p.copy_(golden.tensor(arrays[f"ema_k0_{name}"]))
    teacher[1].running_mean.fill_(7.0)
    buffers = copy.deepcopy(dict(teacher.named_buffers()))
    momentum = round(float(arrays["ema_momentum"]), 6)
    exact = {name: arrays[f"ema_k0_{name}"].astype(np.float64) for name in names}
    for update in range(len(arrays[f"ema_q_{names[0]}"])):
        with torch.no_grad():
            for name, p in student.named_parameters():
                p.copy_(golden.tensor(arrays[f"ema_q_{name}"][update]))
        ema_update(teacher, student, momentum)
        for name, p in teacher.named_parameters():
            torch.testing.assert_close(p.float(), golden.tensor(arrays[f"ema_k_{name}"][update]), rtol=0, atol=1e-6)
            exact[name] = momentum * exact[name] + (1 - momentum) * arrays[f"ema_q_{name}"][update].astype(np.float64)
            tolerance = 1e-9 if dtype == torch.float64 else 1e-6
            np.testing.assert_allclose(p.numpy(), exact[name], rtol=0, atol=tolerance)
    for name, buffer in teacher.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_ema_at_the_ends_and_bad_arguments():
    student, teacher = nn.Linear(2, 2), make_teacher(nn.Linear(2, 2))
    before = teacher.weight.clone()
    ema_update(teacher, student, 1.0)
    assert torch.equal(teacher.weight, before)
    ema_update(teacher, student, 0.0)
    assert torch.equal(teacher.weight, student.weight)
    assert not torch.equal(teacher.weight, before)
    for momentum in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            ema_update(teacher, student, momentum)
    with pytest.raises(ValueError, match="same parameters, got 2 and 2 tensors of different shapes"):
        ema_update(nn.Linear(3, 2), student, 0.9)
    with pytest.raises(ValueError, match="got 1 and 2"):
        ema_update(nn.Linear(2, 2, bias=False), student, 0.9)
