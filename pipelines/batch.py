"""What a method receives: the views of a batch of images, ready on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipelines.views import ViewSpec, expand


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
    plan: Sequence[ViewSpec], batch: int, device: torch.device, dtype: torch.dtype, *, channels_last: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Buffers for a batch: one (B, S, S, 3) per view in plan order, and the (V, B, S, S, 3) behind each name.

    Views of one name share a buffer where their sizes are equal; such names appear in the second result. Without
    `channels_last` the same shapes lie in memory as planes.
    """

    def empty(*shape: int) -> Tensor:
        if channels_last:
            return torch.empty(shape, device=device, dtype=dtype)
        return torch.empty((*shape[:-3], 3, *shape[-3:-1]), device=device, dtype=dtype).movedim(-3, -1)

    sizes: dict[str, list[int]] = {}
    for spec in expand(plan):
        sizes.setdefault(spec.name, []).append(spec.size)
    storage = {name: empty(len(s), batch, s[0], s[0], 3) for name, s in sizes.items() if len(set(s)) == 1}
    taken = dict.fromkeys(sizes, 0)
    buffers = []
    for spec in expand(plan):
        if spec.name in storage:
            buffers.append(storage[spec.name][taken[spec.name]])
            taken[spec.name] += 1
        else:
            buffers.append(empty(batch, spec.size, spec.size, 3))
    return buffers, storage


def named_views(plan: Sequence[ViewSpec], buffers: Sequence[Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """(B, S, S, 3) buffers in plan order -> name -> tuple of (B, 3, S, S), a permuted view of the same memory."""
    views: dict[str, tuple[Tensor, ...]] = {}
    for spec, buffer in zip(expand(plan), buffers, strict=True):
        views[spec.name] = (*views.get(spec.name, ()), buffer.permute(0, 3, 1, 2))
    return views
