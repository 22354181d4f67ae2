"""How a backbone is written for torchvision, timm, safetensors and ONNX, and loaded again as a user would."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pipelines.errors import ConfigError, MissingExtraError, RunError
from pipelines.views import ViewSpec
from relssl._version import __version__
from relssl.evaluate import Weights
from relssl.nets import build_backbone
from relssl.nets.timm_backbone import PREFIX as TIMM

_LARGEST_ONNX = 2**31 - 2**20  # bytes of weights: a protobuf file ends there
_OPSET = 18  # of ONNX; runtimes of the last years know it

Network = Callable[[Tensor], Tensor]


class Subject:
    """The backbone to export: float32, in evaluation mode, on the CPU, and how images get to it."""

    def __init__(self, weights: Weights, bakes: bool = False) -> None:
        self.name = weights.recipe.backbone.name
        self.options = weights.recipe.backbone.options
        self.backbone = copy.deepcopy(weights.backbone).float().eval().requires_grad_(False)
        self.view = weights.recipe.eval_spec()
        self.size = self.view.size
        mean, std = self.view.normalize or ((0.0,) * 3, (1.0,) * 3)
        self.mean, self.std = tuple(mean), tuple(std)
        self.bakes = bakes
        self.network = _Normalised(self.backbone, self.mean, self.std).eval() if bakes else self.backbone

    def images(self, count: int) -> Tensor:
        """Numbers like those of images, (count, 3, S, S), the same at every call."""
        pixels = torch.rand((count, 3, self.size, self.size), generator=torch.Generator().manual_seed(count))
        return pixels if self.bakes else _normalise(pixels, self.mean, self.std)

    @property
    def preparation(self) -> str:
        """In words, what happens to an image before the network."""
        last = "RGB in [0, 1]" if self.bakes else f"RGB in [0, 1], minus {list(self.mean)}, over {list(self.std)}"
        return f"{_box(self.view)}; {last}"


class Format(ABC):
    """One way of writing a backbone.

    Attributes:
        tolerance: of features, relative to the largest.
    """

    name: str
    suffixes: tuple[str, ...]
    tolerance = 1e-5

    @abstractmethod
    def refuse(self, weights: Weights) -> None:
        """Raise ConfigError for a backbone that the format cannot hold, MissingExtraError without its package."""

    @abstractmethod
    def write(self, subject: Subject, path: Path) -> None: ...

    @abstractmethod
    def load(self, subject: Subject, path: Path) -> Network:
        """The network as a user gets it from the file."""

    @abstractmethod
    def snippet(self, subject: Subject, place: str) -> str:
        """The lines that a user types, with the file at `place` as seen from where they are typed."""


class Torchvision(Format):
    """A state dict for `torchvision.models`, whose `fc` is left out."""

    name = "torchvision"
    suffixes = (".pth", ".pt")

    def refuse(self, weights: Weights) -> None:
        from torchvision import models

        backbone = weights.recipe.backbone
        _refuse_unlike(self.name, backbone.name, backbone.options, set(models.list_models(module=models)))

    def write(self, subject: Subject, path: Path) -> None:
        torch.save(_plain_state(subject.backbone), path)

    def load(self, subject: Subject, path: Path) -> Network:
        from torchvision import models

        model = models.get_model(subject.name, weights=None)
        model.fc = nn.Identity()
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()

    def snippet(self, subject: Subject, place: str) -> str:
        return (
            "import torch, torchvision\n"
            f"model = torchvision.models.{subject.name}(weights=None)\n"
            "model.fc = torch.nn.Identity()\n"
            f"model.load_state_dict(torch.load({_quoted(place)}, weights_only=True))\n"
            "model.eval()"
        )


class Timm(Format):
    """A state dict for `timm.create_model`."""

    name = "timm"
    suffixes = (".safetensors", ".pth")

    def refuse(self, weights: Weights) -> None:
        timm = _need("timm")
        backbone = weights.recipe.backbone
        if not backbone.name.startswith(TIMM):
            _refuse_unlike(self.name, backbone.name, backbone.options, set(timm.list_models()))

    def write(self, subject: Subject, path: Path) -> None:
        state = {name.removeprefix("net."): t for name, t in _plain_state(subject.backbone).items()}
        if path.suffix == ".safetensors":
            _write_safetensors(state, path, {"format": "pt"})
        else:
            torch.save(state, path)

    def load(self, subject: Subject, path: Path) -> Network:
        name = subject.name.removeprefix(TIMM)
        options = self._options(subject)
        return _need("timm").create_model(name, num_classes=0, checkpoint_path=str(path), **options).eval()

    def snippet(self, subject: Subject, place: str) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self._options(subject).items())
        return (
            "import timm\n"
            f'model = timm.create_model("{subject.name.removeprefix(TIMM)}", num_classes=0, '
            f"checkpoint_path={_quoted(place)}{options})\n"
            "model.eval()"
        )

    @staticmethod
    def _options(subject: Subject) -> dict[str, Any]:
        return subject.options if subject.name.startswith(TIMM) else {}


class Safetensors(Format):
    """The state dict in our names, for any backbone."""

    name = "safetensors"
    suffixes = (".safetensors",)

    def refuse(self, weights: Weights) -> None:
        if weights.recipe.backbone.name.startswith(TIMM):
            _need("timm")

    def write(self, subject: Subject, path: Path) -> None:
        header = {
            "format": "pt",  # what Hugging Face's tools look for
            "architecture": subject.name,
            "options": json.dumps(subject.options),
            "mean": json.dumps(subject.mean),
            "std": json.dumps(subject.std),
            "relssl": __version__,
        }
        _write_safetensors(_plain_state(subject.backbone), path, header)

    def load(self, subject: Subject, path: Path) -> Network:
        backbone = build_backbone(subject.name, **subject.options)
        backbone.load_state_dict(load_file(path))
        return backbone.eval()

    def snippet(self, subject: Subject, place: str) -> str:
        options = "".join(f", {key}={value!r}" for key, value in subject.options.items())
        return (
            "from safetensors.torch import load_file\n"
            "from relssl.nets import build_backbone\n"
            f'model = build_backbone("{subject.name}"{options})\n'
            f"model.load_state_dict(load_file({_quoted(place)}))\n"
            "model.eval()"
        )


class Onnx(Format):
    """A whole network for ONNX Runtime and others; any batch size, images of one size."""

    name = "onnx"
    suffixes = (".onnx",)
    tolerance = 1e-4  # another library's convolutions

    def refuse(self, weights: Weights) -> None:
        for package in ("onnx", "onnxruntime", "onnxscript"):
            _need(package)
        size = sum(t.numel() * 4 for t in weights.backbone.state_dict().values())
        if size > _LARGEST_ONNX:
            raise ConfigError(
                f"{weights.recipe.backbone.name} has {size / 2**30:.1f} GiB of weights, and an ONNX file ends at "
                "2 GiB; use --format safetensors"
            )

    def write(self, subject: Subject, path: Path) -> None:
        onnx = _need("onnx")
        try:
            torch.onnx.export(
                subject.network,
                (subject.images(2),),
                path,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=_OPSET,
                external_data=False,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # it has many ways to fail, and each of its errors is long
            reason = str(error).strip().splitlines()[0]
            raise RunError(
                f"PyTorch cannot write {subject.name} as ONNX: {reason}; use --format safetensors"
            ) from error
        model = onnx.load(path)
        for part in (
            model.graph,
            *model.graph.node,
            *model.graph.initializer,
            *model.graph.value_info,
            *model.functions,
        ):
            del part.metadata_props[:]  # where the code of each operation stands on this machine
        values = {"preparation": subject.preparation, "architecture": subject.name, "relssl": __version__}
        onnx.helper.set_model_props(model, values)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)

    def load(self, subject: Subject, path: Path) -> Network:
        session = _need("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    def snippet(self, subject: Subject, place: str) -> str:
        return (
            "import onnxruntime\n"
            f'session = onnxruntime.InferenceSession({_quoted(place)}, providers=["CPUExecutionProvider"])\n'
            'features = session.run(None, {"images": images})[0]  '
            f"# images: float32 (any number, 3, {subject.size}, {subject.size})"
        )


FORMATS: dict[str, type[Format]] = {kind.name: kind for kind in (Torchvision, Timm, Safetensors, Onnx)}


class _Normalised(nn.Module):
    """A backbone that takes pixels in [0, 1]."""

    def __init__(self, backbone: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.backbone, self.mean, self.std = backbone, mean, std

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(_normalise(x, self.mean, self.std))


def _normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    middle, width = (torch.tensor(values, dtype=pixels.dtype).view(1, 3, 1, 1) for values in (mean, std))
    return (pixels - middle) / width


def _refuse_unlike(format: str, name: str, options: dict[str, Any], known: set[str]) -> None:
    """Refuse what torchvision's and timm's ResNets are not."""
    instead = "use --format safetensors or onnx"
    if name.startswith("relicv2_"):
        raise ConfigError(
            f"{format} has no {name}: its convolutions pad as TensorFlow does, and in a network that pads evenly the "
            f"same weights give other features; {instead}"
        )
    if name not in known:
        raise ConfigError(f"{format} has no {name}; {instead}")
    stem, width = options.get("stem", "imagenet"), options.get("width", 1)
    if stem != "imagenet" or width != 1:
        what = f"the stem {stem!r}" if stem != "imagenet" else f"{width} times the width"
        raise ConfigError(
            f"{format}'s {name} has neither another stem nor another width, and this one has {what}; {instead}"
        )


def _quoted(place: str) -> str:
    """A string of Python, also of a place with quotes in it."""
    return json.dumps(place, ensure_ascii=False)


def _plain_state(backbone: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in backbone.state_dict().items()}


def _write_safetensors(state: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
    path.write_bytes(save(state, metadata=header))


def _need(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"this export needs {package}, which cannot be imported ({error}). "
            "Install it with the extra `export`: pip install relssl[export]"
        ) from error


def _box(spec: ViewSpec) -> str:
    """The evaluation view in words."""
    resampling = spec.interpolation + ("" if spec.antialias else ", not antialiased")
    square, values = f"{spec.size} x {spec.size}", spec.box_options
    if spec.box_kind == "center":
        return f"resize the short side to {values['resize']} pixels ({resampling}), take the central {square}"
    if spec.box_kind == "byol_center":
        return f"take the central square of {values['share']} of the short side, resize to {square} ({resampling})"
    return (
        f"resize to {square} pixels ({resampling})" if spec.box_kind == "whole" else f"box {spec.box_kind} to {square}"
    )
