"""One self-contained page about a run, and the final table for the terminal.

`write_report` reads what is in a run folder and leaves out what is not: a run that was killed, has no labels
or was never evaluated still gives a page. The page needs no script, no network and no other file, stays under
2 MB, and follows the reader's light or dark colour scheme.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from PIL import Image

from pipelines.errors import InputError
from relssl import __version__
from relssl.charts import CHART_STYLE, Series, from_to, line_chart, share_bar, short_number
from relssl.measurement import Measurement, labelled, protocol_name, protocol_word, tell_apart, tellers, view_text
from relssl.report_analysis import analysis_context

MAX_BYTES = 2_000_000
PICTURE_BUDGETS = (
    600_000,
    250_000,
    80_000,
)  # characters per picture; the next is tried when a page comes out too large
TEXT_LIMIT = 60_000
DISPLAY = {
    "knn": "kNN",
    "linear": "linear",
    "probe": "fast probe",
    "finetune": "fine-tuning",
    "retrieval": "retrieval",
}
ONLINE = {
    "knn": "kNN accuracy",
    "linear": "Linear accuracy",
    "probe": "Fast probe's accuracy",
    "finetune": "Fine-tuning accuracy",
}
OWN_SECTIONS = ("analysis", "fewlabel")
METHODS = {"ressl": "ReSSL", "wcl": "WCL", "relicv2": "ReLICv2", "resa": "ReSA", "simclr": "SimCLR"}
PARTS = ("wait", "forward", "backward", "optimizer", "evaluate", "other")
PLAIN_KEYS = {"kind", "update", "epoch", "loss", "lr", "images_per_second", "seconds", "unreadable_images"}
MOST_EXTRA_CHARTS = 6
_MOST_SHEETS = 3  # of retrieval


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder and return its path; an earlier report is replaced whole.

    Raises:
        InputError: no such folder, or nothing in it that a run writes.
    """
    run = _read_run(Path(run_dir))
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("relssl", "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    ).get_template("report.html")
    page = ""
    for budget in PICTURE_BUDGETS:
        page = template.render(_context(run, budget))
        if len(page.encode()) <= MAX_BYTES:
            break
    out = run.path / "report.html"
    work = out.with_name(".report.html.writing")
    work.write_text(page, encoding="utf-8")
    os.replace(work, out)
    return out


def results_table(results: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Random initialisation against pre-trained, top-1 in percent: a header, then a row per measure.

    Args:
        results: entries of results.json; of those of one measurement the last counts.

    Returns:
        Rows of [measure, random, pre-trained, gain]. The first word of a measure is `kNN` or `linear`;
        accuracies are `mean` or, over several probe seeds, `mean ± standard deviation`; a dash is missing.
    """
    rows = [["top-1 accuracy, %", "random initialisation", "pre-trained", "gain"]]
    for measure in _measures(results):
        before, after = measure.accuracy("random", "top1"), measure.accuracy("pretrained", "top1")
        if before or after:
            rows.append([measure.label, accuracy_text(before), accuracy_text(after), _gain_text(before, after)])
    return rows


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned plain text: numbers to the right, all else to the left, a rule under the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = [place == 0 or not _is_numeric(row[place] for row in rows[1:]) for place in range(len(widths))]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if to_left else text.rjust(width)
            for text, width, to_left in zip(row, widths, left, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def _is_numeric(cells: Iterable[str]) -> bool:
    return all(cell[:1].isdigit() or cell[:1] in ("", "+", "-", "–") for cell in cells)


# Reading ---------------------------------------------------------------------------------------------


@dataclass
class _Run:
    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    env: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def get(self, *keys: str) -> Any:
        """A value of the configuration, None where any part of the way is missing."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def _read_run(path: Path) -> _Run:
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; expected the folder of a run, as `relssl train` makes it")
    run = _Run(path)
    run.config_text = _read_text(path / "config.yaml", run.notes)
    run.config = _parsed(run.config_text, "config.yaml", yaml.safe_load, run.notes)
    run.env = _parsed(_read_text(path / "env.json", run.notes), "env.json", json.loads, run.notes)
    records = _read_records(path / "metrics.jsonl", run.notes)
    run.train = _ordered(record for record in records if record.get("kind") == "train")
    run.evals = _ordered(record for record in records if record.get("kind") == "eval")
    stored = _parsed(_read_text(path / "results.json", run.notes), "results.json", json.loads, run.notes)
    entries = stored.get("results")
    run.results = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    if not (run.config or records or run.results):
        raise InputError(f"{path} is not a run folder: it has no readable config.yaml, metrics.jsonl or results.json")
    return run


def _read_text(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        notes.append(f"{path.name} could not be read: {error}")
        return ""


def _parsed(text: str, name: str, parse: Any, notes: list[str]) -> dict[str, Any]:
    if not text:
        return {}
    try:
        value = parse(text)
    except (ValueError, yaml.YAMLError) as error:
        notes.append(f"{name} is damaged and was left out: {str(error).splitlines()[0]}")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{name} does not hold what a run writes and was left out")
        return {}
    return value


def _read_records(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl. The last may be cut by a kill, which is normal and not worth a note."""
    records, damaged = [], 0
    lines = _read_text(path, notes).splitlines()
    for place, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            damaged += place < len(lines)
            continue
        if isinstance(record, dict) and _number(record.get("update")) is not None:
            records.append(record)
    if damaged:
        lines_were = "line of metrics.jsonl was" if damaged == 1 else "lines of metrics.jsonl were"
        notes.append(f"{damaged} unreadable {lines_were} left out")
    return records


def _ordered(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By update; what a resumed run wrote again replaces what was there."""
    latest = {(record["update"], record.get("evaluator")): record for record in records}
    return sorted(latest.values(), key=lambda record: record["update"])


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


# Results ---------------------------------------------------------------------------------------------


@dataclass
class _Measure:
    """One measurement, for random and pre-trained weights; or of weights of another file."""

    evaluator: str
    label: str
    entries: dict[str, Mapping[str, Any]]

    def accuracy(self, weights: str, which: str) -> Mapping[str, Any] | None:
        entry = self.entries.get(weights, {})
        value = entry.get(which) or _scores(entry).get(which)
        return value if isinstance(value, Mapping) and _number(value.get("mean")) is not None else None

    @property
    def any_entry(self) -> Mapping[str, Any]:
        return self.entries.get("pretrained") or next(iter(self.entries.values()))


def _measures(results: Iterable[Mapping[str, Any]]) -> list[_Measure]:
    groups: dict[tuple[Measurement, str, str, bool], dict[str, Mapping[str, Any]]] = {}
    # of checkpoints only the newest counts, and only where nobody has evaluated what the run ended with
    for entry in sorted(results, key=lambda entry: _number(entry.get("update")) or math.inf):
        if entry.get("evaluator") in OWN_SECTIONS:
            continue
        weights = str(entry.get("weights"))
        is_tuned = weights == "finetuned"
        network = str(entry.get("backbone"))  # a folder of imported weights may hold several
        key = (Measurement.of(entry), network, str(entry.get("weights_file") or ""), is_tuned)
        groups.setdefault(key, {})["pretrained" if is_tuned else weights] = entry
    measures = [_Measure(key[0].evaluator, "", entries) for key, entries in groups.items()]
    for measure, label in zip(measures, _labels(measures), strict=True):
        measure.label = label
    order = list(DISPLAY)
    return sorted(measures, key=lambda m: order.index(m.evaluator) if m.evaluator in order else len(order))


def _labels(measures: Sequence[_Measure]) -> list[str]:
    """The evaluator's name; of several of one evaluator with the names in which they differ, and whatever else does.

    A share of the labels, and a file that is not the run's own backbone, are always told.
    """
    names = [DISPLAY.get(measure.evaluator, measure.evaluator) for measure in measures]
    entries = [measure.any_entry for measure in measures]
    told = [_words(name, entry) for name, entry in zip(names, entries, strict=True)]
    words = []
    for name, own, entry in zip(names, told, entries, strict=True):
        rivals = [other for other, its in zip(told, names, strict=True) if its == name]
        always = {entry.get("subset"), entry.get("weights_file")}
        words.append(
            [word for i, word in enumerate(own) if word and (word in always or len({rival[i] for rival in rivals}) > 1)]
        )
    words = tell_apart(names, tellers(names, entries), words)
    return [labelled(name, more) for name, more in zip(names, words, strict=True)]


def _words(name: str, entry: Mapping[str, Any]) -> list[str]:
    """The names of what an entry was measured with: protocol, kind of weights, data, share, view, file of weights."""
    return [
        protocol_word(name, entry),
        "fine-tuned weights" if entry.get("weights") == "finetuned" else "",
        *(str(entry.get(key) or "") for key in ("backbone", "train", "test", "subset")),
        view_text(entry),
        str(entry.get("weights_file") or ""),
    ]


def _scores(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an evaluator found that is no top-1 or top-5 accuracy."""
    scores = entry.get("scores")
    return scores if isinstance(scores, Mapping) else {}


def _data_of(entry: Mapping[str, Any], which: str) -> str:
    subset = entry.get("subset") if which == "train" else None
    name = str(entry.get(which) or "")
    return f"{name}, {subset}" if subset else name


def accuracy_text(accuracy: Mapping[str, Any] | None) -> str:
    if accuracy is None:
        return "–"
    several = len(accuracy.get("values") or []) > 1
    return f"{accuracy['mean']:.2f}" + (f" ± {accuracy.get('std') or 0:.2f}" if several else "")


def _mean(accuracy: Mapping[str, Any] | None) -> float | None:
    return None if accuracy is None else float(accuracy["mean"])


def _gain_text(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    return f"{after['mean'] - before['mean']:+.2f}" if before and after else "–"


def pretraining_text(entry: Mapping[str, Any]) -> str:
    """Where the weights of an entry come from: the data that they were trained on, as far as anybody knows."""
    imported = entry.get("imported") or {}
    if entry.get("weights") == "random":
        return "random weights"
    if imported and not imported.get("continued"):
        return f"imported from {imported.get('file')}, which does not say on what it was pre-trained"
    data = entry.get("pretrained_on") or "unknown data"
    return f"continued from {imported.get('file')} on {data}" if imported else f"pre-trained on {data}"


def protocol_text(entry: Mapping[str, Any]) -> str:
    """One sentence with the numbers that a reader of an accuracy needs."""
    p = entry.get("protocol")
    p = p if isinstance(p, Mapping) else {}
    if entry.get("evaluator") == "knn":
        votes = p.get("temperature", 0.07)
        told = [f"weighted, k = {p.get('k', 20)}, temperature {votes}" if votes else f"equal votes, k = {p.get('k')}"]
        told += ["Euclidean distance"] if p.get("distance") == "euclidean" else []
    elif entry.get("evaluator") == "retrieval":
        told = [f"nearest by cosine similarity {p.get('name')}, mAP over all of them"]
    elif entry.get("evaluator") == "probe":
        told = _probe_text(entry, p)
    else:
        told = [str(p["name"])] if "name" in p else []
        rates = f"{p['lr_backbone']} (backbone), {p.get('lr_head')} (head)" if "lr_backbone" in p else p.get("lr")
        told += [f"{str(p['optimizer']).upper()} lr {rates}"] if "optimizer" in p else []
        told += [str(p["schedule"])] if "schedule" in p else []
        told += [f"{p['epochs']} epochs"] if "epochs" in p else []
        told += [f"batch {p['batch_size']}"] if "batch_size" in p else []
        told += ["features standardised"] if p.get("normalise_features") == "standardise" else []
        told += [f"{p['select']} epoch reported"] if "select" in p else []
    seeds = entry.get("seeds") or []
    if seeds:
        told.append(f"probe seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}")
    if _number(entry.get("update")) is not None:
        told.append(f"weights of update {entry['update']}")
    if entry.get("pretrained_on") or entry.get("imported"):
        told.append(pretraining_text(entry))
    if entry.get("train"):
        use = {"knn": "neighbours from", "retrieval": "gallery"}.get(str(entry.get("evaluator")), "trained on")
        told.append(f"{use} {_data_of(entry, 'train')}{_count(entry.get('num_train'))}")
    if entry.get("test"):
        told.append(f"tested on {entry['test']}{_count(entry.get('num_test'))}")
    return "; ".join(told)


def _probe_text(entry: Mapping[str, Any], protocol: Mapping[str, Any]) -> list[str]:
    """The grid, how its best head was picked, and the check beside it."""
    axes = [protocol.get(axis) or [] for axis in ("lr", "weight_decay", "layer")]
    told = [f"{math.prod(map(len, axes))} linear heads on standardised features"]
    told.append(f"picked on {100 * (_number(protocol.get('held_out')) or 0):g} % of the training images, held out")
    picked = entry.get("picked")
    first = picked[0] if isinstance(picked, list) and picked and isinstance(picked[0], Mapping) else {}
    if "lr" in first and "weight_decay" in first:
        layer = f", layer {first.get('layer')}" if len(axes[2]) > 1 else ""
        seeds = entry.get("seeds") or []
        which = f"seed {seeds[0]}: " if len(seeds) > 1 else ""
        told[-1] += f" ({which}lr {first['lr']:g}, weight decay {first['weight_decay']:g}{layer})"
    told.append("then trained on all and tested once" if protocol.get("refit") else "then tested once")
    check = entry.get("check")
    if isinstance(check, Mapping) and isinstance(check.get("top1"), Mapping):
        told.append(f"{check.get('name')} as a check: {accuracy_text(check['top1'])} %")
    return told


def _count(value: Any) -> str:
    return f" ({value:,} images)" if isinstance(value, int) else ""


def _paper(run: _Run, measures: Sequence[_Measure]) -> dict[str, Any] | None:
    """The paper's row from the configuration, with every reason known here why figures are not comparable."""
    paper = run.get("about", "paper")
    if not isinstance(paper, dict):
        return None
    metric = str(paper.get("metric") or "linear top-1")
    told = " ".join(str(paper.get(key) or "") for key in ("row", "source", "note")).lower()
    reasons = []
    if "assumption" in told:
        reasons.append("the recipe rests on an assumption")
    if assumptions := _assumptions(run):
        reasons.append(f"no public source has {len(assumptions)} of the recipe's settings")
    if "not comparable" in told:
        reasons.append("the recipe says so")
    probes = [m.any_entry for m in measures if m.evaluator == "linear"]
    if metric.startswith("linear") and probes and all(_own_protocol(entry) for entry in probes):
        reasons.append("measured here with our own quick probe or a changed protocol")
    return {
        "metric": metric,
        "value": _number(paper.get("value")),
        "row": paper.get("row"),
        "source": paper.get("source"),
        "reasons": reasons,
    }


def _assumptions(run: _Run) -> list[tuple[str, str]]:
    """Settings that no public source has, and where they come from."""
    found = run.get("about", "assumptions")
    return [(str(key), str(source)) for key, source in found.items()] if isinstance(found, dict) else []


def _own_protocol(entry: Mapping[str, Any]) -> bool:
    name = protocol_name(entry)
    return name in ("", "custom") or name.startswith("cached") or name.endswith("(changed)")


def _result_rows(measures: Sequence[_Measure], paper: dict[str, Any] | None) -> list[dict[str, Any]]:
    comparable = paper is not None and not paper["reasons"]
    rows = []
    for measure in measures:
        others = {which: which for which in _scores(measure.any_entry)}
        for which, name in (others or {"top1": "top-1", "top5": "top-5"}).items():
            before, after = measure.accuracy("random", which), measure.accuracy("pretrained", which)
            if not (before or after):
                continue
            matches = paper is not None and paper["metric"] == f"{DISPLAY.get(measure.evaluator, '')} {name}"
            if comparable and measure.evaluator == "linear":  # else each is marked
                matches = matches and not _own_protocol(measure.any_entry)
            value = paper["value"] if paper is not None and matches else None
            rows.append(
                {
                    "label": f"{measure.label} {name}",
                    "main": which in ("top1", "mAP"),
                    "before": accuracy_text(before),
                    "after": accuracy_text(after),
                    "gain": _gain_text(before, after),
                    "paper": value,
                    "track": from_to(_mean(before), _mean(after), value if comparable else None),
                }
            )
    return rows


# Curves and times ------------------------------------------------------------------------------------


def _curve(records: Sequence[dict[str, Any]], key: str, evaluator: str | None = None) -> list[tuple[float, float]]:
    points = []
    for record in records:
        x, y = _number(record.get("epoch")), _number(record.get(key))
        if x is not None and y is not None and (evaluator is None or record.get("evaluator") == evaluator):
            points.append((x, y))
    return points


def _charts(run: _Run) -> list[dict[str, Any]]:
    """Title, legend and picture of each curve that the run has."""
    wanted: list[tuple[str, list[Series]]] = [
        ("Loss", [Series("loss", _curve(run.train, "loss"))]),
        *(_top1_and_top5(run, evaluator, title) for evaluator, title in ONLINE.items()),
        ("Few labels while training, top-1, %", _few_labels_while_training(run)),
        (
            "Retrieval while training, %",
            [
                Series("mAP", _curve(run.evals, "map", "retrieval"), marked=True),
                Series("R@1", _curve(run.evals, "recall_at_1", "retrieval"), marked=True),
            ],
        ),
        *_by_checkpoint(run),
        (
            "RankMe (effective rank of the features)",
            [Series("RankMe", _curve(run.evals, "rankme"), marked=True)],
        ),
        ("Alignment", [Series("alignment", _curve(run.evals, "alignment"), marked=True)]),
        ("Uniformity", [Series("uniformity", _curve(run.evals, "uniformity"), marked=True)]),
        ("Learning rate", [Series("lr", _curve(run.train, "lr"))]),
        ("Images per second", [Series("images/s", _curve(run.train, "images_per_second"))]),
    ]
    extra = sorted({key for record in run.train for key in record if _number(record[key]) is not None} - PLAIN_KEYS)
    wanted += [(key.replace("_", " "), [Series(key, _curve(run.train, key))]) for key in extra[:MOST_EXTRA_CHARTS]]
    end = max((_number(record.get("epoch")) or 0.0 for record in [*run.train, *run.evals]), default=0.0)
    charts = []
    for title, series in wanted:
        series = [s for s in series if s.points]
        zero = title in ("Learning rate", "Images per second")
        picture = line_chart(series, x_label="epoch", label=title, x_end=end, from_zero=zero)
        if picture:
            last = ", ".join(short_number(s.points[-1][1]) for s in series)
            charts.append(
                {
                    "title": title,
                    "legend": [s.name for s in series] if len(series) > 1 else [],
                    "last": last,
                    "picture": picture,
                }
            )
    return charts


def _top1_and_top5(run: _Run, evaluator: str, title: str) -> tuple[str, list[Series]]:
    series = [
        Series(name, _curve(run.evals, key, evaluator), marked=True)
        for name, key in (("top-1", "top1"), ("top-5", "top5"))
    ]
    return f"{title} while training, %", series


def _few_labels_while_training(run: _Run) -> list[Series]:
    """A curve for each amount of labels: `top1_at_10`, `top1_at_1_percent`."""
    found = {key: None for record in run.evals if record.get("evaluator") == "fewlabel" for key in record}
    amounts = {key: key.removeprefix("top1_at_") for key in found if key.startswith("top1_at_")}
    return [
        Series(
            f"{amount.removesuffix('_percent')} %" if amount.endswith("_percent") else f"{amount} a class",
            _curve(run.evals, key, "fewlabel"),
            marked=True,
        )
        for key, amount in amounts.items()
    ]


def _by_checkpoint(run: _Run) -> list[tuple[str, list[Series]]]:
    """A chart for each measurement that several checkpoints were put through."""
    groups: dict[tuple[Measurement, str], dict[float, float]] = {}
    entries: dict[tuple[Measurement, str], Mapping[str, Any]] = {}
    for entry in sorted(run.results, key=lambda entry: _number(entry.get("update")) or 0.0):
        which, score = next(iter((_scores(entry) or {"top-1": entry.get("top1")}).items()))
        update = _number(entry.get("update"))
        value = _number(score.get("mean")) if isinstance(score, Mapping) else None
        if update is not None and value is not None:
            key = (Measurement.of(entry), which)
            groups.setdefault(key, {})[update * _epochs_per_update(run)] = value
            entries[key] = entry
    told = {key: points for key, points in groups.items() if len(points) > 1}
    names = [_checkpoint_title(entries[key], key[1]) for key in told]
    words = tell_apart(names, tellers(names, [entries[key] for key in told]))
    titles = [f"{name}: {', '.join(more)}" if more else name for name, more in zip(names, words, strict=True)]
    return [
        (title, [Series(title, list(points.items()), marked=True)])
        for title, points in zip(titles, told.values(), strict=True)
    ]


def _checkpoint_title(entry: Mapping[str, Any], which: str) -> str:
    name = DISPLAY.get(str(entry.get("evaluator")), str(entry.get("evaluator")))
    return f"{name} {which} of checkpoints, % ({protocol_name(entry)}, {_data_of(entry, 'train')})"


def _epochs_per_update(run: _Run) -> float:
    """From the last record of the training; 1 where there is none, which leaves updates as they are."""
    last = run.train[-1] if run.train else {}
    epoch, update = _number(last.get("epoch")), _number(last.get("update"))
    return epoch / update if epoch and update else 1.0


def _seconds(run: _Run) -> dict[str, float]:
    """Seconds of the whole run by part. `other` is wall time (images / rate) that no part accounts for."""
    totals: dict[str, float] = {}
    for record in run.train:
        parts = record.get("seconds")
        for name, value in parts.items() if isinstance(parts, dict) else ():
            totals[str(name)] = totals.get(str(name), 0.0) + (_number(value) or 0.0)
    if totals and "other" not in totals:
        totals["other"] = max(_wall_seconds(run) - sum(totals.values()), 0.0)
    names = [name for name in PARTS if name in totals] + sorted(set(totals) - set(PARTS))
    return {name: totals[name] for name in names if totals[name] > 0}


def _wall_seconds(run: _Run) -> float:
    batch = _number(run.get("train", "batch_size")) or 0.0
    wall, before = 0.0, float(_first_update(run))
    for record in run.train:
        rate = _number(record.get("images_per_second"))
        if rate:
            wall += (record["update"] - before) * batch / rate
        before = record["update"]
    return wall


def _first_update(run: _Run) -> int:
    """From which update on the run was trained here: a run that continues somebody else's begins where that ended."""
    if not run.train or not (run.path / "imported.json").is_file():
        return 0
    return max(0, int(run.train[0]["update"] - (_number(run.get("train", "log_every")) or 0)))


def _time(run: _Run) -> dict[str, Any]:
    seconds = _seconds(run)
    total = sum(seconds.values())
    rates = [rate for rate in (_number(record.get("images_per_second")) for record in run.train) if rate]
    views = _views_per_image(run)
    rate = statistics.median(rates) if rates else None
    return {
        "bar": share_bar(list(seconds.items()), label="share of the time by part"),
        "parts": [
            {"name": n, "seconds": _duration(s), "share": f"{100 * s / total:.1f} %"} for n, s in seconds.items()
        ],
        "rate": f"{rate:,.0f}" if rate else None,
        "views": f"{rate * views:,.0f}" if rate and views else None,
        "total": _duration(total) if total else None,
    }


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    return f"{round(seconds / 60) // 60} h {round(seconds / 60) % 60:02d} min"


# The page --------------------------------------------------------------------------------------------


def _context(run: _Run, picture_budget: int) -> dict[str, Any]:
    measures = _measures(run.results)
    paper = _paper(run, measures)
    method, data, folder = str(run.get("method", "name") or ""), _data_name(run), run.path.resolve().name
    command = run.env.get("command") or run.get("about", "command")
    notes = list(run.notes)
    analysis = analysis_context(run.path, run.results, notes)
    sheet = analysis["neighbours"]
    return {
        "analysis": analysis,
        "chart_style": Markup(CHART_STYLE),
        "title": f"{METHODS.get(method, method)} on {data}" if method and data else f"Run {folder}",
        "folder": folder,
        "facts": _facts(run),
        "status": _status(run),
        "tiles": _tiles(run, measures),
        "rows": _result_rows(measures, paper),
        "protocols": [{"label": m.label, "text": protocol_text(m.any_entry)} for m in measures],
        "paper": paper,
        "assumptions": _assumptions(run),
        "measured": run.get("about", "measured"),
        "charts": _charts(run),
        "time": _time(run),
        "views_picture": _data_uri(run.path / "views.png", picture_budget, notes),
        "neighbours_picture": _data_uri(sheet["path"] if sheet else run.path / "neighbours.png", picture_budget, notes),
        "neighbours_text": _neighbours_text(sheet),
        "retrieval_pictures": _retrieval_pictures(run, measures, picture_budget, notes),
        "env": [(key, _plain(value)) for key, value in run.env.items() if key not in ("command", "argv")],
        "config": _cut(run.config_text),
        "command": _cut(str(command)) if command else None,
        "notes": notes,
        "version": __version__,
        "written": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _retrieval_pictures(run: _Run, measures: Sequence[_Measure], budget: int, notes: list[str]) -> list[dict[str, Any]]:
    """The sheets that lie in the folder, with what they are of; they share the room of one."""
    found = {}
    for measure in measures:
        for weights, entry in measure.entries.items():
            place = run.path / Path(str(entry.get("picture") or "")).name
            if entry.get("picture") and place.is_file():
                found[place] = f"{measure.label}, {weights} weights"
    chosen = list(found.items())[:_MOST_SHEETS]
    pictures = [(_data_uri(place, budget // len(chosen), notes), label) for place, label in chosen]
    return [{"picture": picture, "label": label} for picture, label in pictures if picture]


def _neighbours_text(analysis: Mapping[str, Any] | None) -> str:
    """What the sheet shows: of an analysis, or (None) the one that training draws."""
    found = "by cosine similarity; no label was used to find them."
    if analysis is None:
        return f"Images whose features are nearest to the query's, {found}"
    asked = "Test images, and the training images" if analysis["queries"] == "test" else "Training images, and those"
    colours = " Green: the query's class, orange: another." if analysis["labelled"] else ""
    return f"{asked} whose {analysis['weights']} features are nearest {found}{colours}"


def _data_name(run: _Run) -> str:
    files = run.get("data", "train")
    names = files if isinstance(files, list) else [files] if files else []
    return " + ".join(Path(str(name)).stem for name in names)


def _views_per_image(run: _Run) -> int | None:
    """Of the first phase of views."""
    plan = run.get("views", "plan")
    phases = run.get("views", "phases")
    if plan is None and isinstance(phases, list) and phases and isinstance(phases[0], dict):
        plan = phases[0].get("plan")
    if not isinstance(plan, list):
        return None
    return sum(int(_number(view.get("count", 1)) or 1) for view in plan if isinstance(view, dict))


def _facts(run: _Run) -> list[tuple[str, str]]:
    views = _views_per_image(run)
    facts = {
        "method": run.get("method", "name"),
        "data": _data_name(run),
        "backbone": run.get("backbone", "name"),
        "epochs": run.get("train", "epochs"),
        "batch": run.get("train", "batch_size"),
        "views per image and step": views,
        "seed": run.get("train", "seed"),
        "precision": run.get("train", "precision"),
        "processes": run.env.get("world_size"),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _status(run: _Run) -> dict[str, str]:
    epochs = _number(run.get("train", "epochs"))
    reached = max((_number(record.get("epoch")) or 0.0 for record in [*run.train, *run.evals]), default=0.0)
    if (run.path / "backbone.safetensors").is_file() or (epochs and reached >= epochs - 1e-6):
        return {"kind": "done", "text": "finished"}
    if not run.train:
        return {"kind": "open", "text": "no training recorded"}
    of = f" of {epochs:g}" if epochs else ""
    return {"kind": "open", "text": f"not finished: reached epoch {reached:.4g}{of}"}


def _tiles(run: _Run, measures: Sequence[_Measure]) -> list[dict[str, str]]:
    tiles: list[dict[str, str]] = []
    shown = set()
    for measure in measures:
        before, after = measure.accuracy("random", "top1"), measure.accuracy("pretrained", "top1")
        if after and measure.evaluator not in shown:  # the table has the others
            shown.add(measure.evaluator)
            below = f"{before['mean']:.1f} at random initialisation" if before else "pre-trained"
            tiles.append({"name": f"{measure.label} top-1", "value": f"{after['mean']:.1f} %", "below": below})
    online = _curve(run.evals, "top1", "knn")
    if online and not tiles:
        tiles.append(
            {
                "name": "kNN top-1, online",
                "value": f"{online[-1][1]:.1f} %",
                "below": f"at epoch {online[-1][0]:g}",
            }
        )
    loss = _curve(run.train, "loss")
    if loss:
        tiles.append({"name": "loss", "value": f"{loss[-1][1]:.4g}", "below": f"from {loss[0][1]:.4g}"})
    time = _time(run)
    if time["rate"]:
        below = f"median; {time['views']} views/s" if time["views"] else "median"
        tiles.append({"name": "images per second", "value": time["rate"], "below": below})
    if time["total"]:
        updates = run.train[-1]["update"] - _first_update(run)
        tiles.append({"name": "training time", "value": time["total"], "below": f"{updates:,} updates"})
    return tiles[:5]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT] + "\n... (shortened)"


def _data_uri(path: Path, budget: int, notes: list[str]) -> Markup | None:
    """A picture as a data URI of at most `budget` characters: as it is if it fits, else a smaller JPEG."""
    if not path.is_file():
        return None
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as opened:
            kind, image = opened.format, opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        notes.append(f"{path.name} could not be read: {error}")
        return None
    mime = {"PNG": "image/png", "JPEG": "image/jpeg"}.get(kind or "")
    quality, scale = 90, min(1.0, 2000 / image.width)
    while mime is None or len(content) * 4 / 3 + 30 > budget:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        buffer = io.BytesIO()
        image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality, optimize=True)
        content, mime = buffer.getvalue(), "image/jpeg"
        quality, scale = (quality - 8, scale) if quality > 74 else (quality, scale * 0.8)
    return Markup("data:{};base64,{}").format(mime, base64.b64encode(content).decode())
