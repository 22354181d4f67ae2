"""Features of a whole data set by a frozen backbone: eval mode, un-augmented, file order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.loader import ViewLoader
from pipelines.views import ViewSpec
from relssl import dist


def feature_loader(
    files: Any,
    spec: ViewSpec,
    *,
    batch_size: int,
    device: torch.device | str,
    engine: str = "auto",
    resize: str = "antialias",
    workers: int | None = None,
    dtype: torch.dtype = torch.float32,
    max_unreadable: float = 0.0,
) -> ViewLoader:
    """A loader of one un-augmented view of every image in file order, shared out among the ranks.

    Args:
        files: an open data set.
        batch_size: images per forward pass of a rank.
        max_unreadable: share of the images that may be unreadable; none for a figure that is to be published.
    """
    world = dist.world_size()
    share = -(-len(files) // world)
    return ViewLoader(
        files,
        [(None, [spec])],
        global_batch=min(batch_size, share) * world if len(files) >= world else len(files),
        engine=engine,
        resize=resize,
        device=device,
        rank=dist.rank(),
        world_size=world,
        drop_last=False,
        shuffle=False,
        dtype=dtype,
        workers=workers,
        max_unreadable=max_unreadable,
    )


def encode(
    backbone: nn.Module, loader: ViewLoader, *, progress: Callable[[int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Features and labels of every image of a `feature_loader`, on every rank.

    The backbone itself is untouched: a copy in eval mode with rank 0's buffers does the work.

    Args:
        backbone: (B, 3, S, S) -> (B, D).
        progress: called with the number of images that this rank has done.

    Returns:
        (N, D) float32 (float64 for a float64 backbone) and (N,) int64 on the CPU, in file order. Where the loader
        tolerates unreadable images, their rows are NaN and their labels -1.
    """
    frozen = frozen_copy(backbone, loader.device)
    loader.set_position(0, 0)
    parts: list[tuple[Tensor, ...]] = []
    done = 0
    for part in feature_batches(frozen, loader):
        parts.append(part if dist.world_size() > 1 else tuple(x.cpu() for x in part))
        done += len(part[1])
        if progress is not None:
            progress(done)
    if not parts:  # more ranks than images
        raise ValueError(f"{len(loader.files)} images cannot be shared out among {dist.world_size()} processes")
    features, index, label = (torch.cat([p[i] for p in parts]) for i in range(3))
    return _gather_in_file_order(features, index, label, len(loader.files))


def frozen_copy(backbone: nn.Module, device: torch.device | str) -> nn.Module:
    """A copy in eval mode on a device, with rank 0's buffers on every rank."""
    frozen = copy.deepcopy(backbone).to(device).eval().requires_grad_(False)
    for buffer in frozen.buffers():
        buffer.copy_(dist.broadcast(buffer))
    return frozen


@torch.inference_mode()
def feature_batches(backbone: nn.Module, loader: ViewLoader) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(features, index, label) of each batch of a loader of single views, on its device."""
    for batch in loader:
        ((view,),) = batch.views.values()
        yield backbone(view), batch.index, batch.label


def _gather_in_file_order(features: Tensor, index: Tensor, label: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Shares differ in length by at most one batch: pad to the longest, gather, and put rows in their places."""
    count = dist.gather(torch.tensor([len(index)], device=index.device)).tolist()
    longest = max(count)
    pieces = [dist.gather(_padded(x, longest - len(index))).cpu() for x in (features, index, label)]
    real = torch.cat([torch.arange(longest) < c for c in count])
    features, index, label = (piece[real] for piece in pieces)
    out = torch.full((total, features.shape[1]), torch.nan, dtype=features.dtype)
    labels = torch.full((total,), -1, dtype=torch.int64)
    out[index], labels[index] = features, label
    return out, labels


def _padded(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x, x.new_zeros((rows, *x.shape[1:]))]) if rows else x
