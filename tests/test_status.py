"""docs/status.md says what tests showed, and only that: the page, its record, and the command that makes both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import evidence, status
from benchmarks.evidence import Evidence
from benchmarks.status import PaperRow, Sources
from relssl.config import load_recipe
from relssl.recipes import recipe_path

ROOT = Path(__file__).resolve().parent.parent
HEAD = {
    "command": "make status",
    "date": "2026-11-22",
    "hardware": "one core",
    "versions": {"torch": "2"},
    "golden": {"data": evidence.fingerprint(Path(__file__))},
}


def shown(method: str, level: str, outcome: str = "passed", **more: Any) -> Evidence:
    test = more.pop("test", f"tests/test_it.py::test_{method}_{level}[0]")
    return Evidence(test, outcome, method, level, "it", **more)


def sources(*tests: Evidence, **more: Any) -> Sources:
    """Of ReSSL alone, unless more is given."""
    given: dict[str, Any] = {"trained": {"ressl": True}, "cifar": {}, "paper_results": {}, "paper_rows": []}
    return Sources(head=HEAD, tests=tests, **{**given, **more})


def cells(found: Sources, method: str = "ressl") -> dict[str, str]:
    return dict(zip(status.COLUMNS[1:], status.table(found)[method], strict=True))


# -- what is committed -----------------------------------------------------------------------------------------------


def test_the_page_says_what_the_record_and_the_results_say() -> None:
    """After a new method or new evidence: `make status`. After new results: `make status ARGS=--render`."""
    page = status.PAGE.read_text(encoding="utf-8")
    found = status.gather()
    assert status.problems(page, found, evidence.functions()) == []
    assert [test for test in found.tests if test.outcome != "passed"] == []
    for name in found.trained:
        assert f"\n## {name}\n" in page
        for test in found.of(name):
            assert f"`{test.function.partition('::')[2]}`" in page


def test_the_original_methods_of_this_project_are_proven() -> None:
    """So that a lost marker cannot go by as a regenerated page."""
    found = status.gather()
    for name, levels in {
        "ressl": "L0 L1 W2", "relational": "L0 L1 W2", "simclr": "L0 L1 W2", "rotation": "L0 L1 W2",
        "deepinfomax": "L0 L1 W2", "deepcluster": "L0 W2", "supervised": "W2",
    }.items():  # fmt: skip
        assert {level for level in evidence.LEVELS[:3] if evidence.state(found.of(name, level)) == "reached"} == {
            *levels.split()
        }, name


def test_known_facts_are_of_golden_data_and_papers_that_exist() -> None:
    read = {test.golden for test in status.gather().tests} - {""}
    assert read <= status.LIMITS.keys()
    assert all((status.GOLDEN / f"{name}.npz").exists() for name in read)
    assert all(facts.arxiv == "" or len(facts.arxiv) == 10 for facts in status.FACTS.values())


# -- levels ----------------------------------------------------------------------------------------------------------


def test_a_level_is_reached_when_every_test_passed() -> None:
    found = sources(
        shown("ressl", "L0", gradient=True, dtype="float32"),
        shown("ressl", "L1", steps=4, dtype="float64", tolerance="1e-9"),
        shown("ressl", "L1", steps=4, dtype="float32", tolerance="1e-5"),
        shown("ressl", "W2", dtype="float64", tolerance="1e-9"),
    )
    got = cells(found)
    assert (got["L0"], got["L1"], got["two processes"]) == ("loss and gradient", "4 steps, to 1e-9", "equal, to 1e-9")
    assert cells(sources(shown("ressl", "L0")))["L0"] == "loss only"
    assert cells(sources(shown("relicv2", "L0", golden="relicv2_loss"), trained={"relicv2": True}), "relicv2")[
        "L0"
    ] == "loss only, of formulas"  # fmt: skip


@pytest.mark.parametrize("outcome", ["failed", "skipped"])
def test_one_test_that_did_not_pass_takes_the_level_away(outcome: str) -> None:
    tests = [
        shown("ressl", "L1", steps=4),
        shown("ressl", "L1", outcome, reason="queue: off by 3", test="a.py::test_b"),
    ]
    found = sources(*tests)
    assert cells(found)["L1"] == f"**no**: 1 of 2 tests {outcome}"
    page = status.render(found)
    assert f"`a.py::test_b` {outcome}: queue: off by 3" in page
    assert "1 of 2 tests passed" in page
    assert "**0 of 1**" in page
    assert cells(sources(*tests, shown("ressl", "L1", "failed")))["L1"].endswith("failed")


def test_no_test_is_no_level_and_says_why() -> None:
    trained = {"ressl": True, "deepcluster": True, "random": False}
    found = sources(trained=trained)
    assert {cells(found)[level] for level in ("L0", "L1", "two processes")} == {"no test"}
    assert cells(found, "deepcluster")["L1"] == "no golden data"
    assert {cells(found, "random")[level] for level in ("L0", "L1", "two processes")} == {"nothing to train"}
    assert "what was compared" not in status.render(found)


def test_a_method_file_that_appears_moves_up() -> None:
    tests = [shown("wcl", "L0"), shown("wcl", "part", golden="wcl_lars")]
    before, after = sources(*tests), sources(*tests, trained={"ressl": True, "wcl": True})
    assert cells(before, "wcl")["L0"] == "not in this version"
    assert list(status.table(before)) == ["ressl", *status.to_come(before)]
    assert cells(after, "wcl")["L0"] == "loss only"
    assert list(status.table(after))[:2] == ["ressl", "wcl"]
    page = status.render(before)
    assert "Not in this version." in page.partition("## wcl")[2].partition("##")[0]
    assert "Its pre-training was never released" in page
    assert "Not in this version." not in status.render(after).partition("## wcl")[2].partition("##")[0]


def test_a_method_without_facts_has_the_title_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "relssl/methods").mkdir(parents=True)
    (tmp_path / "relssl/methods/mine.py").write_text('"""Mine (Me, 2027).\n\nMore."""\n')
    monkeypatch.setattr(status, "ROOT", tmp_path)
    found = sources(trained={"mine": True})
    assert cells(found, "mine")["L0"] == "no test"
    assert "\n## mine\n\nMine (Me, 2027).\n" in status.render(found)


# -- results ---------------------------------------------------------------------------------------------------------


def cifar(recipe: str = "ressl/cifar10_cpu", seed: int = 0, linear: float = 50.0, **more: Any) -> dict[str, Any]:
    probe = {"protocol": "relational", "mean": linear, "std": 0.25, "values": [linear]}
    cell = {"method": "ressl", "recipe": recipe, "train_seed": seed, "epochs": 6, "views_seen": 600_000}
    return {**cell, "knn": {"top1": 40.0}, "linear": probe, **more}


def test_smoke_figures_are_called_a_smoke_test() -> None:
    table = {"command": "make cifar-table", "hardware": "2 cores", "date": "2026-11-22", "cells": [cifar()]}
    found = sources(cifar=table)
    assert cells(found)["L2"] == "smoke test: linear 50.0 %"
    page = status.render(found)
    batch = load_recipe(recipe_path("ressl/cifar10_cpu")).train.batch_size
    assert (
        "`ressl/cifar10_cpu` (a smoke test, no ranking): kNN 40.00 %, linear 50.00 % ± 0.25 over probe seeds (protocol "
        f"`relational`); 6 epochs, batch {batch}, 2 views a step, 600,000 views in all; training seed 0." in page
    )
    assert "- make cifar-table, 2 cores, 2026-11-22." in page


def test_of_a_recipe_with_phases_the_views_of_the_last_one_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(name: str) -> str:
        (run,) = status.cifar_runs(sources(cifar={"cells": [cifar(name, method="wcl")]}), "wcl")
        return run.line()

    assert "6 epochs, batch 256, 2 views a step, 600,000 views in all" in line("wcl/cifar10_cpu")
    phases = [{"until_epoch": 1, "plan": [{"count": 2}]}, {"plan": [{"count": 2}, {}]}]
    (tmp_path / "mine.yaml").write_text(json.dumps({"views": {"phases": phases}, "train": {"batch_size": 8}}))
    monkeypatch.setattr(status.recipes, "recipe_root", lambda: tmp_path)
    assert "batch 8, 3 views a step" in line("mine")


def test_training_seeds_are_taken_together_and_a_real_run_goes_first() -> None:
    table = {"cells": [cifar(seed=0, linear=50), cifar(seed=1, linear=54), cifar("ressl/cifar10_resnet18", linear=90)]}
    found = sources(cifar=table)
    assert cells(found)["L2"] == "linear 90.0 %"
    page = status.render(found)
    assert "linear 52.00 % ± 2.00 over training seeds" in page
    assert "training seeds 0, 1." in page
    assert "command, hardware and date were not recorded" in page


@pytest.mark.parametrize(
    "table",
    [{}, {"cells": []}, {"cells": [cifar(linear=None)]}, {"cells": [{"method": "ressl"}, {}, cifar(method="simclr")]}],
)
def test_figures_that_are_not_there_are_unmeasured(table: dict[str, Any]) -> None:
    found = sources(cifar=table)
    assert cells(found)["L2"] == "unmeasured"
    assert "CIFAR-10, top-1" not in status.render(found)


def test_a_published_figure_is_reached_within_a_point() -> None:
    paper = [PaperRow("ressl/a", "row a", 70.0, "the paper"), PaperRow("ressl/b", "row b", 60.0, "its README")]
    paper += [PaperRow("ressl/c", "row c", 50.0, "the paper"), PaperRow("simclr/a", "row d", 40.0, "nobody")]

    def ours(*rows: dict[str, Any]) -> str:
        return cells(sources(paper_rows=paper, paper_results={"rows": list(rows)}))["L3"]

    a, b = {"recipe": "ressl/a", "values": [69.0, 69.2]}, {"recipe": "ressl/b", "values": [58.9]}
    assert ours() == "unmeasured; published 70.0, 60.0, 50.0"
    assert ours(a) == "70.0: ours 69.1 (2 training seeds), reached; unmeasured; published 60.0, 50.0"
    assert "60.0: ours 58.9 (1 training seed), **not reached**" in ours(a, b)
    assert ours({"recipe": "ressl/a"}) == ours()
    assert "row a: 70.0, unmeasured (`ressl/a`; source: the paper)" in status.render(sources(paper_rows=paper))


def test_rows_of_papers_come_from_recipes() -> None:
    rows = {row.recipe: row for row in status.paper_rows()}
    assert rows["ressl/imagenet_resnet50"].value == 69.9
    assert rows["ressl/cifar10_resnet18"].value is None
    assert "ressl/digits_demo" not in rows
    assert rows["ressl/imagenet_resnet50"].assumptions == ()
    assert "method.temperature" in rows["relicv2/imagenet_resnet50_1000ep"].assumptions


def test_a_figure_that_is_recalled_is_not_called_published() -> None:
    paper = [
        PaperRow("ressl/a", "row a", 70.0, "the paper", ("optim.lr", "method.t")),
        PaperRow("ressl/b", "row b", 80.0, "assumption: recalled", ("optim.lr", "method.t")),
        PaperRow("ressl/c", "row c", None, "none"),
    ]
    assert cells(sources(paper_rows=paper))["L3"] == "unmeasured; published 70.0; recalled 80.0"
    assert cells(sources(paper_rows=paper[1:]))["L3"] == "unmeasured; recalled 80.0"
    page = status.render(sources(paper_rows=paper))
    assert "row b: 80.0, unmeasured (`ressl/b`; source: assumption: recalled)" in page
    assert "said in the recipe where it comes from: `optim.lr`, `method.t` of `a`, `b`." in page


def test_figures_out_of_reach_are_those_of_the_page_on_methods() -> None:
    found = status.out_of_reach()
    assert found.keys() <= status.gather().trained.keys()
    assert found["wcl"][0][0] == "ImageNet, linear 74.7"
    assert "kNN multi-crop" in found["wcl"][0][1]
    page = status.render(sources(out_of_reach={"ressl": [("99.9", "nobody knows how")], "wcl": found["wcl"]}))
    assert "from public sources ([methods.md](methods.md)):\n\n- 99.9: nobody knows how\n" in page
    assert "74.7" not in page


def test_other_files_of_results_are_refused(tmp_path: Path) -> None:
    assert status.results(tmp_path / "none.json") == {}
    for content in ("[]", '{"format": 2}', "{"):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(ValueError):
            status.results(tmp_path / "other.json")


# -- the check -------------------------------------------------------------------------------------------------------


@pytest.fixture
def rig(tmp_path: Path) -> Callable[..., list[str]]:
    """Problems of a page, by default of the right one, with the golden file that HEAD knows."""
    (tmp_path / "data.npz").write_bytes(Path(__file__).read_bytes())
    known = sources(shown("ressl", "L0", golden="data"))

    def problems(page: str | None = None, found: Sources = known, functions: set[str] | None = None) -> list[str]:
        functions = {test.function for test in found.tests} if functions is None else functions
        return status.problems(status.render(found) if page is None else page, found, functions, tmp_path)

    return problems


def test_a_page_as_it_was_written_has_no_problems(rig: Callable[..., list[str]]) -> None:
    assert rig() == []


def test_a_page_that_claims_more_than_the_record_is_refused(rig: Callable[..., list[str]]) -> None:
    known = sources(shown("ressl", "L0"))
    claim = status.render(sources(shown("ressl", "L0"), shown("ressl", "L1", steps=4)))
    assert rig(claim, known) == ["ressl, L1: the page says '4 steps', records and results say 'no test'"]
    assert rig("# Status\n", known)[0] == "the page has no row for ressl"
    extra = status.render(known).replace("| [wcl](#wcl) |", "| [other](#other) | | | | | | |\n| [wcl](#wcl) |")
    assert rig(extra, known) == ["the page has a row for other, which is no method here"]
    short = status.render(known).replace("| loss only ", "", 1)
    assert rig(short, known) == ["ressl: the page has 5 cells, expected 6"]


def test_a_record_of_a_test_that_is_gone_is_refused(rig: Callable[..., list[str]]) -> None:
    found = rig(functions={"tests/test_it.py::test_new"})
    assert found == [
        "the record has tests/test_it.py::test_ressl_L0, which is no test with the marker `evidence`",
        "tests/test_it.py::test_new is evidence, but is not in the record",
    ]


def test_other_golden_data_and_unknown_methods_are_seen(rig: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(b"other")
    assert rig() == ["golden data data is not what the tests of the record read"]
    (tmp_path / "data.npz").unlink()
    assert rig() == ["golden data data is not what the tests of the record read"]
    assert "is evidence for resll, an unknown method" in rig(found=sources(shown("resll", "L0")))[0]


def test_functions_with_the_marker_are_found_in_the_source(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text(
        "import pytest\n\n"
        "def of(method):\n    return pytest.mark.evidence(method, 'L1', 'it')\n\n"
        "@pytest.mark.evidence('ressl', 'L0', 'it')\n@pytest.mark.parametrize('x', [1])\ndef test_direct(x): ...\n\n"
        "@pytest.mark.parametrize('x', [pytest.param(1, marks=of('ressl'))])\ndef test_helper(x): ...\n\n"
        "def test_other(): ...\n"
    )
    (tmp_path / "tests/test_methods.py").write_text("def test_two_processes_equal_one(name): ...\n")
    assert evidence.functions(tmp_path) == {
        "tests/test_it.py::test_direct", "tests/test_it.py::test_helper",
        "tests/test_methods.py::test_two_processes_equal_one",
    }  # fmt: skip
    assert evidence.OF_EVERY_METHOD.keys() <= evidence.functions()


# -- the record ------------------------------------------------------------------------------------------------------

SUITE = """
import pytest

@pytest.mark.evidence("ressl", "L1", "steps", golden="data", dtype="float64", tolerance=1e-9)
def test_passes(record_property):
    record_property("steps", 4)
    record_property("largest_error", 0.0)
    record_property("colour", "not kept")

@pytest.mark.evidence("ressl", "L0", "loss", tolerance={"float32": "1e-5", "float64": 1e-12}, gradient=True)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fails_in_float32(dtype): assert dtype != "float32", "off by 3"

@pytest.mark.evidence("wcl", "L0", "loss")
@pytest.mark.evidence("ressl", "part", "pieces")
def test_is_skipped(): pytest.skip("no data")

@pytest.fixture
def broken():
    yield
    raise RuntimeError("late")

@pytest.mark.parametrize("case", [pytest.param(1, marks=pytest.mark.evidence("simclr", "L0", "loss")), 2])
def test_breaks_at_its_end(case, broken): pass

def test_without_marker(): assert False
"""
OF_METHODS = """
import pytest

@pytest.mark.parametrize("norm", ["sync"])
@pytest.mark.parametrize("joint_name", ["ressl"])
def test_two_processes_equal_one(joint_name, norm): pass
"""


def run_pytest(folder: Path, *suites: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    (folder / "tests").mkdir()
    for name, suite in suites:
        (folder / "tests" / name).write_text(suite)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n evidence\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.evidence"]
    command += ["-m", "evidence", "--evidence-record", "record.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_record_is_what_happened(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, ("test_it.py", SUITE), ("test_methods.py", OF_METHODS))
    assert "test_without_marker" not in done.stdout
    tests = evidence.read(tmp_path / "record.json")[1]
    assert [(t.method, t.level, t.test.partition("::")[2], t.outcome, t.reason) for t in tests] == [
        ("ressl", "L1", "test_passes", "passed", ""),
        ("ressl", "L0", "test_fails_in_float32[float32]", "failed", "AssertionError: off by 3"),
        ("ressl", "L0", "test_fails_in_float32[float64]", "passed", ""),
        ("ressl", "part", "test_is_skipped", "skipped", "Skipped: no data"),
        ("wcl", "L0", "test_is_skipped", "skipped", "Skipped: no data"),
        ("simclr", "L0", "test_breaks_at_its_end[1]", "failed", "RuntimeError: late"),
        ("ressl", "W2", "test_two_processes_equal_one[ressl-sync]", "passed", ""),
    ]
    first = tests[0]
    assert (first.golden, first.dtype, first.tolerance, first.steps) == ("data", "float64", "1e-9", 4)
    assert (first.largest_error, first.arrays, first.gradient) == (0.0, None, False)
    assert [(t.dtype, t.tolerance, t.gradient) for t in tests[1:3]] == [
        ("float32", "1e-5", True),
        ("float64", "1e-12", True),
    ]
    assert tests[-1].variant == "`norm: sync`"
    found = sources(*tests, trained={"ressl": True, "wcl": True, "simclr": True})
    assert cells(found)["L0"] == "**no**: 1 of 2 tests failed"
    assert cells(found)["L1"] == "4 steps, to 1e-9"
    assert cells(found, "wcl")["L0"] == "**no**: 1 of 1 tests skipped"
    assert cells(found, "simclr")["L0"] == "**no**: 1 of 1 tests failed"


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    tests = [shown("ressl", "L1", steps=4, largest_error=0.0, gradient=True), shown("wcl", "L0", "failed", reason="no")]
    (tmp_path / "record.json").write_text(evidence.dump(HEAD, tests))
    assert evidence.read(tmp_path / "record.json") == ({"format": 1, **HEAD}, tests)
    for content in ("", "[]", '{"format": 2, "tests": []}', '{"format": 1}', '{"format": 1, "tests": [{"test": "a"}]}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(ValueError, match="run `make status`"):
            evidence.read(tmp_path / "other.json")
    with pytest.raises(ValueError, match="no record of evidence"):
        evidence.read(tmp_path / "none.json")


@pytest.mark.parametrize("mark", [("ressl", "L4", "it"), ("ressl", "L0"), ("ressl", "L0", "it", {"golde": "x"})])
def test_a_marker_with_a_typing_error_is_refused(mark: tuple[Any, ...]) -> None:
    options = mark[3] if len(mark) > 3 else {}
    with pytest.raises(pytest.UsageError, match=r"expected evidence\(method, level, what"):
        evidence.described(pytest.mark.evidence(*mark[:3], **options).mark, {})


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command's files, in a folder of their own; the record is what `sources` has."""
    monkeypatch.setattr(status, "ROOT", tmp_path)
    monkeypatch.setattr(status, "PAGE", tmp_path / "status.md")
    monkeypatch.setattr(status, "RECORD", tmp_path / "evidence.json")
    monkeypatch.setattr(status, "CIFAR", tmp_path / "none.json")
    monkeypatch.setattr(status, "method_names", lambda: ["ressl"])
    monkeypatch.setattr(evidence, "functions", lambda: {"tests/test_it.py::test_ressl_L0"})
    (tmp_path / "evidence.json").write_text(evidence.dump({**HEAD, "golden": {}}, [shown("ressl", "L0")]))
    return tmp_path


def test_a_page_is_written_from_the_record_and_checked(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main(["--render"]) == 0
    page = (files / "status.md").read_text()
    assert "| [ressl](#ressl) |" in page
    assert status.main(["--check"]) == 0
    (files / "status.md").write_text(page.replace("| loss only |", "| loss and gradient |"))
    assert status.main(["--check"]) == 1
    assert "ressl, L0: the page says 'loss and gradient'" in capsys.readouterr().err
    assert "loss and gradient |" in (files / "status.md").read_text()


def test_a_failed_test_is_written_and_told(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = shown("ressl", "L0", "failed", reason="off by 3")
    (files / "evidence.json").write_text(evidence.dump({**HEAD, "golden": {}}, [failed]))
    assert status.main(["--render"]) == 1
    assert "test_ressl_L0[0] failed: off by 3" in capsys.readouterr().err
    assert "**no**: 1 of 1 tests failed" in (files / "status.md").read_text()


@pytest.mark.slow
def test_the_command_runs_the_tests_and_keeps_the_old_record_when_they_cannot_run(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (files / "tests").mkdir()
    (files / "pytest.ini").write_text("[pytest]\nmarkers =\n evidence\n")
    suite = files / "tests/test_it.py"
    suite.write_text("import pytest\n@pytest.mark.evidence('ressl', 'L0', 'it')\ndef test_ressl_L0(): pass\n")
    assert status.main([]) == 0
    record = json.loads((files / "evidence.json").read_text())
    assert record["golden"] == {}
    assert record["tests"] == [
        {"test": "tests/test_it.py::test_ressl_L0", "outcome": "passed", "method": "ressl", "level": "L0", "what": "it"}
    ]
    suite.write_text("import no_such_module\n")
    assert status.main([]) == 1
    assert "pytest ended with 2; nothing was written" in capsys.readouterr().err
    assert json.loads((files / "evidence.json").read_text()) == record
