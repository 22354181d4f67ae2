"""`relssl compare` and `relssl ls`: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.errors import ConfigError, InputError


def compare(
    runs: Annotated[list[Path], typer.Argument(help="run folders; seeds of one recipe share a row")],
    csv: Annotated[Path | None, typer.Option(help="write every figure here, one a line")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw a chart here: .svg, .png or .pdf")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write the table here as Markdown")] = None,
) -> None:
    """Runs side by side: a column for each protocol and data set, mean ± std over seeds."""
    from relssl import compare_output as output
    from relssl.bench.plot import check_plot_path
    from relssl.compare import compare as compare_runs
    from relssl.runfolder import write_atomically

    if plot is not None:
        check_plot_path(plot)
    for option, path in (("--csv", csv), ("--plot", plot), ("--markdown", markdown)):
        _check_place(option, path)
    for run in runs:
        _check_run(run)
    found = compare_runs(runs)
    written = []
    if csv is not None:
        write_atomically(csv, output.csv_text(found))
        written.append(f"csv: {csv}")
    if markdown is not None:
        write_atomically(markdown, output.markdown(found))
        written.append(f"markdown: {markdown}")
    if plot is not None:
        written.append(f"plot: {output.draw(found, plot)}")
    for part in (output.text(found), *written):
        typer.echo(part)


def _check_run(path: Path) -> None:
    """Say what was meant by a file of a run, or by a folder of runs."""
    from relssl.runfolder import RunFolder, runs_in

    if path.is_file():
        raise InputError(f"{path} is a file; give the folder of its run: {path.parent}")
    folder = RunFolder(path)
    if not (folder.config.is_file() or folder.results.is_file()) and (inside := runs_in(path)):
        raise InputError(f"{path} is not a run folder, but {len(inside)} lie in it; give them: {path}/*")


def _check_place(option: str, path: Path | None) -> None:
    """Refuse a file that cannot be written, before anything is read."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}; make it, or name another place")
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder; name the file to write")


def ls(runs: Annotated[Path, typer.Argument(help="folder with runs")] = Path("runs")) -> None:
    """List runs: method, data, epochs, state, best accuracies."""
    from relssl.listing import list_runs
    from relssl.report import format_table

    typer.echo(format_table(list_runs(runs)))
