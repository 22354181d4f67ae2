"""`relssl ls`: the run folders below a folder, one line each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import InputError, RelsslError
from relssl.config import read_yaml
from relssl.measurement import protocol_name
from relssl.report import DISPLAY
from relssl.runfolder import RunFolder, read_results

DEPTH = 3  # of folders that are looked into
HEADER = ["run", "method", "data", "epochs", "state", "best top-1, %"]


def list_runs(place: Path) -> list[list[str]]:
    """A header, then [run, method, data, epochs done / planned, state, best accuracies] of each run, by name.

    A run with damaged files is listed with what is wrong.

    Raises:
        InputError: no such folder, or no run in it.
    """
    if not place.is_dir():
        raise InputError(f"{place} is not a folder; expected a folder with runs, as `relssl train` makes them")
    rows = [_line(folder, place) for folder in _runs_below(place, DEPTH)]
    if not rows:
        raise InputError(f"there is no run in {place}: a run folder has a config.yaml, which `relssl train` writes")
    return [HEADER, *rows]


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "config.yaml").is_file():
        yield folder
        return
    if depth:
        for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
            yield from _runs_below(inner, depth - 1)


def _line(folder: Path, place: Path) -> list[str]:
    name = str(folder.relative_to(place)) if folder != place else folder.resolve().name
    try:
        run = RunFolder(folder)
        config = read_yaml(run.config)
        method = Path(str(_get(config, "method", "name") or "–")).stem
        planned = _get(config, "train", "epochs")
        done = _epochs_done(run)
        epochs = f"{done:g} / {planned}" if planned is not None else f"{done:g}"
        return [name, method, _data(config), epochs, _state(run, done), _best(read_results(folder), config)]
    except RelsslError as error:
        return [name, "–", "–", "–", f"damaged: {str(error).splitlines()[0]}", "–"]


def _get(config: dict[str, Any], section: str, key: str) -> Any:
    values = config.get(section)
    return values.get(key) if isinstance(values, dict) else None


def _data(config: dict[str, Any]) -> str:
    files = _get(config, "data", "train")
    names = files if isinstance(files, list) else [files] if files else []
    return " + ".join(Path(str(name)).stem for name in names) or "–"


def _epochs_done(run: RunFolder) -> float:
    epochs = [record.get("epoch") for record in run.read_metrics() if isinstance(record, dict)]
    return max((round(float(e), 2) for e in epochs if isinstance(e, (int, float))), default=0.0)


def _state(run: RunFolder, done: float) -> str:
    if run.backbone.is_file():
        return "finished"
    return "not finished" if done else "nothing trained yet"


def _best(results: list[Any], config: dict[str, Any]) -> str:
    """The best pre-trained accuracy by each evaluator, with its protocol where the name does not say it.

    One on the test data of the run, with all labels, goes before others, which say what they are on.
    """
    own_test = Path(str(_get(config, "data", "test") or "")).name
    best: dict[str, tuple[bool, float, str]] = {}
    for entry in results:
        if not isinstance(entry, dict):
            continue
        top1, evaluator = entry.get("top1"), str(entry.get("evaluator"))
        if entry.get("weights") == "random" and entry.get("method") != "random":
            continue
        if isinstance(top1, dict) and isinstance(top1.get("mean"), (int, float)):
            protocol = f" ({protocol_name(entry)})" if evaluator == "linear" else ""
            is_own = entry.get("test") == own_test and entry.get("subset") is None
            told = [] if is_own else [str(entry[key]) for key in ("test", "subset") if entry.get(key)]
            where = f" [{', '.join(told)}]" if told else ""
            text = f"{DISPLAY.get(evaluator, evaluator)}{protocol} {top1['mean']:.2f}{where}"
            best[evaluator] = max(best.get(evaluator, (False, 0.0, "")), (is_own, float(top1["mean"]), text))
    order = list(DISPLAY)
    ranked = sorted(best, key=lambda e: order.index(e) if e in order else len(order))
    return ", ".join(best[evaluator][2] for evaluator in ranked) or "not evaluated"
