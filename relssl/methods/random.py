"""Random weights: the lower bound. Nothing is trained; the trainer saves the freshly initialised encoder and stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from relssl.methods import base


class RandomConfig(base.MethodConfig):
    name: str = "random"


class Method(base.Method):
    Config = RandomConfig
    VIEWS: ClassVar = {"view": (0, None)}  # any plan of the methods that it stands beside will do
    TRAINS = False

    def __init__(self, make_backbone: Callable[[], Any], config: RandomConfig, data: base.DataInfo):
        super().__init__(make_backbone, config, data)
        self.encoder = make_backbone()
