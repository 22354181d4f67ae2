"""Full training steps of the original relational-reasoning repository, through our methods, optimizer and `run_update`.

Four steps of relational reasoning (focal and BCE), one of SimCLR, RotNet and Deep InfoMax, from the original's weights
and views.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines.batch import ViewBatch
from relssl.checkpoint import optimizer_tensors
from relssl.config import Optim, Schedule
from relssl.methods import load_method
from relssl.methods.base import DataInfo, Method, Step
from relssl.nets import build_backbone
from relssl.train import make_optimizer, make_schedule, run_update
from tests.relssl import golden

RELATIONAL = golden.load("relational_step")
BASELINES = golden.load("baselines_step")
RELATIONAL_CASES = sorted({key.split("/")[0] for key in RELATIONAL})
NAMES = {"simclr": "simclr", "rotationnet": "rotation", "deepinfomax": "deepinfomax"}
TOLERANCE = 1e-9  # float64, absolute
STATES = {"simclr": 2e-4, "rotationnet": 1e-5, "deepinfomax": 1e-3}  # float32, relative to the largest entry
# A bias in front of a BatchNorm has no gradient but rounding, which Adam blows up in float32.
ROUNDING = ("linear1.bias", "bn1.running_mean")


class Sequence(nn.Sequential):
    """The stub `seq` of the data."""

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


def original_name(name: str) -> str:
    """Our parameter or buffer name -> the original's."""
    if name.startswith("encoder."):
        return "backbone." + name.removeprefix("encoder.")
    return "loss_fn." + name if name.startswith(("local_d.", "prior_d.")) else name


def build(name: str, data: dict[str, np.ndarray], dtype: torch.dtype, **settings: Any) -> Method:
    """A method at the stored initial state."""
    init = golden.part(data, "init/")

    def backbone() -> nn.Module:
        if "backbone.0.weight" not in init:
            return build_backbone("conv4")
        return Sequence(init["backbone.0.weight"].shape[0], init["backbone.3.weight"].shape[0])

    images = max(len(value) for key, value in data.items() if key.rpartition("/")[2] in ("x", "view0"))
    cls = load_method(name)
    method = cls(backbone, cls.Config(**settings), DataInfo(images, None, images, 10, 1)).to(dtype)
    ours = {original_name(key): key for key in method.state_dict()}
    assert ours.keys() == init.keys()
    method.load_state_dict({ours[key]: golden.tensor(value) for key, value in init.items()})
    return method


def batch_of(arrays: list[np.ndarray], dtype: torch.dtype) -> ViewBatch:
    place = torch.arange(len(arrays[0]))
    return ViewBatch({"view": tuple(golden.tensor(x, dtype) for x in arrays)}, place, place, place)


class Run:
    """Updates of a method, and its state and Adam's under the original's names."""

    def __init__(self, method: Method, lr: float) -> None:
        self.method = method
        optim = Optim(name="adam", lr=lr, schedule=Schedule(name="constant"))
        self.optimizer, self.schedule = make_optimizer(optim, method), make_schedule(optim, 1, 10, 8)
        self.updates = 0

    def update(self, batch: ViewBatch) -> dict[str, float]:
        step = Step(update=self.updates, epoch=0)
        metrics = run_update(self.method, self.optimizer, [batch], step, schedule=self.schedule, num_images=len(batch))
        self.updates += 1
        return {key: float(value) for key, value in metrics.items()}

    def arrays(self) -> dict[str, dict[str, Tensor]]:
        out = {"after": {original_name(k): v.clone() for k, v in self.method.state_dict().items()}}
        names = {id(p): name for name, p in self.method.named_parameters()}
        for key, value in optimizer_tensors(self.optimizer, names).items():
            name, _, what = key.rpartition("/")
            if what != "step":
                out.setdefault(what, {})[original_name(name)] = value.clone()
        return out


def compare(
    arrays: dict[str, dict[str, Tensor]], data: dict[str, np.ndarray], after: int, tolerance: dict
) -> list[float]:
    """Every stored array of one moment; their largest differences. Tolerances are per kind, relative to the largest
    entry unless the data is float64."""
    errors = []
    for kind, ours in arrays.items():
        stored = f"{kind}{after}"
        for key, value in ours.items():
            if tolerance["relative"] and key.endswith(ROUNDING):
                continue
            if f"{stored}/{key}" in data:
                pairs = [(value.double().numpy(), data[f"{stored}/{key}"])]
            elif f"{stored}_sub/{key}" in data:
                flat = value.double().flatten().numpy()
                sums = np.array([flat.sum(), (flat**2).sum()])
                pairs = [(flat[:: int(data[f"stride/{key}"])], data[f"{stored}_sub/{key}"])]
                if not tolerance["relative"]:
                    pairs.append((sums, data[f"{stored}_sum/{key}"]))
            else:
                continue
            for got, wanted in pairs:
                assert got.shape == wanted.shape, key
                limit = tolerance.get(kind, tolerance["after"])
                if tolerance["relative"] and kind not in tolerance.get("absolute", ()):
                    limit *= max(np.abs(wanted).max(), 1e-6 / limit)
                errors.append(float(np.abs(got - wanted).max()))
                assert errors[-1] <= limit, f"{stored}/{key}: off by {errors[-1]}"
    return errors


EXACT = {"relative": False, "after": TOLERANCE}


@pytest.mark.evidence(
    "relational", "L1", "focal and BCE: loss, parameters, statistics, Adam's moments",
    golden="relational_step",
    tolerance={"float64": TOLERANCE, "float32": "loss 1e-5; of the largest entry: weights 2e-4, moments 1e-5"},
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", RELATIONAL_CASES)
def test_four_steps_of_relational_reasoning_equal_the_originals(
    case: str, dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    data = golden.part(RELATIONAL, f"{case}/")
    views = int(data["K"])
    loss = "focal" if "pair_accuracy" in data else "bce"
    run = Run(build("relational", {**data, "view0": data["step0/view0"]}, dtype, loss=loss), float(data["lr"]))
    exact = dtype == torch.float64
    tolerance = EXACT if exact else {"relative": True, "after": 2e-4, "exp_avg": 1e-5, "exp_avg_sq": 1e-5}
    errors: list[float] = []
    for s in range(len(data["losses"])):
        metrics = run.update(batch_of([data[f"step{s}/view{k}"] for k in range(views)], dtype))
        assert metrics["loss"] == pytest.approx(data["losses"][s], abs=TOLERANCE, rel=0 if exact else 1e-5)
        if loss == "focal" and exact:
            assert 100 * metrics["pair_accuracy"] == pytest.approx(data["pair_accuracy"][s], abs=1e-4)
        errors += compare(run.arrays(), data, s + 1, tolerance)
    stored = [key for key in data if key.startswith(("after", "exp_avg"))]
    assert len(errors) == len(stored) if exact else len(errors) > len(stored) / 2
    tell(record_property, run, errors, exact)


def step_of(method: str, case: str) -> pytest.MarkDecorator:
    """The marker of a baseline's training step."""
    of_states = f"{STATES[case]:.0e}".replace("e-0", "e-")
    float32 = f"loss 1e-5; of the largest entry: weights {of_states}, moments 1e-5"
    what = "loss, parameters, statistics, Adam's moments"
    tolerance = {"float64": TOLERANCE, "float32": float32}
    return pytest.mark.evidence(method, "L1", what, golden="baselines_step", tolerance=tolerance)


def tell(record_property: Callable[[str, object], None], run: Run, errors: list[float], exact: bool) -> None:
    """What the test has seen, for the record of evidence; differences in float32 are not of one scale."""
    record_property("steps", run.updates)
    record_property("arrays", len(errors))
    if exact:
        record_property("largest_error", max(errors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", [pytest.param(case, marks=step_of(NAMES[case], case)) for case in sorted(NAMES)])
def test_a_step_of_the_baselines_equals_the_originals(
    case: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    data = golden.part(BASELINES, f"{case}/")
    method = build(NAMES[case], data, dtype)
    if case == "deepinfomax":
        settings = {key: float(data[key]) for key in ("alpha", "beta", "gamma")}
        assert settings == {key: getattr(method.config, key) for key in settings}
        assert method.config.local_places is None  # all places, as the original
        monkeypatch.setattr(method, "_noise", lambda batch, step: golden.tensor(data["prior"], dtype))
    run = Run(method, float(data["lr"]))
    views = [data[key] for key in ("x", "view0", "view1") if key in data]
    metrics = run.update(batch_of(views, dtype))
    exact = dtype == torch.float64
    assert metrics["loss"] == pytest.approx(float(data["loss"]), abs=TOLERANCE, rel=0 if exact else 1e-5)
    if "accuracy" in data:
        assert 100 * metrics["accuracy"] == pytest.approx(float(data["accuracy"]), abs=1e-4)
    tolerance = {"relative": True, "after": STATES[case], "exp_avg": 1e-5}
    if case == "deepinfomax":
        tolerance["absolute"] = ("exp_avg",)
    errors = compare(run.arrays(), data, 1, EXACT if exact else tolerance)
    stored = [key for key in data if key.startswith(("after1", "exp_avg1"))]
    assert len(errors) == len(stored) if exact else len(errors) > len(stored) / 2
    tell(record_property, run, errors, exact)
