"""The dali engine on the CPU: crops as PIL makes them, one bad image costs itself alone, memory that stays put.

What a CUDA device changes (nvJPEG's rounding, streams) is in the last test, which needs one.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from functools import partial
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pipelines.engines import dali
from pipelines.engines.decode import decode_sample
from pipelines.errors import MissingExtraError, RunError
from pipelines.pool import Pool
from pipelines.views import ViewSpec
from tests.pipelines.engines.test_ffcv_engine import (
    BICUBIC,
    COUNT,
    CPU,
    PADDED,
    PLAN,
    Changed,
    assert_damage_is_replaced,
    damaged_streams,
    differences,
    drawn,
    make_crops,
    real_images,
    refuse,
    write_images,
)

needs_dali = pytest.mark.dali


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    with write_images(tmp_path_factory.mktemp("dali") / "jpeg.beton") as files:
        yield files


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    with write_images(tmp_path_factory.mktemp("dali") / "raw.beton", raw=range(COUNT)) as files:
        yield files


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    with write_images(tmp_path_factory.mktemp("dali") / "mixed.beton", raw=(0, 1, 5, 8)) as files:
        yield files


@pytest.fixture
def engine(jpegs):
    pool = Pool(2)
    engine = dali.Engine(jpegs, device=CPU, pool=pool)
    yield engine
    engine.close()
    pool.close()


# -- crops


def inside(difference):
    """Without the two outermost pixels, where DALI's filter goes on over the edge of the box and PIL's stops."""
    return difference[..., 2:-2, 2:-2, :]


@needs_dali
@pytest.mark.parametrize("stored", ["jpegs", "pages", "mixed"])
def test_crops_are_pils(stored, request):
    files = request.getfixturevalue(stored)
    for difference in differences("dali", files, range(COUNT), PLAN):
        assert inside(difference).max() <= 1
        assert difference.mean() <= 0.25
        assert (difference > 1).mean() <= 0.05
    for difference in differences("dali", files, range(COUNT), BICUBIC):
        assert difference.mean() <= 0.25
        assert (inside(difference) > 1).mean() <= 0.002
        assert (difference > 1).mean() <= 0.05


@needs_dali
@pytest.mark.parametrize("stored", ["jpegs", "pages", "mixed"])
def test_padded_crops_are_pils_to_the_bit(stored, request):
    assert differences("dali", request.getfixturevalue(stored), range(COUNT), PADDED)[0].max() == 0


@needs_dali
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_without_antialiasing_are_those_of_the_other_engines(pages, interpolation):
    """The same kernel; at the edge DALI repeats pixels, and the others leave out what is beyond it."""
    ids, plain, smooth = (
        range(COUNT),
        *(
            [ViewSpec("a", 20, count=3, box={"byol": {}}, flip=0.5, interpolation=interpolation, antialias=antialias)]
            for antialias in (False, True)
        ),
    )
    (found,), (theirs,) = make_crops("dali", pages, ids, plain), make_crops("torchvision", pages, ids, plain)
    difference = np.abs(found - theirs)
    assert inside(difference).max() <= 1
    assert difference.mean() <= 0.1
    assert np.abs(make_crops("dali", pages, ids, smooth)[0] - found).mean() > 1


@needs_dali
def test_a_square_that_is_nowhere_is_an_error_and_not_black(jpegs):
    for plan, offset in ((PADDED, (-56, 0)), (PLAN, (-1, 0))):
        params = drawn(jpegs, [0, 1], plan)
        params[0].offset[0, 1] = offset
        with pytest.raises(ValueError, match="square"):
            make_crops("dali", jpegs, [0, 1], params=params)


@needs_dali
@pytest.mark.parametrize(("interpolation", "above"), [("bilinear", 0.002), ("bicubic", 0.001)])
def test_parity_on_real_images(imagenet_folder, tmp_path, interpolation, above):
    plan = [ViewSpec("a", 224, flip=0.5, interpolation=interpolation)]
    with real_images(imagenet_folder, tmp_path / "real.beton") as files:
        (difference,) = differences("dali", files, range(len(files)), plan)
    assert difference.mean() <= 0.25
    assert (difference > 1).mean() <= above


@needs_dali
def test_the_orientation_in_a_stream_is_ignored_as_everywhere(jpegs):
    stream = jpegs.payload(2).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    segment = exif.tobytes()
    turned = Changed(
        jpegs, {2: stream[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + stream[2:]}
    )
    assert ImageOps.exif_transpose(Image.open(BytesIO(turned.payload(2)))).getpixel((0, 0)) != Image.open(
        BytesIO(stream)
    ).getpixel((0, 0))
    assert (decode_sample(turned, 2) == decode_sample(jpegs, 2)).all()
    for a, b in zip(make_crops("dali", turned, [1, 2]), make_crops("dali", jpegs, [1, 2]), strict=True):
        assert (a == b).all()


@needs_dali
def test_crops_do_not_depend_on_batch_or_threads(mixed):
    whole = make_crops("dali", mixed, range(COUNT))
    one_thread = make_crops("dali", mixed, range(COUNT), workers=1)
    for some in ([7, 2, 5, 0], [3], [8]):
        for a, b, c in zip(whole, one_thread, make_crops("dali", mixed, some, workers=3), strict=True):
            assert (a == b).all()
            assert (a[:, some] == c).all()


@needs_dali
def test_batches_may_shrink_and_grow_and_plans_may_change(engine, jpegs, caplog):
    for ids, plan in (([1, 2, 3], PLAN), ([4], PLAN), (range(COUNT), PLAN), ([5, 6], BICUBIC), ([7, 8], PLAN)):
        made = engine.crops(np.asarray(ids), drawn(jpegs, ids, plan), refuse)
        assert [tuple(crop.shape) for crop in made] == [(s.count, len(ids), s.size, s.size, 3) for s in plan]
        for crop, expected in zip(made, make_crops("dali", jpegs, ids, plan), strict=True):
            assert (crop.numpy() == expected).all()
        assert len(engine._pipelines) == 1
    assert not caplog.records


@needs_dali
def test_each_image_is_decoded_once_for_all_its_views(engine, jpegs, monkeypatch):
    streams, decoders = [], []
    decoder = engine._dali.fn.decoders.image
    monkeypatch.setattr(
        engine._dali.fn.decoders, "image", lambda *given, **options: decoders.append(1) or decoder(*given, **options)
    )

    def no_other_decoder(files, index):
        raise AssertionError("torchvision decoded a sound JPEG")

    monkeypatch.setattr(dali, "decode_sample", no_other_decoder)
    build = dali._build

    def watched(*arguments):
        pipeline = build(*arguments)
        run = pipeline.run
        pipeline.run = lambda **inputs: streams.append(len(inputs["images"])) or run(**inputs)
        return pipeline

    monkeypatch.setattr(dali, "_build", watched)
    for _ in range(2):
        engine.crops(np.arange(COUNT), drawn(jpegs, range(COUNT)), refuse)
    assert decoders == [1]
    assert streams == [COUNT, COUNT]


@needs_dali
def test_rows_are_finished_once_each_from_crops_that_are_there(engine, jpegs):
    rows = []

    def finish(crops, start, stop):
        rows.extend((row, crops[0][0, row].clone()) for row in range(start, stop))

    made = engine.crops(np.arange(COUNT), drawn(jpegs, range(COUNT)), refuse, finish)
    assert sorted(row for row, _ in rows) == list(range(COUNT))
    for row, crop in rows:
        assert torch.equal(crop, made[0][0, row])


# -- memory and threads


@needs_dali
def test_crops_stay_as_they_are_when_the_engine_goes_on_and_away(engine, jpegs):
    """One view of a kind is DALI's own memory, which its other execution models would overwrite."""
    held = []
    for round_ in range(6):
        ids = (np.arange(5 - round_ % 2) + round_) % COUNT
        crops = engine.crops(ids, drawn(jpegs, ids), refuse)
        held.append((crops, [crop.clone() for crop in crops]))
    engine.close()
    for crops, copies in held:
        for crop, copy in zip(crops, copies, strict=True):
            assert torch.equal(crop, copy)


@needs_dali
def test_two_threads_may_ask_at_the_same_time(engine, jpegs, monkeypatch):
    """As the threads of a loader do that prepare two batches. DALI sees one batch at a time."""
    expected = make_crops("dali", jpegs, range(COUNT))
    inside, crowded, wrong = [], [], []
    build = dali._build

    def watched(*arguments):
        pipeline = build(*arguments)
        run = pipeline.run

        def one_at_a_time(**inputs):
            inside.append(1)
            crowded.append(len(inside) > 1)
            try:
                return run(**inputs)  # releases the GIL: another thread would get in here
            finally:
                inside.pop()

        pipeline.run = one_at_a_time
        return pipeline

    monkeypatch.setattr(dali, "_build", watched)

    def ask(ids):
        for _ in range(10):
            for a, b in zip(engine.crops(ids, drawn(jpegs, ids), refuse), expected, strict=True):
                wrong.append((a.numpy() != b[:, ids]).any())

    threads = [threading.Thread(target=ask, args=(ids,)) for ids in (np.arange(6), np.arange(3, COUNT))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 60
    assert not any(wrong)
    assert not any(crowded)


@needs_dali
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts the threads that the kernel lists")
def test_close_ends_dalis_threads(jpegs):
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    def threads_of_an_engine() -> int:
        pool = Pool(2)
        engine = dali.Engine(jpegs, device=CPU, pool=pool)
        engine.crops(np.arange(2), drawn(jpegs, [0, 1]), refuse)
        running = threads()
        engine.close()
        pool.close()
        return running

    threads_of_an_engine()  # leaves what stays for good after the first time
    before = threads()
    assert threads_of_an_engine() > before
    for _ in range(100_000):  # a thread that has been joined is listed for a moment longer
        if threads() <= before:
            break
        os.sched_yield()
    assert threads() <= before


# -- damage


@needs_dali
def test_damaged_samples_are_replaced_and_named(jpegs, monkeypatch):
    """They are recognised before DALI sees them: every run of it goes well."""
    monkeypatch.setattr(dali.Engine, "_decode", None)
    assert_damage_is_replaced("dali", jpegs, Changed(jpegs, damaged_streams(jpegs)))


@needs_dali
def test_damage_that_only_dali_notices_costs_those_samples_not_the_batch(jpegs, caplog, monkeypatch):
    """The batch fails as a whole; torchvision finds who it was, and the engine goes on."""
    monkeypatch.setattr(dali.Engine, "_looks_whole", lambda *_: True)
    assert_damage_is_replaced("dali", jpegs, Changed(jpegs, damaged_streams(jpegs)))
    assert not caplog.records


@needs_dali
def test_damage_is_counted_once_when_dali_fails_on_the_replacement(jpegs, monkeypatch):
    """Some samples are replaced before DALI sees them, then torchvision decodes what replaced them."""
    failing(monkeypatch, encoded_only=True)
    assert_damage_is_replaced("dali", jpegs, Changed(jpegs, damaged_streams(jpegs)))


def use_the_last(files, params, asked, row, error):
    """A `replace` that takes the last sample and notes who asked."""
    asked.append(row)
    for mine, theirs in zip(params, drawn(files, [COUNT - 1]), strict=True):
        mine.replace_row(row, theirs)
    return COUNT - 1


@needs_dali
def test_after_a_failed_batch_the_next_ones_are_sound(jpegs, monkeypatch):
    monkeypatch.setattr(dali.Engine, "_looks_whole", lambda *_: True)
    expected = make_crops("dali", jpegs, range(COUNT))
    pool = Pool(2)
    engine = dali.Engine(Changed(jpegs, {4: jpegs.payload(4)[:200].tobytes()}), device=CPU, pool=pool)
    others = np.array([0, 1, 2, 3, 5])
    for ids, bad in ((others, []), (np.array([3, 4]), [1]), (others, [])):
        params, asked = drawn(jpegs, ids), []
        made = engine.crops(ids, params, partial(use_the_last, jpegs, params, asked))
        assert asked == bad
        assert (True in engine._pipelines) is not bool(bad)  # the one that failed is not used again
        for a, b in zip(made, expected, strict=True):
            assert (a.numpy() == b[:, np.where(ids == 4, COUNT - 1, ids)]).all()
    engine.close()
    pool.close()


def failing(monkeypatch, *, encoded_only):
    """DALI fails on whatever it is given, or on streams."""
    build = dali._build

    def broken(module, encoded, *rest):
        pipeline = build(module, encoded, *rest)
        if encoded or not encoded_only:

            def run(**inputs):
                raise RuntimeError("Critical error in pipeline:\nError in operator\nencountered:\n\nout of memory\n")

            pipeline.run = run
        return pipeline

    monkeypatch.setattr(dali, "_build", broken)


@needs_dali
def test_a_failure_without_a_damaged_image_is_reported_and_worked_around(jpegs, monkeypatch, caplog):
    expected = make_crops("dali", jpegs, range(COUNT))
    failing(monkeypatch, encoded_only=True)
    with caplog.at_level(logging.WARNING):
        made = make_crops("dali", jpegs, range(COUNT))
    for a, b in zip(made, expected, strict=True):
        assert (a == b).all()
    (record,) = caplog.records
    assert "out of memory; torchvision decoded this batch instead" in record.getMessage()


@needs_dali
def test_a_failure_on_plain_pixels_stops_with_dalis_reason(jpegs, monkeypatch):
    failing(monkeypatch, encoded_only=False)
    with pytest.raises(RunError, match=f"DALI failed on a batch of {COUNT} images: out of memory"):
        make_crops("dali", jpegs, range(COUNT))


# -- what is installed


def test_without_dali_the_error_names_both_wheels(jpegs, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    words = r"'nvidia\.dali'.*relssl\[dali\].*nvidia-dali-cuda120.*CUDA 12.*nvidia-dali-cuda130.*CUDA 13"
    with pytest.raises(MissingExtraError, match=words):
        dali.Engine(jpegs, device=CPU, pool=None)


# -- on a CUDA device


@needs_dali
@pytest.mark.gpu
def test_on_cuda_crops_are_near_those_of_the_cpu_and_complete_on_every_stream(mixed):
    pool = Pool(2)
    engine = dali.Engine(mixed, device=torch.device("cuda"), pool=pool)
    made = engine.crops(np.arange(COUNT), drawn(mixed, range(COUNT)), refuse)
    assert all(crop.device.type == "cuda" for crop in made)
    with torch.cuda.stream(torch.cuda.Stream()):
        copies = [crop.cpu().numpy().astype(int) for crop in made]
    for crop, expected in zip(copies, make_crops("dali", mixed, range(COUNT)), strict=True):
        assert np.abs(crop - expected).mean() <= 1.6
    engine.close()
    pool.close()
