"""Run a function on several gloo processes and collect what each returns.

    def _job(rank, x):                             # at module level, so that it can be imported
        return {"sum": dist.all_reduce_sum(x)}

    results = run_ranks(_job, 2, torch.ones(3))    # [rank 0's, rank 1's]

Processes are forked from one server that has imported torch but started no thread, so a group of two costs a
fraction of a second after the first.  Results travel by file: a process that leaves by `os._exit`, as real
runs do, would lose what a queue's thread still held.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from relssl import dist

TIMEOUT_S = 120


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`function(rank, *args)` on every rank of a gloo group; returns the results (tensors, plain containers).

    Every process ends through `relssl.dist.shutdown`.

    Raises:
        AssertionError: a rank failed or did not end, with its traceback.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codes = start_and_join(_rank_main, world_size, function, world_size, folder, args)
        reports = "\n".join(path.read_text() for path in sorted(folder.glob("error*")))
        assert codes == [0] * world_size, f"exit codes {codes}\n{reports}"
        return [torch.load(folder / f"result{rank}.pt") for rank in range(world_size)]


def start_and_join(target: Callable[..., None], world_size: int, *args: Any) -> list[int | None]:
    """`target(rank, *args)` in one process per rank, without a process group; returns their exit codes."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo"])
    processes = [context.Process(target=target, args=(rank, *args), daemon=True) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_S)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _rank_main(rank: int, function: Callable[..., Any], world_size: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    code = 0
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=TIMEOUT_S / 2),
        )
        torch.save(function(rank, *args), folder / f"result{rank}.pt")
    except Exception:  # noqa: BLE001  whatever it was, the parent must hear of it
        (folder / f"error{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        code = 1
    dist.shutdown(code, agreed=code == 0)
    sys.exit(code)
