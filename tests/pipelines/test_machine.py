"""Cores and memory within the limits of control groups."""

from __future__ import annotations

import os

import pytest
import torch

from pipelines import machine
from pipelines.machine import available_cores, default_workers, free_memory, granted_memory

V1 = {"quota": "cpu.cfs_quota_us", "period": "cpu.cfs_period_us"}
GROUPS = {
    "none": (None, {}, 64),
    "unlimited": ("0::/", {"cpu.max": "max 100000"}, 64),
    "a container": ("0::/", {"cpu.max": "400000 100000"}, 4),
    "rounded up": ("0::/", {"cpu.max": "150000 100000"}, 2),
    "less than one": ("0::/", {"cpu.max": "10000 100000"}, 1),
    "more than there are": ("0::/", {"cpu.max": "12800000 100000"}, 64),
    "a job under a scheduler": ("0::/slurm/job", {"slurm/job/cpu.max": "300000 100000"}, 3),
    "a limit further up": ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2),
    "the least of several": ("0::/a", {"a/cpu.max": "300000 100000", "cpu.max": "900000 100000"}, 3),
    "a name from outside": ("0::/docker/1f", {"cpu.max": "500000 100000"}, 5),
    "a name outside": ("0::/../x", {"cpu.max": "500000 100000", "../x/cpu.max": "100000 100000"}, 5),
    "another's": ("0::/a", {"b/cpu.max": "100000 100000"}, 64),
    "version 1": ("4:cpu,cpuacct:/x", {f"cpu/x/{V1['quota']}": "250000", f"cpu/x/{V1['period']}": "100000\n"}, 3),
    "version 1, root": (None, {f"cpu/{V1['quota']}": "200000", f"cpu/{V1['period']}": "100000"}, 2),
    "version 1, none": ("4:cpu:/", {f"cpu/{V1['quota']}": "-1\n", f"cpu/{V1['period']}": "100000"}, 64),
    "version 1, cpuset": ("4:cpuset:/x", {f"cpu/x/{V1['quota']}": "100000", f"cpu/x/{V1['period']}": "100000"}, 64),
    "both": ("1:cpu:/\n0::/a", {"a/cpu.max": "700000 100000"}, 7),
    "a period of nothing": ("0::/", {"cpu.max": "100000 0"}, 64),
    "nonsense": ("what\n\n0::/", {"cpu.max": "some more words"}, 64),
}


def write_groups(monkeypatch, tmp_path, own, files):
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_OWN_CGROUP", tmp_path / "self")
    (tmp_path / "self").write_text(own)
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.mark.parametrize("case", GROUPS)
def test_cores_granted_by_control_groups(case, tmp_path, monkeypatch):
    own, files, expected = GROUPS[case]
    write_groups(monkeypatch, tmp_path, own or "", files)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert available_cores() == expected


def test_the_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(machine, "available_cores", lambda: 8)
    for neighbours, expected in (("1", 8), ("3", 2), ("8", 1), ("20", 1), ("0", 8), ("x", 8)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", neighbours)
        assert default_workers() == expected
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert default_workers() == 8


MEMORY_2 = {
    "memory.max": "1000000\n",
    "memory.current": "700000\n",
    "memory.stat": "anon 500000\ninactive_file 150000\n",
}
MEMORY_1 = {
    "memory/job/memory.limit_in_bytes": "900000",
    "memory/job/memory.usage_in_bytes": "800000",
    "memory/job/memory.stat": "total_inactive_file 100000",
}


@pytest.mark.parametrize(
    ("own", "files", "limit", "free"),
    [
        ("0::/", MEMORY_2, 1_000_000, 450_000),
        ("0::/a", {**MEMORY_2, "a/memory.max": "max", "a/memory.current": "5"}, 1_000_000, 450_000),
        ("5:memory:/job", MEMORY_1, 900_000, 200_000),
        ("0::/", {**MEMORY_2, "memory.max": "max\n"}, None, None),
        ("0::/", {}, None, None),
    ],
)
def test_memory_granted_by_control_groups(monkeypatch, tmp_path, own, files, limit, free):
    here = free_memory(torch.device("cpu"))
    write_groups(monkeypatch, tmp_path, own, files)
    assert granted_memory() == limit
    found = free_memory(torch.device("cpu"))
    assert found == free if free is not None else found > here / 2


def test_memory_is_not_known_everywhere(monkeypatch, tmp_path):
    write_groups(monkeypatch, tmp_path, "", {})
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "absent")
    assert free_memory(torch.device("cpu")) is None
