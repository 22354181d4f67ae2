"""Every method on CIFAR-10 for the same number of views with the same small backbone: does it learn anything here?

python -m benchmarks.cifar_table [--images FOLDER_OR_ARCHIVE] [--out runs/cifar-table]     (= make cifar-table)

A smoke test, not a ranking: minutes of training, settings that nobody tuned. A cell is a method and a training seed;
its run folder and `cells/<method>-seed<n>.json` lie in --out, so a command that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import relssl  # isort: skip  # before torch is: it says how threads wait for each other  # noqa: F401

from dataset_tools.convert import convert_source
from pipelines import beton
from pipelines.errors import ConfigError, RelsslError
from relssl.cli.base import set_up_log
from relssl.config import Recipe, load_recipe
from relssl.evaluate import evaluate_knn, evaluate_linear, open_weights
from relssl.methods import load_method, method_names
from relssl.progress import duration
from relssl.recipes import recipe_path
from relssl.runfolder import RunFolder, environment, now, write_atomically
from relssl.train import train

log = logging.getLogger("relssl.cifar_table")

FORMAT = 1
RECIPE = "cifar10_cpu"
# Images that go through the encoder for each view of the plan.
ENCODED = {"rotation": 4}
ROOT = Path(__file__).resolve().parents[1]
# Written anew when all methods have been run by their recipes, and by nothing less.
JSON, PAGE = ROOT / "benchmarks/results/cifar_table.json", ROOT / "docs/cifar10.md"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    set_up_log()
    try:
        return make_table(options)
    except RelsslError as error:
        print(f"cifar_table: {error}", file=sys.stderr)
        return error.exit_code


def make_table(options: argparse.Namespace) -> int:
    """Fill the missing cells, write the table; 1 where a trained method is not above random weights."""
    names = options.methods.split(",") if options.methods else method_names()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    options.out.mkdir(parents=True, exist_ok=True)
    data = [_data(options, split) for split in ("train", "test")]
    cells = []
    for seed in seeds:
        for name in names:
            cell = fill_cell(name, seed, data, options.out, options.overrides)
            if cell is None:
                return 130  # stopped by a signal, which the trainer has answered with a checkpoint
            cells.append(cell)
    given = [*(["--images", options.images.name] if options.images else []), *options.overrides]
    command = "make cifar-table" + (f' ARGS="{" ".join(given)}"' if given else "")
    result = {
        "format": FORMAT,
        "benchmark": "cifar_table",
        "command": command,
        "hardware": hardware(),
        "data": source_of(data[0]),
        "date": max(cell["date"] for cell in cells)[:10],
        "cells": [without_places(cell) for cell in cells],
    }
    print(text(result))
    whole = options.methods is None and not options.overrides
    if whole or options.json != JSON:
        write_atomically(options.json, json.dumps(result, indent=1) + "\n")
    if whole or options.markdown != PAGE:
        write_atomically(options.markdown, page(result))
    return 0 if all(is_above(cell, cells) is not False for cell in cells) else 1


def fill_cell(name: str, seed: int, data: Sequence[Path], out: Path, overrides: Sequence[str]) -> dict[str, Any] | None:
    """Train and evaluate one method, or read what an earlier call found; None when a signal stopped it.

    Raises:
        ConfigError: the cell was filled with another recipe.
    """
    recipe = load_recipe(
        recipe_path(f"{name}/{RECIPE}"),
        [f"data.train={data[0]}", f"data.test={data[1]}", f"train.seed={seed}", *overrides],
    )
    file = out / "cells" / f"{name}-seed{seed}.json"
    settings = recipe.model_dump(mode="json", exclude={"about"})  # what is told of a recipe does not change the cell
    if file.is_file():
        cell: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if {key: value for key, value in cell["settings"].items() if key != "about"} != settings:
            raise ConfigError(f"{file} was made with another recipe; delete it and its run, or choose another --out")
        log.info("%s, seed %d: done on %s", name, seed, cell["date"])
        return cell
    run = out / f"{name}-seed{seed}"
    if train(recipe, run, resume=True, command="make cifar-table"):
        return None
    weights = open_weights(run)
    (knn,) = evaluate_knn(weights, command="make cifar-table")
    linear = evaluate_linear(weights, command="make cifar-table")
    cell = {
        "method": name,
        "recipe": f"{name}/{RECIPE}",
        "trains": load_method(name).TRAINS,
        "train_seed": seed,
        "epochs": weights.epochs,
        "views_seen": views_seen(recipe, name) * weights.epochs,
        "train_seconds": train_seconds(RunFolder(run).read_metrics(), recipe),
        "knn": {"k": recipe.eval.knn.k, "top1": knn["top1"]["mean"]},
        "linear": {"protocol": linear["protocol"]["name"], "seeds": linear["seeds"], **linear["top1"]},
        "date": now(),
        "settings": settings,
    }
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, json.dumps(cell, indent=1))
    return cell


def without_places(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell to publish: of the data files their names, not where they lay on the machine that filled it."""
    data = {
        key: Path(value).name if isinstance(value, str) else value for key, value in cell["settings"]["data"].items()
    }
    return {**cell, "settings": {**cell["settings"], "data": data}}


def views_seen(recipe: Recipe, method: str) -> int:
    """Views that are made of the images in an epoch, a teacher's too; each of RotNet's is seen at four rotations."""
    with beton.open(recipe.data.train) as files:
        images = len(files)
    batch = recipe.train.batch_size
    images = images // batch * batch if recipe.train.drop_last else images
    return images * sum(spec.count for spec in recipe.views.specs()[0][1]) * ENCODED.get(method, 1)


def train_seconds(records: Sequence[dict[str, Any]], recipe: Recipe) -> float:
    """Time of the updates, without evaluations: from images per second of each report, so that it holds over stops."""
    seconds, before = 0.0, 0
    for record in records:
        if record["kind"] == "train":
            seconds += (record["update"] - before) * recipe.train.batch_size / record["images_per_second"]
            before = record["update"]
    return seconds


def is_above(cell: dict[str, Any], cells: Sequence[dict[str, Any]]) -> bool | None:
    """Whether a trained method's linear accuracy is above that of random weights by more than two standard
    deviations of the difference of the probes; None for random weights, or without them."""
    base = next((c for c in cells if c["method"] == "random" and c["train_seed"] == cell["train_seed"]), None)
    if base is None or not cell["trains"]:
        return None
    spread = math.hypot(cell["linear"]["std"], base["linear"]["std"])
    return bool(cell["linear"]["mean"] - base["linear"]["mean"] > 2 * spread)


def rows(result: dict[str, Any]) -> list[list[str]]:
    """Header and a row per cell."""
    out = [["method", "seed", "epochs", "views", "training", "views/s", "kNN", "linear", "above random"]]
    for cell in result["cells"]:
        trained, seconds = cell["trains"], cell["train_seconds"]
        linear = cell["linear"]
        above = is_above(cell, result["cells"])
        gain = ""
        if above is not None:
            base = next(c for c in result["cells"] if not c["trains"] and c["train_seed"] == cell["train_seed"])
            gain = f"{linear['mean'] - base['linear']['mean']:+.2f}" + ("" if above else " (NO)")
        out.append(
            [
                cell["method"],
                str(cell["train_seed"]),
                str(cell["epochs"]) if trained else "",
                f"{cell['views_seen']:,}" if trained else "",
                duration(seconds) if trained else "",
                f"{cell['views_seen'] / seconds:,.0f}" if trained else "",
                f"{cell['knn']['top1']:.2f}",
                f"{linear['mean']:.2f} ± {linear['std']:.2f}",
                gain,
            ]
        )
    return out


def text(result: dict[str, Any]) -> str:
    """The table for a terminal."""
    from relssl.report import format_table

    return format_table(rows(result))


def page(result: dict[str, Any]) -> str:
    """docs/cifar10.md."""
    header, *body = rows(result)
    table = "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *body])
    probe = result["cells"][0]["linear"]
    backbone = result["cells"][0]["settings"]["backbone"]["name"]
    return f"""# CIFAR-10 smoke table

**A smoke test, not a ranking**: minutes of training of a very small network ({backbone}), one recipe per method that
nobody tuned, one training seed unless the table says more. It shows that every method learns something in this code
base. Nothing here reproduces a figure of a paper.

```
make cifar-table                                    # converts CIFAR-10 (downloaded), fills the cells, writes this page
make cifar-table ARGS="--images cifar10-jpeg"       # from a folder or an archive with train/<class> and test/<class>
```

A cell that is there is not trained again; a command that was stopped goes on where it was.

{table}

`{result["command"]}`, {result["hardware"]}, {result["date"]}. 50,000 images for training and probes, 10,000 for the
accuracies, top-1 in percent; {result["data"]}. kNN: weighted, k = {result["cells"][0]["knn"]["k"]}, cosine similarity.
linear: protocol `{probe["protocol"]}`, mean and standard deviation over {len(probe["seeds"])} seeds of the probe.
views: views that were made of the images, ReSSL's teacher's too; rotation shows each of them at four rotations.
training: time of the updates and of what comes before an epoch, evaluations left out. above random: linear accuracy
less that of the untrained network of the same seed; `NO` where it is not more than two standard deviations of the
probes.
"""


def hardware() -> str:
    """What the figures were measured on."""
    import torch

    found = environment()
    devices = ", ".join(found["devices"]) or "no GPU"
    threads = f"{found['threads']} torch thread{'s' if found['threads'] > 1 else ''}"
    return f"{found['cores']} cores of {found['processor']}, {threads}, {devices}, torch {torch.__version__}"


def source_of(file: Path) -> str:
    """What the data was converted from, by its manifest."""
    with beton.open(file) as files:
        manifest = files.files[0].manifest or {}
    return "data: " + "/".join(Path(str(manifest.get("source", "unknown"))).parts[-2:])


def _data(options: argparse.Namespace, split: str) -> Path:
    file: Path = options.out / f"cifar10-{split}.beton"
    if not file.exists():
        source = "cifar10" if options.images is None else options.images / split
        download = {"download": True, "root": options.out} if options.images is None else {}
        for line in convert_source(source, file, split=split, **download).lines():
            log.info(line)
    return file


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cifar_table", description=__doc__)
    parser.add_argument("--images", type=Path, help="folder or archive with train/<class> and test/<class>")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar-table"), help="data, runs and cells")
    parser.add_argument("--methods", help="some of them, with commas between; all by default")
    parser.add_argument("--seeds", default="0", help="training seeds, with commas between")
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--markdown", type=Path, default=PAGE)
    parser.add_argument("overrides", nargs="*", help="key.sub=value for every recipe")
    return parser


if __name__ == "__main__":
    sys.exit(main())
