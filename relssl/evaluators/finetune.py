"""Fine-tuning: backbone and linear head trained together on labelled images, as in semi-supervised evaluation.

Like the linear probe it takes batches from callables, here of images, and knows neither data nor run folder. The
backbone trains in train mode: batch normalisation uses the statistics of the batch and goes on averaging them. Legend:
b batch, S side, D feature width, C classes.

Named protocols (`finetune_protocol`):

    resa                     the low-shot script of ReSA: backbone 0.0002 and head 40, both x batch / 256, 20 epochs
    relicv2                  the fine-tuning mode of ReLICv2's evaluation code: its linear protocol for both
    relational               Self-Supervised Relational Reasoning: Adam, backbone 1e-3 and head 1e-4, x 0.1 at half and
                             at three quarters of the epochs, no augmentation
    relational_as_released   the same as that code runs: its decay waits for epochs 100 and 150 of 100, so never comes
    plain                    ours, no paper's: for methods whose sources give no fine-tuning (ReSSL, WCL)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.errors import InputError, RunError
from relssl.evaluators.features import check_labels
from relssl.evaluators.linear import Crop, InitStd, Progress, initial_head, keyed_seed
from relssl.evaluators.protocols import named_protocol
from relssl.ops.precision import full_precision

Batches = Iterable[tuple[Tensor, Tensor]]


class FinetuneProtocol(BaseModel):
    """Every number of a fine-tuning; `finetune_protocol(name)` gives the named ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "custom"
    augment: bool = True  # train on augmented views; False: on each image as it is tested
    crop: Crop = "torchvision"  # of augmented views; byol: BYOL's, bicubic without antialiasing
    optimizer: Literal["sgd", "adam"] = "sgd"  # adam: betas 0.9 and 0.999, eps 1e-8; momentum is not used
    lr_backbone: float = Field(ge=0)
    lr_head: float = Field(ge=0)
    lr_scaling: Literal["none", "linear"] = "none"  # linear: both x batch_size / 256
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=0.0, ge=0)  # of every parameter, biases and normalisation too
    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=256, ge=2)
    drop_last: bool = False  # leave out the last, smaller batch of an epoch; one of a single image always is
    # both rates fall together: cosine to zero, iteration by iteration; cosine_epochs: from epoch to epoch; drops:
    # x gamma after each share of the epochs in drops
    schedule: Literal["cosine", "cosine_epochs", "drops", "constant"] = "cosine"
    drops: tuple[float, ...] = ()
    gamma: float = Field(default=0.1, gt=0, le=1)
    init_std: InitStd = None  # as in the linear protocols
    zero_bias: bool = False
    select: Literal["best", "last"] = "best"  # by test top-1, or the last epoch

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneProtocol:
        if self.optimizer == "adam" and (self.nesterov or self.momentum):
            raise ValueError("momentum and nesterov belong to optimizer: sgd; set momentum: 0 and nesterov: false")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: true needs momentum above 0")
        if (self.schedule == "drops") != bool(self.drops):
            raise ValueError("drops belong to schedule: drops, and it needs at least one")
        if list(self.drops) != sorted(set(self.drops)) or not all(0 < share < 1 for share in self.drops):
            raise ValueError(f"drops are shares of the epochs between 0 and 1, increasing, got {list(self.drops)}")
        return self

    def rates_at(self, step: int, steps_per_epoch: int) -> tuple[float, float]:
        """Learning rates (backbone, head) of iteration `step` (from 0)."""
        factor = self.batch_size / 256 if self.lr_scaling == "linear" else 1.0
        epoch = step // steps_per_epoch
        if self.schedule == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * step / (self.epochs * steps_per_epoch)))
        elif self.schedule == "cosine_epochs":
            factor *= 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        elif self.schedule == "drops":
            factor *= self.gamma ** sum(epoch >= int(share * self.epochs) for share in self.drops)
        return self.lr_backbone * factor, self.lr_head * factor


_RELATIONAL: dict[str, Any] = {
    "augment": False,
    "optimizer": "adam",
    "lr_backbone": 1e-3,
    "lr_head": 1e-4,
    "momentum": 0.0,
    "weight_decay": 1e-5,
    "epochs": 100,
    "batch_size": 128,
    "select": "last",
}
FINETUNE_PROTOCOLS: dict[str, dict[str, Any]] = {
    "resa": {
        "lr_backbone": 2e-4,
        "lr_head": 40.0,
        "lr_scaling": "linear",
        "epochs": 20,
        "batch_size": 256,
        "schedule": "cosine_epochs",
        "init_std": 0.01,
        "zero_bias": True,
        "select": "best",
    },
    "relicv2": {
        "lr_backbone": 0.3,
        "lr_head": 0.3,
        "lr_scaling": "linear",
        "nesterov": True,
        "epochs": 100,
        "batch_size": 1024,
        "crop": "byol",
        "drop_last": True,
        "init_std": "haiku",
        "zero_bias": True,
        "select": "last",
    },
    "relational": {**_RELATIONAL, "schedule": "drops", "drops": (0.5, 0.75)},
    "relational_as_released": {**_RELATIONAL, "schedule": "constant"},
    "plain": {
        "lr_backbone": 0.05,
        "lr_head": 0.5,
        "nesterov": True,
        "epochs": 40,
        "batch_size": 128,
        "init_std": 0.0,
        "zero_bias": True,
        "select": "last",
    },
}


def finetune_protocol(name: str, **overrides: Any) -> FinetuneProtocol:
    """The protocol `name`, with some numbers replaced; the name then ends in `(changed)`.

    Raises:
        ConfigError: unknown name or setting (the nearest known one is named), or a value that cannot be.
    """
    return named_protocol("fine-tuning", FinetuneProtocol, FINETUNE_PROTOCOLS, name, overrides)


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning found. Accuracies in percent; `top5` None with fewer than five classes.

    `backbone` (in eval mode), `weight` (C, D) and `bias` (C,), on the CPU, belong to the selected epoch. `best` and
    `last` are records of those epochs (the same where only the last was tested); `curve` holds one record {"epoch"
    (from 1), "loss", "lr", "top1", "top5"} per epoch, with the backbone's lr of the epoch's last iteration, and
    without accuracies where the epoch was not tested.
    """

    top1: float
    top5: float | None
    best: dict[str, Any]
    last: dict[str, Any]
    curve: list[dict[str, Any]]
    backbone: nn.Module
    weight: Tensor
    bias: Tensor


def finetune(
    backbone: nn.Module,
    train_batches: Callable[[int], Batches],
    num_batches_per_epoch: int,
    test_batches: Callable[[], Batches],
    feature_dim: int,
    num_classes: int,
    protocol: FinetuneProtocol,
    seed: int,
    device: torch.device | str,
    progress: Progress | None = None,
) -> FinetuneResult:
    """Train a copy of a backbone with a linear head on it, and test it.

    Everything random comes from `seed`: the global generators are left as they were. A protocol that reports the best
    epoch is tested after every epoch, another after the last one only.

    Args:
        backbone: (b, 3, S, S) -> (b, D), float32; it is not changed.
        train_batches: called with the epoch (from 0), yields (images (b, 3, S, S), labels (b,)), b at least 2: of a
            last map of one pixel there are no batch statistics of one image.
        num_batches_per_epoch: how many it yields in every epoch.
        test_batches: yields un-augmented test images and their labels, anew at each call.
        feature_dim, num_classes: D and C.
        protocol: see `finetune_protocol`.
        seed: of the initial head, and of whatever the backbone draws in training; the order is the caller's.
        device: where to compute.
        progress: called with each epoch's record.

    Raises:
        InputError: labels missing or out of range, fewer than two classes, no training or test images, a training
            batch of one image.
        RunError: the loss became NaN or infinite.
        ValueError: `train_batches` yielded another number of batches than announced (a bug of the caller).
    """
    device = torch.device(device)
    if num_classes < 2:
        raise InputError(f"fine-tuning needs at least two classes, got {num_classes}: with one every answer is right")
    if num_batches_per_epoch < 1:
        raise InputError("there is no training image to fine-tune on. Choose another data set")
    broken = [
        key for key, value in backbone.state_dict().items() if value.is_floating_point() and not value.isfinite().all()
    ]
    if broken:
        raise InputError(
            f"{len(broken)} tensors of the backbone hold NaN or infinite numbers, the first is {broken[0]}: there is "
            "nothing to fine-tune. Take other weights, of an earlier checkpoint for example"
        )
    model = copy.deepcopy(backbone).to(device).requires_grad_(True)
    weight, bias = initial_head(
        feature_dim,
        num_classes,
        init_std=protocol.init_std,
        zero_bias=protocol.zero_bias,
        seed=seed,
        device=device,
    )
    optimizer = _optimizer(model, [weight, bias], protocol)
    curve: list[dict[str, Any]] = []
    chosen: tuple[dict[str, Tensor], Tensor, Tensor] | None = None
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), full_precision(device):
        torch.manual_seed(keyed_seed(seed, "finetune"))
        for epoch in range(protocol.epochs):
            record = _train_epoch(
                model, (weight, bias), optimizer, train_batches(epoch), num_batches_per_epoch, epoch, protocol
            )
            if protocol.select == "best" or epoch == protocol.epochs - 1:
                record |= _test(model, (weight, bias), test_batches())
                tested = [earlier["top1"] for earlier in curve if "top1" in earlier]
                if protocol.select == "last" or all(record["top1"] > earlier for earlier in tested):
                    state = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
                    chosen = state, weight.detach().cpu().clone(), bias.detach().cpu().clone()
            curve.append(record)
            if progress is not None:
                progress(record)
    assert chosen is not None
    best = max((record for record in curve if "top1" in record), key=lambda record: record["top1"])
    reported = best if protocol.select == "best" else curve[-1]
    tuned = model.cpu().eval().requires_grad_(False)
    tuned.load_state_dict(chosen[0])
    return FinetuneResult(reported["top1"], reported["top5"], best, curve[-1], curve, tuned, chosen[1], chosen[2])


def _optimizer(model: nn.Module, head: list[Tensor], protocol: FinetuneProtocol) -> torch.optim.Optimizer:
    """Two groups: the backbone's parameters, the head's."""
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}, {"params": head}]
    if protocol.optimizer == "adam":
        return torch.optim.Adam(groups, lr=protocol.lr_head, weight_decay=protocol.weight_decay)
    return torch.optim.SGD(
        groups,
        lr=protocol.lr_head,
        momentum=protocol.momentum,
        nesterov=protocol.nesterov,
        weight_decay=protocol.weight_decay,
    )


def _train_epoch(
    model: nn.Module,
    head: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    expected: int,
    epoch: int,
    protocol: FinetuneProtocol,
) -> dict[str, Any]:
    model.train()
    device = head[0].device
    total, seen, count = torch.zeros((), device=device), 0, 0
    for images, labels in batches:
        if len(images) < 2:
            raise InputError(
                f"fine-tuning: batch {count + 1} of epoch {epoch + 1} has {len(images)} image, and batch statistics "
                "need two; leave a rest of one image out, or choose another batch_size"
            )
        labels = check_labels(labels, len(images), head[0].shape[0], "train labels").to(device, non_blocking=True)
        rates = protocol.rates_at(epoch * expected + count, expected)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        loss = F.cross_entropy(F.linear(model(images.to(device, non_blocking=True)), *head), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(labels)
        seen, count = seen + len(labels), count + 1
    if count != expected:
        raise ValueError(f"train_batches yielded {count} batches, {expected} were announced; the schedule needs that")
    mean = float(total) / seen
    if not math.isfinite(mean):
        raise RunError(
            f"fine-tuning: the loss became {mean} in epoch {epoch + 1} at lr {rates[0]:.4g} (backbone) and "
            f"{rates[1]:.4g} (head); lower lr_backbone or lr_head"
        )
    return {"epoch": epoch + 1, "loss": mean, "lr": rates[0]}


@torch.no_grad()
def _test(model: nn.Module, head: tuple[Tensor, Tensor], batches: Batches) -> dict[str, float | None]:
    model.eval()
    device, num_classes = head[0].device, head[0].shape[0]
    top = min(5, num_classes)
    first = within = seen = 0
    for images, labels in batches:
        labels = check_labels(labels, len(images), num_classes, "test labels").to(device)
        hit = F.linear(model(images.to(device)), *head).topk(top, dim=1).indices == labels[:, None]
        first, within, seen = first + int(hit[:, 0].sum()), within + int(hit.sum()), seen + len(labels)
    if not seen:
        raise InputError("there is no test image to evaluate on. Choose another data set")
    return {"top1": 100.0 * first / seen, "top5": 100.0 * within / seen if top == 5 else None}
