"""The parity certificate as text, as a table for the documentation, and as JSON."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relssl.bench.parity_ledger import Row
from relssl.runfolder import environment, write_atomically

FORMAT = 1  # of the JSON record
HEADER = ["check", "of", "case", "against", "max", "mean", "p99", "> 1 level", "tolerance", "result"]
_PACKAGES = ("torchvision", "pillow", "numpy", "numba", "ffcv", "nvidia-dali-cuda120", "nvidia-dali-cuda130")


@dataclass
class Certificate:
    """All rows, and what one needs to know to repeat them.

    `absent` are engines and devices that this machine lacks, `refused` the cases that an engine does not make, each
    with the reason.
    """

    rows: list[Row]
    absent: dict[str, str]
    refused: dict[str, str]
    images: str
    seconds: float
    environment: dict[str, Any]

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if not row.passed]

    @property
    def passed(self) -> bool:
        return bool(self.rows) and not self.failed

    @property
    def verdict(self) -> str:
        """PASS or FAIL, how many rows, and who is absent."""
        within = len(self.rows) - len(self.failed)
        absent = f"; absent: {', '.join(self.absent)}" if self.absent else ""
        return f"{'PASS' if self.passed else 'FAIL'}: {within} of {len(self.rows)} within tolerance{absent}"

    def lines(self) -> Iterator[str]:
        """The certificate as text; the verdict is the last line."""
        yield f"parity with PIL and torchvision, in levels of 0 ... 255; images: {self.images}"
        table = [HEADER, *(_cells(row) for row in self.rows)]
        widths = [max(len(cells[i]) for cells in table) for i in range(len(HEADER))]
        for cells in table:
            yield "  ".join(text.ljust(width) for text, width in zip(cells, widths, strict=True)).rstrip()
        yield from self._notes()
        yield f"{self._setting()}; {self.seconds:.0f} s"
        yield self.verdict

    def markdown(self, command: str) -> str:
        """The certificate as a section of a page."""
        table = [HEADER, ["---"] * len(HEADER), *(_cells(row) for row in self.rows)]
        return "\n".join(
            [
                f"`{command}`, {self.environment['started'][:10]}, images: {self.images}. {self._setting()}.",
                "",
                f"**{self.verdict}**",
                "",
                *(f"| {' | '.join(cells)} |" for cells in table),
                *(f"\n{note}." for note in self._notes()),
            ]
        )

    def record(self, command: str) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "format": FORMAT,
            "verdict": "pass" if self.passed else "fail",
            "passed": len(self.rows) - len(self.failed),
            "failed": len(self.failed),
            "images": self.images,
            "absent": self.absent,
            "refused": self.refused,
            "rows": [row.record() for row in self.rows],
            "command": command,
            "date": self.environment["started"],
            "seconds": round(self.seconds, 1),
            "environment": self.environment,
        }

    def _notes(self) -> Iterator[str]:
        for name, reason in self.absent.items():
            yield f"{name} absent: {reason}"
        for name, reason in self.refused.items():
            yield f"{name} not made: {reason}"

    def _setting(self) -> str:
        names = [self.environment["processor"], *self.environment["devices"]]
        versions = (f"{name} {version}" for name, version in self.environment["versions"].items())
        return f"{', '.join(names)}; {', '.join(versions)}"


def _cells(row: Row) -> list[str]:
    found = row.found
    numbers = [f"{found.max:.3g}", f"{found.mean:.3g}", f"{found.p99:.3g}", f"{100 * found.above_one:.3f} %"]
    return [row.check, row.subject, row.case, row.against, *numbers, row.tolerance.text(), row.verdict]


def setting() -> dict[str, Any]:
    """`runfolder.environment` with the versions of everything that makes pixels."""
    known = environment()
    versions = {"relssl": known["relssl"], "python": known["python"], "torch": known["torch"]}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**known, "versions": versions}


def write_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the marks `<!-- parity: NAME -->` and `<!-- end -->` of a page, which is made if need be.

    A page without these marks gets them at its end.
    """
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    begin, end = f"<!-- parity: {name} -->", "<!-- end -->"
    section = f"{begin}\n{text}\n{end}"
    marked = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if marked.search(page):
        page = marked.sub(lambda _: section, page)
    else:
        page = f"{page.rstrip()}\n\n{section}\n".lstrip()
    write_atomically(path, page)
