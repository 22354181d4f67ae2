"""Small line charts and share bars as inline SVG, coloured by the page's style sheet (light and dark alike).

Written by hand rather than by a plotting library: a report holds a dozen of them, each a few kilobytes of
text that follows the reader's colour scheme, and drawing them needs no heavy import.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 40
MOST_POINTS = 240  # more are averaged in bins: a chart is 390 pixels wide

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One curve. `points` (x, y), x increasing; `marked` draws every point with its value as a tooltip."""

    name: str
    points: Points
    marked: bool = False


def line_chart(
    series: Sequence[Series], *, x_label: str, label: str, x_end: float | None = None, from_zero: bool = False
) -> Markup:
    """Curves over a common x axis; an empty string when there is nothing to draw.

    Long curves are averaged in bins, with the range inside each bin as a faint band.

    Args:
        label: what the chart shows, for readers that speak it.
        x_end: the x axis runs from 0 to here (further if the data does); None: only over the data.
        from_zero: the y axis starts at zero.
    """
    clean = [Series(s.name, _finite(s.points), s.marked) for s in series]
    drawn = [s for s in clean if s.points]
    if not drawn:
        return Markup("")
    binned = [_binned(s.points) for s in drawn]
    xs = [x for s in drawn for x, _ in s.points] + ([] if x_end is None else [0.0, x_end])
    low = min(value for bins in binned for _, _, value, _ in bins)
    high = max(value for bins in binned for _, _, _, value in bins)
    frame = _Frame(_extent(xs), nice_ticks(min(low, 0.0) if from_zero else low, high, 5))
    parts = [_axes(frame, x_label)]
    parts += [_curve(frame, i, s, bins) for i, (s, bins) in enumerate(zip(drawn, binned, strict=True), start=1)]
    body = Markup("").join(parts)
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, body
    )


def share_bar(parts: Sequence[tuple[str, float]], *, label: str) -> Markup:
    """One horizontal bar, divided in proportion; parts under 6 % get no text inside."""
    total = sum(value for _, value in parts)
    if total <= 0:
        return Markup("")
    part = Markup('<rect class="fill{}" x="{:.1f}" y="0" width="{:.1f}" height="34"><title>{}: {}</title></rect>')
    inside = Markup('<text class="inside" x="{:.1f}" y="22" text-anchor="middle">{}</text>')
    pieces, x = [], 0.0
    for number, (name, value) in enumerate(parts, start=1):
        width = 900 * value / total
        share = f"{100 * value / total:.0f} %"
        pieces.append(part.format(number, x, max(width - 2, 0.5), name, share))
        if width >= 54:
            pieces.append(inside.format(x + width / 2 - 1, share))
        x += width
    return Markup('<svg class="share" viewBox="0 0 900 34" role="img" aria-label="{}">{}</svg>').format(
        label, Markup("").join(pieces)
    )


def from_to(before: float | None, after: float | None, paper: float | None = None) -> Markup:
    """A 0 to 100 % track: hollow dot before, filled dot after, a bar for the paper's value."""
    known = [value for value in (before, after) if value is not None]
    if not known:
        return Markup("")
    parts = [Markup('<line class="track" x1="6" x2="206" y1="10" y2="10"/>')]
    if before is not None and after is not None:
        parts.append(
            Markup('<line class="gain" x1="{:.1f}" x2="{:.1f}" y1="10" y2="10"/>').format(6 + 2 * before, 6 + 2 * after)
        )
    if paper is not None:
        parts.append(Markup('<line class="paper" x1="{0:.1f}" x2="{0:.1f}" y1="2" y2="18"/>').format(6 + 2 * paper))
    if before is not None:
        parts.append(Markup('<circle class="before" cx="{:.1f}" cy="10" r="4.5"/>').format(6 + 2 * before))
    if after is not None:
        parts.append(Markup('<circle class="after" cx="{:.1f}" cy="10" r="5"/>').format(6 + 2 * after))
    return Markup('<svg class="fromto" viewBox="0 0 212 20" aria-hidden="true">{}</svg>').format(Markup("").join(parts))


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that enclose low and high."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def short_number(value: float) -> str:
    """At most four significant digits: 0.03, 812, 12.5k, 3e-05."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    return "0" if size < 1e-300 else f"{value:.4g}"


class _Frame:
    """Where numbers lie in the picture."""

    def __init__(self, x_range: tuple[float, float], y_ticks: list[float]):
        self.x0, self.x1 = x_range
        self.y_ticks = y_ticks
        self.x_ticks = [t for t in nice_ticks(self.x0, self.x1, 6) if self.x0 - 1e-9 <= t <= self.x1 + 1e-9]

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _extent(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _binned(points: Points) -> list[tuple[float, float, float, float]]:
    """(x, mean, lowest, highest) of at most MOST_POINTS groups of neighbouring points."""
    size = math.ceil(len(points) / MOST_POINTS)
    out = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        ys = [y for _, y in group]
        out.append((sum(x for x, _ in group) / len(group), sum(ys) / len(ys), min(ys), max(ys)))
    return out


def _axes(frame: _Frame, x_label: str) -> Markup:
    parts = []
    for tick in frame.y_ticks:
        y = frame.y(tick)
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 7, y + 4, short_number(tick))
        )
    below = Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
    parts += [below.format(frame.x(t), HEIGHT - BOTTOM + 17, short_number(t)) for t in frame.x_ticks]
    parts.append(below.format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label))
    return Markup("").join(parts)


def _curve(frame: _Frame, number: int, series: Series, bins: list[tuple[float, float, float, float]]) -> Markup:
    parts = []
    if any(low < high for _, _, low, high in bins):
        upper = [f"{frame.x(x):.1f},{frame.y(high):.1f}" for x, _, _, high in bins]
        lower = [f"{frame.x(x):.1f},{frame.y(low):.1f}" for x, _, low, _ in reversed(bins)]
        parts.append(Markup('<polygon class="band{}" points="{}"/>').format(number, " ".join(upper + lower)))
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y, _, _ in bins)
    if len(bins) > 1:
        parts.append(Markup('<polyline class="line{}" points="{}"/>').format(number, path))
    if series.marked or len(bins) == 1:
        dot = Markup('<circle class="dot{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{} {}: {}</title></circle>')
        parts += [
            dot.format(number, frame.x(x), frame.y(y), series.name, short_number(x), short_number(y))
            for x, y, _, _ in bins
        ]
    return Markup("").join(parts)
