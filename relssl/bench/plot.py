"""The result of a benchmark as a picture: horizontal bars of images per second, a panel for each measurement."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.errors import ConfigError
from relssl.bench.table import title

FORMATS = (".svg", ".png", ".pdf")
_OURS, _PEER, _INK, _FAINT = "#1f6f8b", "#b9b4a8", "#22262a", "#6b7075"
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
    check_plot_path(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = result["measurements"]
    heights = [_PANEL_INCHES + _BAR_INCHES * len(panel["peers"]) for panel in panels]
    with rc_context({"svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif", "svg.hashsalt": "relssl"}):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06)
        figure = Figure(figsize=(_WIDTH_INCHES, sum(heights) + 0.45), layout=layout)
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, axis in zip(panels, axes, strict=True):
            _draw(panel, axis, result["settings"])
        figure.supxlabel(_footer(result), fontsize=7, color=_FAINT)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    return path


def _draw(panel: Mapping[str, Any], axis: Any, settings: Mapping[str, Any]) -> None:
    """One measurement: a bar per peer, a whisker over the range of its rounds, the rate in figures behind it."""
    peers = panel["peers"]
    ours = next(peer["title"] for peer in peers if peer["is_ours"])
    farthest = max(peer["images_per_second"]["max"] for peer in peers)
    for row, peer in enumerate(peers):
        rate = peer["images_per_second"]
        axis.barh(row, rate["median"], height=0.66, color=_OURS if peer["is_ours"] else _PEER)
        axis.hlines(row, rate["min"], rate["max"], color=_INK, linewidth=1.1)
        for end in (rate["min"], rate["max"]):
            axis.vlines(end, row - 0.13, row + 0.13, color=_INK, linewidth=1.1)
        label = f"{rate['median']:,.0f}{_times(panel, ours, peer['title'])}"
        axis.text(rate["max"] + 0.015 * farthest, row, label, va="center", color=_INK)
    axis.set_yticks(range(len(peers)), [peer["title"] for peer in peers])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.28 * farthest)
    axis.set_xlabel("images/s", fontsize=8, color=_FAINT)
    axis.set_title(title(panel, settings), loc="left", fontsize=9, fontweight="bold", color=_INK)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8, colors=_FAINT)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(_PEER)


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
