"""A comparison of runs as text, Markdown, CSV and a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import InputError
from relssl.compare import Cell, Column, Comparison, Row, number_or_unknown, title
from relssl.measurement import Measurement, knows_content, protocol_name, short_hash
from relssl.report import format_table, protocol_text

PLUS_MINUS = "±: standard deviation over training seeds where a row has several, else over the seeds of the evaluation"
CSV_FIELDS = (
    "run", "method", "weights", "weights_file", "pretraining_data", "pretraining_data_hash", "backbone", "epochs",
    "update", "global_batch", "views_per_step", "training_seeds", "evaluator", "protocol", "train", "test", "subset",
    "num_train", "num_test", "data_hashes", "metric", "mean", "std", "std_over", "values", "protocol_settings", "view",
    "training_views",
)  # fmt: skip


def table(comparison: Comparison) -> list[list[str]]:
    """A header and a row for each row of the comparison; what all rows share is left to `notes`."""
    facts = _facts(comparison.rows)
    differing = [name for name in facts if len(set(facts[name])) > 1 or name in ("epochs", "training seeds")]
    rows = [["run", *differing, *(column.label for column in comparison.columns)]]
    for place, row in enumerate(comparison.rows):
        cells = [_shown(row, column, comparison.cell(row, column)) for column in comparison.columns]
        rows.append([row.label, *(facts[name][place] for name in differing), *cells])
    return rows


def _shown(row: Row, column: Column, cell: Cell | None) -> str:
    if cell is None:
        return "–"
    part = f" ({len(cell.seeds)} of {len(row.seeds)} seeds)" if len(cell.seeds) < len(row.seeds) else ""
    return cell.text(column.digits) + part


def _facts(rows: Sequence[Row]) -> dict[str, list[str]]:
    told = {
        "method": [str(row.entry.get("method")) for row in rows],
        "data": _training_data(rows),
        "backbone": [str(row.entry.get("backbone")) for row in rows],
        "epochs": [number_or_unknown(row.entry.get("epochs")) for row in rows],
        "batch": [number_or_unknown(row.entry.get("global_batch")) for row in rows],
        "views": [number_or_unknown(row.entry.get("views_per_step")) for row in rows],
        "training seeds": ["unknown" if row.entry.get("imported") else ", ".join(map(str, row.seeds)) for row in rows],
    }
    for place, row in enumerate(rows):
        if row.entry.get("weights") == "random":  # nothing was trained
            for name in ("method", "data", "batch", "views"):
                told[name][place] = "–"
    return told


def _training_data(rows: Sequence[Row]) -> list[str]:
    """Names of the files; where two different data sets have one name, what tells them apart, too."""
    sets: dict[str, set[Any]] = {}
    for row in rows:
        if row.entry.get("weights") != "random":
            sets.setdefault(row.data, set()).add(row.trained_on)
    several = {name for name, found in sets.items() if len(found) > 1}
    return [f"{row.data} ({row.trained_on.text})" if row.data in several else row.data or "–" for row in rows]


def notes(comparison: Comparison) -> list[str]:
    """What a reader of the table must know: what all rows share, what ± is over, the protocol of each column."""
    facts = {name: {v for v in values if v != "–"} for name, values in _facts(comparison.rows).items()}
    table_has = table(comparison)[0]
    shared = [f"{name} {next(iter(v))}" for name, v in facts.items() if len(v) == 1 and name not in table_has]
    lines = [f"all rows: {', '.join(shared)}"] if shared else []
    lines.append(f"accuracies in percent, top-1 unless named otherwise. {PLUS_MINUS}")
    lines += _protocol_lines(comparison.columns)
    titles = [title(c.measurement.evaluator, c.metric) for c in comparison.columns]
    several = sorted({title for title in titles if titles.count(title) > 1})
    if several:
        lines.append(f"more than one protocol or data set, and so more than one column: {', '.join(several)}")
    unknown = [column.label for column in comparison.columns if not knows_content(column.entry)]
    if unknown:
        lines.append(f"data without a manifest, known by name and number of images only: {', '.join(unknown)}")
    placed = [row.label for row in comparison.rows if len(row.seeds) > 1 and _is_known_by_place(row)]
    if placed:
        lines.append(f"training data known by its place only, no hash was recorded: {', '.join(placed)}")
    if comparison.left_out:
        lines.append(f"left out, not evaluated yet: {', '.join(map(str, comparison.left_out))}")
    return lines


def _is_known_by_place(row: Row) -> bool:
    return row.entry.get("weights") != "random" and bool(row.data) and row.trained_on.hash is None


def _protocol_lines(columns: Sequence[Column]) -> list[str]:
    """A line for each measurement; where the words of two are the same, with the hashes of their data."""
    told: dict[Measurement, list[Column]] = {}
    for column in columns:
        told.setdefault(column.measurement, []).append(column)
    words = [_protocol_line(of_one[0]) for of_one in told.values()]
    lines = []
    for of_one, text in zip(told.values(), words, strict=True):
        hashes = _data_hashes(of_one[0].entry, short=True)
        more = f"; content {hashes}" if hashes and words.count(text) > 1 else ""
        lines.append(f"{', '.join(column.label for column in of_one)}: {text}{more}")
    return lines


def _protocol_line(column: Column) -> str:
    """Without the seeds, the weights and what a single run picked, which may differ from row to row."""
    of_one_row = ("seeds", "picked", "check", "update", "pretrained_on", "imported")
    return protocol_text({k: v for k, v in column.entry.items() if k not in of_one_row})


def _data_hashes(entry: Mapping[str, Any], *, short: bool = False) -> str:
    """Of the files of an evaluation, and of the chosen images; "unknown" of a file without a manifest."""
    hashes = entry.get("data")
    known = [str(value) if value else "unknown" for value in hashes] if isinstance(hashes, list) else []
    return _joined(short_hash(value) for value in known) if short else _joined(known)


def text(comparison: Comparison) -> str:
    """For a terminal."""
    return "\n".join([format_table(table(comparison)), "", *notes(comparison)])


def markdown(comparison: Comparison) -> str:
    """A table with its notes beneath."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table(comparison)]
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    lines = ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]
    return "\n".join([*lines, "", *(f"- {line}" for line in notes(comparison)), ""])


def csv_text(comparison: Comparison) -> str:
    """One line for every figure of every row, those that the table leaves out too (top-5, few-label curves)."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in comparison.rows:
        for (measurement, metric), cell in row.cells.items():
            entry = comparison.entries[measurement]
            is_trained = row.entry.get("weights") != "random"
            writer.writerow(
                {
                    "run": row.label,
                    "method": row.entry.get("method"),
                    "weights": row.entry.get("weights"),
                    "weights_file": row.entry.get("weights_file"),
                    "pretraining_data": row.data if is_trained else "",
                    "pretraining_data_hash": row.trained_on.hash if is_trained else "",
                    "backbone": row.entry.get("backbone"),
                    "epochs": row.entry.get("epochs"),
                    "update": row.entry.get("update"),
                    "global_batch": row.entry.get("global_batch"),
                    "views_per_step": row.entry.get("views_per_step"),
                    "training_seeds": "" if row.entry.get("train_seed") is None else _joined(cell.seeds),
                    "evaluator": measurement.evaluator,
                    "protocol": protocol_name(entry),
                    "train": entry.get("train"),
                    "test": entry.get("test"),
                    "subset": entry.get("subset"),
                    "num_train": entry.get("num_train"),
                    "num_test": entry.get("num_test"),
                    "data_hashes": _data_hashes(entry),
                    "metric": metric,
                    "mean": cell.mean,
                    "std": cell.std if cell.over else "",
                    "std_over": cell.over,
                    "values": _joined(cell.values),
                    "protocol_settings": measurement.protocol,
                    "view": _json_or_empty(entry.get("view")),
                    "training_views": _json_or_empty(entry.get("training_views")),
                }
            )
    return out.getvalue()


def _json_or_empty(value: Any) -> str:
    return "" if value is None else json.dumps(value, sort_keys=True)


def _joined(values: Iterable[object]) -> str:
    return " ".join(map(str, values))


def draw(comparison: Comparison, path: Path) -> Path:
    """Bars of every accuracy, a panel for each column, whiskers of one standard deviation.

    Raises:
        ConfigError: a suffix that is no picture's.
        InputError: no column is an accuracy.
    """
    from relssl.bench.plot import draw_bar, draw_grid, finish_panel

    panels = []
    for column in comparison.columns:
        bars = [(row, cell) for row in comparison.rows if (cell := comparison.cell(row, column)) is not None]
        if column.is_percent and bars:
            panels.append((column, bars))
    if not panels:
        raise InputError("there is no accuracy to draw; evaluate the runs with labels, or leave out --plot")

    def fill(axes: Any) -> None:
        for (column, bars), axis in zip(panels, axes[:, 0], strict=True):
            farthest = max(cell.mean + cell.std for _, cell in bars)
            for place, (row, cell) in enumerate(bars):
                values = {"median": cell.mean, "min": cell.mean - cell.std, "max": cell.mean + cell.std}
                draw_bar(axis, place, values, farthest, cell.text(), row.entry.get("weights") != "random")
            finish_panel(axis, [row.label for row, _ in bars], 1.22 * farthest, "%", column.label)

    return draw_grid(path, [len(bars) for _, bars in panels], 1, fill, PLUS_MINUS)
