"""Any image to what a `.beton` file stores: the JPEG bytes it came as, or 8-bit RGB.

JPEG bytes are kept when nothing has to change (8-bit grey or colour, no EXIF rotation, no resize):
re-encoding would cost quality and time. They are decoded all the same, because that alone shows a truncated
file. Everything else is brought to 8-bit RGB:

- grey is repeated in three channels; CMYK, YCbCr, Lab and palettes are converted by Pillow (no ICC profiles);
- transparency is laid over white, as a page shows it: what lies under transparent pixels is often garbage;
- 16-bit samples are scaled linearly from 0 ... 65535, or from `window`; 32-bit ones need a window;
- an EXIF rotation is applied to the pixels, since no decoder in the training path does it;
- of an animation the first frame is taken.

What cannot be read is refused with an `ImageRefused`, which conversion counts and goes on. A JPEG that was
damaged in the middle but is complete decodes without an error in every libjpeg, and is not noticed.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines import jpeg
from pipelines.beton_format import MAX_SIDE
from pipelines.errors import ConfigError, InputError

ImageLike = bytes | np.ndarray | Path | Image.Image
MAX_PIXELS = 178_956_970  # where Pillow, too, takes an image for a decompression bomb (half a gigabyte of RGB)
QUALITY = 95
_ORIENTATION = 0x0112
_UPRIGHT = 1

# Our own limit is checked right after opening; Pillow's warning at half of it would only be noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageRefused(InputError):
    """One input image that cannot be used; `reason` is the same short phrase for all of its kind."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Encoding:
    """How images are stored.

    mode: "jpg" keeps JPEG bytes and encodes the rest at `quality` without chroma subsampling (1-100; 95 costs
    about 1 grey level on average); "raw" stores pixels: no loss, no decoding at training time, 5 to 10 times
    the space. resolution: images whose shorter side is longer than this are reduced to it (bicubic,
    antialiased, aspect ratio kept); never enlarged. window: (low, high) of samples deeper than 8 bits.
    max_pixels: larger images are refused.
    """

    mode: str = "jpg"
    quality: int = QUALITY
    resolution: int | None = None
    window: tuple[float, float] | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.mode not in ("jpg", "raw"):
            raise ConfigError(f"mode {self.mode!r}: expected 'jpg' or 'raw'")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"quality {self.quality}: expected 1 to 100")
        if self.resolution is not None and not 1 <= self.resolution <= MAX_SIDE:
            raise ConfigError(f"resolution {self.resolution}: expected 1 to {MAX_SIDE} pixels")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ConfigError(f"window {self.window}: expected two numbers, the lower one first")


@dataclass(frozen=True)
class Stored:
    """One image ready for the file: JPEG bytes, or pixels (H, W, 3) uint8; `pixels` as they will be
    decoded."""

    payload: bytes | np.ndarray
    pixels: np.ndarray
    notes: tuple[str, ...]  # what was done to it


def prepare(image: ImageLike | ImageRefused, encoding: Encoding) -> Stored:
    """Bring one image (encoded bytes of any format Pillow reads, array, Pillow image, or path of a file) to
    storage.

    Arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or uint16. Raises ImageRefused; also the one that a
    source gives in place of an image that it cannot read itself.
    """
    if isinstance(image, ImageRefused):
        raise image
    if isinstance(image, Path):
        image = _read(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        kept = _keep_jpeg(bytes(image), encoding)
        if isinstance(kept, Stored):
            return kept
        pixels, notes = _open(bytes(image), encoding) if kept is None else (kept, [])
    elif isinstance(image, np.ndarray):
        pixels, notes = _rgb_of_array(image, encoding)
    elif isinstance(image, Image.Image):
        _check_size(*image.size, encoding)
        pixels, notes = _rgb_of_pillow(image, encoding)
    else:
        raise ImageRefused("not an image", f"expected bytes, an array, a path or a Pillow image, got {type(image)}")
    return _store(pixels, notes, encoding)


def rgb(image: ImageLike, *, window: tuple[float, float] | None = None) -> np.ndarray:
    """The image as (H, W, 3) uint8 RGB, upright. Raises ImageRefused."""
    return prepare(image, Encoding(mode="raw", window=window)).pixels


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageRefused("file not found") from None
    except OSError as error:
        raise ImageRefused("file cannot be read", str(error.strerror)) from error


def _keep_jpeg(data: bytes, encoding: Encoding) -> Stored | np.ndarray | None:
    """A JPEG to be stored as it is; or, when only its size or the mode is in the way, its pixels; or None."""
    if not data:
        raise ImageRefused("empty file (0 bytes)")
    if not data.startswith(jpeg.SOI):
        return None
    try:
        header = jpeg.read_header(data)
        _check_size(header.width, header.height, encoding)
        if not header.is_plain or (header.has_exif and _orientation(data) != _UPRIGHT):
            return None
        pixels = jpeg.decode(data)
    except ValueError as error:
        raise ImageRefused("truncated or damaged JPEG", str(error)) from error
    if encoding.mode == "raw" or _is_reduced(header.height, header.width, encoding):
        return pixels
    if max(header.height, header.width) > MAX_SIDE:
        raise ImageRefused("too large", f"{header.width}x{header.height}")
    return Stored(data, pixels, ("JPEG bytes kept",))


def _orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(_ORIENTATION, _UPRIGHT)
    except Exception:  # noqa: BLE001  a damaged EXIF block raises what it likes, and then has no orientation to give
        return _UPRIGHT


def _open(data: bytes, encoding: Encoding) -> tuple[np.ndarray, list[str]]:
    """Pixels and notes of an encoded image of any format."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_size(*image.size, encoding)
            # Bit depth and colour type stand in IHDR. Of colours Pillow would drop the lower byte, of grey not.
            if image.format == "PNG" and data[24] == 16 and data[25] != 0:
                pixels, notes = _rgb_of_array(_png16(data), encoding)
            else:
                pixels, notes = _rgb_of_pillow(image, encoding)
    except ImageRefused:
        raise
    except UnidentifiedImageError:
        raise ImageRefused("not an image", f"begins with {data[:8]!r}") from None
    except Image.DecompressionBombError as error:
        raise ImageRefused("too large", str(error)) from error
    except Exception as error:
        raise ImageRefused("truncated or damaged image", f"{type(error).__name__}: {error}") from error
    return pixels, notes


def _check_size(width: int, height: int, encoding: Encoding) -> None:
    if width * height > encoding.max_pixels:
        raise ImageRefused("too large", f"{width}x{height}, at most {encoding.max_pixels} pixels are accepted")


def _png16(data: bytes) -> np.ndarray:
    """Samples of a 16-bit PNG: (H, W, C) uint16. torchvision is imported for these rare files only."""
    import torch
    from torchvision.io import ImageReadMode, decode_png

    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_png(buffer, mode=ImageReadMode.UNCHANGED).numpy().transpose(1, 2, 0)


def _rgb_of_pillow(image: Image.Image, encoding: Encoding) -> tuple[np.ndarray, list[str]]:
    notes = ["first frame of an animation"] if getattr(image, "is_animated", False) else []
    upright = ImageOps.exif_transpose(image)
    if image.getexif().get(_ORIENTATION, _UPRIGHT) != _UPRIGHT:
        notes.append("rotated as its EXIF says")
    deep = upright.mode.startswith("I;16") or upright.mode in ("I", "F")
    if deep:
        # Pillow reads a 16-bit PGM into 32-bit integers that span 16 bits.
        known = upright.mode.startswith("I;16") or image.format == "PPM"
        samples = np.asarray(upright)
        pixels, more = _grey_to_rgb(_to_8_bit(samples, encoding.window or ((0, 65535) if known else None)))
        return pixels, notes + ["16-bit" if known else "32-bit", *more]
    if upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
        pixels, more = _rgb_of_array(np.asarray(upright.convert("RGBA")), encoding)
        return pixels, notes + more
    if upright.mode != "RGB":
        kind = {"L": "grey", "1": "grey", "P": "palette"}.get(upright.mode, upright.mode)
        notes.append(f"{kind} to RGB")
        upright = upright.convert("RGB")
    return np.asarray(upright), notes


def _rgb_of_array(array: np.ndarray, encoding: Encoding) -> tuple[np.ndarray, list[str]]:
    """Pixels and notes of an array of samples."""
    if array.dtype not in (np.uint8, np.uint16):
        raise ImageRefused("not an image", f"expected uint8 or uint16, got {array.dtype}: scale it yourself")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4) or array.size == 0:
        raise ImageRefused("not an image", f"expected (H, W), (H, W, 3) or (H, W, 4), got {array.shape}")
    _check_size(array.shape[1], array.shape[0], encoding)
    notes = []
    if array.dtype == np.uint16:
        alpha = _to_8_bit(array[..., -1:], (0, 65535)) if array.shape[2] in (2, 4) else None
        array = _to_8_bit(array, encoding.window or (0, 65535))
        array = array if alpha is None else np.concatenate([array[..., :-1], alpha], axis=2)
        notes.append("16-bit")
    if array.shape[2] in (2, 4):
        array = _over_white(array)
        notes.append("transparency over white")
    if array.shape[2] == 1:
        array, more = _grey_to_rgb(array[..., 0])
        notes += more
    return array, notes


def _grey_to_rgb(grey: np.ndarray) -> tuple[np.ndarray, list[str]]:
    return np.repeat(grey[..., None], 3, axis=2), ["grey to RGB"]


def _to_8_bit(samples: np.ndarray, window: tuple[float, float] | None) -> np.ndarray:
    if window is None:
        raise ImageRefused("32-bit samples", "their range is not known; give it with --window LOW HIGH")
    low, high = window
    scaled = (samples.astype(np.float64) - low) * (255 / (high - low))
    return np.clip(np.nan_to_num(scaled) + 0.5, 0, 255).astype(np.uint8)


def _over_white(array: np.ndarray) -> np.ndarray:
    """Colour (H, W, 3 or 1) of an image with alpha in its last channel, laid over white."""
    colour, alpha = array[..., :-1].astype(np.uint32), array[..., -1:].astype(np.uint32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _is_reduced(height: int, width: int, encoding: Encoding) -> bool:
    return encoding.resolution is not None and min(height, width) > encoding.resolution


def _store(pixels: np.ndarray, notes: list[str], encoding: Encoding) -> Stored:
    """Resize where asked for, and encode."""
    height, width = pixels.shape[:2]
    if _is_reduced(height, width, encoding) and encoding.resolution is not None:
        # As torchvision's Resize, filter and cut-off of the long side alike: central crops of a file that was reduced
        # to 256 pixels are then those of the original images, and so are figures of an evaluation.
        short = min(height, width)
        size = (width * encoding.resolution // short, height * encoding.resolution // short)
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
        notes = [*notes, "reduced"]
    if max(pixels.shape[:2]) > MAX_SIDE:
        raise ImageRefused("too large", f"{width}x{height}; a side may have at most {MAX_SIDE} pixels")
    pixels = np.ascontiguousarray(pixels)
    if encoding.mode == "raw":
        return Stored(pixels, pixels, tuple(notes))
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=encoding.quality, subsampling=0)
    return Stored(stream.getvalue(), pixels, (*notes, "encoded as JPEG"))
