"""One evaluation by several processes of a launcher, each with its part of the images.

Features are extracted and augmented batches encoded in parts, and gathered; everything after that, which takes seconds,
every process does for itself, and the main one writes and speaks.
"""

from __future__ import annotations

import logging
import os

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from pipelines.errors import ConfigError
from relssl import dist

SHARED = ("knn", "linear", "retrieval", "probe", "fewlabel")


def join_processes(evaluator: str, *, follows: bool) -> None:
    """Make the processes that a launcher started work together; nothing where there is one.

    Raises:
        ConfigError: what is asked for is done by one process.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        return
    if evaluator not in SHARED or follows:
        what = "--follow" if follows else evaluator
        raise ConfigError(
            f"{what} is done by one process, and {count} were started; several share {', '.join(SHARED)}. Start it "
            "without a launcher: relssl eval ..."
        )
    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=dist.PATIENCE)
    if dist.rank() != 0:
        logging.getLogger("relssl").setLevel(logging.WARNING)
