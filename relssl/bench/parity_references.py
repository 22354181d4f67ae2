"""What the parity certificate compares with: PIL and torchvision, given parameters that `pipelines.draw` drew.

One image at a time and in the libraries' own words, so that it can be read beside their documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torchvision.transforms.functional as tv
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from pipelines.draw import RANDAUGMENT_OPS, OpParams, ViewParams

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

_ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)
_TAPS = 23  # SimCLR's kernel at 224 pixels: more than four of its largest sigmas to either side


def pil_crops(pictures: Sequence[np.ndarray], params: ViewParams) -> np.ndarray:
    """Crops of B pictures (H, W, 3) uint8, cut out first and then resized: (V, B, S, S, 3) uint8."""
    out = np.empty((*params.flip.shape, params.size, params.size, 3), np.uint8)
    for v, b in np.ndindex(*params.flip.shape):
        top, left, height, width = params.box[v, b].tolist()
        (tall, wide), (y, x) = params.resized[v, b].tolist(), params.offset[v, b].tolist()
        cut = Image.fromarray(np.ascontiguousarray(pictures[b][top : top + height, left : left + width]))
        resized = cut.resize((wide, tall), RESAMPLING[params.interpolation])
        square = np.asarray(resized.crop((x, y, x + params.size, y + params.size)))
        out[v, b] = square[:, ::-1] if params.flip[v, b] else square
    return out


def pil_colour(crops: np.ndarray, ops: Iterable[OpParams]) -> np.ndarray:
    """Crops (V, B, S, S, 3) uint8 after the operations, by PIL: 8 bits after each of them."""
    out = np.empty_like(crops)
    for at in np.ndindex(*crops.shape[:2]):
        image = Image.fromarray(crops[at])
        image = _coloured(
            image, ops, at,
            blur=_blur_pil, solarise=_solarise_pil, randaugment=pil_randaugment, affine=_affine_pil, erase=_erase_pil,
        )  # fmt: skip
        out[at] = np.asarray(image)
    return out


def float_colour(crops: np.ndarray, ops: Iterable[OpParams]) -> np.ndarray:
    """The same by torchvision's functionals in float; levels (V, B, S, S, 3) float32, not rounded.

    Affine is PIL's, on images of floats: what torchvision makes of tensors is another thing at their edges. RandAugment
    is PIL's on levels, which is what it is defined on.
    """
    out = np.empty(crops.shape, np.float32)
    for at in np.ndindex(*crops.shape[:2]):
        planes = torch.from_numpy(crops[at]).permute(2, 0, 1).float() / 255
        planes = _coloured(
            planes, ops, at,
            blur=_blur_float, solarise=tv.solarize, randaugment=_randaugment_float, affine=_affine_float,
            erase=_erase_float,
        )  # fmt: skip
        out[at] = planes.permute(1, 2, 0).numpy() * 255
    return out


def _coloured(
    image: Any,
    ops: Iterable[OpParams],
    at: tuple[int, ...],
    *,
    blur: Callable[[Any, float], Any],
    solarise: Callable[[Any, float], Any],
    randaugment: Callable[[Any, Sequence[float]], Any],
    affine: Callable[[Any, Sequence[float]], Any],
    erase: Callable[[Any, Sequence[float]], Any],
) -> Any:
    """A PIL image, or a float tensor (3, S, S), through what was drawn for view and image `at`."""
    for op in ops:
        if not op.apply[at]:
            continue
        if op.name == "jitter":
            for kind in op.order[at]:
                factor = float(op.value[at][kind])
                if factor != _NEUTRAL[kind]:  # ColorJitter leaves out what has no strength
                    image = _ADJUST[kind](image, factor)
        elif op.name == "grey":
            image = tv.rgb_to_grayscale(image, num_output_channels=3)
        elif op.name == "blur":
            image = blur(image, float(op.value[at][0]))
        elif op.name == "solarise":
            image = solarise(image, float(op.value[at][0]))
        elif op.name == "randaugment":
            image = randaugment(image, op.value[at].tolist())
        elif op.name == "affine":
            image = affine(image, op.value[at].tolist())
        elif op.name == "erase":
            image = erase(image, op.value[at].tolist())
        else:
            raise NotImplementedError(f"there is no reference for the operation {op.name!r}")
    return image


def _blur_pil(image: Image.Image, sigma: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius=sigma))


def _solarise_pil(image: Image.Image, threshold: float) -> Image.Image:
    return tv.solarize(image, round(threshold * 255))


def _blur_float(planes: Tensor, sigma: float) -> Tensor:
    return tv.gaussian_blur(planes, [_TAPS, _TAPS], [sigma, sigma])


def _affine_pil(image: Image.Image, matrix: Sequence[float]) -> Image.Image:
    """`pipelines.draw.inverse_affine` counts from the middle, PIL from the corner."""
    a, b, c, d, e, f = matrix
    x, y = image.width / 2, image.height / 2
    from_corner = (a, b, c + x - a * x - b * y, d, e, f + y - d * x - e * y)
    return image.transform(image.size, Image.Transform.AFFINE, from_corner, Image.Resampling.BILINEAR)


def _affine_float(planes: Tensor, matrix: Sequence[float]) -> Tensor:
    moved = [np.asarray(_affine_pil(Image.fromarray(plane), matrix)) for plane in planes.numpy()]
    return torch.from_numpy(np.stack(moved))


def pil_randaugment(image: Image.Image, codes: Sequence[float]) -> Image.Image:
    """An image after the operations of `pipelines.draw.randaugment_codes`, with FixMatch's numbers for each level."""
    for code in codes:
        if code:
            operation, level = divmod(int(abs(code)), 10)
            image = pil_operation(image, RANDAUGMENT_OPS[operation - 1], level, -1 if code < 0 else 1)
    return image


def pil_operation(image: Image.Image, name: str, level: int, sign: int) -> Image.Image:
    """One operation of FixMatch's pool at a level in 1 ... 9."""
    share, width, height = level / 10, *image.size
    if name in ("brightness", "colour", "contrast", "sharpness"):
        enhance = getattr(ImageEnhance, "Color" if name == "colour" else name.capitalize())
        return enhance(image).enhance(0.9 * level / 10 + 0.05)
    if name in ("autocontrast", "equalize"):
        return getattr(ImageOps, name)(image)
    if name == "posterize":
        return ImageOps.posterize(image, int(4 * share) + 4)
    if name == "solarise":
        return ImageOps.solarize(image, 256 - int(256 * share))
    if name == "rotate":
        return image.rotate(sign * 3 * level)
    maps = {
        "identity": (1, 0, 0, 0, 1, 0),
        "shear_x": (1, sign * 0.3 * share, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, sign * 0.3 * share, 1, 0),
        "translate_x": (1, 0, sign * int(0.3 * level / 10 * width), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, sign * int(0.3 * level / 10 * height)),
    }
    return image.transform(image.size, Image.Transform.AFFINE, maps[name])


def _randaugment_float(planes: Tensor, codes: Sequence[float]) -> Tensor:
    levels = (planes * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    made = np.array(pil_randaugment(Image.fromarray(levels), codes))
    return torch.from_numpy(made).permute(2, 0, 1) / 255


def _erase_pil(image: Image.Image, values: Sequence[float]) -> Image.Image:
    top, left, height, width = map(int, values[:4])
    erased = image.copy()
    erased.paste((round(values[4] * 255),) * 3, (left, top, left + width, top + height))
    return erased


def _erase_float(planes: Tensor, values: Sequence[float]) -> Tensor:
    top, left, height, width = map(int, values[:4])
    return tv.erase(planes, top, left, height, width, torch.tensor(values[4]))
