"""ReSSL: Relational Self-Supervised Learning with Weak Augmentation (Zheng et al., NeurIPS 2021, arXiv:2107.09282).

    views: teacher (1, weak) and student (1 or more, strong); sizes may differ (multi-crop)

    q_v = normalize(head(encoder(student_v)))                        for each student view v
    teacher <- m * teacher + (1 - m) * student                       parameters only, before its forward
    k   = normalize(teacher(shuffled teacher view))                  shuffle-BN, no gradient
    loss = mean_i CE( softmax(k_i . queue / tau_teacher), softmax(q_i . queue / tau_student) )
    queue <- keys of all ranks                                       after the loss: old keys only

Legend: B images of this process and micro-batch, V student views, D embedding, K queue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import ViewBatch
from pipelines.errors import ConfigError
from relssl import dist
from relssl.losses import relational_cross_entropy
from relssl.methods import base
from relssl.nets.ema import ema_update, make_teacher
from relssl.nets.heads import MLPHead
from relssl.nets.queue import KeyQueue
from relssl.ops.rows import spread, unit_rows
from relssl.ops.transfer import from_host


class ReSSLConfig(base.MethodConfig):
    """Defaults are the ImageNet settings of the original code."""

    name: str = "ressl"
    hidden_dim: int = Field(4096, gt=0, description="width of the projection head's hidden layer")
    embed_dim: int = Field(512, gt=0, description="width of the embedding")
    queue_size: int = Field(131072, gt=0, description="number of keys in the queue")
    momentum: float = Field(0.999, ge=0, le=1, description="of the teacher's moving average, constant")
    tau_student: float = Field(0.1, gt=0)
    tau_teacher: float = Field(0.04, gt=0)
    shuffle: bool = Field(True, description="shuffle-BN: permute the teacher's batch over ranks and splits")


class Method(base.Method):
    Config = ReSSLConfig
    config: ReSSLConfig
    VIEWS: ClassVar = {"teacher": (1, 1), "student": (1, None)}
    NEEDS = frozenset({"full_batch"})
    ACCUMULATION = "approximate"  # batch statistics and the shuffle see one micro-batch at a time

    def __init__(self, make_backbone: Callable[[], Any], config: ReSSLConfig, data: base.DataInfo):
        super().__init__(make_backbone, config, data)
        if config.queue_size < data.global_batch:
            raise ConfigError(
                f"method.queue_size is {config.queue_size}, smaller than the batch of {data.global_batch} keys "
                "that each update adds; raise queue_size or lower train.batch_size"
            )
        self.encoder = make_backbone()
        self.head = MLPHead(self.encoder.feature_dim, config.hidden_dim, config.embed_dim)
        self.teacher = make_teacher(nn.ModuleDict({"encoder": self.encoder, "head": self.head}))
        self.queue = KeyQueue(config.queue_size, config.embed_dim)
        self._held: list[tuple[Tensor, Tensor]] = []  # places and keys of the micro-batches of one update

    def forward(self, batch: ViewBatch, step: base.Step) -> tuple[Tensor, dict[str, Tensor]]:
        q_VBD = torch.cat([unit_rows(self.head(self.encoder(x))) for x in batch.views["student"]])
        with torch.no_grad():
            if step.micro == 0:
                self._update_teacher()
            place_G, order = dist.gather(batch.position).sort()  # rank-major -> order of the global batch
            k_BD, keys_GD = self._encode_keys(batch.views["teacher"][0], order, step)
        loss = relational_cross_entropy(
            q_VBD,
            k_BD,
            self.queue.keys,
            tau_student=self.config.tau_student,
            tau_teacher=self.config.tau_teacher,
            normalised=True,
        )
        self._held.append((place_G, keys_GD))
        if step.is_last_micro:
            places, keys = (torch.cat(parts) for parts in zip(*self._held, strict=True))
            self.queue.push(keys[places.argsort()])  # the order of the global batch, however it was cut
            self._held = []
        return loss, {"embedding_spread": spread(q_VBD)}

    def _update_teacher(self) -> None:
        ema_update(self.teacher["encoder"], self.encoder, self.config.momentum)
        ema_update(self.teacher["head"], self.head, self.config.momentum)

    def _encode_keys(self, x: Tensor, order: Tensor, step: base.Step) -> tuple[Tensor, Tensor]:
        """Teacher embeddings of the local images (B, D), and of all ranks' images in global order (G, D).

        The permutation acts on the images of all ranks in the order of their places in the global batch, so which
        images share batch statistics does not depend on the number of ranks.
        """
        world, rank = dist.world_size(), dist.rank()
        if not self.config.shuffle:
            k_BD = self._teacher_embedding(x)
            return k_BD, dist.gather(k_BD)[order]
        shuffle = from_host(torch.randperm(len(order), generator=step.generator("shuffle")), x.device)
        mine = shuffle[rank::world]
        shuffled = dist.gather(x)[order[mine]]
        if x.is_contiguous(memory_format=torch.channels_last):
            shuffled = shuffled.contiguous(memory_format=torch.channels_last)
        gathered = dist.gather(self._teacher_embedding(shuffled))  # rank-major: place r + W*j is row r*B + j
        by_place = gathered.view(world, len(mine), -1).transpose(0, 1).flatten(0, 1)
        keys_GD = torch.empty_like(by_place)
        keys_GD[shuffle] = by_place
        local = order.argsort().view(world, len(mine))[rank]  # global order -> this rank's rows
        return keys_GD[local], keys_GD

    def _teacher_embedding(self, x: Tensor) -> Tensor:
        return unit_rows(self.teacher["head"](self.teacher["encoder"](x)))
