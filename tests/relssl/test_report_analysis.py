"""The report's sections on few labels, classes, map and label-free figures, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relssl.pictures import neighbour_sheet
from relssl.report import MAX_BYTES
from tests.relssl.test_report import RESULTS, entry, fake_run, page_of

NAMES = ["cat", "dog", "<hen>"]


def point(images: int, *top1: float, per_class: int | None = None, percent: float | None = None) -> dict[str, Any]:
    spread = float(np.std(top1, ddof=1)) if len(top1) > 1 else 0.0
    score = {"mean": sum(top1) / len(top1), "std": spread, "values": list(top1)}
    return {"per_class": per_class, "percent": percent, "images": images, "top1": score}


def few(weights: str, *curve: dict[str, Any]) -> dict[str, Any]:
    return entry("fewlabel", weights, 0.0, top1=None, top5=None, curve=list(curve), seeds=[0, 1])


def analysis(weights: str, rankme: float, **changes: Any) -> dict[str, Any]:
    rows = [{"class": name, "images": 10, "recall": 50.0, "precision": None} for name in NAMES]
    return entry("analysis", weights, 0.0) | {
        "top1": None,
        "top5": None,
        "label_free": {
            "rankme": rankme, "uniformity": -1.5, "alignment": 0.25, "features": 64, "rankme_images": 8400, "pairs": 99,
        },
        "classifier": {"top1": 51.5},
        "per_class": rows,
        "most_confused": [{"class": "cat", "taken_for": "<hen>", "images": 4, "of": 10}],
        "neighbours": {"queries": "test", "labelled": True},
        "files": {"confusion": "analysis/confusion.json", "map": "analysis/map.json",
                  "neighbours": "analysis/neighbours.png"},
        **changes,
    }  # fmt: skip


def analysed_run(folder: Path, *more: dict[str, Any]) -> Path:
    fake_run(folder, results=[*RESULTS, *more])
    (folder / "analysis").mkdir()
    confusion = {"classes": NAMES, "counts": [[5, 1, 4], [2, 8, 0], [0, 3, 7]]}
    (folder / "analysis/confusion.json").write_text(json.dumps(confusion))
    places = {"x": [0.1, 0.9], "y": [0.2, 0.8], "label": [0, 2], "classes": NAMES}
    (folder / "analysis/map.json").write_text(json.dumps({**places, "kind": "umap", "seed": 3, "images": "test"}))
    picture = np.full((8, 8, 3), 7, dtype=np.uint8)
    neighbour_sheet([(picture, [picture])], title=None).save(folder / "analysis/neighbours.png")
    return folder


CURVES = [
    few("random", point(3, 10.0, 12.0, per_class=1)),
    few("pretrained", point(3, 20.0, 22.0, per_class=1), point(6, 30.0, percent=2.0), point(300, 40.0, percent=100.0)),
]


def test_an_analysis_is_on_the_page(tmp_path):
    page = page_of(analysed_run(tmp_path / "run", *CURVES, analysis("random", 5.0), analysis("pretrained", 30.04)))
    assert ["labels", "images", "pre-trained", "random initialisation"] in page.cells
    assert ["1 a class", "3", "21.00 ± 1.41", "11.00 ± 1.41"] in page.cells
    assert ["2 %", "6", "30.00", "–"] in page.cells
    assert ["all", "300", "40.00", "–"] in page.cells
    assert "over 2 draws of labels" in page.text
    assert ["<hen>", "10", "50.0", "–"] in page.cells
    assert "cat taken for <hen>: 4 of 10" in page.text
    assert "Fast probe on pre-trained features, top-1 51.50 %" in page.text
    assert ["RankMe, the effective rank", "5.0", "30.0"] in page.cells
    assert ["uniformity", "-1.500", "-1.500"] in page.cells
    assert "of 64 features; 8,400 images" in page.text
    assert "lower is more evenly spread; 99 images" in page.text
    assert "UMAP of the features of 2 test images, seed 3" in page.text
    assert "Test images, and the training images whose pre-trained features are nearest" in page.text
    assert "analysis" not in {cell for row in page.cells for cell in row}  # no row among the accuracies
    assert page.text.count("left out") == 0


def test_the_neighbours_say_what_they_are(tmp_path):
    shown = {"queries": "train", "labelled": False}
    page = page_of(analysed_run(tmp_path / "run", analysis("pretrained", 1.0, neighbours=shown)))
    assert "Training images, and those whose pre-trained features are nearest by cosine similarity" in page.text
    assert "Green" not in page.text


def test_random_weights_alone_are_shown_as_such(tmp_path):
    page = page_of(analysed_run(tmp_path / "run", analysis("random", 5.0)))
    assert "Fast probe on random initialisation features" in page.text
    assert "Few labels" not in page.text


def test_the_last_analysis_counts(tmp_path):
    page = page_of(analysed_run(tmp_path / "run", analysis("pretrained", 1.0), analysis("pretrained", 30.0)))
    assert ["RankMe, the effective rank", "30.0"] in page.cells


A, B = (["a" * 64, "f" * 64], ["b" * 64, "f" * 64])


def test_only_equal_data_are_put_side_by_side(tmp_path):
    """Two files of one name: each has a table and a chart of its own, and the caption tells them apart."""
    results = [
        {**CURVES[0], "data": A},
        {**CURVES[1], "data": B},
        analysis("random", 5.0, data=A),
        analysis("pretrained", 30.04, data=B),
    ]
    page = page_of(analysed_run(tmp_path / "run", *results))
    assert ["labels", "images", "pre-trained"] in page.cells
    assert ["labels", "images", "random initialisation"] in page.cells
    assert ["1 a class", "3", "21.00 ± 1.41"] in page.cells
    assert ["1 a class", "3", "11.00 ± 1.41"] in page.cells
    assert [row[1:] for row in page.cells if row[0].startswith("RankMe")] == [["30.0"], ["5.0"]]
    for name in ("train aaaaaaaa", "train bbbbbbbb"):
        assert f"Of the training images, digits_train.beton ({name})." in page.text
        assert f"trained on digits_train.beton, tested on digits_test.beton ({name})." in page.text


def test_the_pair_of_equal_data_is_found_among_others(tmp_path):
    """The last random figure is of other data than the last pre-trained one."""
    entries = [analysis(w, x, data=d) for w, x, d in (("pretrained", 30.0, A), ("random", 5.0, A), ("random", 6.0, B))]
    page = page_of(analysed_run(tmp_path / "run", *entries))
    assert [row[1:] for row in page.cells if row[0].startswith("RankMe")] == [["5.0", "30.0"], ["6.0"]]


def test_other_weights_of_a_folder_are_not_shown_as_those_of_the_run(tmp_path):
    entries = [
        analysis("pretrained", 30.0, data=A, update=None),
        analysis("pretrained", 7.0, data=B, weights_file="imported.safetensors"),
        analysis("pretrained", 8.0, data=B, update=900),
    ]
    page = page_of(analysed_run(tmp_path / "run", *entries))
    assert [row[1:] for row in page.cells if row[0].startswith("RankMe")] == [["30.0"]]


def test_draws_are_told_of_both_curves(tmp_path):
    page = page_of(analysed_run(tmp_path / "run", CURVES[0], {**CURVES[1], "seeds": [0, 1, 2]}))
    assert "over 3 and 2 draws of labels" in page.text


def test_of_many_classes_the_weakest_and_the_strongest(tmp_path):
    rows = [{"class": f"c{i}", "images": 10, "recall": float(i), "precision": 1.0} for i in range(50)]
    page = page_of(analysed_run(tmp_path / "run", analysis("pretrained", 1.0, per_class=rows)))
    shown = [row[0] for row in page.cells if row[0].startswith("c") and row[0][1:].isdigit()]
    assert shown == [f"c{i}" for i in [*range(12), *range(38, 50)]]
    assert "the 12 weakest and the 12 strongest of 50 classes" in page.text


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "{}", '{"classes": 3, "counts": 4, "x": 1, "kind": "umap"}', '{"x": []}']
)
def test_damaged_files_are_told_and_left_out(tmp_path, content):
    run = analysed_run(tmp_path / "run", analysis("pretrained", 30.0))
    for name in ("confusion.json", "map.json", "neighbours.png"):
        (run / "analysis" / name).write_text(content)
    page = page_of(run)
    assert "analysis/map.json" in page.text or content == "{}"
    assert "neighbours.png could not be read" in page.text
    assert ["cat", "10", "50.0", "–"] in page.cells  # what results.json says stays


def test_absent_files_and_odd_entries_are_left_out(tmp_path):
    odd = {"evaluator": "analysis", "weights": "pretrained", "label_free": "x", "files": [], "per_class": {"a": 1}}
    curve = {"evaluator": "fewlabel", "weights": "pretrained", "curve": [{"images": 3, "top1": {"mean": "x"}}, 7]}
    page = page_of(fake_run(tmp_path / "run", results=[*RESULTS, odd, curve]))
    for heading in ("Few labels", "Classes", "Features"):
        assert heading not in page.text


def test_a_file_outside_the_run_folder_is_not_shown(tmp_path):
    (tmp_path / "secret.json").write_text(json.dumps({"classes": ["secret", "b"], "counts": [[1, 0], [0, 1]]}))
    files = {"confusion": "../secret.json", "map": "/etc/passwd"}
    page = page_of(analysed_run(tmp_path / "run", analysis("pretrained", 30.0, files=files)))
    assert "secret" not in page.text


def test_a_page_of_a_large_analysis_stays_small(tmp_path):
    names = [f"class number {i}" for i in range(100)]
    rng = np.random.default_rng(0)
    run = analysed_run(tmp_path / "run", analysis("pretrained", 30.0))
    counts = rng.integers(0, 500, (100, 100)).tolist()
    (run / "analysis/confusion.json").write_text(json.dumps({"classes": names, "counts": counts}))
    places = {"x": rng.random(5000).tolist(), "y": rng.random(5000).tolist()}
    places |= {
        "label": rng.integers(0, 100, 5000).tolist(),
        "classes": names,
        "kind": "tsne",
        "seed": 0,
        "images": "test",
    }
    (run / "analysis/map.json").write_text(json.dumps(places))
    page_of(run)
    assert len((run / "report.html").read_bytes()) < MAX_BYTES / 3
