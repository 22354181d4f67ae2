"""ReLICv2 (Tomasev et al., "Pushing the limits of self-supervised ResNets", arXiv:2201.05119): a reading of the paper.

Its pre-training was never released. Where what is public of the paper is silent, BYOL's code, on which the released
evaluation builds, is followed; `relssl.losses.relicv2` says how the objective is read. Recipes list what is assumed.

    views: large (1 or more) and small (any number); large ones may have lost their background

    o_i = predictor(projector(encoder(view i)))                      all views, one per forward
    t_j = target(view j)                                             large views; no gradient
    loss = sum over i, j of ( alpha contrastive(o_i, t_j) + beta invariance(o_i, t_j) ) / number of pairs
           with the same n negatives of an image for all pairs, drawn from the images of all processes
    target <- m target + (1 - m) [encoder, projector]                after the update; parameters only, m rises to 1

Legend: B images of this process, G of all processes, V views, D embedding, n negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipelines.batch import ViewBatch
from pipelines.errors import ConfigError
from relssl import dist
from relssl.losses import relicv2_terms
from relssl.methods import base
from relssl.nets import BatchNorm1d, ema_update, make_teacher
from relssl.ops.rows import spread
from relssl.ops.transfer import from_host
from relssl.optim import cosine_ema


class ReLICv2Config(base.MethodConfig):
    """Head sizes and momentum are BYOL's; weights, temperature, negatives, stop-gradient are in no public source."""

    name: str = "relicv2"
    hidden_dim: int = Field(4096, gt=0, description="of projector and predictor")
    embed_dim: int = Field(256, gt=0)
    predictor: bool = True
    momentum: float = Field(0.996, ge=0, le=1, description="of the target's moving average at first; it rises to 1")
    temperature: float = Field(0.3, gt=0)
    alpha: float = Field(0.3, ge=0, description="weight of the contrastive term")
    beta: float = Field(5.0, ge=0, description="weight of the invariance term")
    num_negatives: int | None = Field(10, gt=0, description="of each image; all other images when null")
    invariance: Literal["transpose", "swap"] = "transpose"
    stop_gradient: bool = Field(True, description="no gradient through the entropy in the invariance term")

    @model_validator(mode="after")
    def _has_a_loss(self) -> ReLICv2Config:
        if not self.alpha and not self.beta:
            raise ValueError("alpha and beta are both 0, so the loss is; give one of them a weight")
        return self


class Method(base.Method):
    Config = ReLICv2Config
    config: ReLICv2Config
    VIEWS: ClassVar = {"large": (1, None), "small": (0, None)}
    NEEDS = frozenset({"full_batch"})
    ACCUMULATION = "approximate"  # negatives come from one micro-batch

    def __init__(self, make_backbone: Callable[[], Any], config: ReLICv2Config, data: base.DataInfo):
        super().__init__(make_backbone, config, data)
        _check_negatives(config.num_negatives, data.global_batch)
        self.encoder = make_backbone()
        self.projector = byol_mlp(self.encoder.feature_dim, config.hidden_dim, config.embed_dim)
        self.predictor = (
            byol_mlp(config.embed_dim, config.hidden_dim, config.embed_dim) if config.predictor else nn.Identity()
        )
        self.target = make_teacher(nn.ModuleDict({"encoder": self.encoder, "projector": self.projector}))

    def forward(self, batch: ViewBatch, step: base.Step) -> tuple[Tensor, dict[str, Tensor]]:
        large, small = batch.views["large"], batch.views.get("small", ())
        online_BD = [self.predictor(self.projector(self.encoder(x))) for x in (*large, *small)]
        with torch.no_grad():
            target_BD = [self.target["projector"](self.target["encoder"](x)) for x in large]
        order = dist.gather(batch.position).argsort()  # rank-major -> order of the global batch
        loss, contrastive, invariance = relicv2_terms(
            _of_all_processes(online_BD, order),
            _of_all_processes(target_BD, order),
            draw_negatives(len(order), self.config.num_negatives, step.generator("negatives"), order.device),
            temperature=self.config.temperature,
            alpha=self.config.alpha,
            beta=self.config.beta,
            form=self.config.invariance,
            stop_gradient=self.config.stop_gradient,
        )
        metrics = {
            "contrastive_loss": contrastive,
            "invariance_loss": invariance,
            "embedding_spread": spread(torch.cat(online_BD)),
        }
        return loss, metrics

    def after_update(self, step: base.Step) -> None:
        momentum = cosine_ema(step.update, base=self.config.momentum, total_steps=self.data.total_updates)
        ema_update(self.target["encoder"], self.encoder, momentum)
        ema_update(self.target["projector"], self.projector, momentum)


def _of_all_processes(views_BD: Sequence[Tensor], order: Tensor) -> Tensor:
    """(V, G, D) in the order of the global batch, with gradient."""
    return dist.gather(torch.stack(list(views_BD), dim=1), grad=True)[order].transpose(0, 1)


def _check_negatives(count: int | None, images: int) -> None:
    if count is not None and count >= images:
        raise ConfigError(
            f"num_negatives is {count}, but among the {images} images that are compared each has only {images - 1} "
            "others; lower it, set it to null for all of them, or make the batch larger"
        )


def draw_negatives(images: int, count: int | None, generator: torch.Generator, device: torch.device) -> Tensor:
    """Other images for each image, uniformly and each at most once: (images, count) int64; all others for None.

    Floyd's way of drawing without replacement, for all rows at once, on the host: the same numbers everywhere.

    Raises:
        ConfigError: there are not that many other images.
    """
    _check_negatives(count, images)
    if count is None:
        chosen = torch.arange(images - 1, device=device).expand(images, -1)
    else:
        draws = torch.empty((images, count), dtype=torch.int64)
        taken = torch.zeros((images, images), dtype=torch.bool)
        for i, last in enumerate(range(images - 1 - count, images - 1)):
            drawn = torch.randint(last + 1, (images, 1), generator=generator)
            draws[:, i] = torch.where(taken.gather(1, drawn), last, drawn)[:, 0]
            taken.scatter_(1, draws[:, i : i + 1], True)
        chosen = from_host(draws, device)
    return chosen + (chosen >= torch.arange(images, device=device)[:, None])  # an image is not among its others


def byol_mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Linear, BatchNorm, ReLU, Linear without bias; (B, in_dim) -> (B, out_dim)."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, out_dim, bias=False),
    )
