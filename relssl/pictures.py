"""Labelled sheets of pictures: an original with its views, a query with its nearest neighbours.

Plain Pillow, with the scalable font that comes with it, so a sheet looks the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipelines.errors import ConfigError

Picture = np.ndarray  # uint8 (H, W, 3), RGB
Row = tuple[str, Sequence[Picture]]

BACKGROUND, INK, FAINT = (255, 255, 255), (28, 30, 36), (112, 116, 128)
SAME, OTHER = (0, 130, 90), (200, 70, 20)  # told apart by colour-blind readers too
SUFFIXES = (".png", ".jpg", ".jpeg")
GAP, MARGIN, FRAME = 8, 16, 3
TITLE_SIZE, TEXT_SIZE, SMALL_SIZE = 18, 14, 12


@dataclass(frozen=True)
class _Cell:
    image: Image.Image
    notes: tuple[str, ...] = ()
    frame: tuple[int, int, int] | None = None


def sheet(
    rows: Sequence[Row],
    *,
    column_titles: Sequence[str] | None = None,
    cell: int = 128,
    title: str | None = None,
    caption: str | None = None,
    fit_first_column: bool = True,
) -> Image.Image:
    """A grid with one row per sample: its label, its pictures, and every picture's size in pixels beneath it.

    The first column (the originals, of any size) is fitted into its cell. All other pictures share one
    magnification, chosen so that the largest fills the cell, so a 96-pixel crop looks smaller than a
    224-pixel one; the line at the foot states it. Whole-number enlargements keep pixels square and sharp.

    Args:
        rows: (label, pictures) pairs; a picture is uint8 (H, W, 3). Rows may differ in length.
        column_titles: one per column; fewer are allowed.
        cell: side of a cell in pixels of the sheet.
        title, caption: lines above and below the grid.
        fit_first_column: False treats the first column like the others.

    Raises:
        ValueError: no pictures, or something that is not a uint8 (H, W, 3) array.
    """
    _check(rows, cell)
    first = 1 if fit_first_column else 0
    shared = [picture for _, pictures in rows for picture in pictures[first:]]
    zoom = _zoom(max(max(picture.shape[:2]) for picture in shared), cell) if shared else 1.0
    cells = []
    for _, pictures in rows:
        line = []
        for place, picture in enumerate(pictures):
            scale = zoom if place >= first else _zoom(max(picture.shape[:2]), cell)
            line.append(_Cell(_scaled(picture, scale), (_size(picture),)))
        cells.append(line)
    foot = [caption] if caption else []
    if shared:
        which = "first column fitted to its cell, all others" if first else "all pictures"
        wide = "" if zoom == 1 else f": 1 pixel is drawn {zoom:.3g} pixels wide"
        foot.append(f"{which} at one scale{wide}")
    return _compose([label for label, _ in rows], cells, list(column_titles or []), cell, title, foot)


def neighbour_sheet(
    rows: Sequence[tuple[Picture, Sequence[Picture]]],
    *,
    query_labels: Sequence[str] | None = None,
    neighbour_labels: Sequence[Sequence[str]] | None = None,
    similarities: Sequence[Sequence[float]] | None = None,
    cell: int = 96,
    title: str | None = "Nearest neighbours",
) -> Image.Image:
    """Queries on the left, the images nearest to each beside it, nearest first, all fitted to their cells.

    With labels of both, a neighbour of the query's class has a green frame, any other an orange one; the
    class stands beneath.

    Args:
        rows: (query, neighbours), pictures as in `sheet`.
        query_labels: class names, one per row.
        neighbour_labels: class names, one per neighbour.
        similarities: one per neighbour, written beneath it.

    Raises:
        ValueError: no pictures, wrong arrays, or labels that do not match the pictures in number.
    """
    _check([("", [query, *neighbours]) for query, neighbours in rows], cell)
    _check_counts(rows, query_labels, neighbour_labels, similarities)
    cells = []
    for i, (query, neighbours) in enumerate(rows):
        wanted = query_labels[i] if query_labels else None
        line = [_Cell(_fitted(query, cell), (wanted,) if wanted else ())]
        for j, picture in enumerate(neighbours):
            found = neighbour_labels[i][j] if neighbour_labels else None
            known = wanted is not None and found is not None
            notes = [found] if found else []
            notes += [f"{similarities[i][j]:.2f}"] if similarities else []
            frame = (SAME if found == wanted else OTHER) if known else None
            line.append(_Cell(_fitted(picture, cell), tuple(notes), frame))
        cells.append(line)
    count = max(len(neighbours) for _, neighbours in rows)
    titles = ["query", *[f"{rank}." for rank in range(1, count + 1)]]
    foot = ["beneath: cosine similarity"] if similarities else []
    if query_labels and neighbour_labels:
        foot.insert(0, "green: the query's class, orange: another")
    return _compose([""] * len(rows), cells, titles, cell, title, ["; ".join(foot)] if foot else [])


def check_place(place: Path) -> None:
    """Refuse a place where no picture can be written, before one is made.

    Raises:
        ConfigError: a suffix that is none of `SUFFIXES`, or no such folder.
    """
    if place.suffix.lower() not in SUFFIXES or not place.parent.is_dir():
        raise ConfigError(
            f"a picture is written as {', '.join(SUFFIXES)} into a folder that exists; got {place}: choose another file"
        )


def save_picture(picture: Image.Image, place: Path) -> None:
    """Write a picture whole or not at all, in the format of its suffix; what was there is replaced.

    Raises:
        ConfigError: as `check_place`.
    """
    check_place(place)
    work = place.with_name(f".writing.{place.name}")
    try:
        picture.save(work)
        work.replace(place)
    finally:
        work.unlink(missing_ok=True)


def _check(rows: Sequence[Row], cell: int) -> None:
    if cell < 16:
        raise ValueError(f"a cell must be at least 16 pixels wide, got {cell}")
    if not any(len(pictures) for _, pictures in rows):
        raise ValueError("a sheet needs at least one picture, got none")
    for place, (_, pictures) in enumerate(rows):
        for picture in pictures:
            shape, dtype = getattr(picture, "shape", None), getattr(picture, "dtype", type(picture))
            if shape is None or len(shape) != 3 or shape[2] != 3 or 0 in shape or dtype != np.uint8:
                raise ValueError(
                    f"row {place}: expected pictures as uint8 (height, width, 3), got {dtype}, shape {shape}"
                )


def _check_counts(
    rows: Sequence[tuple[Picture, Sequence[Picture]]],
    query_labels: Sequence[str] | None,
    neighbour_labels: Sequence[Sequence[str]] | None,
    similarities: Sequence[Sequence[float]] | None,
) -> None:
    if query_labels is not None and len(query_labels) != len(rows):
        raise ValueError(f"{len(rows)} queries, but {len(query_labels)} query labels")
    wanted = [len(neighbours) for _, neighbours in rows]
    for name, values in (("neighbour labels", neighbour_labels), ("similarities", similarities)):
        if values is not None and [len(line) for line in values] != wanted:
            raise ValueError(f"{name} must have one entry per neighbour, {wanted}; got {[len(x) for x in values]}")


def _size(picture: Picture) -> str:
    return f"{picture.shape[1]} x {picture.shape[0]}"  # the built-in font has no multiplication sign


def _zoom(longest: int, cell: int) -> float:
    """The scale that fits `longest` into a cell; a whole number when enlarging."""
    return float(cell // longest) if cell >= longest else cell / longest


def _fitted(picture: Picture, cell: int) -> Image.Image:
    return _scaled(picture, _zoom(max(picture.shape[:2]), cell))


def _scaled(picture: Picture, scale: float) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(picture))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return image.resize(size, how)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _width(text: str, size: int) -> int:
    return int(np.ceil(_font(size).getlength(text)))


def _shortened(text: str, size: int, room: int) -> str:
    if _width(text, size) <= room:
        return text
    while text and _width(text + "...", size) > room:
        text = text[:-1]
    return text + "..."


def _compose(
    labels: list[str],
    cells: list[list[_Cell]],
    titles: list[str],
    cell: int,
    title: str | None,
    foot: list[str],
) -> Image.Image:
    """Lay out and paint: title, column titles, rows of (label, cells with notes beneath), foot lines."""
    pitch = cell + 2 * FRAME + GAP
    columns = max(len(line) for line in cells)
    label_width = min(max((_width(label, TEXT_SIZE) for label in labels), default=0), 220)
    left = MARGIN + (label_width + GAP if label_width else 0)
    num_notes = max((len(item.notes) for line in cells for item in line), default=0)
    row_height = cell + 2 * FRAME + num_notes * (SMALL_SIZE + 4) + GAP
    top = MARGIN + (TITLE_SIZE + 12 if title else 0) + (TEXT_SIZE + 10 if titles else 0)
    grid_width = left + columns * pitch - GAP + MARGIN
    lines = [part for text in foot for part in _wrapped(text, SMALL_SIZE, max(grid_width, 320) - 2 * MARGIN)]
    width = max(grid_width, 320, 2 * MARGIN + _width(title or "", TITLE_SIZE))
    height = top + len(cells) * row_height + len(lines) * (SMALL_SIZE + 6) + MARGIN
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((MARGIN, MARGIN), title, INK, _font(TITLE_SIZE))
    for column, text in enumerate(titles[:columns]):
        place = (left + column * pitch + FRAME, top - TEXT_SIZE - 8)
        draw.text(place, _shortened(text, TEXT_SIZE, cell), INK, _font(TEXT_SIZE))
    for number, (label, line) in enumerate(zip(labels, cells, strict=True)):
        y = top + number * row_height
        text = _shortened(label, TEXT_SIZE, label_width) if label_width else ""
        draw.text((MARGIN, y + FRAME + (cell - TEXT_SIZE) // 2), text, INK, _font(TEXT_SIZE))
        for column, item in enumerate(line):
            _paint(canvas, draw, item, left + column * pitch, y, cell)
    for number, text in enumerate(lines):
        y = top + len(cells) * row_height + number * (SMALL_SIZE + 6)
        draw.text((MARGIN, y), text, FAINT, _font(SMALL_SIZE))
    return canvas


def _paint(canvas: Image.Image, draw: ImageDraw.ImageDraw, item: _Cell, x: int, y: int, cell: int) -> None:
    """One picture, centred in its cell, its frame around it, its notes below."""
    px, py = x + FRAME + (cell - item.image.width) // 2, y + FRAME + (cell - item.image.height) // 2
    if item.frame is not None:
        box = (px - FRAME, py - FRAME, px + item.image.width + FRAME - 1, py + item.image.height + FRAME - 1)
        draw.rectangle(box, fill=item.frame)
    canvas.paste(item.image, (px, py))
    for number, note in enumerate(item.notes):
        text = _shortened(note, SMALL_SIZE, cell + 2 * FRAME)
        spot = (
            x + FRAME + (cell - _width(text, SMALL_SIZE)) // 2,
            y + cell + 2 * FRAME + number * (SMALL_SIZE + 4),
        )
        draw.text(spot, text, FAINT, _font(SMALL_SIZE))


def _wrapped(text: str, size: int, room: int) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and _width(longer, size) > room:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line] if line else lines
