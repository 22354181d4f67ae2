"""The result of `relssl bench losses` as a picture: bars of time and of peak memory, a row for each case."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relssl.bench.loss_table import MIB, machine, title
from relssl.bench.plot import draw_bar, draw_grid, finish_panel


def plot(result: Mapping[str, Any], path: Path) -> Path:
    """Write the picture; its format follows the suffix of `path`.

    Raises:
        ConfigError: a suffix that is none of `plot.FORMATS`.
    """
    panels = result["measurements"]

    def fill(axes: Any) -> None:
        for panel, (time, memory) in zip(panels, axes, strict=True):
            _draw_time(panel, time)
            _draw_memory(panel, memory)

    return draw_grid(path, [len(panel["forms"]) for panel in panels], 2, fill, machine(result))


def _draw_time(panel: Mapping[str, Any], axis: Any) -> None:
    ratios = {entry["form"]: entry["time"]["median"] for entry in panel["ratios"]}
    farthest = max(form["seconds"]["max"] for form in panel["forms"]) * 1e3
    for row, form in enumerate(panel["forms"]):
        values = {key: form["seconds"][key] * 1e3 for key in ("median", "min", "max")}
        label = f"{values['median']:,.3g}" if values["median"] < 1000 else f"{values['median']:,.0f}"
        draw_bar(axis, row, values, farthest, label + _times(ratios.get(form["name"])), form["is_ours"])
    names = [form["name"] for form in panel["forms"]]
    finish_panel(axis, names, 1.5 * farthest, "ms, forward and backward", title(panel))


def _draw_memory(panel: Mapping[str, Any], axis: Any) -> None:
    ratios = {entry["form"]: entry["memory"] for entry in panel["ratios"]}
    farthest = max(form["peak_bytes"] for form in panel["forms"]) / MIB
    for row, form in enumerate(panel["forms"]):
        peak = form["peak_bytes"] / MIB
        label = f"{peak:,.3g}" if peak < 1000 else f"{peak:,.0f}"
        values = {"median": peak, "min": peak, "max": peak}
        draw_bar(axis, row, values, farthest, label + _times(ratios.get(form["name"])), form["is_ours"])
    finish_panel(axis, [""] * len(panel["forms"]), 1.5 * farthest, "MiB at the peak, above the inputs", "")


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"   ({ratio:.3g} × ours)"
