"""What a computation costs besides time: bytes at its peak, operators or kernels, bytes kept for backward."""

from __future__ import annotations

import functools
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

# Operators that reserve memory or look at a shape and compute nothing, besides those whose result is a view.
_IDLE = ("empty", "resize_", "result_type", "_unsafe_view")


class Footprint(NamedTuple):
    """Of one call: most bytes alive above what was there before; operators on a CPU, kernels on CUDA."""

    peak_bytes: int
    launches: int


def footprint(call: Callable[[], object], device: torch.device) -> Footprint:
    """Run `call` twice, or on a CPU once, and watch it. Its result counts until it is dropped at the end.

    On CUDA the peak is the caching allocator's, and kernels are those the device ran, without copies and fills by
    the copy engine. On a CPU both come from torch.profiler: the running sum of its allocation events, and the
    operators that compute something and call no other that does.
    """
    call()  # buffers that are made once, and lazy initialisation, are not its cost
    gc.collect()
    if device.type == "cuda":
        peak = _cuda_peak(call, device)
        profiler = _profiled(call, [ProfilerActivity.CPU, ProfilerActivity.CUDA])
        return Footprint(peak, count_kernels(profiler.events()))
    profiler = _profiled(call, [ProfilerActivity.CPU])
    return Footprint(peak_of(allocations(profiler)), count_operators(profiler.events()))


def _cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _profiled(call: Callable[[], object], activities: list[ProfilerActivity]) -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its stages and a missing GPU are no news to the user
    with profile(activities=activities, profile_memory=activities == [ProfilerActivity.CPU]) as profiler:
        call()
        if ProfilerActivity.CUDA in activities:
            torch.cuda.synchronize()
    return profiler


def allocations(profiler: profile) -> list[int]:
    """Bytes of every allocation, negative where they are given back, in order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())["traceEvents"]
    events = [event for event in trace if event["name"] == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]


def peak_of(sizes: Iterable[int]) -> int:
    """The largest running sum."""
    live = peak = 0
    for size in sizes:
        live += size
        peak = max(peak, live)
    return peak


def count_operators(events: Iterable[Any]) -> int:
    """Operators that compute something and call no other that does; views and bare allocations do not count."""
    working = [event for event in events if _computes(event.name)]
    outer = {id(ancestor) for event in working for ancestor in _ancestors(event)}
    return sum(id(event) not in outer for event in working)


def count_kernels(events: Iterable[Any]) -> int:
    """Kernels that a CUDA device ran."""
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


def _ancestors(event: Any) -> Iterable[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


@functools.cache
def _computes(name: str) -> bool:
    """Whether an event of this name is an operator that reads or writes numbers."""
    space, _, operator = name.partition("::")
    if space != "aten" or any(idle in operator for idle in _IDLE):
        return False
    packet = getattr(torch.ops.aten, operator, None)
    if packet is None:
        return True
    results = getattr(packet, packet.overloads()[0])._schema.returns
    return not any(result.alias_info is not None and not result.alias_info.is_write for result in results)


def bytes_for_backward(module: nn.Module, inputs: Tensor) -> int:
    """Bytes of the tensors that the forward pass keeps for the backward pass, each storage once.

    Parameters and buffers are there anyway and do not count; `inputs` do where they are kept.
    """
    ours = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # holds on to the storages, so that no address comes up twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(inputs)
    return sum(storage.nbytes() for storage in kept.values())
