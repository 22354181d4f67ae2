"""Pictures of classes as inline SVG: which are taken for which, and where their images lie on a map of features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from relssl.charts import CLASS_COLOURS

MOST_CLASSES = 100  # a picture of more confusions than that shows nothing; the table of the most frequent does
MOST_NAMED = 24  # up to here every cell has its figure and every row its name
MAP_SIDE, MAP_MARGIN, LEGEND = 560, 10, 150
MOST_IN_LEGEND = 20
_GRID = 400
SHADES = 16


def confusion_chart(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Markup:
    """Rows are classes, columns what their images were taken for, in percent of the row; empty above 100 classes.

    Right answers and confusions have a colour each; the strength of a confusion is relative to the largest one.
    """
    if not 1 < len(names) <= MOST_CLASSES:
        return Markup("")
    named = len(names) <= MOST_NAMED
    side = max(_GRID / len(names), 26) if named else _GRID / len(names)
    left, top = (20 + 7 * min(max(map(len, names)), 16), 22 + 6 * min(max(map(len, names)), 12)) if named else (34, 34)
    shares = [[100 * n / sum(row) if sum(row) else 0.0 for n in row] for row in counts]
    worst = max((s for i, row in enumerate(shares) for j, s in enumerate(row) if i != j), default=0.0) or 1.0
    cells = [
        _Cell(
            left + j * side,
            top + i * side,
            i == j,
            share,
            share / 100 if i == j else share / worst * 0.85,
            f"{names[i]} taken for {names[j]}: {counts[i][j]} of {sum(counts[i])}",
        )
        for i, row in enumerate(shares)
        for j, share in enumerate(row)
    ]
    body = Markup("").join(_named_cell(cell, side) for cell in cells) if named else _shaded(cells, side)
    words = _axis_names(names, left, top, side) if named else _axis_titles(left, top)
    width, height = left + len(names) * side + (22 if named else 4), top + len(names) * side + 4
    label = "confusion matrix: rows are classes, columns what they were taken for"
    return Markup('<svg class="classes" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}{}</svg>').format(
        width, height, label, words, body
    )


@dataclass(frozen=True)
class _Cell:
    x: float
    y: float
    is_right: bool
    share: float
    strength: float
    tip: str

    @property
    def kind(self) -> str:
        return "right" if self.is_right else "wrong"


def _named_cell(cell: _Cell, side: float) -> Markup:
    """A square with its percentage, where it is not nothing, and its counts as a tooltip."""
    text = Markup("")
    if round(cell.share):
        text = Markup('<text class="cell {}" x="{:.1f}" y="{:.1f}" text-anchor="middle">{:.0f}</text>').format(
            "onfill" if cell.strength > 0.7 else "ink", cell.x + side / 2, cell.y + side / 2 + 4, cell.share
        )
    square = Markup(
        '<g><title>{0}</title><rect class="{1}" fill-opacity="{2:.3f}" x="{3:.1f}" y="{4:.1f}" width="{5:.1f}" '
        'height="{5:.1f}"/>{6}</g>'
    )
    return square.format(cell.tip, cell.kind, cell.strength, cell.x, cell.y, side - 1, text)


def _shaded(cells: Sequence[_Cell], side: float) -> Markup:
    """Squares without words: one path for each of SHADES strengths, a few bytes for each square."""
    paths: dict[tuple[str, int], list[str]] = {}
    for cell in cells:
        shade = round(cell.strength * SHADES)
        if shade:
            square = f"M{cell.x:.1f} {cell.y:.1f}h{side:.1f}v{side:.1f}h-{side:.1f}z"
            paths.setdefault((cell.kind, shade), []).append(square)
    path = Markup('<path class="{}" fill-opacity="{:.2f}" d="{}"/>')
    return Markup("").join(
        path.format(kind, shade / SHADES, "".join(squares)) for (kind, shade), squares in sorted(paths.items())
    )


def _axis_names(names: Sequence[str], left: float, top: float, side: float) -> Markup:
    parts = []
    for i, name in enumerate(names):
        middle = i * side + side / 2
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>').format(
                left - 8, top + middle + 4, _shortened(name, 16)
            )
        )
        x, y = left + middle + 3, top - 8
        parts.append(
            Markup(
                '<text class="tick" x="{0:.1f}" y="{1:.1f}" transform="rotate(-40 {0:.1f} {1:.1f})">{2}</text>'
            ).format(x, y, _shortened(name, 12))
        )
    return Markup("").join(parts)


def _axis_titles(left: float, top: float) -> Markup:
    return Markup(
        '<text class="tick" x="{}" y="{}">taken for →</text>'
        '<text class="tick" x="{}" y="{}" transform="rotate(90 {} {})">class →</text>'
    ).format(left, top - 10, left - 20, top, left - 20, top)


def map_chart(
    x: Sequence[float], y: Sequence[float], labels: Sequence[int] | None, names: Sequence[str] | None
) -> Markup:
    """Dots at (x, y) in [0, 1], coloured by class; a legend up to 20 classes. Without labels all have one colour."""
    span = MAP_SIDE - 2 * MAP_MARGIN
    groups: dict[int, list[str]] = {}
    for place, (a, b) in enumerate(zip(x, y, strict=True)):
        group = labels[place] if labels is not None else -1
        groups.setdefault(group, []).append(f"M{MAP_MARGIN + span * a:.1f} {MAP_MARGIN + span * (1 - b):.1f}h0")
    total = len(names) if names is not None else 0
    dots = [
        Markup('<path class="dots" stroke="{}" d="{}"><title>{}</title></path>').format(
            class_colour(group, total), "".join(paths), names[group] if names is not None and group >= 0 else "images"
        )
        for group, paths in sorted(groups.items())
    ]
    legend = []
    if names is not None and total <= MOST_IN_LEGEND:
        for row, name in enumerate(names):
            legend.append(
                Markup(
                    '<circle cx="{0}" cy="{1}" r="5" fill="{2}"/><text class="ink" x="{3}" y="{4}">{5}</text>'
                ).format(
                    MAP_SIDE + 14,
                    24 + 22 * row,
                    class_colour(row, total),
                    MAP_SIDE + 26,
                    28 + 22 * row,
                    _shortened(name, 17),
                )
            )
    return Markup('<svg class="map" viewBox="0 0 {} {}" role="img" aria-label="map of features">{}{}</svg>').format(
        MAP_SIDE + (LEGEND if legend else 0), MAP_SIDE, Markup("").join(dots), Markup("").join(legend)
    )


def class_colour(number: int, total: int) -> str:
    """Of ten fixed colours, or evenly around the colour wheel where there are more classes."""
    if number < 0:
        return CLASS_COLOURS[0]
    if total <= len(CLASS_COLOURS):
        return CLASS_COLOURS[number]
    return f"hsl({360 * number / total:.0f} 62% {(48, 62)[number % 2]}%)"


def _shortened(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
