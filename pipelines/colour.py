"""Everything after the crop, for every engine: masks, colours, blur, RandAugment, affine, normalise, erase.

Formulas are torchvision's float functionals, BYOL's for its dialect and PIL's for RandAugment, each sample with its own
parameters and its own order of the jitter's operations. Nothing is rounded between the 8-bit crop and the view, except
by RandAugment, whose operations are made of 8-bit levels. On the CPU compiled loops do the work, a range of images at a
time, whichever thread asks (`kernels`). On an accelerator it is batched torch: samples that take a step together are
gathered, changed and put back; which ones is known on the host, so nothing waits for the device, and all of it travels
in two copies.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines import kernels
from pipelines.crop import on_device
from pipelines.draw import JITTER_OPS, OpParams, ViewParams
from pipelines.randaugment import Function, Step, randaugment_steps
from pipelines.views import ViewSpec

GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision's rgb_to_grayscale
HUE = JITTER_OPS.index("hue")
_TINY = torch.finfo(torch.float32).tiny


def colour(
    crops: Tensor,
    params: ViewParams,
    spec: ViewSpec,
    out: Tensor,
    start: int = 0,
    stop: int | None = None,
    masks: np.ndarray | None = None,
) -> None:
    """Turn 8-bit crops into normalised views.

    Args:
        crops: (V, B, S, S, 3) uint8, contiguous, on the device.
        params: what was drawn for these views.
        spec: the view; its normalisation comes after the operations, and before `erase`.
        out: (V, B, S, S, 3) floating point on the same device, with pixels or planes contiguous in memory; on the CPU
            rows start ... stop-1 of its second axis are overwritten, elsewhere all.
        masks: (n, 2048) uint8 of these rows, as they are stored.

    Raises:
        ValueError: a view is to be masked and there are no masks.
    """
    if masks is None and params.masked is not None and params.masked[:, start:stop].any():
        raise ValueError("views with masked background need the masks of their images")
    if crops.device.type == "cpu":
        colour_cpu(crops, params, spec, out, start, crops.shape[1] if stop is None else stop, masks)
    else:
        colour_torch(crops, params, spec, out, masks)


# -- CPU


_NO_MASKS = np.empty((0, 0), np.uint8), np.empty((0, 0), np.bool_), np.empty((0, 0, 4), np.float32)


def colour_cpu(
    crops: Tensor,
    params: ViewParams,
    spec: ViewSpec,
    out: Tensor,
    start: int,
    stop: int,
    masks: np.ndarray | None = None,
) -> None:
    """`colour` by compiled loops; releases the GIL, so ranges of rows may be done by threads."""
    views, batch, size = crops.shape[:3]
    planar = out.movedim(-1, 2).is_contiguous()
    if not planar and not out.is_contiguous():
        raise ValueError(f"out must have contiguous pixels or planes; got strides {out.stride()}")
    rows = (out.movedim(-1, 2) if planar else out).reshape(views, batch, 3 * size * size)
    scale, shift = _scale_and_shift(spec.normalize)
    ops = params.ops
    background = _NO_MASKS if masks is None or params.masked is None else (masks, params.masked, params.window)
    run = functools.partial(
        kernels.colour_rows,
        crops.numpy(),
        _kinds(ops.names),
        ops.apply,
        ops.value,
        ops.order,
        *background,
        scale,
        shift,
    )
    if out.dtype == torch.float32:
        run(rows.numpy(), 0, planar, _scratch(size), start, stop)
    elif out.dtype == torch.bfloat16:
        run(rows.view(torch.uint16).numpy(), 0, planar, _scratch(size), start, stop)
    else:
        exact = torch.empty((views, stop - start, 3 * size * size))
        run(exact.numpy(), start, planar, _scratch(size), start, stop)
        rows[:, start:stop] = exact.to(out.dtype)


_LOCAL = threading.local()


def _scratch(size: int) -> np.ndarray:
    """This thread's room for the planes of one view: kept, as fresh memory costs more than a view's colours."""
    needed = 6 * size * size + 4 * size
    held = getattr(_LOCAL, "scratch", None)
    if held is None or len(held) < needed:
        held = _LOCAL.scratch = np.empty(needed, np.float32)
    return held


@functools.lru_cache(maxsize=64)
def _scale_and_shift(normalize: tuple[tuple[float, ...], tuple[float, ...]] | None) -> tuple[np.ndarray, np.ndarray]:
    """(x - mean) / std as x * scale + shift."""
    mean, std = np.array(normalize or ((0, 0, 0), (1, 1, 1)), dtype=np.float64)
    return (1 / std).astype(np.float32), (-mean / std).astype(np.float32)


@functools.lru_cache(maxsize=64)
def _kinds(names: tuple[str, ...]) -> np.ndarray:
    return np.array([kernels.KINDS[name] for name in names], dtype=np.int64)


# -- torch, any device


def colour_torch(
    crops: Tensor, params: ViewParams, spec: ViewSpec, out: Tensor, masks: np.ndarray | None = None
) -> None:
    """`colour` by batched torch operations."""
    planes = crops.flatten(0, 1).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 255.0
    if masks is not None and params.masked is not None and params.window is not None:
        _fill_background(planes, masks, params.masked, params.window)
    steps = _on_device([step for op in params.ops for step in _STEPS[op.name](op) if len(step[1])], planes.device)
    for step in steps:
        if step[0] is not _erase:
            planes = _done(planes, *step)
    scale, shift = (_channels(tuple(values.tolist()), planes.device) for values in _scale_and_shift(spec.normalize))
    planes = planes.mul_(scale).add_(shift)
    for step in steps:
        if step[0] is _erase:
            planes = _done(planes, *step)
    out.copy_(planes.unflatten(0, crops.shape[:2]).permute(0, 1, 3, 4, 2))


def _fill_background(planes: Tensor, masks: np.ndarray, masked: np.ndarray, window: np.ndarray) -> None:
    """Mid-grey, in place, where the masks (B, 2048) uint8, resampled into the views, are less than a half, and outside
    the images. The resampling is two products with antialiased triangles, as `kernels.mask_taps` has them."""
    views, rows = masked.nonzero()
    if not len(views):
        return
    device, side = planes.device, kernels.MASK_SIDE
    packed, where = on_device(masks[rows], device), on_device(window[views, rows], device)
    chosen = on_device(views * masked.shape[1] + rows, device)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
    bits = ((packed.unsqueeze(-1) >> shifts) & 1).view(-1, side, side).float()
    down, across = (_mask_matrix(where[:, i], where[:, i + 2], planes.shape[-1]) for i in (0, 1))
    foreground = torch.matmul(down, torch.matmul(bits, across.transpose(1, 2))) >= float(kernels.FOREGROUND)
    planes[chosen] = torch.where(foreground.unsqueeze(1), planes[chosen], 0.5)


def _mask_matrix(low: Tensor, high: Tensor, size: int) -> Tensor:
    """(N, S, 128) weights of a mask's pixels, for the S pixels between `low` and `high` (N,)."""
    side = kernels.MASK_SIDE
    step = ((high - low) / size).view(-1, 1, 1)
    radius = (step.abs() * side).clamp(min=1)
    centre = low.view(-1, 1, 1) + (torch.arange(size, device=low.device, dtype=low.dtype).view(-1, 1) + 0.5) * step
    pixel = torch.arange(side, device=low.device, dtype=low.dtype)
    weight = (1 - (pixel - (centre * side - 0.5)).abs() / radius).clamp(min=0)
    weight = weight * ((centre >= 0) & (centre <= 1))
    return weight / weight.sum(-1, keepdim=True).clamp(min=_TINY)


def _on_device(steps: list[Step], device: torch.device) -> list[tuple[Function, Tensor, Tensor]]:
    """Rows and coefficients of all steps as tensors, in two copies."""
    if not steps:
        return []
    lengths = [len(rows) for _, rows, _ in steps]
    rows = on_device(np.concatenate([rows for _, rows, _ in steps]), device).split(lengths)
    values = on_device(np.concatenate([values for _, _, values in steps]), device).split(lengths)
    return [(function, *both) for (function, _, _), *both in zip(steps, rows, values, strict=True)]


def _done(planes: Tensor, function: Function, rows: Tensor, values: Tensor) -> Tensor:
    """Planes (N, 3, S, S) after one step of some of them."""
    if len(rows) == len(planes):  # all of them, and in order
        return function(planes, values)
    planes[rows] = function(planes[rows], values)
    return planes


@functools.lru_cache(maxsize=64)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def _jitter_steps(op: OpParams) -> list[Step]:
    """torchvision's ColorJitter, each sample in its own order, in seven steps.

    Brightness, contrast and saturation are one formula, x f + (1 - f) base, with base nothing, the mean of the luma,
    or the luma. So a sample takes up to three such steps before its hue, then the hue, then the rest of them.
    """
    rows = np.flatnonzero(op.apply)
    factors, order = _flat(op.value)[rows], _flat(op.order)[rows]
    hue_at = (order == HUE).argmax(1)
    linear_order = order[order != HUE].reshape(-1, 3)

    def linear(place: int, mine: np.ndarray) -> Step:
        kind = linear_order[mine, place]
        f = factors[mine, kind]
        values = np.zeros((len(mine), factors.shape[1]), np.float32)
        values[:, 0], values[:, 1], values[:, 2] = f, (1 - f) * (kind == 1), (1 - f) * (kind == 2)
        return _linear, rows[mine], values

    before = [linear(place, np.flatnonzero(place < hue_at)) for place in range(3)]
    after = [linear(place, np.flatnonzero(place >= hue_at)) for place in range(3)]
    turned = np.flatnonzero(factors[:, HUE] != 0)
    return [*before, (_hue, rows[turned], factors[turned]), *after]


def _jitter_byol_steps(op: OpParams) -> list[Step]:
    """BYOL's jitter, each sample in its own order: a step for each kind at each place in the order."""
    rows = np.flatnonzero(op.apply)
    factors, order = _flat(op.value)[rows], _flat(op.order)[rows]
    steps: list[Step] = []
    for place in range(4):
        kind = order[:, place]
        for function, kinds in ((_channel_linear, (0, 1)), (_hsv_saturation, (2,)), (_hue, (HUE,))):
            mine = np.flatnonzero(np.isin(kind, kinds))
            values = factors[mine]
            if function is _channel_linear:  # f, u, more
                contrast, more, f = kind[mine] == 1, values[:, 0].copy(), values[:, 1].copy()
                values[:, 0], values[:, 1] = np.where(contrast, f, 1), np.where(contrast, 1 - f, 0)
                values[:, 2] = np.where(contrast, 0, more)
            steps.append((function, rows[mine], values))
    return steps


def _one_step(function: Function) -> Callable[[OpParams], list[Step]]:
    def steps(op: OpParams) -> list[Step]:
        rows = np.flatnonzero(op.apply)
        return [(function, rows, _flat(op.value)[rows])]

    return steps


def _flat(values: np.ndarray) -> np.ndarray:
    """(V, B, n) as (V B, n)."""
    return values.reshape(-1, values.shape[-1])


def _luma(x: Tensor) -> Tensor:
    r, g, b = GREY_WEIGHTS
    return (x[:, 0:1] * r + x[:, 1:2] * g) + x[:, 2:3] * b


def _linear(x: Tensor, values: Tensor) -> Tensor:
    """x f + mean(luma) u + luma w, clipped. The mean is taken one axis at a time: its bits then do not depend on the
    size of the batch."""
    f, u, w = (values[:, i].view(-1, 1, 1, 1) for i in range(3))
    luma = _luma(x)
    base = luma.mean(-1, keepdim=True).mean(-2, keepdim=True) * u
    return (x * f).add_(luma.mul_(w).add_(base)).clamp_(0.0, 1.0)


def _channel_linear(x: Tensor, values: Tensor) -> Tensor:
    """x f + mean(channel) u + more, clipped; the mean as in `_linear`."""
    f, u, more = (values[:, i].view(-1, 1, 1, 1) for i in range(3))
    mean = x.mean(-1, keepdim=True).mean(-2, keepdim=True)
    return (x * f).add_(mean * u + more).clamp_(0.0, 1.0)


def _hsv_saturation(x: Tensor, values: Tensor) -> Tensor:
    """The saturation of HSV times values[:, 2], at most one."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    factor, chroma = values[:, 2].view(-1, 1, 1, 1), high - low
    growth = torch.where(factor * chroma <= high, factor, high / chroma)
    return (high - (high - x) * growth).clamp_(min=0.0)


def _hue(x: Tensor, values: Tensor) -> Tensor:
    """Rotate the hue by values[:, HUE] turns, in [-1/2, 1/2].

    With v = max, m = min, c = v - m, the hue in sixths times c is q (below), and each channel is m plus c times a
    clipped triangle wave of period 6c. Grey pixels (c = 0) come out as m without a special case.
    """
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    low = torch.minimum(torch.minimum(r, g), b)
    chroma = value - low
    q = torch.where(value == r, g - b, torch.where(value == g, (b - r) + 2 * chroma, (r - g) + 4 * chroma))
    q = q + values[:, HUE].view(-1, 1, 1) * 6.0 * chroma
    period = 6.0 * chroma

    def channel(shift: float) -> Tensor:
        z = (q + shift * chroma).abs_()
        wave = torch.minimum(z, period - z).abs_()
        return low + torch.minimum((wave - chroma).clamp_(min=0.0), chroma)

    return torch.stack([channel(-3.0), channel(1.0), channel(-1.0)], dim=1)


def _grey(x: Tensor, values: Tensor) -> Tensor:
    return _luma(x).repeat(1, 3, 1, 1)


def _blur(x: Tensor, values: Tensor) -> Tensor:
    """Gaussian of standard deviation values[:, 0] pixels with values[:, 1] taps and black around the image; where that
    is 0, with as many taps as four sigmas need and reflected borders.

    A blur along one axis is a matrix product, whatever the sigmas of the batch: entry (o, i) is the weight of pixel
    i in output o, the pixels that borders reflect onto it included. (Where a program allows TF32 for products of
    float32, it holds here too: about a twentieth of a level.)
    """
    side = x.shape[-1]
    sigma = values[:, 0].view(-1, 1, 1)
    taps = values[:, 1].view(-1, 1, 1)
    reflected = taps == 0
    radius = torch.where(reflected, (4 * sigma).ceil().clamp(max=side - 1), (taps / 2).floor())
    at = torch.arange(side, device=x.device, dtype=torch.float32)
    out, into = at.view(-1, 1), at.view(1, -1)

    def weight(distance: Tensor) -> Tensor:
        return torch.exp(-0.5 * (distance / sigma) ** 2) * (distance.abs() <= radius)

    matrix = weight(into - out)
    matrix += weight(into + out) * ((into > 0) & reflected)
    matrix += weight(2 * (side - 1) - into - out) * ((into < side - 1) & reflected)
    matrix /= 2 * weight(into).sum(-1, keepdim=True) - 1
    rows = torch.matmul(x.flatten(1, 2), matrix.transpose(1, 2)).view_as(x)
    return torch.matmul(matrix.unsqueeze(1), rows)


def _solarise(x: Tensor, values: Tensor) -> Tensor:
    return torch.where(x >= values[:, 0].view(-1, 1, 1, 1), 1.0 - x, x)


def _affine(x: Tensor, values: Tensor) -> Tensor:
    """Pixels from where the matrix of values[:, :6] says (`pipelines.draw.inverse_affine`), black outside the image.

    As PIL transforms, and not as torchvision transforms tensors: the image ends at the edge of its last pixels, which
    are taken as they are within half a pixel of it, and nothing there is mixed with black.
    """
    side = x.shape[-1]
    u = torch.arange(side, device=x.device, dtype=torch.float32) + (0.5 - side / 2)
    a, b, c, d, e, f = values.view(-1, 6, 1, 1).unbind(1)
    v = u.view(-1, 1)
    at_x, at_y = (a * u + (b * v + c)) + side / 2, (d * u + (e * v + f)) + side / 2
    inside = (at_x >= 0) & (at_x < side) & (at_y >= 0) & (at_y < side)
    grid = torch.stack([at_x, at_y], dim=-1).clamp_(0.5, side - 0.5).mul_(2 / side).sub_(1)
    return F.grid_sample(x, grid, mode="bilinear", align_corners=False) * inside.unsqueeze(1)


def _erase(x: Tensor, values: Tensor) -> Tensor:
    """values[:, 4] in the box of values[:, :4] = top, left, height, width."""
    top, left, height, width, value = values[:, :5].view(-1, 5, 1, 1, 1).unbind(1)
    at = torch.arange(x.shape[-1], device=x.device)
    row, column = at.view(-1, 1), at
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    return torch.where(inside, value, x)


_STEPS = {
    "jitter": _jitter_steps,
    "jitter_byol": _jitter_byol_steps,
    "grey": _one_step(_grey),
    "blur": _one_step(_blur),
    "solarise": _one_step(_solarise),
    "randaugment": randaugment_steps,
    "affine": _one_step(_affine),
    "erase": _one_step(_erase),
}
