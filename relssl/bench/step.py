"""How much of a training step is spent waiting for views: the step of a recipe fed by the loader, and on views at rest.

Method, optimizer, precision and update are those of `relssl.train`. At rest means one batch that stays on the
device: no loader can be faster, so the ratio of the two rates is the share of the step that the views leave.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from contextlib import closing
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from pipelines.batch import ViewBatch
from pipelines.errors import ConfigError
from pipelines.loader import ViewLoader
from relssl.bench.race import Say, spread
from relssl.build import build_method, make_optimizer, make_schedule
from relssl.config import Recipe
from relssl.methods.base import Step
from relssl.progress import Stopwatch
from relssl.train import data_info, mixed_precision, run_update

LEAST_UPDATES = 4
_SETTLE = 2  # updates at the head of a pass that are not timed


def bench_step(
    recipe: Recipe,
    files: Any,
    *,
    engine: str,
    resize: str = "antialias",
    device: torch.device,
    cores: int,
    rounds: int,
    seconds: float,
    say: Say,
) -> dict[str, Any]:
    """Rates of a recipe's training step, fed and at rest, in turns.

    Args:
        files: an open data set in place of the recipe's.
        seconds: how long a pass should take.

    Returns:
        `fed` and `resident` images per second, their `ratio` by round, and `waiting`, the share of the fed step in
        which the host waited for a batch. On CUDA the host runs ahead of the device, so there the ratio counts.

    Raises:
        ConfigError: batch size and data do not fit.
    """
    AcceleratorState._reset_state()  # another step in this process may have had another precision
    state = PartialState(cpu=device.type == "cpu")
    if state.device.type != device.type:
        raise ConfigError(f"the training step would run on {state.device}, not on {device}")
    amp = mixed_precision(recipe.train.precision, state.device)
    accelerator = Accelerator(mixed_precision=amp)
    with closing(_loader(recipe, files, engine, resize, accelerator.device, cores)) as loader:
        trainer = _Stepper(recipe, loader, accelerator)
        at_rest = next(iter(loader))
        updates = trainer.warm_up(at_rest, seconds)
        say(f"training step: {updates} updates of {recipe.train.batch_size} images a pass")
        fed, resident, waiting = [], [], []
        images = updates * recipe.train.batch_size
        for number in range(rounds):
            for is_fed in (number % 2 == 0, number % 2 == 1):
                if is_fed:
                    taken, waited = trainer.run_fed(updates)
                    fed.append(images / taken)
                    waiting.append(waited / taken)
                else:
                    resident.append(images / trainer.run(itertools.repeat(at_rest), updates)[0])
            say(f"round {number + 1} of {rounds}")
        return {
            "method": recipe.method["name"],
            "backbone": recipe.backbone.name,
            "batch_size": recipe.train.batch_size,
            "updates": updates,
            "precision": "fp32" if amp == "no" else amp,
            "engine": loader.engine_name,
            "fed": spread(fed),
            "resident": spread(resident),
            "ratio": spread([a / b for a, b in zip(fed, resident, strict=True)]),
            "waiting": spread(waiting),
        }


def _loader(recipe: Recipe, files: Any, engine: str, resize: str, device: torch.device, cores: int) -> ViewLoader:
    return ViewLoader(
        files,
        recipe.views.specs(),
        global_batch=recipe.train.batch_size,
        num_micro=recipe.train.num_micro,
        engine=engine,
        resize=resize,
        device=device,
        seed=recipe.train.seed,
        dtype=torch.float64 if recipe.train.precision == "fp64" else torch.float32,
        channels_last=_channels_last(recipe, device),
        workers=cores,
    )


def _channels_last(recipe: Recipe, device: torch.device) -> bool:
    wanted = recipe.train.channels_last
    return device.type == "cuda" if wanted == "auto" else wanted


class _Stepper:
    """The trainer's objects, without run folder, evaluation and checkpoints."""

    def __init__(self, recipe: Recipe, loader: ViewLoader, accelerator: Accelerator):
        self.recipe, self.loader, self.accelerator = recipe, loader, accelerator
        method = build_method(recipe, data_info(recipe, loader)).to(accelerator.device, loader.dtype)
        if loader.channels_last:
            method.to(memory_format=torch.channels_last)
        method.train()
        per_epoch = loader.updates_per_epoch
        self.total = per_epoch * recipe.train.epochs
        self.schedule = make_schedule(recipe.optim, per_epoch, self.total, recipe.train.batch_size)
        self.ddp, self.optimizer = accelerator.prepare(method, make_optimizer(recipe.optim, method))
        if recipe.train.compile:
            method.encoder.compile()
        self.update, self.epoch = 0, 0
        self.stopwatch = Stopwatch(accelerator.device)

    def warm_up(self, at_rest: ViewBatch, seconds: float) -> int:
        """Run both kinds of step, and choose the number of updates for about `seconds`."""
        self.run_fed(1)
        taken, _ = self.run(itertools.repeat(at_rest), LEAST_UPDATES)
        return max(LEAST_UPDATES, round(LEAST_UPDATES * seconds / taken))

    def run_fed(self, updates: int) -> tuple[float, float]:
        """As `run`, with batches of the loader."""
        with closing(self._from_loader()) as batches:
            return self.run(batches, updates)

    def run(self, batches: Iterator[ViewBatch], updates: int) -> tuple[float, float]:
        """Seconds of some updates until the device is done, and those in which the host waited for a batch.

        A few updates come before: the loader is then as far ahead as it will be, and the last pass is over.
        """
        for _ in range(_SETTLE):
            self._run_update(batches)
        self._wait_for_device()
        self.stopwatch.take()
        start = perf_counter()
        for _ in range(updates):
            self._run_update(batches)
        self._wait_for_device()
        return perf_counter() - start, self.stopwatch.take()["wait"]

    def _from_loader(self) -> Generator[ViewBatch, None, None]:
        """Batches without end, epoch after epoch."""
        while True:
            self.loader.set_position(self.epoch % self.recipe.train.epochs, 0)
            self.epoch += 1
            yield from self.loader

    def _run_update(self, batches: Iterator[ViewBatch]) -> None:
        train = self.recipe.train
        run_update(
            self.ddp,
            self.optimizer,
            batches,
            Step(self.update % self.total, epoch=0, num_micro=train.num_micro, seed=train.seed),
            schedule=self.schedule,
            num_images=train.batch_size,
            clip_norm=train.clip_norm,
            accelerator=self.accelerator,
            stopwatch=self.stopwatch,
        )
        self.update += 1

    def _wait_for_device(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
