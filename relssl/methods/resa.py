"""ReSA: Clustering Properties of Self-Supervised Learning (Weng et al., ICML 2025, arXiv:2501.18452), as in its code.

    views: weak (1) and strong (1 or more; sizes may differ); view 0 is the weak one

    h_v = encoder(view v),  z_v = normalize(predictor(projector(h_v)))               for each view, one per forward
    target <- m * target + (1 - m) * online                                          parameters; m rises to 1
    h'_v, z'_v = the same by the target, without predictor or gradient               views 0 and 1 only
    A = sinkhorn( normalize(h_0) . normalize(h'_0) of all processes )                no gradient
    loss = mean over q, v in {0, 1}, q != v of CE( A, softmax(z_q . z'_v of all processes / tau) )

The target's encoder is what is evaluated. Legend: B images of this process, N of all processes, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import ViewBatch
from relssl import dist
from relssl.losses import assignment_cross_entropy, sinkhorn_assign
from relssl.methods import base
from relssl.nets import BatchNorm1d, ema_update, make_teacher
from relssl.ops.precision import full_precision
from relssl.ops.rows import spread, unit_rows
from relssl.optim import cosine_ema


class ReSAConfig(base.MethodConfig):
    """Defaults are the ImageNet settings of the code; its CIFAR variant has no predictor."""

    name: str = "resa"
    hidden_dim: int = Field(2048, gt=0, description="of projector and predictor")
    embed_dim: int = Field(512, gt=0)
    predictor: bool = True
    momentum: float = Field(0.996, ge=0, le=1, description="of the target's moving average at first; it rises to 1")
    temperature: float = Field(0.4, gt=0)
    sinkhorn_temperature: float = Field(0.05, gt=0)
    sinkhorn_iterations: int = Field(3, ge=1)


class Method(base.Method):
    Config = ReSAConfig
    config: ReSAConfig
    VIEWS: ClassVar = {"weak": (1, 1), "strong": (1, None)}
    NEEDS = frozenset({"full_batch"})
    ACCUMULATION = "approximate"  # targets and assignments come from one micro-batch
    EVALUATED = "target.encoder"

    def __init__(self, make_backbone: Callable[[], Any], config: ReSAConfig, data: base.DataInfo):
        super().__init__(make_backbone, config, data)
        self.encoder = make_backbone()
        self.projector = projector(self.encoder.feature_dim, config.hidden_dim, config.embed_dim)
        self.predictor = predictor(config.hidden_dim, config.embed_dim) if config.predictor else nn.Identity()
        self.target = make_teacher(nn.ModuleDict({"encoder": self.encoder, "projector": self.projector}))

    def forward(self, batch: ViewBatch, step: base.Step) -> tuple[Tensor, dict[str, Tensor]]:
        views = [*batch.views["weak"], *batch.views["strong"]]
        h_BF = [self.encoder(x) for x in views]
        z_BD = [unit_rows(self.predictor(self.projector(h))) for h in h_BF]
        with torch.no_grad():
            if step.micro == 0:
                self._update_target(step)
            h_target_BF = [self.target["encoder"](x) for x in views[:2]]
            target_ND = [dist.gather(unit_rows(self.target["projector"](h))) for h in h_target_BF]
            assign_BN = self._assign(h_BF[0], h_target_BF[0])
        losses = [
            assignment_cross_entropy(z_BD[q], target_ND[v], assign_BN, temperature=self.config.temperature)
            for q in range(len(views))
            for v in (0, 1)
            if q != v
        ]
        return torch.stack(losses).mean(), {"embedding_spread": spread(torch.cat(z_BD))}

    def _assign(self, h: Tensor, h_target: Tensor) -> Tensor:
        """(B, N): which of all processes' images the weak views of this process's images belong with."""
        encoding_BF, encodings_NF = unit_rows(h), dist.gather(unit_rows(h_target))
        with full_precision(h.device):  # exp(scores / 0.05) wants their digits
            scores_BN = encoding_BF @ encodings_NF.T
        return sinkhorn_assign(
            scores_BN, temperature=self.config.sinkhorn_temperature, iterations=self.config.sinkhorn_iterations
        )

    def _update_target(self, step: base.Step) -> None:
        momentum = cosine_ema(step.update, base=self.config.momentum, total_steps=self.data.total_updates)
        ema_update(self.target["encoder"], self.encoder, momentum)
        ema_update(self.target["projector"], self.projector, momentum)


def projector(feature_dim: int, hidden_dim: int, embed_dim: int) -> nn.Sequential:
    """Linear, BatchNorm, ReLU twice, then Linear and a BatchNorm without scale and shift; the original's names."""
    return nn.Sequential(
        nn.Linear(feature_dim, hidden_dim), BatchNorm1d(hidden_dim), nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, hidden_dim), BatchNorm1d(hidden_dim), nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, embed_dim), BatchNorm1d(embed_dim, affine=False),
    )  # fmt: skip


def predictor(hidden_dim: int, embed_dim: int) -> nn.Sequential:
    """Linear, BatchNorm, ReLU, Linear; the original's names."""
    return nn.Sequential(
        nn.Linear(embed_dim, hidden_dim),
        BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, embed_dim),
    )
