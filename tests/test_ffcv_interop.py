"""Stock FFCV reads our files pixel for pixel, and we read the files that stock FFCV writes.

FFCV runs in processes of its own with a time limit, because an exception in one of its workers makes it wait
for ever; one process reads all files and one writes all, because its start takes most of the time.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import beton

pytestmark = [pytest.mark.ffcv, pytest.mark.slow]

READ = """
import sys, json, numpy as np
from ffcv.loader import Loader, OrderOption
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.fields.decoders import IntDecoder
for path, os_cache, out in json.loads(sys.argv[1]):
    loader = Loader(path, batch_size=4, num_workers=1, os_cache=os_cache, order=OrderOption.SEQUENTIAL,
                    drop_last=False, pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]})
    images, labels = zip(*((image.copy(), label.copy()) for image, label in loader))
    np.savez(out, images=np.concatenate(images), labels=np.concatenate(labels)[:, 0])
"""

READ_MASKS = """
import sys, numpy as np
from ffcv.loader import Loader, OrderOption
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.fields.ndarray import NDArrayDecoder
loader = Loader(sys.argv[1], batch_size=4, num_workers=1, os_cache=True, order=OrderOption.SEQUENTIAL, drop_last=False,
                pipelines={"image": [SimpleRGBImageDecoder()], "mask": [NDArrayDecoder()], "label": None})
images, masks = zip(*((image.copy(), mask.copy()) for image, mask in loader))
np.savez(sys.argv[2], images=np.concatenate(images), masks=np.concatenate(masks))
"""

WRITE = """
import sys, json, numpy as np
from ffcv.writer import DatasetWriter
from ffcv.fields import RGBImageField, IntField, FloatField, BytesField, JSONField, NDArrayField
source, variants = np.load(sys.argv[1]), json.loads(sys.argv[2])
images = [source[f"arr_{i}"] for i in range(len(source.files))]

class Data:
    def __init__(self, more):
        self.more = more
    def __len__(self):
        return len(images)
    def __getitem__(self, i):
        pair = (images[i], int(3 * i - 1))
        if not self.more:
            return pair
        if self.more == "mask":
            return *pair, np.full(2048, i + 1, "u1")
        return 0.5, np.frombuffer(b"name", "u1"), *pair, {"i": int(i)}, np.zeros(16, "u1")

for path, more, options in variants:
    fields = {"image": RGBImageField(**options), "label": IntField()}
    if more == "mask":
        fields["mask"] = NDArrayField(np.dtype("u1"), (2048,))
    elif more:
        fields = {"weight": FloatField(), "name": BytesField(), **fields, "info": JSONField(),
                  "mask": NDArrayField(np.dtype("u1"), (16,))}
    DatasetWriter(path, fields, num_workers=2).from_indexed_dataset(Data(more), chunksize=3)
"""

# What stock FFCV writes: whether other fields lie around image and label, and the options of its image field.
VARIANTS: dict[str, tuple[bool | str, dict[str, object]]] = {
    "raw": (False, {"write_mode": "raw"}),
    "more": (True, {"write_mode": "raw"}),
    "mask": ("mask", {"write_mode": "raw"}),
    "jpg": (False, {"write_mode": "jpg", "jpeg_quality": 95}),
    "smart": (False, {"write_mode": "smart", "smart_threshold": 4000, "jpeg_quality": 95}),
    "proportion": (False, {"write_mode": "proportion", "compress_probability": 0.5, "jpeg_quality": 95}),
}


def run(script: str, *arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def smooth_images(count: int, height: int, width: int) -> list[np.ndarray]:
    """Pictures that JPEG does not hurt much."""
    rng = np.random.default_rng(height * width)
    small = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(count)]
    return [np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) for image in small]


def encode(image: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=95, **options)
    return stream.getvalue()


SEVERAL_PER_PAGE = smooth_images(11, 700, 900)  # 1.9 MB each, pages of 8.4 MB: page ends have to be respected
BEYOND_A_PAGE = smooth_images(2, 1700, 1800)  # 9.2 MB
MIXED = smooth_images(12, 24, 40) + smooth_images(12, 41, 57)


def jpeg_streams() -> list[bytes]:
    a, b, c, d, e, f = smooth_images(6, 48, 64)
    streams = [encode(a), encode(b, progressive=True), encode(c, subsampling=0)]
    return [*streams, encode(d, restart_marker_blocks=2), encode(e, optimize=True), encode(f[..., 0])]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that we wrote, and what stock FFCV read from them: NAME.npz, from its memory map and its page
    cache."""
    folder = tmp_path_factory.mktemp("ours")
    beton.write(folder / "pages.beton", [(image, i - 1) for i, image in enumerate(SEVERAL_PER_PAGE)])
    beton.write(folder / "large.beton", ((image, None) for image in BEYOND_A_PAGE))
    beton.write(folder / "jpeg.beton", [(stream, i) for i, stream in enumerate(jpeg_streams())])
    jobs = [
        (
            str(folder / f"{name}.beton"),
            os_cache,
            str(folder / f"{name}-{'map' if os_cache else 'cache'}.npz"),
        )
        for name in ("pages", "large", "jpeg")
        for os_cache in (True, False)
    ]
    run(READ, json.dumps(jobs))
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of `VARIANTS` with the images `MIXED`, written by stock FFCV with two workers."""
    folder = tmp_path_factory.mktemp("theirs")
    np.savez(folder / "images.npz", *MIXED)
    jobs = [(str(folder / f"{name}.beton"), *variant) for name, variant in VARIANTS.items()]
    run(WRITE, str(folder / "images.npz"), json.dumps(jobs))
    return folder


@pytest.mark.parametrize("reader", ["map", "cache"])
def test_stock_ffcv_reads_our_raw_files_pixel_for_pixel(ours: Path, reader: str) -> None:
    pages, large = np.load(ours / f"pages-{reader}.npz"), np.load(ours / f"large-{reader}.npz")
    assert np.array_equal(pages["labels"], np.arange(11) - 1)
    assert np.array_equal(pages["images"], np.stack(SEVERAL_PER_PAGE))
    assert np.array_equal(large["labels"], [-1, -1])
    assert np.array_equal(large["images"], np.stack(BEYOND_A_PAGE))


@pytest.mark.parametrize("reader", ["map", "cache"])
def test_stock_ffcv_decodes_our_jpeg_files(ours: Path, reader: str) -> None:
    read = np.load(ours / f"jpeg-{reader}.npz")["images"]
    with beton.open(ours / "jpeg.beton") as opened:
        decoded = np.stack([opened.decode(i) for i in range(6)])
    # FFCV asks libjpeg for its fast, less exact transform: a few levels of difference and no more.
    difference = np.abs(read.astype(int) - decoded)
    assert difference.mean(axis=(1, 2, 3)).max() < 2
    assert difference.max() < 30


@pytest.mark.parametrize("name", VARIANTS)
def test_we_read_what_stock_ffcv_wrote(theirs: Path, name: str) -> None:
    with beton.open(theirs / f"{name}.beton") as read:
        assert len(read) == 24
        assert np.array_equal(read.labels, 3 * np.arange(24) - 1)
        assert read.manifest is None
        assert read.has_masks == (name == "mask")  # the field `mask` of "more" is something else
        if read.has_masks:
            assert [read.packed_mask(i).tolist() for i in range(24)] == [[i + 1] * 2048 for i in range(24)]
        for i, image in enumerate(MIXED):
            difference = np.abs(read.decode(i).astype(int) - image)
            assert difference.mean() < (3 if read.is_jpeg[i] else 1e-9)
        jpegs = int(read.is_jpeg.sum())
    expected = {"raw": [0], "more": [0], "mask": [0], "jpg": [24], "smart": [12], "proportion": range(1, 24)}
    assert jpegs in expected[name]
    assert beton.verify(theirs / f"{name}.beton", decode=True).decoded == 24


def test_stock_ffcv_reads_our_masks(tmp_path: Path) -> None:
    images = smooth_images(10, 24, 40)
    masks = np.random.default_rng(0).integers(0, 2, (10, 128, 128)).astype(bool)
    beton.write(tmp_path / "a.beton", zip(images, range(10), masks, strict=True), count=10, masks=True)
    run(READ_MASKS, str(tmp_path / "a.beton"), str(tmp_path / "read.npz"))
    read = np.load(tmp_path / "read.npz")
    assert np.array_equal(read["images"], np.stack(images))
    assert np.array_equal(beton.unpacked(read["masks"]), masks)
