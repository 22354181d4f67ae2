"""The smoke table: cells are filled once, stopped commands go on, and what is not above random weights is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cifar_table
from relssl.methods import method_names
from tests.relssl import tiny

SMALL = ["train.epochs=1", "train.batch_size=16", "eval.online=null", "eval.linear.options={epochs: 2}", "eval.knn.k=3"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "table"
    folder.mkdir()
    for split, seed in (("train", 0), ("test", 1)):
        tiny.write_data(folder / f"cifar10-{split}.beton", seed=seed, side=32)
    return folder


def table(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    files = ["--json", str(out / "table.json"), "--markdown", str(out / "table.md")]
    code = cifar_table.main(["--out", str(out), "--methods", "rotation,random", *files, *arguments])
    return code, json.loads((out / "table.json").read_text()) if (out / "table.json").exists() else {}


def cell(method: str, mean: float, std: float, seed: int = 0) -> dict[str, Any]:
    return {
        "method": method, "trains": method != "random", "train_seed": seed, "epochs": 3, "views_seen": 600_000,
        "train_seconds": 120.0, "knn": {"k": 20, "top1": 40.0}, "date": "2026-11-22T10:00:00",
        "linear": {"protocol": "relational", "seeds": [0, 1, 2], "mean": mean, "std": std},
        "settings": {"backbone": {"name": "conv4"}},
    }  # fmt: skip


def test_cells_are_filled_and_kept(out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    _, result = table(out, *SMALL)
    assert [c["method"] for c in result["cells"]] == ["rotation", "random"]
    rotation, random = result["cells"]
    assert rotation["views_seen"] == 4 * tiny.COUNT
    assert rotation["train_seconds"] > 0
    assert (random["epochs"], random["views_seen"], random["trains"]) == (0, 0, False)
    assert rotation["linear"]["seeds"] == [0, 1, 2]
    assert rotation["settings"]["data"]["train"] == "cifar10-train.beton"  # its name, not where it lies
    assert "rotation" in capsys.readouterr().out
    assert "not a ranking" in (out / "table.md").read_text()

    def never(*_: Any, **__: Any) -> int:
        raise AssertionError("a filled cell was trained again")

    monkeypatch.setattr(cifar_table, "train", never)
    assert table(out, *SMALL)[1]["cells"] == result["cells"]


def test_a_stopped_command_writes_no_table_and_goes_on(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cifar_table.train
    monkeypatch.setattr(cifar_table, "train", lambda *_, **__: 130)
    assert table(out, *SMALL) == (130, {})
    monkeypatch.setattr(cifar_table, "train", real)
    assert len(table(out, *SMALL)[1]["cells"]) == 2


def test_cells_of_another_recipe_are_not_mixed_in(out: Path, capsys: pytest.CaptureFixture) -> None:
    table(out, *SMALL)
    code, _ = table(out, *SMALL, "optim.lr=0.5")
    assert code == 2
    assert "was made with another recipe" in capsys.readouterr().err


def test_images_from_a_folder(tmp_path: Path, out: Path) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for label in tiny.CLASSES:
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for i in range(10):
                Image.new("RGB", (32, 32), (20 * i, 9, 9)).save(tmp_path / "images" / split / label / f"{i}.png")
    (out / "cifar10-test.beton").unlink()
    _, result = table(out, "--images", str(tmp_path / "images"), *SMALL)
    assert len(result["cells"]) == 2


@pytest.mark.parametrize(("mean", "std", "above"), [(35.0, 0.5, True), (32.0, 0.9, False), (30.0, 0.0, False)])
def test_above_random_by_two_standard_deviations(mean: float, std: float, above: bool) -> None:
    cells = [cell("simclr", mean, std), cell("random", 30.0, 0.5), cell("random", 50.0, 0.0, seed=1)]
    assert cifar_table.is_above(cells[0], cells) is above
    assert cifar_table.is_above(cells[1], cells) is None
    assert cifar_table.is_above(cells[0], cells[:1]) is None
    row = cifar_table.rows({"cells": cells})[1]
    assert row[-1] == f"{mean - 30:+.2f}" + ("" if above else " (NO)")
    assert row[4:6] == ["120 s", "5,000"]


def test_every_method_has_a_cell() -> None:
    result = json.loads((cifar_table.ROOT / "benchmarks/results/cifar_table.json").read_text())
    assert sorted(c["method"] for c in result["cells"]) == method_names()
    assert cifar_table.page(result) == (cifar_table.ROOT / "docs/cifar10.md").read_text()
