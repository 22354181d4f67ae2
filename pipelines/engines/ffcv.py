"""FFCV's JPEG decoder in our threads: one decode for all views of an image, then the common antialiased resize.

From FFCV comes its compiled library alone, found without importing the package. `import ffcv` would take seconds,
bring in OpenCV's Python module, set torch and numba to one thread and put folders into the environment of child
processes; its loader can hang and cannot be seeded. ctypes releases the GIL around the library's functions.

What the library does, and what is done about it here:

- `imdecode` returns 0, or -1 for anything from a harmless warning to a header that is missing. On -1 its buffer is
  partly filled or not at all, so it is dropped and torchvision's decoder has the last word: a stream is readable
  for all engines or for none.
- A stream of another size than the one expected is not an error to it: it is scaled down, or left in a corner of
  the buffer. So the size in the stream's header is compared with the table's before anything is decoded.
- Its inverse DCT is the fast, less exact one: pixels differ from those of the other engines by about one level on
  average.
- Every thread that calls it keeps a decoder, about 10 kB, until the process ends.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines import jpeg
from pipelines.draw import ViewParams
from pipelines.engines import RESIZES
from pipelines.engines.decode import decode_sample
from pipelines.engines.threads import ThreadedEngine
from pipelines.errors import ConfigError, MissingExtraError, unknown_name
from pipelines.pool import Pool
from pipelines.views import ViewSpec

_BUILD_PACKAGES = "g++ pkg-config libopencv-dev libturbojpeg0-dev"


class Engine(ThreadedEngine):
    """See `pipelines.engines`. With `resize="area"`, FFCV's own resize (OpenCV's INTER_AREA) makes the crops; they
    differ visibly from those of every other engine.

    Raises:
        MissingExtraError: FFCV is not installed, or a library that it needs is not.
    """

    def __init__(self, files: Any, *, device: torch.device, pool: Pool, resize: str = "antialias"):
        library = load_library()
        super().__init__(files, device=device, pool=pool, resize=resize)
        self._imdecode, self._resize_area = library.imdecode, library.resize

    @staticmethod
    def check(spec: ViewSpec, resize: str) -> None:
        if resize not in RESIZES:
            raise ConfigError(unknown_name("data.resize", resize, RESIZES))
        if resize == "area" and not spec.antialias:
            raise ConfigError(
                f"view {spec.name!r}: data.resize: area averages pixels, which is the opposite of antialias: false; "
                "leave data.resize: antialias"
            )
        if resize == "area" and spec.interpolation != "bilinear":
            raise ConfigError(
                f"view {spec.name!r}: data.resize: area averages pixels and cannot be {spec.interpolation}; "
                "leave data.resize: antialias"
            )

    def decode(self, index: int) -> Tensor:
        files = self.files
        if files.is_jpeg[index]:
            height, width = int(files.heights[index]), int(files.widths[index])
            payload = files.payload(index)
            if _has_size(payload, height, width):
                pixels = torch.empty((height, width, 3), dtype=torch.uint8)
                if self._imdecode(
                    payload.ctypes.data, payload.size, height, width, pixels.data_ptr(),
                    height, width, 0, 0, 1, 1, False, False,
                ) == 0:  # fmt: skip
                    return pixels.permute(2, 0, 1)
        return decode_sample(files, index)

    def crop(self, image: Tensor, params: ViewParams, row: int, out: Tensor) -> None:
        if self.resize != "area":
            super().crop(image, params, row, out)
            return
        pixels = image.permute(1, 2, 0).contiguous()  # no copy: decoders leave it so
        for view in range(params.count):
            top, left, height, width = params.box[view, row].tolist()
            rows, columns = params.resized[view, row].tolist()
            resized = torch.empty((rows, columns, 3), dtype=torch.uint8)
            self._resize_area(
                0, pixels.data_ptr(), pixels.shape[0], pixels.shape[1], top, top + height, left, left + width,
                resized.data_ptr(), rows, columns,
            )  # fmt: skip
            y, x = params.offset[view, row].tolist()
            square = _square(resized, y, x, params.size)
            out[view, row] = square.flip(1) if params.flip[view, row] else square


def _square(image: Tensor, top: int, left: int, size: int) -> Tensor:
    """The square of an image (H, W, 3) whose corner lies at (top, left), black where it reaches over the edge."""
    height, width = image.shape[:2]
    inside = image[max(top, 0) : top + size, max(left, 0) : left + size]
    if inside.shape[:2] == (size, size):
        return inside
    square = image.new_zeros((size, size, 3))
    square[max(-top, 0) : height - top, max(-left, 0) : width - left] = inside
    return square


def load_library() -> ctypes.CDLL:
    """FFCV's compiled library with the types of `imdecode` and `resize` declared.

    Raises:
        MissingExtraError: it is not installed, or does not load; the message says what to install.
    """
    package = importlib.util.find_spec("ffcv")
    folders = list(package.submodule_search_locations or ()) if package is not None else []
    module = importlib.machinery.PathFinder.find_spec("_libffcv", folders) if folders else None
    if module is None or module.origin is None:
        raise MissingExtraError(
            "data.engine: ffcv needs FFCV, which is not installed. It is compiled while it is installed: "
            f"sudo apt-get install {_BUILD_PACKAGES}, then pip install relssl[ffcv]; see docs/install.md"
        )
    try:
        library = ctypes.CDLL(module.origin)
    except OSError as error:
        raise MissingExtraError(
            f"data.engine: ffcv: FFCV is installed, but its library does not load ({error}). "
            f"sudo apt-get install {_BUILD_PACKAGES}, and compile it again: "
            "pip install --force-reinstall --no-deps --no-cache-dir ffcv==1.0.2"
        ) from None
    size, flag = ctypes.c_uint32, ctypes.c_bool
    library.imdecode.argtypes = [
        ctypes.c_void_p, ctypes.c_uint64,  # the stream
        size, size,  # height and width; not used
        ctypes.c_void_p,  # the pixels
        size, size, size, size, size, size,  # height, width, offsets, scale as a fraction
        flag, flag,  # crop, mirror
    ]  # fmt: skip
    library.imdecode.restype = ctypes.c_int
    library.resize.argtypes = [ctypes.c_int64] * 11
    library.resize.restype = None
    return library


def _has_size(stream: np.ndarray, height: int, width: int) -> bool:
    """Whether the header of a JPEG stream declares this size."""
    try:
        header = jpeg.read_header(stream)
    except ValueError:
        return False
    return (header.height, header.width) == (height, width)
