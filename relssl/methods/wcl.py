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
                f"wcl got {data.global_batch} images an update: its graph then always joins all of them, and nothing "
                "is told apart; take a batch of at least 3, and of hundreds for features worth having"
            )
        self.encoder = make_backbone()
        self.head1 = DeepMLPHead(self.encoder.feature_dim, config.hidden_dim, config.embed_dim)
        self.head2 = DeepMLPHead(self.encoder.feature_dim, config.hidden_dim, config.embed_dim)

    def forward(self, batch: ViewBatch, step: base.Step) -> tuple[Tensor, dict[str, Tensor]]:
        features = [self.encoder(x) for x in batch.views["view"]]
        z_BD = [unit_rows(self.head1(f)) for f in features]
        u_BD = [unit_rows(self.head2(f)) for f in features]
        z1_ND, z2_ND, *u_ND = dist.gather(torch.cat([*z_BD, *u_BD], dim=1).detach()).chunk(4, dim=1)

        tau, offset = self.config.temperature, dist.rank() * len(batch)
        others = torch.cat([_of_other_processes(z, offset, len(batch)) for z in (z1_ND, z2_ND)])
        instance = nt_xent(*z_BD, temperature=tau, extra_keys=others)
        labels_N = dist.broadcast(torch.stack([connected_components(nearest_neighbours(keys)) for keys in u_ND]))
        graph = torch.stack(
            [component_contrastive(u_BD[v], u_ND[v], labels_N[1 - v], offset=offset, temperature=tau) for v in (0, 1)]
        ).mean()
        metrics = {
            "instance_loss": instance.detach(),
            "graph_loss": graph.detach(),
            "components": _count(labels_N[0]),
            "embedding_spread": spread(torch.cat(z_BD)),
        }
        return instance + graph, metrics


def _of_other_processes(rows_ND: Tensor, offset: int, mine: int) -> Tensor:
    """Without the `mine` rows from `offset` on, which are this process's; none are left with one process."""
    return torch.cat([rows_ND[:offset], rows_ND[offset + mine :]])


def _count(labels: Tensor) -> Tensor:
    """Number of components: a label is the number of one of its members."""
    return (labels == torch.arange(len(labels), device=labels.device)).sum().float()
