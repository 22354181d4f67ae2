"""`relssl bench losses`: our losses beside the same ones written as in a textbook, in one run on the same inputs.

Per case and form: time of forward and backward, bytes at the peak, operators or kernels. The forms must agree in
loss and gradient before anything is timed. Fused losses save memory, not always time, and a loss is a small part of a
step: next to each ratio stands the share that the loss has in a step with the published backbone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.errors import ConfigError, RunError, unknown_name
from relssl.bench import record
from relssl.bench.cores import torch_threads
from relssl.bench.footprint import Footprint, bytes_for_backward, footprint
from relssl.bench.loss_cases import OURS, Backbone, LossCase, Pass, Problem, Sizes, find_cases, resized
from relssl.bench.race import Say, spread
from relssl.nets import build_backbone
from relssl.runfolder import environment

log = logging.getLogger("relssl.bench")

FORMAT = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_PACKAGES = ("torch", "numpy")
# float16 gradients of a mean over many rows are lost without a loss scale, as in training.
_LOSS_SCALE = {"fp16": 4096.0}
_ACTIVATIONS_ON_CPU = 512 * 2**20  # a backbone is timed on as many images as keep so many bytes for backward


@dataclass(frozen=True)
class Tolerance:
    """How far two forms may be apart: of the loss its relative difference, of a gradient ||a - b|| / ||b||.

    `kinked` is for gradients that jump where a pre-activation is 0: a few of millions lie within rounding of it.
    """

    loss: float
    gradient: float
    kinked: float

    def of_gradient(self, case: LossCase) -> float:
        """The one that holds for a case."""
        return self.kinked if case.kinked else self.gradient


# About ten times what was measured at the published sizes on a CPU.
TOLERANCES = {
    "fp64": Tolerance(1e-12, 1e-11, 1e-11),
    "fp32": Tolerance(1e-5, 1e-5, 2e-2),
    "bf16": Tolerance(2e-2, 1e-1, 2e-1),
    "fp16": Tolerance(2e-3, 2e-2, 1e-1),
}


@dataclass(frozen=True)
class Settings:
    """What is measured and how.

    Attributes:
        cases: names of `loss_cases.CASES`; None means all.
        sizes: other sizes than the published ones, by name, for every case that has them.
        dtype: of features, rows and queue: a name of `DTYPES`. Head parameters are float32 (float64 for fp64), and
            for bf16 and fp16 the naive forms and the backbone run under autocast, as they would in training.
        device: `auto`, `cpu`, `cuda`, ...
        threads: of torch; as many as it takes by itself when None.
        rounds: in each every form takes its turn.
        seconds: how long a turn should be; a turn is one call at least.
        step: measure the backbones, too.
    """

    cases: Sequence[str] | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    dtype: str = "fp32"
    device: str = "auto"
    threads: int | None = None
    rounds: int = 7
    seconds: float = 0.5
    step: bool = True


def bench_losses(settings: Settings, *, command: str = "relssl bench losses", say: Say = log.info) -> dict[str, Any]:
    """Measure, and return everything that `loss_table.text`, `loss_plot.plot` and a JSON file hold.

    Raises:
        ConfigError: an unknown case, size, dtype or device, or a number that makes no sense.
        RunError: two forms of a loss differ by more than rounding, or a form does not fit the memory.
    """
    check(settings)
    cases = resized(find_cases(settings.cases), settings.sizes)
    device = record.chosen_device(settings.device)
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"losses are measured on cpu or cuda, got {device}")
    with torch_threads(settings.threads or torch.get_num_threads()):
        about = {key: value for key, value in environment().items() if key != "argv"}
        load, measurements = [_load()], []
        for case, sizes in cases:
            measurements.append(_measure(case, sizes, settings, device, say))
            load.append(_load())
    return {
        "format": FORMAT,
        "benchmark": "losses",
        "command": command,
        "date": about["started"][:10],
        "environment": about,
        "versions": record.versions(_PACKAGES),
        "load": load,
        "settings": {**record.plain(settings), "threads": about["threads"], "device": str(device)},
        "measurements": measurements,
    }


def check(settings: Settings) -> None:
    """Refuse what cannot be measured.

    Raises:
        ConfigError: names the setting.
    """
    if settings.dtype not in DTYPES:
        raise ConfigError(unknown_name("dtype", settings.dtype, DTYPES))
    if settings.rounds < 1:
        raise ConfigError(f"--rounds is at least 1, got {settings.rounds}")
    if settings.threads is not None and settings.threads < 1:
        raise ConfigError(f"--threads is at least 1, got {settings.threads}")
    if not settings.seconds > 0:
        raise ConfigError(f"--seconds is the length of a turn, above 0; got {settings.seconds}")


def size_settings(texts: Sequence[str]) -> dict[str, int]:
    """`NAME=NUMBER` of the command line, as often as wanted.

    Raises:
        ConfigError: something else.
    """
    sizes = {}
    for text in texts:
        name, _, number = text.partition("=")
        if not name or not number.isascii() or not number.isdigit():
            raise ConfigError(f"--size takes NAME=NUMBER, such as queue=4096; got {text!r}")
        sizes[name] = int(number)
    return sizes


def write_outputs(result: Mapping[str, Any], json_file: Path | None, plot_file: Path | None) -> list[Path]:
    """Write what was asked for; the files that were written."""
    from relssl.bench.loss_plot import plot

    return record.write_outputs(result, json_file, plot_file, plot)


# ---- one case


def _measure(case: LossCase, sizes: Sizes, settings: Settings, device: torch.device, say: Say) -> dict[str, Any]:
    dtype = DTYPES[settings.dtype]
    say(f"{case.name}: {', '.join(f'{name} {size}' for name, size in sizes.items())}, {settings.dtype}")
    problem = case.make(sizes, dtype, device, torch.Generator().manual_seed(0))
    runners = [_Runner(name, problem, settings.dtype, device) for name in problem.forms]
    exactly = _compare_in_fp64(case, sizes, device, say) if case.kinked and settings.dtype != "fp64" else {}
    differences = _compare(runners, case, settings.dtype, say)
    _race(runners, settings, say)
    footprints = [runner.footprint() for runner in runners]
    is_published = sizes == case.sizes
    forms = [_form(runner, cost) for runner, cost in zip(runners, footprints, strict=True)]
    ratios = [
        {
            "form": runner.name,
            "time": spread([theirs / ours for ours, theirs in zip(runners[0].seconds, runner.seconds, strict=True)]),
            "memory": cost.peak_bytes / max(1, footprints[0].peak_bytes),
            "targets": dict(case.targets) if is_published else {},
            "difference": differences[runner.name],
            "difference_in_fp64": exactly.get(runner.name),
        }
        for runner, cost in zip(runners[1:], footprints[1:], strict=True)
    ]
    del problem, runners
    steps = [_step(backbone, sizes, forms, dtype, device, say) for backbone in case.backbones if settings.step]
    return {
        "case": case.name,
        "title": case.title,
        "sizes": dict(sizes),
        "published_sizes": is_published,
        "dtype": settings.dtype,
        "forms": forms,
        "ratios": ratios,
        "steps": steps,
    }


def _form(runner: _Runner, cost: Footprint) -> dict[str, Any]:
    return {
        "name": runner.name,
        "is_ours": runner.name == OURS,
        "calls": runner.calls,
        "seconds": spread(runner.seconds),
        "peak_bytes": cost.peak_bytes,
        "launches": cost.launches,
    }


class _Runner:
    """One form of a loss: forward and backward as often as wanted. `seconds` (rounds,) are those of one call."""

    def __init__(self, name: str, problem: Problem, dtype: str, device: torch.device) -> None:
        self.name, self.problem, self.dtype, self.device = name, problem, dtype, device
        self.calls = 1
        self.seconds: list[float] = []

    def call(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and, times the loss scale, its gradient in every leaf.

        Raises:
            RunError: it does not fit the memory.
        """
        try:
            with _autocast(DTYPES[self.dtype], self.device):
                loss = self.problem.forms[self.name]()
            scale = _LOSS_SCALE.get(self.dtype, 1.0)
            return loss.detach(), torch.autograd.grad(loss * scale, list(self.problem.leaves.values()))
        except RuntimeError as error:  # a CPU's allocator has no exception of its own
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise RunError(f"{self.name} does not fit the memory; take smaller sizes, as with --size") from None

    def take_turn(self) -> None:
        """Time `calls` calls."""
        self.seconds.append(self.time(self.calls))

    def time(self, calls: int) -> float:
        """Seconds of a call, on average over some, until the device is done."""
        self._wait()
        start = perf_counter()
        for _ in range(calls):
            self.call()
        self._wait()
        return (perf_counter() - start) / calls

    def footprint(self) -> Footprint:
        """Outside the clock."""
        return footprint(self.call, self.device)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _race(runners: Sequence[_Runner], settings: Settings, say: Say) -> None:
    """Everybody takes one turn a round, and the order rotates."""
    turns = 0.0
    for runner in runners:
        taken = runner.time(1)
        runner.calls = max(1, round(settings.seconds / max(taken, 1e-9)))
        turns += runner.calls * taken
        say(f"{runner.name}: {taken * 1e3:.3g} ms, calls a turn: {runner.calls}")
    say(f"{settings.rounds} rounds take about {settings.rounds * turns:.0f} s")
    for number in range(settings.rounds):
        start = number % len(runners)
        for runner in [*runners[start:], *runners[:start]]:
            runner.take_turn()


@contextmanager
def _autocast(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    is_narrow = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(device.type, dtype if is_narrow else None, enabled=is_narrow):
        yield


# ---- are they the same?


def _compare_in_fp64(case: LossCase, sizes: Sizes, device: torch.device, say: Say) -> dict[str, dict[str, Any]]:
    """As `_compare`, where narrower numbers would hide more than rounding: the same inputs in float64."""
    problem = case.make(sizes, torch.float64, device, torch.Generator().manual_seed(0))
    return _compare([_Runner(name, problem, "fp64", device) for name in problem.forms], case, "fp64", say)


def _compare(runners: Sequence[_Runner], case: LossCase, dtype: str, say: Say) -> dict[str, dict[str, Any]]:
    """The difference of ours from each other form, by its name.

    Raises:
        RunError: it is more than rounding.
    """
    loss, grads = runners[0].call()
    found = {}
    for other in runners[1:]:
        other_loss, other_grads = other.call()
        apart = difference(runners[0].problem, loss, grads, other_loss, other_grads)
        tolerance = TOLERANCES[dtype]
        apart["tolerance"] = {"loss": tolerance.loss, "gradient": tolerance.of_gradient(case)}
        words = f"loss {apart['loss']:.1e} apart, gradient {apart['gradient']:.1e} ({apart['leaf']})"
        # A NaN is not within any tolerance.
        if not (apart["loss"] <= tolerance.loss and apart["gradient"] <= tolerance.of_gradient(case)):
            raise RunError(
                f"{case.name}: ours and the form '{other.name}' are not the same loss in {dtype}: {words}; at most "
                f"{tolerance.loss:.0e} and {tolerance.of_gradient(case):.0e} are rounding. Nothing was timed."
            )
        say(f"{other.name} and ours agree in {dtype}: {words}")
        found[other.name] = apart
    return found


def difference(
    problem: Problem, loss: Tensor, grads: Sequence[Tensor], other_loss: Tensor, other_grads: Sequence[Tensor]
) -> dict[str, Any]:
    """How far one form is from another, relative to the other: of the loss, and of the gradient in the worst leaf."""
    whole = sum(float(grad.double().square().sum()) for grad in other_grads) ** 0.5
    apart = {}
    for name, grad, other in zip(problem.leaves, grads, other_grads, strict=True):
        size = whole if name in problem.noughts else float(other.double().norm())
        distance = float((grad.double() - other.double()).norm())
        apart[name] = distance / size if size else distance
    worst = max(apart, key=lambda name: (apart[name] != apart[name], apart[name]))  # NaN is the worst
    apart_loss = abs(float(loss) - float(other_loss)) / max(abs(float(other_loss)), 1e-30)
    return {"loss": apart_loss, "gradient": apart[worst], "leaf": worst, "leaves": apart}


# ---- the rest of a step


def _step(
    backbone: Backbone,
    sizes: Sizes,
    forms: Sequence[Mapping[str, Any]],
    dtype: torch.dtype,
    device: torch.device,
    say: Say,
) -> dict[str, Any]:
    """One forward and backward pass of a backbone, and what share of the step each form of the loss has beside it."""
    net = build_backbone(backbone.name, **backbone.options)
    net.to(device, torch.float64 if dtype == torch.float64 else torch.float32).train()
    if device.type == "cuda":
        net.to(memory_format=torch.channels_last)
    passes = [_time_pass(net, one, dtype, device) for one in backbone.passes(sizes)]
    seconds = sum(entry["seconds"] for entry in passes)
    say(f"{backbone.title}: {seconds:.3g} s forward and backward")
    losses = {form["name"]: form["seconds"]["median"] for form in forms}
    return {
        "backbone": backbone.title,
        "passes": passes,
        "seconds": seconds,
        "activation_bytes": sum(entry["activation_bytes"] for entry in passes),
        "share": {name: loss / (loss + seconds) for name, loss in losses.items()},
        "ratio": {name: (loss + seconds) / (losses[OURS] + seconds) for name, loss in losses.items() if name != OURS},
    }


def _time_pass(net: nn.Module, one: Pass, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Time some of the images and scale; the bytes for backward are the slope between 2 and 4 images."""

    def images(count: int) -> Tensor:
        x = torch.rand(count, 3, one.side, one.side, device=device)
        x = x.to(torch.float64) if dtype == torch.float64 else x
        return x.to(memory_format=torch.channels_last) if device.type == "cuda" else x

    def run(x: Tensor) -> None:
        with _autocast(dtype, device), torch.set_grad_enabled(one.trains):
            features = net(x)
        if one.trains:
            features.float().square().sum().backward()
            net.zero_grad()

    with _autocast(dtype, device):
        each = (bytes_for_backward(net, images(4)) - bytes_for_backward(net, images(2))) // 2
    timed = min(one.count, max(2, _activation_budget(device) // each))
    run(images(2))
    x = images(timed)
    if device.type == "cuda":
        run(x)  # cuDNN chooses its algorithms for this size
        torch.cuda.synchronize(device)
    start = perf_counter()
    run(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    taken = perf_counter() - start
    return {
        "images": one.count,
        "side": one.side,
        "trains": one.trains,
        "images_timed": timed,
        "seconds": taken / timed * one.count,
        "activation_bytes_per_image": each if one.trains else 0,
        "activation_bytes": each * one.count if one.trains else 0,
    }


def _activation_budget(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return _ACTIVATIONS_ON_CPU


def _load() -> float | None:
    """Processes that wanted to run, on average over the last minute; None where nobody counts."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
