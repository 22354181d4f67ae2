"""Runs side by side: what shares a row, what shares a column, what is written, what is refused."""

from __future__ import annotations

import copy
import csv
import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from pipelines.errors import InputError
from relssl.cli import run as relssl_run
from relssl.compare import compare
from relssl.compare_output import csv_text, draw, markdown, notes, table, text
from relssl.listing import list_runs
from relssl.report import format_table
from tests.relssl.test_report import CONFIG, SMALL, entry

HASHES = ["a" * 64, "b" * 64]
TRAINED_ON = {"images": 8400, "hash": "a" * 64}


def result(evaluator: str, *top1: float, weights: str = "pretrained", **changes: Any) -> dict[str, Any]:
    facts = {"method": "ressl", "backbone": "conv4", "epochs": 30, "global_batch": 256, "views_per_step": 3}
    if weights == "random":
        facts["epochs"] = 0
    return {**entry(evaluator, weights, *top1), **facts, "data": HASHES, **changes}


def make_run(
    folder: Path, *results: dict[str, Any], seed: int = 0, trained_on: Any = TRAINED_ON, **changes: Any
) -> Path:
    """`trained_on` None is a run whose env.json does not say it, as of earlier versions."""
    config = copy.deepcopy(CONFIG)
    config["train"]["seed"] = seed
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "env.json").write_text(json.dumps({} if trained_on is None else {"training_data": trained_on}))
    if results:
        (folder / "results.json").write_text(json.dumps({"format": 1, "results": list(results)}))
    return folder


def test_checkpoints_of_one_epoch_and_other_files_have_rows_of_their_own(tmp_path):
    a = make_run(
        tmp_path / "a",
        *(result("knn", top1, update=update) for top1, update in ((41.0, None), (39.0, 900), (40.0, 950))),
        result("knn", 45.0, weights="finetuned", weights_file="finetuned-seed0.safetensors"),
    )
    rows = table(compare([a]))[1:]
    assert [(row[0], row[-1]) for row in rows] == [
        ("a (pretrained)", "41.00"),
        ("a (update 900)", "39.00"),
        ("a (update 950)", "40.00"),
        ("a (finetuned-seed0.safetensors)", "45.00"),
    ]


def test_runs_side_by_side(tmp_path):
    a = make_run(tmp_path / "a", result("linear", 45.0, 46.0), result("knn", 41.25))
    b = make_run(tmp_path / "b", result("knn", 50.0, method="wcl"), method__name="wcl")
    assert table(compare([a, b])) == [
        ["run", "method", "epochs", "training seeds", "kNN", "linear"],
        ["a", "ressl", "30", "0", "41.25", "45.50 ± 0.71"],
        ["b", "wcl", "30", "0", "50.00", "–"],
    ]
    told = notes(compare([a, b]))
    assert told[0] == "all rows: data digits_train, backbone conv4, batch 256, views 3"
    assert "over training seeds where a row has several" in told[1]
    assert told[2].startswith(
        "kNN: weighted, k = 20, temperature 0.07; neighbours from digits_train.beton (8,400 images)"
    )
    assert "probe seed" not in "".join(told)  # rows may have other seeds


def test_training_seeds_of_a_recipe_share_a_row(tmp_path):
    runs = [
        make_run(tmp_path / f"ressl-seed{s}", result("linear", x, x + 4), seed=s)
        for s, x in ((1, 40.0), (2, 42.0), (3, 47.0))
    ]
    other = make_run(tmp_path / "long", result("linear", 60.0), seed=1, train__epochs=99)
    found = compare([*runs, other])
    assert table(found)[1:] == [
        ["ressl", "30", "1, 2, 3", "45.00 ± 3.61"],
        ["long", "30", "1", "60.00"],
    ]
    cell = found.cell(found.rows[0], found.columns[0])
    assert cell is not None
    assert (cell.over, cell.values, cell.seeds) == ("training seeds", (42.0, 44.0, 49.0), (1, 2, 3))


def test_settings_that_do_not_touch_the_training_do_not_split_a_row(tmp_path):
    a = make_run(tmp_path / "r-seed0", result("knn", 40.0), seed=0, data__train="/here/digits_train.beton")
    b = make_run(tmp_path / "r-seed1", result("knn", 42.0), seed=1, about__measured="yes", train__log_every=7)
    c = make_run(tmp_path / "c", result("knn", 42.0), seed=2, optim__lr=0.07)
    assert [row[0] for row in table(compare([a, b, c]))[1:]] == ["r", "c"]


OTHER = {"images": 8400, "hash": "c" * 64}


def seeds_of(tmp_path: Path, *runs: dict[str, Any]) -> list[list[str]]:
    """[label, data, seeds] of the rows of runs of one recipe with other training seeds."""
    folders = [
        make_run(tmp_path / f"r-seed{seed}", result("knn", 40.0 + seed), seed=seed, **changes)
        for seed, changes in enumerate(runs)
    ]
    beside = make_run(tmp_path / "z", result("knn", 9.0), train__epochs=1, data__train="z.beton")
    header, *rows = table(compare([*folders, beside]))
    assert header == ["run", "data", "epochs", "training seeds", "kNN"]
    return [[row[0], row[1], row[3]] for row in rows[:-1]]


def test_runs_on_other_data_of_one_name_share_no_row(tmp_path):
    told = [["r-seed0", "digits_train (aaaaaaaa)", "0"], ["r-seed1", "digits_train (cccccccc)", "1"]]
    elsewhere = {"data__train": "other/digits_train.beton", "trained_on": OTHER}
    assert seeds_of(tmp_path / "elsewhere", {}, elsewhere) == told
    assert seeds_of(tmp_path / "converted anew at its place", {}, {"trained_on": OTHER}) == told


def test_the_same_training_data_by_another_name_share_a_row(tmp_path):
    assert seeds_of(tmp_path, {}, {"data__train": "/elsewhere/renamed.beton"}) == [["r", "digits_train", "0, 1"]]


def test_runs_that_did_not_record_their_data_share_a_row_by_place_and_say_so(tmp_path):
    here, there = ({"data__train": f"/{place}/digits_train.beton", "trained_on": None} for place in ("here", "there"))
    assert [row[2] for row in seeds_of(tmp_path / "a", here, there)] == ["0", "1"]
    assert [row[2] for row in seeds_of(tmp_path / "b", here, {**here, "trained_on": TRAINED_ON})] == ["0", "1"]
    again = {**here, "data__train": "/here/x/../digits_train.beton"}
    assert seeds_of(tmp_path / "c", here, again) == [["r", "digits_train", "0, 1"]]
    told = notes(compare([tmp_path / "c" / name for name in ("r-seed0", "r-seed1", "z")]))
    assert told[-1] == "training data known by its place only, no hash was recorded: r"


def test_data_without_a_hash_are_known_by_the_place_that_was_recorded(tmp_path):
    """That of the configuration may be relative, which says nothing elsewhere."""
    here, there = (
        {"trained_on": {"images": 8400, "hash": None, "files": [f"/{place}/digits_train.beton"]}}
        for place in ("here", "there")
    )
    assert [row[2] for row in seeds_of(tmp_path / "a", here, here)] == ["0, 1"]
    assert seeds_of(tmp_path / "b", here, there) == [
        ["r-seed0", "digits_train (/here/digits_train.beton)", "0"],
        ["r-seed1", "digits_train (/there/digits_train.beton)", "1"],
    ]
    more = {"trained_on": {**here["trained_on"], "images": 8401}}
    assert [row[2] for row in seeds_of(tmp_path / "c", here, more)] == ["0", "1"]


def test_of_earlier_runs_the_checkpoint_says_what_they_were_trained_on(tmp_path):
    runs = [
        make_run(tmp_path / f"r-seed{seed}", result("knn", 40.0), seed=seed, trained_on=None, data__train=f"/{seed}.b")
        for seed in (0, 1, 2)
    ]
    for run, content in zip(runs, ("a", "a", "c"), strict=True):
        checkpoint = run / "checkpoints/update-00000001"
        checkpoint.mkdir(parents=True)
        state = {"format": 1, "extra": {"data": {"images": 3, "hash": content * 64}}}
        (checkpoint / "state.json").write_text(json.dumps(state))
    assert [row[-2] for row in table(compare(runs))[1:]] == ["0, 1", "2"]


def test_runs_of_a_method_file_that_was_changed_share_no_row(tmp_path):
    runs = [
        make_run(tmp_path / f"r-seed{seed}", result("knn", 40.0), seed=seed, method__name="./mine.py")
        for seed in (0, 1, 2)
    ]
    for run, content in zip(runs, ("a", "b", "b"), strict=True):
        (run / "method.py").write_text(content)
    assert [row[-2] for row in table(compare(runs))[1:]] == ["0", "1, 2"]


def test_no_training_seed_counts_twice(tmp_path):
    runs = [make_run(tmp_path / place / "r-seed0", result("knn", x)) for place, x in (("one", 40.0), ("two", 44.0))]
    rows = table(compare([*runs, runs[0]]))[1:]
    assert [(row[0], row[-1]) for row in rows] == [
        (f"r-seed0 in {tmp_path / 'one'}", "40.00"),
        (f"r-seed0 in {tmp_path / 'two'}", "44.00"),
    ]


def test_a_missing_seed_is_told(tmp_path):
    a = make_run(tmp_path / "r-seed0", result("knn", 40.0), result("linear", 50.0), seed=0)
    b = make_run(tmp_path / "r-seed1", result("knn", 42.0), seed=1)
    c = make_run(tmp_path / "c", result("linear", 1.0), train__epochs=1)
    assert table(compare([a, b, c]))[1][-2:] == ["41.00 ± 1.41", "50.00 (1 of 2 seeds)"]


@pytest.mark.parametrize(
    ("change", "label"),
    [
        ({"protocol": {**SMALL, "name": "cached"}}, ["linear (ressl_small)", "linear (cached)"]),
        (
            {"data": ["c" * 64, HASHES[1]], "train": "other.beton"},
            ["linear (digits_train.beton)", "linear (other.beton)"],
        ),
        ({"data": ["c" * 64, HASHES[1]]}, ["linear (train aaaaaaaa)", "linear (train cccccccc)"]),
        ({"protocol": {**SMALL, "lr": 7.0}}, ["linear (lr 0.2)", "linear (lr 7)"]),
        (
            {"protocol": {"name": "ressl_small", "lr": 7.0}},
            [
                "linear (optimizer sgd, lr 0.2, epochs 100, 2 more)",
                "linear (optimizer none, lr 7, epochs none, 2 more)",
            ],
        ),
        (
            {"data": [None, None], "num_train": 5},
            ["linear (8400 training images)", "linear (5 training images)"],
        ),
        (
            {"data": [None, HASHES[1]]},
            ["linear (train aaaaaaaa)", "linear (train of unknown content)"],
        ),
        (
            {"data": [*HASHES, "c" * 32], "subset": "10 %, draw 0"},
            ["linear (all images)", "linear (10 %, draw 0)"],
        ),
        (
            {"training_views": [{"size": 8, "flip": 0.5}]},
            ["linear", "linear (training views not recorded)"],
        ),
        ({"view": {"size": 8, "box": "whole"}}, ["linear", "linear (8 px)"]),
    ],
    ids=[
        *("protocol", "data", "data of one name", "setting", "settings", "no manifest", "one manifest", "share"),
        *("training views", "view"),
    ],
)
def test_other_protocols_and_data_never_share_a_column(tmp_path, change, label):
    a = make_run(tmp_path / "a", result("linear", 40.0), result("knn", 30.0))
    b = make_run(tmp_path / "b", result("linear", 50.0, **change), result("knn", 31.0), train__epochs=1)
    found = compare([a, b])
    rows = table(found)
    assert rows[0][-3] == "kNN"
    assert sorted(rows[0][-2:]) == sorted(label)
    assert [row[-2:] for row in rows[1:]] == [["40.00", "–"], ["–", "50.00"]]
    assert "more than one protocol or data set, and so more than one column: linear" in notes(found)


def test_columns_that_only_draws_and_lists_tell_apart(tmp_path):
    """Of a file with a manifest and of one without, which has no hash: names and numbers of images are the same."""
    chosen = [("10 %, draw 0", "0" * 32), ("10 %, draw 1", "1" * 32), ("mine.txt", "2" * 32), ("mine.txt", "3" * 32)]
    for name, hashes in (("with", HASHES), ("without", [None, None])):
        found = [
            result("knn", 40.0 + i, subset=told, num_train=840, data=[*hashes, images])
            for i, (told, images) in enumerate(chosen)
        ]
        runs = [make_run(tmp_path / name / str(e), *found, train__epochs=e) for e in (1, 2)]
        header, first, _ = table(compare(runs))
        assert header[-4:] == [
            "kNN (10 %, draw 0)",
            "kNN (10 %, draw 1)",
            "kNN (mine.txt, choice of images 22222222)",
            "kNN (mine.txt, choice of images 33333333)",
        ]
        assert first[-4:] == ["40.00", "41.00", "42.00", "43.00"]


@pytest.mark.parametrize("data", [None, [None, None], HASHES])
def test_shares_have_columns_of_their_own_where_their_images_have_no_hash(tmp_path, data):
    """As in entries of earlier versions."""
    found = [result("knn", 40.0 + i, subset=f"10 %, draw {i}", data=data) for i in (0, 1)]
    header, first, _ = table(compare([make_run(tmp_path / str(e), *found, train__epochs=e) for e in (1, 2)]))
    assert header[-2:] == ["kNN (10 %, draw 0)", "kNN (10 %, draw 1)"]
    assert first[-2:] == ["40.00", "41.00"]


def test_training_views_are_part_of_a_measurement(tmp_path):
    def linear(top1: float, *views: dict[str, Any]) -> dict[str, Any]:
        return result("linear", top1, training_views=list(views))

    mine, other = {"box": {"byol": {}}, "flip": 0.5}, {"box": {"byol": {"scale": [0.2, 1.0]}}, "flip": 0.5}
    a = make_run(tmp_path / "a", linear(40.0, mine), linear(41.0, other), linear(42.0, mine, {"flip": 1.0}))
    b = make_run(tmp_path / "b", linear(50.0, mine), train__epochs=1)
    header, _, second = table(compare([a, b]))
    assert len(set(header[-3:])) == 3
    assert all(label.startswith("linear (training views: ") for label in header[-3:])
    assert second[-3:] == ["50.00", "–", "–"]


def test_data_without_a_manifest_are_told(tmp_path):
    """They are known by name and number only, which may be those of other images."""
    entries = [result("knn", 40.0, data=[None, None]), result("linear", 40.0)]
    runs = [make_run(tmp_path / str(e), *entries, train__epochs=e) for e in (1, 2)]
    assert notes(compare(runs))[-1] == "data without a manifest, known by name and number of images only: kNN"


def test_data_of_one_name_are_told_apart_beneath_the_table(tmp_path):
    entries = [result("knn", 40.0), result("knn", 41.0, data=["c" * 64, HASHES[1]])]
    found = compare([make_run(tmp_path / str(e), *entries, train__epochs=e) for e in (1, 2)])
    lines = [line for line in notes(found) if line.startswith("kNN (train ")]
    assert [line.split("; content ")[1] for line in lines] == ["aaaaaaaa bbbbbbbb", "cccccccc bbbbbbbb"]
    assert "pre-trained" not in "".join(lines)


def test_the_normalisation_of_the_weights_is_theirs_and_another_one_is_not(tmp_path):
    """Methods have normalisations of their own; a view of another recipe has another recipe's."""

    def knn(top1, mean, **more):
        return result("knn", top1, view={"size": 12, "normalize": [[mean] * 3, [0.2] * 3]}, **more)

    runs = [
        make_run(tmp_path / "a", knn(40.0, 0.5, own_normalisation=True), knn(35.0, 0.1, own_normalisation=False)),
        make_run(tmp_path / "b", knn(50.0, 0.4, own_normalisation=True)),
    ]
    header, a, b = table(compare(runs))
    assert [a[-2:], b[-2:]] == [["40.00", "35.00"], ["50.00", "–"]]
    assert "normalize" in header[-1]


def test_the_csv_tells_lines_of_one_protocol_apart(tmp_path):
    entries = [
        result("knn", 40.0, view={"size": 12}),
        result("knn", 41.0, data=["c" * 64, HASHES[1], "d" * 32], subset="10 %, draw 1", update=900),
        result("linear", 42.0, weights="finetuned", weights_file="finetuned-seed0.safetensors"),
        result("linear", 43.0, data=[None, HASHES[1]], training_views=[{"flip": 0.5}]),
    ]
    runs = [make_run(tmp_path / str(e), *entries, train__epochs=e) for e in (1, 2)]
    runs.append(make_run(tmp_path / "random", result("knn", 9.0, weights="random", view={"size": 12})))
    *lines, random = csv.DictReader(io.StringIO(csv_text(compare(runs))))
    assert (random["weights"], random["pretraining_data"], random["pretraining_data_hash"]) == ("random", "", "")
    assert lines.pop()["weights"] == "random"
    told = {
        line["mean"]: [
            line[key] for key in ("weights_file", "update", "subset", "data_hashes", "view", "training_views")
        ]
        for line in lines
        if line["metric"] == "top1"
    }
    a, b, c = HASHES[0], HASHES[1], "c" * 64
    assert told == {
        "40.0": ["", "", "", f"{a} {b}", '{"size": 12}', ""],
        "41.0": ["", "900", "10 %, draw 1", f"{c} {b} {'d' * 32}", "", ""],
        "42.0": ["finetuned-seed0.safetensors", "", "", f"{a} {b}", "", ""],
        "43.0": ["", "", "", f"unknown {b}", "", '[{"flip": 0.5}]'],
    }
    assert {line["pretraining_data_hash"] for line in lines} == {"a" * 64}


def test_a_changed_protocol_is_not_named_twice(tmp_path):
    usual, changed = ({"protocol": {"name": name}} for name in ("fast probe", "fast probe (changed)"))
    a = make_run(tmp_path / "a", result("probe", 40.0, **usual))
    b = make_run(tmp_path / "b", result("probe", 50.0, **usual), result("probe", 51.0, **changed), train__epochs=1)
    assert table(compare([a, b]))[0][-2:] == ["fast probe", "fast probe (changed)"]


def test_the_same_data_by_another_name_share_a_column(tmp_path):
    a = make_run(tmp_path / "a", result("knn", 40.0))
    b = make_run(tmp_path / "b", result("knn", 50.0, train="renamed.beton"), train__epochs=1)
    assert [row[-1] for row in table(compare([a, b]))] == ["kNN", "40.00", "50.00"]


def test_most_probe_seeds_count(tmp_path):
    few, many = result("linear", 40.0), result("linear", 41.0, 43.0)
    a = make_run(tmp_path / "a", many, few)
    b = make_run(tmp_path / "b", few, train__epochs=1)
    assert [row[-1] for row in table(compare([a, b]))[1:]] == ["42.00 ± 1.41", "40.00"]


def test_a_row_for_each_epoch_and_for_random_weights(tmp_path):
    early = result("knn", 30.0, epochs=10)
    a = make_run(tmp_path / "a", early, result("knn", 40.0), result("knn", 20.0, weights="random"))
    b = make_run(tmp_path / "b", result("linear", 9.0, weights="random"), train__epochs=1)
    rows = table(compare([a, b]))
    assert rows[0][1:5] == ["method", "data", "epochs", "batch"]
    assert [(row[0], row[3], row[-2], row[-1]) for row in rows[1:]] == [
        ("a (epoch 10)", "10", "30.00", "–"),
        ("a (epoch 30)", "30", "40.00", "–"),
        ("random conv4", "0", "20.00", "9.00"),
    ]


def test_label_free_figures_have_columns_of_their_own(tmp_path):
    def analysis(rankme: float) -> dict[str, Any]:
        free = {"rankme": rankme, "uniformity": -1.5, "alignment": 0.25, "features": 64}
        return result("analysis", 0.0, top1=None, top5=None, protocol={"name": "analysis"}, label_free=free)

    a, b = (make_run(tmp_path / name, analysis(x), train__epochs=e) for name, x, e in (("a", 30.0, 1), ("b", 20.5, 2)))
    assert [row[-3:] for row in table(compare([a, b]))] == [
        ["RankMe", "uniformity", "alignment"],
        ["30.00", "-1.500", "0.250"],
        ["20.50", "-1.500", "0.250"],
    ]


def test_every_figure_is_in_the_csv(tmp_path):
    point = {"per_class": 5, "percent": None, "images": 50, "top1": {"mean": 20.0, "std": 1.0, "values": [19.0, 21.0]}}
    few = result("fewlabel", 0.0, top1=None, top5=None, curve=[point], protocol={"name": "few labels"})
    check = {"name": "L-BFGS", "top1": {"mean": 44.0, "std": 0.0, "values": [44.0]}}
    a = make_run(tmp_path / "a", result("probe", 45.0, 46.0, check=check), few)
    b = make_run(tmp_path / "b", result("probe", 50.0, 52.0), train__epochs=1)
    found = compare([a, b])
    assert table(found)[0][-1] == "fast probe"  # the curve has no column
    lines = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert [(r["run"], r["evaluator"], r["metric"], r["mean"], r["std_over"], r["values"]) for r in lines] == [
        ("a", "fewlabel", "top1 at 5 a class", "20.0", "evaluation seeds", "19.0 21.0"),
        ("a", "probe", "top1", "45.5", "evaluation seeds", "45.0 46.0"),
        ("a", "probe", "top5", "91.25", "", "91.25"),
        ("a", "probe", "check.top1", "44.0", "", "44.0"),
        ("b", "probe", "top1", "51.0", "evaluation seeds", "50.0 52.0"),
        ("b", "probe", "top5", "91.25", "", "91.25"),
    ]
    assert json.loads(lines[1]["protocol_settings"]) == SMALL


def test_text_and_markdown_hold_the_same_cells(tmp_path):
    a = make_run(tmp_path / "a", result("knn", 41.0))
    b = make_run(tmp_path / "b|c", result("knn", 50.0), train__epochs=1)
    found = compare([a, b])
    assert text(found).startswith(format_table(table(found)))
    lines = markdown(found).splitlines()
    assert lines[:2] == ["| run | epochs | training seeds | kNN |", "| --- | ---: | ---: | ---: |"]
    assert lines[3] == "| b\\|c | 30 | 0 | 50.00 |"
    assert lines[5].startswith("- all rows: ")


def test_a_run_that_was_not_evaluated_is_left_out_and_told(tmp_path):
    a = make_run(tmp_path / "a", result("knn", 41.0))
    b = make_run(tmp_path / "b", result("knn", 50.0), train__epochs=1)
    c = make_run(tmp_path / "c")
    found = compare([a, c, b])
    assert len(found.rows) == 2
    assert notes(found)[-1] == f"left out, not evaluated yet: {c}"


def test_weights_without_a_config_are_rows_of_their_own(tmp_path):
    a = make_run(tmp_path / "a", result("knn", 41.0))
    (tmp_path / "released").mkdir()
    content = {"format": 1, "results": [result("knn", 60.0, method="relicv2")]}
    (tmp_path / "released/results.json").write_text(json.dumps(content))
    assert [row[0] for row in table(compare([a, tmp_path / "released"]))[1:]] == ["a", "released"]


def test_what_cannot_be_compared(tmp_path):
    a = make_run(tmp_path / "a", result("knn", 41.0))
    b = make_run(tmp_path / "b", result("linear", 50.0), train__epochs=1)
    with pytest.raises(InputError) as error:
        compare([a, b])
    assert "nothing can be compared" in str(error.value)
    assert "  b: linear (ressl_small) on digits_train.beton and digits_test.beton" in str(error.value)
    with pytest.raises(InputError, match="nothing can be compared"):
        compare([a])
    with pytest.raises(InputError, match="relssl eval knn --weights"):
        compare([make_run(tmp_path / "empty")])
    with pytest.raises(InputError, match="is not a folder"):
        compare([a, tmp_path / "absent"])
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=r"neither config\.yaml nor results\.json"):
        compare([a, tmp_path / "other"])
    (tmp_path / "b/results.json").write_text("{")
    with pytest.raises(InputError, match="not a results file"):
        compare([a, b])


def test_the_command_writes_files_and_says_so(capsys, tmp_path):
    a = make_run(tmp_path / "a", result("knn", 41.0), result("linear", 40.0, 42.0))
    b = make_run(tmp_path / "b", result("knn", 50.0), result("knn", 9.0, weights="random"), train__epochs=1)
    files = {name: tmp_path / f"out.{name}" for name in ("csv", "svg", "md")}
    options = ["--csv", files["csv"], "--plot", files["svg"], "--markdown", files["md"]]
    assert relssl_run(["compare", str(a), str(b), *map(str, options)]) == 0
    printed = capsys.readouterr().out
    assert "random conv4" in printed
    for name, label in (("csv", "csv"), ("svg", "plot"), ("md", "markdown")):
        assert f"{label}: {files[name]}" in printed
    picture = ElementTree.parse(files["svg"])
    drawn = {element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert {"kNN", "linear", "a", "b", "41.00", "41.00 ± 1.41", "random conv4"} <= drawn
    assert files["csv"].read_text().startswith("run,method,weights")
    assert files["md"].read_text().startswith("| run |")
    assert relssl_run(["compare", str(a), str(b), "--plot", "plot.txt"]) == 2
    assert relssl_run(["compare", str(a), str(tmp_path)]) == 3


def test_a_folder_of_runs_and_a_file_of_one_are_told_what_to_give(capsys, tmp_path):
    a = make_run(tmp_path / "runs/a", result("knn", 41.0))
    assert relssl_run(["compare", str(tmp_path / "runs")]) == 3
    assert f"but 1 lie in it; give them: {tmp_path}/runs/*" in " ".join(capsys.readouterr().err.split())
    assert relssl_run(["compare", str(a / "results.json")]) == 3
    assert f"is a file; give the folder of its run: {a}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("option", ["--csv", "--plot", "--markdown"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(capsys, tmp_path, option):
    absent = tmp_path / "nodir"
    assert relssl_run(["compare", str(tmp_path / "no run"), option, str(absent / "x.svg")]) == 2
    assert f"there is no folder {absent}; make it, or name another place" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "x.svg").mkdir()
    assert relssl_run(["compare", str(tmp_path / "no run"), option, str(tmp_path / "x.svg")]) == 2
    assert "is a folder; name the file to write" in " ".join(capsys.readouterr().err.split())


def test_whiskers_are_one_standard_deviation(tmp_path, monkeypatch):
    a = make_run(tmp_path / "a", result("knn", 40.0, 42.0))
    b = make_run(tmp_path / "b", result("knn", 50.0), train__epochs=1)
    bars = []
    monkeypatch.setattr("relssl.bench.plot.draw_bar", lambda axis, place, values, *rest: bars.append(values))
    draw(compare([a, b]), tmp_path / "out.svg")
    assert bars == [
        {"median": 41.0, "min": pytest.approx(39.586, abs=1e-3), "max": pytest.approx(42.414, abs=1e-3)},
        {"median": 50.0, "min": 50.0, "max": 50.0},
    ]


# -- ls


def test_the_best_is_on_the_data_of_the_run_and_what_is_not_says_so(tmp_path):
    folder = make_run(
        tmp_path / "a",
        result("knn", 40.0),
        result("knn", 90.0, test="easy.beton"),
        result("linear", 70.0, subset="10 %, draw 0"),
    )
    own = CONFIG["data"]["test"].rpartition("/")[2]
    results = json.loads((folder / "results.json").read_text())
    for found in results["results"]:
        found["test"] = found["test"] if found["test"] == "easy.beton" else own
    (folder / "results.json").write_text(json.dumps(results))
    (row,) = list_runs(tmp_path)[1:]
    assert row[-1].startswith("kNN 40.00, linear (")
    assert row[-1].endswith(f") 70.00 [{own}, 10 %, draw 0]")


def test_runs_are_listed_with_what_they_reached(capsys, tmp_path):
    done = make_run(tmp_path / "ressl/one", result("knn", 41.0), result("linear", 50.0), result("linear", 48.0))
    (done / "backbone.safetensors").touch()
    (done / "metrics.jsonl").write_text('{"kind": "train", "update": 960, "epoch": 30.0}\n')
    half = make_run(tmp_path / "two", result("knn", 9.0, weights="random"))
    (half / "metrics.jsonl").write_text('{"kind": "train", "update": 9, "epoch": 12.345}\n{"kind": "tra')
    make_run(tmp_path / "three", method__name="./mine/byol.py")
    broken = make_run(tmp_path / "broken", result("knn", 1.0))
    (broken / "config.yaml").write_text("train: [")
    (tmp_path / "notes.txt").touch()
    assert list_runs(tmp_path)[1:] == [
        ["broken", "–", "–", "–", list_runs(tmp_path)[1][4], "–"],
        ["ressl/one", "ressl", "digits_train", "30 / 30", "finished", "kNN 41.00, linear (ressl_small) 50.00"],
        ["three", "byol", "digits_train", "0 / 30", "nothing trained yet", "not evaluated"],
        ["two", "ressl", "digits_train", "12.35 / 30", "not finished", "not evaluated"],
    ]
    assert list_runs(tmp_path)[1][4].startswith("damaged: ")
    assert relssl_run(["ls", str(tmp_path)]) == 0
    assert "12.35 / 30" in capsys.readouterr().out
    assert list_runs(done)[1][0] == "one"


def test_places_without_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert relssl_run(["ls"]) == 3
    assert "runs is not a folder" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"no run in .*config\.yaml"):
        list_runs(tmp_path)
