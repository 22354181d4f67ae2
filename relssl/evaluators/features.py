"""What the evaluators share: checks of feature matrices and labels, and ranking rows by similarity in blocks.

Legend: n queries, N keys, D feature width, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.errors import ConfigError, InputError
from relssl.ops.precision import full_precision

QUERY_BLOCK = 512
KEY_BLOCK = 16_384  # 512 x 16,384 similarities are 32 MiB in float32
ROW_BLOCK = 65_536


def check_features(features: Tensor, name: str, *, allow_zero: bool = False) -> Tensor:
    """A (rows, D) matrix of finite numbers, in float32 (float64 stays float64).

    Raises:
        InputError: not a matrix, no rows, not floating point, NaN or infinite entries, or zero throughout
            (unless `allow_zero`).
    """
    if features.ndim != 2 or features.shape[0] == 0 or features.shape[1] == 0:
        raise InputError(
            f"{name}: expected a matrix (images, features) with at least one row and one column, "
            f"got shape {tuple(features.shape)}"
        )
    if not features.is_floating_point():
        raise InputError(f"{name}: expected floating-point features, got {features.dtype}")
    features = features.detach()
    if features.dtype != torch.float64:
        features = features.float()
    any_signal = allow_zero
    for start in range(0, len(features), ROW_BLOCK):  # in blocks: a mask of the whole matrix may be gigabytes
        block = features[start : start + ROW_BLOCK]
        bad = ~torch.isfinite(block).all(dim=1)
        if bad.any():
            first = start + int(bad.nonzero()[0])
            raise InputError(
                f"{name}: row {first} holds NaN or infinite values. The weights have probably diverged: "
                f"look at the loss of the run, or evaluate an earlier checkpoint"
            )
        any_signal = any_signal or bool(block.any())
    if not any_signal:
        raise InputError(
            f"{name}: every feature of every image is zero, so there is nothing to compare. "
            f"The backbone has collapsed or its weights were not loaded"
        )
    return features


def check_labels(labels: Tensor, num_rows: int, num_classes: int | None, name: str) -> Tensor:
    """Labels as int64 (rows,), each in [0, num_classes).

    Raises:
        InputError: wrong length, missing labels (-1), or a label that `num_classes` does not know.
    """
    if labels.shape != (num_rows,):
        raise InputError(
            f"{name}: expected {num_rows} labels, one per row of features, got shape {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"{name}: expected integer labels, got {labels.dtype}")
    labels = labels.long()
    missing = int((labels < 0).sum())
    if missing:
        raise no_label(name, missing, num_rows)
    if num_classes is not None and int(labels.max()) >= num_classes:
        raise InputError(
            f"{name}: label {int(labels.max())} found, but there are only {num_classes} classes "
            f"(labels 0 to {num_classes - 1}). Were train and test made with the same list of classes?"
        )
    return labels


def no_label(name: str, missing: int, count: int) -> InputError:
    """What to tell of images without labels where every image needs one."""
    return InputError(
        f"{name}: {missing} of {count} images have no label (label -1), and this evaluation compares labels: every "
        "image needs one. Convert a labelled source (one folder per class), or take the measures that do without, "
        "`relssl eval analyse`"
    )


def check_same_width(train: Tensor, test: Tensor) -> None:
    """Raises InputError unless both matrices have the same number of columns."""
    if train.shape[1] != test.shape[1]:
        raise InputError(
            f"train features are {train.shape[1]} wide and test features {test.shape[1]}: both must come "
            f"from the same backbone"
        )


def standardisation(blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and 1/std of every feature over all rows of some (rows, D) blocks: (D,) each, float64, on the CPU.

    A feature that is the same for all images carries nothing and gets scale 1, so that rounding noise is not
    blown up.
    """
    count = 0
    total = squares = torch.zeros((), dtype=torch.float64)
    for part in blocks:
        block = part.to("cpu", torch.float64)
        count += len(block)
        total = total + block.sum(dim=0)
        squares = squares + block.square().sum(dim=0)
    centre = total / count
    std = (squares / count - centre.square()).clamp(min=0).sqrt()
    varies = std > 1e-6 * squares.div(count).sqrt().clamp(min=1e-30)
    return centre, torch.where(varies, 1 / std, torch.ones_like(std))


def normalise(features: Tensor) -> Tensor:
    """Rows scaled to length one; a row of zeros stays zero and is then equally far from everything."""
    return F.normalize(features, dim=1)


def check_k(k: int, available: int) -> None:
    """Raises ConfigError unless k neighbours can be found among the available images."""
    if not 1 <= k <= available:
        raise ConfigError(
            f"k = {k} neighbours asked for, but it must be between 1 and the number of images to choose "
            f"from, {available}. Choose a smaller k or a larger data set"
        )


def top_neighbours(queries: Tensor, keys: Tensor, *, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k rows of `keys` with the largest inner product with each row of `queries`, best first.

    Never holds more than QUERY_BLOCK x KEY_BLOCK similarities. Repeatable on one machine; which of several
    keys with exactly equal similarity is taken is not specified.

    Args:
        queries: (n, D).
        keys: (N, D), same dtype and device.
        k: at most N (N - 1 with `exclude`).
        exclude: (n,) int64, for each query one key that may not be chosen (itself, say).

    Returns:
        similarities (n, k) and indices into `keys` (n, k) int64.

    Raises:
        ConfigError: k is not between 1 and the number of keys that may be chosen.
    """
    check_k(k, len(keys) - (exclude is not None))
    parts = []
    with full_precision(queries.device):
        for start in range(0, len(queries), QUERY_BLOCK):
            stop = start + QUERY_BLOCK
            own = None if exclude is None else exclude[start:stop]
            parts.append(_top_of_block(queries[start:stop], keys, k, own))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _top_of_block(queries: Tensor, keys: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
    best = queries.new_empty((len(queries), 0))
    best_index = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
    for offset in range(0, len(keys), KEY_BLOCK):
        similarity = queries @ keys[offset : offset + KEY_BLOCK].T
        if exclude is not None:
            rows = ((exclude >= offset) & (exclude < offset + similarity.shape[1])).nonzero().squeeze(1)
            similarity[rows, exclude[rows] - offset] = -torch.inf
        block, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
        best = torch.cat([best, block], dim=1)
        best_index = torch.cat([best_index, index + offset], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        best_index = best_index.gather(1, order)
    return best, best_index


def summarise(values: Sequence[float | None]) -> dict[str, Any] | None:
    """An accuracy as results.json holds it: mean, sample standard deviation (0 for one value), values.

    None where a value is None: top-5 does not exist with fewer than five classes.
    """
    numbers = [float(value) for value in values if value is not None]
    if not numbers or len(numbers) != len(values):
        return None
    return {"mean": mean(numbers), "std": stdev(numbers) if len(numbers) > 1 else 0.0, "values": numbers}
