"""How good are features when there are no labels? Effective rank, alignment, uniformity, nearest neighbours.

None of these is an accuracy, and a higher value is not always a better backbone; they show collapse early
and let two checkpoints of one run be compared. Legend: N images, D feature width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipelines.errors import ConfigError, InputError
from relssl.evaluators.features import (
    KEY_BLOCK,
    QUERY_BLOCK,
    check_features,
    check_same_width,
    normalise,
    top_neighbours,
)
from relssl.ops.precision import full_precision

ROWS_PER_PRODUCT = 8_192  # features enter the Gram matrix in float64, so only a block of them is ever copied


@torch.no_grad()
def rankme(features: Tensor, *, eps: float = 1e-7) -> float:
    """RankMe, the smooth rank of the feature matrix (Garrido et al., ICML 2023, equation 1).

    exp(- sum_k p_k log p_k) with p_k = sigma_k / sum(sigma) + eps, sigma the singular values of the (N, D)
    matrix as it is: neither centred nor normalised. Between 1 (every image on one line) and min(N, D). The
    paper measures the projector's output on 25,600 images; figures are only comparable at the same N and the
    same layer.

    The singular values come from the smaller Gram matrix, summed in float64 over blocks in a fixed order.

    Raises:
        InputError: fewer than two images, NaN, or features that are zero throughout.
    """
    features = check_features(features, "features")
    if len(features) < 2:
        raise InputError(f"RankMe needs at least two images, got {len(features)}")
    sigma = _singular_values(features)
    p = sigma / sigma.sum() + eps
    return math.exp(-float((p * p.log()).sum()))


def _singular_values(features: Tensor) -> Tensor:
    """Singular values (min(N, D),) in float64, on the CPU: MPS has no float64, one small matrix is quick."""
    wide = features.shape[0] < features.shape[1]
    if wide:
        block = features.to("cpu", torch.float64)
        gram = block @ block.T
    else:
        gram = torch.zeros((features.shape[1], features.shape[1]), dtype=torch.float64)
        for start in range(0, len(features), ROWS_PER_PRODUCT):
            block = features[start : start + ROWS_PER_PRODUCT].to("cpu", torch.float64)
            gram.addmm_(block.T, block)
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()


@torch.no_grad()
def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of positive pairs on the unit sphere (Wang & Isola, ICML 2020, with alpha = 2).

    Between 0 (two views of an image coincide) and 4. Collapsed features reach 0 too: read it beside
    `uniformity`.

    Args:
        first, second: (N, D); row i of both are features of two views of image i. Rows are normalised here.

    Raises:
        InputError: different shapes, NaN, or features that are zero throughout.
    """
    first, second = check_features(first, "features of the first view"), check_features(second, "second view")
    check_same_width(first, second)
    if len(first) != len(second):
        raise InputError(f"alignment compares two views of the same images: got {len(first)} and {len(second)} rows")
    distance = (normalise(first) - normalise(second)).square().sum(dim=1)
    return float(distance.mean())


@torch.no_grad()
def uniformity(features: Tensor, *, t: float = 2.0) -> float:
    """log mean_{i<j} exp(-t |x_i - x_j|^2), the Gaussian potential of all pairs (Wang & Isola, ICML 2020).

    0 where all images have one direction (collapse); more negative is more evenly spread, at least -4 t.
    Rows are normalised here. The cost grows with N^2: a few thousand images are plenty.

    Raises:
        ConfigError: t is not above 0 and at most 20 (exp(-4 t) must stay a normal float32).
        InputError: fewer than two images, NaN, or features that are zero throughout.
    """
    if not 0 < t <= 20:
        raise ConfigError(f"uniformity needs 0 < t <= 20 (2 is usual), got {t}")
    features = normalise(check_features(features, "features"))
    if len(features) < 2:
        raise InputError(f"uniformity needs at least two images, got {len(features)}")
    total = 0.0
    with full_precision(features.device):
        for row in range(0, len(features), QUERY_BLOCK):
            for column in range(row, len(features), KEY_BLOCK):
                total += _potential(features, row, column, t)
    return math.log(total) - math.log(len(features) * (len(features) - 1) / 2)


def _potential(features: Tensor, row: int, column: int, t: float) -> float:
    """Sum over pairs i < j with i in the row block and j in the column block."""
    rows, columns = features[row : row + QUERY_BLOCK], features[column : column + KEY_BLOCK]
    potential = torch.exp((rows @ columns.T - 1) * (2 * t))  # |x - y|^2 = 2 - 2 x.y on the unit sphere
    if column < row + len(rows):
        potential = potential.triu(diagonal=row - column + 1)
    return math.fsum(potential.sum(dim=1).tolist())


@torch.no_grad()
def neighbours_of(features: Tensor, queries: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """The k images nearest to each query by cosine similarity, the query itself left out.

    Args:
        features: (N, D); rows are normalised here.
        queries: (Q,) int64 rows of `features`.
        k: at most N - 1.

    Returns:
        indices (Q, k) int64 and cosine similarities (Q, k), nearest first.

    Raises:
        ConfigError: k out of range, or a query that is not a row.
        InputError: NaN, or features that are zero throughout.
    """
    features = normalise(check_features(features, "features"))
    if queries.ndim != 1 or (len(queries) and not 0 <= int(queries.min()) <= int(queries.max()) < len(features)):
        raise ConfigError(f"queries must be a list of rows between 0 and {len(features) - 1}, got {queries.tolist()}")
    if len(queries) == 0:
        raise ConfigError("no query images were given: choose at least one")
    queries = queries.to(features.device)
    similarity, index = top_neighbours(features[queries], features, k=k, exclude=queries)
    return index, similarity
