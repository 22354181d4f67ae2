"""What two processes of WCL compute, in one: the rows of the other half are cut off from the graph where a process
would have gathered them."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.batch import ViewBatch
from relssl.losses import component_contrastive, connected_components, nearest_neighbours, nt_xent
from relssl.methods.base import Method
from relssl.ops.rows import unit_rows


def wcl_loss_of_two_processes(method: Method, batch: ViewBatch) -> Tensor:
    """The mean of the two processes' losses, of every second image each, with batch statistics of the whole."""
    losses = []
    for rank in (0, 1):
        order = torch.cat([torch.arange(first, len(batch), 2) for first in (rank, 1 - rank)])
        views = {key: tuple(x[order] for x in xs) for key, xs in batch.views.items()}
        whole = ViewBatch(views, batch.index[order], batch.label[order], batch.position[order])
        losses.append(_loss_of_first_rows(method, whole, len(batch) // 2))
    return torch.stack(losses).mean()


def _loss_of_first_rows(method: Method, batch: ViewBatch, half: int) -> Tensor:
    tau = method.config.temperature
    features = [method.encoder(x) for x in batch.views["view"]]
    z, u = ([unit_rows(head(f)) for f in features] for head in (method.head1, method.head2))
    others = torch.cat([x[half:].detach() for x in z])
    labels = [connected_components(nearest_neighbours(x.detach())) for x in u]
    graph = [component_contrastive(u[v][:half], u[v].detach(), labels[1 - v], temperature=tau) for v in (0, 1)]
    return nt_xent(z[0][:half], z[1][:half], temperature=tau, extra_keys=others) + sum(graph) / 2
