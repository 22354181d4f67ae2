"""What the data path promises, shown for every engine: one decode an image and epoch, the same views however the work
is divided, and nothing that grows.

The data is shared with `test_faults`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import beton
from pipelines.engines import dali, decode, ffcv
from pipelines.loader import ViewLoader
from pipelines.views import ViewSpec
from tests.pipelines.test_crop import smooth_images
from tests.pipelines.test_loader import ENGINES

SIDE, COUNT = 64, 22
CROP = {"random_resized": {"scale": [0.2, 1.0]}}
JITTER = ["jitter", 0.8, {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}]
STRONG = [JITTER, ["grey", 0.2], ["blur", 0.5, {"sigma": [0.1, 2.0]}], ["solarise", 0.3, {"threshold": 0.5}]]
AFFINE = {"degrees": 18, "translate": 0.1, "scale": [0.9, 1.1], "shear": 10}
WARPED = [["randaugment", 0.8], ["affine", 0.5, AFFINE], ["erase", 0.5]]
BYOL = [
    ["jitter_byol", 0.8, {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}],
    ["blur", 0.5, {"sigma": [0.1, 2.0], "kernel": "byol"}],
]
ONE = [ViewSpec("teacher", 32, box=CROP, flip=0.5)]
MANY = [
    ViewSpec("teacher", 32, count=2, box=CROP, flip=0.5, ops=STRONG),
    ViewSpec("student", 24, count=3, box=CROP, flip=0.5, ops=STRONG[:2], interpolation="bicubic"),
    ViewSpec("whole", 16, box={"center": {"resize": 20}}),
    ViewSpec("large", 40, box={"byol": {}}, flip=0.5, ops=BYOL, interpolation="bicubic", antialias=False),
    ViewSpec("padded", 60, box={"pad_crop": {"padding": 6}}, flip=0.5, ops=WARPED),
]


def jpeg(image, **options):
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", **{"quality": 92, **options})
    return buffer.getvalue()


def pictures(count=COUNT):
    """Every other one is less high."""
    images = smooth_images(count, SIDE, SIDE)
    return [np.ascontiguousarray(image[: SIDE - 10 * (i % 2)]) for i, image in enumerate(images)]


def samples(stored, count=COUNT):
    """(image, label) pairs; labels are sample ids."""
    return [(jpeg(image) if stored == "jpeg" else image, i) for i, image in enumerate(pictures(count))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`jpeg.beton` and `raw.beton`, each with its manifest."""
    folder = tmp_path_factory.mktemp("proofs")
    for stored in ("jpeg", "raw"):
        beton.write(folder / f"{stored}.beton", samples(stored))
    return folder


def views_of(batch, row):
    return [view[row] for views in batch.views.values() for view in views]


def by_sample(batches):
    """sample id -> its views; each sample's label is its id."""
    found = {}
    for batch in batches:
        for row, index in enumerate(batch.index.tolist()):
            assert batch.label[row] == index
            found[index] = views_of(batch, row)
    return found


def assert_same(some, reference):
    """Bit for bit."""
    assert some
    for index, views in some.items():
        for a, b in zip(views, reference[index], strict=True):
            assert torch.equal(a, b)


# -- one decode


@pytest.fixture
def decodes(monkeypatch):
    """Streams that any decoder was given, and how often: torchvision's, FFCV's and DALI's are watched."""
    seen = Counter()
    torchvision_decode = decode.decode_jpeg

    def watched_decode(stream, **options):
        seen[stream.numpy().tobytes()] += 1
        return torchvision_decode(stream, **options)

    load = ffcv.load_library

    def watched_library():
        library = load()
        imdecode = library.imdecode

        def watched(address, size, *rest):
            seen[ctypes.string_at(address, size)] += 1
            return imdecode(address, size, *rest)

        return type("Library", (), {"imdecode": staticmethod(watched), "resize": library.resize})

    build = dali._build

    def watched_build(module, *rest):
        """What goes into a pipeline is decoded once per decoder in it."""
        decoders, image = [], module.fn.decoders.image
        with monkeypatch.context() as patch:
            patch.setattr(module.fn.decoders, "image", lambda *a, **b: decoders.append(1) or image(*a, **b))
            pipeline = build(module, *rest)
        run = pipeline.run

        def watched(**inputs):
            for stream in inputs["images"]:
                seen[np.asarray(stream).tobytes()] += len(decoders)
            return run(**inputs)

        pipeline.run = watched
        return pipeline

    monkeypatch.setattr(decode, "decode_jpeg", watched_decode)
    monkeypatch.setattr(ffcv, "load_library", watched_library)
    monkeypatch.setattr(dali, "_build", watched_build)
    return seen


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("plan", "shares"), [(ONE, 1), (MANY, 1), (MANY, 2)], ids=["one view", "seven", "seven, shared"]
)
def test_an_image_is_decoded_once_an_epoch_whatever_the_plan(folder, engine, plan, shares, decodes):
    streams = [stream for stream, _ in samples("jpeg")]
    options = {"global_batch": 8, "num_micro": shares, "drop_last": False, "engine": engine, "workers": 2}
    with ViewLoader(folder / "jpeg.beton", [(None, plan)], **options) as loader:
        for epoch in range(3):
            loader.set_position(epoch)
            seen = [index for batch in loader for index in batch.index.tolist()]
            assert sorted(seen) == list(range(COUNT))
            times = 1 if engine == "resident" else epoch + 1  # in memory after the first, and only, time
            assert decodes == dict.fromkeys(streams, times)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stored", ["jpeg", "raw"])
def test_an_image_is_read_once_an_epoch(folder, engine, stored, monkeypatch):
    reads = Counter()
    read = beton.Beton.read

    def watched(self, i):
        reads[i] += 1
        return read(self, i)

    monkeypatch.setattr(beton.Beton, "read", watched)
    with ViewLoader(
        folder / f"{stored}.beton", [(None, MANY)], global_batch=8, drop_last=False, engine=engine, workers=2
    ) as loader:
        for epoch in range(2):
            loader.set_position(epoch)
            for _ in loader:
                pass
            assert reads == dict.fromkeys(range(COUNT), 1 if engine == "resident" else epoch + 1)


# -- the same views


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stored", ["jpeg", "raw"])
def test_views_are_the_same_bits_however_the_work_is_divided(folder, engine, stored):
    path = folder / f"{stored}.beton"

    def epoch(*, at=(1, 0), **options):
        options = {"global_batch": COUNT, "drop_last": False, "engine": engine, "workers": 2, **options}
        with ViewLoader(path, [(None, MANY)], **options) as loader:
            loader.set_position(*at)
            return by_sample(loader)

    reference = epoch()
    assert sorted(reference) == list(range(COUNT))
    for options in (
        {"workers": 1},
        {"workers": 40},  # more than there are cores, and than images
        {"global_batch": 8},
        {"global_batch": 5, "workers": 3},
        {"global_batch": 8, "num_micro": 2},
        {"global_batch": 12, "num_micro": 3, "workers": 1},
        {"shuffle": False, "global_batch": 7},
    ):
        found = epoch(**options)
        assert len(found) == COUNT
        assert_same(found, reference)
    for world in (2, 3):
        parts = [epoch(global_batch=4 * world, rank=rank, world_size=world) for rank in range(world)]
        assert sorted(i for part in parts for i in part) == list(range(COUNT))
        for part in parts:
            assert_same(part, reference)
    first = epoch(global_batch=6)
    for update, left in ((1, 16), (3, 4)):
        resumed = epoch(global_batch=6, at=(1, update))
        assert set(resumed) == set(list(first)[-left:])  # in the order of the first
        assert_same(resumed, reference)
    for other in (epoch(at=(0, 0)), epoch(seed=1)):
        assert not torch.equal(other[3][0], reference[3][0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stored", ["jpeg", "raw"])
def test_loaders_and_iterators_that_run_at_once_do_not_mix(folder, engine, stored):
    """Two loaders on the same open file, and two iterators of each: one for every epoch."""
    options = {"global_batch": 5, "drop_last": False, "engine": engine, "workers": 2}
    alone = {}
    for seed, plan in ((0, MANY), (1, ONE)):
        with ViewLoader(folder / f"{stored}.beton", [(None, plan)], seed=seed, **options) as loader:
            for epoch in range(2):
                loader.set_position(epoch)
                alone[seed, epoch] = by_sample(loader)
    with (
        beton.open(folder / f"{stored}.beton") as files,
        ViewLoader(files, [(None, MANY)], seed=0, **options) as a,
        ViewLoader(files, [(None, ONE)], seed=1, **options) as b,
    ):
        running = {}
        for seed, loader in enumerate((a, b)):
            for epoch in range(2):
                loader.set_position(epoch)
                running[seed, epoch] = iter(loader)
        loader.set_position(1, 3)  # what runs is not moved
        together = {key: [] for key in running}
        for batches in zip(*running.values(), strict=True):
            for key, batch in zip(running, batches, strict=True):
                together[key].append(batch)
    for key, batches in together.items():
        found = by_sample(batches)
        assert sorted(found) == list(range(COUNT))
        assert_same(found, alone[key])


# -- nothing grows


def usage():
    """Threads, open files, and bytes of resident memory of this process, as the kernel counts them."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE")


LARGE = [ViewSpec("teacher", 96, count=2, box=CROP), ViewSpec("student", 96, box=CROP, ops=STRONG[:1])]
BATCH_BYTES = 6 * 3 * 96 * 96 * 3 * 4  # of one batch of 6 images: 2 MB
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts what the kernel lists in /proc")


def grown(action, times, warm_up):
    """Threads, files and bytes that came in `times` runs of `action` after a few that are not counted."""
    for _ in range(warm_up):
        action()
    before = usage()
    for _ in range(times):
        action()
    return tuple(after - first for after, first in zip(usage(), before, strict=True))


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_grows_over_200_broken_off_epochs(folder, engine):
    with ViewLoader(
        folder / "jpeg.beton", [(None, LARGE)], global_batch=6, engine=engine, workers=2, drop_last=False
    ) as loader:

        def broken_off():
            for _ in loader:
                break

        threads, files, memory = grown(broken_off, 200, 20)
    assert threads <= 0
    assert files <= 0
    assert memory < 10 * BATCH_BYTES  # a batch an epoch would be 200


@needs_proc
@pytest.mark.parametrize(
    ("engine", "closed"),
    [
        pytest.param("torchvision", True, id="torchvision-closed"),
        pytest.param("torchvision", False, id="torchvision-dropped", marks=pytest.mark.slow),
        pytest.param("resident", True, id="resident-closed", marks=pytest.mark.slow),
        pytest.param("resident", False, id="resident-dropped", marks=pytest.mark.slow),
        pytest.param("ffcv", True, id="ffcv-closed", marks=[pytest.mark.slow, pytest.mark.ffcv]),
        pytest.param("dali", True, id="dali-closed", marks=[pytest.mark.slow, pytest.mark.dali]),
        pytest.param("dali", False, id="dali-dropped", marks=[pytest.mark.slow, pytest.mark.dali]),
    ],
)
def test_nothing_grows_over_30_loaders(folder, engine, closed):
    def one_loader():
        loader = ViewLoader(
            folder / "jpeg.beton", [(None, LARGE)], global_batch=6, engine=engine, workers=2, drop_last=False
        )
        batches = iter(loader)
        kept = [next(batches), next(batches)]
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("relssl")]
        if closed:
            loader.close()
            assert not any(thread.is_alive() for thread in threads)
        del loader, batches, kept
        for thread in threads:  # those of a loader that was dropped end a moment later, by themselves
            thread.join(20)
            assert not thread.is_alive()

    threads, files, memory = grown(one_loader, 30, 5)
    assert threads <= 0
    assert files <= 0
    assert memory < 30 * BATCH_BYTES  # a loader that leaves its memory behind leaves six batches, thirty times
