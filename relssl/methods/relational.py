"""Self-Supervised Relational Reasoning (Patacchiola & Storkey, NeurIPS 2020, arXiv:2006.05849).

    views: view (K, all augmented alike, of one size)

    f_k = encoder(view k), all K N views in one forward           batch statistics over all of them
    positive pairs: two views of one image;  negative pairs: the same two views of two images (a running shift)
    loss = mean over the K (K-1) N pairs of focal( head(f_i, f_j), 1 if one image else 0 )

Pairs are made within a process and micro-batch. Legend: N images of this process, K views, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pipelines.batch import ViewBatch
from relssl.losses import relation_pairs_loss
from relssl.methods import base
from relssl.nets import RelationHead
from relssl.ops.rows import spread


class RelationalConfig(base.MethodConfig):
    """Defaults are the settings of the full original code; `loss: bce` is that of its essential script."""

    name: str = "relational"
    hidden_dim: int = Field(256, gt=0, description="units of the relation head's hidden layer")
    aggregation: Literal["cat", "sum", "mean", "max"] = Field("cat", description="of the features of a pair")
    loss: Literal["focal", "bce"] = Field("focal", description="focal has gamma 2, alpha 0.5")
    chunk_views: int | None = Field(None, gt=0, description="view pairs in memory at once; 1 takes least")


class Method(base.Method):
    Config = RelationalConfig
    config: RelationalConfig
    VIEWS: ClassVar = {"view": (2, None)}
    NEEDS = frozenset({"one_size"})
    ACCUMULATION = "approximate"  # pairs and the head's batch statistics stay within a micro-batch
    PROCESSES = "local"

    def __init__(self, make_backbone: Callable[[], Any], config: RelationalConfig, data: base.DataInfo):
        super().__init__(make_backbone, config, data)
        self.encoder = make_backbone()
        self.relation = RelationHead(self.encoder.feature_dim, config.hidden_dim, config.aggregation)

    def forward(self, batch: ViewBatch, step: base.Step) -> tuple[Tensor, dict[str, Tensor]]:
        f_KND = self.encoder(batch.stacked("view"))
        loss, accuracy = relation_pairs_loss(
            f_KND,
            self.relation,
            views=len(batch.views["view"]),
            loss=self.config.loss,
            chunk_views=self.config.chunk_views,
        )
        return loss, {"pair_accuracy": accuracy, "features_spread": spread(f_KND)}
