"""The tables of docs/benchmarks.md from the JSON files of `relssl bench views`.

python -m benchmarks.markdown benchmarks/results/views_jpeg.json ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from relssl.bench.cases import MEASURE_TITLES


def table(result: dict[str, Any]) -> str:
    """One Markdown table for all measurements of a file, with the command and the machine above it."""
    environment, settings = result["environment"], result["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    machine = f"{settings['cores']} core(s) of {environment['processor']}, {versions}"
    lines = [
        f"`{result['command']}`",
        f"{machine}, {settings['repeats']} rounds, {result['date']}.",
        "",
        "| case | | images/s | views/s per core | ours is |",
        "|---|---|---|---|---|",
    ]
    for measurement in result["measurements"]:
        title = f"{measurement['case']}, {MEASURE_TITLES[measurement['measure']]}, {measurement['storage']}"
        best = next(peer["title"] for peer in measurement["peers"] if peer["is_ours"])
        ratios = {row["peer"]: row for row in measurement["ratios"] if row["ours"] == best}
        for peer in measurement["peers"]:
            rate = peer["images_per_second"]
            per_core = peer["images_per_second_per_core"]["median"] * measurement["views_per_image"]
            name = f"**{peer['title']}**" if peer["is_ours"] else peer["title"]
            lines.append(
                f"| {title} | {name} | {_number(rate['median'])} ({_number(rate['min'])} to {_number(rate['max'])}) | "
                f"{_number(per_core)} | {_ratio(ratios.get(peer['title']))} |"
            )
            title = ""
    return "\n".join(lines)


def _ratio(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    ratio = row["ratio"]
    target = "" if row["target"] is None else f", wanted {row['target']:g}"
    return f"**{ratio['median']:.2f} x** ({ratio['min']:.2f} to {ratio['max']:.2f}){target}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(table(json.loads(Path(name).read_text())), end="\n\n")
