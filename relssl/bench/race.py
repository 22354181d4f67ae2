"""Taking turns and taking times: everybody does one pass a round, the order rotates, warm-up does not count.

A machine that others use is slower at some times than at others, so what is compared stands in the same round: the
ratio of two rates is taken round by round, and its median and range are what counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from pipelines.errors import RelsslError
from relssl.bench.peers import Job, PeerBase

# What a peer may fail with; it is then said, and the others go on. Ours are not forgiven.
FAILURES = (RelsslError, RuntimeError, OSError, ValueError, TypeError)

Say = Callable[[str], None]


@dataclass
class Entrant:
    """One peer in a race. `seconds` (rounds,) of passes over `images` images each; `failure` says why it is out."""

    name: str
    peer: PeerBase
    is_ours: bool = False
    images: int = 0
    seconds: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def rates(self) -> list[float]:
        """Images per second, by round."""
        return [self.images / seconds for seconds in self.seconds]


def race(entrants: Sequence[Entrant], job: Job, *, rounds: int, seconds: float, say: Say) -> list[Entrant]:
    """Warm everybody up, then time `rounds` rounds of passes of about `seconds` each.

    Returns:
        The entrants that finished; the others have a `failure`.

    Raises:
        Whatever stops one of ours.
    """
    running = []
    for entrant in sorted(entrants, key=lambda e: not e.peer.FORKS):
        if _survives(entrant, warm_up, entrant, job, seconds):
            say(f"{entrant.peer.title}: {entrant.images} images a pass; {entrant.peer.how}")
            running.append(entrant)
        else:
            say(f"{entrant.peer.title} is left out: {entrant.failure}")
    for number in range(rounds):
        start = number % len(running)
        for entrant in running[start:] + running[:start]:
            _survives(entrant, _take_turn, entrant)
        running = [entrant for entrant in running if entrant.failure is None]
        say(f"round {number + 1} of {rounds}")
    return [entrant for entrant in entrants if entrant.failure is None]


def warm_up(entrant: Entrant, job: Job, seconds: float) -> None:
    """Compile, start workers, fill caches, and choose the number of images for a pass of about `seconds`.

    It is a multiple of batch x cores, so that every worker process has the same number of batches.
    """
    step = job.batch * job.cores
    most = max(step, len(job.files) // step * step)
    timed_pass(entrant.peer, step)
    images = step
    while (taken := timed_pass(entrant.peer, images)) < seconds / 4 and images < most:
        images = min(4 * images, most)
    wanted = images / taken * seconds
    entrant.images = min(most, max(1, round(wanted / step)) * step)


def timed_pass(peer: PeerBase, num_images: int) -> float:
    """Seconds of one pass, until the last view is there.

    Raises:
        RuntimeError: it made another number of images.
    """
    made = 0
    start = perf_counter()
    for size, views in peer.batches(num_images):
        made += size
        del views
    if peer.job.device.type == "cuda":
        torch.cuda.synchronize(peer.job.device)
    taken = perf_counter() - start
    if made != num_images:
        raise RuntimeError(f"{peer.title} made the views of {made} images, {num_images} were wanted")
    return taken


def ratios(ours: Entrant, peer: Entrant) -> list[float]:
    """How many times as fast we were, by round."""
    return [mine / theirs for mine, theirs in zip(ours.rates, peer.rates, strict=True)]


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median and range, and the values they are of."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def scaled(spread_of: Mapping[str, Any], factor: float) -> dict[str, float]:
    """The median and range of the same values in another unit."""
    return {key: spread_of[key] * factor for key in ("median", "min", "max")}


def _take_turn(entrant: Entrant) -> None:
    entrant.seconds.append(timed_pass(entrant.peer, entrant.images))


def _survives(entrant: Entrant, action: Callable[..., object], *arguments: Any) -> bool:
    try:
        action(*arguments)
    except FAILURES as error:
        if entrant.is_ours:
            raise
        entrant.failure = str(error).splitlines()[0] if str(error) else type(error).__name__
    return entrant.failure is None
