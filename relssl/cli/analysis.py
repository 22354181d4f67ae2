"""`relssl eval probe|fewlabel|analyse`: what features are worth, in seconds, and what they look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.errors import ConfigError
from relssl.cli.base import Device, command_line, numbers, set_up_log, whole_numbers
from relssl.cli.evaluation import score_text


def eval_probe(
    weights: Annotated[Path, typer.Option(help="run folder or backbone.safetensors")],
    train: Annotated[Path | None, typer.Option(help="labelled .beton; the run's own by default")] = None,
    test: Annotated[Path | None, typer.Option(help="labelled .beton; the run's own by default")] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(help="lr=..., weight_decay=... or layer=..., values with commas between them, as often as wanted"),
    ] = None,
    setting: Annotated[list[str] | None, typer.Option(help="key=value of the probe, as often as wanted")] = None,
    seeds: Annotated[str, typer.Option(help="seeds of the probe, e.g. 0,1,2")] = "0",
    random_init: Annotated[bool, typer.Option("--random-init", help="the weights that the run started from")] = False,
    device: Device = "auto",
) -> None:
    """Many linear heads at once, picked on held-out training images, tested once: seconds."""
    set_up_log()
    from relssl.config import apply_override
    from relssl.evaluate import evaluate_probe, open_weights

    options: dict[str, Any] = {}
    for text in setting or []:
        apply_override(options, text)
    for text in grid or []:
        key, separator, values = text.partition("=")
        if not separator or not values:
            raise ConfigError(f"--grid takes lr=0.1,0.3 or weight_decay=... or layer=layer3,features; got {text!r}")
        options[key.strip()] = [value.strip() for value in values.split(",")]
    chosen = open_weights(weights, random_init=random_init)
    entry = evaluate_probe(
        chosen,
        train,
        test,
        options=options,
        seeds=whole_numbers(seeds, "--seeds"),
        device=device,
        command=command_line(),
    )
    _show(entry, chosen.folder, _probe_lines(entry))


def eval_fewlabel(
    weights: Annotated[Path, typer.Option(help="run folder or backbone.safetensors")],
    train: Annotated[Path | None, typer.Option(help="labelled .beton; the run's own by default")] = None,
    test: Annotated[Path | None, typer.Option(help="labelled .beton; the run's own by default")] = None,
    labels: Annotated[str | None, typer.Option(help="labels of each class, e.g. 1,10,100")] = None,
    percent: Annotated[str | None, typer.Option(help="percent of each class, e.g. 1,10")] = None,
    seeds: Annotated[str, typer.Option(help="a draw of labels for each")] = "0,1,2,3,4",
    random_init: Annotated[bool, typer.Option("--random-init", help="the weights that the run started from")] = False,
    device: Device = "auto",
) -> None:
    """Accuracy against the number of labels: logistic regression on class-balanced draws."""
    set_up_log()
    from relssl.evaluate import evaluate_few_labels, open_weights
    from relssl.evaluators.few_labels import Amount

    amounts = [Amount(per_class=k) for k in whole_numbers(labels, "--labels")] if labels else []
    amounts += [Amount(percent=p) for p in numbers(percent, "--percent")] if percent else []
    chosen = open_weights(weights, random_init=random_init)
    entry = evaluate_few_labels(
        chosen,
        train,
        test,
        amounts=amounts or None,
        seeds=whole_numbers(seeds, "--seeds"),
        device=device,
        command=command_line(),
    )
    _show(entry, chosen.folder, _curve_lines(entry))


def eval_analyse(
    weights: Annotated[Path, typer.Option(help="run folder or backbone.safetensors")],
    train: Annotated[Path | None, typer.Option(help=".beton, labelled or not; the run's own by default")] = None,
    test: Annotated[Path | None, typer.Option(help=".beton, labelled or not; the run's own by default")] = None,
    map: Annotated[str, typer.Option(help="umap, tsne, none, or auto: UMAP where it is installed")] = "auto",
    map_images: Annotated[int, typer.Option(help="images on the map, at most")] = 2000,
    seed: Annotated[int, typer.Option(help="of the map and the probe", min=0)] = 0,
    few_labels: Annotated[bool, typer.Option(help="the few-label curve too")] = True,
    random_init: Annotated[bool, typer.Option("--random-init", help="the weights that the run started from")] = False,
    device: Device = "auto",
) -> None:
    """Everything for the report: few labels, confusions, a map, neighbours, RankMe, uniformity, alignment."""
    set_up_log()
    from relssl.evaluate import analyse, open_weights
    from relssl.evaluate.few_labels import SEEDS

    chosen = open_weights(weights, random_init=random_init)
    entry = analyse(
        chosen,
        train,
        test,
        map_kind=None if map == "none" else map,  # type: ignore[arg-type]  # an unknown one is refused by name
        map_images=map_images,
        seed=seed,
        label_seeds=SEEDS if few_labels else (),
        device=device,
        command=command_line(),
    )
    _show(entry, chosen.folder, _analysis_lines(entry))


def _show(entry: dict[str, Any], folder: Path, more: Sequence[str]) -> None:
    """Print an entry of results.json, what else there is to say, and where it all is."""
    num_test = "no" if entry["num_test"] is None else entry["num_test"]
    images = f"{entry['num_train']} train and {num_test} test images"
    line = f"{entry['evaluator']}, {entry['weights']} {entry['backbone']}, {images}"
    if entry["top1"] is not None:
        line += f": top-1 {score_text(entry['top1'])}, top-5 {score_text(entry['top5'])}"
    for text in (line, *more, f"results: {folder / 'results.json'}", f"next: relssl report {folder}"):
        typer.echo(text)


def _probe_lines(entry: dict[str, Any]) -> list[str]:
    protocol, first = entry["protocol"], entry["picked"][0]
    several = len(entry["picked"]) > 1
    lines = [
        f"{f'seed {seed}: ' if several else ''}picked {_setting_text(picked, protocol)} of {len(picked['grid'])} heads "
        f"on {picked['num_held_out']} held-out training images ({picked['top1']:.2f} % there)"
        for seed, picked in zip(entry["seeds"], entry["picked"], strict=True)
    ]
    lines.append(
        f"tested after training it again on all {entry['num_train']}"
        if protocol["refit"]
        else f"tested as trained on the other {first['num_fit']}"
    )
    edges = sorted({axis for picked in entry["picked"] for axis in picked["at_edge"]})
    lines += [f"the best {axis} lies at the edge of the grid: widen it with --grid {axis}=..." for axis in edges]
    check, seconds = entry["check"], entry["seconds"]
    lines.append(f"check: {check['name']}, top-1 {score_text(check['top1'])}")
    lines.append(f"time: features {seconds['features']:.1f} s, probe {seconds['probe']:.1f} s")
    return lines


def _setting_text(picked: dict[str, Any], protocol: dict[str, Any]) -> str:
    layer = f", layer {picked['layer']}" if len(protocol["layer"]) > 1 else ""
    return f"lr {picked['lr']:g}, weight decay {picked['weight_decay']:g}{layer}"


def _curve_lines(entry: dict[str, Any]) -> list[str]:
    rows = [["labels", "images", "top-1, %", "draws"]]
    for point in entry["curve"]:
        top1 = point["top1"]
        amount = f"{point['percent']:g} %" if point["percent"] is not None else f"{point['per_class']} a class"
        spread = f" ± {top1['std']:.2f}" if len(top1["values"]) > 1 else ""
        rows.append([amount, f"{point['images']}", f"{top1['mean']:.2f}{spread}", str(len(top1["values"]))])
    from relssl.report import format_table

    return [format_table(rows)]


def _analysis_lines(entry: dict[str, Any]) -> list[str]:
    free = entry["label_free"]
    rank = f"RankMe {free['rankme']:.1f} of {free['features']} ({free['rankme_images']} images)"
    pairs = f"uniformity {free['uniformity']:.3f}, alignment {free['alignment']:.3f} ({free['pairs']} images)"
    lines = [f"{rank}, {pairs}"]
    if "classifier" in entry:
        lines.append(f"fast probe: top-1 {entry['classifier']['top1']:.2f} %")
        lines += [
            f"  {row['class']} taken for {row['taken_for']}: {row['images']} of {row['of']}"
            for row in entry["most_confused"][:3]
        ]
    return lines + [f"files: {', '.join(entry['files'].values())}", f"time: {entry['seconds']:.1f} s"]
