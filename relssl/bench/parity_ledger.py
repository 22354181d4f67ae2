"""What the parity certificate allows and what it finds: one table of tolerances, and rows of differences.

Everything is in levels of 0 ... 255.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipelines.errors import RunError

# Means, percentiles and shares that were measured on one sample are allowed this much more on another. Maxima are
# not, and neither is what was set as a requirement.
OTHER_DATA = 1.3
_LABELS = {"max": "max", "mean": "mean", "p99": "p99", "above_one": "> 1 level"}


@dataclass(frozen=True)
class Tolerance:
    """The largest differences that pass; `above_one` is a share of the values. What is None is not looked at."""

    source: str
    max: float | None = None
    mean: float | None = None
    p99: float | None = None
    above_one: float | None = None

    def bounds(self) -> dict[str, float]:
        """The statistics that are limited, by name."""
        return {name: value for name, value in asdict(self).items() if name != "source" and value is not None}

    def text(self) -> str:
        """The bounds in words, such as `mean ≤ 0.3, > 1 level ≤ 0.13 %`."""

        def number(name: str, value: float) -> str:
            return f"{100 * value:g} %" if name == "above_one" else f"{value:g}"

        return ", ".join(f"{_LABELS[name]} ≤ {number(name, value)}" for name, value in self.bounds().items())


def _measured(source: str, **statistics: float) -> Tolerance:
    """A tolerance that was set after measurements on 48 ImageNet photographs."""
    wider = {name: round(value * OTHER_DATA, 6) for name, value in statistics.items()}
    return Tolerance(f"{source}; bound for 48 ImageNet photographs, times {OTHER_DATA}", **wider)


_FAST_DCT = "FFCV decodes with libjpeg's fast inverse DCT"
_CLAMP = "PIL rounds and clamps between its two passes"
_SAME_FLOATS = "the same operations in float"

TOLERANCES: dict[str, Tolerance] = {
    "decode": Tolerance("the same libjpeg-turbo transform", max=0),
    "decode, other transform": _measured(_FAST_DCT, mean=1.6),
    "crop, bilinear": Tolerance("one rounding to 8 bits", max=1),
    "crop, bilinear, bf16": Tolerance("pixels and sums rounded to 8 bits", max=2),
    "crop, padded": Tolerance("nothing is resized, and outside is black", max=0),
    "crop, bicubic": _measured(_CLAMP, mean=0.25, above_one=0.001),
    "crop, bicubic, bf16": _measured(_CLAMP, mean=0.25, above_one=0.005),
    "crop, dali": _measured("DALI's filter ends elsewhere than PIL's", mean=0.25, above_one=0.002),
    "crop, dali, small": Tolerance("DALI repeats the border where PIL's filter ends, and small crops are mostly border",
                                   mean=0.25, above_one=0.01),
    "crop, other transform": _measured(_FAST_DCT, mean=1.6),
    "crop, area": _measured("another resize: a smoke test", mean=1.5),
    "crop, area, other transform": _measured("the sum of area and decode", mean=3.1),
    "colour, float": Tolerance(_SAME_FLOATS, max=0.01),
    "colour, float, solarise": Tolerance(f"{_SAME_FLOATS}; a value on the threshold may fall on the other side",
                                         max=1.1, mean=0.005),
    "affine, float": Tolerance("the same transform; a pixel on the edge of the image may fall on the other side",
                               mean=0.01, above_one=0.0001),
    "randaugment": Tolerance("PIL's operations on 8-bit levels", max=1e-4),
    "colour, fp16": Tolerance(f"{_SAME_FLOATS}, and half a unit in fp16's last place", max=0.0725),
    "colour, bf16": Tolerance(f"{_SAME_FLOATS}, and half a unit in bf16's last place", max=0.51),
    "colour, PIL": Tolerance("one rounding to 8 bits", max=1),
    "hue, PIL": _measured("PIL turns the hue of 8-bit HSV", mean=0.4, p99=4),
    "blur, PIL": _measured("PIL blurs by three boxes", mean=0.6),
    "affine, PIL": Tolerance("PIL cuts fractions off; a pixel on the edge of the image may fall on the other side",
                             mean=0.6, above_one=0.0001),
    "chain, PIL": Tolerance("PIL rounds to 8 bits after every operation", mean=1.5),
    "chain, PIL, other transform": Tolerance("the sum of chain and decode", mean=3.1),
    "chain, PIL, area": Tolerance("the sum of chain and area", mean=3.0),
    "chain, PIL, area, other transform": Tolerance("the sum of chain, area and decode", mean=4.6),
    "engines": Tolerance("two crops within 0.25 of PIL's", mean=0.5),
    "engines, other transform": _measured(_FAST_DCT, mean=1.6),
}  # fmt: skip


class Differences:
    """Statistics of absolute differences, gathered batch by batch.

    The 99th percentile comes from a histogram over the leading bits of the differences as float32: exact for whole
    levels, to 0.2 % of itself otherwise. What is not a number counts as 256 levels.
    """

    _DROPPED_BITS = 14  # keeps nine bits of the mantissa
    _WORST = np.float32(256)

    def __init__(self) -> None:
        self.max = 0.0
        self.count = 0
        self._sum = 0.0
        self._above_one = 0
        self._histogram = np.zeros((int(self._WORST.view(np.int32)) >> self._DROPPED_BITS) + 1, np.int64)

    def add(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Compare two arrays of levels of one shape."""
        if ours.shape != theirs.shape:
            raise RunError(f"parity: expected an array of shape {theirs.shape}, got {ours.shape}")
        found = np.abs(ours.astype(np.float32) - theirs.astype(np.float32)).ravel()
        found = np.where(found <= self._WORST, found, self._WORST)
        self.max = max(self.max, float(found.max()))
        self.count += found.size
        self._sum += float(found.sum(dtype=np.float64))
        self._above_one += int(np.count_nonzero(found > 1))
        self._histogram += np.bincount(found.view(np.int32) >> self._DROPPED_BITS, minlength=len(self._histogram))

    @property
    def mean(self) -> float:
        return self._sum / self.count

    @property
    def above_one(self) -> float:
        """Share of values that differ by more than one level."""
        return self._above_one / self.count

    @property
    def p99(self) -> float:
        place = int(np.searchsorted(np.cumsum(self._histogram), 0.99 * self.count))
        return float(np.int32(place << self._DROPPED_BITS).view(np.float32))


@dataclass
class Row:
    """One comparison: what was checked, of whom, in which case, against what; `limit` names its tolerance."""

    check: str
    subject: str
    case: str
    against: str
    limit: str
    found: Differences = field(default_factory=Differences, repr=False)

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[self.limit]

    @property
    def exceeded(self) -> list[str]:
        """Names of the statistics that are over their limit."""
        return [name for name, most in self.tolerance.bounds().items() if not getattr(self.found, name) <= most]

    @property
    def passed(self) -> bool:
        return not self.exceeded

    @property
    def verdict(self) -> str:
        return "pass" if self.passed else "FAIL: " + ", ".join(_LABELS[name] for name in self.exceeded)

    def record(self) -> dict[str, Any]:
        """The row for JSON."""
        return {
            **{name: getattr(self, name) for name in ("check", "subject", "case", "against", "limit")},
            **{name: getattr(self.found, name) for name in ("max", "mean", "p99", "above_one", "count")},
            "tolerance": self.tolerance.bounds(),
            "source": self.tolerance.source,
            "passed": self.passed,
        }


class Ledger:
    """Rows by name, in the order in which they were first written to."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, ...], Row] = {}

    def compare(
        self, check: str, subject: str, case: str, against: str, limit: str, ours: np.ndarray, theirs: np.ndarray
    ) -> None:
        """Add the differences of two arrays of levels to the row of that name."""
        name = (check, subject, case, against)
        if name not in self._rows:
            self._rows[name] = Row(*name, limit)
        self._rows[name].found.add(ours, theirs)

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())
