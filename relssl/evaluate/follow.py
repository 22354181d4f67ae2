"""`relssl eval ... --follow RUN`: every checkpoint of a run that trains, as soon as it is written."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipelines.errors import ConfigError, InputError, RunError
from relssl import checkpoint
from relssl.evaluate.weights import Weights, from_checkpoint
from relssl.runfolder import RunFolder, read_results

log = logging.getLogger("relssl.evaluate")

_SECONDS_BETWEEN_LOOKS = 5.0


def follow_run(
    run: Path,
    evaluate: Callable[[Weights], Any],
    *,
    evaluator: str,
    command: str,
    seconds: float = _SECONDS_BETWEEN_LOOKS,
) -> int:
    """Evaluate each checkpoint of a run once, oldest first, until the run has ended and none is left.

    A checkpoint that the run deletes while it is being read is let go. One whose evaluation fails is passed over, once
    another has been evaluated: what is wrong with the data or the command shows at the first. The same `command` goes
    on where an earlier one stopped: a checkpoint with such an entry in results.json is not evaluated again.

    Args:
        run: the folder of a run.
        evaluate: writes into results.json what the weights are worth.
        evaluator, command: of the entries that it writes, or of the last of them.
        seconds: between looks for new checkpoints.

    Returns:
        How many checkpoints were evaluated.

    Raises:
        InputError: this is not the folder of a run; the first checkpoint cannot be evaluated; at the end, where others
            were passed over.
        RunError: the evaluation of the first checkpoint fails.
        ConfigError: it trains nothing, holds no checkpoint and none will come.
    """
    folder = RunFolder(run)
    folder.recipe()
    wanted = (evaluator, command)
    done = {e.get("update") for e in read_results(run) if (e.get("evaluator"), e.get("command")) == wanted}
    if done:
        log.info("%d checkpoints were evaluated by this command before", len(done))
    count, waiting, passed_over, failed = 0, False, set[Path](), list[str]()
    while True:
        trains = _is_in_training(run)  # asked before the look: what is written afterwards is seen at the next
        new = _new_checkpoints(folder, done, passed_over)
        for path in new[:1]:  # then look again: the next may be deleted, and newer ones have come
            waiting = False
            weights = _weights_of(folder, path)
            if weights is None:
                passed_over.add(path)
                continue
            log.info("%s", path)
            try:
                evaluate(weights)
            except (InputError, RunError) as error:
                if not done:
                    raise
                log.info("passing over %s, which cannot be evaluated: %s", path, error)
                passed_over.add(path)
                failed.append(path.name)
                continue
            done.add(weights.update)
            count += 1
        if new:
            continue
        if not trains:
            break
        if not waiting:
            log.info("waiting for the next checkpoint of %s (Ctrl-C ends; the same command goes on)", run)
        waiting = True
        time.sleep(seconds)
    if not done:
        raise ConfigError(f"{run} is not in training and has no checkpoint; train it first, or evaluate its backbone")
    log.info("%s: no more checkpoints", "the run has ended" if folder.backbone.is_file() else "nobody trains it now")
    if failed:
        raise InputError(
            f"{count} checkpoints of {run} evaluated and {len(failed)} passed over, which could not be: "
            f"{', '.join(failed)}; the log says why. The same command tries them again"
        )
    return count


def _new_checkpoints(folder: RunFolder, done: set[Any], passed_over: set[Path]) -> list[Path]:
    found = checkpoint.list_checkpoints(folder.checkpoints)
    return [path for path in found if path not in passed_over and checkpoint.update_of(path) not in done]


def _weights_of(folder: RunFolder, path: Path) -> Weights | None:
    """The weights of a checkpoint; None when it is damaged, or was deleted meanwhile."""
    try:
        return from_checkpoint(folder, path)
    except InputError as error:
        if checkpoint.is_complete(path):
            log.info("passing over a checkpoint: %s", error)
        else:
            log.info("%s is gone: the run deleted it before it could be read (train.checkpoint.keep)", path)
        return None


def _is_in_training(run: Path) -> bool:
    """Whether a process holds the run. A trainer that starts at this very moment waits for the look to be over."""
    lock = run / ".lock"
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
