"""The parity certificate: it passes what is right, names what is absent, and fails what is wrong by little."""

from __future__ import annotations

import contextlib
import copy
import json

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image

from pipelines import beton
from pipelines.engines import ENGINES, torchvision
from pipelines.errors import ConfigError, InputError, MissingExtraError, RunError
from pipelines.pool import Pool
from relssl.bench import parity
from relssl.bench.parity_certificate import write_section
from relssl.bench.parity_images import built_in_images, stored
from relssl.bench.parity_ledger import TOLERANCES, Differences
from relssl.bench.parity_references import pil_crops
from relssl.cli import run
from tests.conftest import MODULES, missing

CPU = torch.device("cpu")
BASE_ENGINES = ("resident", "torchvision")


@pytest.fixture(scope="module")
def stores():
    with stored(built_in_images()) as made:
        yield made


@pytest.fixture
def bench(stores, monkeypatch):
    """A bench with the engines that are always there, and one view of each image."""
    monkeypatch.setattr(parity, "FEWEST_VIEWS", 1)
    with contextlib.closing(Pool(1)) as pool:
        candidates, absent = parity.find_candidates(BASE_ENGINES, [CPU], stores["small"], pool)
        assert not absent
        yield parity.Bench(stores, candidates, [CPU], pool)


def failed(ledger):
    return {(row.check, row.subject, row.case, row.against) for row in ledger.rows if not row.passed}


def assert_passed(certificate):
    assert certificate.passed, [row.record() for row in certificate.failed]


def is_absent(engine):
    return engine in MODULES and missing(engine) is not None


# -- what is right passes


@pytest.mark.slow
def test_everything_installed_passes_on_the_built_in_images():
    certificate = parity.certify(device="cpu")
    assert_passed(certificate)
    assert "3 photographs" in certificate.images
    assert_all_installed_took_part(certificate)


@pytest.mark.slow
def test_everything_installed_passes_on_real_images(imagenet_folder, tmp_path):
    names = sorted(imagenet_folder.glob("*.JPEG"))[::25]
    beton.write(tmp_path / "i.beton", [(name.read_bytes(), None) for name in names])
    certificate = parity.certify(tmp_path / "i.beton", num_images=12, device="cpu")
    assert_passed(certificate)
    assert certificate.images == "12 of i.beton"
    assert_all_installed_took_part(certificate)


def assert_all_installed_took_part(certificate):
    assert set(certificate.absent) == {name for name in ENGINES if is_absent(name)}
    for check in ("decode", "crop", "views"):
        took_part = {row.subject.split()[0] for row in certificate.rows if row.check == check}
        assert took_part - {"matmul"} == {name for name in ENGINES if not is_absent(name)}


@pytest.mark.slow
def test_engines_and_colour_paths_pass(bench):
    for check in parity.CHECKS:
        check(bench)
    assert not failed(bench.ledger)
    rows = bench.ledger.rows
    assert {row.check for row in rows} == {"decode", "crop", "colour", "views", "engines"}
    colours = {(row.subject, row.case, row.against) for row in rows if row.check == "colour"}
    for path in ("numba cpu", "torch cpu"):
        for name in (*parity.OPERATIONS, *parity.CHAINS):
            assert {(path, name, "torchvision"), (path, name, "PIL")} <= colours
        assert {(path, "chain, fp16", "torchvision"), (path, "chain, bf16", "torchvision")} <= colours
    crops = {(row.subject, row.case) for row in rows if row.check == "crop"}
    for subject in ("resident cpu", "torchvision cpu"):
        assert {(subject, f"{s}, {i}") for s in bench.stores for i in ("bilinear", "bicubic", "padded")} <= crops
    for dtype in parity.DTYPES:
        assert {(f"matmul {dtype} cpu", "raw, bilinear"), (f"matmul {dtype} cpu", "raw, padded")} <= crops


def test_the_reference_crop_is_torchvisions(stores):
    files, pictures = stores["raw"].files, stores["raw"].pictures
    spec = parity.ViewSpec("view", 40, count=2, flip=0.5)
    params = parity._drawn([spec], files, np.arange(len(files)))[0]
    ours = pil_crops(pictures, params)
    assert params.flip.any()
    assert not params.flip.all()
    for v, b in np.ndindex(*params.flip.shape):
        theirs = tv.resized_crop(Image.fromarray(pictures[b]), *params.box[v, b].tolist(), [40, 40])
        assert (ours[v, b] == np.asarray(tv.hflip(theirs) if params.flip[v, b] else theirs)).all()


def test_the_reference_of_padded_crops_is_torchvisions(stores):
    files, pictures = stores["small"].files, stores["small"].pictures
    spec = parity.ViewSpec("view", 32, count=4, box={"pad_crop": {"padding": 4}}, flip=0.5)
    params = parity._drawn([spec], files, np.arange(len(files)))[0]
    ours = pil_crops(pictures, params)
    for v, b in np.ndindex(*params.flip.shape):
        y, x = (params.offset[v, b] + 4).tolist()
        theirs = tv.crop(tv.pad(Image.fromarray(pictures[b]), 4), y, x, 32, 32)
        assert (ours[v, b] == np.asarray(tv.hflip(theirs) if params.flip[v, b] else theirs)).all()


# -- what is wrong fails


def test_a_crop_that_is_off_by_a_pixel(bench, monkeypatch):
    right = torchvision.Engine.crops

    def shifted(self, ids, params, *others):
        params = copy.deepcopy(params)
        for view in params:
            view.box[..., 1] -= view.box[..., 1] > 0
        return right(self, ids, params, *others)

    monkeypatch.setattr(torchvision.Engine, "crops", shifted)
    parity.check_crops(bench)
    wrong = {("crop", "torchvision cpu", f"{s}, {i}", "PIL") for s in bench.stores for i in ("bilinear", "bicubic")}
    assert failed(bench.ledger) == wrong


def test_a_border_that_is_not_black(bench, monkeypatch):
    """Crops that stay inside the image instead."""
    right = torchvision.Engine.crops

    def inside(self, ids, params, *others):
        params = copy.deepcopy(params)
        for view in params:
            view.offset = view.offset.clip(0, view.resized - view.size)
        return right(self, ids, params, *others)

    monkeypatch.setattr(torchvision.Engine, "crops", inside)
    parity.check_crops(bench)
    assert failed(bench.ledger) == {("crop", "torchvision cpu", f"{s}, padded", "PIL") for s in bench.stores}


def test_a_loader_with_other_crops_than_its_engine(bench, monkeypatch):
    """A fast way from crop to colour inside the loader is compared too."""
    right = parity.ViewLoader.__iter__

    def mirrored(self):
        for batch in right(self):
            batch.views["view"][0].copy_(batch.views["view"][0].flip(-1))
            yield batch

    monkeypatch.setattr(parity.ViewLoader, "__iter__", mirrored)
    parity.check_views(bench)
    assert {row for row in failed(bench.ledger) if row[0] == "views"} == {
        ("views", f"{engine} cpu", store, "PIL") for engine in BASE_ENGINES for store in bench.stores
    }


def test_a_decoder_that_is_off_by_one_level(bench, monkeypatch):
    right = torchvision.Engine.decode
    monkeypatch.setattr(torchvision.Engine, "decode", lambda self, i: right(self, i).clamp(max=254) + 1)
    parity.check_decoders(bench)
    assert failed(bench.ledger) == {("decode", "torchvision cpu", "jpg", "PIL")}


def changed_value(name, change):
    """A colour function that misreads the first number of one operation."""

    def wrong(right, crops, params, spec, out):
        params = copy.deepcopy(params)
        for i, op in enumerate(params.ops.names):
            if op == name:
                change(params.ops.value[:, :, i])
        right(crops, params, spec, out)

    return wrong


def hue_off(value):
    value[..., 3] += 0.01 * (value[..., 3] != 0)


def sigma_off(value):
    value[..., 0] *= 1.1


def shift_off(value):
    value[..., 2] += 0.5


def box_off(value):
    value[..., 2] -= 1


def reversed_order(right, crops, params, spec, out):
    params = copy.deepcopy(params)
    params.ops.order[:] = params.ops.order[..., ::-1].copy()
    right(crops, params, spec, out)


def swapped_channels(right, crops, params, spec, out):
    right(crops, params, spec, out)
    out.copy_(out.flip(-1))


SINGLE = set(parity.OPERATIONS)
CHAINS = {"chain", "chain, fp16", "chain, bf16", parity.SOLARISED}


@pytest.mark.parametrize(
    ("wrong", "cases"),
    [
        (changed_value("jitter", hue_off), {"hue"} | CHAINS),
        (changed_value("blur", sigma_off), {"blur"} | CHAINS),
        (changed_value("affine", shift_off), {"affine"}),
        (changed_value("erase", box_off), {"erase"}),
        (reversed_order, CHAINS),
        (swapped_channels, (SINGLE | CHAINS) - {"grey"}),
    ],
    ids=["hue", "sigma", "affine", "erase", "order", "channels"],
)
@pytest.mark.parametrize(("name", "path"), [("colour", "numba cpu"), ("colour_torch", "torch cpu")])
def test_wrong_colours(wrong, cases, name, path, bench, monkeypatch):
    right = getattr(parity, name)
    monkeypatch.setattr(parity, name, lambda *arguments: wrong(right, *arguments))
    parity.check_colour(bench)
    against_floats = {(subject, case) for _, subject, case, against in failed(bench.ledger) if against == "torchvision"}
    assert against_floats == {(path, case) for case in cases}
    assert {subject for _, subject, _, _ in failed(bench.ledger)} == {path}


def test_crops_of_another_shape_are_refused(bench, monkeypatch):
    right = torchvision.Engine.crops
    monkeypatch.setattr(torchvision.Engine, "crops", lambda *a, **k: [crop[:, :, 1:] for crop in right(*a, **k)])
    with pytest.raises(RunError, match="expected an array of shape"):
        parity.check_crops(bench)


# -- who is absent


def test_absent_engines_are_named_and_no_failure(monkeypatch, tmp_path):
    without(monkeypatch, "torchvision")
    monkeypatch.setattr(parity, "CHECKS", (parity.check_decoders,))
    certificate = parity.certify(engines=BASE_ENGINES, device="cpu")
    assert certificate.absent == {"torchvision": "torchvision is not installed; install it"}
    lines = list(certificate.lines())
    assert "torchvision absent: torchvision is not installed; install it" in lines
    assert lines[-1] == "PASS: 1 of 1 within tolerance; absent: torchvision"


def test_nothing_to_compare_is_an_error(monkeypatch):
    without(monkeypatch, "torchvision")
    with pytest.raises(MissingExtraError, match="install it"):
        parity.certify(engines=["torchvision"], device="cpu")


def without(monkeypatch, name):
    right = parity.engine_class

    def engine_class(asked):
        if asked == name:
            raise MissingExtraError(f"{name} is not installed; install it")
        return right(asked)

    monkeypatch.setattr(parity, "engine_class", engine_class)


def test_what_an_engine_does_not_make_is_named(bench, monkeypatch):
    def check(spec, resize):
        if spec.interpolation == "bicubic":
            raise ConfigError("no bicubic here")

    monkeypatch.setattr(torchvision.Engine, "check", staticmethod(check))
    parity.check_crops(bench)
    assert bench.refused == {"torchvision cpu, bicubic": "no bicubic here"}
    assert not any(row.subject == "torchvision cpu" and "bicubic" in row.case for row in bench.ledger.rows)


def test_cuda_is_named_where_it_is_absent(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert parity.devices_of("auto") == ([CPU], {"cuda": "this machine has no CUDA device"})
    with pytest.raises(ConfigError, match="0 CUDA devices"):
        parity.devices_of("cuda")


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:x"])
def test_unknown_devices_are_refused(name):
    with pytest.raises(ConfigError, match="auto, cpu, cuda"):
        parity.devices_of(name)


# -- the command


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(parity, "CHECKS", (parity.check_decoders,))


PARITY = ["bench", "parity", "--engine", "torchvision", "--engine", "resident", "--device", "cpu"]


def test_the_command_prints_the_verdict_last(quick, capsys):
    assert run(PARITY) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "PASS: 2 of 2 within tolerance"
    assert sum(line.endswith("pass") for line in lines) == 2


def test_the_command_exits_1_on_a_fail(quick, monkeypatch, capsys, tmp_path):
    right = torchvision.Engine.decode
    monkeypatch.setattr(torchvision.Engine, "decode", lambda self, i: right(self, i).flip(0))
    assert run([*PARITY, "--json", str(tmp_path / "p.json")]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "FAIL: 1 of 2 within tolerance"
    record = json.loads((tmp_path / "p.json").read_text())
    assert record["verdict"] == "fail"
    assert [row["subject"] for row in record["rows"] if not row["passed"]] == ["torchvision cpu"]


def test_the_json_holds_what_one_needs_to_repeat_it(quick, tmp_path):
    assert run([*PARITY, "--json", str(tmp_path / "p.json")]) == 0
    record = json.loads((tmp_path / "p.json").read_text())
    assert (record["format"], record["verdict"], record["passed"], record["failed"]) == (1, "pass", 2, 0)
    assert record["command"].startswith("relssl bench parity --engine torchvision")
    assert {"torch", "torchvision", "pillow", "numba", "relssl"} <= set(record["environment"]["versions"])
    assert record["environment"]["processor"]
    assert record["date"] == record["environment"]["started"]
    row = record["rows"][0]
    assert {row["check"], row["subject"], row["case"], row["against"]} == {"decode", "torchvision cpu", "jpg", "PIL"}
    assert (row["max"], row["mean"], row["p99"], row["above_one"], row["passed"]) == (0, 0, 0, 0, True)
    assert row["tolerance"] == {"max": 0}
    assert row["source"]
    assert row["count"] > 3 * 4 * 400 * 400 * 3


def test_the_images_of_a_file(quick, tmp_path, capsys):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8) for i in range(5)]
    beton.write(tmp_path / "raw.beton", [(picture, None) for picture in pictures])
    assert run([*PARITY[:2], str(tmp_path / "raw.beton"), *PARITY[2:], "--images", "3"]) == 0
    assert "images: 3 of raw.beton" in capsys.readouterr().out


def test_a_damaged_image_is_refused_under_its_own_name(tmp_path):
    whole = built_in_images()[0]
    beton.write(tmp_path / "d.beton", [(whole, None), (whole[: len(whole) // 2], None)])
    with pytest.raises(InputError, match=r"d\.beton.*sample 1"):
        parity.certify(tmp_path / "d.beton", device="cpu")


@pytest.mark.parametrize("option", ["--json", "--markdown"])
def test_a_missing_folder_is_noticed_before_the_work(option, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "certify", None)
    assert run([*PARITY, option, str(tmp_path / "none" / "f")]) == 2


def test_unknown_engines_are_refused(capsys):
    assert run(["bench", "parity", "--engine", "torchvison"]) == 2
    assert "did you mean 'torchvision'" in capsys.readouterr().err


def test_the_section_of_a_page_is_written_anew(quick, tmp_path):
    page = tmp_path / "parity.md"
    page.write_text("# Parity\n\n<!-- parity: built-in -->\nold\n<!-- end -->\n\nlast words\n")
    for _ in range(2):
        assert run([*PARITY, "--markdown", str(page)]) == 0
    text = page.read_text()
    command = " ".join(["relssl", *PARITY])
    assert text.startswith(f"# Parity\n\n<!-- parity: built-in -->\n`{command}`, 20")
    assert text.endswith("<!-- end -->\n\nlast words\n")
    assert "old" not in text
    assert text.count("| decode | torchvision cpu | jpg | PIL | 0 | 0 | 0 | 0.000 % | max ≤ 0 | pass |") == 1


def test_a_page_without_the_section_gets_it(tmp_path):
    page = tmp_path / "new.md"
    write_section(page, "a.beton", "one")
    write_section(page, "b.beton", "two")
    write_section(page, "a.beton", r"three \1")
    assert page.read_text() == (
        "<!-- parity: a.beton -->\nthree \\1\n<!-- end -->\n\n<!-- parity: b.beton -->\ntwo\n<!-- end -->\n"
    )


# -- the statistics


def test_differences_are_numpys():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(100, 3, (7, 1000)).astype(np.float32), np.full((7, 1000), 100, np.uint8)
    found = Differences()
    for part in range(7):
        found.add(ours[part], theirs[part])
    absolute = np.abs(ours - theirs).ravel()
    assert found.count == 7000
    assert found.max == pytest.approx(absolute.max())
    assert found.mean == pytest.approx(absolute.mean(), rel=1e-5)
    assert found.p99 == pytest.approx(np.percentile(absolute, 99, method="inverted_cdf"), rel=0.002)
    assert found.above_one == (absolute > 1).mean()


def test_whole_levels_are_counted_exactly():
    found = Differences()
    found.add(np.arange(200, dtype=np.uint8), np.zeros(200, np.uint8))
    assert (found.max, found.mean, found.p99, found.above_one) == (199, 99.5, 197, 198 / 200)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_what_is_no_level_is_the_largest_difference(value):
    found = Differences()
    found.add(np.array([0, value], np.float32), np.zeros(2, np.float32))
    assert found.max == 256
    assert found.mean == 128


def test_bounds_hold_at_their_value_and_not_above():
    row = parity.Ledger()
    row.compare("crop", "a", "b", "c", "crop, bilinear", np.array([3]), np.array([2]))
    assert row.rows[0].passed
    row.compare("crop", "a", "b", "c", "crop, bilinear", np.array([4]), np.array([2]))
    assert row.rows[0].exceeded == ["max"]
    assert len(row.rows) == 1


def test_every_tolerance_has_a_bound_and_a_source():
    for name, tolerance in TOLERANCES.items():
        assert tolerance.bounds(), name
        assert tolerance.source, name
