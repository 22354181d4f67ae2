"""Image retrieval by a backbone's features: mAP, recall@k, and a sheet of queries with what is nearest to them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.errors import ConfigError
from relssl import dist
from relssl.evaluate.task import ALL, Portion, Task
from relssl.evaluate.weights import Weights
from relssl.evaluators.features import check_k, normalise, summarise, top_neighbours
from relssl.evaluators.retrieval import RetrievalScores, check_relevant, retrieval_scores
from relssl.pictures import check_place, neighbour_sheet, save_picture

log = logging.getLogger("relssl.evaluate")

DEFAULT_K = (1, 5, 10)
_NEIGHBOURS = 8


def evaluate_retrieval(
    weights: Weights,
    train: Path | None = None,
    test: Path | None = None,
    *,
    k: Sequence[int] = DEFAULT_K,
    within: bool = False,
    portion: Portion = ALL,
    sheet: Path | None = None,
    num_queries: int = 10,
    device: str = "auto",
    command: str = "",
) -> dict[str, Any]:
    """The test images as queries, the training images as the gallery; adds an entry to results.json.

    Args:
        k: of recall@k.
        within: no gallery: each test image is looked up among the other test images.
        sheet: where to draw some queries with their neighbours; beside the weights when None: `retrieval.png` for the
            recipe's own data, else a name that tells what differs.
        num_queries: how many, evenly spaced over the test images; 0 draws none.
    """
    if within and (train is not None or not portion.is_all):
        raise ConfigError("--within looks test images up among themselves; leave --train, --percent and --subset out")
    if num_queries and sheet is not None:
        check_place(sheet)
    with Task(weights, train, test, device, portion=portion, trains=not within) as task:
        where = "test" if within else "train"
        place = sheet or weights.folder / f"{task.name_for('retrieval', 'within' if within else '')}.png"
        _check(task, where, k)
        (query_x, query_y), (gallery_x, gallery_y) = task.features("test"), task.features(where)
        query_x, gallery_x = query_x.to(task.device), gallery_x.to(task.device)
        log.info("ranking %d images for each of %d queries", len(gallery_x) - within, len(query_x))
        gallery = {} if within else {"gallery_x": gallery_x, "gallery_y": gallery_y}
        found = retrieval_scores(query_x, query_y, **gallery, k=k, class_names=task.sets["test"].classes)
        extra: dict[str, Any] = {"scores": as_scores(found)}
        if num_queries:
            if dist.rank() == 0:
                _draw(task, query_x, gallery_x, within, found, place, num_queries)
            extra["picture"] = str(place)
        protocol = {"name": f"among the {'test' if within else 'training'} images", "k": list(k)}
        return task.write("retrieval", [], [], protocol, [], command, extra)


def _check(task: Task, where: str, k: Sequence[int]) -> None:
    """What would be refused later, before the features are computed."""
    within = where == "test"
    for each in k:
        check_k(each, len(task.sets[where]) - within)
    asked, there = (torch.from_numpy(task.sets[name].labels) for name in ("test", where))
    check_relevant(asked, there, within, task.sets["test"].classes)


def as_scores(found: RetrievalScores) -> dict[str, Any]:
    """As results.json holds them: `mAP`, `R@1`, ..."""
    recall = {f"R@{k}": summarise([value]) for k, value in found["recall"].items()}
    return {"mAP": summarise([found["map"]]), **recall}


def _draw(
    task: Task, query_x: Tensor, gallery_x: Tensor, within: bool, found: RetrievalScores, out: Path, most: int
) -> None:
    queries = task.sets["test"]
    gallery = task.sets["test" if within else "train"]
    count = min(most, len(queries))
    chosen = torch.arange(count, device=query_x.device) * len(queries) // count
    similarity, index = top_neighbours(
        normalise(query_x[chosen]),
        normalise(gallery_x),
        k=min(_NEIGHBOURS, len(gallery_x) - within),
        exclude=chosen if within else None,
    )
    names = task.sets["test"].classes
    told = (lambda label: str(names[label])) if names else str
    picture = neighbour_sheet(
        [
            (queries.decode(q), [gallery.decode(i) for i in row])
            for q, row in zip(chosen.tolist(), index.tolist(), strict=True)
        ],
        query_labels=[told(queries.labels[q]) for q in chosen.tolist()],
        neighbour_labels=[[told(gallery.labels[i]) for i in row] for row in index.tolist()],
        similarities=similarity.tolist(),
        title=f"Retrieval: mAP {found['map']:.1f} %, "
        + ", ".join(f"R@{k} {v:.1f} %" for k, v in found["recall"].items()),
    )
    save_picture(picture, out)
