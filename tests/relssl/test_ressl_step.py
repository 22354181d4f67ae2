"""Four full training steps of the original ReSSL code, through our method, optimizer and `run_update`."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines.batch import ViewBatch
from relssl.checkpoint import optimizer_tensors
from relssl.config import Optim, Schedule
from relssl.methods.base import DataInfo, Step
from relssl.methods.ressl import Method, ReSSLConfig
from relssl.train import make_optimizer, make_schedule, run_update
from tests.relssl import golden

ARRAYS = golden.load("ressl_step")
CASES = sorted({key.split("/")[0] for key in ARRAYS})
TOLERANCE = 1e-9  # float64, absolute


class Sequence(nn.Sequential):
    """The stub `seq`; its keys are those of the backbone inside `encoder_q.net`."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, features, 3, 2, 1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.feature_dim = features


class Residual(nn.Module):
    """The stub `res`: one residual block with a downsampling branch."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, features, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.downsample = nn.Sequential(nn.Conv2d(width, features, 1, 2, bias=False), nn.BatchNorm2d(features))
        self.feature_dim = features

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(x)) + self.downsample(x)).relu().mean((2, 3))


def original_name(name: str) -> str:
    """Our parameter or buffer name -> the original's."""
    for ours, theirs in (
        ("teacher.encoder.", "encoder_k.net."),
        ("teacher.head.", "encoder_k.head."),
        ("encoder.", "encoder_q.net."),
        ("head.", "encoder_q.head."),
        ("queue.keys", "queue"),
        ("queue.pointer", "queue_ptr"),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise KeyError(name)


def run_original_steps(case: str, dtype: torch.dtype) -> SimpleNamespace:
    """Build the method at the case's `init`, run every stored step, and collect what the data describes."""
    data = golden.part(ARRAYS, f"{case}/")
    init = golden.part(data, "init/")
    num_steps = len(data["losses"])
    hidden, features = init["encoder_q.head.linear1.weight"].shape
    embed, queue_size = init["queue"].shape
    batch = len(data["step0/teacher"])
    residual = "encoder_q.net.conv1.weight" in init
    width = init["encoder_q.net.conv1.weight" if residual else "encoder_q.net.0.weight"].shape[0]
    per_epoch = int(data["iters_per_epoch"])
    info = DataInfo(batch * per_epoch, None, batch, per_epoch * int(data["epochs"]), per_epoch)
    config = ReSSLConfig(
        hidden_dim=hidden,
        embed_dim=embed,
        queue_size=queue_size,
        momentum=float(data["ema_momentum"]),
        tau_student=float(data["tau_s"]),
        tau_teacher=float(data["tau_t"]),
    )
    method = Method(lambda: (Residual if residual else Sequence)(width, features), config, info).to(dtype)
    state = {}
    for name in method.state_dict():
        value = init[original_name(name)]
        state[name] = golden.tensor(value.T if name == "queue.keys" else value)
    method.load_state_dict(state)
    optim = Optim(
        lr=float(data["base_lr"]),
        momentum=float(data["sgd_momentum"]),
        weight_decay=float(max(data["group0_weight_decay"], data["group1_weight_decay"])),
        exclude="by_name",
        schedule=Schedule(warmup_epochs=float(data["warmup_epochs"])),
    )
    optimizer = make_optimizer(optim, method)
    schedule = make_schedule(optim, per_epoch, info.total_updates, batch)
    names = {id(p): name for name, p in method.named_parameters()}
    decay = {original_name(names[id(p)]): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    out = SimpleNamespace(
        losses=[], lr=[], pointer=[], state={}, momentum={}, decay=decay, data=data, num_steps=num_steps
    )
    for s in range(num_steps):
        update = int(data["first_step"]) + s
        step = Step(update=update, epoch=update // per_epoch)
        metrics = run_update(method, optimizer, [views(data, s, dtype)], step, schedule=schedule, num_images=batch)
        out.losses.append(float(metrics["loss"]))
        out.lr.append(schedule(update))
        out.pointer.append(int(method.queue.pointer))
        out.state[s + 1] = {original_name(k): v.clone() for k, v in method.state_dict().items()}
        tensors = optimizer_tensors(optimizer, names)
        out.momentum[s + 1] = {
            original_name(key.removesuffix("/momentum_buffer")): value.clone() for key, value in tensors.items()
        }
    return out


def views(data: dict[str, np.ndarray], s: int, dtype: torch.dtype) -> ViewBatch:
    teacher = golden.tensor(data[f"step{s}/teacher"], dtype)
    students = []
    while f"step{s}/student{len(students)}" in data:
        students.append(golden.tensor(data[f"step{s}/student{len(students)}"], dtype))
    place = torch.arange(len(teacher))
    return ViewBatch({"teacher": (teacher,), "student": tuple(students)}, place, place, place)


def assert_close(ours: Any, theirs: np.ndarray, tolerance: float, what: str) -> float:
    """The largest difference, when it is small enough."""
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape, what
    error = float(np.abs(ours - theirs).max())
    limit = 0 if theirs.dtype.kind in "iu" else tolerance
    assert error <= limit, f"{what}: off by {error}"
    return error


@pytest.mark.evidence(
    "ressl", "L1", "losses, lr, both networks, statistics, queue, momentum",
    golden="ressl_step", dtype="float64", tolerance=TOLERANCE,
)  # fmt: skip
@pytest.mark.parametrize("case", CASES)
def test_four_steps_equal_the_original_in_float64(case: str, record_property: Callable[[str, object], None]) -> None:
    out = run_original_steps(case, torch.float64)
    data = out.data
    errors = [
        assert_close(out.losses, data["losses"], TOLERANCE, "losses"),
        assert_close(out.lr, data["lr"], TOLERANCE, "lr"),
        assert_close(out.pointer, data["queue_ptr"], 0, "queue pointer"),
    ]
    for s in range(1, out.num_steps + 1):
        for key, value in golden.part(data, f"after{s}/").items():
            ours = out.state[s][key]
            errors.append(assert_close(ours.T if key == "queue" else ours, value, TOLERANCE, f"after{s}/{key}"))
        for key, value in golden.part(data, f"momentum{s}/").items():
            errors.append(assert_close(out.momentum[s][key], value, TOLERANCE, f"momentum{s}/{key}"))
    assert len(errors) > 3 + 2 * len(out.momentum[1])  # the archive held what it promises
    for name, value in (("steps", out.num_steps), ("arrays", len(errors)), ("largest_error", max(errors))):
        record_property(name, value)


@pytest.mark.evidence(
    "ressl", "L1", "losses, and networks, statistics and queue after the last step",
    golden="ressl_step", dtype="float32", tolerance="1e-5 of the largest entry",
)  # fmt: skip
@pytest.mark.parametrize("case", CASES)
def test_four_steps_are_close_in_float32(case: str, record_property: Callable[[str, object], None]) -> None:
    out = run_original_steps(case, torch.float32)
    record_property("steps", out.num_steps)
    last = out.num_steps
    np.testing.assert_allclose(out.losses, out.data["losses"], rtol=1e-5)
    for key, value in golden.part(out.data, f"after{last}/").items():
        ours = out.state[last][key].numpy()
        limit = 1e-5 * max(np.abs(value).max(), 0.1)
        assert np.abs((ours.T if key == "queue" else ours) - value).max() <= limit, key


@pytest.mark.evidence("ressl", "L1", "which parameters are decayed", golden="ressl_step", tolerance="exact")
@pytest.mark.parametrize("case", CASES)
def test_parameter_groups_are_the_originals(case: str) -> None:
    """Of the trainable parameters; the original lists the teacher's too, which never change."""
    out = run_original_steps(case, torch.float64)
    theirs = {
        str(name): float(out.data[f"group{g}_weight_decay"]) for g in (0, 1) for name in out.data[f"group{g}_names"]
    }
    assert out.decay == {name: theirs[name] for name in out.decay}
    assert set(out.decay) == {name for name in theirs if not name.startswith("encoder_k.")}
