"""docs/status.md: per method the level of evidence reached, from tests that ran and from files of results.

    python -m benchmarks.status             (= make status) run the tests, write the record and the page: some minutes
    python -m benchmarks.status --render    write the page again, from the record and the results that are there
    python -m benchmarks.status --check     write nothing; exit 1 and say so where page, record and tests disagree

What no test can know (papers, what the golden data leaves out, where ours differs on purpose) stands here in FACTS and
LIMITS, and nowhere else. A method without an entry appears all the same, with the title that its docstring gives.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import yaml

from benchmarks import evidence
from benchmarks.evidence import Evidence
from relssl import recipes
from relssl.methods import load_method, method_names
from relssl.runfolder import environment, now, write_atomically

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/status.md"
RECORD = ROOT / "benchmarks/results/evidence.json"
CIFAR = ROOT / "benchmarks/results/cifar_table.json"
# {"format": 1, "command", "hardware", "date", "rows": [{"recipe", "values": [top-1 per training seed], "train_seeds"}]}
PAPER_ROWS = ROOT / "benchmarks/results/paper_rows.json"
GOLDEN = ROOT / "tests/golden"
METHODS_PAGE = ROOT / "docs/methods.md"

SMOKE = "_cpu"  # recipes for minutes on two cores end in this
MARGIN = 1.0  # points below the paper's figure that still count as its row
COLUMNS = ("method", "paper", "L0", "L1", "two processes", "L2", "L3")
OUT_OF_REACH = ("method", "published figure", "why it cannot be reproduced")  # the header of a table in METHODS_PAGE
LEVEL_NAMES = {"W2": "two processes", "part": "a part"}  # L0 and L1 are called that


# -- facts -----------------------------------------------------------------------------------------------------------

RELATIONAL_CODE = "`mpatacchiola/self-supervised-relational-reasoning` at 70bf129"
BASELINE = f"the baseline in {RELATIONAL_CODE}"


@dataclass(frozen=True)
class Facts:
    """What is known of a method beside its tests.

    Attributes:
        title: of the paper. arxiv: its number.
        original: whose numbers the golden data holds.
        absent: why there is no test, by level.
        differs: where ours differs from the original code by default, in its results or in what it refuses.
        note: what else a reader of the level must know.
    """

    title: str
    arxiv: str = ""
    original: str = ""
    absent: Mapping[str, str] = field(default_factory=dict)
    differs: tuple[str, ...] = ()
    note: str = ""


FACTS = {
    "ressl": Facts(
        "ReSSL: Relational Self-Supervised Learning with Weak Augmentation",
        "2107.09282",
        "`KyleZheng1997/ReSSL` at 4d67dae",
        differs=(
            "The queue may have any length of at least one batch; the original wants a multiple of the batch.",
            (
                "The shuffle is a function of (seed, update) and acts on the order of the global batch, so it is the "
                "same for every number of processes; the original draws it from a running generator."
            ),
            (
                "The ImageNet recipes keep statistics in groups of 32 images with `norm: split(8)`, on any number of "
                "devices; the original gets such groups from 8 GPUs."
            ),
        ),
    ),
    "relational": Facts(
        "Self-Supervised Relational Reasoning for Representation Learning",
        "2006.05849",
        RELATIONAL_CODE,
        differs=(
            (
                "One pair accuracy, over all pairs. The original also logs one for positive and one for negative "
                "pairs, but takes the halves of a list in which both alternate: each is a mixture, not repeated here."
            ),
            (
                "A batch that leaves a process with one image is dropped or refused; the original would call two views "
                "of that image a negative pair."
            ),
            (
                "The bias in front of the head's BatchNorm gets a gradient of exactly 0; the original's is rounding, "
                "which Adam enlarges in float32, so that bias is not compared there."
            ),
        ),
        note=(
            "The defaults are the full code's, focal loss and concatenated features; the paper's first figure shows "
            "binary cross-entropy and a commutative aggregation. `loss: bce` is the essential script's."
        ),
    ),
    "simclr": Facts(
        "A Simple Framework for Contrastive Learning of Visual Representations",
        "2002.05709",
        BASELINE,
        differs=(
            (
                "A row's product with itself is left out of the sum; the original adds it and takes exp(1/t) off "
                "again, which costs digits in float32: at t = 0.1 gradients may differ by 1e-5 for that reason."
            ),
            "With several processes the images of all of them are negatives; the original has one process.",
        ),
        note="The default loss is the repository's, the log of the mean probability; `reduction: mean` is the paper's.",
    ),
    "rotation": Facts(
        "Unsupervised Representation Learning by Predicting Image Rotations",
        "1803.07728",
        BASELINE,
        note="The golden loss is of given logits and has no gradient; the training step covers both.",
    ),
    "deepinfomax": Facts(
        "Learning deep representations by mutual information estimation and maximization",
        "1808.06670",
        BASELINE,
        differs=(
            (
                "The prior term is computed from logits and stays finite; the original takes logarithms of a sigmoid, "
                "which can become infinite."
            ),
            "The prior's noise belongs to an image's place in the global batch, not to a running generator.",
            (
                "`local_places` (off by default, used by the smoke recipe) looks at random places of the maps. The "
                "original has nothing like it, and the golden tests have it off."
            ),
        ),
        note="As in the repository, the encoder helps the prior's discriminator; in the paper it works against it.",
    ),
    "deepcluster": Facts(
        "Deep Clustering for Unsupervised Learning of Visual Features",
        "1807.05520",
        BASELINE,
        absent={"L1": "no golden data"},
        differs=(
            (
                "Clusters are of un-augmented images. The original says so, too, but its images have passed the random "
                "crop and flip."
            ),
            (
                "A training image is augmented once, from the stored pixels. The original augments an image that is "
                "augmented and normalised already, after a cast to 8 bits in which values outside [0, 1] wrap around."
            ),
            "k-means is seeded by (seed, update); the original's seed comes from the clock.",
        ),
        note=(
            "A training step of the original depends on its clusters, which nobody can draw again, so none was "
            "recorded. The golden values hold no gradient; that of the weighted cross-entropy is PyTorch's."
        ),
    ),
    "supervised": Facts(
        "Training with labels, the upper bound of the relational-reasoning experiments",
        absent={"L0": "no golden data", "L1": "no golden data"},
        differs=(
            (
                "The original reports its trained classifier; here the backbone is evaluated like every other, by kNN "
                "and a linear probe."
            ),
        ),
        note="The loss is PyTorch's cross-entropy of a linear layer; nothing of the original was recorded.",
    ),
    "random": Facts("Random weights, the lower bound of the relational-reasoning experiments"),
    "wcl": Facts("Weakly Supervised Contrastive Learning", "2110.04770", "`KyleZheng1997/WCL` at 9a6a273"),
    "relicv2": Facts(
        (
            "Pushing the limits of self-supervised ResNets: Can we outperform supervised learning without labels on "
            "ImageNet?"
        ),
        "2201.05119",
        "`google-deepmind/relicv2` at 106a93e0 (networks, optimizer and colours; it has no pre-training)",
        absent={"L1": "never released"},
        note=(
            "Its pre-training was never released: the official repository only evaluates. Ours is a reading of the "
            "paper, compared with its formulas in float64; training steps of an original cannot be shown."
        ),
    ),
    "resa": Facts("Clustering Properties of Self-Supervised Learning", "2501.18452", "`winci-ai/resa` at e7869d12"),
}

# What is not the original, or too small, in each file of golden data.
LIMITS = {
    "ressl_loss": "encoders and heads are stand-ins that pass given embeddings on.",
    "ressl_step": (
        "encoders of two or three convolutions, narrow heads, one process with one group of statistics, where the "
        "shuffle changes nothing: shuffling over processes and split statistics are not shown. Weights and statistics "
        "start from random values, not from the method's initialisation."
    ),
    "ressl_lr": "the schedule alone.",
    "relational_loss": "up to 8 images, 6 views and 24 features, synthetic; the head has its original width.",
    "relational_step": (
        "an encoder of two convolutions, concatenated features (the other aggregations are shown by the loss alone), "
        "pair targets in float64 instead of float32."
    ),
    "baselines": "losses and their pieces on synthetic features, without an encoder.",
    "baselines_step": (
        "one step; SimCLR and RotNet with an encoder of two convolutions, Deep InfoMax with its own Conv4, without the "
        "global term, and with the prior's noise handed over."
    ),
    "backbones": "inputs of a few images; gradients of the first convolution and the last BatchNorm only.",
    "knn": "the original's function on synthetic features.",
    "wcl_loss": "encoders and heads are stand-ins; with one process an empty block stands for the other ones.",
    "wcl_step": (
        "encoders of two or three convolutions, narrow heads, one process. Weights and statistics start from random "
        "values, not from the method's initialisation."
    ),
    "wcl_lars": "the original optimizer on synthetic gradients.",
    "wcl_lr": "the schedule alone.",
    "relicv2_loss": "not an original's: formulas of the paper, evaluated in float64.",
    "relicv2_augment": "single operations on one image; draws, probabilities and order were not run.",
    "relicv2_optim": "the original optimizer and schedules on random trees and gradients.",
    "relicv2_resnet": "random weights and narrow networks; no released checkpoint could be read.",
    "resa_loss": "encoder, projector and predictor are stand-ins that pass given embeddings on; float32 throughout.",
    "resa_step": "an encoder of two convolutions, narrow heads, one process without DistributedDataParallel.",
    "resa_schedules": "the schedules alone.",
}
# Golden data that no original computed: formulas of a paper, in float64.
FORMULAS = {"relicv2_loss"}
NOWHERE = (
    "full training steps of the originals on more than one process (statistics over processes, averaged gradients)",
    "mixed precision and GPU kernels",
    "real images and augmentations: views are compared with PIL and torchvision instead ([parity.md](parity.md))",
    "full-size encoders inside a training step, the methods' own initialisation, released checkpoints, a full training",
)


def facts_of(name: str) -> Facts:
    """Of FACTS, or the title from the first line of the method's file."""
    if name in FACTS:
        return FACTS[name]
    source = (ROOT / f"relssl/methods/{name}.py").read_text(encoding="utf-8")
    return Facts((ast.get_docstring(ast.parse(source)) or name).splitlines()[0].removesuffix("."))


# -- what there is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaperRow:
    """A row of a paper that a recipe is for.

    Attributes:
        value: top-1 in percent, None where no source has it.
        assumptions: keys of the recipe whose values no public source has.
    """

    recipe: str
    row: str
    value: float | None
    source: str
    assumptions: tuple[str, ...] = ()

    @property
    def is_assumed(self) -> bool:
        """Whether the value itself is in no source that could be read."""
        return self.source.startswith("assumption")


@dataclass(frozen=True)
class Sources:
    """Everything that the page is made from.

    Attributes:
        trained: the methods here, and whether they train anything.
        out_of_reach: by method, (published figure, why it cannot be reproduced from public sources).
    """

    trained: Mapping[str, bool]
    head: Mapping[str, Any]
    tests: Sequence[Evidence]
    cifar: Mapping[str, Any]
    paper_results: Mapping[str, Any]
    paper_rows: Sequence[PaperRow]
    out_of_reach: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)

    def of(self, method: str, level: str | None = None) -> list[Evidence]:
        return [test for test in self.tests if test.method == method and level in (None, test.level)]


def gather() -> Sources:
    head, tests = evidence.read(RECORD)
    names = sorted(method_names(), key=lambda name: (list(FACTS).index(name) if name in FACTS else len(FACTS), name))
    return Sources(
        {name: load_method(name).TRAINS for name in names},
        head, tests, results(CIFAR), results(PAPER_ROWS), list(paper_rows()), out_of_reach(),
    )  # fmt: skip


def results(path: Path) -> dict[str, Any]:
    """A file of results; {} where there is none.

    Raises:
        ValueError: it is there, but of another kind.
    """
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("format") != 1:
        raise ValueError(f"{path} is no file of results of format 1; make it again")
    return found


def paper_rows() -> Iterator[PaperRow]:
    """The rows of papers that recipes name."""
    for name in recipes.list_recipes():
        about = yaml.safe_load(recipes.recipe_path(name).read_text(encoding="utf-8"))["about"]
        if paper := about.get("paper"):
            assumed = tuple(about.get("assumptions", ()))
            yield PaperRow(name, paper["row"], paper.get("value"), paper["source"], assumed)


def out_of_reach() -> dict[str, list[tuple[str, str]]]:
    """What METHODS_PAGE says of figures that cannot be reproduced, by method."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, figure, reason in rows_under(METHODS_PAGE.read_text(encoding="utf-8"), OUT_OF_REACH):
        found.setdefault(name.strip("`"), []).append((figure, reason))
    return found


def run_tests() -> None:
    """Run every test that is evidence and write the record.

    Raises:
        ValueError: tests could not be collected, so nothing is known.
    """
    files = sorted({test.partition("::")[0] for test in evidence.functions()})
    kept = {key: value for key, value in os.environ.items() if key not in ("RELSSL_GOLDEN", "PYTEST_ADDOPTS")}
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "evidence", "-p", "benchmarks.evidence"]
        done = subprocess.run([*command, "--evidence-record", str(record), *files], cwd=ROOT, env=kept, check=False)
        if done.returncode not in (0, 1):  # 1: some failed, which is a result
            raise ValueError(f"pytest ended with {done.returncode}; nothing was written")
        tests = evidence.read(record)[1]
    here = environment()
    files_read = sorted({test.golden for test in tests} - {""})
    head = {
        "command": "make status",
        "date": now()[:10],
        "hardware": f"{here['cores']} cores of {here['processor']}, {', '.join(here['devices']) or 'no GPU'}",
        "versions": {"python": here["python"], "torch": here["torch"]},
        "golden": {name: evidence.fingerprint(GOLDEN / f"{name}.npz") for name in files_read},
    }
    write_atomically(RECORD, evidence.dump(head, tests))


# -- levels ----------------------------------------------------------------------------------------------------------


def table(sources: Sources) -> dict[str, tuple[str, ...]]:
    """The cells of each method, as COLUMNS has them; those to come are last."""
    here = {
        name: (
            _paper_link(facts_of(name)),
            *(level_cell(sources, name, level) for level in ("L0", "L1", "W2")),
            cifar_cell(sources, name),
            paper_cell(sources, name),
        )
        for name in sources.trained
    }
    rest = ("",) * (len(COLUMNS) - 3)
    return here | {name: (_paper_link(FACTS[name]), "not in this version", *rest) for name in to_come(sources)}


def to_come(sources: Sources) -> list[str]:
    """Methods of the list that have no file yet."""
    return [name for name in FACTS if name not in sources.trained]


def level_cell(sources: Sources, name: str, level: str) -> str:
    """Whether a level is reached, in a few words; only tests can make it so."""
    tests = sources.of(name, level)
    state = evidence.state(tests)
    if state == "absent":
        reason = facts_of(name).absent.get(level, "no test")
        return reason if sources.trained[name] else "nothing to train"
    if state != "reached":
        return f"**no**: {sum(test.outcome == state for test in tests)} of {len(tests)} tests {state}"
    if level == "L0":
        compared = "loss and gradient" if any(test.gradient for test in tests) else "loss only"
        return f"{compared}, of formulas" if {test.golden for test in tests} <= FORMULAS else compared
    exact = {test.tolerance for test in tests if test.dtype == "float64" and test.tolerance}
    within = f", to {exact.pop()}" if len(exact) == 1 else ""
    steps = [test.steps for test in tests if test.steps is not None]
    return f"{_count(min(steps), 'step')}{within}" if steps else f"equal{within}"


def cifar_cell(sources: Sources, name: str) -> str:
    runs = cifar_runs(sources, name)
    if not runs:
        return "unmeasured"
    run = max(runs, key=lambda run: (not run.is_smoke, run.linear))
    return f"{'smoke test: ' if run.is_smoke else ''}linear {run.linear:.1f} %"


def paper_cell(sources: Sources, name: str) -> str:
    rows = [row for row in sources.paper_rows if row.recipe.startswith(f"{name}/") and row.value is not None]
    measured = [row for row in rows if has_result(sources, row)]
    cells = [f"{row.value}: {reproduced(sources, row)}" for row in measured]
    missing = {
        word: [str(row.value) for row in rows if row not in measured and row.is_assumed is assumed]
        for word, assumed in (("published", False), ("recalled", True))
    }
    if told := [f"{word} {', '.join(values)}" for word, values in missing.items() if values]:
        cells.append("; ".join(["unmeasured", *told]))
    return "; ".join(cells) if cells else "unmeasured; no figure found"


def has_result(sources: Sources, row: PaperRow) -> bool:
    return any(run.get("recipe") == row.recipe and run.get("values") for run in sources.paper_results.get("rows", ()))


def reproduced(sources: Sources, row: PaperRow) -> str:
    """Our mean, and whether it is the published figure."""
    if row.value is None or not has_result(sources, row):
        return "unmeasured"
    values = next(run["values"] for run in sources.paper_results["rows"] if run.get("recipe") == row.recipe)
    verdict = "reached" if mean(values) >= row.value - MARGIN else "**not reached**"
    return f"ours {mean(values):.1f} ({_count(len(values), 'training seed')}), {verdict}"


@dataclass(frozen=True)
class CifarRun:
    """A recipe on CIFAR-10 over its training seeds; accuracies are top-1 in percent."""

    recipe: str
    seeds: tuple[int, ...]
    epochs: int | None
    views: int | None
    knn: float | None
    linear: float
    std: float | None
    protocol: str

    @property
    def is_smoke(self) -> bool:
        return self.recipe.endswith(SMOKE)

    def line(self) -> str:
        settings = recipes.recipe_root() / f"{self.recipe}.yaml"
        trained = [] if self.epochs is None else [_count(self.epochs, "epoch")]
        if settings.exists():
            recipe = yaml.safe_load(settings.read_text(encoding="utf-8"))
            plan = recipe["views"].get("plan") or recipe["views"]["phases"][-1]["plan"]
            count = sum(spec.get("count", 1) for spec in plan)
            trained += [f"batch {recipe['train']['batch_size']}", f"{_count(count, 'view')} a step"]
        if self.views is not None:
            trained.append(f"{self.views:,} views in all")
        seeds = f"training seed{'s' * (len(self.seeds) > 1)} {', '.join(map(str, self.seeds))}"
        over = "training" if len(self.seeds) > 1 else "probe"
        spread = "" if self.std is None else f" ± {self.std:.2f} over {over} seeds"
        knn = "" if self.knn is None else f"kNN {self.knn:.2f} %, "
        kind = " (a smoke test, no ranking)" if self.is_smoke else ""
        return (
            f"`{self.recipe}`{kind}: {knn}linear {self.linear:.2f} %{spread} (protocol `{self.protocol}`); "
            f"{', '.join(trained)}; {seeds}."
        )


def cifar_runs(sources: Sources, name: str) -> list[CifarRun]:
    """What the table of CIFAR-10 has for a method; a cell without linear accuracy is none."""
    cells = [
        cell
        for cell in sources.cifar.get("cells", ())
        if cell.get("method") == name and cell.get("linear", {}).get("mean") is not None
    ]
    found = []
    for recipe, group in groupby(sorted(cells, key=_recipe), key=_recipe):
        runs = list(group)
        linear = [run["linear"]["mean"] for run in runs]
        knn = [run["knn"]["top1"] for run in runs if run.get("knn", {}).get("top1") is not None]
        first = runs[0]
        found.append(
            CifarRun(
                recipe,
                tuple(run.get("train_seed", 0) for run in runs),
                first.get("epochs"),
                first.get("views_seen"),
                mean(knn) if knn else None,
                mean(linear),
                pstdev(linear) if len(linear) > 1 else first["linear"].get("std"),
                first["linear"].get("protocol", "unnamed"),
            )
        )
    return found


def _recipe(cell: Mapping[str, Any]) -> str:
    return str(cell.get("recipe", "unnamed"))


# -- the page --------------------------------------------------------------------------------------------------------

TOP = """# Status

How far each method is shown to be what its paper and its original code say. Generated by `{command}`; do not edit.

| level | what it takes |
|---|---|
| L0 | the loss, and its gradient where one was recorded, equals what the original code computed ("golden data") |
| L1 | full training steps end like the original's from the same weights and views: networks, statistics, optimizer |
| two processes | three updates in two processes end like those in one; where pairs stay within a process, like those \
with two micro-batches. Our own demand, without an original |
| L2 | trained on CIFAR-10 (`make cifar-table`), figures of ours. A smoke test is minutes of training \
of a very small network: no ranking |
| L3 | a published figure reproduced: our mean over training seeds is above it, or at most {margin:g} point below |

L0, L1 and "two processes" are reached when every test for them ran and passed: one that fails or is skipped takes the
level away. {passed} of {tests} passed: {hardware}, {versions}, {date}.
They are ordinary tests, and run with `make test`, too.
"""
UNDER = """
Tolerances of L1 and of two processes are absolute in float64, the others relative with a small allowance near zero; the
tests named below have the exact rules. No golden data of any method shows
"""


def render(sources: Sources) -> str:
    return "\n".join([*_top(sources), *_methods(sources), *_to_come(sources), *_shared(sources)]) + "\n"


def _top(sources: Sources) -> Iterator[str]:
    head = sources.head
    yield TOP.format(
        command=head["command"],
        margin=MARGIN,
        passed=sum(test.outcome == "passed" for test in sources.tests),
        tests=_count(len(sources.tests), "test"),
        hardware=head["hardware"],
        versions=", ".join(f"{name} {number}" for name, number in head["versions"].items()),
        date=head["date"],
    )
    yield from _markdown([COLUMNS, *([f"[{name}](#{name})", *cells] for name, cells in table(sources).items())])
    yield UNDER
    yield from (f"- {thing};" for thing in NOWHERE[:-1])
    yield f"- {NOWHERE[-1]}."


def _methods(sources: Sources) -> Iterator[str]:
    for name in sources.trained:
        facts = facts_of(name)
        yield f"\n## {name}\n"
        yield _title(facts) + (f" Compared with {facts.original}." if facts.original else "")
        if facts.note:
            yield f"\n{facts.note}"
        yield from _compared(sources.of(name))
        yield from _list("The golden data is limited:", _limits(sources.of(name)))
        yield from _list("Ours differs from the original code on purpose:", facts.differs)
        yield from _list("CIFAR-10, top-1:", _cifar(sources, name))
        yield from _list("Published figures, top-1 in percent:", _paper(sources, name))
        yield from _list(
            "Published figures that cannot be reproduced from public sources ([methods.md](methods.md)):",
            (f"{figure}: {reason}" for figure, reason in sources.out_of_reach.get(name, ())),
        )


def _compared(tests: Sequence[Evidence]) -> Iterator[str]:
    """A row for each test function, with all its precisions and settings."""
    if not tests:
        return
    rows = [["level", "what was compared", "golden data", "within", "test", "passed"]]
    order = {level: place for place, level in enumerate(evidence.LEVELS)}

    def key(test: Evidence) -> tuple[Any, ...]:
        return order[test.level], test.function, test.what, test.golden

    said = None
    for (_, function, what, golden), group in groupby(sorted(tests, key=key), key=key):
        members = list(group)
        level = LEVEL_NAMES.get(members[0].level, members[0].level)
        steps = [test.steps for test in members if test.steps is not None]
        taken = f"{_count(min(steps), 'full step')}; " if steps else ""
        variants = sorted({test.variant for test in members} - {""})
        passed = sum(test.outcome == "passed" for test in members)
        file, _, test = function.rpartition("/")[2].partition("::")
        rows.append(
            [
                level if level != said else "",
                "; ".join([f"{taken}{what}", *variants]),
                f"`{golden}`" if golden else "",
                "; ".join(_within(members)),
                f"`{file}` `{test}`",
                str(passed) if passed == len(members) else f"**{passed} of {len(members)}**",
            ]
        )  # fmt: skip
        said = level
    yield ""
    yield from _markdown(rows)
    failures = [f"`{test.test}` {test.outcome}: {test.reason}" for test in tests if test.outcome != "passed"]
    yield from _list("Not passed:", failures)


def _within(tests: Sequence[Evidence]) -> Iterator[str]:
    """Tolerance, and the largest difference that was seen, of each precision; float64 first."""
    for dtype in sorted({test.dtype for test in tests}, reverse=True):
        members = [test for test in tests if test.dtype == dtype]
        errors = [test.largest_error for test in members if test.largest_error is not None]
        seen = f" (seen: {_number(max(errors))})" if errors else ""
        yield f"{dtype}: {members[0].tolerance}{seen}".removeprefix(": ")


def _number(error: float) -> str:
    return f"{error:.1e}" if error else "0"


def _limits(tests: Sequence[Evidence]) -> list[str]:
    return [f"`{name}`: {LIMITS[name]}" for name in sorted({test.golden for test in tests}) if name in LIMITS]


def _cifar(sources: Sources, name: str) -> list[str]:
    lines = [run.line() for run in cifar_runs(sources, name)]
    if lines:
        told = [str(sources.cifar[key]) for key in ("command", "hardware", "date") if sources.cifar.get(key)]
        lines.append(f"{', '.join(told) or 'command, hardware and date were not recorded'}.")
    return lines


def _paper(sources: Sources, name: str) -> list[str]:
    rows = [row for row in sources.paper_rows if row.recipe.startswith(f"{name}/")]
    lines = [
        f"{row.row}: {row.value}, {reproduced(sources, row)} (`{row.recipe}`; source: {row.source})"
        for row in rows
        if row.value is not None
    ]
    if without := [row.recipe.partition("/")[2] for row in rows if row.value is None]:
        lines.append(f"None was found in a source that could be read for {_quoted(without)}.")
    for keys, group in groupby(sorted(rows, key=_assumed), key=_assumed):
        if keys:
            names = [row.recipe.partition("/")[2] for row in group]
            lines.append(
                f"In no public source, and said in the recipe where it comes from: {_quoted(keys)} of {_quoted(names)}."
            )
    return lines


def _assumed(row: PaperRow) -> tuple[str, ...]:
    return row.assumptions


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _to_come(sources: Sources) -> Iterator[str]:
    for name in to_come(sources):
        yield f"\n## {name}\n"
        yield f"{_title(FACTS[name])} Not in this version."
        if FACTS[name].note:
            yield f"\n{FACTS[name].note}"
        yield from _compared(sources.of(name))


def _shared(sources: Sources) -> Iterator[str]:
    if tests := sources.of("shared"):
        yield "\n## Shared by methods"
        yield from _compared(tests)
        yield from _list("The golden data is limited:", _limits(tests))


def _title(facts: Facts) -> str:
    return f"*{facts.title}*, {_paper_link(facts)}." if facts.arxiv else f"{facts.title}."


def _paper_link(facts: Facts) -> str:
    return f"[arXiv:{facts.arxiv}](https://arxiv.org/abs/{facts.arxiv})" if facts.arxiv else ""


def _markdown(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for place, row in enumerate(rows):
        yield "| " + " | ".join(row) + " |"
        if place == 0:
            yield "|" + "---|" * len(row)


def _list(title: str, lines: Iterable[str]) -> Iterator[str]:
    lines = list(lines)
    if lines:
        yield f"\n{title}\n"
        yield from (f"- {line}" for line in lines)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


# -- the check -------------------------------------------------------------------------------------------------------


def claims(page: str) -> dict[str, tuple[str, ...]]:
    """The table of methods of a page: method -> its other cells."""
    return {name[1:].partition("]")[0]: tuple(cells) for name, *cells in rows_under(page, COLUMNS)}


def rows_under(page: str, header: Sequence[str]) -> list[list[str]]:
    """The cells of each row of the table with this header; none where the page has no such table."""
    lines = iter(page.splitlines())
    if not any(_cells(line) == list(header) for line in lines):
        return []
    return [_cells(line) for line in takewhile(lambda line: line.startswith("|"), lines) if not line.startswith("|-")]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]


def problems(page: str, sources: Sources, functions: Iterable[str], golden: Path = GOLDEN) -> list[str]:
    """Where page, record, tests and golden data disagree: sentences."""
    known, recorded = set(functions), {test.function for test in sources.tests}
    found = [f"the record has {test}, which is no test with the marker `evidence`" for test in sorted(recorded - known)]
    found += [f"{test} is evidence, but is not in the record" for test in sorted(known - recorded)]
    known_methods = {*sources.trained, *FACTS, "shared"}
    found += [
        f"{t.test} is evidence for {t.method}, an unknown method"
        for t in sources.tests
        if t.method not in known_methods
    ]
    for name, fingerprint in sources.head["golden"].items():
        file = golden / f"{name}.npz"
        if not file.exists() or evidence.fingerprint(file) != fingerprint:
            found.append(f"golden data {name} is not what the tests of the record read")
    claimed, expected = claims(page), table(sources)
    found += [f"the page has no row for {name}" for name in expected if name not in claimed]
    found += [f"the page has a row for {name}, which is no method here" for name in claimed if name not in expected]
    for name in expected.keys() & claimed.keys():
        if len(claimed[name]) != len(expected[name]):
            found.append(f"{name}: the page has {len(claimed[name])} cells, expected {len(expected[name])}")
            continue
        found += [
            f"{name}, {column}: the page says {said!r}, records and results say {is_!r}"
            for column, said, is_ in zip(COLUMNS[1:], claimed[name], expected[name], strict=True)
            if said != is_
        ]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.status", description=(__doc__ or "").splitlines()[0])
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--render", action="store_true", help="write the page from the record that is there")
    choice.add_argument("--check", action="store_true", help="write nothing, exit 1 where page and record disagree")
    options = parser.parse_args(arguments)
    try:
        if not (options.render or options.check):
            run_tests()
        sources = gather()
    except ValueError as error:
        print(f"status: {error}", file=sys.stderr)
        return 1
    if not options.check:
        write_atomically(PAGE, render(sources))
        print(f"written: {PAGE.relative_to(ROOT)}")
    found = problems(PAGE.read_text(encoding="utf-8"), sources, evidence.functions())
    for problem in found:
        print(f"status: {problem}", file=sys.stderr)
    failed = [test for test in sources.tests if test.outcome != "passed"]
    for test in failed:
        print(f"status: {test.test} {test.outcome}: {test.reason}", file=sys.stderr)
    return 1 if found or failed else 0


if __name__ == "__main__":
    sys.exit(main())
