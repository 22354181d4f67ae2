"""Any backbone of timm (https://github.com/huggingface/pytorch-image-models), freshly initialised.

`timm:vit_tiny_patch16_224` with the options `img_size: 32, patch_size: 4`, say: options go to
`timm.create_model`, and the classifier is left out.  Entries of the state dict are timm's with `net.` before them.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal, overload

from torch import Tensor, nn

from pipelines.errors import ConfigError, MissingExtraError

PREFIX = "timm:"
# relssl trains from scratch, on three channels, and takes features where the classifier would be.
_REFUSED = ("pretrained", "pretrained_cfg", "checkpoint_path", "num_classes", "features_only", "in_chans")


class TimmBackbone(nn.Module):
    """A timm model under the interface of the backbones here.

    The stem map is the first feature map that timm lists for the model: the activation after the first convolution
    of a ResNet, the first stage of a ConvNeXt, the first block's tokens, laid out as a map, of a ViT.

    Args:
        name: timm's name of an architecture, without `timm:`.
        options: for `timm.create_model`.

    Attributes:
        feature_dim: D, the width of what the classifier would get.
        stem_channels: channels of the stem map.

    Raises:
        MissingExtraError: timm is not installed.
        ConfigError: an architecture that timm does not know, or options that it refuses.
    """

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        timm = _import_timm()
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else "."
            raise ConfigError(f"timm {timm.__version__} has no model {name!r}{hint} timm.list_models() lists them all.")
        for option in options:
            if option in _REFUSED:
                raise ConfigError(f"backbone {PREFIX}{name} takes no option {option!r}: relssl sets it.")
        try:
            self.net: Any = timm.create_model(name, pretrained=False, num_classes=0, **options)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(f"timm refuses the options {options} of {name!r}: {error}") from error
        self.name = name
        self.feature_dim: int = getattr(self.net, "head_hidden_size", self.net.num_features)

    @property
    def stem_channels(self) -> int:
        """Raises ConfigError where the model has no map to give."""
        listed = getattr(self.net, "feature_info", None)
        if not listed or not hasattr(self.net, "forward_intermediates"):
            raise ConfigError(f"timm's {self.name!r} gives no stem map, which this method needs; use another backbone.")
        return int(listed[0]["num_chs"])

    @overload
    def forward(self, x: Tensor, return_stem: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, return_stem: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, return_stem: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        try:
            if not return_stem:
                return self.net(x)
            channels = self.stem_channels
            final, (stem,) = self.net.forward_intermediates(x, indices=[0], output_fmt="NCHW")
        except AssertionError as error:  # how timm refuses a size of image
            raise ConfigError(
                f"timm's {self.name!r} does not take images of {tuple(x.shape[2:])} pixels: {error} "
                "Its options img_size or dynamic_img_size may help."
            ) from error
        if stem.dim() != 4 or stem.shape[1] != channels:
            raise ConfigError(f"timm's {self.name!r} gives {tuple(stem.shape)}, not a stem map; use another backbone.")
        return self.net.forward_head(final), stem


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError(
            f"backbones named {PREFIX}... need timm, which cannot be imported ({error}). "
            "Install it with the extra `export`: pip install relssl[export]"
        ) from error
    return timm
