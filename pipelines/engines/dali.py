"""NVIDIA DALI: the same stored bytes, decoded by nvJPEG on a CUDA device (or by libjpeg-turbo on the CPU).

A pipeline of DALI takes a batch of payloads and boxes, decodes each image once, and slices, resizes with
antialiasing and mirrors it once per view. Colour is not DALI's business: its operators are other functions than
torchvision's. On the CPU this engine is there for comparison, it is the slowest.

Three things about DALI shape the code:

- A stream that its decoder refuses fails the whole batch and does not say which sample it was. So suspicious
  streams (no header, another size than the table's, no end marker) never reach it: torchvision decodes those, and
  its verdict counts. When a batch fails all the same, torchvision decodes that batch, which finds the samples to
  replace, and DALI crops the pixels. There is no second try of the decoder, hence no way to loop.
- In its default execution model output buffers are counted references: a tensor taken by DLPack keeps its memory
  when the pipeline runs on, or goes away. (With `exec_async=False` it would be overwritten.) So on the CPU a single
  view is handed out as it is. On a CUDA device a buffer's release is ordered by DALI's streams, which know nothing
  of the readers', so views are copied once, on the device, and DALI's buffers are let go after that.
- Its hardware decoder and its CUDA decoder share the work of a batch and may round differently. On the CPU an
  image's crops do not depend on the batch around it, on a CUDA device that is not promised.
"""

from __future__ import annotations

import importlib
import logging
import threading
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines import jpeg
from pipelines.crop import check_squares
from pipelines.draw import ViewParams
from pipelines.engines import Finish, Replace, refuse_area
from pipelines.engines.decode import decode_sample
from pipelines.errors import InputError, MissingExtraError, RunError
from pipelines.pool import Pool
from pipelines.views import ViewSpec

log = logging.getLogger("relssl.dali")

_END = b"\xff\xd9"


class Engine:
    """See `pipelines.engines`. Crops are made on `device`, complete when they are returned, and never written to
    again. On a CUDA device they were allocated on a stream of this engine and are recorded as used on the default
    stream; who reads them on another one calls their `record_stream`.

    Raises:
        MissingExtraError: DALI is not installed.
    """

    ASYNC = True

    def __init__(self, files: Any, *, device: torch.device, pool: Pool, resize: str = "antialias"):
        self._dali = _import_dali()
        self.files, self.device, self.pool = files, device, pool
        # Not the stream of the training step: copies would wait behind its kernels, or its kernels for the decoder.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lock = threading.Lock()  # a pipeline makes one batch at a time; batches may come from several threads
        self._plan: tuple[Any, ...] = ()
        self._pipelines: dict[bool, Any] = {}  # by whether the images come encoded

    @staticmethod
    def check(spec: ViewSpec, resize: str) -> None:
        refuse_area(resize)

    def crops(
        self, ids: np.ndarray, params: list[ViewParams], replace: Replace, finish: Finish | None = None
    ) -> list[Tensor]:
        """Crops of a batch, which may be smaller than the one before.

        Raises:
            RunError: DALI failed for another reason than an image, such as a lack of memory.
        """
        for view in params:
            check_squares(view)  # DALI itself would take black for all that lies outside
        with torch.cuda.stream(self._stream):  # does nothing without a stream
            crops = self._make(ids.copy(), params, replace)
        if self._stream is not None:
            self._stream.synchronize()
            for crop in crops:
                crop.record_stream(torch.cuda.default_stream(self.device))
        if finish is not None:
            self.pool.run(lambda start, stop: finish(crops, start, stop), len(ids))
        return crops

    def close(self) -> None:
        self._pipelines.clear()

    def _make(self, ids: np.ndarray, params: list[ViewParams], replace: Replace) -> list[Tensor]:
        def replaced(row: int, error: InputError) -> int:
            ids[row] = replace(row, error)
            return int(ids[row])

        sources = [self._source(row, int(index), replaced) for row, index in enumerate(ids)]
        parts = []
        encoded = [row for row, source in enumerate(sources) if source.ndim == 1]
        if encoded:
            try:
                parts.append((encoded, self._crop(encoded, sources, params)))
            except RunError as error:
                failure = error
            if not parts:
                self._decode(encoded, sources, ids, replaced, failure)
        pixels = [row for row, source in enumerate(sources) if source.ndim == 3]
        if pixels:
            parts.append((pixels, self._crop(pixels, sources, params)))
        return parts[0][1] if len(parts) == 1 else _merged(parts)

    def _source(self, row: int, index: int, replace: Replace) -> np.ndarray:
        """What goes in for a row: a stream that looks whole (1-D), or pixels (H, W, 3)."""
        while True:
            try:
                payload = self.files.payload(index)
                if not self.files.is_jpeg[index]:
                    return payload.reshape(*self._shape(index), 3)
                return payload if self._looks_whole(payload, index) else self._pixels(index)
            except InputError as error:
                index = replace(row, error)

    def _shape(self, index: int) -> tuple[int, int]:
        return int(self.files.heights[index]), int(self.files.widths[index])

    def _looks_whole(self, stream: np.ndarray, index: int) -> bool:
        """Whether a stream has a frame header of the expected size and ends with an end marker."""
        try:
            header = jpeg.read_header(stream)
        except ValueError:
            return False
        return (header.height, header.width) == self._shape(index) and stream[-2:].tobytes() == _END

    def _pixels(self, index: int) -> np.ndarray:
        return decode_sample(self.files, index).permute(1, 2, 0).numpy()

    def _decode(
        self, rows: list[int], sources: list[np.ndarray], ids: np.ndarray, replace: Replace, failure: RunError
    ) -> None:
        """Put torchvision's pixels in the place of streams on which DALI failed."""
        damaged: list[int] = []

        def decode(start: int, stop: int) -> None:
            for row in rows[start:stop]:
                index = int(ids[row])
                while sources[row].ndim == 1:
                    try:
                        sources[row] = self._pixels(index)
                    except InputError as error:
                        damaged.append(index)
                        index = replace(row, error)

        self.pool.run(decode, len(rows))
        if not damaged:  # otherwise the failure is explained, and reported by who replaces
            log.warning("%s; torchvision decoded this batch instead", failure)

    def _crop(self, rows: list[int], sources: list[np.ndarray], params: list[ViewParams]) -> list[Tensor]:
        """Crops of some rows, all encoded or all pixels: (V, len(rows), S, S, 3) per spec. RunError when DALI fails."""
        inputs = {"images": [sources[row] for row in rows], **_places(params, rows)}
        with self._lock:
            try:
                outputs = self._pipeline(sources[rows[0]].ndim == 1, params, len(rows)).run(**inputs)
            except RuntimeError as error:
                self._pipelines.clear()  # by DALI's word no longer valid, and inputs may be left in them
                raise RunError(f"DALI failed on a batch of {len(rows)} images: {_reason(error)}") from None
            views = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        starts = np.cumsum([0, *(view.count for view in params)])
        crops = [self._stacked(views[start:stop]) for start, stop in pairwise(starts)]
        if self._stream is not None:
            self._stream.synchronize()  # DALI may have its buffers back
        return crops

    def _stacked(self, views: list[Tensor]) -> Tensor:
        """(V, B, S, S, 3) of V times (B, S, S, 3), without a copy where DALI's memory may be handed out."""
        return views[0].unsqueeze(0) if len(views) == 1 and self._stream is None else torch.stack(views)

    def _pipeline(self, encoded: bool, params: list[ViewParams], batch: int) -> Any:
        plan = tuple((view.count, view.size, view.interpolation, view.antialias) for view in params)
        if plan != self._plan:  # another phase of the run: the memory of the old pipelines is wanted back
            self._plan = plan
            self._pipelines.clear()
        pipeline = self._pipelines.get(encoded)
        if pipeline is None or pipeline.max_batch_size < batch:
            self._pipelines.pop(encoded, None)
            pipeline = _build(self._dali, encoded, params, batch, self.device, self.pool.size)
            self._pipelines[encoded] = pipeline
        return pipeline


def _import_dali() -> Any:
    """The module `nvidia.dali`, which both wheels provide; its type stubs say less than it can do."""
    try:
        return importlib.import_module("nvidia.dali")
    except (ImportError, OSError) as error:
        raise MissingExtraError(
            f"data.engine: dali needs NVIDIA DALI, which cannot be imported ({error}). "
            "Install it: pip install relssl[dali], which takes nvidia-dali-cuda120, for drivers of CUDA 12 and later; "
            "or pip install nvidia-dali-cuda130, for CUDA 13. Not both. Linux only"
        ) from None


def _build(dali: Any, encoded: bool, params: list[ViewParams], batch: int, device: torch.device, threads: int) -> Any:
    """A pipeline whose inputs are `images` and those of `_places`, with one output per view in plan order, per
    sample (S, S, 3) uint8."""
    fn, types = dali.fn, dali.types
    on_gpu = device.type == "cuda"
    device_id = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None
    # One batch at a time: the loader runs ahead by itself, and a batch's fate must be known before the next.
    pipeline = dali.Pipeline(batch_size=batch, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)
    with pipeline:
        if encoded:
            images = fn.decoders.image(
                fn.external_source(name="images", dtype=types.UINT8, ndim=1),
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,  # the other engines ignore EXIF, and conversion has applied it
                jpeg_fancy_upsampling=True,  # chroma as libjpeg interpolates it, on the GPU too
                affine=False,  # threads tied to cores would crowd the first ones when processes share a machine
            )
        else:
            images = fn.external_source(name="images", dtype=types.UINT8, ndim=3, layout="HWC")
            images = images.gpu() if on_gpu else images
        views = [view for view in params for _ in range(view.count)]
        pipeline.set_outputs(*(_crop_node(dali, images, view, number) for number, view in enumerate(views)))
    pipeline.build()
    return pipeline


def _crop_node(dali: Any, images: Any, view: ViewParams, number: int) -> Any:
    """The operators of one view. Slicing first makes pixels outside the box not exist; a resize of a region of
    interest would read across its edge. At the edge DALI repeats pixels where PIL and torchvision shorten the
    filter: there, and nowhere else, bilinear crops differ by more than rounding."""
    fn, types = dali.fn, dali.types

    def given(what: str, dtype: Any = types.INT32, ndim: int = 1) -> Any:
        return fn.external_source(name=f"{what}{number}", dtype=dtype, ndim=ndim)

    crop = fn.slice(images, start=given("start"), shape=given("shape"), axes=(0, 1))
    crop = fn.resize(
        crop,
        size=given("resized", dtype=types.FLOAT),
        interp_type=types.INTERP_CUBIC if view.interpolation == "bicubic" else types.INTERP_LINEAR,
        antialias=view.antialias,
    )
    square = (view.size, view.size)
    crop = fn.slice(crop, start=given("offset"), shape=square, axes=(0, 1), out_of_bounds_policy="pad", fill_values=0)
    return fn.flip(crop, horizontal=given("flip", ndim=0))


def _places(params: list[ViewParams], rows: list[int]) -> dict[str, np.ndarray]:
    """Where the crops of some rows are, as DALI's inputs: an array per quantity and view, numbered in plan order."""
    inputs, number = {}, 0
    for view in params:
        for v in range(view.count):
            inputs[f"start{number}"] = view.box[v, rows, :2]
            inputs[f"shape{number}"] = view.box[v, rows, 2:]
            inputs[f"resized{number}"] = view.resized[v, rows].astype(np.float32)
            inputs[f"offset{number}"] = view.offset[v, rows]
            inputs[f"flip{number}"] = view.flip[v, rows].astype(np.int32)
            number += 1
    return {name: np.ascontiguousarray(values) for name, values in inputs.items()}


def _merged(parts: list[tuple[list[int], list[Tensor]]]) -> list[Tensor]:
    """Crops of all rows from those of groups of rows: a data set of JPEG and raw images."""
    batch = sum(len(rows) for rows, _ in parts)
    merged = []
    for spec, crops in enumerate(parts[0][1]):
        out = crops.new_empty((crops.shape[0], batch, *crops.shape[2:]))
        for rows, made in parts:
            out[:, rows] = made[spec]
        merged.append(out)
    return merged


def _reason(error: RuntimeError) -> str:
    """The telling line of DALI's long message: the one after `encountered:`."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    at = lines.index("encountered:") + 1 if "encountered:" in lines else 0
    return lines[at] if at < len(lines) else "no reason given"
