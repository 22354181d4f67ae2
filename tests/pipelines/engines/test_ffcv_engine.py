"""The ffcv engine: crops as PIL makes them, one decode an image, damage replaced.

The first part, data and comparisons, is shared with the tests of the other engines.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from pipelines import beton
from pipelines.draw import draw
from pipelines.engines import decode, engine_class, ffcv
from pipelines.errors import ConfigError, InputError, MissingExtraError
from pipelines.pool import Pool
from pipelines.views import ViewSpec

needs_ffcv = pytest.mark.ffcv

PLAN = [
    ViewSpec("large", 48, count=2, flip=0.5),
    ViewSpec("small", 20, flip=0.5),
    ViewSpec("centre", 32, box={"center": {"resize": 36}}, flip=0.5),
]
PADDED = [ViewSpec("padded", 56, count=4, box={"pad_crop": {"padding": 9}}, flip=0.5), ViewSpec("small", 20)]
BICUBIC = [ViewSpec("large", 48, count=2, flip=0.5, interpolation="bicubic"), ViewSpec("small", 20)]
RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
CPU = torch.device("cpu")
COUNT = 10


# -- shared with the tests of other engines


@functools.cache
def photographs():
    """scikit-learn's two, (427, 640, 3)."""
    return [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]


def picture(height, width, seed):
    """A window of a photograph, another one for every seed."""
    rng = np.random.default_rng(seed)
    photograph = photographs()[seed % 2]
    top, left = (
        int(rng.integers(0, room - side)) for room, side in zip(photograph.shape, (height, width), strict=False)
    )
    return photograph[top : top + height, left : left + width].copy()


def jpeg(image, **options):
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", **{"quality": 95, "subsampling": 0, **options})
    return buffer.getvalue()


def write_images(path, *, count=COUNT, raw=()):
    """A `.beton` of JPEGs of two sizes; samples in `raw` are stored as pixels."""
    images = [picture(72, 60, i) if i % 2 else picture(50, 90, i) for i in range(count)]
    samples = [(image if i in raw else jpeg(image), i) for i, image in enumerate(images)]
    beton.write(path, samples, count=count)
    return beton.open(path)


class Changed:
    """A data set in which some payloads are others; an exception in their place is raised."""

    def __init__(self, files, payloads):
        self.files, self.payloads = files, payloads
        self.heights, self.widths, self.is_jpeg, self.labels = files.heights, files.widths, files.is_jpeg, files.labels

    def __len__(self):
        return len(self.files)

    def locate(self, index):
        return self.files.locate(index)

    def payload(self, index):
        changed = self.payloads.get(index)
        if isinstance(changed, Exception):
            raise changed
        return self.files.payload(index) if changed is None else np.frombuffer(changed, np.uint8)


def drawn(files, ids, plan=PLAN):
    ids = np.asarray(ids)
    return draw(plan, seed=1, epoch=0, index=ids, heights=files.heights[ids], widths=files.widths[ids])


def refuse(row, error):
    raise error


def make_crops(name, files, ids, plan=PLAN, *, workers=2, replace=refuse, params=None, resize="antialias"):
    """Crops of a fresh engine, an array (V, B, S, S, 3) of ints per spec."""
    pool = Pool(workers)
    engine = engine_class(name)(files, device=CPU, pool=pool, resize=resize)
    try:
        params = drawn(files, ids, plan) if params is None else params
        return [crop.numpy().astype(int) for crop in engine.crops(np.asarray(ids), params, replace)]
    finally:
        engine.close()
        pool.close()


def pil_crops(images, params):
    """The same crops by PIL from (H, W, 3) arrays."""
    out = np.empty((*params.flip.shape, params.size, params.size, 3), int)
    for v, row in np.ndindex(params.flip.shape):
        top, left, height, width = params.box[v, row].tolist()
        rows, columns = params.resized[v, row].tolist()
        y, x = params.offset[v, row].tolist()
        crop = Image.fromarray(images[row][top : top + height, left : left + width])
        crop = crop.resize((columns, rows), RESAMPLE[params.interpolation])
        crop = np.array(crop.crop((x, y, x + params.size, y + params.size)))  # black where it leaves the image
        out[v, row] = crop[:, ::-1] if params.flip[v, row] else crop
    return out


def differences(name, files, ids, plan):
    """Per spec: absolute differences between an engine's crops and PIL's of PIL's pixels."""
    images = [np.array(files.decode(i)) for i in ids]
    made = make_crops(name, files, ids, plan)
    return [np.abs(pil_crops(images, p) - crop) for p, crop in zip(drawn(files, ids, plan), made, strict=True)]


def damaged_streams(files):
    """Sample -> a payload that is no image of the expected size, one for every way to be damaged."""
    stream = {i: files.payload(i).tobytes() for i in range(len(files))}
    return {
        1: b"\x00" * len(stream[1]),
        2: stream[2][: len(stream[2]) // 2],
        3: stream[3][:-2],  # the end marker is missing
        4: b"",
        5: stream[6],  # of another size
        6: jpeg(picture(100, 180, 50), quality=30),  # twice as high and wide as expected
        7: jpeg(picture(36, 30, 51)),  # half as high and wide
    }


def assert_damage_is_replaced(name, files, damaged, monkeypatch=None):
    """The next readable sample takes the place of a damaged one, is drawn for, and nothing else changes."""
    ids = np.arange(len(files))
    params = drawn(files, ids)
    errors = {}

    def replace(row, error):
        errors.setdefault(row, []).append(str(error))
        other = (row + len(errors[row])) % len(files)
        for mine, theirs in zip(params, drawn(files, [other]), strict=True):
            mine.replace_row(row, theirs)
        return other

    given = ids.copy()
    made = make_crops(name, damaged, given, replace=replace, params=params)
    assert (given == ids).all()
    used = [next(i % len(files) for i in range(row, row + 99) if i % len(files) not in damaged.payloads) for row in ids]
    assert {row: len(e) for row, e in errors.items()} == {r: (used[r] - r) % len(files) for r in damaged.payloads}
    path = files.files[0].path
    for row, messages in errors.items():
        for attempt, message in enumerate(messages):
            assert f"sample {row + attempt} of {path}" in message
    for a, b in zip(made, make_crops(name, files, used), strict=True):
        assert (a == b).all()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def jpegs(folder):
    with write_images(folder / "jpeg.beton") as files:
        yield files


@pytest.fixture(scope="session")
def pages(folder):
    with write_images(folder / "raw.beton", raw=range(COUNT)) as files:
        yield files


@pytest.fixture(scope="session")
def mixed(folder):
    with write_images(folder / "mixed.beton", raw=(0, 1, 5, 8)) as files:
        assert files.is_jpeg.tolist().count(False) == 4
        yield files


def real_images(folder, path, count=24):
    """A `.beton` of ImageNet pictures as they were downloaded."""
    pictures = sorted(folder.glob("*.JPEG"))[:: 500 // count][:count]
    beton.write(path, ((picture.read_bytes(), -1) for picture in pictures), count=count)
    return beton.open(path)


# -- crops


@needs_ffcv
@pytest.mark.parametrize("plan", [PLAN, BICUBIC], ids=["bilinear", "bicubic"])
def test_crops_of_jpegs_are_pils_up_to_the_fast_transform(jpegs, plan):
    for difference in differences("ffcv", jpegs, range(COUNT), plan):
        assert difference.mean() <= 1.6
        assert difference.max() <= 24


@needs_ffcv
def test_crops_of_raw_pages_are_pils_to_one_level(pages):
    for difference in differences("ffcv", pages, range(COUNT), PLAN):
        assert difference.max() <= 1
    for difference in differences("ffcv", pages, range(COUNT), BICUBIC):
        assert difference.mean() <= 0.25
        assert (difference > 1).mean() <= 0.001


@needs_ffcv
@pytest.mark.parametrize("plan", [PLAN, BICUBIC], ids=["bilinear", "bicubic"])
def test_the_same_pixels_give_the_torchvision_engines_crops_bit_for_bit(jpegs, pages, mixed, plan, monkeypatch):
    for files in (pages, jpegs, mixed):
        pool = Pool(1)
        decoder = ffcv.Engine(files, device=CPU, pool=pool)
        pool.close()
        monkeypatch.setattr(engine_class("torchvision"), "decode", lambda _, index, d=decoder: d.decode(index))
        theirs = make_crops("torchvision", files, range(COUNT), plan)
        for a, b in zip(make_crops("ffcv", files, range(COUNT), plan), theirs, strict=True):
            assert (a == b).all()


@needs_ffcv
@pytest.mark.parametrize("resize", ["antialias", "area"])
def test_padded_crops_are_the_decoders_pixels_and_black(jpegs, pages, resize):
    for files in (pages, jpegs):
        pool = Pool(1)
        decoder = ffcv.Engine(files, device=CPU, pool=pool)
        pool.close()
        images = [decoder.decode(i).permute(1, 2, 0).numpy() for i in range(COUNT)]
        made = make_crops("ffcv", files, range(COUNT), PADDED, resize=resize)[0]
        assert (made == pil_crops(images, drawn(files, range(COUNT), PADDED)[0])).all()
        assert (made == 0).mean() > 0.1


@needs_ffcv
def test_pixels_are_the_decoders_own_and_laid_out_for_the_resize(jpegs):
    """Not torchvision's, which are exact: otherwise the fast decoder is not in use at all."""
    pool = Pool(1)
    engine = ffcv.Engine(jpegs, device=CPU, pool=pool)
    means = []
    for i in range(COUNT):
        pixels = engine.decode(i)
        assert pixels.permute(1, 2, 0).is_contiguous()
        means.append(float((pixels.int() - decode.decode_sample(jpegs, i).int()).abs().float().mean()))
    pool.close()
    assert min(means) > 0
    assert np.mean(means) <= 1.6


@needs_ffcv
@pytest.mark.parametrize("plan", [PLAN, BICUBIC], ids=["bilinear", "bicubic"])
def test_parity_on_real_images(imagenet_folder, tmp_path, plan):
    plan = [ViewSpec("a", 224, flip=0.5, interpolation=plan[0].interpolation)]
    with real_images(imagenet_folder, tmp_path / "real.beton") as files:
        (difference,) = differences("ffcv", files, range(len(files)), plan)
    assert 0.1 <= difference.mean() <= 1.6


@needs_ffcv
def test_crops_do_not_depend_on_batch_or_threads(mixed):
    whole = make_crops("ffcv", mixed, range(COUNT))
    one_thread = make_crops("ffcv", mixed, range(COUNT), workers=1)
    part = make_crops("ffcv", mixed, [7, 2, 5], workers=3)
    for a, b, c in zip(whole, one_thread, part, strict=True):
        assert (a == b).all()
        assert (a[:, [7, 2, 5]] == c).all()


@needs_ffcv
def test_each_image_is_decoded_once_for_all_its_views(jpegs, monkeypatch):
    calls = []
    load = ffcv.load_library

    def counting():
        library = load()
        imdecode = library.imdecode

        def count(*arguments):
            calls.append(ctypes.string_at(arguments[0], arguments[1]))
            return imdecode(*arguments)

        return type("Library", (), {"imdecode": staticmethod(count), "resize": library.resize})

    def no_other_decoder(files, index):
        raise AssertionError("torchvision decoded a sound JPEG")

    monkeypatch.setattr(ffcv, "load_library", counting)
    monkeypatch.setattr(ffcv, "decode_sample", no_other_decoder)
    make_crops("ffcv", jpegs, range(COUNT))
    assert len(calls) == len(set(calls)) == COUNT


# -- resize: area


@needs_ffcv
def test_area_takes_the_mean_of_whole_pixels(pages):
    """Reduced by two, each pixel is the mean of four: box, offset and mirror are those of the parameters."""
    ids = [0, 1, 2]
    params = drawn(pages, ids, [ViewSpec("a", 16)])
    (view,) = params
    view.box[0], view.resized[0], view.offset[0] = [(4, 6, 40, 44)] * 3, [(20, 22)] * 3, [(1, 5)] * 3
    view.flip[0] = [True, False, True]
    (made,) = make_crops("ffcv", pages, ids, params=params, resize="area")
    for row, index in enumerate(ids):
        box = np.array(pages.decode(index))[4:44, 6:50].astype(float)
        mean = box.reshape(20, 2, 22, 2, 3).mean((1, 3))[1:17, 5:21]
        expected = mean[:, ::-1] if view.flip[0, row] else mean
        assert np.abs(made[0, row] - expected).max() <= 0.5


@needs_ffcv
def test_area_is_opt_in_and_near_the_common_resize(jpegs):
    for area, common in zip(
        make_crops("ffcv", jpegs, range(COUNT), resize="area"), make_crops("ffcv", jpegs, range(COUNT)), strict=True
    ):
        assert 0 < np.abs(area - common).mean() <= 3


def test_area_is_ffcvs_alone():
    spec = ViewSpec("student", 16)
    ffcv.Engine.check(spec, "area")
    for name in ("torchvision", "resident", "dali"):
        engine_class(name).check(spec, "antialias")
        with pytest.raises(ConfigError, match="area"):
            engine_class(name).check(spec, "area")
    bicubic = ViewSpec("student", 16, interpolation="bicubic")
    ffcv.Engine.check(bicubic, "antialias")
    with pytest.raises(ConfigError, match=r"'student'.*area.*bicubic"):
        ffcv.Engine.check(bicubic, "area")
    plain = ViewSpec("student", 16, antialias=False)
    ffcv.Engine.check(plain, "antialias")
    with pytest.raises(ConfigError, match=r"'student'.*area.*antialias: false"):
        ffcv.Engine.check(plain, "area")
    with pytest.raises(ConfigError, match="did you mean 'area'"):
        ffcv.Engine.check(spec, "aera")


# -- damage


@needs_ffcv
def test_damaged_samples_are_replaced_and_named(jpegs):
    damaged = Changed(jpegs, damaged_streams(jpegs))
    assert_damage_is_replaced("ffcv", jpegs, damaged)


@needs_ffcv
def test_a_file_cut_while_open_costs_samples_not_the_process(pages):
    """What `payload` raises of itself is an unreadable sample like another."""
    cut = InputError(f"sample 9 of {pages.files[0].path}: cut off since it was opened")
    assert_damage_is_replaced("ffcv", pages, Changed(pages, {9: cut}))


@needs_ffcv
def test_a_stream_with_a_harmless_fault_is_readable_as_for_the_other_engines(jpegs):
    """Stray bytes before the end marker: libjpeg warns, FFCV's decoder returns -1, PIL and torchvision do not mind."""
    stream = jpegs.payload(0).tobytes()
    odd = Changed(jpegs, {0: stream[:-2] + b"\x55" * 7 + stream[-2:]})
    pool = Pool(1)
    engine = ffcv.Engine(odd, device=CPU, pool=pool)
    assert torch.equal(engine.decode(0), decode.decode_sample(jpegs, 0))
    pool.close()


@needs_ffcv
def test_the_decoder_never_writes_outside_its_buffer(jpegs):
    """Facts that the engine relies on: -1 for damage, and within bounds whatever size the stream has."""
    imdecode = ffcv.load_library().imdecode
    guard = 4096
    for index, stream in {0: jpegs.payload(0).tobytes(), **damaged_streams(jpegs)}.items():
        height, width = int(jpegs.heights[index]), int(jpegs.widths[index])
        memory = np.full(height * width * 3 + 2 * guard, 171, np.uint8)
        place = ctypes.c_void_p(memory.ctypes.data + guard)
        code = imdecode(stream, len(stream), height, width, place, height, width, 0, 0, 1, 1, False, False)
        assert code == (-1 if index in (1, 2, 3, 4) else 0)
        assert (memory[:guard] == 171).all()
        assert (memory[-guard:] == 171).all()


# -- what is installed


def test_without_ffcv_the_error_says_what_to_install(jpegs, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = r"apt-get install g\+\+ pkg-config libopencv-dev libturbojpeg0-dev.*pip install relssl\[ffcv\]"
    with pytest.raises(MissingExtraError, match=words):
        ffcv.Engine(jpegs, device=CPU, pool=None)


def test_a_library_that_does_not_load_is_named(tmp_path, monkeypatch):
    (tmp_path / "ffcv").mkdir()
    (tmp_path / "ffcv" / "__init__.py").write_text("raise RuntimeError('the package itself is not needed')")
    (tmp_path / "ffcv" / "_libffcv.so").write_bytes(b"not a library")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "ffcv", raising=False)
    with pytest.raises(MissingExtraError, match=r"_libffcv\.so.*libopencv-dev"):
        ffcv.load_library()


UNTOUCHED = """
import os, sys, threading
import numba, torch
from pipelines.engines import ffcv
before = dict(os.environ), torch.get_num_threads(), numba.get_num_threads(), threading.active_count()
ffcv.load_library()
assert before == (dict(os.environ), torch.get_num_threads(), numba.get_num_threads(), threading.active_count())
assert not {"ffcv", "cv2"} & set(sys.modules)
"""


@needs_ffcv
@pytest.mark.slow
def test_the_package_is_not_imported_and_the_process_is_left_as_it_was():
    done = subprocess.run([sys.executable, "-c", UNTOUCHED], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
