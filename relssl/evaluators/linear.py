"""Linear probe: one linear layer trained on frozen features.

The probe takes batches of features from a callable, so the same code serves features that were computed once
(`cached_batches`) and features computed afresh from augmented views in every epoch, which is what the
papers do. Legend: b batch, D feature width, C classes, n test images.

Named protocols (`linear_protocol`):

    ressl_imagenet     the code released with ReSSL: 100 epochs, lr 0.3, cosine, weights from N(0, 0.01^2)
    ressl_small        the authors' small-data probe: Nesterov, cosine from lr 0.2
    ressl_small_steps  the same with steps from lr 30, x 0.1 at epochs 60 and 80
    wcl                the code released with WCL: Nesterov, lr 0.2 x batch / 256, batch 4096, 80 epochs, cosine
    resa               the code released with ReSA, for weights of batch 256: lr 10, x 0.1 at epochs 60 and 80
    resa_1024          the same with lr 40, for weights of batch 1024
    resa_cifar         the CIFAR code of ReSA: Adam 1e-2 to 1e-6, 500 epochs, batch 1000, no augmentation
    relicv2            the code released with ReLICv2: Nesterov, lr 0.3 x batch / 256, batch 1024, 100 epochs, cosine
    relational         Self-Supervised Relational Reasoning and its baselines: Adam 1e-3, 100 epochs, no augmentation
    cached             ours, no paper's: features of un-augmented images, computed once, standardised; seconds

The small-data sources name neither the initialisation nor whether the best or the last epoch is reported;
PyTorch's default and, as in the authors' ImageNet code, the best epoch are assumed. Choosing the epoch by
test accuracy flatters the figure a little, so both epochs are always kept, and `cached` reports the last.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from pipelines.errors import ConfigError, InputError, RunError
from relssl.evaluators.features import (
    check_features,
    check_labels,
    check_same_width,
    standardisation,
)
from relssl.evaluators.protocols import named_protocol
from relssl.ops.precision import full_precision

HEAD_FORMAT = 1
_SHOWN = 3  # names of tensors in a message
TEST_BLOCK = 8_192

Crop = Literal["torchvision", "byol"]
InitStd = Annotated[float, Field(ge=0)] | Literal["haiku"] | None
Batches = Iterable[tuple[Tensor, Tensor]]
Progress = Callable[[dict[str, Any]], None]


class LinearProtocol(BaseModel):
    """Every number of a linear probe; `linear_protocol(name)` gives the named ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "custom"
    augment: bool = True  # features of fresh augmented views in every epoch; False: of each image once
    crop: Crop = "torchvision"  # of augmented views; byol: BYOL's, bicubic without antialiasing
    optimizer: Literal["sgd", "adam"] = "sgd"  # adam: betas 0.9 and 0.999, eps 1e-8; momentum is not used
    lr: float = Field(gt=0)
    lr_scaling: Literal["none", "linear"] = "none"  # linear: lr x batch_size / 256
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=0.0, ge=0)
    epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=256, ge=1)
    drop_last: bool = False  # leave out the last, smaller batch of an epoch
    # cosine goes to zero, iteration by iteration; multistep multiplies by gamma at the epochs in milestones;
    # exponential falls from epoch to epoch by one factor, towards `final`
    schedule: Literal["cosine", "multistep", "exponential", "constant"] = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = Field(default=0.1, gt=0, le=1)
    final: float = Field(default=0.0, ge=0)
    # weights from N(0, init_std^2); haiku: from N(0, 1 / D), cut at two standard deviations; None: PyTorch's default
    # for weight and bias
    init_std: InitStd = None
    zero_bias: bool = False
    # standardise: by mean and standard deviation of the training features
    normalise_features: Literal["none", "standardise"] = "none"
    select: Literal["best", "last"] = "best"  # by test top-1, as the papers do, or the last epoch
    dtype: Literal["fp32", "fp64"] = "fp32"

    @model_validator(mode="after")
    def _consistent(self) -> LinearProtocol:
        if self.optimizer == "adam" and (self.nesterov or self.momentum):
            raise ValueError("momentum and nesterov belong to optimizer: sgd; set momentum: 0 and nesterov: false")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: true needs momentum above 0")
        if (self.schedule == "multistep") != bool(self.milestones):
            raise ValueError("milestones belong to schedule: multistep, and multistep needs at least one")
        if (self.schedule == "exponential") != bool(self.final):
            raise ValueError("final belongs to schedule: exponential, which falls towards it, so it is above 0")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must increase, got {list(self.milestones)}")
        return self

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of iteration `step` (from 0)."""
        base = self.lr * self.batch_size / 256 if self.lr_scaling == "linear" else self.lr
        if self.schedule == "cosine":
            return base * 0.5 * (1 + math.cos(math.pi * step / (self.epochs * steps_per_epoch)))
        if self.schedule == "multistep":
            return base * self.gamma ** sum(step // steps_per_epoch >= milestone for milestone in self.milestones)
        if self.schedule == "exponential":
            return base * (self.final / base) ** (step // steps_per_epoch / self.epochs)
        return base


_SMALL: dict[str, Any] = {"nesterov": True, "epochs": 100, "batch_size": 256, "select": "best"}
_RESA: dict[str, Any] = {
    "lr_scaling": "linear",
    "epochs": 100,
    "batch_size": 256,
    "schedule": "multistep",
    "milestones": (60, 80),
    "init_std": 0.01,
    "zero_bias": True,
    "select": "best",
}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "ressl_imagenet": {
        "lr": 0.3,
        "epochs": 100,
        "batch_size": 256,
        "init_std": 0.01,
        "zero_bias": True,
        "select": "best",
    },
    "ressl_small": {**_SMALL, "lr": 0.2},
    "ressl_small_steps": {**_SMALL, "lr": 30.0, "schedule": "multistep", "milestones": (60, 80)},
    "wcl": {
        "lr": 0.2,
        "lr_scaling": "linear",
        "nesterov": True,
        "epochs": 80,
        "batch_size": 4096,
        "init_std": 0.01,
        "zero_bias": True,
        "select": "best",
    },
    "relicv2": {
        "lr": 0.3,
        "lr_scaling": "linear",
        "nesterov": True,
        "epochs": 100,
        "batch_size": 1024,
        "crop": "byol",
        "drop_last": True,  # the released code fills every batch, from the next epoch if need be
        "init_std": "haiku",
        "zero_bias": True,
        "select": "last",
    },
    "resa": {**_RESA, "lr": 10.0},
    "resa_1024": {**_RESA, "lr": 40.0},
    "resa_cifar": {
        "augment": False,
        "optimizer": "adam",
        "lr": 1e-2,
        "momentum": 0.0,
        "weight_decay": 5e-6,
        "epochs": 500,
        "batch_size": 1000,
        "drop_last": True,
        "schedule": "exponential",
        "final": 1e-6,
        "select": "last",
    },
    "relational": {
        "augment": False,
        "optimizer": "adam",
        "lr": 1e-3,
        "momentum": 0.0,
        "epochs": 100,
        "batch_size": 128,
        "schedule": "constant",
        "select": "last",
    },
    "cached": {
        "augment": False,
        "lr": 0.03,
        "epochs": 50,
        "batch_size": 256,
        "init_std": 0.0,
        "zero_bias": True,
        "normalise_features": "standardise",
        "select": "last",
    },
}


def linear_protocol(name: str, **overrides: Any) -> LinearProtocol:
    """The protocol `name`, with some numbers replaced; the name then ends in `(changed)`.

    Raises:
        ConfigError: unknown name or setting (the nearest known one is named), or a value that cannot be.
    """
    return named_protocol("linear", LinearProtocol, PROTOCOLS, name, overrides)


class CachedBatches:
    """Shuffled batches of features that are held in memory; call with the epoch, `len()` gives batches per
    epoch.

    The order is a function of (seed, epoch) alone. The last batch of an epoch may be smaller, or with `drop_last` is
    left out, unless it is the only one.
    """

    def __init__(self, features: Tensor, labels: Tensor, batch_size: int, seed: int, *, drop_last: bool = False):
        if batch_size < 1:
            raise ConfigError(f"batch size must be at least 1, got {batch_size}")
        self.features = check_features(features, "train features")
        self.labels = check_labels(labels, len(features), None, "train labels").to(features.device)
        self.batch_size, self.seed = batch_size, seed
        whole = len(self.features) // batch_size
        self.num_batches = whole if drop_last and whole else math.ceil(len(self.features) / batch_size)

    def __len__(self) -> int:
        return self.num_batches

    def __call__(self, epoch: int) -> Batches:
        order = torch.randperm(len(self.features), generator=_generator(self.seed, "order", epoch))
        for index in order.to(self.features.device).split(self.batch_size)[: self.num_batches]:
            yield self.features[index], self.labels[index]


def cached_batches(
    features: Tensor, labels: Tensor, batch_size: int, seed: int, *, drop_last: bool = False
) -> CachedBatches:
    """Batches for `train_linear_probe` from features (N, D) computed once; see `CachedBatches`.

    Raises:
        InputError: NaN or all-zero features, labels missing.
    """
    return CachedBatches(features, labels, batch_size, seed, drop_last=drop_last)


def _generator(seed: int, name: Literal["init", "order"], epoch: int = 0) -> torch.Generator:
    """A CPU generator keyed by all three."""
    return torch.Generator().manual_seed(keyed_seed(seed, name, epoch))


def keyed_seed(seed: int, name: str, epoch: int = 0) -> int:
    """A seed for torch, which reads 32 bits of one: hashed from all three, not added.

    Raises:
        ConfigError: a negative seed.
    """
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, got {seed}")
    digest = blake2b(f"linear probe/{name}/{seed}/{epoch}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class LinearResult:
    """What a probe found. Accuracies in percent; `top5` None with fewer than five classes.

    `weight` (C, D) and `bias` (C,), on the CPU, belong to the selected epoch and take features as the
    backbone gives them (a standardisation is folded in). `best` and `last` are the records of those epochs;
    `curve` holds one record {"epoch" (from 1), "loss", "lr", "top1", "top5"} per epoch, with the lr of the
    epoch's last iteration.
    """

    top1: float
    top5: float | None
    best: dict[str, Any]
    last: dict[str, Any]
    curve: list[dict[str, Any]]
    weight: Tensor
    bias: Tensor


@torch.inference_mode(False)  # the probe trains, even where the caller is in inference mode
def train_linear_probe(
    train_batches: Callable[[int], Batches],
    num_batches_per_epoch: int,
    test: tuple[Tensor, Tensor],
    feature_dim: int,
    num_classes: int,
    protocol: LinearProtocol,
    seed: int,
    device: torch.device | str,
    progress: Progress | None = None,
) -> LinearResult:
    """Train a linear classifier on frozen features and test it after every epoch.

    Everything random comes from generators keyed by `seed`: the global generators are neither read nor moved.

    Args:
        train_batches: called with the epoch (from 0), yields (features (b, D), labels (b,)); with
            `normalise_features: standardise` epoch 0 is read once more beforehand, for mean and variance.
        num_batches_per_epoch: how many it yields in every epoch.
        test: features (n, D) of un-augmented test images and labels (n,).
        feature_dim, num_classes: D and C.
        protocol: see `linear_protocol`.
        seed: of the initial weights (and of nothing else: the order is the caller's).
        device: where to compute.
        progress: called with each epoch's record.

    Raises:
        InputError: labels missing or out of range, features with NaN, wrong width, no training images.
        RunError: the loss became NaN or infinite.
        ValueError: `train_batches` yielded another number of batches than announced (a bug of the caller).
    """
    device = torch.device(device)
    dtype = torch.float64 if protocol.dtype == "fp64" else torch.float32
    test_x = check_features(test[0], "test features").to(device, dtype)
    test_y = check_labels(test[1], len(test_x), num_classes, "test labels").to(device)
    if num_classes < 2:
        raise InputError(
            f"a linear probe needs at least two classes, got {num_classes}: with one every answer is right"
        )
    if test_x.shape[1] != feature_dim:
        raise InputError(
            f"test features are {test_x.shape[1]} wide, the probe was told {feature_dim}: train and test "
            f"features must come from the same backbone"
        )
    if num_batches_per_epoch < 1:
        raise InputError("there is no training image, so a linear probe cannot be trained. Choose another data set")

    def batches(epoch: int) -> Batches:
        yield from _checked(train_batches(epoch), num_batches_per_epoch, test_x, num_classes, dtype)

    shift, scale = _standardisation(batches(0), protocol, feature_dim, device)
    test_x = (test_x - shift) * scale
    weight, bias = initial_head(
        feature_dim,
        num_classes,
        init_std=protocol.init_std,
        zero_bias=protocol.zero_bias,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    optimizer = _optimizer([weight, bias], protocol)
    curve: list[dict[str, Any]] = []
    chosen = (weight, bias)
    with torch.enable_grad(), full_precision(device):
        for epoch in range(protocol.epochs):
            total, seen, lr = torch.zeros((), device=device, dtype=torch.float32), 0, 0.0
            for step, (x, y) in enumerate(batches(epoch), start=epoch * num_batches_per_epoch):
                lr = optimizer.param_groups[0]["lr"] = protocol.lr_at(step, num_batches_per_epoch)
                loss = F.cross_entropy(F.linear((x - shift) * scale, weight, bias), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(y)
                seen += len(y)
            record = {
                "epoch": epoch + 1,
                "loss": _finite(float(total) / seen, epoch, lr),
                "lr": lr,
                **_accuracy(test_x, test_y, weight, bias),
            }
            is_best = all(record["top1"] > earlier["top1"] for earlier in curve)
            curve.append(record)
            if is_best or protocol.select == "last":
                chosen = (weight.detach().clone(), bias.detach().clone())
            if progress is not None:
                progress(record)
    best = max(curve, key=lambda record: record["top1"])  # the first of equals, as is_best above
    reported = best if protocol.select == "best" else curve[-1]
    folded = chosen[0] * scale
    return LinearResult(
        reported["top1"],
        reported["top5"],
        best,
        curve[-1],
        curve,
        folded.cpu(),
        (chosen[1] - folded @ shift).cpu(),
    )


def _checked(batches: Batches, expected: int, test_x: Tensor, num_classes: int, dtype: torch.dtype) -> Batches:
    """The batches, checked, on the device of `test_x`; what inference mode made is copied for autograd."""
    count = 0
    for features, labels in batches:
        count += 1
        features = check_features(features, "train features", allow_zero=True)  # it may be a single image
        check_same_width(features, test_x)
        labels = check_labels(labels, len(features), num_classes, "train labels")
        labels = labels.clone() if labels.is_inference() else labels
        yield (
            features.to(test_x.device, dtype, non_blocking=True),
            labels.to(test_x.device, non_blocking=True),
        )
    if count != expected:
        raise ValueError(
            f"train_batches yielded {count} batches, {expected} were announced; the lr schedule needs the true number"
        )


def _standardisation(
    batches: Batches, protocol: LinearProtocol, feature_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and 1/std of every feature (D,); (0, 1) where the protocol takes features as they are."""
    dtype = torch.float64 if protocol.dtype == "fp64" else torch.float32
    if protocol.normalise_features == "none":
        shift, scale = torch.zeros(feature_dim, dtype=dtype), torch.ones(feature_dim, dtype=dtype)
    else:
        shift, scale = standardisation(features for features, _ in batches)
    return shift.to(device, dtype), scale.to(device, dtype)


def initial_head(
    feature_dim: int,
    num_classes: int,
    *,
    init_std: InitStd,
    zero_bias: bool,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,) with gradient, drawn by `seed` on the CPU, so equal on every device.

    Args:
        init_std: weights from N(0, init_std^2); `haiku`: Haiku's default, N(0, 1 / D) cut at two standard deviations;
            None: PyTorch's default, weights and bias uniform in +-1 / sqrt(D).
        zero_bias: a bias of zeros instead.
    """
    generator = _generator(seed, "init")
    bound = feature_dim**-0.5
    weight = torch.empty(num_classes, feature_dim, dtype=dtype)
    if init_std is None:
        weight.uniform_(-bound, bound, generator=generator)
    elif init_std == "haiku":
        torch.nn.init.trunc_normal_(weight, std=bound, a=-2 * bound, b=2 * bound, generator=generator)
    else:
        weight.normal_(0.0, init_std, generator=generator)
    bias = torch.zeros(num_classes, dtype=dtype)
    if not zero_bias:
        bias.uniform_(-bound, bound, generator=generator)
    return weight.to(device).requires_grad_(), bias.to(device).requires_grad_()


def _optimizer(parameters: list[Tensor], protocol: LinearProtocol) -> torch.optim.Optimizer:
    if protocol.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=protocol.lr, weight_decay=protocol.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=protocol.lr,
        momentum=protocol.momentum,
        nesterov=protocol.nesterov,
        weight_decay=protocol.weight_decay,
    )


def head_accuracy(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> dict[str, float | None]:
    """Top-1 and top-5 accuracy in percent of a saved head: weight (C, D) and bias (C,), features (n, D), labels (n,).

    Raises:
        InputError: features with NaN or of another width, labels missing or beyond the head's classes.
    """
    x = check_features(x, "test features")
    if x.shape[1] != weight.shape[1]:
        raise InputError(
            f"the head takes features {weight.shape[1]} wide and the backbone's are {x.shape[1]}: the head belongs to "
            "another backbone"
        )
    y = check_labels(y, len(x), len(weight), "test labels").to(x.device)
    with full_precision(x.device):
        return _accuracy(x, y, weight.to(x), bias.to(x))


@torch.no_grad()
def _accuracy(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> dict[str, float | None]:
    top = min(5, weight.shape[0])
    first = within = 0
    for start in range(0, len(x), TEST_BLOCK):
        logits = F.linear(x[start : start + TEST_BLOCK], weight, bias)
        hit = logits.topk(top, dim=1).indices == y[start : start + TEST_BLOCK, None]
        first, within = first + int(hit[:, 0].sum()), within + int(hit.sum())
    return {"top1": 100.0 * first / len(x), "top5": 100.0 * within / len(x) if top == 5 else None}


def _finite(loss: float, epoch: int, lr: float) -> float:
    if not math.isfinite(loss):
        raise RunError(
            f"linear probe: the loss became {loss} in epoch {epoch + 1} at lr {lr:.4g}. The features are too "
            f"large for this lr: lower it, or set normalise_features: standardise"
        )
    return loss


class TrainedHead(Protocol):
    """What `save_head` writes: a `LinearResult`, or the result of a fine-tuning."""

    @property
    def top1(self) -> float: ...
    @property
    def top5(self) -> float | None: ...
    @property
    def best(self) -> dict[str, Any]: ...
    @property
    def last(self) -> dict[str, Any]: ...
    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor: ...


def save_head(
    path: str | Path,
    result: TrainedHead,
    *,
    classes: list[str] | None,
    backbone: str,
    protocol: BaseModel,
    seed: int,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write `weight` and `bias` as safetensors; what is needed to use them is JSON in the file's metadata.

    The file appears whole or not at all. Metadata key `relssl` holds {"format", "kind", "classes",
    "backbone", "protocol", "seed", "top1", "top5", "best", "last", **extra}.
    """
    path = Path(path)
    about = {
        "format": HEAD_FORMAT,
        "kind": "linear head",
        "classes": classes,
        "backbone": backbone,
        "protocol": protocol.model_dump(mode="json"),
        "seed": seed,
        "top1": result.top1,
        "top5": result.top5,
        "best": result.best,
        "last": result.last,
        **(extra or {}),
    }
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {"weight": result.weight.contiguous(), "bias": result.bias.contiguous()}
    with temporary.open("wb") as file:
        file.write(save(tensors, metadata={"relssl": json.dumps(about)}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


def load_head(path: str | Path) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Weight (C, D), bias (C,) and metadata of a file written by `save_head`.

    Raises:
        InputError: no such file, damaged, or not a head that this version writes.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no linear head at {path}: expected a .safetensors file written by `relssl eval linear`")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            about = json.loads(header.get("relssl", "{}"))
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise InputError(
            f"{path} is damaged or not a safetensors file ({error}); write it again with `relssl eval linear`"
        ) from None
    if header.get("format", "").startswith("relssl-backbone"):
        raise InputError(
            f"{path} is a backbone: give it as --weights. A head is a head-*.safetensors, which `relssl eval linear` "
            "writes beside its backbone"
        )
    if about.get("kind") != "linear head" or about.get("format") != HEAD_FORMAT or set(tensors) != {"weight", "bias"}:
        held = sorted(tensors)
        shown = ", ".join(held[:_SHOWN]) + (f" and {len(held) - _SHOWN} more" if len(held) > _SHOWN else "")
        said = f"calls itself {about['kind']!r}, format {about.get('format', 'none')}" if "kind" in about else ""
        raise InputError(
            f"{path} is not a linear head of format {HEAD_FORMAT}: it holds {shown or 'nothing'} and "
            f"{said or 'does not say what it is'}; expected a head-*.safetensors, which `relssl eval linear` writes"
        )
    return tensors["weight"], tensors["bias"], about
