"""Compiled loops of the data path on the CPU: crops of decoded and of resident images, and every colour operation.

All of them release the GIL and use no threads of their own: the loader calls them from its pool, each call for a range
of images. They stand in one file because numba's cache notices changes per file.

Floating point is strict: no reassociation, no contraction, and sums run over rows first, lane by lane. So the bits
are the same for any number of threads and on every x86-64 processor. Constants are float32, as a Python float would
turn a whole loop into float64. Computed indices of inner loops are unsigned: for signed ones numba tests whether they
are negative, which keeps loops from being vectorised.

Boxes are checked here, as they decide about what is read; shapes of arrays are the callers' business, `pipelines.crop`
and `pipelines.colour`.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload

_STRICT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"nnan", "ninf", "nsz"}}


def _compiled(function: Any) -> Any:
    """numba.njit with a cache on disk where there can be one: a frozen or read-only installation compiles anew."""
    try:
        return numba.njit(cache=True, **_STRICT)(function)
    except RuntimeError:  # "no locator available for file ..."
        return numba.njit(**_STRICT)(function)


ZERO, HALF, ONE, TWO, FOUR, SIX, LEVELS = (np.float32(x) for x in (0, 0.5, 1, 2, 4, 6, 255))
MASK_SIDE, MASK_PIXELS = 128, np.float32(128)
FOREGROUND = np.float32(0.5 - 1e-3)  # a half, of which rounding, TF32 too, may have taken a little
LUMA_R, LUMA_G, LUMA_B = np.float32(0.2989), np.float32(0.587), np.float32(0.114)

# Codes of operations, as `kinds` of the colour kernel; their names are those of `pipelines.views.OPS`.
KINDS = {"jitter": 0, "grey": 1, "blur": 2, "solarise": 3, "affine": 4, "erase": 5, "jitter_byol": 6, "randaugment": 7}
JITTER, GREY, BLUR, SOLARISE, AFFINE, ERASE, JITTER_BYOL, RANDAUGMENT = range(8)

# Of RandAugment, in the order of `pipelines.draw.RANDAUGMENT_OPS`.
AUTOCONTRAST, BRIGHTNESS, COLOUR, CONTRAST, EQUALIZE, IDENTITY, POSTERIZE = range(7)
ROTATE, SHARPNESS, SHEAR_X, SHEAR_Y, SOLARISE_LEVELS, TRANSLATE_X, TRANSLATE_Y = range(7, 14)
WARPS = (ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y)


# -- resampling


@_compiled
def _check(box, resized, offset, size, height, width):  # type: ignore[no-untyped-def]
    """Before memory is read that is another image's, or nobody's."""
    if box[0] < 0 or box[1] < 0 or box[2] < 1 or box[3] < 1 or box[0] + box[2] > height or box[1] + box[3] > width:
        raise ValueError("a crop's box does not lie inside its image")
    if _is_cut(box, resized):
        if offset[0] <= -size or offset[1] <= -size or offset[0] >= box[2] or offset[1] >= box[3]:
            raise ValueError("a crop's square has no pixel of its box")
    elif offset[0] < 0 or offset[1] < 0 or offset[0] + size > resized[0] or offset[1] + size > resized[1]:
        raise ValueError("a crop's square does not lie inside its resized box")


@_compiled
def _is_cut(box, resized):  # type: ignore[no-untyped-def]
    """Whether a crop keeps its pixels as they are. Resampling would give the same ones, later."""
    return box[2] == resized[0] and box[3] == resized[1]


@_compiled
def _cut(image, box, offset, mirrored, crop):  # type: ignore[no-untyped-def]
    """crop (S, S, 3) = the square at `offset` of a box, black where it reaches over the edge."""
    size = len(crop)
    rows, out = image.reshape(image.shape[0], 3 * image.shape[1]), crop.reshape(size, 3 * size)
    top, bottom = max(-offset[0], 0), min(box[2] - offset[0], size)  # what lies in the box
    left, right = max(-offset[1], 0), min(box[3] - offset[1], size)
    if bottom - top < size or right - left < size:
        out[:] = 0
    count, first = np.uint64(right - left), box[1] + offset[1] + left
    for y in range(top, bottom):
        source, target = rows[box[0] + offset[0] + y][3 * first :], out[y]
        if mirrored:
            last = np.uint64(size - 1 - left)
            for x in range(count):
                at, to = np.uint64(3) * x, np.uint64(3) * (last - x)
                target[to] = source[at]
                target[to + np.uint64(1)] = source[at + np.uint64(1)]
                target[to + np.uint64(2)] = source[at + np.uint64(2)]
        else:
            target = target[3 * left :]
            for i in range(np.uint64(3) * count):
                target[i] = source[i]


@_compiled
def _kernel_at(distance, cubic):  # type: ignore[no-untyped-def]
    """PIL's triangle (support 1) or Keys' cubic with a = -1/2 (support 2), at a distance in output pixels."""
    x = abs(distance)
    if not cubic:
        return max(0.0, 1.0 - x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return 0.0


@_compiled
def _taps(n_in, n_resized, offset, size, mirrored, cubic, antialias, start, count, weight):  # type: ignore[no-untyped-def]
    """Fill start[size], count[size] and weight[size, :] for one axis.

    Support and rounding follow PIL: centre (o + 1/2) * scale, radius support * max(scale, 1), rows sum to one. Without
    antialiasing the radius is the support: TensorFlow's plain resize, which leaves out what is beyond the edge, too.
    """
    scale = n_in / n_resized
    filter_scale = max(scale, 1.0) if antialias else 1.0
    radius = filter_scale * (2.0 if cubic else 1.0)
    for o in range(size):
        at = size - 1 - o if mirrored else o
        centre = (o + offset + 0.5) * scale
        first = max(int(centre - radius + 0.5), 0)
        last = min(int(centre + radius + 0.5), n_in)
        total = 0.0
        for t in range(first, last):
            total += _kernel_at((t - centre + 0.5) / filter_scale, cubic)
        for t in range(first, last):
            weight[at, t - first] = np.float32(_kernel_at((t - centre + 0.5) / filter_scale, cubic) / total)
        start[at] = first
        count[at] = last - first


def _pixel_dot(taps: int) -> Any:
    """out[o : o + 4] = sum over t of weight[k + t] * row[i + 3 t : i + 3 t + 4]: a pixel's three channels at once.

    The fourth number is the next pixel's, and is overwritten by it. Written as LLVM vectors of four, because numba
    leaves the vectoriser off that would find them; plain multiplications and additions, in the order of the taps.
    """

    @intrinsic
    def dot(typing_context, out, o, row, i, weight, k):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            four = ir.VectorType(ir.FloatType(), 4)
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), 4), [0, 0, 0, 0])
            undefined = ir.Constant(four, ir.Undefined)

            def at(array: int, index: int, step: int = 0) -> Any:
                data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
                place = arguments[index]
                return builder.gep(data, [builder.add(place, ir.Constant(place.type, step))])

            total = None
            for t in range(taps):
                weight = builder.insert_element(undefined, builder.load(at(4, 5, t)), ir.Constant(ir.IntType(32), 0))
                pixel = builder.load(builder.bitcast(at(2, 3, 3 * t), four.as_pointer()), align=4)
                term = builder.fmul(builder.shuffle_vector(weight, undefined, lanes), pixel)
                total = term if total is None else builder.fadd(total, term)
            builder.store(total, builder.bitcast(at(0, 1), four.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(out, o, row, i, weight, k), generate

    return dot


def _pixel_row(taps: int) -> Any:
    """The horizontal pass over one row of interleaved pixels, with a fixed number of taps."""
    dot = _pixel_dot(taps)

    def resample(row, start, weight, out):  # type: ignore[no-untyped-def]
        flat = weight.reshape(weight.size)
        for x in range(len(start)):
            dot(out, 3 * x, row, 3 * start[x], flat, x * weight.shape[1])

    return _compiled(resample)


_ROW_2, _ROW_3, _ROW_4, _ROW_5, _ROW_6, _ROW_8, _ROW_12, _ROW_16 = map(_pixel_row, (2, 3, 4, 5, 6, 8, 12, 16))


@_compiled
def crop_image(image, box, resized, offset, flip, cubic, antialias, out, b):  # type: ignore[no-untyped-def]
    """All crops of one decoded image.

    image (H, W, 3) uint8; box (V, B, 4), resized and offset (V, B, 2), flip (V, B); out (V, B, S, S, 3) uint8, of
    which row b of the second axis is written. The vertical pass comes first: it reads the 8-bit rows as they lie in
    memory, and leaves the fewer rows to the horizontal one.
    """
    views, size = out.shape[0], out.shape[2]
    pixels = image.reshape(image.shape[0], 3 * image.shape[1])
    line = np.empty(3 * size + 1, np.float32)
    for v in range(views):
        top, left, height, width = box[v, b, 0], box[v, b, 1], box[v, b, 2], box[v, b, 3]
        _check(box[v, b], resized[v, b], offset[v, b], size, image.shape[0], image.shape[1])
        if _is_cut(box[v, b], resized[v, b]):
            _cut(image, box[v, b], offset[v, b], flip[v, b], out[v, b])
            continue
        start_y, count_y, _, weight_y = _tables(size, _most_taps(height, resized[v, b, 0], cubic, antialias))
        start_x, count_x, _, weight_x = _tables(size, max(16, _most_taps(width, resized[v, b, 1], cubic, antialias)))
        weight_x[:] = ZERO
        _taps(height, resized[v, b, 0], offset[v, b, 0], size, False, cubic, antialias, start_y, count_y, weight_y)
        _taps(width, resized[v, b, 1], offset[v, b, 1], size, flip[v, b], cubic, antialias, start_x, count_x, weight_x)
        most = count_x.max()
        row = np.zeros(3 * (width + weight_x.shape[1]) + 4, np.float32)  # taps of weight zero read past the end
        for y in range(size):
            _weigh_rows(pixels, top + start_y[y], count_y[y], 3 * left, weight_y[y], row[: 3 * width])
            _resample_row(row, start_x, count_x, weight_x, most, line)
            target = out[v, b, y].reshape(3 * size)
            for i in range(3 * size):
                target[i] = np.uint8(min(max(line[i] + HALF, ZERO), LEVELS))


@_compiled
def _most_taps(n_in, n_resized, cubic, antialias):  # type: ignore[no-untyped-def]
    scale = max(n_in / n_resized, 1.0) if antialias else 1.0
    return 2 * int(np.ceil(scale * (2.0 if cubic else 1.0))) + 2


@_compiled
def _weigh_rows(pixels, top, count, left, weight, out):  # type: ignore[no-untyped-def]
    """out = the weighted sum of `count` 8-bit rows from `left` on: up to four in one pass, to save trips to memory."""
    first, a = pixels[top][left : left + len(out)], weight[0]
    if count == 2:
        second, b = pixels[top + 1][left : left + len(out)], weight[1]
        for i in range(len(out)):
            out[i] = a * np.float32(first[i]) + b * np.float32(second[i])
    elif count == 3:
        second, b = pixels[top + 1][left : left + len(out)], weight[1]
        third, c = pixels[top + 2][left : left + len(out)], weight[2]
        for i in range(len(out)):
            out[i] = (a * np.float32(first[i]) + b * np.float32(second[i])) + c * np.float32(third[i])
    elif count == 4:
        second, b = pixels[top + 1][left : left + len(out)], weight[1]
        third, c = pixels[top + 2][left : left + len(out)], weight[2]
        fourth, d = pixels[top + 3][left : left + len(out)], weight[3]
        for i in range(len(out)):
            upper = a * np.float32(first[i]) + b * np.float32(second[i])
            out[i] = upper + (c * np.float32(third[i]) + d * np.float32(fourth[i]))
    else:
        for i in range(len(out)):
            out[i] = a * np.float32(first[i])
        for t in range(1, count):
            more, a = pixels[top + t][left : left + len(out)], weight[t]
            for i in range(len(out)):
                out[i] += a * np.float32(more[i])


@_compiled
def _resample_row(row, start, count, weight, most, out):  # type: ignore[no-untyped-def]
    if most <= 2:
        _ROW_2(row, start, weight, out)
    elif most <= 3:
        _ROW_3(row, start, weight, out)
    elif most <= 4:
        _ROW_4(row, start, weight, out)
    elif most <= 5:
        _ROW_5(row, start, weight, out)
    elif most <= 6:
        _ROW_6(row, start, weight, out)
    elif most <= 8:
        _ROW_8(row, start, weight, out)
    elif most <= 12:
        _ROW_12(row, start, weight, out)
    elif most <= 16:
        _ROW_16(row, start, weight, out)
    else:
        _resample_pixels(row, start, count, weight, out)


@_compiled
def _resample_pixels(row, start, count, weight, out):  # type: ignore[no-untyped-def]
    for x in range(len(start)):
        r = g = b = ZERO
        at = np.uint64(3 * start[x])
        for t in range(count[x]):
            w = weight[x, t]
            r += w * row[at]
            g += w * row[at + np.uint64(1)]
            b += w * row[at + np.uint64(2)]
            at += np.uint64(3)
        out[3 * x] = r
        out[3 * x + 1] = g
        out[3 * x + 2] = b


@_compiled
def _two_taps(n_in, n_resized, offset, size, mirrored, first, second, share):  # type: ignore[no-untyped-def]
    """`_taps` of the bilinear filter where it does not grow: two neighbours and the weight of the second."""
    scale = n_in / n_resized
    for o in range(size):
        at = size - 1 - o if mirrored else o
        place = max((o + offset + 0.5) * scale - 0.5, 0.0)
        i = int(place)
        first[at] = i
        second[at] = min(i + 1, n_in - 1)
        share[at] = np.float32(place - i)


@_compiled
def crop_rows(images, ids, box, resized, offset, flip, cubic, antialias, out, taps, first_row, last_row):  # type: ignore[no-untyped-def]
    """Crop rows first_row ... last_row-1 of a batch.

    images (N, H, W, 3) uint8, ids (B,), box (V, B, 4), resized and offset (V, B, 2), flip (V, B), out
    (V, B, S, S, 3) uint8. `taps` bounds the taps of any axis. Pixels stay interleaved: after the horizontal pass
    each row is 3 S contiguous numbers, which the vertical pass and the rounding take at full width.
    """
    views, size = out.shape[0], out.shape[2]
    source = np.empty((images.shape[1], images.shape[2] * 3), np.float32)
    lines = np.empty((images.shape[1], size * 3), np.float32)
    x_tables = _tables(size, taps)
    y_tables = _tables(size, taps)
    for b in range(first_row, last_row):
        resampled = False
        for v in range(views):
            _check(box[v, b], resized[v, b], offset[v, b], size, images.shape[1], images.shape[2])
            resampled |= not _is_cut(box[v, b], resized[v, b])
        if resampled:
            _load_source(images[ids[b]], box[:, b], source)
        for v in range(views):
            if _is_cut(box[v, b], resized[v, b]):
                _cut(images[ids[b]], box[v, b], offset[v, b], flip[v, b], out[v, b])
                continue
            top, left, height, width = box[v, b, 0], box[v, b, 1], box[v, b, 2], box[v, b, 3]
            two_taps = not cubic and (not antialias or (height <= resized[v, b, 0] and width <= resized[v, b, 1]))
            crop = out[v, b].reshape(size, size * 3)
            if two_taps:
                first, second, share = x_tables[0], x_tables[1], x_tables[2]
                upper, lower, rest = y_tables[0], y_tables[1], y_tables[2]
                _two_taps(width, resized[v, b, 1], offset[v, b, 1], size, flip[v, b], first, second, share)
                _two_taps(height, resized[v, b, 0], offset[v, b, 0], size, False, upper, lower, rest)
                low, high = upper[0], lower[size - 1] + 1  # the rows that the vertical pass will read
                _horizontal_two(source[top + low : top + high, 3 * left :], first, second, share, lines)
                _vertical_two(lines, low, upper, lower, rest, crop)
            else:
                start_x, count_x, weight_x = x_tables[0], x_tables[1], x_tables[3]
                start_y, count_y, weight_y = y_tables[0], y_tables[1], y_tables[3]
                _taps(
                    width, resized[v, b, 1], offset[v, b, 1], size, flip[v, b], cubic, antialias,
                    start_x, count_x, weight_x,
                )  # fmt: skip
                _taps(
                    height, resized[v, b, 0], offset[v, b, 0], size, False, cubic, antialias,
                    start_y, count_y, weight_y,
                )  # fmt: skip
                low, high = start_y[0], start_y[size - 1] + count_y[size - 1]
                _horizontal(source[top + low : top + high, 3 * left :], start_x, count_x, weight_x, lines)
                _vertical(lines, low, start_y, count_y, weight_y, crop)


@_compiled
def _tables(size, taps):  # type: ignore[no-untyped-def]
    """Two of indices, one of shares, one of weights: what the taps of an axis are written to."""
    return (
        np.empty(size, np.int64), np.empty(size, np.int64),
        np.empty(size, np.float32), np.empty((size, taps), np.float32),
    )  # fmt: skip


@_compiled
def _load_source(image, box, source):  # type: ignore[no-untyped-def]
    """The part of an image that any view reads, as float32: converted once for all views."""
    top, left, bottom, right = box[0, 0], box[0, 1], box[0, 0], box[0, 1]
    for v in range(box.shape[0]):
        top, left = min(top, box[v, 0]), min(left, box[v, 1])
        bottom, right = max(bottom, box[v, 0] + box[v, 2]), max(right, box[v, 1] + box[v, 3])
    for y in range(top, bottom):
        pixels = image[y].reshape(image.shape[1] * 3)[3 * left : 3 * right]
        row = source[y, 3 * left : 3 * right]
        for i in range(len(row)):
            row[i] = np.float32(pixels[i])


@_compiled
def _horizontal_two(source, first, second, share, lines):  # type: ignore[no-untyped-def]
    for y in range(len(source)):
        row, line = source[y], lines[y]
        for x in range(np.uint64(len(first))):
            i, j, w = np.uint64(3 * first[x]), np.uint64(3 * second[x]), share[x]
            at, one, two = np.uint64(3) * x, np.uint64(1), np.uint64(2)
            line[at] = row[i] + w * (row[j] - row[i])
            line[at + one] = row[i + one] + w * (row[j + one] - row[i + one])
            line[at + two] = row[i + two] + w * (row[j + two] - row[i + two])


@_compiled
def _vertical_two(lines, low, upper, lower, share, crop):  # type: ignore[no-untyped-def]
    for y in range(len(crop)):
        above, below, w, row = lines[upper[y] - low], lines[lower[y] - low], share[y], crop[y]
        for i in range(len(row)):
            row[i] = np.uint8(above[i] + w * (below[i] - above[i]) + HALF)


@_compiled
def _horizontal(source, start, count, weight, lines):  # type: ignore[no-untyped-def]
    for y in range(len(source)):
        _resample_pixels(source[y], start, count, weight, lines[y])


@_compiled
def _vertical(lines, low, start, count, weight, crop):  # type: ignore[no-untyped-def]
    line = np.empty(crop.shape[1], np.float32)
    for y in range(len(crop)):
        line[:] = HALF
        for t in range(count[y]):
            more, w = lines[start[y] - low + t], weight[y, t]
            for i in range(len(line)):
                line[i] += w * more[i]
        row = crop[y]
        for i in range(len(row)):
            row[i] = np.uint8(min(max(line[i], ZERO), LEVELS))


# -- colour


@_compiled
def colour_rows(  # type: ignore[no-untyped-def]
    crops, kinds, apply, value, order, masks, masked, window, scale, shift, out, out_row, planar, scratch,
    first_row, last_row,
):  # fmt: skip
    """Turn rows first_row ... last_row-1 of a batch of 8-bit crops into normalised views.

    crops (V, B, S, S, 3) uint8; kinds (O,) codes of the operations in their order; apply (V, B, O) bool, value
    (V, B, O, 6) float32, order (V, B, O, 4) uint8 as in `pipelines.draw.PackedOps`; scale, shift (3,) float32: a pixel
    x in [0, 1] becomes x * scale + shift; out (V, n, 3 S S) float32, or uint16 for the bits of bfloat16, as planes or
    interleaved, of which row 0 is row `out_row` of the batch; scratch: at least 6 S S + 4 S numbers. An `ERASE` is the
    last operation, and done to what is stored. Before the operations the background of views with `masked` (V, B) is
    filled: masks (last_row - first_row, 2048) uint8 as they are stored, window (V, B, 4) as in
    `pipelines.draw.ViewParams`; without masks all three are empty.
    """
    views, size = crops.shape[0], crops.shape[2]
    n = size * size
    planes = scratch[: 3 * n].reshape(3, n)
    spare = scratch[3 * n : 6 * n]
    border = scratch[6 * n :]
    last = len(kinds) - 1
    for b in range(first_row, last_row):
        for v in range(views):
            _load_planes(crops[v, b].reshape(3 * n), planes)
            if len(masks) and masked[v, b]:
                _fill_background(planes, size, masks[b - first_row], window[v, b], spare)
            for i in range(len(kinds)):
                if not apply[v, b, i]:
                    continue
                if kinds[i] == JITTER:
                    _jitter(planes, value[v, b, i], order[v, b, i], spare[:size])
                elif kinds[i] == JITTER_BYOL:
                    _jitter_byol(planes, value[v, b, i], order[v, b, i], spare[:size])
                elif kinds[i] == GREY:
                    _grey(planes)
                elif kinds[i] == BLUR:
                    _blur(planes, size, value[v, b, i, 0], int(value[v, b, i, 1]), spare, border)
                elif kinds[i] == SOLARISE:
                    _solarise(planes, value[v, b, i, 0])
                elif kinds[i] == AFFINE:
                    _affine(planes, size, value[v, b, i], spare)
                elif kinds[i] == RANDAUGMENT:
                    _randaugment(planes, size, value[v, b, i], spare)
            if planar:
                _store_planes(planes, scale, shift, out[v, b - out_row])
            else:
                _store_pixels(planes, scale, shift, out[v, b - out_row])
            if last >= 0 and kinds[last] == ERASE and apply[v, b, last]:
                _erase(out[v, b - out_row], size, planar, value[v, b, last])


@_compiled
def _load_planes(pixels, planes):  # type: ignore[no-untyped-def]
    for i in range(planes.shape[1]):  # a true division: x >= 128/255 must mean a level of at least 128
        planes[0, i] = np.float32(pixels[3 * i]) / LEVELS
        planes[1, i] = np.float32(pixels[3 * i + 1]) / LEVELS
        planes[2, i] = np.float32(pixels[3 * i + 2]) / LEVELS


@_compiled
def _jitter(planes, factors, order, sums):  # type: ignore[no-untyped-def]
    """torchvision's ColorJitter: brightness, contrast, saturation and hue in the sample's own order."""
    for place in range(4):
        kind = order[place]
        factor = factors[kind]
        if kind == 0 and factor != ONE:
            _brightness(planes, factor)
        elif kind == 1 and factor != ONE:
            _contrast(planes, factor, sums)
        elif kind == 2 and factor != ONE:
            _saturation(planes, factor)
        elif kind == 3 and factor != ZERO:
            _hue(planes, factor)


@_compiled
def _brightness(planes, factor):  # type: ignore[no-untyped-def]
    for c in range(3):
        plane = planes[c]
        for i in range(len(plane)):
            plane[i] = min(plane[i] * factor, ONE)


@_compiled
def _contrast(planes, factor, sums):  # type: ignore[no-untyped-def]
    size = len(sums)
    sums[:] = ZERO
    for start in range(0, planes.shape[1], size):  # rows first, lane by lane: vectorised in a fixed order of additions
        r, g, b = planes[0, start : start + size], planes[1, start : start + size], planes[2, start : start + size]
        for x in range(size):
            sums[x] += (r[x] * LUMA_R + g[x] * LUMA_G) + b[x] * LUMA_B
    total = ZERO
    for x in range(size):
        total += sums[x]
    base = (ONE - factor) * (total / np.float32(planes.shape[1]))
    for c in range(3):
        plane = planes[c]
        for i in range(len(plane)):
            plane[i] = min(max(plane[i] * factor + base, ZERO), ONE)


@_compiled
def _saturation(planes, factor):  # type: ignore[no-untyped-def]
    r, g, b = planes[0], planes[1], planes[2]
    rest = ONE - factor
    for i in range(len(r)):
        base = rest * ((r[i] * LUMA_R + g[i] * LUMA_G) + b[i] * LUMA_B)
        r[i] = min(max(r[i] * factor + base, ZERO), ONE)
        g[i] = min(max(g[i] * factor + base, ZERO), ONE)
        b[i] = min(max(b[i] * factor + base, ZERO), ONE)


@_compiled
def _wave(z, chroma, low):  # type: ignore[no-untyped-def]
    """A channel from its distance to the hue: a triangle wave of period 6 chroma, clipped to [low, low + chroma]."""
    z = abs(z)
    wave = abs(min(z, SIX * chroma - z))
    return low + min(max(wave - chroma, ZERO), chroma)


@_compiled
def _hue(planes, turns):  # type: ignore[no-untyped-def]
    """Rotate the hue by `turns` in [-1/2, 1/2]: no division, no HSV, grey pixels without a special case."""
    r, g, b = planes[0], planes[1], planes[2]
    shift = SIX * turns
    for i in range(len(r)):
        x, y, z = r[i], g[i], b[i]
        high, low = max(max(x, y), z), min(min(x, y), z)
        chroma = high - low
        q = (y - z) if high == x else ((z - x) + TWO * chroma if high == y else (x - y) + FOUR * chroma)
        q += shift * chroma
        r[i] = _wave(q - np.float32(3) * chroma, chroma, low)
        g[i] = _wave(q + chroma, chroma, low)
        b[i] = _wave(q - chroma, chroma, low)


@_compiled
def _jitter_byol(planes, factors, order, sums):  # type: ignore[no-untyped-def]
    """BYOL's jitter: another brightness, contrast and saturation than torchvision's, in the sample's own order."""
    for place in range(4):
        kind = order[place]
        factor = factors[kind]
        if kind == 0 and factor != ZERO:
            _added_brightness(planes, factor)
        elif kind == 1 and factor != ONE:
            _channel_contrast(planes, factor, sums)
        elif kind == 2 and factor != ONE:
            _hsv_saturation(planes, factor)
        elif kind == 3 and factor != ZERO:
            _hue(planes, factor)


@_compiled
def _added_brightness(planes, more):  # type: ignore[no-untyped-def]
    for c in range(3):
        plane = planes[c]
        for i in range(len(plane)):
            plane[i] = min(max(plane[i] + more, ZERO), ONE)


@_compiled
def _channel_contrast(planes, factor, sums):  # type: ignore[no-untyped-def]
    """Each channel about its own mean; sums in the order of `_contrast`."""
    size = len(sums)
    for c in range(3):
        plane = planes[c]
        sums[:] = ZERO
        for start in range(0, len(plane), size):
            row = plane[start : start + size]
            for x in range(size):
                sums[x] += row[x]
        total = ZERO
        for x in range(size):
            total += sums[x]
        base = (ONE - factor) * (total / np.float32(len(plane)))
        for i in range(len(plane)):
            plane[i] = min(max(plane[i] * factor + base, ZERO), ONE)


@_compiled
def _hsv_saturation(planes, factor):  # type: ignore[no-untyped-def]
    """The saturation of HSV times `factor`, at most one: distances from the brightest channel grow by one number."""
    r, g, b = planes[0], planes[1], planes[2]
    for i in range(len(r)):
        x, y, z = r[i], g[i], b[i]
        high = max(max(x, y), z)
        chroma = high - min(min(x, y), z)
        growth = factor if factor * chroma <= high else high / chroma
        r[i] = max(high - (high - x) * growth, ZERO)
        g[i] = max(high - (high - y) * growth, ZERO)
        b[i] = max(high - (high - z) * growth, ZERO)


@_compiled
def _grey(planes):  # type: ignore[no-untyped-def]
    r, g, b = planes[0], planes[1], planes[2]
    for i in range(len(r)):
        luma = (r[i] * LUMA_R + g[i] * LUMA_G) + b[i] * LUMA_B
        r[i] = luma
        g[i] = luma
        b[i] = luma


@_compiled
def _solarise(planes, threshold):  # type: ignore[no-untyped-def]
    for c in range(3):
        plane = planes[c]
        for i in range(len(plane)):
            x = plane[i]
            plane[i] = ONE - x if x >= threshold else x


@_compiled
def _affine(planes, size, matrix, source):  # type: ignore[no-untyped-def]
    """PIL's bilinear `transform`: pixels come from where `matrix` says (`pipelines.draw.inverse_affine`), and are black
    where that is outside the image; within half a pixel of its edge the pixels there are taken as they are."""
    n, most = size * size, size - 1
    half, side = HALF * np.float32(size), np.float32(size)
    source[: 3 * n] = planes.reshape(3 * n)
    for y in range(size):
        v = np.float32(y) + HALF - half
        row_x, row_y = matrix[1] * v + matrix[2], matrix[4] * v + matrix[5]
        for x in range(size):
            u = np.float32(x) + HALF - half
            at_x, at_y = (matrix[0] * u + row_x) + half, (matrix[3] * u + row_y) + half
            at = y * size + x
            if at_x >= ZERO and at_x < side and at_y >= ZERO and at_y < side:
                left, top = np.floor(at_x - HALF), np.floor(at_y - HALF)
                share_x, share_y = (at_x - HALF) - left, (at_y - HALF) - top
                i, j = int(left), int(top)
                upper, lower = max(j, 0) * size, min(j + 1, most) * size
                i, k = max(i, 0), min(i + 1, most)
                for c in range(3):
                    first = np.uint64(c * n)
                    above, below = source[first + np.uint64(upper + i)], source[first + np.uint64(lower + i)]
                    above += (source[first + np.uint64(upper + k)] - above) * share_x
                    below += (source[first + np.uint64(lower + k)] - below) * share_x
                    planes[c, at] = above + (below - above) * share_y
            else:
                planes[0, at] = ZERO
                planes[1, at] = ZERO
                planes[2, at] = ZERO


# RandAugment works on 8-bit levels, as PIL does, and gives PIL's to the bit.


@_compiled
def _randaugment(planes, size, codes, spare):  # type: ignore[no-untyped-def]
    """The operations of `codes` (`pipelines.draw.randaugment_codes`) on an image that is rounded to 8 bits first."""
    n = size * size
    room = spare.view(np.uint8)
    levels, other = room[: 3 * n].reshape(3, n), room[3 * n : 6 * n].reshape(3, n)
    for c in range(3):
        plane, rounded = planes[c], levels[c]
        for i in range(n):
            rounded[i] = np.uint8(min(max(plane[i] * LEVELS + HALF, ZERO), LEVELS))
    table = np.empty(256, np.uint8)
    for code in codes:
        kind, level = int(abs(code)) // 10 - 1, int(abs(code)) % 10
        if kind < 0 or kind == IDENTITY:
            continue
        if kind == COLOUR:
            _blend_with_luma(levels, _factor(level))
        elif kind == SHARPNESS:
            for c in range(3):
                _sharpen(levels[c].reshape(size, size), _factor(level), other[c].reshape(size, size))
            levels, other = other, levels
        elif kind in WARPS:
            _warp(levels, size, warp_coefficients(kind, level, code < 0, size), other)
            levels, other = other, levels
        else:
            mean = _mean_luma(levels) if kind == CONTRAST else 0
            for c in range(3):
                _fill_table(kind, level, levels[c], mean, table)
                _look_up(levels[c], table)
    for c in range(3):
        plane, rounded = planes[c], levels[c]
        for i in range(n):
            plane[i] = np.float32(rounded[i]) / LEVELS


@_compiled
def _factor(level):  # type: ignore[no-untyped-def]
    return np.float32(level * 0.9 / 10 + 0.05)


@_compiled
def posterize_bits_lost(level):  # type: ignore[no-untyped-def]
    return 4 - level * 4 // 10


@_compiled
def solarise_threshold(level):  # type: ignore[no-untyped-def]
    return 256 - level * 256 // 10


@_compiled
def warp_coefficients(kind, level, negative, size):  # type: ignore[no-untyped-def]
    """The inverse map of a rotation, shear or shift in 65536ths of a pixel, as PIL's transforms without interpolation
    round it: a, b, c, d, e, f take the pixel in column x, row y from (a x + b y + c, d x + e y + f)."""
    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    sign = -1.0 if negative else 1.0
    if kind == ROTATE:
        angle, middle = -sign * np.radians(level * 30 // 10), size / 2
        a, b, d, e = np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)
        c, f = middle - a * middle - b * middle, middle - d * middle - e * middle
    elif kind == SHEAR_X:
        b = sign * (level * 0.3 / 10)
    elif kind == SHEAR_Y:
        d = sign * (level * 0.3 / 10)
    elif kind == TRANSLATE_X:
        c = sign * int(level * 0.3 / 10 * size)
    elif kind == TRANSLATE_Y:
        f = sign * int(level * 0.3 / 10 * size)
    c, f = c + a * 0.5 + b * 0.5, f + d * 0.5 + e * 0.5  # the middle of a pixel
    return _fixed(a), _fixed(b), _fixed(c), _fixed(d), _fixed(e), _fixed(f)


@_compiled
def _fixed(x):  # type: ignore[no-untyped-def]
    return int(np.floor(x * 65536.0 + 0.5))


@_compiled
def _warp(levels, size, coefficients, out):  # type: ignore[no-untyped-def]
    """Each pixel from the one that `coefficients` leads to, black where that is outside."""
    a, b, c, d, e, f = coefficients
    for y in range(size):
        at_x, at_y = b * y + c, e * y + f
        for x in range(size):
            i, j, at = at_x >> 16, at_y >> 16, y * size + x
            inside = i >= 0 and i < size and j >= 0 and j < size
            source = j * size + i if inside else 0
            for k in range(3):
                out[k, at] = levels[k, source] if inside else np.uint8(0)
            at_x += a
            at_y += d


@_compiled
def _fill_table(kind, level, levels, mean, table):  # type: ignore[no-untyped-def]
    """What becomes of each level, for operations that look at nothing else; `levels` are those of the image."""
    if kind == AUTOCONTRAST:
        _autocontrast_table(levels, table)
    elif kind == EQUALIZE:
        _equalize_table(levels, table)
    elif kind == POSTERIZE:
        lost = posterize_bits_lost(level)
        for x in range(256):
            table[x] = (x >> lost) << lost
    elif kind == SOLARISE_LEVELS:
        threshold = solarise_threshold(level)
        for x in range(256):
            table[x] = x if x < threshold else 255 - x
    else:
        factor = _factor(level)
        for x in range(256):
            table[x] = np.uint8(np.float32(mean) + factor * np.float32(x - mean))


@_compiled
def _look_up(levels, table):  # type: ignore[no-untyped-def]
    for i in range(len(levels)):
        levels[i] = table[levels[i]]


@_compiled
def _autocontrast_table(levels, table):  # type: ignore[no-untyped-def]
    """The darkest level becomes black, the brightest white; fractions are cut off."""
    low, high = np.float64(levels.min()), np.float64(levels.max())
    scale = 255.0 / (high - low) if high > low else 1.0
    offset = -low * scale if high > low else 0.0
    for x in range(256):
        table[x] = np.uint8(min(max(x * scale + offset, 0.0), 255.0))


@_compiled
def _equalize_table(levels, table):  # type: ignore[no-untyped-def]
    """As many pixels of each level, as far as whole numbers allow."""
    histogram = np.zeros(256, np.int64)
    for i in range(len(levels)):
        histogram[levels[i]] += 1
    step = (len(levels) - histogram[levels.max()]) // 255
    below = step // 2
    for x in range(256):
        table[x] = min(below // step, 255) if step > 0 else x
        below += histogram[x]


@_compiled
def _integer_luma(r, g, b):  # type: ignore[no-untyped-def]
    """PIL's, in 65536ths."""
    return (np.int32(r) * np.int32(19595) + np.int32(g) * np.int32(38470) + np.int32(b) * np.int32(7471)
            + np.int32(32768)) >> np.int32(16)  # fmt: skip


@_compiled
def _mean_luma(levels):  # type: ignore[no-untyped-def]
    total, n = 0, levels.shape[1]
    for i in range(n):
        total += _integer_luma(levels[0, i], levels[1, i], levels[2, i])
    return (2 * total + n) // (2 * n)


@_compiled
def _blend_with_luma(levels, factor):  # type: ignore[no-untyped-def]
    for i in range(levels.shape[1]):
        luma = np.float32(_integer_luma(levels[0, i], levels[1, i], levels[2, i]))
        for c in range(3):
            levels[c, i] = np.uint8(luma + factor * (np.float32(levels[c, i]) - luma))


@_compiled
def _sharpen(plane, factor, out):  # type: ignore[no-untyped-def]
    """A blend with a mean of nine pixels that counts the middle five times; pixels on the edge stay."""
    size = len(plane)
    out[:] = plane
    for y in range(1, size - 1):
        for x in range(1, size - 1):
            total = 4 * int(plane[y, x])
            for i in range(y - 1, y + 2):
                total += int(plane[i, x - 1]) + int(plane[i, x]) + int(plane[i, x + 1])
            smooth = np.float32((2 * total + 13) // 26)
            out[y, x] = np.uint8(smooth + factor * (np.float32(plane[y, x]) - smooth))


@_compiled
def _blur(planes, size, sigma, taps, spare, border):  # type: ignore[no-untyped-def]
    """Separable Gaussian of `taps` taps with black around the image; for taps = 0 of as many as four sigmas need, with
    reflected borders.

    Two pairs of taps a pass mean fewer trips to memory.
    """
    weight = _gaussian(sigma, taps // 2 if taps > 0 else min(int(np.ceil(4.0 * sigma)), size - 1))
    n, radius, one, two = np.uint64(size), np.uint64(len(weight) - 1), np.uint64(1), np.uint64(2)
    smooth = spare[: (size + 2 * (len(weight) - 1)) * size].reshape(-1, size)  # with the rows beyond its edges
    for c in range(3):
        plane = planes[c].reshape(size, size)
        border[: n + two * radius] = ZERO
        for y in range(n):
            at = radius + y
            for x in range(n):
                border[radius + x] = plane[y, x]
            if taps == 0:
                for k in range(one, radius + one):
                    border[radius - k] = plane[y, k]
                    border[radius + n - one + k] = plane[y, n - one - k]
            w = weight[0]
            for x in range(n):
                smooth[at, x] = w * border[radius + x]
            pair = one
            while pair < radius:
                i, j, w, u = radius - pair, radius + pair, weight[pair], weight[pair + one]
                far_i, far_j = i - one, j + one
                for x in range(n):
                    smooth[at, x] += w * (border[i + x] + border[j + x]) + u * (border[far_i + x] + border[far_j + x])
                pair += two
            if radius % two == one:
                j, w = radius + radius, weight[radius]
                for x in range(n):
                    smooth[at, x] += w * (border[x] + border[j + x])
        for k in range(one, radius + one):
            if taps == 0:
                smooth[radius - k] = smooth[radius + k]
                smooth[radius + n - one + k] = smooth[radius + n - one - k]
            else:
                smooth[radius - k] = ZERO
                smooth[radius + n - one + k] = ZERO
        for y in range(n):
            at, w = radius + y, weight[0]
            for x in range(n):
                plane[y, x] = w * smooth[at, x]
            pair = one
            while pair < radius:
                i, j, w, u = at - pair, at + pair, weight[pair], weight[pair + one]
                far_i, far_j = i - one, j + one
                for x in range(n):
                    plane[y, x] += w * (smooth[i, x] + smooth[j, x]) + u * (smooth[far_i, x] + smooth[far_j, x])
                pair += two
            if radius % two == one:
                i, j, w = at - radius, at + radius, weight[radius]
                for x in range(n):
                    plane[y, x] += w * (smooth[i, x] + smooth[j, x])


@_compiled
def _gaussian(sigma, radius):  # type: ignore[no-untyped-def]
    """Weights of the centre and of the taps at distance 1, 2, ... on either side."""
    weight = np.empty(radius + 1, np.float64)
    for k in range(radius + 1):
        weight[k] = np.exp(-0.5 * (k / np.float64(sigma)) ** 2)
    total = weight[0]
    for k in range(1, radius + 1):
        total += 2.0 * weight[k]
    return (weight / total).astype(np.float32)


def _stored(x: Any, out: Any) -> Any:
    """x as an element of `out`: itself, or for 16-bit elements the bits of the nearest bfloat16, ties to even."""
    raise NotImplementedError("only in compiled code")


@overload(_stored, inline="always")
def _stored_as(x, out):  # type: ignore[no-untyped-def]
    if out.dtype == types.float32:
        return lambda x, out: x

    def bits_of_bfloat16(x, out):  # type: ignore[no-untyped-def]
        bits = np.float32(x).view(np.uint32)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return bits_of_bfloat16


@_compiled
def _store_planes(planes, scale, shift, out):  # type: ignore[no-untyped-def]
    n = planes.shape[1]
    for c in range(3):
        plane, a, b = planes[c], scale[c], shift[c]
        target = out[c * n : (c + 1) * n]
        for i in range(n):
            target[i] = _stored(plane[i] * a + b, out)


@_compiled
def _store_pixels(planes, scale, shift, out):  # type: ignore[no-untyped-def]
    r, g, b = planes[0], planes[1], planes[2]
    for i in range(len(r)):
        out[3 * i] = _stored(r[i] * scale[0] + shift[0], out)
        out[3 * i + 1] = _stored(g[i] * scale[1] + shift[1], out)
        out[3 * i + 2] = _stored(b[i] * scale[2] + shift[2], out)


@_compiled
def _erase(out, size, planar, values):  # type: ignore[no-untyped-def]
    """One value in a box of a stored view; values: top, left, height, width, value."""
    top, left = int(values[0]), int(values[1])
    bottom, right = top + int(values[2]), left + int(values[3])
    for y in range(max(top, 0), min(bottom, size)):
        for x in range(max(left, 0), min(right, size)):
            at = y * size + x
            for c in range(3):
                out[c * size * size + at if planar else 3 * at + c] = _stored(values[4], out)


# -- masks


@_compiled
def mask_taps(low, high, size, weight, start, count):  # type: ignore[no-untyped-def]
    """Fill weight (S, 128), from column 0 on, start (S,) and count (S,): an antialiased triangle over the 128 pixels of
    a mask, for the S pixels between `low` and `high`, which are shares of its side. A pixel whose centre is outside has
    no taps. `high` may be the smaller one."""
    step = (high - low) / np.float32(size)
    radius = max(abs(step) * MASK_PIXELS, ONE)
    for o in range(size):
        centre = low + (np.float32(o) + HALF) * step
        start[o] = count[o] = 0
        if centre < ZERO or centre > ONE:
            continue
        at = centre * MASK_PIXELS - HALF
        first, last = max(int(np.ceil(at - radius)), 0), min(int(np.floor(at + radius)), MASK_SIDE - 1)
        total = ZERO
        for t in range(first, last + 1):
            w = max(ONE - abs(np.float32(t) - at) / radius, ZERO)
            weight[o, t - first] = w
            total += w
        for t in range(last + 1 - first):
            weight[o, t] /= total
        start[o], count[o] = first, last + 1 - first


@_compiled
def _fill_background(planes, size, mask, window, spare):  # type: ignore[no-untyped-def]
    """Mid-grey where the mask, resampled into the view, is less than a half, and outside the image."""
    weight, start, count = np.empty((size, MASK_SIDE), np.float32), np.empty(size, np.int64), np.empty(size, np.int64)
    mask_taps(window[1], window[3], size, weight, start, count)
    lines = np.zeros((MASK_SIDE, size), np.float32)
    for y in range(MASK_SIDE):
        bits = mask[y * (MASK_SIDE // 8) : (y + 1) * (MASK_SIDE // 8)]
        for x in range(size):
            for t in range(count[x]):
                at = start[x] + t
                if (bits[at >> 3] >> (7 - (at & 7))) & 1:
                    lines[y, x] += weight[x, t]
    mask_taps(window[0], window[2], size, weight, start, count)
    line = spare[:size]
    for y in range(size):
        line[:] = ZERO
        for t in range(count[y]):
            w, source = weight[y, t], lines[start[y] + t]
            for x in range(size):
                line[x] += w * source[x]
        for x in range(size):
            if line[x] < FOREGROUND:
                at = y * size + x
                planes[0, at] = planes[1, at] = planes[2, at] = HALF
