"""Every odd kind of image becomes 8-bit RGB, or is refused with the reason."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.functional import resize

from dataset_tools.images import Encoding, ImageRefused, prepare, rgb
from pipelines.errors import ConfigError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png16(samples: np.ndarray) -> bytes:
    """A 16-bit PNG of (H, W, C) uint16 samples, C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA; Pillow writes no
    RGB."""
    height, width, channels = samples.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


# -- JPEG


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": with_orientation(1)}])
def test_jpeg_bytes_are_kept(options: dict[str, object]) -> None:
    data = saved(Image.fromarray(RGB), "JPEG", **options)
    stored = prepare(data, Encoding())
    assert stored.payload == data
    assert stored.notes == ("JPEG bytes kept",)
    assert np.array_equal(stored.pixels, np.asarray(Image.open(io.BytesIO(data))))


def test_grey_jpeg_bytes_are_kept() -> None:
    data = saved(Image.fromarray(RGB[..., 0]), "JPEG")
    stored = prepare(data, Encoding())
    assert stored.payload == data
    assert stored.pixels.shape == (12, 20, 3)


def test_a_jpeg_is_decoded_when_pixels_are_to_be_stored() -> None:
    data = saved(Image.fromarray(RGB), "JPEG")
    stored = prepare(data, Encoding(mode="raw"))
    assert np.array_equal(stored.payload, np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_rotation_is_baked_in(orientation: int) -> None:
    data = saved(Image.fromarray(RGB), "JPEG", exif=with_orientation(orientation))
    as_stored = np.asarray(Image.open(io.BytesIO(data)))
    turns = {
        2: (0, 1),
        3: (2, 0),
        4: (2, 1),
        5: (3, 1),
        6: (3, 0),
        7: (1, 1),
        8: (1, 0),
    }  # quarter turns, then mirror
    quarter, mirror = turns[orientation]
    upright = np.rot90(as_stored, quarter)
    upright = upright[:, ::-1] if mirror else upright
    stored = prepare(data, Encoding(mode="raw"))
    assert np.array_equal(stored.payload, upright)
    assert "rotated as its EXIF says" in stored.notes
    encoded = prepare(data, Encoding())
    assert isinstance(encoded.payload, bytes)
    assert encoded.payload != data
    assert Image.open(io.BytesIO(encoded.payload)).size == upright.shape[1::-1]


def test_cmyk_jpeg_is_encoded_anew() -> None:
    image = Image.fromarray(RGB).convert("CMYK")
    stored = prepare(saved(image, "JPEG", quality=100, subsampling=0), Encoding())
    assert isinstance(stored.payload, bytes)
    assert Image.open(io.BytesIO(stored.payload)).mode == "RGB"
    assert np.abs(stored.pixels.astype(int) - RGB).mean() < 8
    assert "CMYK to RGB" in stored.notes


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (saved(Image.fromarray(RGB), "JPEG")[:-1], "truncated or damaged JPEG"),
        (saved(Image.fromarray(RGB), "JPEG")[:-200], "truncated or damaged JPEG"),
        (saved(Image.fromarray(RGB), "JPEG")[:40], "truncated or damaged JPEG"),
        (b"\xff\xd8\xff\xe0nonsense", "truncated or damaged JPEG"),
        (saved(Image.fromarray(RGB).convert("CMYK"), "JPEG")[:-50], "truncated or damaged image"),
        (saved(Image.fromarray(RGB), "PNG")[:-60], "truncated or damaged image"),
        (saved(Image.fromarray(RGB), "PNG")[:20], "truncated or damaged image"),
        (png16(RGB.astype(np.uint16))[:-60], "truncated or damaged image"),
        (saved(Image.fromarray(RGB), "WEBP")[:-60], "truncated or damaged image"),
        (b"\0" * 1000, "not an image"),
        (b"<html>404</html>", "not an image"),
    ],
)
def test_unreadable_files_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ImageRefused) as refused:
        prepare(data, Encoding())
    assert refused.value.reason.startswith(reason)


def test_decompression_bombs_are_refused_before_they_are_decoded() -> None:
    jpeg = bytearray(saved(Image.fromarray(RGB), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    png = bytearray(saved(Image.fromarray(RGB), "PNG"))
    png[16:24] = struct.pack(">II", 60000, 60000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    for data in (jpeg, png):
        with pytest.raises(ImageRefused) as refused:
            prepare(bytes(data), Encoding())
        assert refused.value.reason == "too large"
    with pytest.raises(ImageRefused, match=r"too large: 20x12, at most 100 pixels"):
        prepare(RGB, Encoding(max_pixels=100))
    with pytest.raises(ImageRefused, match=r"too large: .*65535"):
        prepare(np.zeros((1, 65536, 3), np.uint8), Encoding())


# -- other formats


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_their_pixels(format: str) -> None:
    assert np.array_equal(rgb(saved(Image.fromarray(RGB), format)), RGB)


def test_grey_and_one_bit() -> None:
    grey = RGB[..., 0]
    stored = prepare(saved(Image.fromarray(grey), "PNG"), Encoding(mode="raw"))
    assert np.array_equal(stored.pixels, np.repeat(grey[..., None], 3, axis=2))
    assert stored.notes == ("grey to RGB",)
    black_and_white = grey > 127
    assert np.array_equal(rgb(saved(Image.fromarray(black_and_white), "PNG"))[..., 2], black_and_white * 255)


def test_palette() -> None:
    image = Image.fromarray(RGB).quantize(16)
    stored = prepare(saved(image, "PNG"), Encoding(mode="raw"))
    assert np.array_equal(stored.pixels, np.asarray(image.convert("RGB")))
    assert stored.notes == ("palette to RGB",)


def test_transparency_is_laid_over_white() -> None:
    rgba = np.concatenate([RGB, RNG.integers(0, 256, (12, 20, 1), dtype=np.uint8)], axis=2)
    rgba[0, 0, 3], rgba[0, 1, 3] = 0, 255
    share = rgba[..., 3:] / 255
    expected = RGB * share + 255 * (1 - share)
    stored = prepare(saved(Image.fromarray(rgba), "PNG"), Encoding(mode="raw"))
    assert np.abs(stored.pixels - expected).max() <= 0.5 + 1e-9
    assert stored.pixels[0, 0].tolist() == [255, 255, 255]
    assert stored.pixels[0, 1].tolist() == RGB[0, 1].tolist()
    assert stored.notes == ("transparency over white",)
    assert np.array_equal(rgb(rgba), stored.pixels)


def test_a_transparent_palette_colour() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert rgb(saved(image, "PNG", transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_16_bit_samples_are_scaled_over_their_range() -> None:
    ramp = np.linspace(0, 65535, 12 * 20).round().astype(np.uint16).reshape(12, 20)
    expected = np.floor(ramp / 257 + 0.5).astype(np.uint8)
    for data in (
        saved(Image.fromarray(ramp), "PNG"),
        saved(Image.fromarray(ramp), "TIFF"),
        saved(Image.fromarray(ramp), "PPM"),
    ):
        assert np.array_equal(rgb(data), np.repeat(expected[..., None], 3, axis=2))
    assert np.array_equal(rgb(ramp)[..., 0], expected)


def test_16_bit_colour_png() -> None:
    samples = RNG.integers(0, 65536, (12, 20, 3), dtype=np.uint16)
    assert np.array_equal(rgb(png16(samples)), np.floor(samples / 257 + 0.5).astype(np.uint8))
    opaque = np.concatenate([samples, np.full((12, 20, 1), 65535, np.uint16)], axis=2)
    assert np.array_equal(rgb(png16(opaque)), rgb(png16(samples)))
    clear = np.concatenate([samples, np.zeros((12, 20, 1), np.uint16)], axis=2)
    assert np.unique(rgb(png16(clear))).tolist() == [255]


def test_a_window_replaces_the_range() -> None:
    samples = np.array([[0, 1000, 1500, 2000, 65535]], np.uint16)
    assert rgb(samples, window=(1000, 2000))[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    opaque = np.stack([samples, np.full_like(samples, 65535)], axis=2)
    assert rgb(opaque, window=(1000, 2000))[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    floats = saved(Image.fromarray(np.array([[0.0, 0.5, np.nan]], np.float32)), "TIFF")
    assert rgb(floats, window=(0, 1))[0, :, 0].tolist() == [0, 128, 0]


def test_32_bit_samples_need_a_window() -> None:
    with pytest.raises(ImageRefused, match="--window"):
        rgb(saved(Image.fromarray(np.zeros((3, 3), np.int32)), "TIFF"))


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (10, 200)]
    stored = prepare(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), Encoding(mode="raw"))
    assert np.unique(stored.pixels).tolist() == [10]
    assert "first frame of an animation" in stored.notes


# -- arrays, Pillow images, paths


def test_arrays_and_pillow_images() -> None:
    for image in (RGB, Image.fromarray(RGB), np.ascontiguousarray(RGB.transpose(1, 0, 2)).transpose(1, 0, 2)):
        assert np.array_equal(prepare(image, Encoding(mode="raw")).payload, RGB)
    for grey in (RGB[..., 0], RGB[..., :1]):
        assert np.array_equal(rgb(grey)[..., 1], RGB[..., 0])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (RGB.astype(np.float32), "expected uint8 or uint16, got float32"),
        (RGB > 3, "got bool"),
        (RGB.transpose(2, 0, 1), r"got \(3, 12, 20\)"),
        (RGB[:0], r"got \(0, 20, 3\)"),
        ("a.jpg", "expected bytes, an array, a path"),
        (None, "NoneType"),
    ],
)
def test_other_objects_are_refused(array: object, message: str) -> None:
    with pytest.raises(ImageRefused, match=message):
        prepare(array, Encoding())  # type: ignore[arg-type]


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(saved(Image.fromarray(RGB), "PNG"))
    assert np.array_equal(rgb(tmp_path / "a.png"), RGB)
    with pytest.raises(ImageRefused, match="file not found"):
        rgb(tmp_path / "b.png")
    with pytest.raises(ImageRefused, match="cannot be read"):
        rgb(tmp_path)


# -- encoding


def test_lossless_input_is_encoded_without_chroma_subsampling() -> None:
    smooth = np.asarray(Image.fromarray(RGB).resize((60, 60), Image.Resampling.BICUBIC))
    stored = prepare(smooth, Encoding(mode="jpg", quality=95))
    assert isinstance(stored.payload, bytes)
    image = Image.open(io.BytesIO(stored.payload))
    assert image.layer[0][1:3] == (1, 1)  # type: ignore[attr-defined]  # sampling factors of the luma component
    assert np.abs(np.asarray(image).astype(int) - smooth).mean() < 2


@pytest.mark.parametrize(("shape", "expected"), [((100, 60), (33, 20)), ((60, 100), (20, 33)), ((1000, 21), (952, 20))])
def test_the_shorter_side_is_reduced_to_the_resolution(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    pixels = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    for image in (pixels, saved(Image.fromarray(pixels), "JPEG")):
        for mode in ("jpg", "raw"):
            stored = prepare(image, Encoding(mode=mode, resolution=20))
            assert stored.pixels.shape == (*expected, 3)
            assert "reduced" in stored.notes


@pytest.mark.parametrize("shape", [(100, 61), (61, 100), (97, 143)])
def test_what_is_reduced_is_torchvisions_resize(shape: tuple[int, int]) -> None:
    """A file reduced to 256 pixels must give the central crops that published protocols take of the originals."""
    pixels = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    stored = prepare(pixels, Encoding(mode="raw", resolution=20))
    assert (stored.pixels == np.asarray(resize(Image.fromarray(pixels), 20))).all()


def test_nothing_is_enlarged() -> None:
    data = saved(Image.fromarray(RGB), "JPEG")
    assert prepare(data, Encoding(resolution=12)).payload == data


@pytest.mark.parametrize(
    "options", [{"mode": "png"}, {"quality": 0}, {"quality": 101}, {"resolution": 0}, {"window": (2.0, 1.0)}]
)
def test_impossible_settings_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        Encoding(**options)  # type: ignore[arg-type]
