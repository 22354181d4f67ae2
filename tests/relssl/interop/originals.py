"""Checkpoints as the original codes write them, with random numbers: the exact key lists, and networks to compare with.

The lists of keys and shapes (`tests/golden/*_checkpoint_keys.json`) were made by instantiating the originals. `shrunk`
divides every width by 16, so that a checkpoint of a ResNet-50 with a queue of 131,072 keys is a file of some megabytes.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.relssl import golden

Shape = list[int]
Shapes = dict[str, Shape]


def keys(source: str) -> dict[str, Any]:
    return json.loads((golden.FOLDER / f"{source}_checkpoint_keys.json").read_text())


def shrunk(shape: Shape) -> Shape:
    return [n // 16 if n >= 16 else n for n in shape]


def as_they_are(shape: Shape) -> Shape:
    return list(shape)


def random_tensors(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of these shapes, of sizes as in a trained network."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _random_tensor(name, shape, generator) for name, shape in shapes.items()}


def _random_tensor(name: str, shape: Shape, generator: torch.Generator) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(1000)
    if name.endswith("queue_ptr"):
        return torch.tensor([256])
    noise = torch.randn(shape, generator=generator)
    if name.endswith("running_var"):
        return 1 + 0.1 * noise.abs()
    if len(shape) == 4:
        return noise * (2 / noise[0].numel()) ** 0.5
    if len(shape) == 2:
        return noise / shape[1] ** 0.5
    return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise


# -- the files


def ressl(scale: Callable[[Shape], Shape] = shrunk, arch: str = "resnet50", seed: int = 0) -> dict[str, Any]:
    spec = keys("ressl")["archs"][arch]
    model = random_tensors({name: scale(entry["shape"]) for name, entry in spec["model"].items()}, seed)
    model["module.queue"] = F.normalize(model["module.queue"], dim=0)
    groups = [group["params_in_index_order"] for group in spec["optimizer_groups"]]
    trained = [name for name in model if "encoder_q" in name]
    return {"model": model, "optimizer": sgd(groups, model, trained), "epoch": 3}


def wcl(scale: Callable[[Shape], Shape] = shrunk, seed: int = 0) -> dict[str, Any]:
    spec = keys("wcl")["archs"]["resnet50"]
    model = random_tensors({name: scale(entry["shape"]) for name, entry in spec["model"].items()}, seed)
    groups = [[f"module.{name}" for name in group["params_in_index_order"]] for group in spec["optimizer_groups"]]
    return {"model": model, "optimizer": sgd(groups, model, list(model)), "epoch": 100}


def resa(scale: Callable[[Shape], Shape] = shrunk, seed: int = 0) -> dict[str, Any]:
    entries = keys("resa")["full_checkpoint_state_dict"]
    model = random_tensors({name: scale(shape) for name, (shape, _) in entries.items()}, seed)
    order = [name for name in model if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    trained = [name for name in order if "momentum_" not in name]
    return {"epoch": 100, "state_dict": model, "optimizer": sgd([order], model, trained)}


def resa_encoder(scale: Callable[[Shape], Shape] = shrunk, seed: int = 0) -> dict[str, Tensor]:
    return random_tensors({name: scale(shape) for name, (shape, _) in keys("resa")["encoder_only"].items()}, seed)


def relational(arch: str = "conv4", scale: Callable[[Shape], Shape] = as_they_are, seed: int = 0) -> dict[str, Any]:
    spec = keys("relational")[arch]["relationnet"]
    parts = {
        part: random_tensors({name: scale(shape) for name, shape in spec[part].items()}, seed + i)
        for i, part in enumerate(("backbone", "relation"))
    }
    groups = [[name for name in part if not name.endswith(_BUFFERS)] for part in parts.values()]
    numbers = iter(range(1000))
    state = {}
    for part, names in zip(parts.values(), groups, strict=True):
        for name in names:
            moments = random_tensors({"exp_avg": list(part[name].shape), "b": list(part[name].shape)}, len(state))
            state[next(numbers)] = {"step": 7, "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["b"].square()}
    first = len(groups[0])
    params = [list(range(first)), list(range(first, len(state)))]
    optimizer = {"state": state, "param_groups": [{"lr": 1e-3, "params": numbers} for numbers in params]}
    return {**parts, "optimizer": optimizer}


_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def sgd(groups: list[list[str]], model: Mapping[str, Tensor], trained: list[str]) -> dict[str, Any]:
    """State of torch's SGD: parameters are numbered through the groups, momentum is there of what is trained."""
    state, params, number = {}, [], 0
    for group in groups:
        params.append(list(range(number, number + len(group))))
        for name in group:
            if name in trained:
                state[number] = {"momentum_buffer": torch.full_like(model[name], 1e-3 * number)}
            number += 1
    return {"state": state, "param_groups": [{"lr": 0.05, "momentum": 0.9, "params": numbers} for numbers in params]}


def relicv2(scale: Callable[[Shape], Shape] = shrunk, *, devices: int | None = 2, seed: int = 0) -> dict[str, Any]:
    """The contents of `pretrain.pkl`: dictionaries of arrays, with an axis of devices in front or without."""
    spec = keys("relicv2")
    rng = np.random.default_rng(seed)

    def array(module: str, name: str, shape: Shape) -> np.ndarray:
        if name == "counter":
            value = np.asarray(1000, dtype=np.int32)
        else:
            value = rng.standard_normal(scale(shape)).astype(np.float32)
            if name == "w":
                value *= (2 / np.prod(value.shape[:-1])) ** 0.5
            elif name == "scale":
                value = 1 + 0.1 * value
            else:
                value = 1 + 0.1 * np.abs(value) if module.endswith("var_ema") else 0.1 * value
        return value if devices is None else np.stack([value] * devices)

    def modules(*parts: str) -> dict[str, dict[str, np.ndarray]]:
        entries = {module: leaves for part in parts for module, leaves in spec[part].items()}
        return {
            m: {name: array(m, name, shape) for name, (shape, _) in leaves.items()} for m, leaves in entries.items()
        }

    state = {
        "online_params": modules("online_params_backbone", "byol_style_extra_params"),
        "online_state": modules("online_state_backbone", "byol_style_extra_state"),
    }
    return {"experiment_state": state, "step": 5000, "rng": np.zeros(2, np.uint32)}


def write_pickle(path: Path, contents: Any, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(contents, protocol))
    return path


def write(path: Path, contents: Any) -> Path:
    torch.save(contents, path)
    return path


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# -- the networks


def conv4_features(state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    for stage in range(1, 5):
        x = F.conv2d(x, state[f"layer{stage}.conv.weight"], padding=1)
        x = F.relu(_norm(state, f"layer{stage}.bn", x))
        x = F.avg_pool2d(x, 2) if stage < 4 else x.mean((2, 3))
    return x


def resnet_features(state: Mapping[str, Tensor], x: Tensor, *, stem: str = "imagenet", same: bool = False) -> Tensor:
    """A ResNet of two or three convolutions a block, written out; `same` pads as TensorFlow does."""
    conv = _same_conv if same else _conv
    x = F.relu(_norm(state, "bn1", conv(x, state["conv1.weight"], 2 if stem == "imagenet" else 1)))
    if same:
        x = F.max_pool2d(F.pad(x, _tensorflow(x, 3, 2), value=-torch.inf), 3, 2)
    elif stem in ("imagenet", "small"):
        x = F.max_pool2d(x, 3, 2, 1)
    for block, stride in _blocks(state):
        convs = [i for i in (1, 2, 3) if f"{block}.conv{i}.weight" in state]
        y = x
        for i in convs:
            strides = stride if i == (2 if len(convs) == 3 else 1) else 1
            y = _norm(state, f"{block}.bn{i}", conv(y, state[f"{block}.conv{i}.weight"], strides))
            y = y if i == convs[-1] else F.relu(y)
        if f"{block}.downsample.0.weight" in state:
            x = _norm(state, f"{block}.downsample.1", F.conv2d(x, state[f"{block}.downsample.0.weight"], stride=stride))
        x = F.relu(x + y)
    return x.mean((2, 3))


def _blocks(state: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
    for stage in range(1, 5):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in state:
            yield f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            block += 1


def _conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)


def _same_conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return F.conv2d(F.pad(x, _tensorflow(x, weight.shape[2], stride)), weight, stride=stride)


def _tensorflow(x: Tensor, size: int, stride: int) -> list[int]:
    out = []
    for side in (x.shape[3], x.shape[2]):
        total = max((-(-side // stride) - 1) * stride + size - side, 0)
        out += [total // 2, total - total // 2]
    return out


def _norm(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    entries = [state[f"{name}.{entry}"] for entry in ("running_mean", "running_var", "weight", "bias")]
    return F.batch_norm(x, *entries, training=False)
