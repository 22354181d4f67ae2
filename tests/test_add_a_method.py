"""docs/add_a_method.md does what it says: its files are written, its commands are run, and its BYOL is the paper's.

A block of the page with a title is a file of that name, a block `sh` holds commands, other blocks are only shown. The
commands find tiny pictures under the names of the data that the page speaks of.
"""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines.batch import ViewBatch
from relssl import cli
from relssl.methods import load_method
from relssl.methods.base import DataInfo, Method, Step
from relssl.nets import build_backbone
from relssl.optim import cosine_ema
from relssl.runfolder import RunFolder, read_results
from relssl.weights import load_backbone
from tests import test_methods
from tests.relssl import tiny

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/add_a_method.md").read_text()
METHOD, RECIPE = "byol.py", "byol_cifar10.yaml"

BLOCKS = re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', PAGE, flags=re.MULTILINE | re.DOTALL)
FILES = {title: text for _, title, text in BLOCKS if title}
LINES = [line for language, _, text in BLOCKS if language == "sh" for line in text.splitlines()]
COMMANDS = [shlex.split(line, comments=True) for line in LINES]
UPDATES = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the files of the page, and pictures under the names that it uses."""
    folder = tmp_path_factory.mktemp("byol")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    tiny.write_data(folder / "cifar10-train.beton", count=160, side=32)
    tiny.write_data(folder / "cifar10-test.beton", seed=1, side=32)
    tiny.write_data(folder / "images.beton", seed=2, count=130, side=40, labels=False)
    return folder


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, with this process in it."""
    monkeypatch.chdir(folder)
    return folder


def commands(program: str) -> list[list[str]]:
    return [arguments for name, *arguments in COMMANDS if name == program]


# -- the page


def test_the_page_is_read_as_it_is_meant() -> None:
    assert len(BLOCKS) == PAGE.count("```") / 2
    assert FILES.keys() == {METHOD, RECIPE}
    assert [arguments[0] for arguments in commands("relssl")] == ["validate", "views", "train", "eval", "eval", "train"]
    assert len(commands("pytest")) == 1
    assert {name for name, *_ in COMMANDS} == {"relssl", "pytest"}


def test_what_the_page_points_to_is_there() -> None:
    places = [path for path in re.findall(r"`(\w+/[\w./]+)`", PAGE) if not path.startswith("runs/")]
    paths = [ROOT / path for path in places] + [ROOT / "docs" / page for page in re.findall(r"\]\((\w+\.md)\)", PAGE)]
    assert len(paths) > 5
    assert [path for path in paths if not path.exists()] == []


def test_its_commands_run(inside: Path) -> None:
    for arguments in commands("relssl"):
        assert cli.run(arguments) == 0, arguments
    assert (inside / "views.png").is_file()
    assert [record["kind"] for record in RunFolder(inside / "runs/byol").read_metrics()].count("eval") == 2
    results = read_results(inside / "runs/byol")
    assert {(entry["evaluator"], entry["weights"]) for entry in results} == {("knn", "pretrained"), ("knn", "random")}
    assert load_backbone(inside / "runs/mine/backbone.safetensors").epochs == 6


# -- the contract


def test_it_holds_what_every_method_holds(inside: Path) -> None:
    """The quick ones; all of them, through the page's command, are below."""
    test_methods.test_an_update_moves_what_trains_and_nothing_else(RECIPE, _data(inside))
    test_methods.test_the_loss_is_wide_under_autocast(RECIPE, _data(inside))
    test_methods.test_state_survives_save_and_load(RECIPE, _data(inside))
    test_methods.test_the_fewest_and_the_most_views_do(RECIPE, _data(inside))
    test_methods.test_a_wrong_view_plan_is_refused_before_the_first_step(RECIPE, _data(inside))


def _tests_of_a_joint_method() -> set[str]:
    """Those of tests/test_methods.py that run over methods whose loss is of the whole batch, as BYOL's is."""
    groups = {"name", "any_name", "joint_name"}
    tests = {key: value for key, value in vars(test_methods).items() if key.startswith("test_")}
    found = {
        key.removeprefix("test_") for key, test in tests.items() if groups & inspect.signature(test).parameters.keys()
    }
    assert {"an_update_moves_what_trains_and_nothing_else", "two_processes_equal_one"} < found
    return found


@pytest.mark.slow
def test_it_holds_what_every_method_holds_by_the_pages_command(folder: Path) -> None:
    (arguments,) = commands("pytest")
    arguments = [part.replace("$RELSSL", str(ROOT)) for part in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=folder,
        env={**os.environ, "PYTEST_ADDOPTS": "-v -p no:cacheprovider"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = set(re.findall(r"::test_(\w+)\[\S*byol_cifar10.yaml\S*\] PASSED", done.stdout))
    assert passed == _tests_of_a_joint_method()
    assert not re.search(r"\d+ (failed|skipped|error)", done.stdout)


def test_micro_batches_give_the_same_update(inside: Path) -> None:
    """As its ACCUMULATION says; running statistics move once for each micro-batch, which is not part of an update."""
    data = str(_data(inside))
    whole, parts = (test_methods.state_after(0, RECIPE, data, 1, num_micro, "split(4)") for num_micro in (1, 2))
    for key, value in whole.items():
        if not key.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(parts[key], value, rtol=0, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


def _data(folder: Path) -> Path:
    """A folder of data as tests/test_methods.py makes it."""
    data = folder / "tiny"
    if not data.exists():
        data.mkdir()
        tiny.write_data(data / "train.beton", side=32)
        tiny.write_data(data / "test.beton", seed=1, side=32)
    return data


# -- the paper


@pytest.fixture
def method(folder: Path) -> Method:
    """In float64, and at a place where target and online network differ."""
    torch.manual_seed(0)
    cls = load_method(str(folder / METHOD))
    config = cls.Config(name="byol", hidden_dim=16, embed_dim=8, momentum=0.9)
    method = cls(lambda: build_backbone("conv4"), config, DataInfo(40, None, 4, UPDATES, 10)).double()
    online = {**method.encoder.state_dict(prefix="0."), **method.head.state_dict(prefix="1.")}
    assert_equal(method.target.state_dict(), online)
    for parameter in method.target.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return method


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-12)


def test_its_loss_is_the_papers(method: Method) -> None:
    """Equations 2 and 3, image by image."""
    views = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    place = torch.arange(4)
    loss, metrics = method(ViewBatch({"view": tuple(views)}, place, place, place), Step(0, 0))
    total = torch.zeros((), dtype=torch.float64)
    for online, other in ((0, 1), (1, 0)):
        prediction = method.predictor(method.head(method.encoder(views[online])))
        target = method.target(views[other])
        for q, z in zip(prediction, target, strict=True):
            total = total + 2 - 2 * (q @ z) / (q.norm() * z.norm())
    torch.testing.assert_close(loss, total / 4, rtol=0, atol=1e-12)
    assert 0 < metrics["embedding_spread"] <= 1
    trained = [p for p in method.parameters() if p.requires_grad]
    for ours, papers in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(total / 4, trained), strict=True):
        torch.testing.assert_close(ours, papers, rtol=0, atol=1e-10)


@pytest.mark.parametrize("update", [0, 3, UPDATES - 1])
def test_its_target_follows_as_the_papers(method: Method, update: int) -> None:
    """theta' <- m theta' + (1 - m) theta with m along a cosine to 1; statistics stay the target's own."""
    m = cosine_ema(update, base=0.9, total_steps=UPDATES)
    expected = {key: value.clone() for key, value in method.target.state_dict().items()}
    for name, part in (("0.", method.encoder), ("1.", method.head)):
        for key, parameter in part.named_parameters():
            expected[name + key] = m * expected[name + key] + (1 - m) * parameter.detach()
    for buffer in (*method.encoder.buffers(), *method.head.buffers()):
        buffer.add_(1)
    method.after_update(Step(update, 0))
    assert_equal(method.target.state_dict(), expected)
