"""The result of a benchmark as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from relssl.bench.cases import MEASURE_TITLES


def text(result: Mapping[str, Any]) -> str:
    """All measurements of a result, a table each, and the training step."""
    lines = [_machine(result)]
    for measurement in result["measurements"]:
        lines += ["", title(measurement, result["settings"]), *_table(measurement)]
        lines += [f"  left out: {entry['reason']}" for entry in measurement["left_out"]]
    if result["step"] is not None:
        lines += ["", *_step(result["step"])]
    return "\n".join(lines)


def title(measurement: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """One line that says what was measured."""
    what = MEASURE_TITLES[measurement["measure"]]
    where = "" if settings["device"] == "cpu" else f" on {settings['device']}"
    return (
        f"{measurement['case']}: {what}{where}, {measurement['views_per_image']} views an image, "
        f"from {measurement['storage']}"
    )


def _machine(result: Mapping[str, Any]) -> str:
    settings, environment = result["settings"], result["environment"]
    hardware = ", ".join([f"{settings['cores']} core(s) of {environment['processor']}", *environment["devices"]])
    return (
        f"{hardware}; torch {environment['torch']}; {settings['repeats']} rounds, batches of {settings['batch']}; "
        f"median (range); {result['date']}"
    )


def _table(measurement: Mapping[str, Any]) -> Iterator[str]:
    engines = [entry["title"] for entry in measurement["peers"] if entry["is_ours"]]
    header = ["", "images/s", "views/s", "per core", "a pass", *(f"{engine} is" for engine in engines)]
    rows = [header]
    for entry in measurement["peers"]:
        against = [_ratio(measurement, engine, entry["title"]) for engine in engines]
        numbers = [
            ranged(entry["images_per_second"], 0),
            f"{entry['views_per_second']['median']:.0f}",
            f"{entry['images_per_second_per_core']['median']:.0f}",
            f"{entry['images']} images",
        ]
        rows.append([entry["title"], *numbers, *against])
    return aligned(rows)


def _ratio(measurement: Mapping[str, Any], engine: str, peer: str) -> str:
    for entry in measurement["ratios"]:
        if (entry["ours"], entry["peer"]) == (engine, peer):
            goal = "" if entry["target"] is None else f", at least {entry['target']:g} wanted"
            return f"{ranged(entry['ratio'], 2)} times{goal}"
    return ""


def _step(step: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"training step: {step['method']} {step['backbone']}, {step['batch_size']} images, "
        f"precision {step['precision']}, engine {step['engine']}"
    )
    yield from aligned(
        [
            ["fed by the loader", f"{ranged(step['fed'], 1)} images/s"],
            ["views at rest", f"{ranged(step['resident'], 1)} images/s"],
            ["ratio", ranged(step["ratio"], 3)],
            ["host waits for views", f"{ranged(step['waiting'], 3)} of the step"],
        ]
    )


def ranged(values: Mapping[str, Any], digits: int) -> str:
    """Median and range of a `race.spread`."""
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f} to {values['max']:.{digits}f})"


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as they need to be; names to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield ("  " + "  ".join(cells)).rstrip()
