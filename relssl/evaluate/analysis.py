"""What the features of a backbone look like: numbers that need no labels, and what a linear classifier confuses.

Numbers go into results.json, pictures and tables into the folder `analysis` of the run (`analysis-random` for its
initial weights, a name that tells what differs for other data); `relssl report` shows both.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import ConfigError
from pipelines.subset import spread, spread_rows
from relssl.charts import standalone
from relssl.class_charts import confusion_chart, map_chart
from relssl.encode import feature_loader
from relssl.evaluate.few_labels import SEEDS, few_labels_of
from relssl.evaluate.probe import picked
from relssl.evaluate.task import Task
from relssl.evaluate.weights import Weights
from relssl.evaluators.confusion import confusion_matrix, most_confused, per_class
from relssl.evaluators.embedding import LEAST_IMAGES, MapKind, choose_map, feature_map
from relssl.evaluators.features import normalise, top_neighbours
from relssl.evaluators.label_free import alignment, rankme, uniformity
from relssl.evaluators.probe import FEATURES, fast_probe, probe_protocol
from relssl.pictures import neighbour_sheet, save_picture
from relssl.runfolder import write_atomically

log = logging.getLogger("relssl.evaluate")

RANKME_IMAGES = 25_600  # as in its paper
PAIRS = 2_048  # images for uniformity, whose cost grows with the square, and for alignment
QUERIES, NEIGHBOURS = 10, 7
MOST_CONFUSED = 10
# Two views of an image for alignment: the same for every method, so that figures can be compared.
PAIR = {"name": "pair", "count": 2, "box": {"random_resized": {"scale": [0.2, 1.0]}}, "flip": 0.5}


def analyse(
    weights: Weights,
    train: Path | None = None,
    test: Path | None = None,
    *,
    map_kind: MapKind | None = "auto",
    map_images: int = 2_000,
    seed: int = 0,
    label_seeds: Sequence[int] = SEEDS,
    device: str = "auto",
    command: str = "",
) -> dict[str, Any]:
    """Everything that can be said about the features; adds entries to results.json and returns that of the analysis.

    With labels for train and test, as far as there are enough of them: the fast probe's confusion matrix and per-class
    figures, and the few-label curve, which is an entry of its own. With or without labels: RankMe, uniformity,
    alignment, a map, nearest neighbours.

    Args:
        map_kind: see `feature_map`; None draws no map.
        map_images: images on the map, at most.
        seed: of the map and the probe.
        label_seeds: draws of the few-label curve; none leaves the curve out.

    Raises:
        InputError: NaN features, or features that are zero throughout.
    """
    if map_images < LEAST_IMAGES:
        raise ConfigError(f"a map needs at least {LEAST_IMAGES} images, got {map_images}")
    chosen_map = None if map_kind is None else choose_map(map_kind)
    start = perf_counter()
    with Task(weights, train, test, device, needs_labels=False) as task:
        folder = weights.folder / task.name_for("analysis")
        folder.mkdir(exist_ok=True)
        found: dict[str, Any] = {"label_free": _label_free(task), "files": {}}
        one_class, all_single = _too_few(task)
        if not task.labelled:
            log.info("no labels for train and test: no confusion matrix and no few-label curve")
        elif one_class:
            log.info("all training images have the same label: no confusion matrix and no few-label curve")
        else:
            if all_single:
                log.info("every class has a single training image, so nothing can be held out: no confusion matrix")
            else:
                found |= _classes(task, folder, seed, found["files"])
            if label_seeds:
                few_labels_of(task, None, label_seeds, command)
        if chosen_map is not None:
            _draw_map(task, folder, chosen_map, map_images, seed, found["files"])
        found["neighbours"] = _draw_neighbours(task, folder, found["files"])
        found["seconds"] = round(perf_counter() - start, 2)
        protocol = {
            "name": "analysis",
            "rankme_images": RANKME_IMAGES,
            "pairs": PAIRS,
            "pair_of_views": {key: PAIR[key] for key in ("box", "flip")},
        }
        return task.write("analysis", [], [], protocol, [seed], command, found)


def _too_few(task: Task) -> tuple[bool, bool]:
    """Whether the labelled training images are of one class, and whether each is alone in its class."""
    if not task.labelled:
        return False, False
    counts = np.unique(task.sets["train"].labels, return_counts=True)[1]
    return len(counts) < 2, bool((counts < 2).all())


def _label_free(task: Task) -> dict[str, Any]:
    """RankMe, uniformity and alignment of the training images, and of how many."""
    features = task.features("train")[0]
    ranked, paired = (features[spread_rows(len(features), most)] for most in (RANKME_IMAGES, PAIRS))
    first, second = _two_views(task)
    return {
        "rankme": rankme(ranked),
        "uniformity": uniformity(paired),
        "alignment": alignment(first, second),
        "features": features.shape[1],
        "rankme_images": len(ranked),
        "pairs": len(paired),
    }


@torch.no_grad()
def _two_views(task: Task) -> tuple[Tensor, Tensor]:
    """Features of two random views of PAIRS training images."""
    recipe = task.weights.recipe
    backbone = task.backbone.float()
    with closing(
        feature_loader(
            spread(task.sets["train"], PAIRS),
            recipe.views.spec({**PAIR, "size": recipe.eval_spec().size}),
            batch_size=recipe.eval.batch_size,
            device=task.device,
            engine=recipe.data.engine,
            resize=recipe.data.resize,
            workers=recipe.data.workers,
        )
    ) as loader:
        loader.set_position(0, 0)
        parts = [[backbone(view).float().cpu() for view in batch.views["pair"]] for batch in loader]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _classes(task: Task, folder: Path, seed: int, files: dict[str, str]) -> dict[str, Any]:
    """The fast probe on the test images: which classes it knows, and what it takes them for."""
    (train_x, train_y), (test_x, test_y) = task.features("train"), task.features("test")
    protocol = probe_protocol()
    log.info("fast probe for the confusion matrix")
    result = fast_probe(
        {FEATURES: train_x},
        train_y,
        {FEATURES: test_x},
        test_y,
        num_classes=task.num_classes,
        protocol=protocol,
        seed=seed,
        device=task.device,
    )
    counts = confusion_matrix(test_y, result.predicted, task.num_classes)
    names = _class_names(task)
    write_atomically(folder / "confusion.json", json.dumps({"classes": names, "counts": counts.tolist()}))
    files["confusion"] = _place(folder / "confusion.json")
    picture = confusion_chart(counts.tolist(), names)
    if picture:
        write_atomically(folder / "confusion.svg", standalone(picture))
    return {
        "classifier": {
            "protocol": protocol.model_dump(mode="json"),
            "top1": result.top1,
            "top5": result.top5,
            "picked": {key: value for key, value in picked(result).items() if key != "grid"},
        },
        "per_class": [{"class": name, **row} for name, row in zip(names, per_class(counts), strict=True)],
        "most_confused": [
            {"class": names[i], "taken_for": names[j], "images": count, "of": int(counts[i].sum())}
            for i, j, count in most_confused(counts, MOST_CONFUSED)
        ],
    }


def _draw_map(task: Task, folder: Path, kind: MapKind, most: int, seed: int, files: dict[str, str]) -> None:
    """The features of test images (training images where there are none) in two dimensions."""
    which = "test" if "test" in task.sets else "train"
    features, labels = task.features(which)
    rows = torch.from_numpy(spread_rows(len(features), most))
    if len(rows) < LEAST_IMAGES:
        log.info("no map: %d images are fewer than %d", len(rows), LEAST_IMAGES)
        return
    log.info("map of %d %s images by %s", len(rows), which, kind)
    places = feature_map(features[rows], kind, seed)
    known = bool((labels[rows] >= 0).all())
    names = _class_names(task) if known and task.labelled else None
    content: dict[str, Any] = {
        "kind": kind,
        "seed": seed,
        "images": which,
        "classes": names,
        "row": rows.tolist(),
        "label": labels[rows].tolist() if names else None,
        "x": [round(x, 4) for x in places[:, 0].tolist()],
        "y": [round(y, 4) for y in places[:, 1].tolist()],
    }
    write_atomically(folder / "map.json", json.dumps(content))
    write_atomically(folder / "map.svg", standalone(map_chart(content["x"], content["y"], content["label"], names)))
    files["map"] = _place(folder / "map.json")


def _draw_neighbours(task: Task, folder: Path, files: dict[str, str]) -> dict[str, Any] | None:
    """Test images with the training images nearest to them; training images alone where there is no test set.

    Returns what the sheet shows, None where there are too few images for one.
    """
    keys = task.features("train")[0]
    which = "test" if "test" in task.sets else "train"
    features, labels = task.features(which)
    asked, kept = task.sets[which], task.sets["train"]
    queries = _query_rows(labels, QUERIES)
    is_itself_there = which == "train" or (asked.content_hash is not None and asked.content_hash == kept.content_hash)
    k = min(NEIGHBOURS, len(keys) - is_itself_there)
    if k < 1:
        return None
    exclude = queries if is_itself_there else None
    similarity, index = top_neighbours(normalise(features[queries]), normalise(keys), k=k, exclude=exclude)
    rows = [
        (asked.decode(query), [kept.decode(i) for i in found])
        for query, found in zip(queries.tolist(), index.tolist(), strict=True)
    ]
    told: dict[str, Any] = {}
    if task.labelled:
        names = _class_names(task)
        told["query_labels"] = [names[labels[q]] for q in queries.tolist()]
        told["neighbour_labels"] = [[names[kept.labels[i]] for i in found] for found in index.tolist()]
    picture = neighbour_sheet(rows, similarities=similarity.tolist(), title=None, **told)
    save_picture(picture, folder / "neighbours.png")
    files["neighbours"] = _place(folder / "neighbours.png")
    return {"queries": which, "labelled": task.labelled}


def _query_rows(labels: Tensor, most: int) -> Tensor:
    """Evenly spaced images; where there are labels, evenly spaced over the classes."""
    order = labels.argsort(stable=True)
    steps = torch.arange(min(most, len(labels)))
    return order[(2 * steps + 1) * len(labels) // (2 * len(steps))]


def _class_names(task: Task) -> list[str]:
    given = list(task.sets["train"].classes or task.sets["test"].classes or [])
    return [str(name) for name in given[: task.num_classes]] + [str(i) for i in range(len(given), task.num_classes)]


def _place(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
