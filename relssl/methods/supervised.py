"""Training with labels: the upper bound that the baselines of Self-Supervised Relational Reasoning stand under.

views: view (1)

loss = CE( classifier(encoder(view)), label )
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.batch import ViewBatch
from relssl.methods import base
from relssl.ops.rows import at_least_float32, spread


class SupervisedConfig(base.MethodConfig):
    name: str = "supervised"


class Method(base.Method):
    Config = SupervisedConfig
    VIEWS: ClassVar = {"view": (1, 1)}
    NEEDS = frozenset({"labels"})

    def __init__(self, make_backbone: Callable[[], Any], config: SupervisedConfig, data: base.DataInfo):
        super().__init__(make_backbone, config, data)
        assert data.num_classes is not None  # NEEDS labels
        self.encoder = make_backbone()
        self.classifier = nn.Linear(self.encoder.feature_dim, data.num_classes)

    def forward(self, batch: ViewBatch, step: base.Step) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.encoder(batch.views["view"][0])
        logits = at_least_float32(self.classifier(features))
        accuracy = (logits.argmax(1) == batch.label).float().mean()
        return F.cross_entropy(logits, batch.label), {"accuracy": accuracy, "features_spread": spread(features)}
