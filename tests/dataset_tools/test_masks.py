"""`relssl saliency`: the same images, with masks, and nothing lost on the way."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_tools.masks import METHOD, NO_SUBJECT, add_masks
from dataset_tools.saliency import saliency
from pipelines import beton
from pipelines.errors import ConfigError, InputError
from tests.dataset_tools.test_saliency import scene, shares


def jpeg_of(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95)
    return stream.getvalue()


SCENES = [scene(160, 120, seed=i)[0] for i in range(4)]
PLAIN = np.full((50, 60, 3), 90, np.uint8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """JPEG and raw images, with and without labels, of which sample 2 has no subject."""
    samples = [(jpeg_of(SCENES[0]), 1), (SCENES[1], None), (PLAIN, 0), (jpeg_of(SCENES[2]), 1), (SCENES[3], 0)]
    beton.write(tmp_path / "a.beton", samples, classes=["a", "b"], about={"source": "scenes", "skipped": {"count": 3}})
    return tmp_path / "a.beton"


def test_every_image_is_copied_and_has_a_mask(source: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    done = add_masks(source, tmp_path / "b.beton", progress=lambda i, n: steps.append((i, n)))
    with beton.open(source) as a, beton.open(tmp_path / "b.beton") as b:
        assert b.has_masks
        for name in ("labels", "heights", "widths", "is_jpeg"):
            assert np.array_equal(getattr(a, name), getattr(b, name))
        assert a.classes == b.classes
        for i in range(5):
            assert np.array_equal(a.payload(i), b.payload(i))
        for i, image in ((1, SCENES[1]), (4, SCENES[3])):
            assert np.array_equal(b.mask(i), saliency(image).mask)
        assert min(shares(b.mask(0), scene()[1])) > 0.9  # decoded at a fraction of its size
        assert b.mask(2).all()
        manifest = b.manifest
    assert manifest is not None
    assert manifest["source"] == "scenes"  # of the images
    assert manifest["skipped"] == {"count": 3}
    assert manifest["masks"]["source"] == METHOD
    assert manifest["masks"]["count"] == 4
    assert 0.1 < manifest["masks"]["foreground"] < 0.5
    assert manifest["masks"]["all_foreground"]["reasons"] == {NO_SUBJECT: 1}
    assert manifest["masks"]["all_foreground"]["inputs"][0][0] == "sample 2"
    assert steps == [(i, 5) for i in range(1, 6)]
    assert beton.verify(tmp_path / "b.beton", decode=True).ok
    text = done.text()
    for part in ("5 images", "images/s", f"masks: 4 from {METHOD}", "1 x no subject found: sample 2", "relssl verify"):
        assert part in text


def test_the_file_does_not_depend_on_the_number_of_workers(source: Path, tmp_path: Path) -> None:
    for name, workers in (("x", 1), ("y", 3)):
        (tmp_path / name).mkdir()
        add_masks(source, tmp_path / name / "b.beton", workers=workers)
    assert (tmp_path / "x/b.beton").read_bytes() == (tmp_path / "y/b.beton").read_bytes()


def test_a_file_may_be_replaced_by_itself(source: Path) -> None:
    before = source.read_bytes()
    with pytest.raises(ConfigError, match="--force"):
        add_masks(source, source)
    assert source.read_bytes() == before
    add_masks(source, source, force=True)
    once = source.read_bytes()
    add_masks(source, source, force=True)  # masks that are there are made anew
    assert source.read_bytes() == once
    with beton.open(source) as files:
        assert files.has_masks
        assert np.array_equal(files.decode(1), SCENES[1])


def test_an_image_that_cannot_be_decoded_stays_as_it_is(tmp_path: Path) -> None:
    cut = jpeg_of(SCENES[0])[:-400]
    beton.write(tmp_path / "a.beton", [(jpeg_of(SCENES[1]), 0), (cut, 1)])
    done = add_masks(tmp_path / "a.beton", tmp_path / "b.beton")
    with beton.open(tmp_path / "b.beton") as files:
        assert files.payload(1).tobytes() == cut
        assert files.mask(1).all()
    assert done.masks.missing == {"image that cannot be decoded": ["sample 1"]}


def test_an_image_that_was_exchanged_is_not_copied_as_if_it_were_sound(source: Path, tmp_path: Path) -> None:
    with beton.Beton(source) as file:
        start = int(file.offsets[1])
    with source.open("r+b") as file:
        file.seek(start)
        file.write(bytes(3000))
    with pytest.raises(InputError, match="sample 1: not the bytes that were written for it"):
        add_masks(source, tmp_path / "b.beton")
    assert not (tmp_path / "b.beton").exists()


def test_impossible_options(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workers 0"):
        add_masks(source, tmp_path / "b.beton", workers=0)
    with pytest.raises(InputError, match="does not exist"):
        add_masks(tmp_path / "absent.beton", tmp_path / "b.beton")
    assert json.loads(beton.manifest_path(source).read_text()).get("masks") is None
