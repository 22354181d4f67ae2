"""`relssl verify`: is this `.beton` file sound, and what is in it?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipelines import beton
from pipelines.errors import InputError

_SHOWN = 10  # problems


@dataclass
class Verification:
    """The report of `pipelines.beton.verify` and a description of the file, for a terminal."""

    report: beton.VerifyReport
    description: list[str]

    @property
    def ok(self) -> bool:
        return self.report.ok

    def lines(self) -> list[str]:
        """What is in the file, what was checked, and what is wrong."""
        report = self.report
        checked = ["tables"]
        checked += ["all payloads against the manifest"] if report.payloads_hashed else []
        checked += [f"{report.decoded:,} images decoded"] if report.decoded else []
        lines = [*self.description, f"checked: {', '.join(checked)}"] if self.description else []
        if self.ok:
            return [
                *lines,
                f"{report.path} is sound",
                f"next: relssl views RECIPE --out views.png data.train={report.path}",
            ]
        lines += [f"  {problem}" for problem in report.problems[:_SHOWN]]
        if len(report.problems) > _SHOWN:
            lines.append(f"  ... and {len(report.problems) - _SHOWN} more")
        return [*lines, f"{report.path} is damaged; convert it again"]

    def text(self) -> str:
        return "\n".join(self.lines())

    def raise_if_damaged(self) -> None:
        """Raise InputError with the first problem, when there is one."""
        if not self.ok:
            raise InputError(self.report.problems[0])


def verify(
    path: str | Path, *, decode: bool | None = None, progress: Callable[[int, int], None] | None = None
) -> Verification:
    """Read a whole file and compare it with its manifest.

    `decode`: decode every image too; None (the default) does so only where there is no manifest to compare
    with, for an unchanged payload was decoded when it was converted.
    """
    try:
        with beton.Beton(path) as file:
            description = _describe(file)
            decode = file.manifest is None if decode is None else decode
    except InputError:
        description = []  # the report says why
    return Verification(beton.verify(path, decode=bool(decode), progress=progress), description)


def _describe(file: beton.Beton) -> list[str]:
    labelled, jpegs = int((file.labels >= 0).sum()), int(file.is_jpeg.sum())
    kind = "JPEG" if jpegs == len(file) else "raw pixels" if jpegs == 0 else f"{jpegs:,} JPEG, the rest raw pixels"
    classes = f"{len(file.classes)} classes" if file.classes else "no class names"
    sizes = (
        f"{file.widths.min()}x{file.heights.min()}"
        if len({*zip(file.widths.tolist(), file.heights.tolist(), strict=True)}) == 1
        else f"{file.widths.min()}-{file.widths.max()} wide, {file.heights.min()}-{file.heights.max()} high"
    )
    lines = [
        f"{file.path}: {len(file):,} images, {len(file.data) / 1e6:,.1f} MB, {kind}, {sizes}",
        f"labels: {labelled:,} of {len(file):,}, {classes}{', with masks' if file.has_masks else ''}",
    ]
    if file.manifest is not None:
        lines.append(f"source: {file.manifest.get('source', 'unknown')}; content {file.content_hash}")
    return lines
