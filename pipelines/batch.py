"""What a method receives: the views of a batch of images, ready on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipelines.memory import Recycler
from pipelines.views import ViewSpec, view_counts


@dataclass(frozen=True)
class ViewBatch:
    """Views of B images. Tensors are fresh for every batch and may be kept.

    Attributes:
        views: name -> V tensors (B, 3, S, S), floating point, normalised, in plan order.
        index: (B,) int64 sample ids.
        label: (B,) int64 class, -1 = none.
        position: (B,) int64 place in the global batch of the update.
    """

    views: dict[str, tuple[Tensor, ...]]
    index: Tensor
    label: Tensor
    position: Tensor
    _storage: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def stacked(self, name: str) -> Tensor:
        """The views of one name and one size as (V*B, 3, S, S), view-major; without a copy when made by a loader.

        Raises:
            ValueError: the views differ in size.
        """
        views = self.views[name]
        sizes = {tuple(view.shape) for view in views}
        if len(sizes) != 1:
            raise ValueError(f"views {name!r} differ in shape, so they cannot be stacked: {sorted(sizes)}")
        if name in self._storage:
            return self._storage[name].permute(0, 1, 4, 2, 3).flatten(0, 1)
        return torch.cat(views)

    def __len__(self) -> int:
        return len(self.index)


def allocate(
    plan: Sequence[ViewSpec],
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    channels_last: bool,
    memory: Recycler | None = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Buffers for a batch: one (V, B, S, S, 3) per spec, and the (V, B, S, S, 3) behind each name.

    Specs of one name share a buffer where their sizes are equal; such names appear in the second result. Without
    `channels_last` the same shapes lie in memory as planes. `memory` provides for the CPU.
    """

    def empty(views: int, size: int) -> Tensor:
        shape = (views, batch, size, size, 3) if channels_last else (views, batch, 3, size, size)
        if memory is not None and device.type == "cpu":
            buffer = memory.empty(shape, dtype)
        else:
            buffer = torch.empty(shape, device=device, dtype=dtype)
        return buffer if channels_last else buffer.movedim(-3, -1)

    sizes: dict[str, set[int]] = {}
    for spec in plan:
        sizes.setdefault(spec.name, set()).add(spec.size)
    counts = view_counts(plan)
    storage = {name: empty(counts[name], s.pop()) for name, s in sizes.items() if len(s) == 1}
    taken = dict.fromkeys(sizes, 0)
    buffers = []
    for spec in plan:
        if spec.name in storage:
            first = taken[spec.name]
            buffers.append(storage[spec.name][first : first + spec.count])
            taken[spec.name] += spec.count
        else:
            buffers.append(empty(spec.count, spec.size))
    return buffers, storage


def named_views(plan: Sequence[ViewSpec], buffers: Sequence[Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """(V, B, S, S, 3) buffers, one per spec -> name -> tuple of (B, 3, S, S), permuted views of the same memory."""
    views: dict[str, tuple[Tensor, ...]] = {}
    for spec, buffer in zip(plan, buffers, strict=True):
        views[spec.name] = (*views.get(spec.name, ()), *buffer.permute(0, 1, 4, 2, 3).unbind(0))
    return views
