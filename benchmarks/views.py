"""Decode + crops of real JPEGs: our default engine against stock FFCV, in one run.

    python -m benchmarks.views IMAGES.beton [--threads N] [--repeats N] [--json FILE]

Both make the teacher's and the student's crop of the single-crop ImageNet recipe without colour, as 8-bit tensors.
Stock FFCV has no decoder that makes two crops of one decoded image, so it runs two loaders over the same file, each
with `RandomResizedCropRGBImageDecoder`, as its users do. Repeats alternate; the table gives medians and the range.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from pipelines import beton
from pipelines.draw import draw
from pipelines.engines import engine_class
from pipelines.views import ViewSpec
from relssl.runfolder import environment

BATCH = 32
PLANS = {
    "2 x 224": [(224, (0.2, 1.0)), (224, (0.2, 1.0))],
    "224/192/160/128/96": [
        (224, (0.2, 1.0)),
        (192, (0.172, 0.86)),
        (160, (0.143, 0.715)),
        (128, (0.114, 0.571)),
        (96, (0.086, 0.429)),
    ],
}


def ours(path: Path, plan: list[tuple[int, tuple[float, float]]], threads: int) -> Callable[[], int]:
    """One pass over the file with the torchvision engine; returns the number of images."""
    import torch

    files = beton.open(path)
    engine = engine_class("torchvision")(files, device=torch.device("cpu"), workers=threads)
    specs = [ViewSpec("view", size, box={"random_resized": {"scale": scale}}, flip=0.5) for size, scale in plan]
    epoch = [0]

    def run() -> int:
        epoch[0] += 1
        order = np.random.default_rng(epoch[0]).permutation(len(files))
        for start in range(0, len(files), BATCH):
            ids = order[start : start + BATCH]
            sides = {"heights": files.heights[ids], "widths": files.widths[ids]}
            params = draw(specs, seed=0, epoch=epoch[0], index=ids, **sides)
            engine.crops(ids, params, no_replacement)
        return len(files)

    return run


def no_replacement(row: int, error: Exception) -> int:
    raise error


def stock_ffcv(path: Path, plan: list[tuple[int, tuple[float, float]]], threads: int) -> Callable[[], int]:
    """One pass with one stock FFCV loader per view, zipped."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    loaders = [
        Loader(
            str(path),
            batch_size=BATCH,
            num_workers=threads,
            order=OrderOption.RANDOM,
            os_cache=True,
            drop_last=False,
            seed=0,
            pipelines={"image": [RandomResizedCropRGBImageDecoder((size, size), scale=scale)], "label": None},
        )
        for size, scale in plan
    ]

    def run() -> int:
        count = 0
        for batches in zip(*loaders, strict=True):
            count += len(batches[0][0])
        return count

    return run


def measure(path: Path, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Images per second of every plan and peer; peers alternate within a plan."""
    rows = []
    for name, plan in PLANS.items():
        peers = {"relssl (torchvision engine)": ours, "stock FFCV": stock_ffcv}
        runs = {peer: make(path, plan, threads) for peer, make in peers.items()}
        rates: dict[str, list[float]] = {peer: [] for peer in runs}
        for run in runs.values():
            run()  # compile, fill the page cache
        for _ in range(repeats):
            for peer, run in runs.items():
                start = perf_counter()
                rates[peer].append(run() / (perf_counter() - start))
        pairs = zip(rates["relssl (torchvision engine)"], rates["stock FFCV"], strict=True)
        ratios = sorted(a / b for a, b in pairs)
        for peer, values in rates.items():
            rows.append({"plan": name, "peer": peer, "images_per_second": sorted(values)})
        rows.append({"plan": name, "peer": "ratio", "ratio": ratios})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, default=1, help="threads, and cores to run them on")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # Two FFCV loaders run their threads side by side: without a bound on cores they would have twice as many.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    rows = measure(options.file, options.threads, options.repeats)
    for row in rows:
        values = row.get("ratio") or row["images_per_second"]
        digits = 2 if "ratio" in row else 0
        text = f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
        print(f"{row['plan']:22} {row['peer']:28} {text}")
    if options.json:
        about = {k: v for k, v in environment().items() if k in ("torch", "processor", "cores", "platform")}
        date = datetime.now(timezone.utc).date().isoformat()
        result = {"threads": options.threads, "repeats": options.repeats, "date": date, **about, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
