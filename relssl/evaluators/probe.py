"""The fast probe: what features are worth to a linear classifier, in seconds.

Features are extracted once and standardised; a grid of linear heads is trained on them at once
(`relssl.evaluators.heads`). The head is picked on a held-out part of the training images, balanced over classes,
trained again on all of them, and tested once. The test set has no part in the choice. Logistic regression by L-BFGS
stands beside it as a check: it has no learning rate, no batches and no seed but that of the held-out part.

It is nobody's protocol but ours. Papers train on augmented views and some report the epoch that is best on the test
set; `relssl.evaluators.linear` does as they do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from pipelines.errors import ConfigError, InputError, RunError, unknown_name
from relssl.evaluators.draws import held_out_split
from relssl.evaluators.features import check_features, check_labels, check_same_width
from relssl.evaluators.heads import (
    Rows,
    labelled_rows,
    logistic_regression,
    predictions,
    score_heads,
    train_heads,
)
from relssl.evaluators.protocols import reasons

FEATURES = "features"  # the layer that is the backbone's output


class ProbeProtocol(BaseModel):
    """Every number of the fast probe; `probe_protocol` gives it with some replaced."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "fast probe"
    # the grid
    lr: tuple[float, ...] = Field(default=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0), min_length=1)
    weight_decay: tuple[float, ...] = Field(default=(0.0, 1e-5, 1e-4, 1e-3), min_length=1)
    layer: tuple[str, ...] = Field(default=(FEATURES,), min_length=1)
    # SGD: the learning rate falls to zero by a cosine; `epochs`, but never fewer than `least_updates`
    epochs: int = Field(default=10, ge=1)
    least_updates: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=1024, ge=1)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    held_out: float = Field(default=0.2, gt=0, lt=1)  # share of the training images that the choice is made on
    refit: bool = True  # train the chosen head again on all training images; False: test it as it is
    # the check: L2 penalties of logistic regression, chosen on the same held-out images
    penalty: tuple[float, ...] = Field(default=(1e-1, 1e-2, 1e-3, 1e-4, 1e-5), min_length=1)
    dtype: Literal["fp32", "fp64"] = "fp32"

    def updates(self, num_images: int) -> int:
        return max(self.least_updates, self.epochs * math.ceil(num_images / self.batch_size))


def probe_protocol(**overrides: Any) -> ProbeProtocol:
    """The protocol with some numbers replaced; its name then ends in `(changed)`.

    Raises:
        ConfigError: an unknown setting (the nearest known one is named), or a value that cannot be.
    """
    known = [field for field in ProbeProtocol.model_fields if field != "name"]
    for key in overrides:
        if key not in known:
            raise ConfigError(unknown_name("setting of the fast probe", key, known))
    try:
        changed = ProbeProtocol(**overrides)
    except ValidationError as error:
        raise ConfigError(f"fast probe: {reasons(error)}") from None
    for axis in ("lr", "weight_decay", "penalty"):
        for value in getattr(changed, axis):
            if not (math.isfinite(value) and (value > 0 or (value == 0 and axis == "weight_decay"))):
                raise ConfigError(f"fast probe: {axis} holds {value}, which is not a positive number")
    return changed if changed == ProbeProtocol() else changed.model_copy(update={"name": "fast probe (changed)"})


@dataclass(frozen=True)
class Choice:
    """What the held-out images chose. Accuracies in percent, on those images."""

    layer: str
    lr: float
    weight_decay: float
    top1: float
    grid: list[dict[str, Any]]  # {"layer", "lr", "weight_decay", "top1", "loss"} of every head
    penalty: float
    penalty_top1: float
    num_fit: int
    num_held_out: int

    @property
    def at_edge(self) -> list[str]:
        """Axes of the grid whose outermost value was chosen, and is better than the others by more than chance.

        That is, by more than a standard error of the held-out accuracy: there a wider grid may do better.
        """
        share = self.top1 / 100
        chance = 100 * math.sqrt(share * (1 - share) / self.num_held_out)
        found = []
        for axis in ("lr", "weight_decay"):
            chosen, values = getattr(self, axis), sorted({entry[axis] for entry in self.grid})
            others = [e["top1"] for e in self.grid if e["layer"] == self.layer and e[axis] != chosen]
            outermost = 0 < chosen in (values[0], values[-1])
            if outermost and others and self.top1 - max(others) > chance:
                found.append(axis)
        return found


@dataclass(frozen=True)
class ProbeResult:
    """Test accuracies in percent; `top5` None with fewer than five classes.

    `check_top1` and `check_top5` are those of logistic regression. `predicted` (n,) int64 are the classes that
    the head gives the test images.
    """

    top1: float
    top5: float | None
    check_top1: float
    check_top5: float | None
    choice: Choice
    predicted: Tensor


@torch.inference_mode(False)
def fast_probe(
    train: Mapping[str, Tensor],
    train_y: Tensor,
    test: Mapping[str, Tensor],
    test_y: Tensor,
    *,
    num_classes: int,
    protocol: ProbeProtocol | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ProbeResult:
    """Choose a head on held-out training images, train it on all, test it once.

    Args:
        train: features (N, D) by layer, D may differ; every layer of `protocol.layer`.
        train_y: (N,) labels.
        test, test_y: likewise, n images.
        num_classes: C.
        seed: of the held-out part and of the order of batches.

    Raises:
        InputError: NaN features, labels missing, one class only, nothing to hold out, or a class in the test set
            that no training image has.
        RunError: no head of the grid ended with a finite loss.
    """
    protocol = protocol or ProbeProtocol()
    _check_test(test, test_y, train, train_y, num_classes)
    choice = choose(train, train_y, num_classes=num_classes, protocol=protocol, seed=seed, device=device)
    rows = _rows(train[choice.layer], train_y, num_classes, protocol, device)
    tested = rows.like(check_features(test[choice.layer], "test features"), test_y.long())
    if protocol.refit:
        index = torch.arange(len(train_y))
    else:
        index, _ = held_out_split(train_y.long(), protocol.held_out, seed)
    ((weight, bias),) = train_heads(
        rows, index, num_classes, [choice.lr], [choice.weight_decay], **_training(protocol, len(index), seed)
    )
    top1, top5, predicted = _test(tested, weight[0], bias[0])
    check_top1, check_top5, _ = _test(tested, *logistic_regression(rows, index, num_classes, choice.penalty))
    return ProbeResult(top1, top5, check_top1, check_top5, choice, predicted)


@torch.inference_mode(False)
def choose(
    train: Mapping[str, Tensor],
    train_y: Tensor,
    *,
    num_classes: int,
    protocol: ProbeProtocol,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Choice:
    """The best head of the grid on held-out training images, and the best penalty of logistic regression.

    The best has the highest top-1 and, among equals, the lowest loss. There is no argument for test data.

    Args, Raises: see `fast_probe`.
    """
    for layer in protocol.layer:
        if layer not in train:
            raise ConfigError(unknown_name("layer", layer, train))
    train_y = check_labels(train_y, len(train_y), num_classes, "train labels")
    if len(train_y.unique()) < 2:
        raise InputError(
            "all training images have the same label: with one class every answer is right and a probe says "
            "nothing. Expected at least two classes"
        )
    fit, held = held_out_split(train_y, protocol.held_out, seed)
    grid: list[dict[str, Any]] = []
    for layer in protocol.layer:
        rows = _rows(train[layer], train_y, num_classes, protocol, device)
        grid += [{"layer": layer, **entry} for entry in _grid_on(rows, fit, held, num_classes, protocol, seed)]
    finite = [entry for entry in grid if math.isfinite(entry["loss"])]
    if not finite:
        raise RunError(
            f"fast probe: no head of the grid ended with a finite loss; the learning rates {list(protocol.lr)} are "
            "too high for these features, choose lower ones with --grid lr=..."
        )
    best = max(finite, key=lambda entry: (entry["top1"], -entry["loss"]))
    rows = _rows(train[best["layer"]], train_y, num_classes, protocol, device)
    penalty, penalty_top1 = _choose_penalty(rows, fit, held, num_classes, protocol)
    return Choice(
        best["layer"],
        best["lr"],
        best["weight_decay"],
        best["top1"],
        grid,
        penalty,
        penalty_top1,
        len(fit),
        len(held),
    )


def _grid_on(
    rows: Rows, fit: Tensor, held: Tensor, num_classes: int, protocol: ProbeProtocol, seed: int
) -> list[dict[str, Any]]:
    """Held-out accuracy and loss of every head on one layer."""
    pairs = list(product(protocol.lr, protocol.weight_decay))
    lr, weight_decay = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    scores: list[tuple[float, float]] = []
    for heads in train_heads(rows, fit, num_classes, lr, weight_decay, **_training(protocol, len(fit), seed)):
        top1, loss = score_heads(rows, held, *heads)
        scores += zip(top1.tolist(), loss.tolist(), strict=True)
    return [
        {"lr": lr, "weight_decay": decay, "top1": top1, "loss": loss}
        for (lr, decay), (top1, loss) in zip(pairs, scores, strict=True)
    ]


def _choose_penalty(
    rows: Rows, fit: Tensor, held: Tensor, num_classes: int, protocol: ProbeProtocol
) -> tuple[float, float]:
    """From the strongest penalty to the weakest, each starting where the last one ended."""
    best, start = (-math.inf, -math.inf, 0.0), None
    for penalty in sorted(protocol.penalty, reverse=True):
        start = logistic_regression(rows, fit, num_classes, penalty, start=start)
        top1, loss = score_heads(rows, held, start[0][None], start[1][None])
        best = max(best, (float(top1), -float(loss), penalty))
    return best[2], best[0]


def _training(protocol: ProbeProtocol, num_images: int, seed: int) -> dict[str, Any]:
    return {
        "updates": protocol.updates(num_images),
        "batch_size": protocol.batch_size,
        "momentum": protocol.momentum,
        "seed": seed,
    }


def _rows(
    features: Tensor, labels: Tensor, num_classes: int, protocol: ProbeProtocol, device: torch.device | str
) -> Rows:
    if protocol.dtype == "fp64":
        features = features.double()
    return labelled_rows(features, labels, num_classes, "train", device)


def _check_test(
    test: Mapping[str, Tensor], test_y: Tensor, train: Mapping[str, Tensor], train_y: Tensor, num_classes: int
) -> None:
    for layer, features in test.items():
        checked = check_features(features, "test features")
        check_labels(test_y, len(checked), num_classes, "test labels")
        check_same_width(train[layer], checked)
    known = torch.bincount(check_labels(train_y, len(train_y), num_classes, "train labels"), minlength=num_classes)
    unknown = test_y[known[test_y] == 0]
    if len(unknown):
        raise InputError(
            f"{len(unknown)} test images are of classes that no training image has, first of class {int(unknown[0])}: "
            "no classifier can name them. Were train and test made with the same list of classes?"
        )


def _test(tested: Rows, weight: Tensor, bias: Tensor) -> tuple[float, float | None, Tensor]:
    most = min(5, len(weight))
    found = predictions(tested, weight, bias, most)
    hit = found == tested.labels.cpu()[:, None]
    top5 = 100.0 * int(hit.sum()) / len(hit) if most == 5 else None
    return 100.0 * int(hit[:, 0].sum()) / len(hit), top5, found[:, 0]
