"""What this machine has, what is missing, and what to do about it: the library behind `relssl doctor`.

Each look is one small function that returns one `Check`, and none of them can stop the others: an installed
library that fails to load is itself a finding. Heavy modules are imported in the function that needs them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines import machine
from pipelines.errors import MissingExtraError

FFCV_APT = "g++ pkg-config libopencv-dev libturbojpeg0-dev"


@dataclass(frozen=True)
class Check:
    """One finding. `absent` is fine (something optional is not there); `problem` should be mended."""

    name: str
    status: Literal["ok", "absent", "problem"]
    detail: str
    advice: str = ""


def doctor(folder: Path | str = ".") -> list[Check]:
    """Look at everything; `folder` is where data and runs will be written: its free space is reported."""
    looks: list[tuple[str, Callable[[], Check]]] = [
        ("Python", check_python),
        ("cores", check_cores),
        ("memory", check_memory),
        ("disk", lambda: check_disk(Path(folder))),
        ("torch", check_torch),
        ("devices", check_devices),
        ("torchvision", check_torchvision),
        ("accelerate", lambda: check_library("accelerate", "accelerate")),
        ("numba", check_numba),
        ("threads", check_thread_settings),
        ("FFCV engine", check_ffcv),
        ("DALI engine", check_dali),
        ("TensorBoard", lambda: check_extra("TensorBoard", "tensorboard", "tensorboard", "track")),
    ]
    return [_guarded(name, look) for name, look in looks]


def format_checks(checks: Iterable[Check]) -> list[str]:
    """Plain lines for a terminal or a bug report: `ok       torch        2.14.1 (CUDA 13.0 build)`."""
    checks = list(checks)
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<8} {check.name:<{width}}  {check.detail}")
        if check.advice:
            lines.append(f"{'':<8} {'':<{width}}  -> {check.advice}")
    return lines


def has_problem(checks: Iterable[Check]) -> bool:
    """Whether anything needs mending (an absent optional package does not)."""
    return any(check.status == "problem" for check in checks)


# -- the machine


def check_python() -> Check:
    detail = f"{platform.python_version()} at {sys.executable}, {platform.system()} {platform.machine()}"
    return Check("Python", "ok", detail)


def check_cores() -> Check:
    """Cores of the machine, those this process may run on, and the share that a container grants."""
    everything, usable = os.cpu_count() or 1, machine.usable_cores()
    quota = machine.granted_cores()
    detail = f"{usable} usable of {everything}"
    if quota is not None and quota < usable:
        return Check("cores", "ok", f"{detail}, but the container's limit is {quota:g} cores of time")
    return Check("cores", "ok", detail)


def check_memory() -> Check:
    """Memory that can be had now, and the container's limit if it is lower than the machine's memory."""
    facts = machine.meminfo()
    if not facts:
        return Check("memory", "absent", "not known on this system")
    total, available = facts["MemTotal"], facts["MemAvailable"]
    detail = f"{available / 2**30:.1f} GiB available of {total / 2**30:.1f} GiB"
    limit = machine.granted_memory()
    if limit is not None and limit < total:
        detail += f", container's limit {limit / 2**30:.1f} GiB"
    if min(available, limit or available) < 2 * 2**30:
        return Check("memory", "problem", detail, "training needs about 2 GiB even for small images")
    return Check("memory", "ok", detail)


def check_disk(folder: Path) -> Check:
    usage = shutil.disk_usage(folder)
    detail = f"{usage.free / 1e9:.0f} GB free of {usage.total / 1e9:.0f} GB in {folder.resolve()}"
    if usage.free < 2e9:
        return Check("disk", "problem", detail, "make room, or work in a folder on another disk")
    return Check("disk", "ok", detail)


# -- the base installation


def check_library(name: str, module: str) -> Check:
    """A library of the base installation: its version, having imported it."""
    importlib.import_module(module)
    return Check(name, "ok", importlib.metadata.version(module))


def check_torch() -> Check:
    import torch

    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda} build"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip} build"
    else:
        build = "CPU build"
    return Check("torch", "ok", f"{torch.__version__} ({build}, {torch.get_num_threads()} threads)")


def check_devices() -> Check:
    """Every CUDA device with its memory and compute capability."""
    import torch

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi") is not None
        if driver and torch.version.cuda:
            advice = "an NVIDIA driver is there: too old for this build, or CUDA_VISIBLE_DEVICES is empty"
            return Check("devices", "problem", "no CUDA device can be used", advice)
        if driver:
            advice = "an NVIDIA driver is there, but this torch is a CPU build: install the CUDA build"
            return Check("devices", "problem", "no CUDA device can be used", advice)
        return Check("devices", "absent", "no CUDA device: everything runs on the CPU")
    devices = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index} {facts.name} {facts.total_memory / 2**30:.0f} GiB sm_{facts.major}{facts.minor}")
    return Check("devices", "ok", "; ".join(devices))


def check_torchvision() -> Check:
    """Imported and used: a build that does not fit torch fails in its compiled operators only."""
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    try:
        torchvision.ops.nms(boxes, torch.ones(1), 0.5)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        advice = f"install the torchvision that belongs to torch {torch.__version__}"
        return Check("torchvision", "problem", f"{torchvision.__version__}: operators do not load ({reason})", advice)
    return Check("torchvision", "ok", torchvision.__version__)


def check_numba() -> Check:
    import numba

    return Check("numba", "ok", f"{numba.__version__} ({numba.get_num_threads()} threads)")


def check_thread_settings() -> Check:
    """Thread counts from the environment; more threads than cores make every step slower."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not given:
        return Check("threads", "ok", "OMP_NUM_THREADS and its kin are unset: libraries use every core")
    detail = ", ".join(f"{name}={value}" for name, value in given.items())
    usable = machine.usable_cores()
    too_many = [name for name, value in given.items() if value.isdigit() and int(value) > usable]
    if too_many:
        advice = f"{usable} cores are usable: lower or unset {', '.join(too_many)}"
        return Check("threads", "problem", detail, advice)
    return Check("threads", "ok", detail)


# -- extras


def check_extra(name: str, module: str, distribution: str, extra: str) -> Check:
    """An optional library: absent, present, or installed and broken."""
    if importlib.util.find_spec(module) is None:
        return Check(name, "absent", "not installed", _extra(extra))
    importlib.import_module(module)
    return Check(name, "ok", importlib.metadata.version(distribution))


def check_ffcv() -> Check:
    """FFCV is compiled while it is installed; our engine loads its library and nothing else of it."""
    name = "FFCV engine"
    if importlib.util.find_spec("ffcv") is None:
        return Check(name, "absent", "not installed", f"sudo apt-get install {FFCV_APT}; {_extra('ffcv')}")
    from pipelines.engines.ffcv import load_library

    try:
        load_library()
    except MissingExtraError as error:
        return Check(name, "problem", "installed, does not load", str(error))
    return Check(name, "ok", importlib.metadata.version("ffcv"))


def check_dali() -> Check:
    name = "DALI engine"
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return Check(name, "absent", "not installed", f"for NVIDIA GPUs: {_extra('dali')}")
    dali = importlib.import_module("nvidia.dali")
    return Check(name, "ok", str(dali.__version__))


# -- reading the system


def _guarded(name: str, look: Callable[[], Check]) -> Check:
    """The finding of `look`; a library that cannot even be imported is reported, with the way to mend it."""
    try:
        return look()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        advice = "install it again in the versions of constraints.txt"
        return Check(name, "problem", f"does not work: {reason}", advice)


def _extra(name: str) -> str:
    return f"in the checkout: pip install -c constraints.txt -e '.[{name}]' (optional)"
