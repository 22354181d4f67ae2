"""`relssl bench views`: how fast views are made, beside what people use otherwise, in one run.

Two measurements: `crops`, decoding and cropping to 8-bit tensors without colour, and `views`, everything, on the
device. Peers are bound to the same cores, read the same images, and take turns (`race`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipelines import beton
from pipelines.errors import ConfigError, RelsslError, unknown_name
from relssl.bench import record
from relssl.bench.cases import MEASURES, Case, crops_only, find_cases, num_views
from relssl.bench.cores import bound_to, torch_threads
from relssl.bench.images import LEAST_IMAGES, describe, prepare
from relssl.bench.peers import PEERS, Job, check_peer_name, start_peer
from relssl.bench.peers.ours import start_ours
from relssl.bench.plot import plot
from relssl.bench.race import Entrant, Say, race, ratios, scaled, spread
from relssl.bench.record import chosen_device, plain, versions
from relssl.runfolder import environment

log = logging.getLogger("relssl.bench")

FORMAT = 1
_PACKAGES = ("torch", "torchvision", "pillow", "numba", "numpy", "ffcv", "kornia", "nvidia-dali-cuda120")


@dataclass(frozen=True)
class Settings:
    """What is measured and how.

    Attributes:
        data: `.beton` files that are one data set; ours reads them.
        baseline: files that the peers read; `data` when empty.
        cases: names of `cases.CASES`, recipes by name or file.
        engines: ours; names of engines or `auto`.
        peers: names of `peers.PEERS`; None means all that can take part.
        measures: of `cases.MEASURES`.
        cores: bind everybody to so many cores; all of them when None.
        batch: images of a batch.
        repeats: rounds that count.
        seconds: how long one pass of one peer should take.
        device: `auto`, `cpu`, `cuda`, ...
        resize: of our engines: `antialias`, or `area` where an engine offers it.
        step: a recipe whose training step is measured too, on `data`.
    """

    data: Sequence[Path]
    baseline: Sequence[Path] = ()
    cases: Sequence[str] = ("2x224",)
    engines: Sequence[str] = ("auto",)
    peers: Sequence[str] | None = None
    measures: Sequence[str] = MEASURES
    cores: int | None = None
    batch: int = 64
    repeats: int = 5
    seconds: float = 2.0
    device: str = "auto"
    resize: str = "antialias"
    step: str | None = None
    least_images: int = field(default=LEAST_IMAGES, repr=False)  # fewer make tests fast


def bench_views(settings: Settings, *, command: str = "relssl bench views", say: Say = log.info) -> dict[str, Any]:
    """Measure, and return everything that `table.text`, `plot.plot` and a JSON file hold.

    Args:
        command: recorded in the result.
        say: is told about progress, a line at a time.

    Raises:
        ConfigError: an unknown case, peer, engine or measure, or an engine that cannot make a view.
        InputError: a data file is refused.
    """
    check(settings)
    cases = [case for name in settings.cases for case in find_cases(name)]
    recipe = None if settings.step is None else _recipe(settings.step)
    device = chosen_device(settings.device)
    with ExitStack() as stack:
        cores = stack.enter_context(bound_to(settings.cores))
        stack.enter_context(torch_threads(1))
        ours = stack.enter_context(beton.open(list(settings.data)))
        baseline = stack.enter_context(beton.open(list(settings.baseline))) if settings.baseline else ours
        bench = _Bench(settings, ours, baseline, device, cores, say)
        measurements = [bench.measure(case, measure) for case in cases for measure in bench.measures()]
        step = None if recipe is None else bench.step(recipe)
        return {
            "format": FORMAT,
            "command": command,
            "date": environment()["started"][:10],
            "environment": environment(),
            "versions": versions(_PACKAGES),
            "settings": {**plain(settings), "cores": cores, "device": str(device)},
            "data": describe(ours, list(settings.data)),
            "baseline": describe(baseline, list(settings.baseline or settings.data)),
            "measurements": measurements,
            "step": step,
        }


def check(settings: Settings) -> None:
    """Refuse what cannot be measured before anything is opened.

    Raises:
        ConfigError: names the setting.
    """
    for measure in settings.measures:
        if measure not in MEASURES:
            raise ConfigError(unknown_name("measure", measure, MEASURES))
    for name in settings.peers or ():
        check_peer_name(name)
        if not set(PEERS[name]) & set(settings.measures):
            raise ConfigError(f"peer {name!r} takes part in {', '.join(PEERS[name])} only; add that to --measure")
    for name, least in (("repeats", 1), ("batch", 1)):
        if getattr(settings, name) < least:
            raise ConfigError(f"--{name} is at least {least}, got {getattr(settings, name)}")
    if not settings.seconds > 0:
        raise ConfigError(f"--seconds is the length of a pass, above 0; got {settings.seconds}")
    if not settings.engines:
        raise ConfigError("--engine needs at least one engine, or auto")


def write_outputs(result: Mapping[str, Any], json_file: Path | None, plot_file: Path | None) -> list[Path]:
    """Write what was asked for; the files that were written."""
    return record.write_outputs(result, json_file, plot_file, plot)


class _Bench:
    """One run: the same data, cores and device for every measurement."""

    def __init__(self, settings: Settings, ours: Any, baseline: Any, device: torch.device, cores: int, say: Say):
        self.settings, self.device, self.cores, self.say = settings, device, cores, say
        least = max(settings.least_images, 4 * settings.batch * cores)
        self.ours = prepare(ours, least=least)
        self.baseline = self.ours if baseline is ours else prepare(baseline, least=least)

    def measures(self) -> list[str]:
        """In the order of `MEASURES`."""
        return [measure for measure in MEASURES if measure in self.settings.measures]

    def measure(self, case: Case, measure: str) -> dict[str, Any]:
        """Race for one case."""
        plan = crops_only(case.plan) if measure == "crops" else list(case.plan)
        self.say(f"{case.name}, {measure}")
        job = Job(self.ours, plan, measure, self.device, self.cores, self.settings.batch)
        with ExitStack() as stack:
            entrants, left_out = self._line_up(job, stack)
            finished = race(entrants, job, rounds=self.settings.repeats, seconds=self.settings.seconds, say=self.say)
            left_out += [(e.name, f"{e.peer.title}: {e.failure}") for e in entrants if e.failure is not None]
            return self._result(case, job, finished, left_out)

    def step(self, recipe: Any) -> dict[str, Any]:
        """The training step of a recipe."""
        from relssl.bench.step import bench_step

        self.say(f"training step of {self.settings.step}")
        with torch_threads(self.cores):
            return bench_step(
                recipe,
                self.ours,
                engine=self.settings.engines[0],
                resize=self.settings.resize,
                device=self.device,
                cores=self.cores,
                rounds=self.settings.repeats,
                seconds=self.settings.seconds,
                say=self.say,
            )

    def _line_up(self, job: Job, stack: ExitStack) -> tuple[list[Entrant], list[tuple[str, str]]]:
        """Everybody who can take part, ours first, and why the others cannot."""
        entrants: list[Entrant] = []
        left_out: list[tuple[str, str]] = []
        problem: RelsslError | None = None
        for engine in self.settings.engines:
            try:
                peer = start_ours(engine, job, self.settings.resize)
            except RelsslError as error:
                problem = error
                left_out.append((engine, f"engine {engine}: {error}"))
                continue
            stack.enter_context(closing(peer))
            if peer.title in [entrant.peer.title for entrant in entrants]:
                left_out.append((engine, f"engine {engine}: the same as {peer.title}"))
                continue
            entrants.append(Entrant(engine, peer, is_ours=True))
        if problem is not None and not entrants:
            raise problem
        theirs = Job(self.baseline, job.plan, job.measure, job.device, job.cores, job.batch)
        for name in self._peers_of(job.measure):
            try:
                entrants.append(Entrant(name, stack.enter_context(closing(start_peer(name, theirs)))))
            except RelsslError as error:
                left_out.append((name, str(error)))
        return entrants, left_out

    def _peers_of(self, measure: str) -> list[str]:
        wanted = PEERS if self.settings.peers is None else self.settings.peers
        return [name for name in PEERS if name in wanted and measure in PEERS[name]]

    def _result(
        self, case: Case, job: Job, finished: Sequence[Entrant], left_out: Sequence[tuple[str, str]]
    ) -> dict[str, Any]:
        storage = _storage(self.ours)
        if self.baseline is not self.ours and _storage(self.baseline) != storage:
            storage = f"{storage}, peers from {_storage(self.baseline)}"
        targets = case.raw_targets if not self.ours.is_jpeg.any() else case.targets
        views = num_views(job.plan)
        return {
            "case": case.name,
            "measure": job.measure,
            "storage": storage,
            "views_per_image": views,
            "plan": [plain(spec) for spec in job.plan],
            "peers": [_rates(entrant, views, self.cores) for entrant in finished],
            "ratios": [
                {
                    "ours": ours.peer.title,
                    "peer": other.peer.title,
                    "ratio": spread(ratios(ours, other)),
                    "target": None if other.is_ours else targets.get((job.measure, other.name)),
                }
                for ours in finished
                if ours.is_ours
                for other in finished
                if other is not ours
            ],
            "left_out": [{"name": name, "reason": reason} for name, reason in left_out],
        }


def _rates(entrant: Entrant, views: int, cores: int) -> dict[str, Any]:
    images = spread(entrant.rates)
    return {
        "name": entrant.name,
        "title": entrant.peer.title,
        "is_ours": entrant.is_ours,
        "how": entrant.peer.how,
        "images": entrant.images,
        "seconds": entrant.seconds,
        "images_per_second": images,
        "views_per_second": scaled(images, views),
        "images_per_second_per_core": scaled(images, 1 / cores),
    }


def _storage(files: Any) -> str:
    if files.is_jpeg.all():
        return "JPEG"
    return "JPEG and raw pixels" if files.is_jpeg.any() else "raw pixels"


def _recipe(name: str) -> Any:
    from relssl.config import load_recipe
    from relssl.recipes import recipe_path

    return load_recipe(name if Path(name).is_file() else recipe_path(name))
