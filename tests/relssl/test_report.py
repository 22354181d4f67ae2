"""The report of whole, partial and damaged run folders, and the final table."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipelines.errors import InputError
from relssl.charts import MOST_POINTS, Series, from_to, line_chart, nice_ticks, share_bar, short_number
from relssl.pictures import neighbour_sheet, sheet
from relssl.report import MAX_BYTES, format_table, results_table, write_report

EPOCHS, UPDATES_PER_EPOCH, BATCH = 30, 32, 256
CONFIG: dict[str, Any] = {
    "about": {
        "command": "relssl train ressl/cifar10_cpu",
        "paper": {
            "row": "ResNet-18, 200 epochs",
            "metric": "linear top-1",
            "value": 63.8,
            "source": "arXiv 2107.09282",
        },
        "measured": "unmeasured",
    },
    "data": {"train": "data/digits_train.beton", "test": "data/digits_test.beton"},
    "views": {"plan": [{"name": "teacher", "count": 1}, {"name": "student", "count": 2}]},
    "method": {"name": "ressl"},
    "backbone": {"name": "conv4"},
    "optim": {"name": "sgd", "lr": 0.06},
    "train": {"epochs": EPOCHS, "batch_size": BATCH, "seed": 7, "precision": "fp32"},
}
SMALL = {
    "name": "ressl_small",
    "optimizer": "sgd",
    "lr": 0.2,
    "epochs": 100,
    "batch_size": 256,
    "select": "best",
}


def entry(evaluator: str, weights: str, *top1: float, **changes: Any) -> dict[str, Any]:
    spread = float(np.std(top1, ddof=1)) if len(top1) > 1 else 0.0
    return {
        "evaluator": evaluator,
        "weights": weights,
        "top1": {"mean": sum(top1) / len(top1), "std": spread, "values": list(top1)},
        "top5": {"mean": 91.25, "std": 0.0, "values": [91.25]},
        "seeds": list(range(len(top1))),
        "protocol": {"k": 20, "temperature": 0.07} if evaluator == "knn" else SMALL,
        "train": "digits_train.beton",
        "test": "digits_test.beton",
        "num_train": 8400,
        "num_test": 1797,
        **changes,
    }


RESULTS = [
    entry("linear", "random", 31.0, 32.0),
    entry("knn", "random", 30.5),
    entry("knn", "pretrained", 41.25),
    entry("linear", "pretrained", 45.0, 46.0),
]


def metric_lines() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for update in range(8, EPOCHS * UPDATES_PER_EPOCH + 1, 8):
        epoch = update / UPDATES_PER_EPOCH
        lines.append(
            {
                "kind": "train",
                "update": update,
                "epoch": epoch,
                "loss": 2 + 5 * math.exp(-epoch / 8),
                "lr": 0.06 * (1 - epoch / EPOCHS),
                "images_per_second": 1024.0,
                "seconds": {"wait": 0.1, "forward": 0.6, "backward": 0.9, "optimizer": 0.2},
                "teacher_entropy": 4 - epoch / 30,
            }
        )
        if update % (UPDATES_PER_EPOCH * 5) == 0:
            scores = {"top1": 30 + epoch / 3, "top5": 80.0, "k": 20, "rankme": 10 + epoch}
            lines.append({"kind": "eval", "update": update, "epoch": epoch, "evaluator": "knn", **scores})
    return lines


def fake_run(folder: Path, *, config: Any = CONFIG, lines: Any = None, results: Any = RESULTS) -> Path:
    """A run folder as the trainer leaves it, metrics cut in the middle of a line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "env.json").write_text(json.dumps({"command": "relssl train X", "torch": "2.14.1", "devices": []}))
    whole = "".join(json.dumps(line) + "\n" for line in (metric_lines() if lines is None else lines))
    (folder / "metrics.jsonl").write_text(whole + '{"kind":"train","update":99')
    (folder / "results.json").write_text(json.dumps({"format": 1, "results": results}))
    pictures = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    sheet([("7", list(pictures))], cell=96).save(folder / "views.png")
    neighbour_sheet([(pictures[0], list(pictures[1:]))]).save(folder / "neighbours.png")
    return folder


class _Page(HTMLParser):
    """Text, tags, references and balance of a page."""

    VOID = frozenset({"meta", "img", "line", "br"})

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(page)
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href") and value]
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data.strip()


def page_of(folder: Path) -> _Page:
    out = write_report(folder)
    assert out == folder / "report.html"
    content = out.read_bytes()
    assert len(content) <= MAX_BYTES
    page = _Page(content.decode())
    assert page.open == []
    assert "script" not in page.tags
    assert all(reference.startswith("data:image/") for reference in page.references)
    return page


def test_a_whole_run_is_on_the_page(tmp_path):
    page = page_of(fake_run(tmp_path / "run"))
    assert "ReSSL on digits_train" in page.text
    for fact in (
        "backbone conv4",
        "epochs 30",
        "batch 256",
        "views per image and step 3",
        "seed 7",
        "finished",
    ):
        assert fact in page.text
    for chart in (
        "Loss",
        "Learning rate",
        "kNN accuracy while training",
        "RankMe",
        "Images per second",
        "teacher entropy",
    ):
        assert chart in page.text
    assert ["kNN top-1", "30.50", "41.25", "+10.75", "", ""] in page.cells
    assert ["linear top-1", "31.50 ± 0.71", "45.50 ± 0.71", "+14.00", "63.8", ""] in page.cells
    assert "arXiv 2107.09282" in page.text
    assert "Not comparable" not in page.text
    assert (tmp_path / "run/report.html").read_text().count('class="paper"') == 1
    assert "SGD lr 0.2; 100 epochs; batch 256; best epoch reported; probe seeds 0, 1" in page.text
    assert "trained on digits_train.beton (8,400 images); tested on digits_test.beton (1,797 images)" in page.text
    assert "relssl train X" in page.text
    assert len(page.references) == 2
    assert not list((tmp_path / "run").glob(".*"))


def test_every_evaluator_that_ran_while_training_has_its_curve(tmp_path):
    folder = fake_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        for epoch in (10, 20, 30):
            for name, scores in (
                ("linear", {"top1": 40.0}),
                ("probe", {"top1": 41.0, "top5": 90.0}),
                ("finetune", {"top1": 42.0}),
                ("fewlabel", {"top1_at_1": 12.0, "top1_at_10_percent": 30.0}),
            ):
                file.write(
                    json.dumps({"kind": "eval", "update": epoch, "epoch": epoch, "evaluator": name, **scores}) + "\n"
                )
    text = page_of(folder).text
    for title in (
        "Linear accuracy while training, %",
        "Fast probe's accuracy while training, %",
        "Fine-tuning accuracy while training, %",
        "Few labels while training, top-1, %",
        "1 a class",
        "10 %",
    ):
        assert title in text


def test_a_share_of_the_labels_is_told_of_a_single_entry_too(tmp_path):
    folder = fake_run(tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    results["results"].append(entry("finetune", "pretrained", 33.0, subset="1 %, draw 0"))
    (folder / "results.json").write_text(json.dumps(results))
    assert ["fine-tuning (1 %, draw 0) top-1", "–", "33.00"] in [row[:3] for row in page_of(folder).cells]


def test_a_continued_run_tells_of_the_updates_made_here_only(tmp_path):
    folder = fake_run(tmp_path / "run")
    page = page_of(folder)
    whole = f"{EPOCHS * UPDATES_PER_EPOCH:,} updates"
    assert whole in page.text
    lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("}\n")]
    late = [line for line in lines if json.loads(line)["update"] > EPOCHS * UPDATES_PER_EPOCH // 2]
    (folder / "metrics.jsonl").write_text("".join(late))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["train"]["log_every"] = 8
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "imported.json").write_text("{}")
    page = page_of(folder)
    assert f"{EPOCHS * UPDATES_PER_EPOCH // 2:,} updates" in page.text
    shares = {row[0]: row[2] for row in page.cells if len(row) == 3}
    assert shares["other"] == "10.0 %"


def test_time_is_shared_out_with_the_rest_of_the_wall_time_as_other(tmp_path):
    """8 updates of 256 images at 1024 images/s are 2.0 s a line, of which the parts account for 1.8 s."""
    page = page_of(fake_run(tmp_path))
    total = 2.0 * EPOCHS * UPDATES_PER_EPOCH / 8
    shares = {row[0]: row[2] for row in page.cells if len(row) == 3}
    expected = {
        "wait": "5.0 %",
        "forward": "30.0 %",
        "backward": "45.0 %",
        "optimizer": "10.0 %",
        "other": "10.0 %",
    }
    assert {name: shares[name] for name in expected} == expected
    assert f"{int(total) // 60} min {int(total) % 60:02d} s" in page.text
    assert "Median rate 1,024 images/s, 3,072 views/s" in page.text


@pytest.mark.parametrize("missing", ["config.yaml", "env.json", "metrics.jsonl", "results.json", "views.png"])
def test_a_missing_file_is_left_out(tmp_path, missing):
    folder = fake_run(tmp_path)
    (folder / missing).unlink()
    page = page_of(folder)
    gone = {
        "config.yaml": "ReSSL on",
        "env.json": "Environment",
        "metrics.jsonl": "While training",
        "results.json": "kNN top-1 30.50",
        "views.png": "What the network sees",
    }[missing]
    assert gone not in page.text
    if missing == "results.json":
        assert "Not evaluated yet" in page.text


@pytest.mark.parametrize("damaged", ["config.yaml", "env.json", "results.json", "views.png"])
def test_a_damaged_file_is_named_on_the_page(tmp_path, damaged):
    folder = fake_run(tmp_path)
    (folder / damaged).write_bytes(b"{ \xff [")
    assert f"{damaged} could not be read" in page_of(folder).text
    (folder / damaged).write_bytes(b"{ [")
    assert re.search(rf"{damaged} (is damaged|could not be read)", page_of(folder).text)
    (folder / damaged).write_bytes(b"[1, 2]")
    assert re.search(rf"{damaged} (does not hold|could not be read)", page_of(folder).text)


def test_a_killed_run_says_how_far_it_came(tmp_path):
    page = page_of(fake_run(tmp_path, lines=metric_lines()[:19], results=[]))
    assert "not finished: reached epoch 4.75 of 30" in page.text
    assert "unreadable" not in page.text
    (tmp_path / "metrics.jsonl").write_text("")
    assert "no training recorded" in page_of(tmp_path).text


def test_a_damaged_line_in_the_middle_is_counted(tmp_path):
    folder = fake_run(tmp_path)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:10]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    assert "1 unreadable line of metrics.jsonl was" in page_of(folder).text


def test_a_run_without_labels_shows_the_label_free_measures(tmp_path):
    lines = [line for line in metric_lines() if line["kind"] == "train"]
    for epoch in (5, 10):
        measures = {"evaluator": "rankme", "rankme": 20.0, "uniformity": -2.0, "alignment": 0.3}
        lines.append({"kind": "eval", "update": epoch * UPDATES_PER_EPOCH, "epoch": epoch, **measures})
    page = page_of(fake_run(tmp_path, lines=lines, results=[]))
    for chart in ("RankMe", "Uniformity", "Alignment"):
        assert chart in page.text
    assert "kNN accuracy" not in page.text


def test_hostile_text_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    config = {
        **CONFIG,
        "backbone": {"name": evil},
        "about": {"command": evil, "paper": {"row": evil, "source": evil}},
    }
    results = [entry("knn", "pretrained", 40.0, train=evil), entry(evil, "pretrained", 3.0)]
    page = page_of(fake_run(tmp_path, config=config, results=results))
    assert evil in page.text  # as text; page_of has seen no script tag


def test_odd_values_do_not_break_the_page(tmp_path):
    lines = metric_lines()
    lines[0]["loss"] = math.nan
    lines[1]["loss"] = "high"
    lines[2]["seconds"] = None
    lines[3] = {"kind": "train", "update": "many"}
    odd = {"evaluator": "linear", "weights": "pretrained", "top1": None, "top5": "x", "protocol": 3}
    page = page_of(fake_run(tmp_path, lines=lines, results=[odd, "x", entry("knn", "pretrained", 40.0, top5=None)]))
    assert "Loss" in page.text
    assert ["kNN top-1", "–", "40.00", "–", "", ""] in page.cells
    assert not any(row and row[0].startswith(("linear", "kNN top-5")) for row in page.cells)
    config = {
        "train": 3,
        "views": {"plan": ["teacher"]},
        "data": {"train": ["a.beton", "b.beton"]},
        "method": "ressl",
    }
    assert "a + b" in page_of(fake_run(tmp_path, config=config)).text


@pytest.mark.parametrize(
    ("paper", "protocol", "reason"),
    [
        ({"source": "assumption: no figure is published"}, SMALL, "rests on an assumption"),
        ({"row": "not comparable: other backbone"}, SMALL, "the recipe says so"),
        ({}, {**SMALL, "name": "cached"}, "our own quick probe"),
        ({}, {**SMALL, "name": "ressl_small (changed)"}, "our own quick probe"),
    ],
)
def test_a_paper_that_cannot_be_compared_is_marked(tmp_path, paper, protocol, reason):
    config = {**CONFIG, "about": {"paper": {**CONFIG["about"]["paper"], **paper}}}
    page = page_of(fake_run(tmp_path, config=config, results=[entry("linear", "pretrained", 45.0, protocol=protocol)]))
    assert "* Not comparable" in page.text
    assert reason in page.text
    assert 'class="paper"' not in (tmp_path / "report.html").read_text()
    assert ["linear top-1", "–", "45.00", "–", "63.8 *", ""] in page.cells


def test_settings_that_no_public_source_has_are_listed(tmp_path):
    about = {**CONFIG["about"], "assumptions": {"optim.lr": "BYOL's", "method.beta": "a guess"}}
    page = page_of(fake_run(tmp_path, config={**CONFIG, "about": about}))
    assert ["optim.lr", "BYOL's"] in page.cells
    assert ["method.beta", "a guess"] in page.cells
    assert "Not comparable with the figures above: no public source has 2 of the recipe's settings." in page.text
    assert "no public source has" not in page_of(fake_run(tmp_path)).text


@pytest.mark.slow
def test_large_pictures_are_made_smaller(tmp_path):
    folder = fake_run(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2600, 3), dtype=np.uint8)
    for name in ("views.png", "neighbours.png"):
        Image.fromarray(noise).save(folder / name)
    page = page_of(folder)
    for reference in page.references:
        kind, _, content = reference.partition(";base64,")
        assert kind == "data:image/jpeg"
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            assert image.width / image.height == pytest.approx(2600 / 1500, rel=0.01)
            assert image.width > 300


def test_pictures_give_way_when_the_rest_is_large(tmp_path):
    folder = fake_run(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (700, 1000, 3), dtype=np.uint8)
    for name in ("views.png", "neighbours.png"):
        Image.fromarray(noise).save(folder / name)
    plain = page_of(folder)
    (folder / "env.json").write_text(json.dumps({"modules": "x" * 1_000_000}))
    assert sum(map(len, page_of(folder).references)) < 0.6 * sum(map(len, plain.references))


def test_a_long_run_stays_small(tmp_path):
    lines = [
        {
            "kind": "train",
            "update": update,
            "epoch": update / 5000,
            "loss": math.sin(update),
            "lr": 0.1,
            "images_per_second": 900.0,
            "seconds": {"wait": 0.1},
        }
        for update in range(1, 40_001)
    ]
    folder = fake_run(tmp_path, lines=lines)
    page_of(folder)
    assert (folder / "report.html").stat().st_size < 400_000


def test_records_of_a_resumed_run_replace_the_earlier_ones(tmp_path):
    lines = metric_lines()
    again = [{**line, "images_per_second": 512.0} for line in lines if line["kind"] == "train"]
    assert "Median rate 512 images/s" in page_of(fake_run(tmp_path, lines=lines + again)).text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a folder"):
        write_report(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="not a run folder"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_final_table():
    rows = results_table(RESULTS)
    assert rows == [
        ["top-1 accuracy, %", "random initialisation", "pre-trained", "gain"],
        ["kNN", "30.50", "41.25", "+10.75"],
        ["linear", "31.50 ± 0.71", "45.50 ± 0.71", "+14.00"],
    ]
    lines = format_table(rows).splitlines()
    assert set(lines[1]) == {"-"}
    assert [line.split()[0] for line in lines[2:]] == ["kNN", "linear"]
    assert len({len(line) for line in lines}) == 1


def test_the_final_table_tells_protocols_apart_and_takes_the_last_of_equals():
    results = [
        *RESULTS,
        entry("linear", "pretrained", 50.0, protocol={"name": "cached"}),
        entry("knn", "random", 12.0),
    ]
    rows = results_table(results)
    assert [row[0] for row in rows[1:]] == ["kNN", "linear (ressl_small)", "linear (cached)"]
    assert rows[1][1:] == ["12.00", "41.25", "+29.25"]
    assert rows[3][1:] == ["–", "50.00", "–"]
    assert results_table([]) == rows[:1]


def with_lr(lr: float) -> dict[str, Any]:
    return {"protocol": {**SMALL, "name": "ressl_small (changed)", "lr": lr}}


def test_only_the_same_measurement_stands_beside_random_weights():
    """Of one protocol's name and of data files of one name there may be several."""
    a, b = (["a" * 64, "f" * 64], ["b" * 64, "f" * 64])
    warm = {"protocol": {"name": "kNN", "k": 20, "temperature": 1.0}, "data": a}
    cold = {"protocol": {"name": "kNN", "k": 20, "temperature": 0.07}, "data": a}
    results = [
        entry("linear", "random", 31.0, **with_lr(1e-5)),
        entry("linear", "pretrained", 45.0, **with_lr(0.001)),
        entry("knn", "random", 30.0, **cold),
        entry("knn", "random", 29.0, **{**cold, "data": b}),
        entry("knn", "pretrained", 41.0, **warm),
        entry("knn", "pretrained", 40.0, **cold),
    ]
    assert results_table(results)[1:] == [
        ["kNN (temperature 0.07, train aaaaaaaa)", "30.00", "40.00", "+10.00"],
        ["kNN (temperature 0.07, train bbbbbbbb)", "29.00", "–", "–"],
        ["kNN (temperature 1)", "–", "41.00", "–"],
        ["linear (lr 1e-05)", "31.00", "–", "–"],
        ["linear (lr 0.001)", "–", "45.00", "–"],
    ]


@pytest.mark.parametrize(
    ("change", "label"),
    [
        ({"view": {"size": 8, "box": "whole"}}, "linear (8 px)"),
        ({"subset": "10 %, draw 1"}, "linear (10 %, draw 1)"),
        ({"training_views": [{"size": 8}]}, "linear"),
        ({"num_train": 84}, "linear (84 training images)"),
        ({"weights_file": "other.safetensors"}, "linear (other.safetensors)"),
    ],
)
def test_what_else_makes_another_measurement(change, label):
    rows = results_table([entry("linear", "random", 31.0), entry("linear", "pretrained", 45.0, **change)])[1:]
    assert [row[1:] for row in rows] == [["31.00", "–", "–"], ["–", "45.00", "–"]]
    assert rows[1][0] == label
    assert rows[0][0] != label


def test_every_setting_of_a_protocol_has_its_row(tmp_path):
    results = [*RESULTS, *(entry("linear", "pretrained", 40.0 + lr, **with_lr(lr)) for lr in (1.0, 2.0))]
    assert [row[0] for row in results_table(results)[2:]] == [
        "linear (ressl_small)",
        "linear (ressl_small (changed), lr 1)",
        "linear (ressl_small (changed), lr 2)",
    ]
    page = page_of(fake_run(tmp_path, results=results))
    assert [row[-2] for row in page.cells if row[0].startswith("linear") and row[0].endswith("top-1")] == [
        "63.8",
        "",
        "",
    ]  # the paper's figure is of its protocol
    tiles = re.findall(r'class="name">([^<]+)<', (tmp_path / "report.html").read_text())
    assert tiles == [
        "kNN top-1",
        "linear (ressl_small) top-1",
        "loss",
        "images per second",
        "training time",
    ]  # one of each evaluator


def test_checkpoints_of_one_measurement_share_a_curve(tmp_path):
    def at(update: int, top1: float, **change: Any) -> dict[str, Any]:
        return entry("linear", "pretrained", top1, update=update, **change)

    results = [at(u, 40.0 + u, **with_lr(lr)) for u in (320, 640) for lr in (1.0, 2.0)]
    page = page_of(fake_run(tmp_path, results=results))
    title = "linear top-1 of checkpoints, % (ressl_small (changed), digits_train.beton): lr"
    assert f"{title} 1" in page.text
    assert f"{title} 2" in page.text


def test_ticks_enclose_the_data_in_round_steps():
    assert nice_ticks(0, 30, 5) == [0, 10, 20, 30]
    assert nice_ticks(2.1, 7.4, 5) == pytest.approx([2, 4, 6, 8])
    for low, high in ((5, 5), (0, 0), (-3e-7, 4e-7), (1e9, 1e9 + 1)):
        ticks = nice_ticks(low, high, 5)
        assert ticks[0] <= low <= high <= ticks[-1]
        assert 2 <= len(ticks) <= 9


def test_charts_draw_what_they_are_given():
    assert line_chart([Series("a", [])], x_label="epoch", label="x") == ""
    assert line_chart([Series("a", [(1, math.nan)])], x_label="epoch", label="x") == ""
    one = line_chart([Series("a", [(1, 2)])], x_label="epoch", label="x")
    assert "<circle" in one
    assert "<polyline" not in one
    curve = line_chart([Series("a", [(0, 0), (1, 10)])], x_label="epoch", label="x")
    (start, end) = re.search(r'<polyline class="line1" points="([^"]+)"', curve).group(1).split()
    assert float(start.split(",")[0]) < float(end.split(",")[0])
    assert float(start.split(",")[1]) > float(end.split(",")[1])  # up is a smaller y
    long = line_chart([Series("a", [(i, i % 7) for i in range(5000)])], x_label="epoch", label="x")
    assert len(re.search(r'<polyline class="line1" points="([^"]+)"', long).group(1).split()) <= MOST_POINTS
    assert "<polygon" in long


def test_bars_and_tracks():
    bar = share_bar([("wait", 1), ("forward", 3)], label="time")
    widths = [float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)"', bar)]
    assert (widths[1] + 2) / (widths[0] + 2) == pytest.approx(3, rel=0.01)
    assert "25 %" in bar
    assert share_bar([], label="time") == ""
    assert from_to(None, None) == ""
    assert 'cx="86.0"' in from_to(20, 40, 63.8)
    assert 'class="paper"' in from_to(20, 40, 63.8)
    assert 'class="paper"' not in from_to(20, 40)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.03, "0.03"), (812, "812"), (12_500, "12.5k"), (3e-5, "3e-05"), (-2e6, "-2M")],
)
def test_short_numbers(value, text):
    assert short_number(value) == text
