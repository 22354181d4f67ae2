"""What this process may use of the machine: cores and memory, within the limits of its container."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_MEMINFO = Path("/proc/meminfo")

# Names of the limit, of what is used and of what of that is only cached, in control groups of version 2, then 1.
_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_cores() -> int:
    """Cores this process may use: its affinity, and the bandwidth that its control group grants, rounded up."""
    granted = granted_cores()
    return usable_cores() if granted is None else max(1, min(usable_cores(), -int(-granted // 1)))


def default_workers() -> int:
    """This process's share of the cores: all of them, or among the processes that a launcher started beside it."""
    try:
        neighbours = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    except ValueError:
        neighbours = 1
    return max(available_cores() // neighbours, 1)


def granted_cores() -> float | None:
    """Cores of time that this process's control group and those above it grant; None without a limit."""
    limits = [cores for group in _groups("cpu") if (cores := _quota(group)) is not None]
    return min(limits, default=None)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device; on the CPU without swapping. None where the system does not say."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    left = [limit - used for limit, used in _memory_of_groups()]
    return min([*left, *(amount for name, amount in meminfo().items() if name == "MemAvailable")], default=None)


def granted_memory() -> int | None:
    """Bytes that this process's control group and those above it grant; None without a limit."""
    return min((limit for limit, _ in _memory_of_groups()), default=None)


def meminfo() -> dict[str, int]:
    """Bytes by name, as /proc/meminfo tells; empty where there is none (macOS, Windows)."""
    pairs = (line.split(":") for line in _text(_MEMINFO).splitlines() if ":" in line)
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that may limit this process, of either version.

    Inside a container its own group is usually the root of what it sees, whatever name the group has outside.
    """
    names = {_CGROUPS: "", _CGROUPS / controller: ""}
    for line in _text(_OWN_CGROUP).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number == "0":
            names[_CGROUPS] = name
        elif controller in controllers.split(","):
            names[_CGROUPS / controller] = name
    for root, name in names.items():
        parts = [part for part in name.split("/") if part]
        if ".." in parts:  # outside of what can be seen here
            parts = []
        for depth in range(len(parts) + 1):
            yield root.joinpath(*parts[:depth])


def _quota(group: Path) -> float | None:
    """Quota by period of one control group; None where it has no limit."""
    quota, _, period = _text(group / "cpu.max").strip().partition(" ")
    if not period:
        quota, period = (_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) > 0 else None


def _memory_of_groups() -> Iterator[tuple[int, int]]:
    """Limit, and what is used of it and not only cached, of every control group that has a limit."""
    for group in _groups("memory"):
        for limit, used, cached in _MEMORY:
            most, now = _text(group / limit).strip(), _text(group / used).strip()
            if most.isdigit() and now.isdigit():
                stat = dict(line.split() for line in _text(group / "memory.stat").splitlines())
                yield int(most), max(int(now) - int(stat.get(cached, 0)), 0)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
