"""The tables of docs/benchmarks.md from the JSON files of `relssl bench views` and `relssl bench losses`.

python -m benchmarks.markdown benchmarks/results/views_jpeg.json ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from relssl.bench import loss_table
from relssl.bench.cases import MEASURE_TITLES
from relssl.bench.loss_table import MIB


def table(result: dict[str, Any]) -> str:
    """One Markdown table for all measurements of a file, with the command and the machine above it."""
    rows = _loss_rows(result) if result.get("benchmark") == "losses" else _view_rows(result)
    return "\n".join([f"`{result['command']}`", *rows])


def _view_rows(result: dict[str, Any]) -> Iterator[str]:
    environment, settings = result["environment"], result["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    machine = f"{settings['cores']} core(s) of {environment['processor']}"
    yield f"{machine}, {versions}, {settings['repeats']} rounds, {result['date']}."
    yield ""
    yield "| case | | images/s | views/s per core | ours is |"
    yield "|---|---|---|---|---|"
    for measurement in result["measurements"]:
        title = f"{measurement['case']}, {MEASURE_TITLES[measurement['measure']]}, {measurement['storage']}"
        best = next(peer["title"] for peer in measurement["peers"] if peer["is_ours"])
        ratios = {row["peer"]: row for row in measurement["ratios"] if row["ours"] == best}
        for peer in measurement["peers"]:
            rate = peer["images_per_second"]
            per_core = peer["images_per_second_per_core"]["median"] * measurement["views_per_image"]
            row = ratios.get(peer["title"])
            ratio = "" if row is None else _spread(row["ratio"]) + _wanted(row["target"])
            yield (
                f"| {title} | {_name(peer['title'], peer['is_ours'])} | "
                f"{_number(rate['median'])} ({_number(rate['min'])} to {_number(rate['max'])}) | "
                f"{_number(per_core)} | {ratio} |"
            )
            title = ""


def _loss_rows(result: dict[str, Any]) -> Iterator[str]:
    launches = "kernels" if result["settings"]["device"] != "cpu" else "operators"
    yield f"{loss_table.machine(result)}."
    yield ""
    yield f"| case | | ms a call | ours is | peak MiB | less memory | {launches} | of a step |"
    yield "|---|---|---|---|---|---|---|---|"
    for measurement in result["measurements"]:
        sizes = ", ".join(f"{name} {size:,}" for name, size in measurement["sizes"].items())
        title = f"{measurement['case']}: {sizes}; {measurement['dtype']}"
        ratios = {entry["form"]: entry for entry in measurement["ratios"]}
        for form in measurement["forms"]:
            name, time = form["name"], form["seconds"]
            milliseconds = [_number(time[key] * 1e3) for key in ("median", "min", "max")]
            entry = ratios.get(name)
            faster = "" if entry is None else _spread(entry["time"]) + _wanted(entry["targets"].get("time"))
            less = "" if entry is None else f"**{entry['memory']:.1f} x**" + _wanted(entry["targets"].get("memory"))
            shares = [f"{_percent(step['share'][name])} ({step['backbone']})" for step in measurement["steps"]]
            yield (
                f"| {title} | {_name(name, form['is_ours'])} | {milliseconds[0]} ({milliseconds[1]} to "
                f"{milliseconds[2]}) | {faster} | {_number(form['peak_bytes'] / MIB)} | {less} | "
                f"{form['launches']:,} | {', '.join(shares)} |"
            )
            title = ""
    yield ""
    yield "| case | backbone | forward and backward | timed on | kept for backward |"
    yield "|---|---|---|---|---|"
    for measurement in result["measurements"]:
        for step in measurement["steps"]:
            cells = (measurement["case"], step["backbone"], f"{step['seconds']:.3g} s", _timed(step), _kept(step))
            yield f"| {' | '.join(cells)} |"


def _timed(step: dict[str, Any]) -> str:
    return ", ".join(
        f"{entry['images_timed']:,} of {entry['images']:,} of {entry['side']} px"
        + ("" if entry["trains"] else " (no gradient)")
        for entry in step["passes"]
    )


def _kept(step: dict[str, Any]) -> str:
    each = [f"{entry['activation_bytes_per_image'] / 1024:,.0f}" for entry in step["passes"] if entry["trains"]]
    return f"{step['activation_bytes'] / MIB:,.0f} MiB ({', '.join(each)} KiB an image)"


def _name(name: str, is_ours: bool) -> str:
    return f"**{name}**" if is_ours else name


def _spread(ratio: dict[str, Any]) -> str:
    return f"**{ratio['median']:.2f} x** ({ratio['min']:.2f} to {ratio['max']:.2f})"


def _wanted(target: float | None) -> str:
    return "" if target is None else f", wanted {target:g}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(table(json.loads(Path(path).read_text())), end="\n\n")
