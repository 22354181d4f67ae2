"""The two things the data path asks of a JPEG: what its header says, and its pixels.

The header is read in Python because it must be known *before* decoding: a 300-byte file may claim 65,535 x
65,535 pixels, and a decoder allocates what the header claims. Decoding is Pillow's: it releases the GIL,
gives the same pixels as torchvision's `decode_jpeg` bit for bit, accepts and refuses the same streams (3,000
damaged ones were compared), and does not need torch, which alone would take 0.65 GB of memory.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

SOI = b"\xff\xd8"
_STANDALONE = frozenset([0x01, *range(0xD0, 0xD8)])  # TEM, RST0-7: markers without a length
_NOT_FRAMES = frozenset([0xC4, 0xC8, 0xCC])  # DHT, JPG, DAC lie among the SOF codes
_HUFFMAN_DCT = frozenset([0xC0, 0xC1, 0xC2])  # baseline, extended sequential, progressive


@dataclass(frozen=True)
class JpegHeader:
    """What the frame header of a JPEG stream declares."""

    height: int
    width: int
    components: int
    precision: int  # bits per sample
    process: int  # second byte of the SOF marker: 0xC0 baseline, 0xC2 progressive, ...
    has_exif: bool

    @property
    def is_plain(self) -> bool:
        """8-bit grey or three-component Huffman-coded DCT: what every decoder in use turns into RGB."""
        return self.precision == 8 and self.components in (1, 3) and self.process in _HUFFMAN_DCT


def read_header(data: bytes | np.ndarray) -> JpegHeader:
    """Frame header of a JPEG stream (bytes, or a 1-D uint8 array; not copied).

    Raises ValueError with the reason when the stream has no frame header. The segments are walked as ITU-T
    T.81 B.1.1 lays them out.
    """
    view = _buffer(data)
    if bytes(view[:2]) != SOI:
        raise ValueError("not a JPEG: does not begin with FF D8")
    position, end, has_exif = 2, len(view), False
    while position + 4 <= end:
        if view[position] != 0xFF:
            raise ValueError(f"damaged JPEG header: no marker at byte {position}")
        marker = view[position + 1]
        if marker == 0xFF:  # a fill byte before the marker
            position += 1
            continue
        if marker in _STANDALONE:
            position += 2
            continue
        if marker in (0xD9, 0xDA):
            raise ValueError("damaged JPEG header: image data before any frame header")
        length = view[position + 2] << 8 | view[position + 3]
        if 0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES:
            return _frame(view[position + 4 : position + 2 + length], marker, has_exif)
        if marker == 0xE1 and bytes(view[position + 4 : position + 8]) == b"Exif":
            has_exif = True
        position += 2 + max(length, 2)
    raise ValueError("truncated JPEG: ends inside its header")


def _buffer(data: bytes | np.ndarray) -> memoryview:
    return data.data if isinstance(data, np.ndarray) else memoryview(data)


def _frame(body: memoryview, marker: int, has_exif: bool) -> JpegHeader:
    if len(body) < 6:
        raise ValueError("truncated JPEG: ends inside its frame header")
    precision, height, width, components = body[0], body[1] << 8 | body[2], body[3] << 8 | body[4], body[5]
    if height == 0 or width == 0:
        raise ValueError(f"damaged JPEG header: {width}x{height} pixels")
    return JpegHeader(height, width, components, precision, marker, has_exif)


def decode(data: bytes | np.ndarray) -> np.ndarray:
    """RGB pixels (H, W, 3) uint8 of a grey or colour JPEG stream; EXIF orientation is ignored.

    Raises ValueError with the decoder's reason when the stream is damaged or ends early.
    """
    try:
        with Image.open(io.BytesIO(_buffer(data)), formats=["JPEG"]) as image:
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except Exception as error:
        raise ValueError(f"JPEG: {type(error).__name__}: {error}") from error
