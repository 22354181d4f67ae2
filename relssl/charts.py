"""Small line charts and share bars as inline SVG, coloured by the page's style sheet (light and dark alike).

Written by hand rather than by a plotting library: a report holds a dozen of them, each a few kilobytes of
text that follows the reader's colour scheme, and drawing them needs no heavy import.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 40
MOST_POINTS = 240  # more are averaged in bins: a chart is 390 pixels wide

Points = Sequence[tuple[float, float]]

# Ten colours that can be told apart on light and dark ground.
CLASS_COLOURS = (
    "#4e79a7", "#f28e2b", "#e15759", "#59a14f", "#b07aa1", "#76b7b2", "#d4a017", "#ff9da7", "#9c755f", "#8b9099",
)  # fmt: skip
# What the pictures of this module and of `class_charts` look like; the page has the variables.
CHART_STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
.grid { stroke: var(--grid); } .tick { fill: var(--soft); }
.ink { fill: var(--ink); } .ground { fill: var(--card); }
.right { fill: var(--c1); } .wrong { fill: var(--c2); }
.cell { font-size: 11px; } .onfill { fill: var(--card); }
.dots { fill: none; stroke-linecap: round; stroke-width: 5; stroke-opacity: .75; }
"""
FILE_STYLE = """
svg { --card: #ffffff; --ink: #1d2026; --soft: #62676f; --grid: #ececE8; --c1: #0b63b5; --c2: #c4570a;
      background: #ffffff; }
@media (prefers-color-scheme: dark) {
  svg { --card: #1d2026; --ink: #e9eaec; --soft: #a2a8b2; --grid: #2a2e35; --c1: #62aef0; --c2: #f0975a;
        background: #1d2026; }
}
"""


@dataclass(frozen=True)
class Series:
    """One curve. `points` (x, y), x increasing; `marked` draws every point with its value as a tooltip.

    `spread`, one number for each point, draws a faint band of so much above and below it.
    """

    name: str
    points: Points
    marked: bool = False
    spread: Sequence[float] = ()


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    label: str,
    x_end: float | None = None,
    from_zero: bool = False,
    x_log: bool = False,
) -> Markup:
    """Curves over a common x axis; an empty string when there is nothing to draw.

    Long curves are averaged in bins, with the range inside each bin as a faint band.

    Args:
        label: what the chart shows, for readers that speak it.
        x_end: the x axis runs from 0 to here (further if the data does); None: only over the data.
        from_zero: the y axis starts at zero.
        x_log: the x axis is logarithmic; x must be above zero.
    """
    drawn = [s for s in map(_finite, series) if s.points]
    if not drawn:
        return Markup("")
    binned = [_binned(s) for s in drawn]
    xs = [x for s in drawn for x, _ in s.points] + ([] if x_end is None else [0.0, x_end])
    low = min(value for bins in binned for _, _, value, _ in bins)
    high = max(value for bins in binned for _, _, _, value in bins)
    frame = _Frame(_extent(xs), nice_ticks(min(low, 0.0) if from_zero else low, high, 5), x_log)
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


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from `low` to `high`; over more than three decades the powers alone."""
    factors = (1, 2, 5) if high / low <= 1000 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [t for d in decades for f in factors if low * (1 - 1e-9) <= (t := f * 10.0**d) <= high * (1 + 1e-9)]


def short_number(value: float) -> str:
    """At most four significant digits: 0.03, 812, 12.5k, 3e-05."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    return "0" if size < 1e-300 else f"{value:.4g}"


def standalone(picture: Markup) -> str:
    """A chart of a page as a file of its own, with the colours that the page's style sheet would give it."""
    opening, rest = str(picture).split(">", 1)
    return f'{opening} xmlns="http://www.w3.org/2000/svg"><style>{FILE_STYLE}{CHART_STYLE}</style>{rest}'


class _Frame:
    """Where numbers lie in the picture."""

    def __init__(self, x_range: tuple[float, float], y_ticks: list[float], x_log: bool):
        self.x_log = x_log
        self.x0, self.x1 = map(self._scaled, x_range)
        self.y_ticks = y_ticks
        ticks = log_ticks(*x_range) if x_log else nice_ticks(*x_range, 6)
        self.x_ticks = [t for t in ticks if self.x0 - 1e-9 <= self._scaled(t) <= self.x1 + 1e-9]

    def x(self, value: float) -> float:
        return LEFT + (self._scaled(value) - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.x_log else value

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _extent(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _finite(series: Series) -> Series:
    keep = [i for i, (x, y) in enumerate(series.points) if math.isfinite(x) and math.isfinite(y)]
    spread = [series.spread[i] for i in keep] if series.spread else ()
    return replace(series, points=[series.points[i] for i in keep], spread=spread)


def _binned(series: Series) -> list[tuple[float, float, float, float]]:
    """(x, mean, lowest, highest) of at most MOST_POINTS groups of neighbouring points."""
    points, spread = series.points, series.spread or [0.0] * len(series.points)
    size = math.ceil(len(points) / MOST_POINTS)
    out = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        xs, ys = [x for x, _ in group], [y for _, y in group]
        low = min(y - s for y, s in zip(ys, spread[start : start + size], strict=True))
        high = max(y + s for y, s in zip(ys, spread[start : start + size], strict=True))
        out.append((sum(xs) / len(xs), sum(ys) / len(ys), low, high))
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
