"""What this process may use of the machine: memory, within the limits of its container."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device; on the CPU without swapping. None where the system does not say."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    known = [amount for amount in (_available_memory(), _left_of_limit()) if amount is not None]
    return min(known, default=None)


def _available_memory() -> int | None:
    """The page cache counts as free."""
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return None


def _left_of_limit() -> int | None:
    """What the control group (v2, then v1) leaves of its limit; what is only cached counts as free."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        most, now = _text(CGROUP / limit).strip(), _text(CGROUP / used).strip()
        if most.isdigit() and now.isdigit():
            return max(0, int(most) - int(now) + _cached(CGROUP / limit))
    return None


def _cached(limit: Path) -> int:
    for line in _text(limit.with_name("memory.stat")).splitlines():
        name, _, amount = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(amount)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
