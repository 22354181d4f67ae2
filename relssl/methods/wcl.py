"""WCL: Weakly Supervised Contrastive Learning (Zheng et al., ICCV 2021, arXiv:2110.04770), as in its code.

    views: view (2, augmented alike; weak while the learning rate warms up, then strong)

    z_v = normalize(head1(encoder(view v))),  u_v = normalize(head2(encoder(view v)))     one view per forward
    instance loss = NT-Xent of z_1 and z_2                                                other processes' z: constants
    labels_v = components of the graph in which every u_v points at its nearest neighbour, over all processes
    graph loss = mean of the losses that pull u_1 together by labels_2, and u_2 by labels_1
    loss = instance loss + graph loss

Legend: B images of this process, N of all processes, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pipelines.batch import ViewBatch
from pipelines.errors import ConfigError
from relssl import dist
from relssl.losses import component_contrastive, connected_components, nearest_neighbours, nt_xent
from relssl.methods import base
from relssl.nets import DeepMLPHead
from relssl.ops.rows import spread, unit_rows


class WCLConfig(base.MethodConfig):
    """Defaults are those of the code and its released weights; the paper has heads of 2048 and 128."""

    name: str = "wcl"
    hidden_dim: int = Field(4096, gt=0, description="width of both hidden layers of the heads")
    embed_dim: int = Field(256, gt=0)
    temperature: float = Field(0.1, gt=0, description="of both losses")


class Method(base.Method):
    Config = WCLConfig
    config: WCLConfig
    VIEWS: ClassVar = {"view": (2, 2)}
    NEEDS = frozenset({"full_batch"})
    ACCUMULATION = "approximate"  # negatives and neighbours come from one micro-batch
    PROCESSES = "constants"

    def __init__(self, make_backbone: Callable[[], Any], config: WCLConfig, data: base.DataInfo):
        super().__init__(make_backbone, config, data)
        if data.global_batch < 3:
            raise ConfigError(
                f"wcl got {data.global_batch} images an update: its graph then always joins all of them, and nothing is "
                "told apart; take a batch of at least 3, and of hundreds for features worth having"
            )
        self.encoder = make_backbone()
        self.head1 = DeepMLPHead(self.encoder.feature_dim, config.hidden_dim, config.embed_dim)
        self.head2 = DeepMLPHead(self.encoder.feature_dim, config.hidden_dim, config.embed_dim)

    def forward(self, batch: ViewBatch, step: base.Step) -> tuple[Tensor, dict[str, Tensor]]:
        features = [self.encoder(x) for x in batch.views["view"]]
        z1_BD, z2_BD = (unit_rows(self.head1(f)) for f in features)
        u_BD = [unit_rows(self.head2(f)) for f in features]

        tau = self.config.temperature
        instance = nt_xent(z1_BD, z2_BD, temperature=tau, extra_keys=_of_other_processes(z1_BD, z2_BD))
        keys_ND = [dist.gather(u.detach()) for u in u_BD]
        labels_N = [dist.broadcast(connected_components(nearest_neighbours(keys))) for keys in keys_ND]
        offset = dist.rank() * len(batch)
        graph = torch.stack(
            [
                component_contrastive(u_BD[v], keys_ND[v], labels_N[1 - v], offset=offset, temperature=tau)
                for v in (0, 1)
            ]
        ).mean()
        metrics = {
            "instance_loss": instance.detach(),
            "graph_loss": graph.detach(),
            "components": _count(labels_N[0]),
            "embedding_spread": spread(torch.cat([z1_BD, z2_BD])),
        }
        return instance + graph, metrics


def _of_other_processes(z1_BD: Tensor, z2_BD: Tensor) -> Tensor:
    """Both views' embeddings of the other processes, without gradient; no rows with one process."""
    rank, mine = dist.rank(), len(z1_BD)
    others = [torch.cat([z_ND[: rank * mine], z_ND[(rank + 1) * mine :]]) for z_ND in map(dist.gather, (z1_BD, z2_BD))]
    return torch.cat(others).detach()


def _count(labels: Tensor) -> Tensor:
    """Number of components: a label is the number of one of its members."""
    return (labels == torch.arange(len(labels), device=labels.device)).sum().float()
