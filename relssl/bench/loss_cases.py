"""Which losses are raced, at which sizes, and what else a training step with them does.

A loss is one entry of `CASES`: how its inputs are made, ours and the naive forms as functions of them, and the
backbones whose forward and backward pass stand beside it. Sizes are those of published settings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.errors import ConfigError, unknown_name
from relssl.bench import naive
from relssl.losses import (
    assignment_cross_entropy,
    component_contrastive,
    connected_components,
    nearest_neighbours,
    nt_xent,
    relation_pairs_loss,
    relational_cross_entropy,
    relicv2_loss,
    sinkhorn_assign,
)
from relssl.nets import RelationHead

Sizes = Mapping[str, int]
OURS, NAIVE = "relssl", "naive"


@dataclass(frozen=True)
class Problem:
    """One loss on one set of inputs, which no form changes.

    Attributes:
        leaves: what gets a gradient, by name.
        forms: by name, `OURS` first; each returns the loss, 0-d.
        noughts: leaves whose gradient is 0 but for rounding; they are compared with the whole gradient.
    """

    leaves: Mapping[str, Tensor]
    forms: Mapping[str, Callable[[], Tensor]]
    noughts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Pass:
    """`count` images of `side` x `side` pixels through the backbone, and back where `trains`."""

    count: int
    side: int
    trains: bool = True


@dataclass(frozen=True)
class Backbone:
    """The rest of a step: a backbone of `relssl.nets` and what goes through it."""

    name: str
    passes: Callable[[Sizes], Sequence[Pass]]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return " ".join([self.name, *(f"({value} stem)" for value in self.options.values())])


@dataclass(frozen=True)
class LossCase:
    """A loss under a name.

    Attributes:
        title: what it is.
        sizes: the published ones, by name.
        make: inputs of given sizes in a dtype on a device, from a generator.
        backbones: the published ones.
        least: the smallest sizes that make sense, where that is not 1.
        targets: "time" and "memory": how many times as good as a naive form ours is meant to be, at these sizes.
        kinked: the gradient jumps where a pre-activation is 0, so forms that round differently differ more.
    """

    name: str
    title: str
    sizes: Sizes
    make: Callable[[Sizes, torch.dtype, torch.device, torch.Generator], Problem]
    backbones: tuple[Backbone, ...]
    least: Sizes = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=dict)
    kinked: bool = False


# ---- relational reasoning: N = 64 images, K = 32 views, conv4 or a ResNet with 64 features, 256 hidden units


def _relation(
    aggregation: str, sizes: Sizes, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Problem:
    """Features are positive, as after a ReLU, and never equal, so that no maximum is a tie."""
    views, images, dim = sizes["views"], sizes["images"], sizes["features"]
    features = torch.rand(views * images, dim, generator=generator).to(device, dtype).requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = RelationHead(dim, sizes["hidden"], aggregation)
    head.to(device, _parameter_dtype(dtype))
    pairs = naive.pair_rows(views, images, device)
    return Problem(
        leaves={"features": features, **dict(head.named_parameters())},
        forms={
            OURS: lambda: relation_pairs_loss(features, head, views=views)[0],
            NAIVE: lambda: naive.gathered_pairs_loss(features, head, views, pairs),
            "naive loop": lambda: naive.looped_pairs_loss(features, head, views),
        },
        noughts=frozenset({"linear1.bias"}),
    )


def _relation_case(aggregation: str) -> LossCase:
    def passes(sizes: Sizes) -> list[Pass]:
        return [Pass(sizes["views"] * sizes["images"], 32)]

    return LossCase(
        f"relation-{aggregation}",
        f"relation head on all pairs ({aggregation}), focal loss",
        {"images": 64, "views": 32, "features": 64, "hidden": 256},
        partial(_relation, aggregation),
        (Backbone("conv4", passes), Backbone("resnet56", passes)),
        least={"images": 2, "views": 2},
        targets={"time": 3.0, "memory": 10.0},
        kinked=True,
    )


# ---- NT-Xent


def _nt_xent(sizes: Sizes, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Problem:
    view1, view2 = (
        _rows(sizes["images"], sizes["features"], dtype, device, generator).requires_grad_() for _ in range(2)
    )
    return Problem(
        leaves={"view1": view1, "view2": view2},
        forms={
            OURS: lambda: nt_xent(view1, view2, temperature=0.5),
            NAIVE: lambda: naive.nt_xent(view1, view2, temperature=0.5),
        },
    )


def _two_views(sizes: Sizes) -> list[Pass]:
    return [Pass(2 * sizes["images"], 32)]


# ---- ReSSL: the teacher sees one weak view, the student V strong ones, five of them in shrinking sizes


def _ressl(sizes: Sizes, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Problem:
    images, dim = sizes["images"], sizes["features"]
    student = _rows(sizes["crops"] * images, dim, dtype, device, generator).requires_grad_()
    teacher = _rows(images, dim, dtype, device, generator)
    queue = _rows(sizes["queue"], dim, dtype, device, generator)
    return Problem(
        leaves={"student": student},
        forms={
            OURS: lambda: relational_cross_entropy(student, teacher, queue, normalised=True),
            NAIVE: lambda: naive.relational_cross_entropy(student, teacher, queue),
        },
    )


def _ressl_passes(sides: Sequence[int], sizes: Sizes) -> list[Pass]:
    students = [Pass(sizes["images"], side) for side in itertools.islice(itertools.cycle(sides), sizes["crops"])]
    return [Pass(sizes["images"], sides[0], trains=False), *students]


def _ressl_case(name: str, title: str, sizes: Sizes, backbone: str, sides: Sequence[int], **more: Any) -> LossCase:
    options = {"stem": "cifar"} if backbone == "resnet18" else {}
    rest = Backbone(backbone, partial(_ressl_passes, sides), options)
    return LossCase(name, title, sizes, _ressl, (rest,), **more)


# ---- WCL: the graph of one view labels the images of the other; 32 x 128 images, which every process gathers


def _wcl(sizes: Sizes, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Problem:
    anchors, other = (_rows(sizes["images"], sizes["features"], dtype, device, generator) for _ in range(2))
    anchors.requires_grad_()

    def ours() -> Tensor:
        labels = connected_components(nearest_neighbours(other))
        return component_contrastive(anchors, anchors.detach(), labels, temperature=0.1)

    def textbook() -> Tensor:
        labels = naive.component_labels(other)
        return naive.component_contrastive(anchors, anchors.detach(), labels, temperature=0.1)

    return Problem(leaves={"anchors": anchors}, forms={OURS: ours, NAIVE: textbook})


# ---- ReSA: one assignment, from encodings, for both views' embeddings


def _resa(sizes: Sizes, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Problem:
    """Scores are given, and wide: to make them is the same product in both forms."""
    images, dim = sizes["images"], sizes["features"]
    wide = _parameter_dtype(dtype)
    online, moved = (_rows(images, dim, wide, device, generator) for _ in range(2))
    scores = online @ F.normalize(online + moved, dim=1).T
    views = [_rows(images, dim, dtype, device, generator).requires_grad_() for _ in range(2)]
    targets = [_rows(images, dim, dtype, device, generator) for _ in range(2)]

    def loss(assign_by: Callable[..., Tensor], compare: Callable[..., Tensor]) -> Tensor:
        assign = assign_by(scores)
        first = compare(views[0], targets[1], assign, temperature=0.4)
        return (first + compare(views[1], targets[0], assign, temperature=0.4)) / 2

    return Problem(
        leaves={"view1": views[0], "view2": views[1]},
        forms={
            OURS: lambda: loss(sinkhorn_assign, assignment_cross_entropy),
            NAIVE: lambda: loss(naive.sinkhorn_assign, naive.assignment_cross_entropy),
        },
    )


def _resa_passes(sizes: Sizes) -> list[Pass]:
    return [Pass(sizes["images"], 224, trains=trains) for trains in (True, True, False, False)]


# ---- ReLICv2: every crop against every large crop's target, with ten negatives of the global batch


def _relicv2(sizes: Sizes, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Problem:
    images, dim, large = sizes["images"], sizes["features"], sizes["large"]

    def crops(count: int) -> Tensor:
        return torch.randn(count, images, dim, generator=generator).to(device, dtype)

    online, target = crops(large + sizes["small"]).requires_grad_(), crops(large)
    negatives = torch.rand(images, images - 1, generator=generator).topk(sizes["negatives"], dim=1).indices
    negatives += negatives >= torch.arange(images)[:, None]
    given = (online, target, negatives.to(device))
    ours = partial(relicv2_loss, *given, temperature=0.3, alpha=0.3, beta=5.0)
    textbook = partial(naive.relicv2_loss, *given, temperature=0.3, alpha=0.3, beta=5.0)
    return Problem(
        leaves={"online": online},
        forms={
            OURS: ours,
            NAIVE: textbook,
            "naive gathered": partial(textbook, gathers=True),
        },
    )


def _relicv2_passes(sizes: Sizes) -> list[Pass]:
    images = sizes["images"]
    online = [Pass(images, 224)] * sizes["large"] + [Pass(images, 96)] * sizes["small"]
    return [*online, *[Pass(images, 224, trains=False)] * sizes["large"]]


def _rows(count: int, dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Rows of unit length."""
    return F.normalize(torch.randn(count, dim, generator=generator), dim=1).to(device, dtype)


def _parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Under autocast parameters stay float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


CASES = {
    case.name: case
    for case in (
        _relation_case("cat"),
        _relation_case("sum"),
        _relation_case("max"),
        LossCase(
            "nt-xent-small",
            "NT-Xent at the size of relational reasoning's SimCLR",
            {"images": 128, "features": 64},
            _nt_xent,
            (Backbone("conv4", _two_views), Backbone("resnet32", _two_views)),
        ),
        LossCase(
            "nt-xent",
            "NT-Xent at the size of SimCLR on CIFAR-10",
            {"images": 512, "features": 128},
            _nt_xent,
            (Backbone("resnet50", _two_views, {"stem": "cifar"}),),
        ),
        _ressl_case(
            "ressl-small",
            "ReSSL's relational cross-entropy on CIFAR-10",
            {"images": 256, "crops": 1, "features": 128, "queue": 4096},
            "resnet18",
            (32,),
        ),
        _ressl_case(
            "ressl-1crop",
            "ReSSL's relational cross-entropy on ImageNet, one crop",
            {"images": 256, "crops": 1, "features": 512, "queue": 131072},
            "resnet50",
            (224,),
        ),
        _ressl_case(
            "ressl-5crop",
            "ReSSL's relational cross-entropy on ImageNet, five crops",
            {"images": 256, "crops": 5, "features": 512, "queue": 131072},
            "resnet50",
            (224, 192, 160, 128, 96),
            targets={"memory": 20.0},
        ),
        LossCase(
            "wcl-graph",
            "WCL's graph loss of one view",
            {"images": 4096, "features": 256},
            _wcl,
            (Backbone("resnet50", lambda sizes: [Pass(sizes["images"], 224)]),),
            least={"images": 2},
            targets={"memory": 10.0},
        ),
        LossCase(
            "resa",
            "ReSA's assignment and cross-entropy of both views",
            {"images": 1024, "features": 512},
            _resa,
            (Backbone("resnet50", _resa_passes),),
        ),
        LossCase(
            "relicv2",
            "ReLICv2's objective, four large and two small crops",
            {"images": 1024, "features": 256, "large": 4, "small": 2, "negatives": 10},
            _relicv2,
            (Backbone("relicv2_resnet50", _relicv2_passes),),
            least={"images": 2},
        ),
    )
}


def find_cases(names: Sequence[str] | None) -> list[LossCase]:
    """The cases of these names, each once; all of them for None.

    Raises:
        ConfigError: there is no such case; the message names the nearest.
    """
    for name in names or ():
        if name not in CASES:
            raise ConfigError(unknown_name("case", name, CASES))
    return [CASES[name] for name in dict.fromkeys(CASES if names is None else names)]


def resized(cases: Sequence[LossCase], changes: Sizes) -> list[tuple[LossCase, Sizes]]:
    """Each case with its sizes, changed where it has a size of that name.

    Raises:
        ConfigError: no case has a size of that name, or a size is too small for one of them.
    """
    known = dict.fromkeys(name for case in cases for name in case.sizes)
    for name in changes:
        if name not in known:
            raise ConfigError(unknown_name(f"size of {', '.join(case.name for case in cases)}", name, known))
    sized: list[tuple[LossCase, Sizes]] = [
        (case, {name: changes.get(name, size) for name, size in case.sizes.items()}) for case in cases
    ]
    for case, sizes in sized:
        for name, size in sizes.items():
            if size < case.least.get(name, 1):
                raise ConfigError(f"--size {name}: {case.name} needs at least {case.least.get(name, 1)}, got {size}")
    return sized
