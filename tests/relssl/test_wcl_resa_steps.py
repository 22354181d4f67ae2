"""Four full training steps of the original WCL and ReSA codes, through our methods, optimizers and `run_update`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.batch import ViewBatch
from pipelines.errors import ConfigError
from relssl.checkpoint import optimizer_tensors
from relssl.config import Optim, Schedule
from relssl.losses import connected_components
from relssl.methods import load_method
from relssl.methods.base import DataInfo, Method, Step
from relssl.train import make_optimizer, make_schedule, run_update
from tests.relssl import golden
from tests.relssl.test_ressl_step import Residual, Sequence

WCL, RESA = golden.load("wcl_step"), golden.load("resa_step")
TOLERANCE = 1e-9  # float64, absolute


def cases(arrays: dict[str, np.ndarray]) -> list[str]:
    return sorted({key.split("/")[0] for key in arrays})


class Run:
    """A method at the stored initial state, with the original's names for its parameters."""

    def __init__(
        self, name: str, data: dict[str, np.ndarray], names: dict[str, str], dtype: torch.dtype, optim: Optim,
        info: DataInfo, **settings: Any,
    ):  # fmt: skip
        init = golden.part(data, "init/")
        backbone = next(
            prefix for prefix in names.values() if f"{prefix}0.weight" in init or f"{prefix}conv1.weight" in init
        )
        residual = f"{backbone}conv1.weight" in init
        width, features = (
            len(init[f"{backbone}{key}"])
            for key in (("conv1.weight", "conv2.weight") if residual else ("0.weight", "3.weight"))
        )
        cls = load_method(name)
        self.names = names
        self.method: Method = cls(
            lambda: (Residual if residual else Sequence)(width, features), cls.Config(**settings), info
        ).to(dtype)
        ours = {self.original(key): key for key in self.method.state_dict()}
        assert ours.keys() == init.keys()
        self.method.load_state_dict({ours[key]: golden.tensor(value) for key, value in init.items()})
        self.optimizer = make_optimizer(optim, self.method)
        self.schedule = make_schedule(optim, info.updates_per_epoch, info.total_updates, info.global_batch)

    def original(self, name: str) -> str:
        for ours, theirs in self.names.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        raise KeyError(name)

    def update(self, batch: ViewBatch, update: int) -> dict[str, float]:
        step = Step(update=update, epoch=0)
        metrics = run_update(self.method, self.optimizer, [batch], step, schedule=self.schedule, num_images=len(batch))
        return {key: float(value) for key, value in metrics.items()}

    def state(self) -> dict[str, Tensor]:
        return {self.original(key): value for key, value in self.method.state_dict().items()}

    def momentum(self) -> dict[str, Tensor]:
        names = {id(p): name for name, p in self.method.named_parameters()}
        tensors = optimizer_tensors(self.optimizer, names)
        return {self.original(key.removesuffix("/momentum_buffer")): value for key, value in tensors.items()}


def difference(ours: Tensor, theirs: np.ndarray, limit: float, what: str) -> float:
    """The largest difference of two arrays, which must be within the limit; counters are equal."""
    assert tuple(ours.shape) == theirs.shape, what
    if theirs.dtype.kind in "iu":
        assert (ours.numpy() == theirs).all(), what
        return 0.0
    apart = float(np.abs(ours.double().numpy() - theirs).max())
    assert apart <= limit, f"{what}: off by {apart}"
    return apart


def batch_of(views: dict[str, tuple[Tensor, ...]]) -> ViewBatch:
    place = torch.arange(len(next(iter(views.values()))[0]))
    return ViewBatch(views, place, place, place)


def tell(record_property: Callable[[str, object], None], steps: int, apart: list[float]) -> None:
    """What the test has seen, for the record of evidence; differences in float32 are not of one scale."""
    record_property("steps", steps)
    if apart:
        record_property("arrays", len(apart))
        record_property("largest_error", max(apart))


# -- WCL ---------------------------------------------------------------------------------------------------------------


def start_wcl(case: str, dtype: torch.dtype) -> tuple[Run, dict[str, np.ndarray], int]:
    data = golden.part(WCL, f"{case}/")
    hidden = len(data["init/head1.linear1.weight"])
    embed = len(data["init/head1.linear3.weight"])
    batch, per_epoch = len(data["step0/view0"]), int(data["iters_per_epoch"])
    info = DataInfo(batch * per_epoch, None, batch, per_epoch * int(data["epochs"]), per_epoch)
    optim = Optim(
        name="lars",
        lr=float(data["base_lr"]),
        momentum=float(data["sgd_momentum"]),
        trust_coefficient=float(data["trust_coef"]),
        weight_decay=float(max(data["group0_weight_decay"], data["group1_weight_decay"])),
        exclude="by_name",
        schedule=Schedule(warmup_epochs=float(data["warmup_epochs"])),
    )
    names = {"encoder.": "net.", "head1.": "head1.", "head2.": "head2."}
    settings = {"hidden_dim": hidden, "embed_dim": embed, "temperature": float(data["temperature"])}
    return Run("wcl", data, names, dtype, optim, info, **settings), data, int(data["first_step"])


def wcl_views(data: dict[str, np.ndarray], s: int, dtype: torch.dtype) -> ViewBatch:
    return batch_of({"view": tuple(golden.tensor(data[f"step{s}/view{v}"], dtype) for v in (0, 1))})


@pytest.mark.evidence(
    "wcl", "L1", "both losses, graphs, parameters, statistics, momentum and learning rates",
    golden="wcl_step", dtype="float64", tolerance=TOLERANCE,
)  # fmt: skip
@pytest.mark.parametrize("case", cases(WCL))
def test_four_steps_of_wcl_equal_the_original(
    case: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    run, data, first = start_wcl(case, torch.float64)
    graphs: list[Tensor] = []

    def watched(neighbours: Tensor) -> Tensor:
        graphs.append(connected_components(neighbours))
        return graphs[-1]

    monkeypatch.setattr("relssl.methods.wcl.connected_components", watched)
    apart: list[float] = []
    for s in range(len(data["losses"])):
        metrics = run.update(wcl_views(data, s, torch.float64), first + s)
        for key, stored in (("loss", "losses"), ("instance_loss", "ntxent_losses"), ("graph_loss", "graph_losses")):
            assert metrics[key] == pytest.approx(data[stored][s], abs=TOLERANCE), key
        assert metrics["components"] == data["n_components"][s, 0]
        for v, labels in enumerate(graphs[-2:]):
            assert ((labels[:, None] == labels).numpy() == data["mask"][s, v]).all()
        assert run.schedule(first + s) == pytest.approx(data["lr"][s], abs=TOLERANCE)
        for kind, ours in (("after", run.state()), ("momentum", run.momentum())):
            for key, value in golden.part(data, f"{kind}{s + 1}/").items():
                apart.append(difference(ours[key], value, TOLERANCE, f"{kind}{s + 1}/{key}"))
    assert len(apart) == sum(key.startswith(("after", "momentum")) for key in data) > 100
    tell(record_property, len(data["losses"]), apart)


@pytest.mark.parametrize("case", cases(WCL))
def test_wcl_is_close_in_float32(case: str) -> None:
    run, data, first = start_wcl(case, torch.float32)
    clustered = case == "clustered"
    for s in range(len(data["losses"])):
        metrics = run.update(wcl_views(data, s, torch.float32), first + s)
        assert metrics["loss"] == pytest.approx(data["losses"][s], rel=1e-4 if clustered else 2e-5)
        for kind, ours in (("after", run.state()), ("momentum", run.momentum())):
            for key, value in golden.part(data, f"{kind}{s + 1}/").items():
                largest = np.abs(value).max()
                relative = 5e-4 if clustered and s == 3 else 2e-5
                limit = relative * largest if largest > 1e-12 else 5e-6
                assert np.abs(ours[key].double().numpy() - value).max() <= max(limit, 1e-6), f"{kind}{s + 1}/{key}"


@pytest.mark.parametrize("case", cases(WCL))
def test_wcls_parameter_groups_are_the_originals(case: str) -> None:
    run, data, _ = start_wcl(case, torch.float64)
    names = {id(p): run.original(name) for name, p in run.method.named_parameters()}
    ours = {names[id(p)]: (g["weight_decay"], g["lars"]) for g in run.optimizer.param_groups for p in g["params"]}
    theirs = {
        str(name): (float(data[f"group{g}_weight_decay"]), bool(data[f"group{g}_weight_decay"]))
        for g in (0, 1)
        for name in data[f"group{g}_names"]
    }
    assert ours == theirs


def test_a_batch_of_two_is_refused() -> None:
    cls = load_method("wcl")
    with pytest.raises(ConfigError, match="wcl got 2 images an update"):
        cls(lambda: Sequence(4, 4), cls.Config(), DataInfo(8, None, 2, 4, 4))


def test_wcl_needs_no_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original finds its graph's components with SciPy, on the host."""
    for name in {"scipy", "scipy.sparse", "scipy.sparse.csgraph", *(m for m in sys.modules if m.startswith("scipy."))}:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it raises
    run, data, first = start_wcl(cases(WCL)[0], torch.float64)
    assert run.update(wcl_views(data, 0, torch.float64), first)["components"] == data["n_components"][0, 0]


# -- ReSA --------------------------------------------------------------------------------------------------------------


def start_resa(case: str, dtype: torch.dtype) -> tuple[Run, dict[str, np.ndarray]]:
    data = golden.part(RESA, f"{case}/")
    hidden, embed = (len(data[f"init/projector.{layer}.weight"]) for layer in (0, 6))
    # The stored momentum tells how long the run was to be: 1 - m(1) = (1 - m(0)) (1 + cos(pi / T)) / 2.
    start, second = data["momentum"][:2]
    total = round(math.pi / math.acos(2 * (1 - second) / (1 - start) - 1))
    info = DataInfo(1000, None, len(data["step0/view0"]), total, total)
    optim = Optim(
        lr=1.0, momentum=float(data["sgd_momentum"]), weight_decay=float(data["weight_decay"]), exclude="none",
        schedule=Schedule(name="constant"),
    )  # fmt: skip
    names = {
        "encoder.": "encoder.", "projector.": "projector.", "predictor.": "predictor.",
        "target.encoder.": "momentum_encoder.", "target.projector.": "momentum_projector.",
    }  # fmt: skip
    settings = {
        "hidden_dim": hidden, "embed_dim": embed, "temperature": float(data["temp"]), "momentum": float(start),
        "predictor": bool(data["use_predictor"]),
    }  # fmt: skip
    run = Run("resa", data, names, dtype, optim, info, **settings)
    run.schedule = lambda update: float(data["lr"][update])
    return run, data


def resa_views(data: dict[str, np.ndarray], s: int, dtype: torch.dtype) -> ViewBatch:
    count = len(golden.part(data, f"step{s}/view"))
    weak, *strong = (golden.tensor(data[f"step{s}/view{v}"], dtype) for v in range(count))
    return batch_of({"weak": (weak,), "strong": tuple(strong)})


@pytest.mark.evidence(
    "resa", "L1", "with and without predictor and multi-crop: loss, parameters, statistics, target",
    golden="resa_step", tolerance={"float64": TOLERANCE, "float32": "loss 1e-5, states 2e-5 of the largest entry"},
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", cases(RESA))
def test_four_steps_of_resa_equal_the_original(
    case: str, dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    run, data = start_resa(case, dtype)
    exact = dtype == torch.float64
    apart: list[float] = []
    for s in range(len(data["losses"])):
        metrics = run.update(resa_views(data, s, dtype), s)
        assert metrics["loss"] == pytest.approx(data["losses"][s], abs=TOLERANCE, rel=0 if exact else 1e-5)
        for key, value in golden.part(data, f"after{s + 1}/").items():
            limit = TOLERANCE if exact else 2e-5 * max(float(np.abs(value).max()), 0.1)
            apart.append(difference(run.state()[key], value, limit, f"after{s + 1}/{key}"))
    assert len(apart) == sum(key.startswith("after") for key in data) > 50
    tell(record_property, len(data["losses"]), apart if exact else [])
