"""The folder of a run: `config.yaml env.json metrics.jsonl log.txt checkpoints/ backbone.safetensors results.json`.

A run that continues somebody else's has `imported.json` besides.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipelines.errors import ConfigError, InputError
from relssl.config import Recipe, read_yaml, recipe_from

# Settings that may differ when a run is resumed: they do not touch a single number of the training.
RESUMABLE = (
    "about",
    "data.workers",
    "data.test",
    "data.probe",
    "train.log_every",
    "train.tensorboard",
    "train.checkpoint",
    "eval",
)
RESULTS_FORMAT = 1
_SHOWN = 3  # folders that a message names
# What tells one entry of results.json from another.
_IDENTITY = (
    *("evaluator", "weights", "weights_file", "epochs", "update", "protocol", "seeds"),
    *("train", "test", "subset", "view", "training_views", "data"),
)


class RunFolder:
    """Paths of a run and what is written into them. Only the main process writes."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def method_file(self) -> Path:
        return self.path / "method.py"

    def method_place(self, recipe: Recipe) -> str:
        """What `load_method` takes: the run's own copy of a method file, or the method's name."""
        return str(self.method_file) if self.method_file.is_file() else str(recipe.method["name"])

    @property
    def environment(self) -> Path:
        return self.path / "env.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def backbone(self) -> Path:
        return self.path / "backbone.safetensors"

    @property
    def imported(self) -> Path:
        """Where the run's first checkpoint comes from, of a run that others began (`relssl import --full`)."""
        return self.path / "imported.json"

    def provenance(self) -> dict[str, Any] | None:
        """What `imported.json` says; None for a run that was begun here.

        Raises:
            InputError: it is damaged.
        """
        if not self.imported.is_file():
            return None
        try:
            return dict(json.loads(self.imported.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.imported} is damaged: {error}; restore it, or delete it") from None

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    def recipe(self) -> Recipe:
        """The resolved configuration of the run.

        Raises:
            InputError: this is not the folder of a run.
        """
        if not self.config.is_file():
            raise InputError(f"{self.path} is not a run folder: it has no config.yaml{_instead(self.path)}")
        return recipe_from(read_yaml(self.config), str(self.config))

    def describe(self, recipe: Recipe, command: str, data: Mapping[str, Any] | None = None) -> None:
        """Write config.yaml and env.json, and keep a method file of one's own.

        Args:
            data: the content hash and the number of images of the training data, as `train.data_identity` gives them.
                Data without a hash are told by their place.
        """
        write_atomically(self.config, recipe.to_yaml())
        if str(recipe.method["name"]).endswith(".py"):
            write_atomically(self.method_file, Path(recipe.method["name"]).read_text(encoding="utf-8"))
        told: dict[str, Any] = {"command": command, **environment()}
        if data is not None:
            told["training_data"] = dict(data)
            if not data.get("hash"):
                told["training_data"]["files"] = _resolved(recipe.data.train)
        write_atomically(self.environment, json.dumps(told, indent=1))

    def training_data(self) -> dict[str, Any] | None:
        """`hash` and number of `images` of what the run was trained on, and its `files` where it has no hash.

        From env.json; of a run that did not write it there, from the newest checkpoint. None where neither says it.
        """
        try:
            told = json.loads(self.environment.read_text(encoding="utf-8"))["training_data"]
        except (OSError, ValueError, KeyError, TypeError):
            told = self._data_of_checkpoint()
        return told if isinstance(told, dict) else None

    def _data_of_checkpoint(self) -> Any:
        """Of its JSON alone: reading a checkpoint whole takes torch, and the time for all its tensors."""
        states = sorted(self.checkpoints.glob("update-*/state.json"))
        try:
            return json.loads(states[-1].read_text(encoding="utf-8"))["extra"]["data"]
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return None

    def check_method_file(self, recipe: Recipe) -> None:
        """Refuse to go on with a method file that is not the one the run was started with.

        Raises:
            ConfigError: it was changed.
        """
        name, kept = str(recipe.method["name"]), self.method_file
        if not (kept.is_file() and name.endswith(".py")):
            return
        if kept.read_text(encoding="utf-8") != Path(name).read_text(encoding="utf-8"):
            raise ConfigError(
                f"{name} has changed since {self.path} was started, whose copy is {kept}; a resumed run must be the "
                "same one. Choose another folder with --out, or restore the file."
            )

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl; a line cut by a kill is left out."""
        records = []
        if self.metrics.is_file():
            for line in self.metrics.read_text(encoding="utf-8").splitlines():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:
                    continue
        return records

    def forget_metrics_after(self, update: int, *, evaluations_too: bool = False) -> None:
        """Drop records past a checkpoint: the resumed run writes them again.

        `evaluations_too` drops the evaluations at the checkpoint's own update as well.
        """

        def past(record: dict[str, Any]) -> bool:
            at = record.get("update", 0)
            return at > update or (evaluations_too and at == update and record.get("kind") == "eval")

        kept = [record for record in self.read_metrics() if not past(record)]
        write_atomically(self.metrics, "".join(json.dumps(r) + "\n" for r in kept))

    def add_result(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Put an entry into results.json; an earlier one of the same protocol, weights and data is replaced.

        Several evaluations may do so at once: each waits until the other has written.

        Returns:
            The entry as it will be read.
        """

        def key(e: Mapping[str, Any]) -> tuple[Any, ...]:
            imported = e.get("imported") or {}
            return (*(e.get(k) for k in _IDENTITY), imported.get("sha256"), imported.get("branch"))

        added = json.loads(json.dumps(entry))  # lists, where tuples were
        with FileLock(self.path / ".results.lock"):
            entries = [e for e in read_results(self.path) if key(e) != key(added)] + [added]
            write_atomically(self.results, json.dumps({"format": RESULTS_FORMAT, "results": entries}, indent=1))
        return dict(added)


def runs_in(folder: Path) -> list[Path]:
    """The run folders that lie in a folder, sorted; none where there is no such folder."""
    return sorted(path.parent for path in folder.glob("[!.]*/config.yaml"))


def _instead(folder: Path) -> str:
    """What could have been meant by a folder that is no run."""
    checkpoints = sorted(folder.glob("update-*"))
    found = checkpoints or runs_in(folder)
    if not found:
        return ""
    shown = ", ".join(map(str, found[:_SHOWN])) + (", ..." if len(found) > _SHOWN else "")
    if checkpoints:
        return f". It holds checkpoints: give one of {shown}; or their run, {folder.parent}"
    return f". It holds runs: give one of {shown}"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The entries of a results.json, none when it does not exist."""
    path = folder / "results.json"
    if not path.is_file():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["results"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a results file of relssl: {error}; move it away to start a new one") from None


def changed_settings(old: Recipe, new: Recipe) -> list[str]:
    """Settings that differ and may not, as `key: old -> new`."""
    before, after = flat_settings(old.model_dump(mode="json")), flat_settings(new.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == free or key.startswith(free + ".") for free in RESUMABLE)
    ]


def flat_settings(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"section.key": value}."""
    if not isinstance(values, dict):
        return {prefix: values}
    out: dict[str, Any] = {}
    for key, value in values.items():
        out.update(flat_settings(value, f"{prefix}.{key}" if prefix else str(key)))
    return out


def _resolved(places: str | list[str]) -> list[str]:
    return [str(Path(place).resolve()) for place in (places if isinstance(places, list) else [places])]


def environment() -> dict[str, Any]:
    """What a figure needs beside it: versions, processor, devices, threads, date."""
    import torch

    from relssl._version import __version__

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "relssl": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "started": now(),
        "argv": sys.argv,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of one."""
    work = path.with_name(f".{path.name}.writing")
    with work.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(work, path)
