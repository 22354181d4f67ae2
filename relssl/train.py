"""The trainer. Read it from top to bottom: set up, the loop, the end of an epoch, one update.

    relssl train CONFIG [key.sub=value ...] --out RUN
    accelerate launch -m relssl.train CONFIG [key.sub=value ...] --out RUN

Training is a function of (config, data, world size): every random number is keyed by its place, so the only state
is parameters, buffers, optimizer, gradient scaler and position, and a run that was killed ends where it would have.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import parse_flag_from_env
from filelock import FileLock, Timeout
from torch import Tensor, nn

from pipelines.batch import ViewBatch
from pipelines.errors import ConfigError, InputError, MissingExtraError, RelsslError, RunError
from pipelines.loader import ViewLoader
from relssl import checkpoint, dist
from relssl.build import build_method, make_optimizer, make_schedule
from relssl.checkpoint import Position, Saved
from relssl.config import Recipe
from relssl.dist import mix
from relssl.encode import encode, feature_loader
from relssl.methods.base import DataInfo, Method, Step
from relssl.online import OnlineEvaluator, Stopped
from relssl.progress import Rate, Stopwatch, duration
from relssl.runfolder import RunFolder, changed_settings
from relssl.sheets import draw_views
from relssl.weights import save_backbone

log = logging.getLogger("relssl.train")

EXIT_REQUEUE = 75
_AGREE_EVERY = 5  # updates between agreements of several ranks to stop: launchers wait 30 s before they kill
_ESTIMATE_UPDATES = 3  # the first warms up, the others are timed
_ESTIMATE_FROM = 50  # shorter runs are over before an estimate would pay
_UNREADABLE = 0.01  # share of the images, as the loader allows in training
_A_MOMENT = 0.3  # seconds: `relssl eval --follow` looks at the lock now and then
_WORTH_A_LINE = 2.0  # seconds of preparing an epoch
# Names of a record in metrics.jsonl that are the trainer's own.
_RESERVED = frozenset({"kind", "update", "epoch", "loss", "lr", "images_per_second", "seconds", "unreadable_images"})
_COLLAPSED = 1e-5  # spread of equal rows; untrained networks have 0.01 and more


def train(recipe: Recipe, out: Path, *, resume: bool = False, command: str = "relssl train") -> int:
    """Train a recipe into a run folder; every rank calls it.

    Args:
        out: the run folder; a new one unless `resume`.
        resume: continue from the newest whole checkpoint in `out`, from the start if there is none.
        command: recorded in env.json.

    Returns:
        The exit code: 0, 75 after SIGUSR1, 128 + n after signal n (a checkpoint has been written).

    Raises:
        ConfigError, InputError: before the first update.
        RunError: a loss or another measure that is not finite, or collapsed features; the last checkpoint is from
            before.
    """
    AcceleratorState._reset_state()  # it would hold a second run in this process to the first one's precision
    if recipe.train.tensorboard and find_spec("tensorboard") is None:
        raise MissingExtraError("train.tensorboard needs TensorBoard: install the extra `track`, or set it to false")
    # Accelerate reads this variable only in Accelerator itself, and the first state made decides on the processes.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=dist.PATIENCE)
    accelerator = Accelerator(
        mixed_precision=mixed_precision(recipe.train.precision, state.device),
        log_with="tensorboard" if recipe.train.tensorboard else None,
        project_dir=str(out),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    folder = RunFolder(out)
    with contextlib.ExitStack() as stack:
        _on_main(accelerator, lambda: stack.enter_context(_claimed(folder, recipe, resume)))
        stack.enter_context(_LogFile(folder.log, accelerator.is_main_process))
        signals = stack.enter_context(StopSignals())
        trainer = stack.enter_context(contextlib.closing(Trainer(recipe, folder, accelerator, resume)))
        if accelerator.is_main_process:
            folder.describe(recipe, command, data_identity(trainer.loader))
        return trainer.run(signals)


class Trainer:
    """One run on one rank: builds everything in `__init__`, trains in `run`."""

    def __init__(self, recipe: Recipe, folder: RunFolder, accelerator: Accelerator, resume: bool):
        self.recipe, self.folder, self.accelerator = recipe, folder, accelerator
        self.is_main, self.device = accelerator.is_main_process, accelerator.device
        self.seed = recipe.train.seed
        self.dtype = torch.float64 if recipe.train.precision == "fp64" else torch.float32
        wanted = recipe.train.channels_last
        channels_last = self.device.type == "cuda" if wanted == "auto" else wanted
        self.loader = ViewLoader(
            recipe.data.train,
            recipe.views.specs(),
            global_batch=recipe.train.batch_size,
            num_micro=recipe.train.num_micro,
            engine=recipe.data.engine,
            resize=recipe.data.resize,
            device=self.device,
            seed=self.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            drop_last=recipe.train.drop_last,
            dtype=self.dtype,
            channels_last=channels_last,
            workers=recipe.data.workers,
        )
        self.per_epoch = self.loader.updates_per_epoch
        self.total = self.per_epoch * recipe.train.epochs
        self.method = build_method(recipe, data_info(recipe, self.loader)).to(self.device, self.dtype)
        if channels_last:
            self.method.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(recipe.optim, self.method)
        self.schedule = make_schedule(recipe.optim, self.per_epoch, self.total, recipe.train.batch_size)
        self.ddp, self.optimizer = accelerator.prepare(self.method, self.optimizer)
        if recipe.train.compile:
            self.method.encoder.compile()
        self.names = {id(p): name for name, p in self.method.named_parameters()}
        self.position = self._restore() if resume else Position()
        self.latest: dict[str, Tensor] = {}  # metrics of the last update
        dist.assert_equal_across_ranks(chain(self.method.named_parameters(), self.method.named_buffers()))
        online = recipe.eval.online
        self.online = OnlineEvaluator(recipe, self.device, self.dtype) if online is not None else None

    def run(self, signals: StopSignals) -> int:
        """Train from the current position to the end, or to a signal."""
        self._announce()
        sheet = self.folder.path / "views.png"
        if self.is_main and not sheet.exists():
            draw_views(self.recipe, sheet)
        if self.recipe.train.tensorboard:
            self.accelerator.init_trackers("relssl")
        self.stopwatch, self.rate = Stopwatch(self.device), Rate(self.total, self.position.total)
        if not self.method.TRAINS:
            return self._keep_initial_weights(signals)
        self.method.train()
        while self.position.epoch < self.recipe.train.epochs:
            epoch = self.position.epoch
            if self.position.update == 0:
                self._before_epoch()
            for metrics in self._updates():
                if self._is_report():
                    self._report(metrics)
                if signals.agreed(self.device, due=self._is_report() or self.position.total % _AGREE_EVERY == 0):
                    self._save()
                    return self._stopped(signals)
            if self._end_epoch(epoch, signals):
                self._save()
                return self._stopped(signals)
        self._finish()
        return 0

    def _before_epoch(self) -> None:
        start = perf_counter()
        try:
            self.method.before_epoch(self._step(), self._encode_train)
        except RunError as error:
            self._give_up(str(error))
        if (taken := perf_counter() - start) > _WORTH_A_LINE:
            self._say(f"epoch {self.position.epoch}: prepared in {duration(taken)}")

    def _updates(self) -> Iterator[dict[str, Tensor]]:
        """Run the rest of the epoch, one update at a time; `position` has moved when the metrics come out."""
        self.loader.set_position(self.position.epoch, self.position.update)
        batches = iter(self.loader)
        try:
            for update in range(self.position.update, self.per_epoch):
                micro_batches = islice(batches, self.recipe.train.num_micro)
                metrics = self.latest = self._run_update(micro_batches, self.loader.sizes[update])
                self.position = Position(self.position.epoch, update + 1, self.position.total + 1)
                self.rate.count(self.loader.sizes[update])
                every = self.recipe.train.checkpoint.every_updates
                if every is not None and self.position.total % every == 0:
                    self._save()
                yield metrics
        finally:
            batches.close()  # type: ignore[attr-defined]

    def _run_update(self, micro_batches: Iterable[ViewBatch], num_images: int) -> dict[str, Tensor]:
        return run_update(
            self.ddp,
            self.optimizer,
            micro_batches,
            self._step(),
            schedule=self.schedule,
            num_images=num_images,
            clip_norm=self.recipe.train.clip_norm,
            accelerator=self.accelerator,
            stopwatch=self.stopwatch,
        )

    def _step(self) -> Step:
        return Step(
            update=self.position.total,
            epoch=self.position.epoch,
            num_micro=self.recipe.train.num_micro,
            seed=self.seed,
        )

    def _end_epoch(self, epoch: int, signals: StopSignals) -> bool:
        """Whether a signal asks the run to end here.

        The checkpoint comes before the evaluation, which may take long: a run that ends meanwhile has lost nothing, and
        makes the evaluation when it is resumed.
        """
        done = epoch + 1
        last, stop = done == self.recipe.train.epochs, False
        every = self.recipe.train.checkpoint.every_epochs
        if last or (every is not None and done % every == 0):
            self._save()
        if self.online is not None and (due := self.online.due(done, last=last)):
            with self.stopwatch.on_host("evaluate"), self.rate.paused():
                whole = self._evaluate(done, due, signals)
            stop = signals.agreed(self.device, due=True)
            if not whole:
                return True
        if self.is_main:
            checkpoint.mark_evaluated(self.folder.checkpoints, self.position.total)
        self.position = Position(done, 0, self.position.total)
        return stop and not last  # what is left to do after the last epoch is soon done

    def _evaluate(self, epoch: int, due: Sequence[str], signals: StopSignals) -> bool:
        """Whether it was not cut short by a signal; of one that was nothing is recorded. The same on every rank."""
        assert self.online is not None
        records: list[dict[str, Any]] = []
        whole = True
        try:
            records = self.online.run(self.method.evaluated, due, stop=lambda: signals.received is not None)
        except Stopped:
            whole = False
        whole = bool(dist.gather(torch.tensor([whole], device=self.device)).all())
        if not whole:
            self._say(f"epoch {epoch}: the evaluation was cut short and will be made when the run goes on")
        for record in records:
            if "problem" in record:
                self._say(f"epoch {epoch}: {record['evaluator']} not evaluated: {record['problem']}")
            else:
                self._record({"kind": "eval", "update": self.position.total, "epoch": epoch, **record})
        return whole

    def _keep_initial_weights(self, signals: StopSignals) -> int:
        if self.online is not None and not self._evaluate(0, self.online.due(0, last=True), signals):
            signals.agreed(self.device, due=True)
            return self._stopped(signals)
        self._finish()
        return 0

    def _finish(self) -> None:
        if self.is_main:
            save_backbone(self.folder.backbone, self.method.evaluated, self.recipe, self.position.epoch)
        if self.online is not None:
            self.online.neighbour_sheet(self.method.evaluated, self.folder.path / "neighbours.png")
        if self.recipe.train.tensorboard:
            self.accelerator.end_training()
        self._say(f"done: {self.position.total} updates. The backbone is {self.folder.backbone}")

    # -- state ---------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write a checkpoint on the main process; the others wait for it.

        Raises:
            RunError: training went wrong, or a parameter or buffer is not finite; the last good checkpoint stays.
        """
        with self.rate.paused():
            if self.latest:
                self._check_metrics(self.latest)
            self._check_state()
            if self.is_main:
                scaler, position = self.accelerator.scaler, self.position
                ends_epoch = position.update == self.per_epoch  # and its evaluation is still to come
                extra = {"scaler": None if scaler is None else scaler.state_dict(), "data": self._data_identity()}
                saved = Saved(
                    self.method.state_dict(),
                    checkpoint.optimizer_tensors(self.optimizer, self.names),
                    Position(position.epoch + 1, 0, position.total) if ends_epoch else position,
                    {**extra, "evaluated": not ends_epoch},
                )
                checkpoint.save(self.folder.checkpoints, saved, keep=self.recipe.train.checkpoint.keep)
            self.accelerator.wait_for_everyone()

    def _check_state(self) -> None:
        state = chain(self.method.named_parameters(), self.method.named_buffers())
        tensors = {name: t.detach() for name, t in state if t.is_floating_point()}
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors.values()))])
        bad = dist.gather(~norms.isfinite()[None]).any(0)
        if bool(bad.any()):
            named = [name for name, is_bad in zip(tensors, bad.tolist(), strict=True) if is_bad]
            others = f" and {len(named) - 1} others" if len(named) > 1 else ""
            self._give_up(f"{named[0]}{others} of the model's state is not finite")

    def _give_up(self, what: str) -> NoReturn:
        found = checkpoint.list_checkpoints(self.folder.checkpoints)
        raise RunError(
            f"{what} at update {self.position.total}. The last good checkpoint is {found[-1] if found else 'none'}. "
            "Lower optim.lr, lengthen the warm-up, or try train.precision=fp32"
        )

    def _data_identity(self) -> dict[str, Any]:
        return data_identity(self.loader)

    def _restore(self) -> Position:
        found = checkpoint.list_checkpoints(self.folder.checkpoints)
        if not found:
            self._say("no checkpoint yet: starting from the beginning")
            if self.is_main:
                self.folder.forget_metrics_after(-1)
            return Position()
        path, saved = self._newest_readable(found)
        if saved.extra["data"] != self._data_identity():
            raise InputError(
                f"{self.recipe.data.train} is not the data that {path} was trained on: expected "
                f"{saved.extra['data']['images']} images with the same content, got {len(self.loader.files)}. "
                "Restore the data, or start a new run with --out"
            )
        checkpoint.load_model(self.method, saved.model, str(path))
        checkpoint.load_optimizer(self.optimizer, self.names, saved.optimizer)
        if self.accelerator.scaler is not None and saved.extra.get("scaler"):
            self.accelerator.scaler.load_state_dict(saved.extra["scaler"])
        position = saved.position
        if self._is_to_be_evaluated(path, saved):
            position = Position(position.epoch - 1, self.per_epoch, position.total)
        if self.is_main:  # where the evaluation at this very update was not finished, it is made anew
            self.folder.forget_metrics_after(position.total, evaluations_too=position.update == self.per_epoch)
        self.accelerator.wait_for_everyone()
        return position

    def _is_to_be_evaluated(self, path: Path, saved: Saved) -> bool:
        """Whether the evaluation of the epoch that a checkpoint ends was not finished. As the main process sees it."""
        pending = not saved.extra.get("evaluated", True) and not checkpoint.is_evaluated(path)
        return bool(dist.broadcast(torch.tensor([pending], device=self.device)))

    def _newest_readable(self, found: list[Path]) -> tuple[Path, Saved]:
        for path in reversed(found):
            try:
                return path, checkpoint.load(path)
            except InputError as error:
                problem = error
                self._say(f"passing over a damaged checkpoint: {error}")
        raise problem

    def _encode_train(self) -> Tensor:
        with contextlib.closing(
            feature_loader(
                self.loader.files,
                self.recipe.eval_spec(),
                batch_size=self.recipe.eval.batch_size,
                device=self.device,
                dtype=self.dtype,
                engine=self.recipe.data.engine,
                resize=self.recipe.data.resize,
                workers=self.recipe.data.workers,
                max_unreadable=_UNREADABLE,
            )
        ) as loader:
            return encode(self.method.encoder, loader)[0].float()

    # -- words and numbers ---------------------------------------------------------------------------------------

    def _announce(self) -> None:
        recipe, loader = self.recipe, self.loader
        if not self.method.TRAINS:
            self._say(f"{recipe.method_name} trains nothing: {recipe.backbone.name} keeps its initial weights")
            return
        self._say(
            f"{recipe.method_name} with {recipe.backbone.name} on {len(loader.files)} images: "
            f"{recipe.train.epochs} epochs of {self.per_epoch} updates of {recipe.train.batch_size} images, "
            f"on {self.accelerator.num_processes} process(es), {self.device}, "
            f"{self._precision()}"
        )
        self._say_what_may_surprise()
        self._say(f"engine: {loader.engine_name} ({loader.engine_reason})")
        if self.position.total:
            self._say(f"resuming at epoch {self.position.epoch}, update {self.position.update} of {self.per_epoch}")
        left = self.total - self.position.total
        if left >= _ESTIMATE_FROM:
            self._say(f"estimated time: {duration(left * self._seconds_per_update())} for {left} updates")

    def _precision(self) -> str:
        if self.dtype == torch.float64:
            return "fp64"
        return "fp32" if self.accelerator.mixed_precision == "no" else self.accelerator.mixed_precision

    def _say_what_may_surprise(self) -> None:
        images, used = len(self.loader.files), sum(self.loader.sizes)
        if images - used > 0.05 * images:
            self._say(f"note: {images - used} of {images} images are left out of each epoch; train.batch_size is large")
        keys = self.recipe.method.get("queue_size", 0)
        if keys > 4 * images:
            self._say(
                f"note: the queue of {keys} keys is {keys / images:.0f} times the data set; lower method.queue_size"
            )

    def _seconds_per_update(self) -> float:
        """Time a few real updates, then put everything back as it was."""
        before = Saved(
            {k: v.detach().cpu().clone() for k, v in self.method.state_dict().items()},
            {k: v.cpu().clone() for k, v in checkpoint.optimizer_tensors(self.optimizer, self.names).items()},
            self.position,
        )
        scaler = self.accelerator.scaler
        scale = None if scaler is None else scaler.state_dict()
        self.method.train()
        self.stopwatch = Stopwatch(self.device)
        self.loader.set_position(self.position.epoch, 0)
        batches = iter(self.loader)
        seconds = []
        for _ in range(min(_ESTIMATE_UPDATES, self.per_epoch)):
            start = perf_counter()
            metrics = self._run_update(islice(batches, self.recipe.train.num_micro), self.loader.sizes[0])
            float(metrics["loss"])  # wait for the device
            seconds.append(perf_counter() - start)
        batches.close()  # type: ignore[attr-defined]
        checkpoint.load_model(self.method, before.model, "the state before the estimate")
        checkpoint.load_optimizer(self.optimizer, self.names, before.optimizer)
        if scaler is not None and scale is not None:
            scaler.load_state_dict(scale)
        return min(seconds)

    def _is_report(self) -> bool:
        return self.position.total % self.recipe.train.log_every == 0 or self.position.total == self.total

    def _report(self, metrics: dict[str, Tensor]) -> None:
        values = self._check_metrics(metrics)
        record = {
            "kind": "train",
            "update": self.position.total,
            "epoch": round(self.position.epoch + self.position.update / self.per_epoch, 6),
            "loss": values.pop("loss"),
            "lr": self.schedule(self.position.total - 1),
            "images_per_second": round(self.rate.take(), 2),
            "seconds": self.stopwatch.take(),
            **values,
        }
        if self.loader.num_unreadable:
            record["unreadable_images"] = self.loader.num_unreadable
        self._record(record)

    def _check_metrics(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Metrics as numbers, averaged over ranks.

        Raises:
            RunError: one is not finite, or features have collapsed to one point.
        """
        stacked = torch.stack([value.detach() for value in metrics.values()])
        stacked = dist.all_reduce_sum(stacked) / dist.world_size()
        values = dict(zip(metrics, stacked.tolist(), strict=True))
        for name, value in values.items():
            if not math.isfinite(value):
                self._give_up(f"the {name.replace('_', ' ')} is {value}")
            if name.endswith("_spread") and value < _COLLAPSED:
                tensor = name.removesuffix("_spread")
                self._give_up(
                    f"the {tensor} collapsed: its rows point the same way for every image (spread {value:.1e}, "
                    "where 1 is all over the sphere)"
                )
        return values

    def _record(self, record: dict[str, Any]) -> None:
        if not self.is_main:
            return
        self.folder.append_metrics(record)
        if self.recipe.train.tensorboard:
            numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "update"}
            self.accelerator.log({f"{record['kind']}/{k}": v for k, v in numbers.items()}, step=record["update"])
        if record["kind"] == "eval":
            shown = "  ".join(f"{k} {v:.2f}" for k, v in record.items() if isinstance(v, float))
            name = "" if record["evaluator"] in record else f"{record['evaluator']}  "
            images = f"  ({record['num_train']} images)" if "num_train" in record else ""
            self._say(f"epoch {record['epoch']}: {name}{shown}{images}")
        else:
            left = duration(self.rate.seconds_left(self.position.total))
            self._say(
                f"update {record['update']}/{self.total}  epoch {record['epoch']:.2f}  loss {record['loss']:.4f}  "
                f"lr {record['lr']:.4g}  {record['images_per_second']:.0f} images/s  {left} left"
            )

    def _say(self, line: str) -> None:
        if self.is_main:
            log.info(line)

    def _stopped(self, signals: StopSignals) -> int:
        written = "a checkpoint is written" if self.method.TRAINS else "there is nothing to keep yet"
        self._say(
            f"stopped at update {self.position.total} of {self.total} by {signals.name}; {written}. "
            f"Go on with: relssl train {self.folder.config} --out {self.folder.path} --resume auto"
        )
        return signals.exit_code

    def close(self) -> None:
        """End the threads of the loaders and close the data."""
        self.loader.close()
        if self.online is not None:
            self.online.close()


def run_update(
    ddp: nn.Module,
    optimizer: Any,
    micro_batches: Iterable[ViewBatch],
    step: Step,
    *,
    schedule: Callable[[int], float],
    num_images: int,
    clip_norm: float | None = None,
    accelerator: Accelerator | None = None,
    stopwatch: Stopwatch | None = None,
) -> dict[str, Tensor]:
    """One update of the parameters: forward and backward of each micro-batch, then one optimizer step.

    Args:
        ddp: the method, wrapped by DistributedDataParallel or not.
        micro_batches: `step.num_micro` batches of this rank.
        step: `update`, `epoch`, `num_micro` and `seed` are read; `micro` is filled in here.
        schedule: update -> learning rate.
        num_images: images of the global batch over all ranks and micro-batches.
        clip_norm: largest norm of the gradient.
        accelerator: None runs without autocast and gradient scaler, as tests do.

    Returns:
        Metrics as 0-d tensors, averaged over micro-batches; `loss` is this rank's mean over its images.
    """
    method = ddp.module if hasattr(ddp, "module") else ddp
    assert isinstance(method, Method)
    stopwatch = stopwatch or Stopwatch(torch.device("cpu"))
    for group in optimizer.param_groups:
        group["lr"] = schedule(step.update)
    totals: dict[str, Tensor] = {}
    batches = iter(micro_batches)
    for micro in range(step.num_micro):
        with stopwatch.on_host("wait"):
            batch = next(batches)
        here = Step(step.update, step.epoch, micro, step.num_micro, step.seed)
        torch.manual_seed(mix(step.seed, step.update, micro, dist.rank()))
        syncs = here.is_last_micro or not hasattr(ddp, "no_sync")
        with contextlib.nullcontext() if syncs else ddp.no_sync():  # type: ignore[operator]
            with stopwatch.measure("forward"):
                loss, metrics = _checked_return(ddp(batch, here), method)
            with stopwatch.measure("backward"):
                # DDP averages over ranks; the update is the mean over all images of the global batch.
                share = loss * (len(batch) * dist.world_size() / num_images)
                share.backward() if accelerator is None else accelerator.backward(share)
        for name, value in {"loss": loss.detach(), **metrics}.items():
            totals[name] = totals.get(name, 0) + value / step.num_micro
    with stopwatch.measure("optimizer"):
        if clip_norm is not None:
            clip = nn.utils.clip_grad_norm_ if accelerator is None else accelerator.clip_grad_norm_
            clip(method.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not getattr(optimizer, "step_was_skipped", False):
            method.after_update(step)
    return totals


def _checked_return(returned: Any, method: Method) -> tuple[Tensor, dict[str, Tensor]]:
    """What a method's forward gave back, if it is what the trainer goes on with; metrics without gradient."""

    def is_scalar(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() == 0

    name = type(method).__module__
    whole = isinstance(returned, tuple) and len(returned) == 2 and is_scalar(returned[0])
    if not whole or not isinstance(returned[1], dict) or not all(map(is_scalar, returned[1].values())):
        raise RunError(
            f"{name}.forward gave {_shape_of(returned)}; expected a loss, 0-d, and a dictionary of 0-d tensors"
        )
    loss, metrics = returned
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise RunError(f"{name}.forward gave a loss without gradient; expected one that depends on the parameters")
    if taken := sorted(_RESERVED & metrics.keys()):
        raise RunError(f"{name}.forward gave a metric called {taken[0]!r}, a name of the trainer's own; choose another")
    return loss, {key: value.detach() for key, value in metrics.items()}


def _shape_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_shape_of, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_shape_of(inner)}' for key, inner in value.items())}}}"
    return type(value).__name__


def data_info(recipe: Recipe, loader: ViewLoader) -> DataInfo:
    """What the method may know of the data."""
    labels = loader.files.labels
    return DataInfo(
        num_samples=len(loader.files),
        num_classes=int(labels.max()) + 1 if (labels >= 0).all() else None,
        global_batch=recipe.train.batch_size,
        total_updates=loader.updates_per_epoch * recipe.train.epochs,
        updates_per_epoch=loader.updates_per_epoch,
    )


def data_identity(loader: ViewLoader) -> dict[str, Any]:
    """What a checkpoint remembers of its data: a run is only resumed on the same images."""
    return {"images": len(loader.files), "hash": loader.files.content_hash}


class StopSignals:
    """Ctrl-C, SIGTERM and SIGUSR1 ask for a checkpoint and an orderly end; a second Ctrl-C ends at once.

    The loop asks `agreed` after updates and evaluations; an evaluation of the main process looks at `received`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def agreed(self, device: torch.device, *, due: bool) -> bool:
        """Whether to stop now. Several ranks agree on it every few updates (when `due`), so that all stop together."""
        if dist.world_size() == 1:
            return self.received is not None
        if not due:
            return False
        number = int(dist.gather(torch.tensor([self.received or 0], device=device)).max())
        if number:
            self.received = number
        return bool(number)

    @property
    def name(self) -> str:
        return signal.Signals(self.received).name if self.received else "no signal"

    @property
    def exit_code(self) -> int:
        assert self.received is not None
        requeue = getattr(signal, "SIGUSR1", None)
        return EXIT_REQUEUE if self.received == requeue else 128 + self.received


class _LogFile:
    """Send the log of a run to its log.txt while it trains."""

    def __init__(self, path: Path, wanted: bool):
        self.handler = logging.FileHandler(path, encoding="utf-8") if wanted else logging.NullHandler()
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def __enter__(self) -> None:
        logger = logging.getLogger("relssl")
        logger.addHandler(self.handler)
        if logger.level == logging.NOTSET:  # used as a library: the file is wanted all the same
            logger.setLevel(logging.INFO)

    def __exit__(self, *exc: object) -> None:
        logging.getLogger("relssl").removeHandler(self.handler)
        self.handler.close()


def _on_main(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Do something on the main process; when it is refused there, every process stops with the same code."""
    error: RelsslError | None = None
    if accelerator.is_main_process:
        try:
            action()
        except RelsslError as refused:
            error = refused
    code = torch.tensor([0 if error is None else error.exit_code], device=accelerator.device)
    code = dist.gather(code).max()
    if error is not None:
        raise error
    if code:
        silent = RelsslError("")  # the main process says why
        silent.exit_code = int(code)
        raise silent


@contextlib.contextmanager
def _claimed(folder: RunFolder, recipe: Recipe, resume: bool) -> Iterator[None]:
    """Hold a run folder for this run alone.

    Raises:
        ConfigError: another process trains into it, it holds a run that is not to be resumed, or one with another
            configuration.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.path / ".lock", timeout=_A_MOMENT)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"another process is training into {folder.path}; choose another folder with --out") from None
    try:
        holds_a_run = folder.metrics.is_file() or folder.backbone.is_file()
        if holds_a_run or checkpoint.list_checkpoints(folder.checkpoints):
            if not resume:
                raise ConfigError(
                    f"{folder.path} holds a run already; continue it with --resume auto, or choose another folder "
                    "with --out"
                )
            folder.check_method_file(recipe)
            if changed := changed_settings(folder.recipe(), recipe):
                raise ConfigError(
                    f"{folder.path} was started with another configuration; a resumed run must be the same one. "
                    f"Changed: {'; '.join(changed)}. Choose another folder with --out, or restore these settings."
                )
        yield
    finally:
        lock.release()


def mixed_precision(precision: str, device: torch.device) -> str:
    """Accelerate's name. `auto` is bfloat16 on GPUs that have it (compute capability 8.0 on), else float16.

    Raises:
        ConfigError: float16 on a CPU, which has neither the speed nor a gradient scaler.
    """
    if precision == "auto":
        if device.type != "cuda":
            return "no"
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision=fp16 needs a GPU; on a CPU use fp32 or bf16")
    return precision if precision in ("bf16", "fp16") else "no"


if __name__ == "__main__":
    from relssl.cli import main

    main(["train", *sys.argv[1:]])
