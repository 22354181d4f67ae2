"""What the tests that carry the marker `evidence` showed: a plugin of pytest that writes it down, and its reading.

    python -m pytest -m evidence -p benchmarks.evidence --evidence-record FILE

The marker is `evidence(method, level, what, *, golden, dtype, tolerance, gradient)`. `golden` names a file of
tests/golden, `dtype` is that of the test's parameter unless given, `tolerance` is a number or a text, or one per dtype,
`gradient` says that gradients are compared, too. What a test measures itself it tells with pytest's fixture
`record_property`: `steps`, `arrays` and `largest_error` are kept. A test with several markers is evidence for several
things. Whether a level is reached follows from outcomes alone.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORMAT = 1
# Loss and gradient; training steps; two processes; something that methods are made of.
LEVELS = ("L0", "L1", "W2", "part")
MEASURED = ("steps", "arrays", "largest_error")
# Tests of every method, in a file that knows none by name; a parameter that ends in `name` is the method.
OF_EVERY_METHOD = {
    "tests/test_methods.py::test_two_processes_equal_one": (
        "three updates in two processes, and in one on the same global batch: parameters and buffers"
    ),
    "tests/test_methods.py::test_two_processes_equal_two_micro_batches": (
        "three updates in two processes, and in one with two micro-batches: parameters; pairs stay within a process"
    ),
    "tests/test_methods.py::test_two_processes_hold_the_others_constant": (
        "gradients of a first update in two processes, and in one that holds the other half's embeddings constant"
    ),
}

State = Literal["reached", "failed", "skipped", "absent"]


@dataclass(frozen=True)
class Evidence:
    """One test for one level of one method.

    Attributes:
        test: pytest's node id. outcome: passed, failed or skipped; reason: unless it passed.
        variant: a setting under which the same was tested.
        steps, arrays, largest_error: what the test has told.
    """

    test: str
    outcome: str
    method: str
    level: str
    what: str
    reason: str = ""
    golden: str = ""
    dtype: str = ""
    tolerance: str = ""
    gradient: bool = False
    variant: str = ""
    steps: int | None = None
    arrays: int | None = None
    largest_error: float | None = None

    @property
    def function(self) -> str:
        """The node id without parameters: `tests/relssl/test_knn.py::test_it`."""
        return self.test.partition("[")[0]


# -- the record ------------------------------------------------------------------------------------------------------


def read(path: Path) -> tuple[dict[str, Any], list[Evidence]]:
    """What stands above the tests (command, date, hardware, golden files), and the tests.

    Raises:
        ValueError: no record of this format; the message says what to do.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"its format is {record['format']}, expected {FORMAT}")
        names = {field.name for field in fields(Evidence)}
        tests = [Evidence(**{key: raw[key] for key in names & raw.keys()}) for raw in record.pop("tests")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of evidence ({error}); run `make status`") from error
    return record, tests


def dump(head: Mapping[str, Any], tests: Iterable[Evidence]) -> str:
    """JSON with one line per test, so that a change can be read in a diff."""
    usual = {entry.name: entry.default for entry in fields(Evidence)}
    lines = [json.dumps({k: v for k, v in asdict(test).items() if v != usual[k]}) for test in tests]
    above = json.dumps({"format": FORMAT, **head}, indent=1).removesuffix("\n}")
    return above + ',\n "tests": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def state(tests: Iterable[Evidence]) -> State:
    """Reached: there is a test, and every one passed."""
    outcomes = {test.outcome for test in tests}
    if not outcomes:
        return "absent"
    if outcomes == {"passed"}:
        return "reached"
    return "skipped" if outcomes <= {"passed", "skipped"} else "failed"


def fingerprint(path: Path) -> str:
    """The first half of the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def functions(root: Path = ROOT) -> set[str]:
    """Node ids, without parameters, of the test functions that are evidence, from the source of `tests/`."""
    found = set()
    for path in sorted((root / "tests").rglob("test_*.py")):
        name, source = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        if "mark.evidence(" not in source and not any(test.startswith(f"{name}::") for test in OF_EVERY_METHOD):
            continue
        defined = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        tests = [node for node in defined if node.name.startswith("test")]
        helpers = [node for node in defined if node not in tests and "mark.evidence(" in ast.unparse(node)]
        makers = ["mark.evidence(", *(f"{node.name}(" for node in helpers)]
        for node in tests:
            decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
            if any(maker in decorators for maker in makers) or f"{name}::{node.name}" in OF_EVERY_METHOD:
                found.add(f"{name}::{node.name}")
    return found


# -- the plugin ------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--evidence-record", type=Path, metavar="FILE", help="write what the marked tests showed")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("evidence_record") is not None:
        config.pluginmanager.register(Recorder(config.getoption("evidence_record")))


@pytest.hookimpl(tryfirst=True)  # before `-m evidence` leaves out what is not marked
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if (what := OF_EVERY_METHOD.get(item.nodeid.partition("[")[0])) is not None:
            method = next(value for key, value in params.items() if key.endswith("name"))
            item.add_marker(pytest.mark.evidence(method, "W2", what, dtype="float64", tolerance=1e-9))
        for mark in item.iter_markers("evidence"):
            item.user_properties.append(("evidence", described(mark, params)))


def described(mark: pytest.Mark, params: Mapping[str, Any]) -> dict[str, str | bool]:
    """A marker and the parameters of its test, in the words of the record.

    Raises:
        pytest.UsageError: an unknown level, or other arguments than the marker's.
    """
    unknown = mark.kwargs.keys() - {"golden", "dtype", "tolerance", "gradient"}
    if len(mark.args) != 3 or unknown or mark.args[1] not in LEVELS:
        raise pytest.UsageError(
            "expected evidence(method, level, what, golden=, dtype=, tolerance=, gradient=), level one of "
            f"{', '.join(LEVELS)}; got {mark.args}, {mark.kwargs}"
        )
    method, level, what = mark.args
    dtype = str(mark.kwargs.get("dtype", params.get("dtype", ""))).removeprefix("torch.")
    tolerance = mark.kwargs.get("tolerance", "")
    if isinstance(tolerance, Mapping):
        tolerance = tolerance[dtype]
    if isinstance(tolerance, float):
        tolerance = f"{tolerance:g}".replace("e-0", "e-")
    return {
        "method": method,
        "level": level,
        "what": what,
        "golden": mark.kwargs.get("golden", ""),
        "dtype": dtype,
        "tolerance": tolerance,
        "gradient": mark.kwargs.get("gradient", False),
        "variant": f"`norm: {params['norm']}`" if "norm" in params else "",
    }


class Recorder:
    """Keeps the reports of a session and writes them at its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reports: dict[str, list[pytest.TestReport]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.setdefault(report.nodeid, []).append(report)

    def pytest_sessionfinish(self) -> None:
        tests = [test for reports in self.reports.values() for test in self.tests_of(reports)]
        self.path.write_text(dump({}, tests), encoding="utf-8")

    @staticmethod
    def tests_of(reports: list[pytest.TestReport]) -> list[Evidence]:
        """A test is as good as the worst of its setup, call and teardown."""
        worst = max(reports, key=lambda report: ("passed", "skipped", "failed").index(report.outcome))
        told = reports[-1].user_properties
        measured = {key: value for key, value in told if key in MEASURED}
        reason = "" if worst.outcome == "passed" else _reason(worst)
        return [
            Evidence(worst.nodeid, worst.outcome, reason=reason, **properties, **measured)  # type: ignore[arg-type]
            for key, properties in told
            if key == "evidence" and isinstance(properties, dict)
        ]


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # of a skipped test: file, line, reason
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash is not None else report.longreprtext).splitlines()
    return lines[0] if lines else "no reason given"
