"""When data, threads or users misbehave: a clear error or a counted replacement, never a hang, the end of the process,
or another image's pixels.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from pipelines import beton
from pipelines import beton_format as fmt
from pipelines import loader as loader_module
from pipelines.engines import decode
from pipelines.engines import threads as threads_module
from pipelines.errors import InputError, RunError
from pipelines.loader import ViewLoader
from tests.pipelines.test_loader import ENGINES
from tests.pipelines.test_pool import PATIENCE, eventually
from tests.pipelines.test_proofs import COUNT, MANY, ONE, by_sample, pictures, samples, views_of

OPTIONS = {"global_batch": 8, "drop_last": False, "workers": 2, "max_unreadable": 0.5}
THREADED = ["torchvision", pytest.param("ffcv", marks=pytest.mark.ffcv)]
NOT_WRITTEN = "not the bytes that were written for it"
LAZY = [engine for engine in ENGINES if engine != "resident"]  # those that read while they run


def padded(streams):
    """JPEGs made equally long by a comment, so that they can change places in a file."""
    longest = max(len(stream) for stream, _ in streams)
    out = []
    for stream, label in streams:
        room = longest + 10 - len(stream)  # for the segment, marker and length included
        out.append((stream[:2] + b"\xff\xfe" + (room - 2).to_bytes(2, "big") + bytes(room - 4) + stream[2:], label))
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`jpeg.beton` and `raw.beton` of the same pictures, each with its manifest."""
    folder = tmp_path_factory.mktemp("faults")
    beton.write(folder / "jpeg.beton", padded(samples("jpeg")))
    beton.write(folder / "raw.beton", samples("raw"))
    return folder


@pytest.fixture(params=ENGINES)
def engine(request):
    return request.param


@pytest.fixture(scope="module")
def sound_views(folder):
    """(stored, engine) -> sample id -> its views when nothing is wrong."""
    known = {}

    def views(stored, engine):
        if (stored, engine) not in known:
            with ViewLoader(folder / f"{stored}.beton", [(None, MANY)], engine=engine, **OPTIONS) as loader:
                known[stored, engine] = by_sample(loader)
        return known[stored, engine]

    return views


def copied(path, target, *, manifest=True):
    """A copy that may be damaged."""
    shutil.copy(path, target)
    if manifest:
        shutil.copy(beton.manifest_path(path), target)
    return target / path.name


def place_of(path, index):
    """First byte and length of a payload."""
    with beton.Beton(path) as file:
        return int(file.offsets[index]), int(file.sizes[index])


def overwrite(path, position, content):
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def assert_sound(batch, sound, bad=()):
    """Each row has the views and the label of the image that it says it is."""
    for row, index in enumerate(batch.index.tolist()):
        assert index not in bad
        assert batch.label[row] == index
        for a, b in zip(views_of(batch, row), sound[index], strict=True):
            assert torch.equal(a, b)


def assert_replaced(path, bad, engine, sound, caplog, word=""):
    """Over two epochs bad samples do not appear, are counted once and are named; all other views are as they were."""
    with caplog.at_level(logging.WARNING), ViewLoader(path, [(None, MANY)], engine=engine, **OPTIONS) as loader:
        for _ in range(2):
            batches = list(loader)
            assert sum(map(len, batches)) == COUNT
            for batch in batches:
                assert_sound(batch, sound, bad)
        assert loader.num_unreadable == len(bad)
    warnings = [record.getMessage() for record in caplog.records if record.name == "relssl.loader"]
    assert len(warnings) == len(bad)
    for index in bad:
        (warning,) = [text for text in warnings if text.startswith(f"image {index} is replaced by image ")]
        assert f"sample {index}" in warning
        assert str(path) in warning
        assert word in warning


# -- damaged samples

CUT = {
    "in the middle": lambda stream: stream[: len(stream) * 2 // 3],
    "behind the header": lambda stream: stream[: stream.index(b"\xff\xda")],
    "at the end": lambda stream: stream[:-2],
}


@pytest.mark.parametrize("kind", CUT)
def test_streams_that_were_stored_cut_off_are_replaced(sound_views, tmp_path, engine, kind, caplog):
    """They came so, and the manifest has nothing against them."""
    bad, path = (3, 8), tmp_path / "cut.beton"
    beton.write(path, [(CUT[kind](stream) if i in bad else stream, i) for stream, i in padded(samples("jpeg"))])
    assert_replaced(path, bad, engine, sound_views("jpeg", engine), caplog, "")


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "no manifest"])
@pytest.mark.parametrize("content", [b"\x00", b"\xff"], ids=["zeros", "ones"])
def test_streams_that_were_overwritten_are_replaced(folder, sound_views, tmp_path, engine, content, manifest, caplog):
    bad, path = (0, 21), copied(folder / "jpeg.beton", tmp_path, manifest=manifest)
    for index in bad:
        start, size = place_of(path, index)
        overwrite(path, start, content * size)
    assert_replaced(path, bad, engine, sound_views("jpeg", engine), caplog)


@pytest.mark.parametrize("stored", ["jpeg", "raw"])
def test_the_second_half_of_another_image_is_noticed(folder, sound_views, tmp_path, engine, stored, caplog):
    """As a disk does that writes a block to the wrong place: every decoder would take it."""
    path = copied(folder / f"{stored}.beton", tmp_path)
    content = path.read_bytes()
    (from_, size), (to, _) = place_of(path, 3), place_of(path, 5)
    overwrite(path, to + size // 2, content[from_ + size // 2 : from_ + size])
    assert_replaced(path, (5,), engine, sound_views(stored, engine), caplog, NOT_WRITTEN)


@pytest.mark.parametrize("stored", ["jpeg", "raw"])
def test_exchanged_images_are_noticed_where_there_is_a_manifest(folder, sound_views, tmp_path, engine, stored, caplog):
    """Of the same height, width and length: under a wrong label, and perfect otherwise."""
    path = copied(folder / f"{stored}.beton", tmp_path)
    content = path.read_bytes()
    (a, size), (b, same) = place_of(path, 4), place_of(path, 10)
    assert size == same
    overwrite(path, a, content[b : b + size])
    overwrite(path, b, content[a : a + size])
    with beton.open(path) as files:
        assert (files.heights[4], files.widths[4]) == (files.heights[10], files.widths[10])
    assert_replaced(path, (4, 10), engine, sound_views(stored, engine), caplog, NOT_WRITTEN)


def test_exchanged_streams_of_different_size_are_noticed_without_a_manifest(
    folder, sound_views, tmp_path, engine, caplog
):
    path = copied(folder / "jpeg.beton", tmp_path, manifest=False)
    content = path.read_bytes()
    (a, size), (b, _) = place_of(path, 4), place_of(path, 7)
    overwrite(path, a, content[b : b + size])
    overwrite(path, b, content[a : a + size])
    assert_replaced(path, (4, 7), engine, sound_views("jpeg", engine), caplog, "pixels, but the file says")


def test_a_stream_that_claims_to_be_huge_is_not_decoded(folder, sound_views, tmp_path, engine, caplog, monkeypatch):
    """Thirteen gigabytes of pixels: a decoder makes room for what the header says."""
    bad, path = (4, 7), copied(folder / "jpeg.beton", tmp_path, manifest=False)
    huge = b"\xff\xff\xff\xff"
    for index in bad:
        start, size = place_of(path, index)
        stream = path.read_bytes()[start : start + size]
        overwrite(path, start + stream.index(b"\xff\xc0") + 5, huge)
    decode_jpeg = decode.decode_jpeg

    def careful(stream, **options):
        assert huge not in stream.numpy().tobytes()
        return decode_jpeg(stream, **options)

    monkeypatch.setattr(decode, "decode_jpeg", careful)
    assert_replaced(path, bad, engine, sound_views("jpeg", engine), caplog, "(65535, 65535) pixels")


def test_a_sample_of_zero_bytes_is_refused_when_the_file_is_opened(folder, tmp_path):
    path = copied(folder / "jpeg.beton", tmp_path, manifest=False)
    with beton.Beton(path) as file:
        rows = np.frombuffer(file.data[-COUNT * fmt.ALLOCATION.itemsize :], fmt.ALLOCATION).copy()
    rows["size"][6] = 0
    overwrite(path, path.stat().st_size - rows.nbytes, rows.tobytes())
    with pytest.raises(InputError, match=r"jpeg\.beton: sample 6: image of 0 bytes"):
        ViewLoader(path, [(None, ONE)], **OPTIONS)
    with pytest.raises(InputError, match="sample 0: not a JPEG"):
        beton.write(tmp_path / "new.beton", [(b"", 0)])


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_no_search_for_a_replacement_is_endless(folder, tmp_path, engine, share):
    """Not one image can be read; `share` of them may be unreadable."""
    path = copied(folder / "jpeg.beton", tmp_path, manifest=False)
    for index in range(COUNT):
        start, size = place_of(path, index)
        overwrite(path, start, bytes(size))
    options = {**OPTIONS, "max_unreadable": share}
    error, told = (InputError, r"sample \d.* No image may be left out here: run `relssl verify`")
    if share > 0:
        most = {0.05: 2, 1.0: COUNT - 1}[share]
        error, told = RunError, rf"not be read, and at most {most} may be; run `relssl verify` .*sample \d"
    with ViewLoader(path, [(None, ONE)], engine=engine, **options) as loader, pytest.raises(error, match=told):
        next(iter(loader))


# -- the file changes while it is open


@pytest.mark.parametrize("engine", LAZY)
@pytest.mark.parametrize("stored", ["jpeg", "raw"])
def test_a_file_that_is_cut_while_open_costs_the_samples_behind_the_cut(
    folder, sound_views, tmp_path, engine, stored, caplog
):
    path = copied(folder / f"{stored}.beton", tmp_path)
    start, size = place_of(path, COUNT - 4)
    bad = range(COUNT - 4, COUNT)
    with caplog.at_level(logging.WARNING), ViewLoader(path, [(None, MANY)], engine=engine, **OPTIONS) as loader:
        assert_sound(next(iter(loader)), sound_views(stored, engine))
        os.truncate(path, start + size // 2)
        for batch in loader:
            assert_sound(batch, sound_views(stored, engine), bad)
        assert loader.num_unreadable == 4
    assert all("cut off since it was opened: sample" in record.getMessage() for record in caplog.records)


def test_a_file_that_is_cut_while_open_does_not_matter_in_memory(folder, sound_views, tmp_path):
    path = copied(folder / "jpeg.beton", tmp_path)
    with ViewLoader(path, [(None, MANY)], engine="resident", **OPTIONS) as loader:
        os.truncate(path, 0)
        assert sorted(by_sample(loader)) == list(range(COUNT))
        assert loader.num_unreadable == 0


@pytest.mark.parametrize("engine", LAZY)
def test_a_file_that_is_cut_to_nothing_stops_the_run(folder, tmp_path, engine):
    path = copied(folder / "raw.beton", tmp_path)
    with ViewLoader(path, [(None, ONE)], engine=engine, **OPTIONS) as loader:
        os.truncate(path, 0)
        with pytest.raises(RunError, match=r"could not be read, and at most 11 may be.*cut off since it was opened"):
            list(loader)


@pytest.mark.parametrize("engine", LAZY)
def test_a_file_that_is_written_anew_while_open_is_noticed(folder, tmp_path, engine):
    """In place: the same images in another order, so that each would have another one's label."""
    path = copied(folder / "raw.beton", tmp_path)
    other = tmp_path / "other.beton"
    beton.write(other, [(image, i) for i, image in enumerate(pictures()[::-2] + pictures()[-2::-2])])
    with ViewLoader(path, [(None, ONE)], engine=engine, **OPTIONS) as loader:
        overwrite(path, 0, other.read_bytes())
        with pytest.raises(RunError, match=NOT_WRITTEN):
            list(loader)


# -- a worker that raises


def failing_for(index, function):
    """`function(self, i)`, and an unexpected error for one sample."""

    def fails(self, i):
        if i == index:
            raise ZeroDivisionError("nobody expected this")
        return function(self, i)

    return fails


@pytest.mark.parametrize("engine", LAZY)
def test_an_error_that_nobody_expected_names_the_sample(folder, sound_views, engine, monkeypatch):
    """While it is read or decoded; and the loader goes on once the reason is gone."""
    path = folder / "jpeg.beton"
    with ViewLoader(path, [(None, MANY)], engine=engine, **OPTIONS) as loader:
        with monkeypatch.context() as patch:
            patch.setattr(beton.Beton, "payload", failing_for(5, beton.Beton.payload))
            with pytest.raises(RunError, match=r"ZeroDivisionError: nobody expected this") as raised:
                list(loader)
        assert isinstance(raised.value.__cause__, ZeroDivisionError)
        if engine in ("torchvision", "ffcv"):
            assert str(raised.value).startswith(f"sample 5 of {path}: ")
        else:
            assert str(path) in str(raised.value)
        assert sorted(by_sample(loader)) == list(range(COUNT))


@pytest.mark.parametrize("engine", THREADED)
def test_an_error_in_a_crop_names_the_sample(folder, engine, monkeypatch):
    crop_image, failed = threads_module.crop_image, []

    def fails(image, params, row, out):
        if params.size == 16 and not failed:
            failed.append(row)
            raise ZeroDivisionError("crop")
        crop_image(image, params, row, out)

    monkeypatch.setattr(threads_module, "crop_image", fails)
    with ViewLoader(folder / "jpeg.beton", [(None, MANY)], engine=engine, shuffle=False, **OPTIONS) as loader:
        with pytest.raises(RunError, match=r"sample \d+ of .*jpeg\.beton: ZeroDivisionError: crop") as raised:
            list(loader)
        assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_an_error_in_the_colours_names_the_sample(folder, engine, monkeypatch):
    colour = loader_module.colour

    def fails(crops, params, spec, out, start, stop, masks):
        if spec.size == 16 and start <= 3 < stop:
            raise ZeroDivisionError("colour")
        colour(crops, params, spec, out, start, stop, masks)

    monkeypatch.setattr(loader_module, "colour", fails)
    with ViewLoader(folder / "jpeg.beton", [(None, MANY)], engine=engine, shuffle=False, **OPTIONS) as loader:
        with pytest.raises(RunError, match=r"sample \d+ of .*jpeg\.beton.*: ZeroDivisionError: colour") as raised:
            list(loader)
        assert isinstance(raised.value.__cause__, ZeroDivisionError)
    if engine != "resident":  # which makes many images in one go
        assert str(raised.value).startswith("sample 3 of ")


def test_an_error_leaves_no_thread_behind(folder, engine, monkeypatch):
    before = set(threading.enumerate())
    monkeypatch.setattr(loader_module, "colour", None)
    with (
        pytest.raises(RunError, match="'NoneType' object is not callable"),
        ViewLoader(folder / "jpeg.beton", [(None, MANY)], engine=engine, **OPTIONS) as loader,
    ):
        list(loader)
    assert set(threading.enumerate()) <= before


# -- a consumer that does as it likes


def test_batches_of_several_epochs_may_be_kept(folder, sound_views, engine):
    with ViewLoader(folder / "jpeg.beton", [(None, MANY)], engine=engine, **OPTIONS) as loader:
        kept = [batch for _ in range(4) for batch in loader]
    assert len({batch.views["teacher"][0].data_ptr() for batch in kept}) == len(kept)
    for batch in kept:
        assert_sound(batch, sound_views("jpeg", engine))


def test_batches_that_are_kept_now_and_then_are_as_they_were(folder, sound_views, engine):
    """Memory that is free again is used again all the while."""
    with ViewLoader(folder / "jpeg.beton", [(None, MANY)], engine=engine, **OPTIONS) as loader:
        kept = [batch for _ in range(6) for number, batch in enumerate(loader) if number == 1]
    for batch in kept:
        assert_sound(batch, sound_views("jpeg", engine))


def test_a_consumer_that_stops_early_and_starts_again(folder, sound_views, engine):
    with ViewLoader(folder / "jpeg.beton", [(None, MANY)], engine=engine, **OPTIONS) as loader:
        for stop in (0, 1, 2, 1, 0):
            for number, batch in enumerate(loader):
                assert_sound(batch, sound_views("jpeg", engine))
                if number == stop:
                    break
        assert sorted(by_sample(loader)) == list(range(COUNT))


def test_one_loader_is_iterated_by_several_threads(folder, sound_views, engine):
    found, sound = [], sound_views("jpeg", engine)

    def consume():
        found.append(by_sample(loader))

    with ViewLoader(folder / "jpeg.beton", [(None, MANY)], engine=engine, **OPTIONS) as loader:
        consumers = [threading.Thread(target=consume) for _ in range(3)]
        for thread in consumers:
            thread.start()
        for thread in consumers:
            thread.join(PATIENCE)
    assert len(found) == 3
    for views in found:
        assert sorted(views) == list(range(COUNT))
        for index, mine in views.items():
            assert all(torch.equal(a, b) for a, b in zip(mine, sound[index], strict=True))


# -- closing


def test_a_closed_loader_says_so(folder, engine):
    loader = ViewLoader(folder / "jpeg.beton", [(None, ONE)], engine=engine, **OPTIONS)
    untouched, begun = iter(loader), iter(loader)
    kept = next(begun)
    copy = kept.views["teacher"][0].clone()
    loader.close()
    loader.close()
    for attempt in (lambda: iter(loader), lambda: next(untouched), lambda: next(begun)):
        with pytest.raises(RunError, match="the loader is closed"):
            attempt()
    assert torch.equal(kept.views["teacher"][0], copy)


@pytest.mark.parametrize("engine", THREADED)
def test_closing_while_another_thread_waits_for_a_batch(folder, engine, monkeypatch):
    """Neither of them hangs, and the batch ends with the images that are in work."""
    crop_image = threads_module.crop_image
    at_work, release, calls, errors = threading.Event(), threading.Event(), [], []

    def slow(image, params, row, out):
        calls.append(row)
        at_work.set()
        release.wait(PATIENCE)
        crop_image(image, params, row, out)

    def consume():
        try:
            list(loader)
        except RunError as error:
            errors.append(str(error))

    monkeypatch.setattr(threads_module, "crop_image", slow)
    loader = ViewLoader(folder / "jpeg.beton", [(None, ONE)], engine=engine, **OPTIONS)
    consumer, closer = threading.Thread(target=consume), threading.Thread(target=loader.close)
    consumer.start()
    at_work.wait(PATIENCE)
    closer.start()
    closing = eventually(lambda: loader.pool._closed)
    release.set()
    assert closing
    for thread in (consumer, closer):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert len(errors) == 1
    assert "closed" in errors[0]
    assert len(calls) <= 2  # one for each thread of the pool, of the eight images of the first batch


# -- interrupts


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_at_any_moment_end_a_loop_and_its_threads(folder, engine):
    """Twenty timers in place of Ctrl-C, after 2 to 40 ms; the first ones hit the opening of the loader."""
    before, interrupted = set(threading.enumerate()), 0
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for trial in range(20):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.002 * (trial + 1))
                with ViewLoader(folder / "jpeg.beton", [(None, MANY)], engine=engine, **OPTIONS) as loader:
                    deadline = time.monotonic() + 1
                    while time.monotonic() < deadline:
                        list(loader)
            except KeyboardInterrupt:
                interrupted += 1
            # A thread whose start was interrupted is not known to who wanted it, and ends by itself.
            assert eventually(lambda: set(threading.enumerate()) <= before)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupted >= 18  # Python itself drops one where it tidies up after a thread


LOOP = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
from pipelines.loader import ViewLoader
from tests.pipelines.test_proofs import MANY
path, engine, style = sys.argv[1:]
loader = ViewLoader(path, [(None, MANY)], engine=engine, global_batch=8, drop_last=False, workers=4)
def train():
    while True:
        for batch in loader:
            print("batch", flush=True)
if style == "with":
    with loader:
        train()
train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("style", ["with", "without"])
def test_ctrl_c_ends_the_process_with_an_exception_and_nothing_else(folder, engine, style):
    """Also when nobody closes the loader."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(folder / "jpeg.beton"), engine, style],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for _ in range(5):
            assert process.stdout.readline() == "batch\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT  # how Python ends after a KeyboardInterrupt that nobody caught
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1
    assert "Exception ignored" not in errors


# -- forks


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_loader_in_a_forked_process_says_so_instead_of_waiting_for_ever(folder, sound_views, engine):
    """As the workers of a torch DataLoader are. The loader goes on where it was made."""
    context = multiprocessing.get_context("fork")
    with ViewLoader(folder / "jpeg.beton", [(None, MANY)], engine=engine, **OPTIONS) as loader:
        begun = iter(loader)
        first = next(begun)
        said = context.SimpleQueue()

        def attempt():
            for use in (lambda: next(iter(loader)), lambda: next(begun)):
                try:
                    use()
                except RunError as error:
                    said.put(str(error))
            loader.close()

        child = context.Process(target=attempt)
        child.start()
        child.join(PATIENCE)
        hung = child.is_alive()
        if hung:
            child.kill()
        assert not hung
        assert child.exitcode == 0
        for _ in range(2):
            assert f"made by process {os.getpid()}" in said.get()
        assert_sound(first, sound_views("jpeg", engine))
        for batch in begun:
            assert_sound(batch, sound_views("jpeg", engine))
