"""ViewLoader: what a batch is made of, phases, subsets, and requests that are refused.

That views do not depend on how the work is divided is shown in `test_proofs`, what happens to damage in `test_faults`.
"""

from __future__ import annotations

import dataclasses
import threading
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import beton
from pipelines import loader as loader_module
from pipelines.batch import ViewBatch
from pipelines.beton_format import read_tables
from pipelines.colour import colour_torch
from pipelines.draw import draw
from pipelines.errors import ConfigError, InputError, RunError
from pipelines.loader import ViewLoader
from pipelines.subset import Subset, spread, spread_rows
from pipelines.views import ViewSpec
from tests.pipelines.test_crop import smooth_images

JITTER = ["jitter", 0.8, {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}]
PLAN = [
    ViewSpec("teacher", 24, box={"random_resized": {"scale": [0.2, 1.0]}}, flip=0.5),
    ViewSpec("student", 24, count=2, flip=0.5, ops=[JITTER, ["grey", 0.2], ["blur", 0.5, {"sigma": [0.1, 2.0]}]]),
    ViewSpec("student", 16),
]
ENGINES = [
    "resident",
    "torchvision",
    pytest.param("ffcv", marks=pytest.mark.ffcv),
    pytest.param("dali", marks=pytest.mark.dali),
]
COUNT = 26


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """26 JPEGs of two sizes, labels 0 and 1."""
    path = tmp_path_factory.mktemp("loader") / "images.beton"
    images = [*smooth_images(COUNT // 2, 32, 32), *smooth_images(COUNT - COUNT // 2, 40, 28, seed=1)]
    beton.write(path, ((jpeg(image), i % 2) for i, image in enumerate(images)), count=COUNT)
    return path


def jpeg(image):
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def collect(files, engine):
    """sample id -> all views of the sample."""
    found = {}
    with ViewLoader(files, [(None, PLAN)], global_batch=8, drop_last=False, engine=engine) as loader:
        for batch in loader:
            for row, index in enumerate(batch.index.tolist()):
                found[index] = [view[row] for name in ("teacher", "student") for view in batch.views[name]]
    return found


def test_engines_agree_to_one_level(data):
    """The crops differ by at most one level of 255; without colour operations so do the views."""
    a, b = (collect(data, engine) for engine in ("resident", "torchvision"))
    std = min(PLAN[0].normalize[1])
    for index in a:
        for view in (0, 3):  # the teacher and the last student, which have no colour operations
            assert (a[index][view] - b[index][view]).abs().max() <= 1.001 / 255 / std


@pytest.mark.parametrize("engine", ENGINES)
def test_padded_views_are_the_stored_pixels_and_normalised_black(tmp_path, engine):
    """As torchvision pads an image: before the normalisation."""
    images = np.random.default_rng(0).integers(1, 256, (8, 20, 24, 3), dtype=np.uint8)
    beton.write(tmp_path / "raw.beton", ((image, i) for i, image in enumerate(images)), count=8)
    spec = ViewSpec("a", 22, count=3, box={"pad_crop": {"padding": 5}}, flip=0.5)
    with ViewLoader(tmp_path / "raw.beton", [(None, [spec])], global_batch=8, engine=engine, shuffle=False) as loader:
        (batch,) = loader
    (params,) = draw([spec], seed=0, epoch=0, index=np.arange(8), heights=np.full(8, 20), widths=np.full(8, 24))
    mean, std = np.array(spec.normalize)
    for view, made in enumerate(batch.views["a"]):
        for i in range(8):
            y, x = (params.offset[view, i] + 5).tolist()
            square = np.pad(images[i], ((5, 5), (5, 5), (0, 0)))[y : y + 22, x : x + 22]
            square = square[:, ::-1] if params.flip[view, i] else square
            np.testing.assert_allclose(made[i].permute(1, 2, 0), (square / 255 - mean) / std, rtol=0, atol=1e-6)


def test_an_image_that_is_too_small_for_a_view_is_named(data):
    spec = ViewSpec("a", 33, box={"pad_crop": {"padding": 2}})
    words = (
        "'a': box pad_crop takes 33 x 33 .* sample 13 of .*images.beton has 40 x 28 pixels; set padding to at least 3"
    )
    for phases in ([(None, [spec])], [(5, PLAN), (None, [spec])]):  # at once, and not in the fifth epoch
        with pytest.raises(ConfigError, match=words):
            ViewLoader(data, phases, global_batch=8)


@pytest.mark.parametrize("channels_last", [True, False])
def test_stacked_views_are_no_copy(data, channels_last):
    with ViewLoader(data, [(None, PLAN[:2])], global_batch=8, channels_last=channels_last) as loader:
        batch = next(iter(loader))
    stacked = batch.stacked("student")
    assert stacked.shape == (16, 3, 24, 24)
    assert torch.equal(stacked, torch.cat(batch.views["student"]))
    assert stacked.data_ptr() == batch.views["student"][0].data_ptr()
    order = torch.channels_last if channels_last else torch.contiguous_format
    assert stacked.is_contiguous(memory_format=order)
    assert batch.views["teacher"][0].is_contiguous(memory_format=order)


def test_views_of_different_sizes_cannot_be_stacked(data):
    with ViewLoader(data, [(None, PLAN)], global_batch=8) as loader:
        batch = next(iter(loader))
    with pytest.raises(ValueError, match="differ in shape"):
        batch.stacked("student")


def test_a_batch_made_by_hand_can_be_stacked():
    x = torch.arange(24.0).view(2, 3, 2, 2)
    place = torch.arange(2)
    assert torch.equal(ViewBatch({"a": (x, x)}, place, place, place).stacked("a"), torch.cat([x, x]))


def test_positions_are_places_in_the_global_batch(data):
    batches = []
    for rank in range(2):
        with ViewLoader(data, [(None, PLAN)], global_batch=8, num_micro=2, rank=rank, world_size=2) as loader:
            batches.append(list(loader))
    first = torch.cat([batches[r][m].position for r in range(2) for m in range(2)])
    assert sorted(first.tolist()) == list(range(8))
    assert batches[1][1].position.tolist() == [3, 7]  # micro 1, rank 1: m + A (r + W j)


def test_phases_follow_the_epoch(data):
    late = [ViewSpec("late", 8)]
    with ViewLoader(data, [(2, PLAN), (None, late)], global_batch=8) as loader:
        for epoch, names in ((0, {"teacher", "student"}), (1, {"teacher", "student"}), (2, {"late"}), (9, {"late"})):
            loader.set_position(epoch)
            assert set(next(iter(loader)).views) == names


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ([], "at least one phase"),
        ([(3, PLAN)], "the last phase"),
        ([(None, PLAN), (None, PLAN)], "only the last"),
        ([(3, PLAN), (2, PLAN), (None, PLAN)], "increase"),
        ([(None, [])], "no views"),
    ],
)
def test_impossible_phases_are_refused(data, phases, words):
    with pytest.raises(ConfigError, match=words):
        ViewLoader(data, phases, global_batch=8)


def test_several_files_are_one_data_set(data):
    with ViewLoader([data, data], [(None, PLAN)], global_batch=52) as loader:
        batch = next(iter(loader))
    assert sorted(batch.index.tolist()) == list(range(52))


def test_a_subset_has_its_own_ids(data):
    with beton.open(data) as files:
        few = spread(files, 5)
        assert few.ids.tolist() == spread_rows(len(files), 5).tolist()
        assert spread(files, COUNT) is files
        with ViewLoader(few, [(None, PLAN)], global_batch=5, engine="torchvision") as loader:
            batch = next(iter(loader))
        assert sorted(batch.index.tolist()) == list(range(5))
        assert batch.label.tolist() == files.labels[few.ids[batch.index.numpy()]].tolist()
        assert (Subset(files, np.array([7])).decode(0) == files.decode(7)).all()


def test_an_unknown_engine_is_refused(data):
    with pytest.raises(ConfigError, match="did you mean 'resident'"):
        ViewLoader(data, [(None, PLAN)], global_batch=8, engine="residen")


@pytest.mark.parametrize("engine", ["resident", "torchvision", pytest.param("dali", marks=pytest.mark.dali)])
def test_only_ffcv_resizes_by_area(data, engine):
    with pytest.raises(ConfigError, match=r"area is FFCV's own; set data.engine: ffcv"):
        ViewLoader(data, [(None, PLAN)], global_batch=8, engine=engine, resize="area")


def damage(path, ids):
    """Overwrite the payloads of some samples behind the header, so that they do not decode."""
    with beton.open(path) as files:
        places = [(int(files.locate(i)[0].offsets[i]), int(files.locate(i)[0].sizes[i])) for i in ids]
    raw = bytearray(path.read_bytes())
    for start, size in places:
        raw[start : start + size] = b"\x00" * size
    path.write_bytes(raw)


@pytest.mark.parametrize("engine", ENGINES)
def test_too_many_unreadable_images_stop_the_run(data, tmp_path, engine):
    path = tmp_path / "worse.beton"
    path.write_bytes(data.read_bytes())
    damage(path, [1, 2, 3, 4])
    with (
        ViewLoader(path, [(None, PLAN)], global_batch=8, engine=engine) as loader,
        pytest.raises(RunError, match=r"images could not be read, and at most 1 may be.*sample \d+ of .*worse.beton"),
    ):
        list(loader)


@pytest.mark.parametrize("engine", ENGINES)
def test_where_none_may_be_unreadable_none_is_replaced(data, tmp_path, engine, caplog):
    path = tmp_path / "one.beton"
    path.write_bytes(data.read_bytes())
    damage(path, [3])
    told = r"sample 3 of .*one.beton.* No image may be left out here: run `relssl verify` on the data, and convert it"
    with (
        caplog.at_level("WARNING", "relssl"),
        ViewLoader(path, [(None, PLAN)], global_batch=8, engine=engine, drop_last=False, max_unreadable=0) as loader,
        pytest.raises(InputError, match=told),
    ):
        list(loader)
    assert not caplog.records


def test_an_abandoned_epoch_leaves_no_thread(data):
    before = threading.active_count()
    with ViewLoader(data, [(None, PLAN)], global_batch=4, engine="torchvision", workers=2) as loader:
        for _ in range(20):
            next(iter(loader))
        working = threading.active_count()
        assert working <= before + 4  # two of the pool, two feeders
    assert threading.active_count() == before


def test_an_abandoned_epoch_is_not_worked_on(data, monkeypatch):
    """Four batches are ordered when the first is there; two more are then being made, and the fourth never is."""
    begun, go_on = [], threading.Event()
    prepare = ViewLoader._prepare

    def watched(self, epoch, order, update, micro):
        begun.append((epoch, update))
        if epoch == 0 and update > 0:
            go_on.wait(20)
        return prepare(self, epoch, order, update, micro)

    monkeypatch.setattr(ViewLoader, "_prepare", watched)
    with ViewLoader(data, [(None, PLAN)], global_batch=4, workers=2) as loader:
        for _ in loader:
            break
        go_on.set()
        loader.set_position(1)
        list(loader)
    assert (0, 3) not in begun
    assert [update for epoch, update in sorted(begun) if epoch == 1] == list(range(6))


def test_file_order_covers_every_image_once(data):
    for world in (1, 2, 3):
        seen = []
        for rank in range(world):
            with ViewLoader(
                data, [(None, PLAN[:1])], global_batch=4 * world, rank=rank, world_size=world, shuffle=False,
                drop_last=False,
            ) as loader:  # fmt: skip
                seen += [i for batch in loader for i in batch.index.tolist()]
        assert sorted(seen) == list(range(COUNT))


# -- masks

MASKED = [
    ViewSpec("large", 24, count=2, flip=0.5, mask_p=0.5, normalize=None),
    ViewSpec("small", 16, normalize=None),
]


def half_masks(count):
    """The upper half is foreground, of every third image the left one."""
    masks = np.zeros((count, 128, 128), bool)
    masks[:, :64] = True
    masks[::3] = masks[::3].transpose(0, 2, 1)
    return masks


@pytest.fixture(scope="module")
def masked_data(tmp_path_factory):
    """The images of `data`, without black, with masks."""
    path = tmp_path_factory.mktemp("masked") / "masked.beton"
    images = [*smooth_images(COUNT // 2, 32, 32), *smooth_images(COUNT - COUNT // 2, 40, 28, seed=1)]
    samples = (
        (jpeg(image), i % 2, mask) for i, (image, mask) in enumerate(zip(images, half_masks(COUNT), strict=True))
    )
    beton.write(path, samples, count=COUNT, masks=True)
    return path


def all_of(files, plan, **options):
    with ViewLoader(files, [(None, plan)], global_batch=8, drop_last=False, shuffle=False, **options) as loader:
        return [{name: [v.clone() for v in views] for name, views in batch.views.items()} for batch in loader]


@pytest.mark.parametrize("engine", ENGINES)
def test_masked_views_are_the_others_with_grey_background(masked_data, engine):
    plain_plan = [dataclasses.replace(spec, mask_p=0) for spec in MASKED]
    plain, masked = (all_of(masked_data, plan, engine=engine) for plan in (plain_plan, MASKED))
    with beton.open(masked_data) as files:
        (params, _) = draw(MASKED, seed=0, epoch=0, index=np.arange(COUNT), heights=files.heights, widths=files.widths)
    seen = {True: 0, False: 0}
    for i in range(COUNT):
        batch, row = divmod(i, 8)
        assert torch.equal(plain[batch]["small"][0][row], masked[batch]["small"][0][row])
        for v in range(2):
            a, b = plain[batch]["large"][v][row], masked[batch]["large"][v][row]
            grey = (b == 0.5).all(0)
            assert torch.equal(a[:, ~grey], b[:, ~grey])
            top, left, bottom, right = params.window[v, i]
            share = (np.arange(24) + 0.5) / 24
            along, axis = ((left, right), 1) if i % 3 == 0 else ((top, bottom), 0)
            at = along[0] + (along[1] - along[0]) * share
            expected = np.broadcast_to((at > 0.5)[None] if axis else (at > 0.5)[:, None], (24, 24))
            expected = expected & params.masked[v, i]
            assert (grey.numpy() == expected).mean() > 0.95
            seen[bool(expected.any())] += 1
    assert min(seen.values()) > 5


def test_masks_do_not_depend_on_the_division_of_the_work(masked_data):
    one = all_of(masked_data, MASKED, engine="torchvision", workers=1)
    many = all_of(masked_data, MASKED, engine="torchvision", workers=3)
    for a, b in zip(one, many, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a["large"], b["large"], strict=True))
    with beton.open(masked_data) as files:
        part = all_of(Subset(files, np.arange(COUNT)[::-1]), MASKED, engine="torchvision")
    assert torch.equal(part[0]["large"][0][0], one[-1]["large"][0][-1])


def test_data_without_masks_is_refused_before_the_first_batch(data, masked_data):
    words = (
        r"view 'large': mask_p is 0.5, but .*images.beton has no masks; make masks with relssl saliency .* mask_p: 0"
    )
    for phases in ([(None, MASKED)], [(5, PLAN), (None, MASKED)]):
        with pytest.raises(ConfigError, match=words):
            ViewLoader(data, phases, global_batch=8)
    with pytest.raises(ConfigError, match=words):
        ViewLoader([masked_data, data], [(None, MASKED)], global_batch=8)
    with beton.open(data) as files, pytest.raises(ConfigError, match=words):
        ViewLoader(Subset(files, np.arange(8)), [(None, MASKED)], global_batch=8)


def test_without_masked_views_no_mask_is_read(masked_data, monkeypatch):
    monkeypatch.setattr(beton.Beton, "packed_mask", None)
    all_of(masked_data, PLAN)
    with pytest.raises(RunError, match="not callable"):
        all_of(masked_data, MASKED)


def damaged_masks(source, target, bad):
    """A copy of a file whose masks of some samples have been overwritten."""
    target.write_bytes(source.read_bytes())
    beton.manifest_path(target).write_bytes(beton.manifest_path(source).read_bytes())
    with beton.Beton(target) as read, target.open("r+b") as file:
        for i in bad:
            file.seek(read_tables(read.data, "").mask_offsets[i])
            file.write(b"\x55" * 100)
    return target


@pytest.mark.parametrize("engine", ["resident", "torchvision"])
def test_a_damaged_mask_takes_nothing_away_and_is_named(masked_data, tmp_path, caplog, engine):
    bad = damaged_masks(masked_data, tmp_path / "bad.beton", [4])
    always = [dataclasses.replace(MASKED[0], mask_p=1)]
    with caplog.at_level("WARNING", "relssl"):
        found = all_of(bad, always, engine=engine, max_unreadable=0.1)[0]["large"][0]
        with ViewLoader(bad, [(None, always)], global_batch=8, engine=engine, max_unreadable=0.1) as loader:
            for epoch in range(6):  # each leaves two images out
                loader.set_position(epoch)
                list(loader)
    sound = all_of(masked_data, always, engine=engine)[0]["large"][0]
    unmasked = all_of(masked_data, [dataclasses.replace(MASKED[0], mask_p=0)], engine=engine)[0]["large"][0]
    for row in range(8):
        assert torch.equal(found[row], unmasked[row] if row == 4 else sound[row])
    warnings = [r.getMessage() for r in caplog.records if "not masked" in r.getMessage()]
    assert len(warnings) == 2  # once a loader
    assert "image 4 is not masked" in warnings[0]
    assert "bad.beton: sample 4: its mask is not the one" in warnings[0]


def test_too_many_damaged_masks_end_the_run(masked_data, tmp_path):
    bad = damaged_masks(masked_data, tmp_path / "bad.beton", range(10))
    message = r"\b[3-9] of 26 masks could not be read, and at most 2 may be; run `relssl verify`"  # by threads at once
    with pytest.raises(RunError, match=message):
        all_of(bad, [dataclasses.replace(MASKED[0], mask_p=1)], max_unreadable=0.05)


@pytest.mark.parametrize("engine", ["resident", "torchvision"])
def test_masks_come_to_an_accelerator(masked_data, engine, monkeypatch):
    """The way that batches for another device take, with the device that there is."""
    expected = all_of(masked_data, MASKED, engine=engine)
    monkeypatch.setattr(loader_module, "colour", lambda *arguments, masks: colour_torch(*arguments, masks))
    options = {"global_batch": 8, "drop_last": False, "shuffle": False, "engine": engine}
    with ViewLoader(masked_data, [(None, MASKED)], **options) as loader:
        loader.device = torch.device("meta")  # of which only the type is looked at
        prepared = [loader._prepare(0, np.arange(COUNT), update, 0) for update in range(loader.updates_per_epoch)]
        loader.device = torch.device("cpu")
        found = [loader._finish(batch) for batch in prepared]
    for a, b in zip(expected, found, strict=True):
        for x, y in zip(a["large"], b.views["large"], strict=True):
            assert (x - y).abs().max() < 1e-5
