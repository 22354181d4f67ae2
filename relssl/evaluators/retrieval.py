"""Image retrieval: are the images nearest to a query of its class? Mean average precision and recall@k.

Cosine similarity ranks the whole gallery for each query; an image is relevant when it has the query's class.

- Average precision: the mean, over the relevant images, of the share of relevant ones among those ranked at least as
  high (as in scikit-learn: images of equal similarity count together, so the order of a file plays no part). mAP is
  its mean over queries.
- Recall@k: the share of queries with a relevant image among the k nearest, as in metric learning. An irrelevant
  image of the same similarity counts as nearer.

Legend: n queries, N gallery images, D feature width, R relevant images of a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from pipelines.errors import InputError
from relssl.evaluators.features import check_features, check_k, check_labels, check_same_width, normalise
from relssl.ops.precision import full_precision

TILE = 2**25  # similarities that exist at once: 128 MiB in float32
_SHOWN = 5


class RetrievalScores(TypedDict):
    """In percent; `recall` holds one value for each k."""

    map: float
    recall: dict[int, float]


@torch.no_grad()
def retrieval_scores(
    query_x: Tensor,
    query_y: Tensor,
    gallery_x: Tensor | None = None,
    gallery_y: Tensor | None = None,
    *,
    k: Sequence[int] = (1, 5, 10),
    class_names: Sequence[str] | None = None,
) -> RetrievalScores:
    """mAP and recall@k of queries in a gallery, in percent.

    The n x N similarities exist a tile at a time. float32 (float64 if given float64); averages in float64.

    Args:
        query_x, query_y: (n, D) features and (n,) labels. Rows are normalised here.
        gallery_x, gallery_y: (N, D) and (N,), on the same device; without them each query is looked up among the
            others.
        k: each at most N (n - 1 without a gallery).
        class_names: for messages.

    Raises:
        ConfigError: a k out of range.
        InputError: labels missing, NaN or all-zero features, different widths, or queries with no relevant image: a
            class that the gallery lacks, or without a gallery a class of one image.
    """
    alone = gallery_x is None or gallery_y is None
    query_x = check_features(query_x, "query features")
    query_y = check_labels(query_y, len(query_x), None, "query labels").to(query_x.device)
    if gallery_x is None or gallery_y is None:
        gallery_x, gallery_y = query_x, query_y
    else:
        gallery_x = check_features(gallery_x, "gallery features").to(query_x)
        gallery_y = check_labels(gallery_y, len(gallery_x), None, "gallery labels").to(query_x.device)
        check_same_width(gallery_x, query_x)
    for each in k:
        check_k(each, len(gallery_x) - alone)
    check_relevant(query_y, gallery_y, alone, class_names)
    queries, keys = normalise(query_x), normalise(gallery_x)
    precision = 0.0
    hits = dict.fromkeys(k, 0)
    with full_precision(queries.device):
        for label in query_y.unique().tolist():
            relevant = (gallery_y == label).nonzero().squeeze(1)
            for rows in (query_y == label).nonzero().squeeze(1).split(max(1, TILE // len(keys))):
                average, rank = _score_tile(queries[rows] @ keys.T, relevant, rows if alone else None)
                precision += float(average.sum())
                for each in k:
                    hits[each] += int((rank <= each).sum())
    return {
        "map": 100.0 * precision / len(queries),
        "recall": {each: 100.0 * count / len(queries) for each, count in hits.items()},
    }


def _score_tile(similarity: Tensor, relevant: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Average precision (b,) float64 and the rank of the first relevant image (b,), of queries of one class.

    Args:
        similarity: (b, N) to the whole gallery; is overwritten.
        relevant: (R,) columns.
        own: (b,) each query's own column, which does not count.
    """
    if own is not None:
        similarity.scatter_(1, own[:, None], -torch.inf)
    wanted = similarity[:, relevant].sort(dim=1).values
    if own is not None:
        wanted = wanted[:, 1:]
    wanted = wanted.contiguous()
    everything = _sorted_rows(similarity)
    # How many, of all and of the relevant ones, are at least as near as each relevant image.
    of_all = everything.shape[1] - torch.searchsorted(everything, wanted)
    of_relevant = wanted.shape[1] - torch.searchsorted(wanted, wanted)
    average = (of_relevant.double() / of_all).mean(dim=1)
    return average, 1 + of_all[:, -1] - of_relevant[:, -1]


def _sorted_rows(x: Tensor) -> Tensor:
    """Each row of (b, N) in increasing order. NumPy sorts numbers alone, several times faster than torch on a CPU."""
    if x.device.type == "cpu":
        x.numpy().sort(axis=1)
        return x
    return x.sort(dim=1).values


def check_relevant(query_y: Tensor, gallery_y: Tensor, alone: bool, class_names: Sequence[str] | None) -> None:
    """Raises InputError unless there is an image to find for every query; `alone`: among the other queries."""
    size = int(max(query_y.max(), gallery_y.max())) + 1
    in_gallery, asked = gallery_y.bincount(minlength=size), query_y.bincount(minlength=size)
    without = ((asked > 0) & (in_gallery < 1 + alone)).nonzero().squeeze(1).tolist()
    if not without:
        return
    names = [class_names[c] if class_names is not None and c < len(class_names) else str(c) for c in without]
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    if alone:
        raise InputError(
            f"{len(without)} classes have a single image, which has no other of its class to find: {shown}. "
            "Look queries up in a gallery, or leave these classes out"
        )
    raise InputError(
        f"{len(without)} classes of the queries have no image in the gallery, so there is nothing to find: {shown}"
    )
