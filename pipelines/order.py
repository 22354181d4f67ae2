"""Which images make up which batch. A pure function of (seed, epoch, update): there is no sampler state to save.

The global batch u of an epoch is `permutation[u*G : (u+1)*G]`; micro-batch m of A is every A-th image of it starting
at m, and rank r of W takes every W-th image of that. So the images of a micro-batch are the same for every number
of ranks, and image i of a global batch belongs to split-BN group `i mod n` on whichever rank it lands.
"""

from __future__ import annotations

import numpy as np

from pipelines.draw import counter_hash
from pipelines.errors import ConfigError

_PERMUTATION = 0x7065726D  # keeps the order's numbers apart from the views' numbers


def permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The order of one epoch, int64 (num_samples,): sample ids sorted by a hash of (seed, epoch, id)."""
    ids = np.arange(num_samples, dtype=np.uint64)
    return np.argsort(counter_hash(seed, epoch, _PERMUTATION, ids), kind="stable")


def local_positions(num_images: int, *, micro: int, num_micro: int, rank: int, world_size: int) -> np.ndarray:
    """Places in a global batch of `num_images` that rank and micro-batch own, int64, ascending."""
    return np.arange(num_images, dtype=np.int64)[micro::num_micro][rank::world_size]


def batch_sizes(
    num_samples: int, global_batch: int, *, drop_last: bool, shares: int, least_share: int = 2
) -> list[int]:
    """Number of images of each global batch of an epoch.

    `shares` is ranks x micro-batches. A last batch that leaves a share with fewer than `least_share` images is
    dropped even without `drop_last`: batch statistics of one image are not statistics. Feature extraction, which
    takes every image, asks for 0.

    Raises:
        ConfigError: `global_batch` does not divide into the shares, leaves too few images for each, or is larger
            than the data set.
    """
    if global_batch % shares or global_batch < shares:
        raise ConfigError(
            f"the global batch of {global_batch} images does not divide into {shares} equal parts "
            f"(processes x accumulation); choose a multiple of {shares}"
        )
    if global_batch // shares < least_share:
        raise ConfigError(
            f"the global batch of {global_batch} images in {shares} parts (processes x accumulation) leaves "
            f"{global_batch // shares} for each, and batch statistics and pairs need {least_share}; "
            f"choose at least {least_share * shares}"
        )
    if num_samples < global_batch:
        raise ConfigError(
            f"the global batch of {global_batch} images is larger than the data set, which has {num_samples}; "
            f"set train.batch_size to at most {num_samples}"
        )
    sizes = [global_batch] * (num_samples // global_batch)
    rest = num_samples % global_batch
    if not drop_last and rest >= max(least_share * shares, 1):
        sizes.append(rest)
    return sizes
