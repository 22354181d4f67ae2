"""Deep InfoMax (Hjelm et al., ICLR 2019, arXiv:1808.06670), as the baseline of Self-Supervised Relational Reasoning.

    views: view (1)

    y, M = encoder(view)                                          features, and the map of the first layer
    M'_b = M_(b+1 mod B)                                          another image's map
    local  = mean softplus(T'_l) + mean softplus(-T_l)            T_l judges y with each place of M, T'_l with M'
    global = the same with one judgement of y with the whole map
    prior  = -( mean log D(u) + mean log(1 - D(y)) )              u uniform in [0, 1)^D
    loss = beta local + alpha global + gamma prior

Encoder and discriminators minimise the same loss, as in the repository: the encoder helps the prior's discriminator
instead of deceiving it. Maps are shifted within a process. Legend: B images, D features, C channels of the map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipelines.batch import ViewBatch
from pipelines.errors import ConfigError
from relssl.methods import base
from relssl.ops.rows import at_least_float32, spread
from relssl.ops.transfer import from_host

HIDDEN = 256
GLOBAL_CHANNELS, GLOBAL_SIDE = 32, 16
LEAST_SIDE = 5  # of a map, for two unpadded 3x3 convolutions


class DeepInfoMaxConfig(base.MethodConfig):
    """Weights of the terms, as the training script has them; a term of weight 0 has no discriminator."""

    name: str = "deepinfomax"
    alpha: float = Field(0.0, ge=0, description="of the global term")
    beta: float = Field(1.0, ge=0, description="of the local term")
    gamma: float = Field(0.1, ge=0, description="of the prior term")
    local_places: int | None = Field(
        None, gt=0, description="random places of the maps that the local term looks at in an update; all when absent"
    )

    @model_validator(mode="after")
    def _some_term(self) -> DeepInfoMaxConfig:
        if self.alpha == 0 and self.beta == 0:
            raise ValueError("alpha and beta are both 0, so nothing ties the features to the image; raise one")
        return self


class Method(base.Method):
    Config = DeepInfoMaxConfig
    config: DeepInfoMaxConfig
    VIEWS: ClassVar = {"view": (1, 1)}
    ACCUMULATION = "approximate"  # the other image's map comes from the same micro-batch
    PROCESSES = "local"

    def __init__(self, make_backbone: Callable[[], Any], config: DeepInfoMaxConfig, data: base.DataInfo):
        super().__init__(make_backbone, config, data)
        self.encoder = encoder = make_backbone()
        self.local_d = LocalDiscriminator(encoder.feature_dim, encoder.stem_channels) if config.beta else None
        self.global_d = GlobalDiscriminator(encoder.feature_dim, encoder.stem_channels) if config.alpha else None
        self.prior_d = PriorDiscriminator(encoder.feature_dim) if config.gamma else None

    def forward(self, batch: ViewBatch, step: base.Step) -> tuple[Tensor, dict[str, Tensor]]:
        view = batch.views["view"][0]
        y_BD, map_BCHW = self.encoder(view, return_stem=True)
        terms = {}
        if self.local_d is not None:
            terms["local"] = self.config.beta * contrast(*self.local_d(y_BD, self._some_places(map_BCHW, step)))
        if self.global_d is not None:
            _check_map(view, map_BCHW)
            terms["global"] = self.config.alpha * contrast(*self.global_d(y_BD, map_BCHW))
        if self.prior_d is not None:
            terms["prior"] = self.config.gamma * self.prior_d(y_BD, self._noise(batch, step))
        loss = torch.stack(list(terms.values())).sum()
        metrics = {f"{name}_loss": term.detach() for name, term in terms.items()}
        return loss, {**metrics, "features_spread": spread(y_BD)}

    def _some_places(self, stem: Tensor, step: base.Step) -> Tensor:
        """The map, or `local_places` of its places as (B, C, 1, P): the same of every image, new ones per update.

        The local term is a mean over places, so that of random places has the same expectation.
        """
        count, places = self.config.local_places, stem.shape[2] * stem.shape[3]
        if count is None or count >= places:
            return stem
        chosen = torch.randperm(places, generator=replace(step, micro=0).generator("places"))[:count]
        return stem.flatten(2)[:, :, None, from_host(chosen, stem.device)]

    def _noise(self, batch: ViewBatch, step: base.Step) -> Tensor:
        """(B, D) uniform numbers: those of the images' places in the global batch, however it is cut."""
        generator = replace(step, micro=0).generator("prior")
        noise = torch.rand((self.data.global_batch, self.encoder.feature_dim), generator=generator)
        return from_host(noise, batch.position.device)[batch.position]


def _check_map(view: Tensor, stem: Tensor) -> None:
    """Raises ConfigError unless the global term's convolutions fit into the map."""
    (height, width), (map_height, map_width) = view.shape[2:], stem.shape[2:]
    least = min(map_height, map_width)
    if least < LEAST_SIDE:
        enough = math.ceil(min(height, width) * LEAST_SIDE / least)
        raise ConfigError(
            f"deepinfomax: method.alpha is above 0, and the global term needs a first map of at least {LEAST_SIDE} x "
            f"{LEAST_SIDE} pixels; views of {height} x {width} pixels give {map_height} x {map_width}. Make the views "
            f"about {enough} pixels wide, choose a backbone whose first layer keeps the size (stem: cifar), or set "
            "method.alpha: 0"
        )


def contrast(scores: Tensor, other_scores: Tensor) -> Tensor:
    """The Jensen-Shannon estimate with its sign turned: scores of the right pairs up, of the others down."""
    right, other = at_least_float32(scores), at_least_float32(other_scores)
    return F.softplus(other).mean() + F.softplus(-right).mean()


def _next_image(x: Tensor) -> Tensor:
    """Row b is image b + 1, the last one the first."""
    return x.roll(-1, dims=0)


class LocalDiscriminator(nn.Module):
    """Judges features with each place of a map: three 1x1 convolutions on [map, features].

    The first one is linear in both, so each map and each feature vector passes it once, and the B x (C + D) x H x W
    input is never made.

    Shape:
        y (B, D), M (B, C, H, W) -> scores (B, 1, H, W) of y with M, and with the next image's M
    """

    def __init__(self, feature_dim: int, stem_channels: int) -> None:
        super().__init__()
        self.stem_channels = stem_channels
        self.c0 = nn.Conv2d(stem_channels + feature_dim, HIDDEN, 1)
        self.c1 = nn.Conv2d(HIDDEN, HIDDEN, 1)
        self.c2 = nn.Conv2d(HIDDEN, 1, 1)

    def forward(self, y: Tensor, stem: Tensor) -> tuple[Tensor, Tensor]:
        of_map, of_features = self.c0.weight.tensor_split([self.stem_channels], dim=1)
        maps = F.conv2d(stem, of_map)
        features = F.linear(y, of_features.flatten(1), self.c0.bias)[:, :, None, None]
        return self._judge(maps + features), self._judge(_next_image(maps) + features)

    def _judge(self, hidden: Tensor) -> Tensor:
        return self.c2(F.relu(self.c1(F.relu(hidden))))


class GlobalDiscriminator(nn.Module):
    """Judges features with a whole map: two 3x3 convolutions, 16x16 average pooling, three linear layers.

    Shape:
        y (B, D), M (B, C, H, W) -> scores (B, 1) of y with M, and with the next image's M; H and W at least LEAST_SIDE
    """

    def __init__(self, feature_dim: int, stem_channels: int) -> None:
        super().__init__()
        self.c0 = nn.Conv2d(stem_channels, 64, 3)
        self.c1 = nn.Conv2d(64, GLOBAL_CHANNELS, 3)
        self.l0 = nn.Linear(GLOBAL_CHANNELS * GLOBAL_SIDE**2 + feature_dim, HIDDEN)
        self.l1 = nn.Linear(HIDDEN, HIDDEN)
        self.l2 = nn.Linear(HIDDEN, 1)

    def forward(self, y: Tensor, stem: Tensor) -> tuple[Tensor, Tensor]:
        pooled = F.adaptive_avg_pool2d(self.c1(F.relu(self.c0(stem))), GLOBAL_SIDE).flatten(1)
        return self._judge(y, pooled), self._judge(y, _next_image(pooled))

    def _judge(self, y: Tensor, pooled: Tensor) -> Tensor:
        return self.l2(F.relu(self.l1(F.relu(self.l0(torch.cat([y, pooled], dim=1))))))


class PriorDiscriminator(nn.Module):
    """Tells uniform noise from features; its sigmoid is part of the loss, where it cannot overflow.

    Shape:
        y (B, D), noise (B, D) -> -( mean log D(noise) + mean log(1 - D(y)) ), 0-d
    """

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.l0 = nn.Linear(feature_dim, 512)
        self.l1 = nn.Linear(512, 128)
        self.l2 = nn.Linear(128, 1)

    def forward(self, y: Tensor, noise: Tensor) -> Tensor:
        real, ours = self._logit(noise.to(y.dtype)), self._logit(y)
        return F.softplus(-real).mean() + F.softplus(ours).mean()

    def _logit(self, x: Tensor) -> Tensor:
        return at_least_float32(self.l2(F.relu(self.l1(F.relu(self.l0(x))))))
