"""The pairs of relational reasoning (Patacchiola & Storkey, NeurIPS 2020): who meets whom, and sums over them.

Legend: K views of N images, P = K (K-1) / 2 view pairs, R = 2 P N rows, C view pairs of one tile, H features.

View pairs (i, j), i < j, are numbered p = 0 .. P-1 in lexicographic order.  Each makes two blocks of N rows:

    positive   image n of view i  with  image n of view j
    negative   image n of view i  with  image (n - s_p) mod N of view j,      s_p = 1 + p mod (N - 1)

The shift s starts at 1 in every batch, grows by one from view pair to view pair and is back at 1 where it would
reach N, so no negative meets itself.  Row (k, n) is a left element 2 (K-1-k) times and a right one 2 k times.

Two things are done with the pairs here, neither of which makes an (R, H) array: tiles of whole view pairs, for
what has to look at every pair (`pair_tiles`), and sums of every row's partners in O(K N H) (`sum_of_rights`,
`sum_of_lefts`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of a tile: on a CPU the tile should stay in the L2 cache, on a GPU larger tiles mean fewer launches.
_CPU_ROWS, _GPU_ROWS = 1024, 65536
# At least this many tiles where there are as many view pairs, so that a tile stays far below all pairs.
_MIN_TILES = 8


@dataclass(frozen=True)
class PairTile:
    """The blocks of C consecutive view pairs; `x` is one row per view and image, (K, N, ...)."""

    left_view: Tensor  # (C,)
    right_view: Tensor  # (C,)
    left_image: Tensor  # (C, N): whom right image m met as a negative
    right_image: Tensor  # (C, N): whom left image n meets as a negative

    def lefts(self, x: Tensor) -> Tensor:
        """(C, N, ...): the left elements, the same for both blocks."""
        return x.index_select(0, self.left_view)

    def rights(self, x: Tensor) -> Tensor:
        """(2, C, N, ...): the right elements of the positive blocks, then of the negative ones."""
        views, images = x.shape[:2]
        out = x.new_empty((2, *self.right_image.shape, *x.shape[2:]))
        torch.index_select(x, 0, self.right_view, out=out[0])
        rows = (self.right_image + images * self.right_view[:, None]).flatten()
        torch.index_select(x.reshape(views * images, *x.shape[2:]), 0, rows, out=out[1].flatten(0, 1))
        return out

    def add_to_lefts(self, total: Tensor, rows: Tensor) -> None:
        """Add rows (2, C, N, ...) to their left elements in `total` (K, N, ...)."""
        total.index_add_(0, self.left_view, rows[0])
        total.index_add_(0, self.left_view, rows[1])

    def add_to_rights(self, total: Tensor, rows: Tensor) -> None:
        """Add rows (2, C, N, ...) to their right elements in `total` (K, N, ...)."""
        pairs, images = self.left_image.shape
        places = self.left_image + images * torch.arange(pairs, device=rows.device)[:, None]
        unrolled = rows[1].flatten(0, 1).index_select(0, places.flatten())
        total.index_add_(0, self.right_view, rows[0])
        total.index_add_(0, self.right_view, unrolled.view_as(rows[1]))


def pair_tiles(views: int, images: int, *, chunk: int, device: torch.device) -> Iterator[PairTile]:
    """All view pairs in order, `chunk` at a time; K >= 2, N >= 2."""
    left_view, right_view = torch.triu_indices(views, views, 1, device=device)
    shift = 1 + torch.arange(len(left_view), device=device) % (images - 1)
    image = torch.arange(images, device=device)
    for left, right, s in zip(left_view.split(chunk), right_view.split(chunk), shift.split(chunk), strict=True):
        yield PairTile(left, right, (image + s[:, None]) % images, (image - s[:, None]) % images)


def default_chunk(views: int, images: int, device: torch.device) -> int:
    """View pairs per tile: an eighth of them, at most what suits the device."""
    num_pairs = views * (views - 1) // 2
    most_rows = _CPU_ROWS if device.type == "cpu" else _GPU_ROWS
    return max(1, min(-(-num_pairs // _MIN_TILES), most_rows // (2 * images)))


def multiplicities(views: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """How often a row of view k is a left and a right element: 2 (K-1-k) and 2 k, each (K, 1, 1)."""
    right = 2 * torch.arange(views, device=like.device, dtype=like.dtype).view(-1, 1, 1)
    return 2 * (views - 1) - right, right


def sum_of_rights(x: Tensor) -> Tensor:
    """For every row as a left element, the sum of the right elements it meets; (K, N, H) -> (K, N, H).

    The positives are a sum over later views.  The negatives of view i are those views, each rolled by its s.
    Where s grows by one with j, from j = a to b - 1, rolling view j by j beforehand leaves one common roll,
    by s_a - a, of a difference of two prefix sums.  Such runs end with the views or where s falls back to 1.
    """
    views, images, _ = x.shape
    out = x.sum(0) - x.cumsum(0)
    sums = x.new_zeros((views + 1, *x.shape[1:]))
    torch.cumsum(_roll_each(x, 1), 0, out=sums[1:])
    image = torch.arange(images, device=x.device)
    for view, first, end, roll in _run_tiles(views, images, x.device):
        rows = (image - roll[:, None]) % images
        out.index_add_(0, view, sums[end[:, None], rows].sub_(sums[first[:, None], rows]))
    return out


def sum_of_lefts(x: Tensor) -> Tensor:
    """For every row as a right element, the sum of the left elements it meets: the transpose of
    `sum_of_rights`."""
    views, images, _ = x.shape
    steps = x.new_zeros((views + 1, *x.shape[1:]))
    image = torch.arange(images, device=x.device)
    for view, first, end, roll in _run_tiles(views, images, x.device):
        rows = x[view[:, None], (image + roll[:, None]) % images]
        steps.index_add_(0, first, rows).index_add_(0, end, rows, alpha=-1)
    return _roll_each(steps[:views].cumsum(0), -1).add_(x.cumsum(0)).sub_(x)


def _roll_each(x_KNH: Tensor, sign: int) -> Tensor:
    """View k rolled by sign * k images: row n goes to n + sign * k."""
    views, images, _ = x_KNH.shape
    view = torch.arange(views, device=x_KNH.device)[:, None]
    return x_KNH[view, (torch.arange(images, device=x_KNH.device) - sign * view) % images]


def _run_tiles(views: int, images: int, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """The runs as (view i, first j, end j, common roll), at most K at a time: never more rows than K N."""
    runs = torch.tensor(_runs(views, images), device=device)
    for tile in runs.split(views, dim=1):
        yield tuple(tile)


@functools.lru_cache(maxsize=16)
def _runs(views: int, images: int) -> list[tuple[int, ...]]:
    """K=32, N=64: 37 runs instead of 496 view pairs."""
    runs, pair = [], 0
    for i in range(views - 1):
        j = i + 1
        while j < views:
            place = pair % (images - 1)
            length = min(views - j, images - 1 - place)
            runs.append((i, j, j + length, 1 + place - j))
            j, pair = j + length, pair + length
    return list(zip(*runs, strict=True))
