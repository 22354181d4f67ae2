"""`relssl eval probe|fewlabel|analyse`: what features are worth, in seconds, and what they look like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.errors import ConfigError
from relssl.cli.base import Device, command_line, different_seeds, numbers, whole_numbers
from relssl.cli.evaluation import (
    Draw,
    Follow,
    Like,
    Percent,
    RandomInit,
    Setting,
    SubsetList,
    Test,
    Train,
    WeightsOption,
    run_evaluation,
    score_text,
    settings_of,
)


def eval_probe(
    weights: WeightsOption = None,
    train: Train = None,
    test: Test = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(help="lr=..., weight_decay=... or layer=..., values with commas between them, as often as wanted"),
    ] = None,
    setting: Setting = None,
    seeds: Annotated[str, typer.Option(help="seeds of the probe, e.g. 0,1,2")] = "0",
    percent: Percent = None,
    subset: SubsetList = None,
    draw: Draw = 0,
    recipe: Like = None,
    random_init: RandomInit = False,
    follow: Follow = None,
    device: Device = "auto",
) -> None:
    """Many linear heads at once, picked on held-out training images, tested once: seconds."""
    options, chosen_seeds = settings_of(setting), different_seeds(seeds)
    for text in grid or []:
        key, separator, values = text.partition("=")
        if not separator or not values:
            raise ConfigError(f"--grid takes lr=0.1,0.3 or weight_decay=... or layer=layer3,features; got {text!r}")
        options[key.strip()] = [value.strip() for value in values.split(",")]

    def evaluate(chosen: Any) -> list[dict[str, Any]]:
        from relssl.evaluate import Portion, evaluate_probe

        portion = Portion(percent, subset, draw)
        given: dict[str, Any] = {"options": options, "seeds": chosen_seeds, "portion": portion}
        return [evaluate_probe(chosen, train, test, **given, device=device, command=command_line())]

    run_evaluation("probe", evaluate, weights, follow, recipe, random_init=random_init, details=_probe_lines)


def eval_fewlabel(
    weights: WeightsOption = None,
    train: Train = None,
    test: Test = None,
    labels: Annotated[str | None, typer.Option(help="labels of each class, e.g. 1,10,100")] = None,
    percent: Annotated[
        str | None, typer.Option(help="percent of the images, equally many of each class, e.g. 1,10")
    ] = None,
    seeds: Annotated[str, typer.Option(help="a draw of labels for each")] = "0,1,2,3,4",
    subset: Annotated[Path | None, typer.Option(help="draw from the images that this list names, one per line")] = None,
    recipe: Like = None,
    random_init: RandomInit = False,
    follow: Follow = None,
    device: Device = "auto",
) -> None:
    """Accuracy against the number of labels: logistic regression on class-balanced draws."""
    chosen_seeds = different_seeds(seeds)
    numbers_of_labels = whole_numbers(labels, "--labels") if labels else []
    percentages = numbers(percent, "--percent") if percent else []

    def evaluate(chosen: Any) -> list[dict[str, Any]]:
        from relssl.evaluate import Portion, evaluate_few_labels
        from relssl.evaluators.few_labels import Amount

        amounts = [*(Amount(per_class=k) for k in numbers_of_labels), *(Amount(percent=p) for p in percentages)]
        given: dict[str, Any] = {"amounts": amounts or None, "seeds": chosen_seeds, "portion": Portion(listing=subset)}
        return [evaluate_few_labels(chosen, train, test, **given, device=device, command=command_line())]

    run_evaluation("fewlabel", evaluate, weights, follow, recipe, random_init=random_init, details=_curve_lines)


def eval_analyse(
    weights: WeightsOption = None,
    train: Annotated[Path | None, typer.Option(help=".beton, labelled or not; the run's own by default")] = None,
    test: Annotated[Path | None, typer.Option(help=".beton, labelled or not; the run's own by default")] = None,
    map: Annotated[str, typer.Option(help="umap, tsne, none, or auto: UMAP where it is installed")] = "auto",
    map_images: Annotated[int, typer.Option(help="images on the map, at most")] = 2000,
    seed: Annotated[int, typer.Option(help="of the map and the probe", min=0)] = 0,
    few_labels: Annotated[bool, typer.Option(help="the few-label curve too")] = True,
    recipe: Like = None,
    random_init: RandomInit = False,
    follow: Follow = None,
    device: Device = "auto",
) -> None:
    """Everything for the report: few labels, confusions, a map, neighbours, RankMe, uniformity, alignment."""

    def evaluate(chosen: Any) -> list[dict[str, Any]]:
        from relssl.evaluate import analyse
        from relssl.evaluate.few_labels import SEEDS

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
        return [entry]

    run_evaluation("analysis", evaluate, weights, follow, recipe, random_init=random_init, details=_analysis_lines)


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
