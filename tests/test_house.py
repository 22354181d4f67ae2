"""The house rules: who may import whom, what is installed, what is committed, and that setting up works."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from pipelines import machine
from pipelines.errors import ConfigError
from relssl import doctor, recipes

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ("relssl", "pipelines", "dataset_tools")


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


# -- imports run one way


# The longest prefix that fits a module decides what of ours it may import, by prefix again.
ALLOWED = {
    "pipelines": ["pipelines"],
    "dataset_tools": ["dataset_tools", "pipelines"],
    "relssl": ["relssl", "pipelines", "dataset_tools"],
    "relssl.ops": ["relssl.ops", "relssl.dist", "pipelines.errors"],
    "relssl.dist": ["relssl.dist", "pipelines.errors"],
    "relssl.nets": ["relssl.nets", "relssl.ops", "relssl.dist", "pipelines.errors"],
    "relssl.losses": ["relssl.losses", "relssl.ops", "relssl.dist", "pipelines.errors"],
    "relssl.methods": [
        "relssl.methods", "relssl.losses", "relssl.nets", "relssl.ops", "relssl.optim", "relssl.dist",
        "pipelines.errors", "pipelines.batch", "pipelines.views",
    ],
    "relssl.evaluators": ["relssl.evaluators", "relssl.ops", "relssl.dist", "pipelines.errors", "pipelines.subset"],
}  # fmt: skip
OPTIONAL = {"ffcv", "cv2", "nvidia", "tensorboard", "umap", "timm", "onnx", "onnxruntime", "onnxscript"}
# Loaded by name, and only when asked for: these may import their package at the top.
OPTIONAL_ROOMS = ("pipelines/engines/ffcv", "pipelines/engines/dali", "relssl/interop/")


def modules() -> Iterator[tuple[str, Path, ast.Module]]:
    for package in LIBRARY:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            yield name, path, ast.parse(path.read_text())


def imported(module: str, path: Path, tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Modules that `tree` imports, at any depth; `from a import b` counts as a.b where that is a module."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                inner = ROOT / base.replace(".", "/") / alias.name
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                yield (f"{base}.{alias.name}" if is_module else base), node


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def forbidden_imports(module: str, path: Path, tree: ast.AST) -> list[str]:
    allowed = ALLOWED[max((prefix for prefix in ALLOWED if within(module, prefix)), key=len)]
    ours = (*LIBRARY, "benchmarks", "tests")
    return [
        f"{module} imports {target} (line {node.lineno})"
        for target, node in imported(module, path, tree)
        if target.split(".")[0] in ours and not any(within(target, prefix) for prefix in allowed)
    ]


def test_imports_run_one_way() -> None:
    assert [line for module in modules() for line in forbidden_imports(*module)] == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("pipelines.loader", "from relssl.dist import mix"),
        ("pipelines.engines.ffcv", "import dataset_tools.convert"),
        ("dataset_tools.convert", "from relssl import config"),
        ("relssl.methods.ressl", "from relssl.train import run_update"),
        ("relssl.methods.ressl", "from relssl.evaluators.knn import weighted_knn"),
        ("relssl.losses.wcl", "def f():\n    from relssl.methods import base"),
        ("relssl.nets.heads", "from ..methods import base"),
        ("relssl.config", "from tests import conftest"),
    ],
)
def test_a_forbidden_import_is_seen(module: str, line: str) -> None:
    path = ROOT / (module.replace(".", "/") + ".py")
    assert len(forbidden_imports(module, path, ast.parse(line))) == 1


def test_pictures_are_saved_by_one_function() -> None:
    """Which writes them whole or not at all."""
    makers = [
        (path, tree) for module, path, tree in modules() if "relssl.pictures" in dict(imported(module, path, tree))
    ]
    saving = [
        f"{path}:{node.lineno}"
        for path, tree in makers
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "save"
    ]
    assert len(makers) >= 4
    assert saving == []


def test_no_star_imports() -> None:
    starred = [
        f"{path}:{node.lineno}"
        for _, path, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert starred == []


def test_optional_packages_are_imported_where_they_are_used() -> None:
    eager = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {target}"
        for module, path, tree in modules()
        for statement in tree.body
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.If)
        for target, node in imported(module, path, statement)
        if target.split(".")[0] in OPTIONAL and not path.relative_to(ROOT).as_posix().startswith(OPTIONAL_ROOMS)
    ]
    assert eager == []


LIGHT = ["relssl", "relssl.recipes", "relssl.doctor", "relssl.cli", "pipelines", "pipelines.errors"]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_do_not_import_torch(module: str) -> None:
    heavy = "{'torch', 'torchvision', 'numba', 'matplotlib', 'sklearn', 'accelerate'}"
    done = run(sys.executable, "-c", f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_help_does_not_import_torch() -> None:
    done = run(sys.executable, "-X", "importtime", "-m", "relssl", "--help")
    assert done.returncode == 0, done.stderr
    assert "convert" in done.stdout
    imports = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imports
    assert imports & {"torch", "numba", "matplotlib"} == set()


# -- what is installed


def named_in_setup() -> list[str]:
    tree = ast.parse((ROOT / "setup.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PACKAGES":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py has no list PACKAGES")


def test_setup_names_every_package_folder() -> None:
    folders = {path.parent for package in LIBRARY for path in (ROOT / package).rglob("*.py")}
    on_disk = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert sorted(named_in_setup()) == sorted(on_disk | {"relssl.configs"})
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_every_config_is_a_recipe_that_ships() -> None:
    on_disk = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.y*ml")}
    assert {f"{name}.yaml" for name in recipes.list_recipes()} == {path.as_posix() for path in on_disk}
    assert recipes.list_recipes()


def test_recipes_are_found_by_name() -> None:
    name = recipes.list_recipes()[0]
    assert recipes.recipe_path(name) == ROOT / "configs" / f"{name}.yaml"
    assert recipes.recipe_path(f"{name}.yaml") == recipes.recipe_path(f"configs/{name}.yaml")


def test_an_unknown_recipe_names_the_nearest() -> None:
    name = recipes.list_recipes()[0]
    with pytest.raises(ConfigError, match=re.escape(f"Did you mean {name}")):
        recipes.recipe_path(name[:-1] + "x")
    with pytest.raises(ConfigError, match=re.escape(f"Did you mean {name}")):
        recipes.recipe_path(name.partition("/")[2])
    with pytest.raises(ConfigError, match="relssl configs"):
        recipes.recipe_path("../../etc/passwd")


@pytest.mark.slow
def test_a_wheel_holds_everything_and_works(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "THIRD_PARTY.md", "MANIFEST.in", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in (*LIBRARY, "configs", "tests", "benchmarks"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip")
    built = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", tmp_path, source)
    assert built.returncode == 0, built.stderr
    wheel = next(tmp_path.glob("relssl-*.whl"))

    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(source).as_posix()
        for package in LIBRARY
        for path in (source / package).rglob("*")
        if path.is_file()
    }
    wanted |= {f"relssl/configs/{name}.yaml" for name in recipes.list_recipes()}
    assert shipped == wanted

    installed = run(*pip, "install", "--no-deps", "--quiet", "--target", site, wheel)
    assert installed.returncode == 0, installed.stderr
    look = "import relssl.recipes as r; print(r.__file__, *map(r.recipe_path, r.list_recipes()), sep='\\n')"
    found = run(sys.executable, "-c", look, cwd=tmp_path, PYTHONPATH=str(site))
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert all(line.startswith(str(site)) for line in lines)
    assert len(lines) == 1 + len(recipes.list_recipes())


# -- what is committed


# Pictures that may be committed, each with what it shows; none is made from ImageNet or CIFAR.
PICTURES: dict[str, str] = {}


def committed() -> list[str]:
    """Files of the checkout that git holds or would add."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_large_files() -> None:
    sizes = {name: (ROOT / name).stat().st_size for name in committed()}
    assert {name: size for name, size in sizes.items() if size > 2 * 2**20} == {}


def test_no_pictures_of_other_peoples_data() -> None:
    pictures = re.compile(r"\.(jpe?g|png|gif|webp|bmp|tiff?|beton|pdf|ipynb|tar|t?[gx]z|zip)$", re.IGNORECASE)
    assert {name for name in committed() if pictures.search(name)} == set(PICTURES)


def test_the_documents_hold_no_placeholders() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        assert not re.search(r"\b[A-Z]+_TABLE\b|\bTBD\b|\?\?\?", path.read_text()), path.name


def test_no_file_tells_where_it_was_written() -> None:
    machines = r"/(wo" + r"rk|fa" + r"rm|root|Users|home/\w+)/"
    places = re.compile(machines + r"|\.lib" + r"rary\b|\bthis ses" + r"sion\b")
    told = []
    for name in committed():
        try:
            text = (ROOT / name).read_text()
        except UnicodeDecodeError:
            continue
        told += [f"{name}: {line.strip()}" for line in text.splitlines() if places.search(line)]
    assert told == []


# -- setting up


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts/bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def venv(bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """An environment as the last installation of `demo` and `test` left it, without any real package."""
    monkeypatch.setattr(bootstrap, "missing_for_ffcv", lambda: ["libopencv-dev"])
    monkeypatch.setattr(bootstrap.os, "geteuid", lambda: 1000)
    made = bootstrap.Venv(tmp_path / ".venv", [])
    site = made.folder / "lib/python3.11/site-packages"
    (site / "thing-1.dist-info").mkdir(parents=True)
    (site / "thing.py").write_text("x = 1\n")
    (site / "thing-1.dist-info/RECORD").write_text("thing.py,sha256=0,6\nthing-1.dist-info/RECORD,,\n")
    (made.folder / "bin").mkdir()
    made.python.symlink_to(sys.executable)
    key = bootstrap.installation_key()
    made.write_stamp(demo=key, test=key, ffcv="waiting")
    return made


def test_what_is_installed_starts_at_once(venv) -> None:
    assert venv.is_ready("demo")
    assert venv.is_ready("test")
    assert not venv.is_ready("ffcv")


def test_a_change_installs_again(venv, bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "installation_key", lambda: "another setup.py")
    assert not venv.is_ready("demo")


def test_a_moved_checkout_is_made_anew(venv, bootstrap, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path / "elsewhere")
    for name in ("setup.py", "relssl/_version.py", "constraints.txt"):
        (tmp_path / "elsewhere" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "elsewhere" / name)
    assert not venv.is_ready("demo")
    venv.repair()
    assert not venv.folder.exists()
    assert "anew" in capsys.readouterr().out


def test_system_packages_that_have_come_are_used(venv, bootstrap: ModuleType, monkeypatch) -> None:
    monkeypatch.setattr(bootstrap, "missing_for_ffcv", list)
    assert not venv.is_ready("test")
    assert venv.is_ready("demo")


def test_ffcv_that_does_not_compile_is_not_tried_each_time(venv, bootstrap: ModuleType) -> None:
    venv.write_stamp(ffcv="failed " + bootstrap.installation_key())
    assert venv.is_ready("test")
    venv.write_stamp(ffcv="failed with other versions")
    assert not venv.is_ready("test")


def test_a_killed_installation_is_found(venv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venv, "works", lambda: True)
    venv.mark()
    assert not venv.is_ready("demo")
    venv.repair()
    assert venv.folder.exists()  # nothing was damaged: pip goes on from here
    (venv.folder / "lib/python3.11/site-packages/thing.py").write_text("x")
    assert venv.damaged() == ["thing-1.dist-info"]
    venv.repair()
    assert not venv.folder.exists()


def test_a_removed_environment_can_be_made_by_its_own_python(bootstrap: ModuleType, venv) -> None:
    """`make` runs the program with .venv/bin/python, which `repair` may remove under it."""
    look = "import sys; sys.path.insert(0, 'scripts'); import bootstrap; print(bootstrap.PYTHON)"
    python = run(venv.python, "-I", "-S", "-c", look).stdout.strip()
    assert Path(python).exists()
    assert not Path(python).is_relative_to(venv.folder)


def test_a_removal_that_is_cut_off_leaves_nothing_that_looks_installed(venv, bootstrap, monkeypatch) -> None:
    def cut_off(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bootstrap.shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        venv.remove()
    assert not venv.is_ready("demo")
    assert not venv.folder.exists()


def test_an_environment_of_the_users_own_is_never_removed(bootstrap: ModuleType, tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/precious").write_text("data")
    with pytest.raises(bootstrap.Stop, match="VENV="):
        bootstrap.Venv(tmp_path / ".venv", []).repair()
    assert (tmp_path / ".venv/precious").exists()


def test_an_old_python_is_told_what_to_do(bootstrap: ModuleType) -> None:
    bootstrap.check_python((3, 10))
    with pytest.raises(bootstrap.Stop, match=r"this is 3\.8.*\n.*apt-get install python3\.11"):
        bootstrap.check_python((3, 8))


def test_system_packages_are_named_where_they_may_not_be_installed(bootstrap, monkeypatch, capsys) -> None:
    monkeypatch.setenv("RELSSL_NO_APT", "1")
    assert bootstrap.apt_prefix() is None
    assert not bootstrap.apt_install(["libopencv-dev", "g++"], "the optional FFCV engine", 150)
    assert "apt-get install -y --no-install-recommends libopencv-dev g++" in capsys.readouterr().out


def test_the_lists_of_system_packages_agree(bootstrap: ModuleType) -> None:
    packages = [package for _, package in (*bootstrap.FFCV_TOOLS, *bootstrap.FFCV_LIBRARIES)]
    assert doctor.FFCV_APT.split() == packages
    assert doctor.FFCV_APT in (ROOT / "docs/install.md").read_text()


def test_make_without_a_target_lists_the_targets() -> None:
    done = run("make", "--no-print-directory")
    assert done.returncode == 0
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(rules) - {"help"} == set(re.findall(r"make ([a-z-]+)", done.stdout)) | {"distclean"}


# -- real images in continuous integration


CI_TESTS = """
import pytest

def test_pictures(cifar_subset): assert cifar_subset

@pytest.mark.data
def test_quiet(): pytest.skip("no reason")

@pytest.mark.dali
@pytest.mark.data
def test_engine(): assert False, "runs only where DALI is installed"

def test_other(): pytest.skip("needs no data")
"""


def run_suite(folder: Path, **environment: str) -> str:
    conftest = (ROOT / "tests/conftest.py").read_text()
    (folder / "conftest.py").write_text(conftest.replace("nvidia.dali", "no_such_engine"))
    (folder / "test_it.py").write_text(CI_TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n data\n gpu\n ffcv\n dali\n")
    empty = {"RELSSL_TEST_DATA": "", "RELSSL_TEST_CACHE": ""}
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder)
    done = run(*command, cwd=folder, **empty, **environment)
    return done.stdout.splitlines()[-1]


def test_without_real_images_their_tests_are_skipped(tmp_path: Path) -> None:
    assert run_suite(tmp_path, RELSSL_REQUIRE_DATA="").startswith("4 skipped")


def test_where_real_images_are_required_a_skip_is_a_failure(tmp_path: Path) -> None:
    closing = run_suite(tmp_path, RELSSL_REQUIRE_DATA="1")
    assert closing.startswith("1 failed, 2 skipped, 1 error"), closing


def test_ci_script_is_sound() -> None:
    assert run("bash", "-n", ".ci/run").returncode == 0
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_real_images_arrive_whole(cifar_subset: Path) -> None:
    assert len(list(cifar_subset.glob("train/*/*.jpg"))) == 300
    assert len(list(cifar_subset.glob("test/*/*.jpg"))) == 100


# -- doctor


@pytest.mark.slow  # it imports FFCV and TensorBoard where they are installed
def test_doctor_looks_at_everything() -> None:
    checks = {check.name: check for check in doctor.doctor(ROOT)}
    assert checks["torch"].status == checks["numba"].status == "ok"
    assert {"Python", "cores", "memory", "disk", "devices", "FFCV engine", "DALI engine"} <= checks.keys()
    assert all(check.advice for check in checks.values() if check.status == "problem")


def test_doctor_reports_a_broken_library_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)  # makes `import numba` fail
    monkeypatch.setattr(doctor, "check_extra", lambda *_: doctor.check_cores())
    checks = doctor.doctor(ROOT)
    assert doctor.has_problem(checks)
    assert {check.name: check.status for check in checks}["numba"] == "problem"
    assert {check.name: check.status for check in checks}["threads"] == "ok"
    assert any(line.startswith("problem") and "numba" in line for line in doctor.format_checks(checks))


def test_doctor_sees_too_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    assert doctor.check_thread_settings().status == "problem"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert doctor.check_thread_settings().status == "ok"


def test_doctor_reads_the_limits_of_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert "limit is 0.5 cores" in doctor.check_cores().detail
    assert doctor.check_memory().status == "problem"
    assert "limit 1.0 GiB" in doctor.check_memory().detail


def test_doctor_says_what_ffcv_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    check = doctor.check_ffcv()
    assert check.status == "absent"
    assert "libopencv-dev" in check.advice
    assert ".[ffcv]" in check.advice
