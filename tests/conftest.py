"""What all tests share: real images where they are at hand, few threads, no quiet skips.

Real images come from the folder in RELSSL_TEST_DATA (`cifar10-jpeg.tar.xz`, `imagenet-sample-500.tar`).
Without it, tests that ask for them are skipped; under RELSSL_REQUIRE_DATA=1, which CI sets, they fail.
RELSSL_TEST_CACHE names a folder in which the unpacked archives stay from one run to the next.

`--recipe FILE.yaml` runs what holds for every method on the method of that recipe, and nothing else.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

# Before torch is imported: small tests are fastest with one thread, and subprocesses inherit the setting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# A test must not find weights, accounts or settings of the person who runs it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from filelock import FileLock
from hypothesis import settings

CIFAR_ARCHIVE = "cifar10-jpeg.tar.xz"
IMAGENET_ARCHIVE = "imagenet-sample-500.tar"
MODULES = {"ffcv": "ffcv", "dali": "nvidia.dali"}
DATA_FIXTURES = {"test_data", "cifar_folder", "cifar_subset", "imagenet_folder"}

# The same examples on every machine and in every run; slow machines are no failure.
settings.register_profile("relssl", derandomize=True, deadline=None)
settings.load_profile("relssl")


def requires_data() -> bool:
    return os.environ.get("RELSSL_REQUIRE_DATA", "") not in ("", "0")


# -- options and markers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--recipe", metavar="FILE.yaml", help="test the method of this recipe, as every method is tested")


@functools.cache
def missing(need: str) -> str | None:
    """Why tests marked with `need` cannot run here; None when they can."""
    if need == "gpu":
        import torch

        return None if torch.cuda.is_available() else "no CUDA device"
    module = MODULES[need]
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported ({error}); `relssl doctor` says what to do"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if DATA_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("data")
    recipe = config.getoption("recipe")
    if recipe is not None:
        config.hook.pytest_deselected(items=[item for item in items if not is_given(item, recipe)])
        items[:] = [item for item in items if is_given(item, recipe)]


def is_given(item: pytest.Item, recipe: str) -> bool:
    """Whether `--recipe` is what a test is about."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(value is recipe for value in parameters)  # values of other tests may not be comparable


def pytest_runtest_setup(item: pytest.Item) -> None:
    for need in ("gpu", "ffcv", "dali"):
        if item.get_closest_marker(need) is not None and (reason := missing(need)):
            pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """With RELSSL_REQUIRE_DATA, a test of real images that was skipped has failed.

    Left alone are those that also need a device or an engine this machine lacks, and expected failures.
    """
    report = yield
    lacks_more = any(item.get_closest_marker(need) and missing(need) for need in ("gpu", "ffcv", "dali"))
    if (
        requires_data()
        and report.skipped
        and not hasattr(report, "wasxfail")
        and item.get_closest_marker("data") is not None
        and not lacks_more
    ):
        report.outcome = "failed"
        report.longrepr = f"skipped in spite of RELSSL_REQUIRE_DATA: {report.longrepr}"
    return report


def pytest_report_header() -> list[str]:
    data = os.environ.get("RELSSL_TEST_DATA") or "none (RELSSL_TEST_DATA is unset)"
    engines = [name for name in ("ffcv", "dali") if is_installed(MODULES[name])]
    return [f"real images: {data}", f"optional engines: {', '.join(engines) or 'none'}"]


def is_installed(module: str) -> bool:
    """Looked up, not imported: FFCV and DALI take seconds to import."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


# -- real images


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of archives with real images."""
    given = os.environ.get("RELSSL_TEST_DATA")
    if given and Path(given).is_dir():
        return Path(given)
    reason = f"RELSSL_TEST_DATA is no folder: {given}" if given else "real images: RELSSL_TEST_DATA is unset"
    if requires_data():
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where archives are unpacked, once for all worker processes of a run."""
    if given := os.environ.get("RELSSL_TEST_CACHE"):
        folder = Path(given)
    else:
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "real-images"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def cifar_folder(test_data: Path, data_cache: Path) -> Path:
    """All of CIFAR-10 as JPEG: `train/<class>/*.jpg` (50,000), `test/<class>/*.jpg` (10,000). Read-only."""
    return unpacked(test_data / CIFAR_ARCHIVE, data_cache / "cifar10", lambda _: True)


@pytest.fixture(scope="session")
def cifar_subset(test_data: Path, data_cache: Path) -> Path:
    """The same tree with the first 30 training and 10 test images of each class. Read-only."""
    seen: Counter[str] = Counter()
    limits = {"train": 30, "test": 10}

    def is_wanted(member: PurePosixPath) -> bool:
        seen[str(member.parent)] += 1
        return seen[str(member.parent)] <= limits[member.parts[0]]

    return unpacked(test_data / CIFAR_ARCHIVE, data_cache / "cifar10-subset", is_wanted)


@pytest.fixture(scope="session")
def imagenet_folder(test_data: Path, data_cache: Path) -> Path:
    """500 ImageNet pictures in one flat folder, `n01440764_tench.JPEG` and so on. Read-only."""
    return unpacked(test_data / IMAGENET_ARCHIVE, data_cache / "imagenet", lambda _: True)


def unpacked(archive: Path, folder: Path, is_wanted: Callable[[PurePosixPath], bool]) -> Path:
    """Stream the wanted files of `archive` into `folder`; complete when the folder exists under its name."""
    if not archive.is_file():
        pytest.fail(f"RELSSL_TEST_DATA should hold {archive.name}", pytrace=False)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            draft = folder.with_name(folder.name + ".partial")
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            stream_files(archive, draft, is_wanted)
            draft.rename(folder)
    return folder


def stream_files(archive: Path, folder: Path, is_wanted: Callable[[PurePosixPath], bool]) -> None:
    """Regular files only, written by us: extraction filters came to Python later than 3.10.0."""
    with tarfile.open(archive, "r|*") as members:
        for member in members:
            path = PurePosixPath(member.name)
            if not member.isfile() or not is_wanted(path):
                continue
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{archive} holds a path that leaves its folder: {member.name}")
            content = members.extractfile(member)
            assert content is not None  # it is a regular file
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read())
