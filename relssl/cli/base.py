"""What the commands share: options, recipes by name, the log, progress, the command as it was typed."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.errors import ConfigError

arguments: list[str] = []  # of the command that runs, for the record

Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, as often as wanted")]
Out = Annotated[Path, typer.Option("--out", help="file to write")]
Force = Annotated[bool, typer.Option("--force", help="overwrite what is there")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]


def load(config: str, overrides: Sequence[str] | None) -> Any:
    """A recipe by file or by name."""
    from relssl.config import load_recipe
    from relssl.recipes import recipe_path

    given = list(overrides or [])
    for text in given:
        if "=" not in text:
            raise ConfigError(f"an override is key.sub=value, got {text!r}")
    is_file = Path(config).is_file() or (Path(config).suffix in (".yaml", ".yml") and Path(config).parent.is_dir())
    return load_recipe(config if is_file else recipe_path(config), given)


def set_up_log() -> None:
    """Lines with the time on standard error; coloured on a terminal, plain elsewhere."""
    logger = logging.getLogger("relssl")
    if logger.handlers:
        return
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(
            console=Console(stderr=True), show_path=False, show_level=False, omit_repeated_times=False
        )
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar with rate and time left on a terminal; nothing elsewhere, where the summary says it all."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def command_line() -> str:
    """The command that runs, as it can be typed again."""
    if "TORCHELASTIC_RUN_ID" in os.environ and arguments[:1] in (["train"], ["eval"]):
        launcher = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "-m"]
        module = ["relssl.train"] if arguments[0] == "train" else ["relssl", "eval"]
        return shlex.join([*launcher, *module, *arguments[1:]])
    return shlex.join(["relssl", *arguments])


def whole_numbers(text: str, option: str) -> list[int]:
    """Whole numbers, 0 or more, with commas between them."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [-1]
    if min(found) < 0:
        raise ConfigError(f"{option} takes whole numbers with commas between them, such as 1,2,3; got {text!r}")
    return found


def different_seeds(text: str) -> list[int]:
    """The seeds of --seeds: one that is given twice would count as two measurements."""
    seeds = whole_numbers(text, "--seeds")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds has a seed twice, and a spread is over different ones; got {text!r}")
    return seeds


def numbers(text: str, option: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} takes numbers with commas between them, such as 1,10; got {text!r}") from None
