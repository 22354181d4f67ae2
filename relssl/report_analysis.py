"""The part of the report that `relssl eval analyse` fills: few labels, classes, map, neighbours, label-free figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relssl.charts import Series, line_chart
from relssl.class_charts import MOST_IN_LEGEND, confusion_chart, map_chart
from relssl.measurement import Measurement, labelled, tell_apart, tellers

WEIGHTS = ("random", "pretrained")
NAMES = {"random": "random initialisation", "pretrained": "pre-trained"}
MOST_ROWS = 24  # of the per-class table; of more classes the weakest and the strongest
FREE = (
    ("rankme", "RankMe, the effective rank", ".1f", "of {features} features; {rankme_images:,} images"),
    ("uniformity", "uniformity", ".3f", "0 is collapse, lower is more evenly spread; {pairs:,} images"),
    (
        "alignment",
        "alignment of two crops of an image",
        ".3f",
        "0 is the same direction, 4 the opposite; {pairs:,} images",
    ),
)


def analysis_context(folder: Path, results: Sequence[Mapping[str, Any]], notes: list[str]) -> dict[str, Any]:
    """What the page shows; `notes` gains a line for every file that is there but cannot be read."""
    analyses = {w: _last(results, "analysis", w) for w in WEIGHTS}
    shown = analyses["pretrained"] or analyses["random"]
    return {
        "few_labels": _sections(results, "fewlabel", tuple(reversed(WEIGHTS)), _few_labels),
        "label_free": _sections(results, "analysis", WEIGHTS, _label_free),
        "classes": _classes(folder, shown, notes),
        "map": _map(folder, shown, notes),
        "neighbours": _neighbours(folder, shown),
        "weights": NAMES.get(str(shown.get("weights")), "") if shown else "",
    }


def _last(results: Sequence[Mapping[str, Any]], evaluator: str, weights: str) -> Mapping[str, Any]:
    """The last entry of the run's finished backbone; if it has none, that of the newest checkpoint."""
    fitting = [e for e in results if e.get("evaluator") == evaluator and e.get("weights") == weights]
    ranked = sorted(fitting, key=lambda e: (not e.get("weights_file"), e.get("update") or math.inf))
    return ranked[-1] if ranked else {}


def _sections(
    results: Sequence[Mapping[str, Any]],
    evaluator: str,
    order: Sequence[str],
    section: Callable[[Mapping[str, Mapping[str, Any]]], dict[str, Any] | None],
) -> list[dict[str, Any]]:
    """A section for each measurement, with the weights in this order: only on equal data are they put side by side.

    Those with pre-trained weights come first. Of the weights of one kind those of the last entry are shown (`_last`).
    """
    found: dict[Measurement, dict[str, Mapping[str, Any]]] = {}
    for weights in order:
        last = _last(results, evaluator, weights)
        same = ("evaluator", "weights", "weights_file", "epochs", "update", "imported")
        for entry in results if last else ():
            if all(entry.get(key) == last.get(key) for key in same):
                found.setdefault(Measurement.of(entry), {})[weights] = entry
    groups = sorted(found.values(), key=lambda entries: "pretrained" not in entries)
    built = [(next(iter(entries.values())), section(entries)) for entries in groups]
    sections = [(entry, content) for entry, content in built if content is not None]
    names = [str(content["data"]) for _, content in sections]
    words = tell_apart(names, tellers(names, [entry for entry, _ in sections]))
    return [
        {**content, "data": labelled(name, more)}
        for (_, content), name, more in zip(sections, names, words, strict=True)
    ]


def _few_labels(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Chart and table of the curves; the table has a row for every amount that any of them has."""
    curves = {w: [p for p in _items(entry.get("curve")) if _mean(p) is not None] for w, entry in entries.items()}
    curves = {w: points for w, points in curves.items() if points}
    if not curves:
        return None
    series = [
        Series(
            NAMES[weights],
            [(float(p["images"]), _mean(p) or 0.0) for p in points],
            marked=True,
            spread=[float(p["top1"].get("std") or 0.0) for p in points],
        )
        for weights, points in curves.items()
    ]
    amounts = {
        (p["images"], _amount(p)): {w: next((q for q in curves[w] if q["images"] == p["images"]), None) for w in curves}
        for points in curves.values()
        for p in points
    }
    draws = dict.fromkeys(str(len(entries[w].get("seeds") or [])) for w in curves)
    return {
        "chart": line_chart(series, x_label="labelled images", label="accuracy against labels", x_log=True),
        "legend": [s.name for s in series],
        "columns": [NAMES[w] for w in curves],
        "rows": [
            {"amount": amount, "images": f"{images:,}", "cells": [_cell(found[w]) for w in curves]}
            for (images, amount), found in sorted(amounts.items(), key=lambda item: item[0])
        ],
        "draws": " and ".join(draws),
        "data": _data_text(next(entries[w] for w in curves)),
    }


def _amount(point: Mapping[str, Any]) -> str:
    if point.get("percent") is None:
        return f"{point.get('per_class')} a class"
    return "all" if point["percent"] == 100 else f"{point['percent']:g} %"


def _cell(point: Mapping[str, Any] | None) -> str:
    if point is None:
        return "–"
    several = len(point["top1"].get("values") or []) > 1
    return f"{_mean(point):.2f}" + (f" ± {point['top1'].get('std') or 0:.2f}" if several else "")


def _mean(point: Mapping[str, Any]) -> float | None:
    top1 = point.get("top1")
    value = top1.get("mean") if isinstance(top1, Mapping) else None
    sound = isinstance(value, (int, float)) and math.isfinite(value) and isinstance(point.get("images"), int)
    return float(value) if sound and value is not None else None


def _label_free(analyses: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    values = {w: entry["label_free"] for w, entry in analyses.items() if isinstance(entry.get("label_free"), Mapping)}
    if not values:
        return None
    rows = []
    for key, name, digits, told in FREE:
        found = {w: v.get(key) for w, v in values.items()}
        if not any(isinstance(value, (int, float)) for value in found.values()):
            continue
        try:
            about = told.format(**next(iter(values.values())))
        except (KeyError, ValueError):
            about = ""
        cells = [format(v, digits) if isinstance(v, (int, float)) else "–" for v in found.values()]
        rows.append({"name": name, "about": about, "cells": cells})
    data = str(analyses[next(iter(values))].get("train"))
    return {"columns": [NAMES[w] for w in values], "rows": rows, "data": data}


def _classes(folder: Path, entry: Mapping[str, Any], notes: list[str]) -> dict[str, Any] | None:
    """The confusion matrix from its file, and per-class figures from the entry."""
    rows = [row for row in _items(entry.get("per_class")) if "class" in row]
    if not rows:
        return None
    content = _json(folder, entry, "confusion", notes)
    chart = ""
    if content:
        try:
            chart = confusion_chart(content["counts"], [str(name) for name in content["classes"]])
        except (KeyError, TypeError, IndexError, ValueError) as error:
            notes.append(f"{entry['files']['confusion']} does not hold a confusion matrix and was left out: {error!r}")
    known = [row for row in rows if row.get("recall") is not None]
    order = sorted(known, key=lambda row: row["recall"])
    cut = len(order) > MOST_ROWS
    shown = order[: MOST_ROWS // 2] + order[-MOST_ROWS // 2 :] if cut else known
    classifier = entry.get("classifier") or {}
    return {
        "chart": chart,
        "top1": f"{classifier['top1']:.2f}" if "top1" in classifier else None,
        "rows": [
            {
                "name": row["class"],
                "images": f"{row.get('images', 0):,}",
                "recall": _percent(row.get("recall")),
                "precision": _percent(row.get("precision")),
            }
            for row in shown
        ],
        "cut": f"the {MOST_ROWS // 2} weakest and the {MOST_ROWS // 2} strongest of {len(order)} classes"
        if cut
        else "",
        "confused": [
            f"{row['class']} taken for {row['taken_for']}: {row['images']:,} of {row['of']:,}"
            for row in _items(entry.get("most_confused"))
            if {"class", "taken_for", "images", "of"} <= row.keys()
        ],
        "data": _data_text(entry),
    }


def _map(folder: Path, entry: Mapping[str, Any], notes: list[str]) -> dict[str, Any] | None:
    content = _json(folder, entry, "map", notes)
    if not content:
        return None
    try:
        chart = map_chart(content["x"], content["y"], content["label"], content["classes"])
        kind = {"umap": "UMAP", "tsne": "t-SNE"}[content["kind"]]
        images = f"{len(content['x']):,} {content['images']} images"
        if content["classes"] and len(content["classes"]) > MOST_IN_LEGEND:
            images += f", a colour for each of {len(content['classes'])} classes"
        return {"chart": chart, "text": f"{kind} of the features of {images}, seed {content['seed']}"}
    except (KeyError, TypeError, IndexError, ValueError) as error:
        notes.append(f"{entry['files']['map']} does not hold a map and was left out: {error!r}")
        return None


def _neighbours(folder: Path, entry: Mapping[str, Any]) -> dict[str, Any] | None:
    path, about = _file(folder, entry, "neighbours"), entry.get("neighbours")
    if path is None or not isinstance(about, Mapping):
        return None
    weights = NAMES.get(str(entry.get("weights")), "")
    return {"path": path, "queries": about.get("queries"), "labelled": bool(about.get("labelled")), "weights": weights}


def _json(folder: Path, entry: Mapping[str, Any], name: str, notes: list[str]) -> dict[str, Any]:
    path = _file(folder, entry, name)
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{entry['files'][name]} could not be read: {error}")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{entry['files'][name]} does not hold what an analysis writes and was left out")
        return {}
    return content


def _file(folder: Path, entry: Mapping[str, Any], name: str) -> Path | None:
    """A file of an analysis, which lies inside the run folder."""
    files = entry.get("files")
    place = files.get(name) if isinstance(files, Mapping) else None
    if not isinstance(place, str):
        return None
    path = folder / place
    inside = path.resolve().is_relative_to(folder.resolve())
    return path if inside and path.is_file() else None


def _data_text(entry: Mapping[str, Any]) -> str:
    subset = f", {entry['subset']}" if entry.get("subset") else ""
    return f"trained on {entry.get('train')}{subset}, tested on {entry.get('test')}"


def _items(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _percent(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, (int, float)) else "–"
