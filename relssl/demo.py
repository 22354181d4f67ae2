"""`relssl demo`: the main job from images to a report, on an embedded data set, with nothing to prepare."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from time import perf_counter

from dataset_tools.convert import convert_source
from relssl.config import load_recipe
from relssl.evaluate import evaluate_knn, evaluate_linear, open_weights
from relssl.progress import duration
from relssl.recipes import recipe_path
from relssl.report import format_table, results_table, write_report
from relssl.runfolder import read_results
from relssl.train import train

log = logging.getLogger("relssl.demo")

RECIPE = "ressl/digits_demo"
RENDERINGS = {"train": 6, "test": 6}  # pictures drawn of each original digit
# Digits large and clear enough to be told apart, in colours that carry nothing.
LOOK = {"scale": (0.6, 0.9), "contrast": 0.5}


def run_demo(out: Path) -> int:
    """Convert, pre-train, evaluate against random initialisation, and report into `out`.

    A demo that was interrupted goes on where it was; one that has ended is evaluated again.
    """
    start = perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    for split, renderings in RENDERINGS.items():
        file = out / f"digits-{split}.beton"
        if not file.exists():
            render = {**LOOK, "renderings": renderings}
            log.info(convert_source("digits", file, split=split, render=render).lines()[0])
    run = out / "run"
    data = [f"data.train={out / 'digits-train.beton'}", f"data.test={out / 'digits-test.beton'}"]
    recipe = load_recipe(recipe_path(RECIPE), data)
    code = train(recipe, run, resume=True, command="relssl demo")
    if code:
        return code
    for random_init in (True, False):
        weights = open_weights(run, random_init=random_init)
        evaluate_knn(weights, command="relssl demo")
        evaluate_linear(weights, command="relssl demo")
    report = write_report(run)
    activate = "" if shutil.which("relssl") else f"\n  . {Path(sys.prefix) / 'bin' / 'activate'}"
    print()
    print(format_table(results_table(read_results(run))))
    print(f"""
top-1 in percent on {len(recipe.eval.linear.seeds)} probe seeds; the whole job took {duration(perf_counter() - start)}
report: {report}

next, with a folder of your own images:{activate}
  relssl convert /path/to/images images.beton --no-labels
  relssl views ressl/imagenet_resnet50 data.train=images.beton data.test=null --out views.png
  relssl train ressl/imagenet_resnet50 data.train=images.beton data.test=null --out runs/mine""")
    return 0
