"""The result of a benchmark as a picture: horizontal bars of images per second, a panel for each measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import ConfigError
from relssl.bench.table import title

FORMATS = (".svg", ".png", ".pdf")
OURS, PEER, INK, FAINT = "#1f6f8b", "#b9b4a8", "#22262a", "#6b7075"
_BAR_INCHES, _PANEL_INCHES, _WIDTH_INCHES = 0.34, 0.62, 8.6


def check_plot_path(path: Path) -> None:
    """Refuse a picture format before anything is measured."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"a plot is written as {', '.join(FORMATS)}; got {path.name!r}")


def plot(result: Mapping[str, Any], path: Path) -> Path:
    """Write the picture; its format follows the suffix of `path`.

    Raises:
        ConfigError: a suffix that is none of `FORMATS`.
    """
    panels = result["measurements"]

    def fill(axes: Any) -> None:
        for panel, axis in zip(panels, axes[:, 0], strict=True):
            _draw(panel, axis, result["settings"])

    return draw_grid(path, [len(panel["peers"]) for panel in panels], 1, fill, _footer(result))


def draw_grid(path: Path, bars: Sequence[int], columns: int, fill: Callable[[Any], None], footer: str) -> Path:
    """Write a picture of panels with so many `bars`, one row for each; `fill` draws on the axes (rows, columns).

    Raises:
        ConfigError: a suffix that is none of `FORMATS`.
    """
    check_plot_path(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    heights = [_PANEL_INCHES + _BAR_INCHES * count for count in bars]
    with rc_context({"svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif", "svg.hashsalt": "relssl"}):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06)
        figure = Figure(figsize=(_WIDTH_INCHES, sum(heights) + 0.45), layout=layout)
        fill(figure.subplots(len(bars), columns, squeeze=False, height_ratios=heights))
        figure.supxlabel(footer, fontsize=7, color=FAINT)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    return path


def draw_bar(axis: Any, row: int, values: Mapping[str, float], farthest: float, label: str, is_ours: bool) -> None:
    """A bar as long as the median, a whisker over the range, the figures behind it; `farthest` is the longest bar."""
    axis.barh(row, values["median"], height=0.66, color=OURS if is_ours else PEER)
    if values["min"] < values["max"]:
        axis.hlines(row, values["min"], values["max"], color=INK, linewidth=1.1)
        for end in (values["min"], values["max"]):
            axis.vlines(end, row - 0.13, row + 0.13, color=INK, linewidth=1.1)
    axis.text(values["max"] + 0.015 * farthest, row, label, va="center", color=INK)


def finish_panel(axis: Any, names: Sequence[str], limit: float, unit: str, heading: str) -> None:
    """Names of the bars from top to bottom, the scale from 0 to `limit`, and a heading."""
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, limit)
    axis.set_xlabel(unit, fontsize=8, color=FAINT)
    axis.set_title(heading, loc="left", fontsize=9, fontweight="bold", color=INK)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8, colors=FAINT)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(PEER)


def _draw(panel: Mapping[str, Any], axis: Any, settings: Mapping[str, Any]) -> None:
    """One measurement: a bar per peer, a whisker over the range of its rounds, the rate in figures behind it."""
    peers = panel["peers"]
    ours = next(peer["title"] for peer in peers if peer["is_ours"])
    farthest = max(peer["images_per_second"]["max"] for peer in peers)
    for row, peer in enumerate(peers):
        rate = peer["images_per_second"]
        label = f"{rate['median']:,.0f}{_times(panel, ours, peer['title'])}"
        draw_bar(axis, row, rate, farthest, label, peer["is_ours"])
    finish_panel(axis, [peer["title"] for peer in peers], 1.28 * farthest, "images/s", title(panel, settings))


def _times(panel: Mapping[str, Any], ours: str, peer: str) -> str:
    for entry in panel["ratios"]:
        if (entry["ours"], entry["peer"]) == (ours, peer):
            return f"   (ours: {entry['ratio']['median']:.3g} ×)"
    return ""


def _footer(result: Mapping[str, Any]) -> str:
    settings, environment = result["settings"], result["environment"]
    hardware = ", ".join([f"{settings['cores']} core(s) of {environment['processor']}", *environment["devices"]])
    return (
        f"median and range of {settings['repeats']} rounds; {hardware}; torch {environment['torch']}; {result['date']}"
    )
