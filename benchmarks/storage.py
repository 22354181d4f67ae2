"""What a data set costs by the way it is stored: size on disk, time to convert, images/s, and what the pixels lose.

    python -m benchmarks.storage FOLDER_OF_IMAGES [--cores N] [--repeats N] [--json FILE]

Each storage is converted with `relssl convert`'s own function. Rates are of complete views of the 2 x 224 case
(`relssl bench views`), passes over all storages take turns. The loss is between central crops (short side to 256
pixels, middle 224) of the original images and of what was stored, in levels of 255: nothing random is in it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from dataset_tools.convert import convert_source
from pipelines.loader import ViewLoader
from pipelines.views import ViewSpec
from relssl.bench.cases import CASES
from relssl.bench.cores import bound_to, torch_threads
from relssl.bench.race import spread
from relssl.runfolder import environment

STORAGES: dict[str, dict[str, Any]] = {
    "original JPEG": {},
    "--resolution 256": {"resolution": 256},
    "--resolution 256 --quality 90": {"resolution": 256, "quality": 90},
    "--resolution 256 --mode raw": {"resolution": 256, "mode": "raw"},
}
CENTRAL = ViewSpec("central", 224, box={"center": {"resize": 256}}, normalize=None)
BATCH = 50


def central_crops(path: Path) -> torch.Tensor:
    """(N, 3, 224, 224) in levels of 255, file order."""
    with ViewLoader(path, [(None, [CENTRAL])], global_batch=BATCH, shuffle=False, drop_last=False) as loader:
        return torch.cat([batch.views["central"][0] for batch in loader]) * 255


def one_pass(loader: ViewLoader, epoch: int) -> float:
    """Images per second of an epoch."""
    loader.set_position(epoch)
    start = perf_counter()
    images = sum(len(batch) for batch in loader)
    return images / (perf_counter() - start)


def measure(source: Path, folder: Path, cores: int, repeats: int) -> list[dict[str, Any]]:
    rows, loaders = [], {}
    for name, options in STORAGES.items():
        path = folder / f"{len(rows)}.beton"
        start = perf_counter()
        convert_source(str(source), path, labels=False, workers=cores, **options)
        rows.append({"storage": name, "convert_seconds": perf_counter() - start, "bytes": path.stat().st_size})
        loaders[name] = ViewLoader(path, [(None, CASES["2x224"].plan)], global_batch=BATCH, workers=cores)
    exact = central_crops(folder / "0.beton")
    for number, row in enumerate(rows):
        difference = (central_crops(folder / f"{number}.beton") - exact).abs()
        row["mean_difference"] = float(difference.mean())
        row["p99_difference"] = float(np.percentile(difference[:: len(exact) // 20].numpy(), 99))
        one_pass(loaders[row["storage"]], 0)
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for epoch in range(1, repeats + 1):
        for name, loader in loaders.items():
            rates[name].append(one_pass(loader, epoch))
    for row in rows:
        row["images"] = len(exact)
        row["images_per_second"] = spread(rates[row["storage"]])
        row["ratio"] = spread(np.divide(rates[row["storage"]], rates["original JPEG"]).tolist())
        loaders[row["storage"]].close()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| stored as | size per image | images/s | against original JPEG | difference, mean / 99 % |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        rate, ratio = row["images_per_second"], row["ratio"]
        lines.append(
            f"| `{row['storage']}` | {row['bytes'] / row['images'] / 1000:.0f} kB | {rate['median']:.0f} "
            f"({rate['min']:.0f} to {rate['max']:.0f}) | {ratio['median']:.2f} x ({ratio['min']:.2f} to "
            f"{ratio['max']:.2f}) | {row['mean_difference']:.2f} / {row['p99_difference']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of images")
    parser.add_argument("--cores", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with bound_to(options.cores) as cores, torch_threads(1), tempfile.TemporaryDirectory() as folder:
        rows = measure(options.source, Path(folder), cores, options.repeats)
    print(table(rows))
    if options.json:
        result = {"command": "python -m benchmarks.storage", "cores": cores, "environment": environment(), "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
