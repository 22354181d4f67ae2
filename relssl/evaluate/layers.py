"""Features of several layers of a backbone in one pass over the images.

A layer is a submodule by its name in the state dict (`layer3`, `layer4.1`, `net.blocks.5`), or `features` for the
backbone's own output. Of a submodule's output the mean over all places is taken: (B, C, H, W) and (B, N, C) become
(B, C).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.errors import ConfigError, unknown_name
from relssl.evaluators.probe import FEATURES


class Layers(nn.Module):
    """(B, 3, S, S) -> the features of `names` side by side, (B, sum of widths); `split` takes them apart.

    Raises:
        ConfigError: the backbone has no such submodule; a layer is named twice.
    """

    def __init__(self, backbone: nn.Module, names: Sequence[str]):
        super().__init__()
        known = dict(backbone.named_modules())
        for name in names:
            if name != FEATURES and (not name or name not in known):
                raise ConfigError(unknown_name("layer", name, [*dict(backbone.named_children()), FEATURES]))
        if len(set(names)) < len(names):
            raise ConfigError(f"a layer is named twice: {', '.join(names)}")
        self.backbone, self.names = backbone, list(names)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(list(self._maps(x).values()), dim=1)

    def widths(self, side: int) -> dict[str, int]:
        """Features of each layer, found with one black image of `side` pixels."""
        weight = next(self.backbone.parameters())
        with torch.inference_mode():
            maps = self._maps(weight.new_zeros((1, 3, side, side)))
        return {name: features.shape[1] for name, features in maps.items()}

    def split(self, features: Tensor, side: int) -> dict[str, Tensor]:
        """Columns of (N, sum of widths) by layer."""
        widths = self.widths(side)
        parts = features.split(list(widths.values()), dim=1)
        return {name: part.contiguous() for name, part in zip(widths, parts, strict=True)}

    def _maps(self, x: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        hooks = [
            self.backbone.get_submodule(name).register_forward_hook(partial(_keep, found, name))
            for name in self.names
            if name != FEATURES
        ]
        try:
            found[FEATURES] = self.backbone(x)
        finally:
            for hook in hooks:
                hook.remove()
        absent = [name for name in self.names if name not in found]
        if absent:
            raise ConfigError(f"the layer {absent[0]} takes no part in the backbone's forward pass")
        return {name: found[name] for name in self.names}


def _keep(found: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    """Averaged at once: what follows may overwrite the map."""
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(f"the layer {name} gives {what}; expected (B, C), (B, N, C) or (B, C, H, W)")
    if output.ndim == 2:
        found[name] = output.clone()
    else:
        found[name] = output.mean(dim=1) if output.ndim == 3 else output.mean(dim=3).mean(dim=2)
