"""The JPEG header is read right, and our decoder and the default engine's agree on every stream."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from pipelines import jpeg

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def stream(mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


STREAMS = {
    "baseline": stream(),
    "progressive": stream(progressive=True),
    "4:4:4": stream(subsampling=0),
    "restarts": stream(restart_marker_blocks=1),
    "comment": stream(comment=b"\xff\xc0 not a frame" * 100),
    "grey": stream("L"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_headers_of_plain_streams(name: str) -> None:
    header = jpeg.read_header(STREAMS[name])
    assert (header.height, header.width, header.precision) == (24, 40, 8)
    assert header.components == (1 if name == "grey" else 3)
    assert header.is_plain
    assert not header.has_exif


def test_what_is_not_plain() -> None:
    assert not jpeg.read_header(stream("CMYK")).is_plain
    exif = Image.Exif()
    exif[0x0112] = 6
    assert jpeg.read_header(stream(exif=exif)).has_exif


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a JPEG"),
        (b"\x89PNG", "not a JPEG"),
        (b"\xff\xd8", "ends inside its header"),
        (STREAMS["baseline"][:100], "ends inside"),
        (b"\xff\xd8\xff\xda\0\2", "before any frame header"),
        (b"\xff\xd8xxxxxx", "no marker at byte 2"),
        (b"\xff\xd8\xff\xc0\0\x0b\x08\0\0\0\x08\x03", "8x0 pixels"),
    ],
)
def test_headers_that_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jpeg.read_header(data)


def engine_decode(data: bytes) -> np.ndarray | None:
    try:
        decoded = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError:
        return None
    return decoded.permute(1, 2, 0).numpy()


def our_decode(data: bytes) -> np.ndarray | None:
    try:
        return jpeg.decode(np.frombuffer(data, np.uint8))
    except ValueError:
        return None


@given(st.sampled_from(sorted(STREAMS)), st.data())
def test_both_decoders_accept_the_same_streams_and_see_the_same_pixels(name: str, data: st.DataObject) -> None:
    content = bytearray(STREAMS[name])
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(3, len(content))))
    content = content[:cut]
    for _ in range(data.draw(st.integers(0, 2))):
        content[data.draw(st.integers(2, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = jpeg.read_header(bytes(content))
    except ValueError:
        return
    if header.height * header.width > 10_000_000 or not header.is_plain:
        return
    ours, engines = our_decode(bytes(content)), engine_decode(bytes(content))
    assert (ours is None) == (engines is None)
    if ours is not None and engines is not None:
        assert np.array_equal(ours, engines)


def test_every_cut_is_noticed() -> None:
    whole = STREAMS["baseline"]
    for cut in (1, 2, 10, len(whole) // 2):
        with pytest.raises(ValueError, match="JPEG"):
            jpeg.decode(whole[:-cut])
