"""`relssl bench views`: everybody makes the views asked for, ratios are of one round, settings come back."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines import beton
from pipelines.errors import ConfigError, InputError, RunError
from pipelines.subset import Subset, spread_rows
from pipelines.views import ViewSpec, expand
from relssl import config
from relssl.bench import cases, cores, images, peers, race, record, step, views
from relssl.bench.peers import Job, PeerBase, pil, start_peer, torchvision_v2
from relssl.bench.peers.ours import run_ahead, start_ours
from relssl.bench.table import text
from tests.relssl import tiny

STRONG = (
    ("jitter", 0.8, {"brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1}),
    ("grey", 0.2),
    ("blur", 0.6, {"sigma": (0.1, 2.0)}),
    ("solarise", 0.3, {"threshold": 100 / 255}),
)
PLAN = [
    ViewSpec("large", 24, 2, box={"random_resized": {"scale": (0.3, 0.9)}}, flip=0.4, ops=STRONG),
    ViewSpec("small", 16, ops=STRONG[:1]),
]
BATCH, COUNT = 4, 8
OURS = "relssl (torchvision)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`jpeg.beton` and `raw.beton`, the same 12 smooth pictures."""
    place = tmp_path_factory.mktemp("bench")
    rng = np.random.default_rng(0)
    pictures = [
        np.array(Image.fromarray(small).resize((40, 48), Image.Resampling.BICUBIC))
        for small in rng.integers(0, 256, (12, 5, 4, 3), dtype=np.uint8)
    ]
    beton.write(place / "raw.beton", ((picture, 0) for picture in pictures))
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(place / f"{number}.jpg", quality=95)
    beton.write(place / "jpeg.beton", (((place / f"{n}.jpg").read_bytes(), 0) for n in range(len(pictures))))
    return place


def job(files: Any, measure: str, plan: list[ViewSpec] = PLAN, num_cores: int = 1) -> Job:
    made = cases.crops_only(plan) if measure == "crops" else plan
    return Job(files, made, measure, torch.device("cpu"), num_cores, BATCH)


def batches_of(peer: PeerBase, count: int = COUNT) -> list[list[Tensor]]:
    """The views of one pass, cloned: a peer may use its memory again."""
    made = [(size, [view.clone() for view in batch]) for size, batch in peer.batches(count)]
    peer.close()
    assert [size for size, _ in made] == [BATCH] * (count // BATCH)
    return [batch for _, batch in made]


def check_views(batches: list[list[Tensor]], measure: str, plan: list[ViewSpec] = PLAN) -> None:
    for batch in batches:
        assert [tuple(view.shape) for view in batch] == [(BATCH, 3, s.size, s.size) for s in expand(plan)]
        assert {view.dtype for view in batch} == {torch.uint8 if measure == "crops" else torch.float32}
        for view in batch:
            assert len(view.flatten(1).unique(dim=0)) == BATCH  # four different pictures
    assert not torch.equal(batches[0][0], batches[1][0])


# -- everybody makes what was asked for


@pytest.mark.parametrize("storage", ["jpeg", "raw"])
@pytest.mark.parametrize("measure", cases.MEASURES)
def test_ours_makes_the_views(folder: Path, measure: str, storage: str) -> None:
    with beton.open(folder / f"{storage}.beton") as files:
        peer = start_ours("torchvision", job(files, measure))
        assert peer.title == OURS
        check_views(batches_of(peer), measure)


def test_running_ahead_keeps_the_order_and_ends_its_threads() -> None:
    running = threading.active_count()
    assert list(run_ahead(lambda x: x * x, range(20))) == [x * x for x in range(20)]
    broken_off = run_ahead(str, range(20))
    assert next(broken_off) == "0"
    broken_off.close()
    assert threading.active_count() == running


@pytest.mark.parametrize("storage", ["jpeg", "raw"])
@pytest.mark.parametrize("num_cores", [1, 2])
@pytest.mark.parametrize("measure", cases.MEASURES)
@pytest.mark.parametrize("name", ["pil", "torchvision-v2"])
def test_peers_on_a_dataloader_make_the_views(
    folder: Path, name: str, measure: str, num_cores: int, storage: str
) -> None:
    with beton.open(folder / f"{storage}.beton") as files:
        check_views(batches_of(start_peer(name, job(files, measure, num_cores=num_cores))), measure)


def test_kornia_makes_the_views_and_leaves_torch_its_threads(folder: Path) -> None:
    pytest.importorskip("kornia")
    plan = [ViewSpec("large", 24, 2, flip=0.4, ops=STRONG), ViewSpec("small", 20, ops=STRONG[:1])]
    before = torch.get_num_threads()
    with beton.open(folder / "jpeg.beton") as files:
        peer = start_peer("kornia", job(files, "views", plan, num_cores=2))
        check_views(batches_of(peer), "views", plan)
    assert torch.get_num_threads() == before


@pytest.mark.slow  # it compiles
@pytest.mark.ffcv
def test_ffcv_makes_the_crops_and_leaves_the_settings(folder: Path) -> None:
    import numba

    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    torch.set_num_threads(2)
    before = torch.get_num_threads(), numba.get_num_threads(), threading.excepthook
    with beton.open(folder / "jpeg.beton") as files:
        tiled = Subset(files, np.arange(24) % 12)
        peer = start_peer("ffcv", job(tiled, "crops"))
        check_views(batches_of(peer), "crops")
    after = torch.get_num_threads(), numba.get_num_threads(), threading.excepthook
    torch.set_num_threads(1)
    assert after == before


@pytest.mark.slow
@pytest.mark.ffcv
def test_a_failure_in_a_thread_of_ffcv_is_an_error_not_a_hang(folder: Path) -> None:
    running = threading.active_count()
    with beton.open(folder / "jpeg.beton") as files:
        peer: Any = start_peer("ffcv", job(files, "crops"))

        def broken_stage(**arguments: Any) -> None:
            raise ValueError("no such page")

        peer.loaders[1].code = ([(broken_stage, [])], [])
        with pytest.raises(RunError, match="stock FFCV failed: ValueError: no such page"):
            list(peer.batches(COUNT))
        peer.close()
    assert threading.active_count() == running


@pytest.mark.ffcv
def test_ffcv_refuses_what_it_cannot_do(folder: Path) -> None:
    with beton.open([folder / "jpeg.beton", folder / "raw.beton"]) as files:
        two_files = job(files, "crops")
        with pytest.raises(ConfigError, match="reads one file"):
            start_peer("ffcv", two_files)
    with beton.open(folder / "jpeg.beton") as files:
        whole = job(files, "crops", [ViewSpec("image", 24, box={"whole": {}})])
        with pytest.raises(ConfigError, match="no box 'whole'"):
            start_peer("ffcv", whole)


def test_decode_gives_the_images_and_needs_jpeg(folder: Path) -> None:
    with beton.open(folder / "jpeg.beton") as files:
        for batch in batches_of(start_peer("decode", job(files, "crops", num_cores=2))):
            assert [tuple(image.shape) for image in batch] == [(3, 48, 40)] * BATCH
    with beton.open(folder / "raw.beton") as files, pytest.raises(InputError, match="--baseline-data"):
        start_peer("decode", job(files, "crops"))


def test_a_pass_reads_as_many_different_images_as_it_can(folder: Path) -> None:
    whole = [ViewSpec("image", 48, box={"whole": {}}, normalize=None)]
    with beton.open(folder / "raw.beton") as files:
        for name in ("pil", "torchvision-v2"):
            peer = start_peer(name, job(files, "views", whole))
            first, second = (torch.cat([batch[0] for _, batch in peer.batches(12)]) for _ in range(2))
            assert len(first.flatten(1).unique(dim=0)) == 12
            assert not torch.equal(first, second)  # another order
            peer.close()


# -- the original pipeline is the plan


def test_the_pil_transform_is_the_plan() -> None:
    crop, flip, jitter, grey, blur, solarise, _, normalize = pil.transform(PLAN[0], tensor=None).transforms
    assert (crop.size, crop.scale, crop.ratio) == ((24, 24), (0.3, 0.9), (3 / 4, 4 / 3))
    assert crop.interpolation.value == "bilinear"
    assert (flip.p, jitter.p, grey.p, blur.p, solarise.p) == (0.4, 0.8, 0.2, 0.6, 0.3)
    (strengths,) = jitter.transforms
    assert strengths.brightness == (0.6, 1.4)
    assert strengths.contrast == (0.7, 1.3)
    assert strengths.saturation == (0.8, 1.2)
    assert strengths.hue == (-0.1, 0.1)
    assert blur.transforms[0].sigma == (0.1, 2.0)
    assert solarise.threshold == 100
    assert (normalize.mean, normalize.std) == PLAN[0].normalize


def test_other_boxes_and_no_flip_are_followed() -> None:
    center = ViewSpec("image", 24, box={"center": {"resize": 30}}, interpolation="bicubic", normalize=None)
    resize, crop, _ = pil.transform(center, tensor=None).transforms
    assert (resize.size, resize.interpolation.value, crop.size) == (30, "bicubic", (24, 24))
    whole = ViewSpec("image", 24, box={"whole": {}}, normalize=None)
    assert pil.transform(whole, tensor=None).transforms[0].size == (24, 24)


@pytest.mark.parametrize("make", [pil, torchvision_v2])
def test_an_operation_that_a_peer_does_not_know_is_refused(make: Any) -> None:
    spec = ViewSpec("image", 24)
    object.__setattr__(spec, "ops", (("cubism", 1.0, {}),))
    with pytest.raises(ConfigError, match="no operation 'cubism'"):
        make.transform(spec, **({"tensor": None} if make is pil else {"to_float": True}))


@pytest.mark.parametrize("name", ["pil", "torchvision-v2", "kornia"])
@pytest.mark.parametrize(
    ("options", "words"),
    [({"antialias": False}, "antialiasing"), ({"ops": [["blur", 1, {"sigma": [1, 2], "kernel": "byol"}]]}, "kernel")],
    ids=["resize", "blur"],
)
def test_byols_dialect_is_refused_where_it_would_be_taken_for_torchvisions(
    folder: Path, name: str, options: dict[str, Any], words: str
) -> None:
    plan = [ViewSpec("image", 24, box={"whole": {}}, **options)]
    with (
        beton.open(folder / "raw.beton") as files,
        pytest.raises(ConfigError, match=f"'image': {name} has no .*{words}"),
    ):
        start_peer(name, job(files, "views", plan))


@pytest.mark.parametrize("name", ["pil", "torchvision-v2", "kornia"])
def test_peers_make_our_pixels(folder: Path, name: str) -> None:
    """Without chance in the plan, a peer's view is ours: grey, then solarised, then normalised."""
    if name == "kornia":
        pytest.importorskip("kornia")
    ops = (("grey", 1.0), ("solarise", 1.0, {"threshold": 0.4}))
    plan = [ViewSpec("image", 24, box={"whole": {}}, flip=1.0, ops=ops)]
    with beton.open(folder / "raw.beton") as files:
        everybody = job(files, "views", plan)
        ours = torch.cat([batch[0] for batch in batches_of(start_ours("torchvision", everybody), 12)])
        theirs = torch.cat([batch[0] for batch in batches_of(start_peer(name, everybody), 12)])
    level = 1 / (255 * 0.224)  # grey levels are rounded by some; the orders differ
    nearest = (ours[:, None] - theirs[None]).abs().flatten(2)
    assert nearest.median(2).values.min(1).values.max() < 1.1 * level
    assert sorted(nearest.mean(2).argmin(1).tolist()) == list(range(12))


# -- taking turns


class Scripted(PeerBase):
    """Makes nothing, as many images as asked for (or too few), and notes its turns."""

    how = "scripted"

    def __init__(self, everybody: Job, title: str, turns: list[str], short: int = 0, fails_at: int | None = None):
        super().__init__(everybody)
        self.title, self.turns, self.short, self.fails_at = title, turns, short, fails_at

    def batches(self, num_images: int) -> Iterator[tuple[int, list[Tensor]]]:
        self.turns.append(self.title)
        if self.fails_at is not None and self.turns.count(self.title) > self.fails_at:
            raise RuntimeError("out of memory\nand more")
        yield num_images - self.short, []


def run_race(
    monkeypatch: pytest.MonkeyPatch, passes: dict[str, Any], rounds: int = 3
) -> tuple[list[race.Entrant], list[race.Entrant], list[str]]:
    """A race of scripted peers, the first of them ours; every pass takes 1 s more than the one before."""
    turns: list[str] = []
    clock = iter(range(1000))
    monkeypatch.setattr(race, "perf_counter", lambda: sum(range(next(clock))))
    everybody = job(range(400), "views")
    entrants = [
        race.Entrant(name, Scripted(everybody, name, turns, **options), is_ours=number == 0)
        for number, (name, options) in enumerate(passes.items())
    ]
    finished = race.race(entrants, everybody, rounds=rounds, seconds=2.0, say=lambda line: None)
    return entrants, finished, turns


def test_turns_rotate_and_ratios_stand_in_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    entrants, finished, turns = run_race(monkeypatch, {"ours": {}, "b": {}, "c": {}})
    assert finished == entrants
    warm_up = len(turns) - 9
    assert turns[warm_up:] == ["ours", "b", "c", "b", "c", "ours", "c", "ours", "b"]
    ours, b, _ = entrants
    expected = [
        (ours.images / mine) / (b.images / theirs) for mine, theirs in zip(ours.seconds, b.seconds, strict=True)
    ]
    assert race.ratios(ours, b) == pytest.approx(expected)
    assert len(set(expected)) == 3
    assert race.spread([3.0, 1.0, 2.0, 9.0]) == {"median": 2.5, "min": 1.0, "max": 9.0, "values": [3.0, 1.0, 2.0, 9.0]}


def test_a_peer_that_fails_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    entrants, finished, _ = run_race(monkeypatch, {"ours": {}, "b": {"fails_at": 3}, "c": {"short": 4}, "d": {}})
    assert [entrant.name for entrant in finished] == ["ours", "d"]
    assert entrants[1].failure == "out of memory"
    assert "4 were wanted" in str(entrants[2].failure)
    assert len(entrants[3].seconds) == 3


def test_a_failure_of_ours_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        run_race(monkeypatch, {"ours": {"fails_at": 4}, "b": {}})


def test_a_pass_is_as_long_as_asked_and_divides_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Scripted(job(range(1000), "views", num_cores=3), "ours", [])
    taken = {12: 0.01, 48: 0.04, 192: 0.2, 768: 0.8, 996: 1.0}
    monkeypatch.setattr(race, "timed_pass", lambda _, count: taken[count])
    entrant = race.Entrant("ours", peer, is_ours=True)
    race.warm_up(entrant, peer.job, seconds=0.5)
    assert entrant.images == 480  # 192 images in 0.2 s, so 480 in 0.5 s, a multiple of 4 x 3
    race.warm_up(entrant, peer.job, seconds=5.0)
    assert entrant.images == 996  # all there are


# -- cores, threads, images


def test_cores_and_threads_are_given_back() -> None:
    allowed, count = os.sched_getaffinity(0), torch.get_num_threads()
    release = threading.Event()
    seen: list[set[int]] = []
    thread = threading.Thread(target=lambda: (release.wait(30), seen.append(os.sched_getaffinity(0))))

    def interrupted() -> None:
        with cores.bound_to(1) as bound, cores.torch_threads(3):
            assert bound == len(os.sched_getaffinity(0)) == 1
            assert torch.get_num_threads() == 3
            thread.start()
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    release.set()
    thread.join()
    assert os.sched_getaffinity(0) == allowed
    assert seen == [allowed]  # a thread that was started inside as well
    assert torch.get_num_threads() == count


def test_more_cores_than_there_are_is_refused() -> None:
    there = cores.available_cores()
    with pytest.raises(ConfigError, match=f"between 1 and {there}"), cores.bound_to(there + 1):
        pass
    with cores.bound_to(None) as bound:
        assert bound == there


def test_few_images_come_up_several_times_and_many_are_spread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with beton.open(folder / "raw.beton") as files:
        tiled = images.prepare(files, least=30)
        assert len(tiled) == 30
        assert np.bincount(tiled.ids).tolist() == [3] * 6 + [2] * 6
        monkeypatch.setattr(images, "MOST_BYTES", 5 * 40 * 48 * 3)
        assert images.prepare(files, least=5).ids.tolist() == spread_rows(12, 5).tolist()
        assert images.prepare(files, least=1).ids.tolist() == spread_rows(12, 5).tolist()


# -- names


def test_cases_are_named_plans_or_recipes() -> None:
    assert [cases.num_views(cases.CASES[name].plan) for name in ("2x224", "5sizes", "cifar-k32")] == [2, 5, 32]
    (recipe,) = cases.find_cases("ressl/cifar10_cpu")
    assert [spec.name for spec in recipe.plan] == ["teacher", "student"]
    assert cases.find_cases("2x224") == [cases.CASES["2x224"]]
    with pytest.raises(ConfigError, match="unknown case: '2x225'; did you mean '2x224'"):
        cases.find_cases("2x225")


def test_crops_only_keeps_the_crops() -> None:
    (spec,) = cases.crops_only(PLAN[:1])
    assert (spec.ops, spec.normalize, spec.flip, spec.box, spec.count) == ((), None, 0.4, PLAN[0].box, 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"peers": ["pill"]}, "unknown peer: 'pill'; did you mean 'pil'"),
        ({"measures": ["crop"]}, "did you mean 'crops'"),
        ({"peers": ["ffcv"], "measures": ["views"]}, "'ffcv' takes part in crops only"),
        ({"cases": ["5size"]}, "did you mean '5sizes'"),
        ({"engines": ["torchvison"]}, "did you mean 'torchvision'"),
        ({"engines": []}, "at least one engine"),
        ({"repeats": 0}, "--repeats"),
        ({"seconds": 0.0}, "--seconds"),
        ({"device": "gpu"}, "--device"),
        ({"cores": 10_000}, "--cores"),
        ({"step": "ressl/cifar10_cpus"}, "there is no recipe"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        views.bench_views(settings(folder, **wrong), say=lambda line: None)


def test_a_file_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        views.bench_views(settings(folder, data=[folder / "none.beton"]), say=lambda line: None)


# -- the whole of it


def settings(folder: Path, **changes: Any) -> views.Settings:
    small = {
        "data": [folder / "raw.beton"],
        "baseline": [folder / "jpeg.beton"],
        "cases": [str(write_recipe(folder))],
        "engines": ["torchvision"],
        "peers": ["pil", "decode"],
        "cores": 1,
        "batch": 4,
        "repeats": 2,
        "seconds": 0.01,
        "device": "cpu",
        "least_images": 16,
    }
    return views.Settings(**{**small, **changes})


def write_recipe(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    if not path.exists():
        tiny.write_recipe(folder, train__batch_size=8, method__queue_size=16)
    return path


@pytest.mark.slow
def test_a_run_gives_table_json_and_picture(folder: Path, tmp_path: Path) -> None:
    before = os.sched_getaffinity(0), torch.get_num_threads()
    said: list[str] = []
    result = views.bench_views(
        settings(folder, step=str(write_recipe(folder))), command="relssl bench", say=said.append
    )
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == before
    result = json.loads(json.dumps(result))

    crops, complete = result["measurements"]
    assert [peer["name"] for peer in crops["peers"]] == ["torchvision", "decode", "pil"]
    assert [peer["name"] for peer in complete["peers"]] == ["torchvision", "pil"]
    assert crops["storage"] == "raw pixels, peers from JPEG"
    assert complete["views_per_image"] == 3
    mine, theirs = (peer["images_per_second"]["values"] for peer in complete["peers"])
    (ratio,) = complete["ratios"]
    assert (ratio["ours"], ratio["peer"]) == (OURS, "PIL + torchvision v1")
    assert ratio["ratio"]["values"] == pytest.approx([a / b for a, b in zip(mine, theirs, strict=True)])
    assert complete["peers"][0]["views_per_second"]["median"] == pytest.approx(3 * np.median(mine))
    assert result["settings"]["cores"] == 1
    assert result["command"] == "relssl bench"
    assert result["data"]["images"] == 12
    assert result["environment"]["processor"]
    assert result["step"]["ratio"]["values"] == pytest.approx(
        [a / b for a, b in zip(*(result["step"][kind]["values"] for kind in ("fed", "resident")), strict=True)]
    )
    assert all(0 <= share <= 1 for share in result["step"]["waiting"]["values"])

    lines = text(result)
    for expected in ("decode + crops", "complete views", "decode alone", "PIL + torchvision v1", "views at rest"):
        assert expected in lines
    for name, start in (("bench.svg", b"<?xml"), ("bench.png", b"\x89PNG")):
        written = views.write_outputs(result, tmp_path / "bench.json", tmp_path / name)
        assert written == [tmp_path / "bench.json", tmp_path / name]
        assert (tmp_path / name).read_bytes().startswith(start)
    assert json.loads((tmp_path / "bench.json").read_text()) == result


def test_outputs_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    record.check_outputs(tmp_path / "bench.json", tmp_path / "bench.svg")
    record.check_outputs(None, None)
    with pytest.raises(ConfigError, match=r"'bench\.txt'"):
        record.check_outputs(None, tmp_path / "bench.txt")
    with pytest.raises(ConfigError, match="none does not exist"):
        record.check_outputs(tmp_path / "none" / "bench.json", None)


@pytest.mark.parametrize(("storage", "target"), [("jpeg", 4.0), ("raw", 10.0)])
def test_the_ratio_that_is_wanted_depends_on_the_storage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, storage: str, target: float
) -> None:
    engines = {("views", "resident"): 2.0}  # an engine of ours may have the name of a peer
    case = cases.Case("tiny", tuple(PLAN), {("views", "pil"): 4.0, **engines}, {("views", "pil"): 10.0, **engines})
    monkeypatch.setattr(views, "find_cases", lambda name: [case])
    run = settings(
        folder,
        data=[folder / f"{storage}.beton"],
        engines=["torchvision", "resident", "auto"],
        peers=["pil", "torchvision-v2"],
        measures=["views"],
    )
    result = views.bench_views(run, say=lambda line: None)
    (measurement,) = result["measurements"]
    wanted = {entry["peer"]: entry["target"] for entry in measurement["ratios"] if entry["ours"] == OURS}
    assert wanted == {"relssl (resident)": None, "PIL + torchvision v1": target, "torchvision v2": None}
    assert [entry["reason"] for entry in measurement["left_out"]] == ["engine auto: the same as relssl (resident)"]
    assert f"at least {target:g} wanted" in text(result)


def test_a_training_step_is_timed_fed_and_at_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[bool] = []

    def run(stepper: Any, batches: Iterator[Any], updates: int) -> tuple[float, float]:
        is_fed = not isinstance(batches, itertools.repeat)
        assert [len(batch) for batch in itertools.islice(batches, 3)] == [8, 8, 8]
        turns.append(is_fed)
        return (2.0, 0.5) if is_fed else (1.0, 0.0)

    monkeypatch.setattr(step._Stepper, "run", run)
    recipe = config.load_recipe(write_recipe(folder))
    with beton.open(folder / "train.beton") as files:
        result = step.bench_step(
            recipe,
            files,
            engine="torchvision",
            device=torch.device("cpu"),
            cores=1,
            rounds=2,
            seconds=10.0,
            say=lambda line: None,
        )
    assert turns[2:] == [True, False, False, True]  # after the warm-up, in turns
    assert result["updates"] == 40
    assert result["fed"]["values"] == [160.0, 160.0]
    assert result["resident"]["values"] == [320.0, 320.0]
    assert result["ratio"]["values"] == [0.5, 0.5]
    assert result["waiting"]["values"] == [0.25, 0.25]


def test_absent_packages_and_unfit_storage_are_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, "kornia", ("crops",))
    monkeypatch.setattr(peers, "import_module", missing_package(peers.import_module))
    run = settings(folder, baseline=[], peers=["decode", "kornia"], measures=["crops"])
    result = views.bench_views(run, say=lambda line: None)
    (measurement,) = result["measurements"]
    assert [peer["name"] for peer in measurement["peers"]] == ["torchvision"]
    decode, kornia = (entry["reason"] for entry in measurement["left_out"])
    assert "raw pixels" in decode
    assert "kornia cannot be imported" in kornia
    assert kornia in text(result)


def missing_package(real: Any) -> Any:
    def load(name: str) -> Any:
        if name.startswith("kornia"):
            raise ImportError("No module named 'kornia'")
        return real(name)

    return load
