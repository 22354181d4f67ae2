"""`relssl compare`: runs side by side, from what their results.json and config.yaml say.

A row is a recipe on its data and how far it was trained; runs that differ in their training seed only share it. A
column is a measure under one protocol on one pair of data files. Figures of different protocols or data never share a
column. Data are known by their content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pipelines.errors import InputError
from relssl.config import read_yaml
from relssl.measurement import Measurement, labelled, protocol_name, short_hash, tell_apart, tellers
from relssl.report import DISPLAY
from relssl.runfolder import RESUMABLE, RunFolder, flat_settings, read_results

# What the table shows of an evaluator; of others the first accuracy of an entry, top-1 where there is one.
SHOWN = {
    "analysis": ("label_free.rankme", "label_free.uniformity", "label_free.alignment"),
    "fewlabel": (),
}
METRICS = {"top1": "top-1", "top5": "top-5", "map": "mAP"}


@dataclass(frozen=True)
class Cell:
    """A figure. `over` says what the standard deviation is over: "training seeds", "evaluation seeds" or "".

    `values` are the single runs' means, or the single evaluations of one run.
    """

    mean: float
    std: float
    over: str
    values: tuple[float, ...]
    seeds: tuple[int, ...]  # training seeds it is made of

    def text(self, digits: int = 2) -> str:
        spread = f" ± {self.std:.{digits}f}" if self.over else ""
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class TrainingData:
    """What a run was trained on: its content, or, of files that have no hash, where they lay and how many images."""

    hash: str | None
    place: str = ""
    images: int | None = None

    @property
    def text(self) -> str:
        """What tells it from other data of the same name."""
        return short_hash(self.hash) if self.hash else self.place


@dataclass
class Column:
    """One figure of one measurement, with an entry that tells its protocol."""

    measurement: Measurement
    metric: str
    label: str
    entry: Mapping[str, Any]

    @property
    def is_percent(self) -> bool:
        return not self.metric.startswith("label_free.")

    @property
    def digits(self) -> int:
        return 2 if self.is_percent or self.metric.endswith("rankme") else 3


@dataclass
class Row:
    """Runs of one recipe on the same data, at one epoch."""

    label: str
    place: str  # the folder that its runs lie in
    entry: Mapping[str, Any]  # any of its entries: method, backbone, epochs, batch
    data: str  # names of the files it was trained on
    trained_on: TrainingData
    seeds: list[int]
    cells: dict[tuple[Measurement, str], Cell]


@dataclass
class Comparison:
    """Rows in the order of the runs given, random weights last. `left_out` are runs without results."""

    rows: list[Row]
    columns: list[Column]
    entries: dict[Measurement, Mapping[str, Any]]
    left_out: list[Path] = field(default_factory=list)

    def cell(self, row: Row, column: Column) -> Cell | None:
        return row.cells.get((column.measurement, column.metric))


def compare(folders: Sequence[Path]) -> Comparison:
    """What can be said of runs side by side.

    Raises:
        InputError: a folder that is not a run's, no results at all, or no measure that two rows have in common.
    """
    runs = [_Run.read(path) for path in _distinct(folders)]
    left_out = [run.path for run in runs if not run.results]
    runs = [run for run in runs if run.results]
    if not runs:
        names = ", ".join(map(str, left_out))
        raise InputError(f"nothing was evaluated yet in {names}; for example: relssl eval knn --weights {left_out[0]}")
    groups: dict[tuple[str, ...], list[tuple[_Run, list[dict[str, Any]]]]] = {}
    for run in runs:
        for (weights, epochs, imported), part in run.parts().items():
            key = _place(groups, (weights, epochs, imported, run.identity(weights)), run)
            groups.setdefault(key, []).append((run, part))
    keys = sorted(groups, key=lambda key: key[0] == "random")
    rows = [_row(groups[key], key[0]) for key in keys]
    _label_rows(rows)
    entries: dict[Measurement, Mapping[str, Any]] = {Measurement.of(e): e for run in runs for e in run.results}
    columns = _columns(entries, rows)
    shared = [c for c in columns if sum((c.measurement, c.metric) in row.cells for row in rows) > 1]
    if not shared:
        raise InputError(_nothing_shared(rows, entries))
    return Comparison(rows, columns, entries, left_out)


def _distinct(folders: Sequence[Path]) -> list[Path]:
    found: dict[Path, Path] = {}
    for path in folders:
        found.setdefault(path.resolve(), path)
    return list(found.values())


@dataclass
class _Run:
    path: Path
    config: dict[str, Any]
    results: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> _Run:
        if not path.is_dir():
            raise InputError(f"{path} is not a folder; expected the folders of runs, as `relssl train` makes them")
        folder = RunFolder(path)
        if not (folder.config.is_file() or folder.results.is_file()):
            raise InputError(f"{path} is not a run folder: it has neither config.yaml nor results.json")
        config = read_yaml(folder.config) if folder.config.is_file() else {}
        return cls(path, config, [e for e in read_results(path) if isinstance(e, dict)])

    @property
    def seed(self) -> int:
        train = self.config.get("train")
        seed = train.get("seed", 0) if isinstance(train, dict) else self.results[0].get("train_seed", 0)
        return int(seed or 0)

    def identity(self, weights: str) -> str:
        """What runs of one recipe have in common; of random weights only what the backbone and its images are."""
        if not self.config:
            return str(self.path.resolve())
        settings = flat_settings(self.config)
        if weights == "random":
            kept = ("backbone", "views.normalize", "eval.view")
            settings = {k: v for k, v in settings.items() if any(k == p or k.startswith(p + ".") for p in kept)}
        else:
            free = ("train.seed", *RESUMABLE)
            settings = {k: v for k, v in settings.items() if not any(k == p or k.startswith(p + ".") for p in free)}
            settings["data.train"] = astuple(self.trained_on)
            method_file = RunFolder(self.path).method_file
            if method_file.is_file():
                settings["method.name"] = method_file.read_text(encoding="utf-8")
        return json.dumps(settings, sort_keys=True, default=str)

    @property
    def files(self) -> list[str]:
        """What it was trained on, as its configuration has it."""
        section = self.config.get("data")
        files = section.get("train") if isinstance(section, dict) else None
        return [str(name) for name in (files if isinstance(files, list) else [files] if files else [])]

    @cached_property
    def trained_on(self) -> TrainingData:
        """By content; a file may have been moved, or replaced by another, since.

        Where no hash was recorded, not what lies at the place now: it may have come after the training.
        """
        told = RunFolder(self.path).training_data() or {}
        if told.get("hash"):
            return TrainingData(str(told["hash"]))
        places = told.get("files") or [str(Path(name).resolve()) for name in self.files]
        return TrainingData(None, " + ".join(map(str, places)), told.get("images"))

    def parts(self) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
        """Entries by weights, epochs, and what they were read or imported from, if not the run's finished backbone."""
        found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for entry in self.results:
            imported = entry.get("imported") or {}
            place = f"{entry.get('update') or ''} {entry.get('weights_file') or ''}"
            source = f"{place} {imported.get('sha256', '')} {imported.get('branch', '')}"
            found.setdefault((str(entry.get("weights")), str(entry.get("epochs")), source), []).append(entry)
        return found


def number_or_unknown(value: Any) -> str:
    """A number, or that nobody knows it, as of weights that were imported."""
    return "unknown" if value is None else str(value)


def _place(
    groups: Mapping[tuple[str, ...], list[tuple[_Run, Any]]], key: tuple[str, ...], run: _Run
) -> tuple[str, ...]:
    """The group a run belongs to. A second run of one training seed has a row of its own, so that none counts twice.

    Random weights of one seed are the same weights: there, evaluations are put together.
    """
    number = 0
    while key[0] != "random" and any(other.seed == run.seed for other, _ in groups.get((*key, str(number)), ())):
        number += 1
    return (*key, str(number))


def _row(members: Sequence[tuple[_Run, list[dict[str, Any]]]], weights: str) -> Row:
    collected: dict[tuple[Measurement, str], dict[int, Mapping[str, Any]]] = {}
    for run, entries in members:
        for entry in sorted(entries, key=lambda e: len(e.get("seeds") or [])):  # the most seeds count
            for metric, score in metrics_of(entry):
                collected.setdefault((Measurement.of(entry), metric), {})[run.seed] = score
    cells = {key: _cell(scores) for key, scores in collected.items()}
    names = list(dict.fromkeys(_base_name(run, len(members) > 1) for run, _ in members))
    first, entry = members[0][0], members[0][1][-1]
    label = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    if weights == "random":
        label = f"random {entry.get('backbone')}"
    data = " + ".join(Path(name).stem for name in first.files)
    seeds = sorted({run.seed for run, _ in members})
    return Row(label, str(first.path.parent), entry, data, first.trained_on, seeds, cells)


def _base_name(run: _Run, is_one_of_several: bool) -> str:
    name = run.path.resolve().name
    return re.sub(r"[-_.]?seed[-_]?\d+$", "", name) or name if is_one_of_several else name


def _cell(scores: Mapping[int, Mapping[str, Any]]) -> Cell:
    """Over training seeds where there are several, else what the evaluation says of one."""
    if len(scores) > 1:
        means = [float(score["mean"]) for score in scores.values()]
        return Cell(mean(means), stdev(means), "training seeds", tuple(means), tuple(scores))
    (score,) = scores.values()
    values = tuple(float(v) for v in score.get("values") or [score["mean"]])
    over = "evaluation seeds" if len(values) > 1 else ""
    return Cell(float(score["mean"]), float(score.get("std") or 0.0), over, values, tuple(scores))


def metrics_of(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, {"mean", "std", "values"}) of every figure of an entry, also inside its sections and its curve."""
    for key, value in entry.items():
        if isinstance(value, Mapping):
            if isinstance(value.get("mean"), (int, float)):
                yield prefix + key, value
            elif key == "label_free":
                for name in ("rankme", "uniformity", "alignment"):
                    if isinstance(value.get(name), (int, float)):
                        yield f"label_free.{name}", {"mean": value[name]}
            elif not prefix and key not in ("protocol", "classifier"):
                yield from metrics_of(value, f"{key}.")
        elif key == "curve" and isinstance(value, list):
            for point in value:
                if isinstance(point, Mapping) and isinstance(point.get("top1"), Mapping):
                    yield f"top1 at {_amount(point)}", point["top1"]


def _amount(point: Mapping[str, Any]) -> str:
    return f"{point.get('per_class')} a class" if point.get("percent") is None else f"{point['percent']:g} %"


def _label_rows(rows: Sequence[Row]) -> None:
    """Rows of one label get what the first of these says where it differs among them, and so on; at last a number."""
    told: list[Callable[[Row], str]] = [
        lambda row: f" (epoch {number_or_unknown(row.entry.get('epochs'))})",
        lambda row: "" if row.entry.get("update") is None else f" (update {row.entry['update']})",
        lambda row: f" in {row.place}",
        lambda row: f" ({(row.entry.get('imported') or {}).get('file')})",
        lambda row: f" ({row.entry.get('weights_file') or row.entry.get('weights')})",
    ]

    def teller(tell: Callable[[Row], str]) -> Callable[[Sequence[int]], Sequence[str]]:
        return lambda places: [tell(rows[place]) for place in places]

    def number(places: Sequence[int]) -> list[str]:
        return [f" #{place}" for place, _ in enumerate(places, start=1)]

    words = tell_apart([row.label for row in rows], [*map(teller, told), number])
    for row, more in zip(rows, words, strict=True):
        row.label += "".join(more)


def _columns(entries: Mapping[Measurement, Mapping[str, Any]], rows: Sequence[Row]) -> list[Column]:
    """What the table shows, in the order of the report."""
    order = [*DISPLAY, *SHOWN]
    ranked = sorted(
        entries.items(), key=lambda item: order.index(item[0].evaluator) if item[0].evaluator in order else len(order)
    )
    columns: list[Column] = []
    for measurement, entry in ranked:
        known = [name for name, _ in metrics_of(entry)]
        first = "top1" if "top1" in known else next((n for n in known if "." not in n and " " not in n), None)
        shown = SHOWN.get(measurement.evaluator, () if first is None else (first,))
        columns += [
            Column(measurement, metric, title(measurement.evaluator, metric), entry)
            for metric in shown
            if any((measurement, metric) in row.cells for row in rows)
        ]
    names = [column.label for column in columns]
    words = tell_apart(names, tellers(names, [column.entry for column in columns]))
    for column, told in zip(columns, words, strict=True):
        column.label = labelled(column.label, told)
    return columns


def title(evaluator: str, metric: str) -> str:
    """A figure's name in a header."""
    if metric.startswith("label_free."):
        name = metric.removeprefix("label_free.")
        return "RankMe" if name == "rankme" else name
    shown = DISPLAY.get(evaluator, evaluator)
    return shown if metric == "top1" else f"{shown} {METRICS.get(metric, metric)}"


def _nothing_shared(rows: Sequence[Row], entries: Mapping[Measurement, Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        measured = dict.fromkeys(measurement for measurement, _ in row.cells)
        lines.append(f"  {row.label}: {', '.join(_measurement_text(entries[m]) for m in measured) or 'no figure'}")
    return (
        "nothing can be compared: no measure was taken by the same protocol on the same data for two of these\n"
        + "\n".join(lines)
        + "\nrun the same `relssl eval ...` with the same --train and --test on each"
    )


def _measurement_text(entry: Mapping[str, Any]) -> str:
    name = DISPLAY.get(str(entry.get("evaluator")), entry.get("evaluator"))
    return f"{name} ({protocol_name(entry)}) on {entry.get('train')} and {entry.get('test')}"
