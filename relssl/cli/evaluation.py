"""`relssl eval`: what a backbone is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from relssl.cli.base import Device, command_line, set_up_log, whole_numbers

eval_app = typer.Typer(help="Evaluate a backbone: by a paper's protocol, or quickly.", no_args_is_help=True)


@eval_app.command("knn")
def eval_knn(
    weights: Annotated[Path, typer.Option(help="run folder or backbone.safetensors")],
    train: Annotated[Path | None, typer.Option(help="labelled .beton; the run's own by default")] = None,
    test: Annotated[Path | None, typer.Option(help="labelled .beton; the run's own by default")] = None,
    k: Annotated[int | None, typer.Option(help="neighbours; the recipe's by default", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="the recipe's by default")] = None,
    random_init: Annotated[bool, typer.Option("--random-init", help="the weights that the run started from")] = False,
    device: Device = "auto",
) -> None:
    """Weighted kNN top-1 and top-5."""
    set_up_log()
    from relssl.evaluate import evaluate_knn, open_weights

    chosen = open_weights(weights, random_init=random_init)
    command = command_line()
    entry = evaluate_knn(chosen, train, test, k=k, temperature=temperature, device=device, command=command)
    show(entry, chosen.folder)


@eval_app.command("linear")
def eval_linear(
    weights: Annotated[Path, typer.Option(help="run folder or backbone.safetensors")],
    train: Annotated[Path | None, typer.Option(help="labelled .beton; the run's own by default")] = None,
    test: Annotated[Path | None, typer.Option(help="labelled .beton; the run's own by default")] = None,
    protocol: Annotated[str | None, typer.Option(help="the recipe's by default; cached takes seconds")] = None,
    setting: Annotated[list[str] | None, typer.Option(help="key=value of the protocol, as often as wanted")] = None,
    seeds: Annotated[str | None, typer.Option(help="seeds of the probe, e.g. 0,1,2")] = None,
    random_init: Annotated[bool, typer.Option("--random-init", help="the weights that the run started from")] = False,
    device: Device = "auto",
) -> None:
    """Linear evaluation on frozen features, by the method's own protocol unless told otherwise."""
    set_up_log()
    from relssl.config import apply_override
    from relssl.evaluate import evaluate_linear, open_weights

    options: dict[str, Any] = {}
    for text in setting or []:
        apply_override(options, text)
    chosen = open_weights(weights, random_init=random_init)
    entry = evaluate_linear(
        chosen,
        train,
        test,
        protocol=protocol,
        options=options,
        seeds=None if seeds is None else whole_numbers(seeds, "--seeds"),
        device=device,
        command=command_line(),
    )
    show(entry, chosen.folder)


def score_text(score: dict[str, Any] | None) -> str:
    """An accuracy of results.json in words."""
    if score is None:
        return "-"
    spread = f" ± {score['std']:.2f} ({len(score['values'])} seeds)" if len(score["values"]) > 1 else ""
    return f"{score['mean']:.2f} %{spread}"


def show(entry: dict[str, Any], folder: Path, more: Sequence[str] = ()) -> None:
    """Print an entry of results.json, what else there is to say, and where it all is."""
    num_test = "no" if entry["num_test"] is None else entry["num_test"]
    images = f"{entry['num_train']} train and {num_test} test images"
    line = f"{entry['evaluator']}, {entry['weights']} {entry['backbone']}, {images}"
    if entry["top1"] is not None:
        line += f": top-1 {score_text(entry['top1'])}, top-5 {score_text(entry['top5'])}"
    for text in (line, *more, f"results: {folder / 'results.json'}", f"next: relssl report {folder}"):
        typer.echo(text)
