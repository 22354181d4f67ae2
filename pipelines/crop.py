"""Crop-and-resize: one meaning, three ways to compute it.

A crop takes the box of an image (pixels outside it do not exist), resizes it to `resized` with the antialiased
triangle or cubic filter of PIL and torchvision, keeps the square at `offset`, and mirrors it when asked. Where no
antialiasing is wanted the filter stays as wide as for an enlargement: TensorFlow's plain resize. The result is rounded
to 8 bits, as PIL does. A box that is not resized gives its own pixels, to the bit, and its square may reach
over its edge, where it is black. `crop_image` makes all crops of one decoded image of any size, `crop_small` those of
data sets that live in memory on the CPU; both are compiled loops (`kernels`). `crop_matmul` is two batched matrix
products, for data sets in the memory of an accelerator.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipelines import kernels
from pipelines.draw import ViewParams

_SMALLEST = torch.finfo(torch.float32).tiny


def crop_small(
    images: np.ndarray, ids: np.ndarray, params: ViewParams, out: np.ndarray, start: int = 0, stop: int | None = None
) -> None:
    """Crop images of one in-memory array, bilinear or bicubic, by a compiled loop that releases the GIL.

    Args:
        images: (N, H, W, 3) uint8, C-contiguous; smaller images lie in the top left corner.
        ids: (B,) int64 rows of `images`.
        params: the boxes.
        out: (V, B, S, S, 3) uint8, C-contiguous; rows start ... stop-1 of its second axis are overwritten.

    Raises:
        ValueError: a box leaves the image; the square leaves a resized box, or has no pixel of one that is not.
    """
    cubic, antialias = params.interpolation == "bicubic", params.antialias
    stop = len(ids) if stop is None else stop
    scale = max(float((params.box[:, start:stop, 2:] / params.resized[:, start:stop]).max()), 1.0) if antialias else 1.0
    taps = 2 * int(np.ceil(scale * (2 if cubic else 1))) + 2
    kernels.crop_rows(
        images, ids, params.box, params.resized, params.offset, params.flip, cubic, antialias, out, taps, start, stop
    )


def crop_matmul(images: Tensor, ids: Tensor, params: ViewParams, dtype: torch.dtype = torch.float32) -> Tensor:
    """Crop images of one in-memory tensor by two batched matrix products, bilinear or bicubic.

    Args:
        images: (N, H, W, 3) uint8 on any device.
        ids: (B,) int64 rows of `images`, on the same device.
        params: the boxes.
        dtype: of the products. 8-bit pixels are exact in all of float32, float16 and bfloat16; what is rounded to it
            are the weights and the result of the first product.

    Returns:
        (V, B, S, S, 3) uint8 on the device of `images`.

    Raises:
        ValueError: see `check_squares`.
    """
    check_squares(params)
    height, width = images.shape[1:3]
    views, batch, size = params.count, len(ids), params.size
    weight_x = _interpolation_matrix(params, 1, width, images.device).to(dtype)
    columns = weight_x.permute(1, 3, 0, 2).reshape(batch, width, views * size)  # each image once for all its views
    planes = images[ids].permute(0, 3, 1, 2).to(dtype).flatten(1, 2)  # (B, 3 H, W)
    rows = torch.matmul(planes, columns).view(batch, 3, height, views, size)
    rows = rows.permute(3, 0, 2, 1, 4).reshape(views, batch, height, 3 * size)
    crops = torch.matmul(_interpolation_matrix(params, 0, height, images.device).to(dtype), rows)
    # In float32 again: above 128, bfloat16 has no halves.
    crops = (crops.float() + 0.5).clamp_(0, 255).to(torch.uint8).view(views, batch, size, 3, size)
    return crops.transpose(3, 4).contiguous()


def _interpolation_matrix(params: ViewParams, axis: int, length: int, device: torch.device) -> Tensor:
    """(V, B, S, length) float32 weights of one axis (0 = rows, 1 = columns), zero outside the box.

    Where taps begin and end is found in double precision, on (V, B, S) numbers; distances to the first of them are
    small, so the weights themselves need none.
    """
    doubles = device.type != "mps"  # Apple's GPUs have none
    numbers = np.stack(
        [params.box[..., axis], params.box[..., axis + 2], params.resized[..., axis], params.offset[..., axis],
         params.flip & (axis == 1)]
    ).astype(np.float64 if doubles else np.float32)  # fmt: skip
    low, n_in, resized, offset, flip = on_device(numbers, device)[..., None].unbind(0)
    scale = n_in / resized
    filter_scale = scale.clamp(min=1.0) if params.antialias else torch.ones_like(scale)
    cubic = params.interpolation == "bicubic"
    radius = filter_scale * (2.0 if cubic else 1.0)
    out = torch.arange(params.size, dtype=low.dtype, device=device)
    out = torch.where(flip > 0, params.size - 1 - out, out)
    centre = (out + offset + 0.5) * scale
    first = (centre - radius + 0.5).floor().clamp(min=0)
    taps = torch.minimum((centre + radius + 0.5).floor(), n_in) - first
    nearest = (first + 0.5 - centre).float().unsqueeze(-1)
    tap = torch.arange(length, dtype=torch.float32, device=device) - (low + first).float().unsqueeze(-1)
    distance = ((tap + nearest) / filter_scale.float().unsqueeze(-1)).abs()
    weight = _cubic(distance) if cubic else (1 - distance).clamp(min=0)
    weight = weight * ((tap >= 0) & (tap < taps.float().unsqueeze(-1)))
    return weight / weight.sum(-1, keepdim=True).clamp(min=_SMALLEST)  # nothing is weighed beyond the edge of a box


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = -1/2, as PIL's BICUBIC."""
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return torch.where(x < 1, near, far) * (x < 2)


def crop_image(image: Tensor, params: ViewParams, row: int, out: Tensor) -> None:
    """All crops of one decoded image, bilinear or bicubic, by a compiled loop that releases the GIL.

    Args:
        image: (3, H, W) uint8 on the CPU whose memory is H x W x 3, as JPEG decoders leave it.
        params, row: the boxes, and which of them.
        out: (V, B, S, S, 3) uint8, C-contiguous; `row` of its second axis is overwritten.

    Raises:
        ValueError: a box leaves the image; the square leaves a resized box, or has no pixel of one that is not.
    """
    kernels.crop_image(
        image.permute(1, 2, 0).numpy(), params.box, params.resized, params.offset, params.flip,
        params.interpolation == "bicubic", params.antialias, out.numpy(), row,
    )  # fmt: skip


def check_squares(params: ViewParams) -> None:
    """What the compiled loops check in each crop, for those who hand the crops on.

    Raises:
        ValueError: a square leaves a resized box, or has no pixel of one that is not.
    """
    offset, resized, size = params.offset, params.resized, params.size
    if (offset >= 0).all() and (offset + size <= resized).all():
        return
    over_the_edge = ((offset < 0) | (offset + size > resized)).any(-1)
    reached = ((offset > -size) & (offset < resized)).all(-1) & (params.box[..., 2:] == resized).all(-1)
    if not reached[over_the_edge].all():
        raise ValueError("a crop's square does not lie inside its resized box")


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of host values on a device. For CUDA through pinned memory, so that the copy waits for nothing."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
