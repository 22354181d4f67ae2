"""Makes `.venv` and installs relssl into it, before `make demo` and `make test`. Standard library only.

    python3 scripts/bootstrap.py demo|test|ffcv [--venv DIR] [--pip-args "..."]

It says what it will download before it does so, starts at once when everything is there (a stamp keyed on
what decides about the installation), survives being killed at any moment (a marker stands while pip works;
whatever was left half-installed is found and made anew), and lets two calls at the same time wait their turn.

FFCV is an optional engine that is compiled here. Its system packages are installed when that is allowed (root
or sudo without a password, apt-get present, RELSSL_NO_APT unset); otherwise the exact command is printed and
the rest goes on.

The syntax stays old enough for an old Python to get as far as saying which one is needed.
"""

import argparse
import csv
import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Dict, List, Optional, Sequence

ROOT = Path(__file__).resolve().parent.parent
PYTHON = os.path.realpath(sys.executable)  # not a link to it in a .venv that may be removed
MINIMUM_PYTHON = (3, 10)
STAMP = ".relssl-installed.json"
MARKER = ".relssl-installing"

HAS_DALI = (platform.system(), platform.machine()) == ("Linux", "x86_64")
EXTRAS = {"demo": "", "test": "[dev,track,dali]" if HAS_DALI else "[dev,track]"}
# Measured with the pinned versions: Python 3.11, Linux x86_64, PyTorch's default (CUDA) build, 2026-11-22.
DOWNLOAD_GB, INSTALLED_GB, TEST_EXTRA_MB = 3.2, 6.4, 580
FREE_GB_NEEDED = 10.0  # pip unpacks and caches beside what it installs

FFCV = ["ffcv==1.0.2", "setuptools"]
FFCV_TOOLS = (("c++", "g++"), ("pkg-config", "pkg-config"))
FFCV_LIBRARIES = (("opencv4", "libopencv-dev"), ("libturbojpeg", "libturbojpeg0-dev"))
FFCV_DOWNLOAD_MB = 150


class Stop(Exception):
    """The installation cannot go on; the text says why and what to do."""


def say(text: str) -> None:
    print("relssl: " + text, flush=True)


def main() -> int:
    options = parse_arguments()
    try:
        check_python(sys.version_info[:2])
        venv = Venv(ROOT / options.venv, shlex.split(options.pip_args))
        venv.bring_up(options.profile)
    except Stop as reason:
        say(str(reason))
        return 1
    except KeyboardInterrupt:
        say("interrupted; the next call goes on from here")
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make .venv and install relssl into it.")
    parser.add_argument("profile", choices=["demo", "test", "ffcv"])
    parser.add_argument("--venv", default=".venv", help="folder of the virtual environment")
    parser.add_argument("--pip-args", default="", help="handed to pip install as they are")
    return parser.parse_args()


def check_python(version: Sequence[int]) -> None:
    if tuple(version) < MINIMUM_PYTHON:
        raise Stop(
            "Python 3.10 or newer is needed, this is {}.{} ({}). Install one, for example\n"
            "    sudo apt-get install python3.11 python3.11-venv\n"
            "and name it: make demo PYTHON=python3.11".format(version[0], version[1], sys.executable)
        )


class Venv:
    """One virtual environment: what is in it, whether it is whole, and how to complete it."""

    def __init__(self, folder: Path, pip_args: List[str]) -> None:
        self.folder = folder
        self.pip_args = pip_args
        self.python = folder / "bin" / "python"
        self.lock_file = None  # type: Optional[int]

    # -- the stamp: what was installed last, and from what

    def stamp(self) -> Dict[str, str]:
        try:
            return json.loads((self.folder / STAMP).read_text())
        except (OSError, ValueError):
            return {}

    def write_stamp(self, **entries: str) -> None:
        stamp = self.stamp()
        stamp.update(entries, root=str(ROOT), python=python_name())
        draft = self.folder / (STAMP + ".new")
        draft.write_text(json.dumps(stamp, indent=1))
        os.replace(draft, self.folder / STAMP)

    def is_ready(self, profile: str) -> bool:
        """Whether `profile` was installed from what the checkout says now; reads four small files."""
        stamp = self.stamp()
        if (self.folder / MARKER).exists() or not self.python.exists() or self.is_stale(stamp):
            return False
        if profile == "ffcv":
            return stamp.get("ffcv") == "installed"
        if stamp.get(profile) != installation_key():
            return False
        return profile != "test" or self.is_ffcv_settled(stamp.get("ffcv"))

    def is_ffcv_settled(self, state: Optional[str]) -> bool:
        """Whether there is nothing new to try: installed, failed with these versions, still not allowed."""
        if state == "waiting":
            return bool(missing_for_ffcv()) and os.geteuid() != 0
        return state in ("installed", "failed " + installation_key())

    def is_stale(self, stamp: Dict[str, str]) -> bool:
        """Whether the environment belongs to another Python or to a checkout that has been moved."""
        return bool(stamp) and (stamp.get("root") != str(ROOT) or stamp.get("python") != python_name())

    # -- bringing it up

    def bring_up(self, profile: str) -> None:
        if not self.is_ready(profile):
            started = time.monotonic()
            self.lock()
            if not self.is_ready(profile):  # another call may have done it while this one waited
                self.repair()
                self.create()
                self.install("test" if profile == "test" else "demo")
                if profile != "demo":
                    self.install_ffcv(again=profile == "ffcv")
                say("{} is ready after {:.0f} s".format(self.shown(), time.monotonic() - started))
        if profile == "test" and self.stamp().get("ffcv") != "installed":
            say("going on without the FFCV engine (how to add it: docs/install.md, `make ffcv`)")

    def shown(self) -> str:
        return os.path.relpath(str(self.folder), os.getcwd())

    def lock(self) -> None:
        """Held until this process and every pip that it started have ended (they inherit the descriptor)."""
        path = self.folder.with_name(self.folder.name + ".lock")
        self.lock_file = os.open(str(path), os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another installation into {} is running; waiting for it".format(self.shown()))
            fcntl.flock(self.lock_file, fcntl.LOCK_EX)

    def repair(self) -> None:
        """Remove the environment if it is ours and cannot be built upon."""
        if not self.folder.exists():
            return
        marked, stamp = (self.folder / MARKER).exists(), self.stamp()
        if not marked and not stamp:
            self.refuse_unless_usable()
            return
        if self.is_stale(stamp):
            reason = "it was made by Python {} in {}".format(stamp.get("python"), stamp.get("root"))
        elif not self.works():
            reason = "its Python or pip does not start"
        elif marked and self.damaged():
            reason = "an installation was cut off and left parts incomplete"
        else:
            return
        say("making {} anew: {} (pip's cache keeps what was downloaded)".format(self.shown(), reason))
        self.remove()

    def remove(self) -> None:
        """Out of the way first: a removal that is cut off must not leave something that looks installed."""
        discarded = self.folder.with_name(self.folder.name + ".old")
        if discarded.exists():
            shutil.rmtree(str(discarded))
        os.replace(str(self.folder), str(discarded))
        shutil.rmtree(str(discarded))

    def refuse_unless_usable(self) -> None:
        """A `.venv` that somebody made by hand is used, never removed."""
        if any(self.folder.iterdir()) and not self.works():
            raise Stop(
                "{0} exists, was not made by this program, and its Python or pip does not start. Remove it, "
                "or choose another folder: make VENV=.venv-relssl ...".format(self.shown())
            )

    def works(self) -> bool:
        return self.python.exists() and quiet([str(self.python), "-m", "pip", "--version"]) == 0

    def damaged(self) -> List[str]:
        """Distributions of which a recorded file is absent or has another size: traces of a killed pip."""
        return sorted(
            info.name
            for site in self.folder.glob("lib/python*/site-packages")
            for info in site.glob("*.dist-info")
            if not is_whole(site, info / "RECORD")
        )

    def create(self) -> None:
        if self.works():
            return
        ensure_venv_module()
        self.announce_download()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.mark()
        if quiet([PYTHON, "-m", "venv", str(self.folder)]) != 0:
            raise Stop("`{} -m venv {}` failed; run it by hand to see why".format(PYTHON, self.shown()))
        self.write_stamp()

    def mark(self) -> None:
        (self.folder / MARKER).write_text("pip is at work, or was killed\n")

    def announce_download(self) -> None:
        free = shutil.disk_usage(str(self.folder.parent)).free / 1e9
        say(
            "making {} and installing into it. Download: about {} GB, on disk: about {} GB (free: {:.0f}), "
            "most of it PyTorch's CUDA libraries.".format(self.shown(), DOWNLOAD_GB, INSTALLED_GB, free)
        )
        say("without a GPU, PyTorch's CPU wheels are far smaller: see docs/install.md")
        if free < FREE_GB_NEEDED and not self.pip_args:
            raise Stop(
                "{:.1f} GB are free in {}, about {:.0f} GB are needed while installing. Make room, or put "
                "the environment elsewhere: make VENV=/other/disk/venv ...".format(
                    free, self.folder.parent, FREE_GB_NEEDED
                )
            )

    def install(self, profile: str) -> None:
        if self.stamp().get(profile) == installation_key() and not (self.folder / MARKER).exists():
            return
        if profile == "test" and self.stamp().get("demo"):
            say("adding the tools for tests: about {} MB".format(TEST_EXTRA_MB))
        else:
            say("installing relssl and what it needs, versions from constraints.txt")
        if self.pip("-e", str(ROOT) + EXTRAS[profile]) != 0:
            raise Stop("pip could not install relssl (messages above). Mend the cause and call make again.")
        entries = {profile: installation_key()}
        if profile == "test":
            entries["demo"] = installation_key()
        self.write_stamp(**entries)

    def pip(self, *arguments: str) -> int:
        """`pip install` under the constraints. The marker stays only if pip did not live to report."""
        command = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        command += ["-c", str(ROOT / "constraints.txt"), *self.pip_args, *arguments]
        self.mark()
        status = run_visibly(command, self.folder / "pip.log", self.lock_file)
        if status >= 0 and not (status != 0 and self.damaged()):
            (self.folder / MARKER).unlink()
        return status

    # -- FFCV

    def install_ffcv(self, again: bool) -> None:
        if again or not self.is_ffcv_settled(self.stamp().get("ffcv")):
            self.write_stamp(ffcv=self.try_ffcv())

    def try_ffcv(self) -> str:
        """`installed`, `waiting` for system packages, or `failed <key>`; explains the last two."""
        if platform.system() != "Linux":
            say("the FFCV engine is only offered on Linux")
            return "failed " + installation_key()
        missing = missing_for_ffcv()
        if missing and not apt_install(missing, "the optional FFCV engine", FFCV_DOWNLOAD_MB):
            return "waiting" if apt_prefix() is None else "failed " + installation_key()
        say("compiling FFCV (under a minute, about 100 MB with OpenCV for Python)")
        if self.pip(*FFCV) != 0:
            say("FFCV could not be compiled (messages above); all else works. Try again with: make ffcv")
            return "failed " + installation_key()
        if not self.ffcv_starts() and not (
            apt_install(["libgl1", "libglib2.0-0"], "OpenCV, which FFCV imports", 5) and self.ffcv_starts()
        ):
            say("FFCV is installed, but `import ffcv` fails; `relssl doctor` says why")
            return "failed " + installation_key()
        return "installed"

    def ffcv_starts(self) -> bool:
        return quiet([str(self.python), "-c", "import ffcv"]) == 0


def python_name() -> str:
    return "{}-{}.{}".format(sys.implementation.name, sys.version_info[0], sys.version_info[1])


def installation_key() -> str:
    """Changes exactly when an installation made before may no longer be the right one."""
    digest = hashlib.sha256()
    for name in ("setup.py", "relssl/_version.py", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def is_whole(site: Path, record: Path) -> bool:
    """Whether every file that `record` (of a *.dist-info) lists with a size stands in `site` with it."""
    try:
        rows = list(csv.reader(record.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError):
        return False
    for row in rows:
        if len(row) == 3 and row[2]:
            try:
                if (site / row[0]).stat().st_size != int(row[2]):
                    return False
            except OSError:
                return False
    return bool(rows)


def quiet(command: List[str]) -> int:
    nothing = subprocess.DEVNULL
    return subprocess.call(command, stdin=nothing, stdout=nothing, stderr=nothing)


def run_visibly(command: List[str], log: Path, lock_file: Optional[int]) -> int:
    """Exit status of `command` (negative: killed by that signal).

    A terminal shows the command's own progress. Elsewhere its output goes to `log`, a line is printed now and
    then, and the end of the log if it failed.
    """
    inherited = () if lock_file is None else (lock_file,)
    if sys.stdout.isatty():
        return subprocess.call(command, pass_fds=inherited)
    started = time.monotonic()
    with open(str(log), "wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, pass_fds=inherited
        )
        while True:
            try:
                status = process.wait(timeout=20)
                break
            except subprocess.TimeoutExpired:
                say("... {:.0f} s: {}".format(time.monotonic() - started, current_step(log)))
    if status != 0:
        print(last_lines(log, 25), flush=True)
    return status


def current_step(log: Path) -> str:
    """The last of pip's main lines, without the list that may follow it."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line[:1].isalpha()]
    steps = [line for line in lines if not line.startswith(("WARNING", "Successfully"))]
    return steps[-1].partition(":")[0][:100] if steps else "starting pip"


def last_lines(log: Path, count: int) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-count:])


def ensure_venv_module() -> None:
    """Debian and Ubuntu ship `venv` without `ensurepip` unless a package of its own is installed."""
    if quiet([PYTHON, "-c", "import venv, ensurepip"]) == 0:
        return
    package = "python{}.{}-venv".format(*sys.version_info[:2])
    if not apt_install([package], "virtual environments of this Python", 3):
        raise Stop("this Python cannot make virtual environments: install {}, call again".format(package))


def missing_for_ffcv() -> List[str]:
    """Debian packages without which FFCV does not compile here; empty when it should."""
    missing = [package for tool, package in FFCV_TOOLS if shutil.which(tool) is None]
    for library, package in FFCV_LIBRARIES:
        if shutil.which("pkg-config") is None or quiet(["pkg-config", "--exists", library]) != 0:
            missing.append(package)
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        missing.append("python{}.{}-dev".format(*sys.version_info[:2]))
    return missing


def apt_prefix() -> Optional[List[str]]:
    """How apt-get may be called without asking anybody: as root, through sudo, or (None) not at all."""
    if os.environ.get("RELSSL_NO_APT") or shutil.which("apt-get") is None:
        return None
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") is not None and quiet(["sudo", "-n", "true"]) == 0:
        return ["sudo", "-n"]
    return None


def apt_install(packages: List[str], purpose: str, megabytes: int) -> bool:
    """Install Debian packages if that is allowed; say exactly what to type if it is not, or if it failed."""
    command = "sudo apt-get update && sudo apt-get install -y --no-install-recommends " + " ".join(packages)
    prefix = apt_prefix()
    if prefix is None:
        say("for {}, these system packages are missing: {}".format(purpose, " ".join(packages)))
        say("this call may not install them. Somebody who may, types:\n    " + command)
        return False
    say("for {}, installing system packages (about {} MB): {}".format(purpose, megabytes, " ".join(packages)))
    apt = prefix + ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-o", "DPkg::Lock::Timeout=300", "-q"]
    quiet(apt + ["update"])  # fails where a third-party list is broken, and the packages may still be known
    done = subprocess.run(
        apt + ["install", "-y", "--no-install-recommends"] + packages,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode != 0:
        print(done.stdout.decode(errors="replace")[-2000:], flush=True)
        say("apt-get failed (above). By hand:\n    " + command)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
