"""`relssl eval`: what a backbone is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.errors import ConfigError, RelsslError
from relssl.cli.base import Device, command_line, different_seeds, load, set_up_log, whole_numbers

eval_app = typer.Typer(
    help="Evaluate a backbone: by a paper's protocol, or quickly. With several GPUs: accelerate launch -m relssl eval",
    no_args_is_help=True,
)

WeightsOption = Annotated[
    Path | None, typer.Option("--weights", help="run folder, one of its checkpoints, or backbone.safetensors")
]
Train = Annotated[Path | None, typer.Option("--train", help="labelled .beton; the run's own by default")]
Test = Annotated[Path | None, typer.Option("--test", help="labelled .beton; the run's own by default")]
Percent = Annotated[
    float | None, typer.Option("--percent", help="labels of this share of the training images, equal for every class")
]
SubsetList = Annotated[
    Path | None, typer.Option("--subset", help="labels of the training images that this list names, one per line")
]
Draw = Annotated[int, typer.Option("--draw", help="which draw of --percent", min=0)]
Like = Annotated[str | None, typer.Option("--recipe", help="another recipe whose eval section and normalisation hold")]
RandomInit = Annotated[bool, typer.Option("--random-init", help="the weights that the run started from")]
Follow = Annotated[
    Path | None, typer.Option("--follow", help="a run in training, instead of --weights: every checkpoint as it comes")
]
Setting = Annotated[list[str] | None, typer.Option("--setting", help="key=value of the protocol, as often as wanted")]
Seeds = Annotated[str | None, typer.Option("--seeds", help="e.g. 0,1,2; the recipe's by default")]


@eval_app.command("knn")
def eval_knn(
    weights: WeightsOption = None,
    train: Train = None,
    test: Test = None,
    protocol: Annotated[str | None, typer.Option(help="dino, resa, resa_cifar; the recipe's by default")] = None,
    k: Annotated[str | None, typer.Option(help="neighbours, e.g. 20 or 10,20,100")] = None,
    temperature: Annotated[float | None, typer.Option(help="the protocol's by default")] = None,
    percent: Percent = None,
    subset: SubsetList = None,
    draw: Draw = 0,
    recipe: Like = None,
    random_init: RandomInit = False,
    follow: Follow = None,
    device: Device = "auto",
) -> None:
    """Weighted kNN top-1 and top-5, for one k or several."""
    ks = None if k is None else whole_numbers(k, "--k")

    def evaluate(chosen: Any) -> list[dict[str, Any]]:
        from relssl.evaluate import Portion, evaluate_knn

        portion = Portion(percent, subset, draw)
        options: dict[str, Any] = {"protocol": protocol, "k": ks, "temperature": temperature}
        return evaluate_knn(chosen, train, test, **options, portion=portion, device=device, command=command_line())

    run_evaluation("knn", evaluate, weights, follow, recipe, random_init=random_init)


@eval_app.command("linear")
def eval_linear(
    weights: WeightsOption = None,
    train: Train = None,
    test: Test = None,
    protocol: Annotated[str | None, typer.Option(help="the recipe's by default; cached takes seconds")] = None,
    setting: Setting = None,
    seeds: Seeds = None,
    percent: Percent = None,
    subset: SubsetList = None,
    draw: Draw = 0,
    head: Annotated[
        list[Path] | None, typer.Option(help="test this saved head, without training; one for each seed")
    ] = None,
    recipe: Like = None,
    random_init: RandomInit = False,
    follow: Follow = None,
    device: Device = "auto",
) -> None:
    """Linear evaluation on frozen features, by the method's own protocol unless told otherwise."""
    options, chosen_seeds = settings_of(setting), seeds_of(seeds)
    if head:
        given: dict[str, Any] = {"--train": train, "--protocol": protocol, "--setting": setting, "--seeds": seeds}
        given |= {"--percent": percent, "--subset": subset, "--draw": draw or None, "--follow": follow}
        if useless := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"--head tests what was trained before; leave {', '.join(useless)} out")

    def evaluate(chosen: Any) -> list[dict[str, Any]]:
        from relssl.evaluate import Portion, evaluate_heads, evaluate_linear

        if head:
            return [evaluate_heads(chosen, head, test, device=device, command=command_line())]
        entry = evaluate_linear(
            chosen,
            train,
            test,
            protocol=protocol,
            options=options,
            seeds=chosen_seeds,
            portion=Portion(percent, subset, draw),
            device=device,
            command=command_line(),
        )
        return [entry]

    run_evaluation("linear", evaluate, weights, follow, recipe, random_init=random_init)


@eval_app.command("finetune")
def eval_finetune(
    weights: WeightsOption = None,
    train: Train = None,
    test: Test = None,
    protocol: Annotated[str | None, typer.Option(help="the recipe's by default")] = None,
    setting: Setting = None,
    seeds: Seeds = None,
    percent: Percent = None,
    subset: SubsetList = None,
    draw: Draw = 0,
    recipe: Like = None,
    random_init: RandomInit = False,
    follow: Follow = None,
    device: Device = "auto",
) -> None:
    """Train backbone and linear head on labelled images: all, 1 %, 10 %, or a published list."""
    options, chosen_seeds = settings_of(setting), seeds_of(seeds)

    def evaluate(chosen: Any) -> list[dict[str, Any]]:
        from relssl.evaluate import Portion, evaluate_finetune

        entry = evaluate_finetune(
            chosen,
            train,
            test,
            protocol=protocol,
            options=options,
            seeds=chosen_seeds,
            portion=Portion(percent, subset, draw),
            device=device,
            command=command_line(),
        )
        return [entry]

    run_evaluation("finetune", evaluate, weights, follow, recipe, random_init=random_init)


@eval_app.command("retrieval")
def eval_retrieval(
    weights: WeightsOption = None,
    train: Annotated[Path | None, typer.Option(help="the gallery, a labelled .beton; the run's own by default")] = None,
    test: Annotated[Path | None, typer.Option(help="the queries, a labelled .beton; the run's own by default")] = None,
    within: Annotated[bool, typer.Option("--within", help="no gallery: queries among the other queries")] = False,
    k: Annotated[str, typer.Option(help="of recall@k")] = "1,5,10",
    sheet: Annotated[Path | None, typer.Option(help="picture to draw; retrieval.png beside the weights")] = None,
    queries: Annotated[int, typer.Option(help="queries on the picture; 0: no picture", min=0)] = 10,
    percent: Percent = None,
    subset: SubsetList = None,
    draw: Draw = 0,
    recipe: Like = None,
    random_init: RandomInit = False,
    follow: Follow = None,
    device: Device = "auto",
) -> None:
    """Image retrieval: mAP, recall@k, and a picture of queries with their neighbours."""
    ks = whole_numbers(k, "--k")
    if follow is not None and sheet is not None:
        raise ConfigError("--follow draws a picture for each checkpoint, beside the run; leave --sheet out")

    def evaluate(chosen: Any) -> list[dict[str, Any]]:
        from relssl.evaluate import Portion, evaluate_retrieval

        entry = evaluate_retrieval(
            chosen,
            train,
            test,
            k=ks,
            within=within,
            portion=Portion(percent, subset, draw),
            sheet=sheet,
            num_queries=queries,
            device=device,
            command=command_line(),
        )
        return [entry]

    run_evaluation("retrieval", evaluate, weights, follow, recipe, random_init=random_init)


def settings_of(given: list[str] | None) -> dict[str, Any]:
    from relssl.config import apply_override

    options: dict[str, Any] = {}
    for text in given or []:
        apply_override(options, text)
    return options


def seeds_of(given: str | None) -> list[int] | None:
    return None if given is None else different_seeds(given)


def run_evaluation(
    evaluator: str,
    evaluate: Callable[[Any], list[dict[str, Any]]],
    weights: Path | None,
    follow: Path | None,
    recipe: str | None,
    *,
    random_init: bool,
    details: Callable[[dict[str, Any]], Sequence[str]] = lambda entry: (),
) -> None:
    """Evaluate what was asked for, and say what came of it.

    Args:
        evaluator: as its entries in results.json call it.
        evaluate: takes `Weights` and returns entries.
        details: lines of an entry beyond its scores.
    """
    if (weights is None) == (follow is None):
        raise ConfigError("give either --weights RUN, or --follow RUN to evaluate a run's checkpoints as they come")
    if follow is not None and random_init:
        raise ConfigError("--follow evaluates checkpoints and --random-init none of them; give one")
    set_up_log()
    other = None if recipe is None else load(recipe, None)
    from relssl import dist
    from relssl.evaluate import evaluated_as, follow_run, open_weights
    from relssl.evaluate.processes import join_processes
    from relssl.runfolder import read_results

    def entries_of(chosen: Any) -> list[dict[str, Any]]:
        read_results(chosen.folder)  # if they are damaged, it is better known before the work than after it
        return evaluate(chosen if other is None else evaluated_as(chosen, other))

    def say(entries: Sequence[dict[str, Any]]) -> None:
        typer.echo("\n".join([_found(entries), *(line for entry in entries for line in details(entry))]))

    join_processes(evaluator, follows=follow is not None)
    try:
        if follow is not None:
            count = follow_run(
                follow, lambda chosen: say(entries_of(chosen)), evaluator=evaluator, command=command_line()
            )
            typer.echo(f"{count} checkpoints evaluated")
            _say_where(follow)
            return
        assert weights is not None
        chosen = open_weights(weights, random_init=random_init)
        entries = entries_of(chosen)
        if dist.rank() == 0:
            say(entries)
            typer.echo(_data(entries[0]))
            _say_where(chosen.folder)
    except KeyboardInterrupt:
        left = "" if follow is None else "; the same command goes on with the checkpoints that are left"
        typer.echo(f"relssl: interrupted; what was written before is kept{left}", err=True)
        _leave_others(130)
        raise typer.Exit(130) from None
    except RelsslError as error:
        if dist.world_size() > 1:
            typer.echo(f"relssl: {error}", err=True)
            _leave_others(error.exit_code)
        raise


def _leave_others(code: int) -> None:
    """End this one of several processes: the others may wait for it where it will never come."""
    from relssl import dist

    if dist.world_size() > 1:
        dist.shutdown(code, agreed=False)


def _say_where(folder: Path) -> None:
    typer.echo(f"results: {folder / 'results.json'}\nnext: relssl report {folder}")


def _found(entries: Sequence[dict[str, Any]]) -> str:
    """What was found: in one line, or a line for each of several protocols on the same images."""
    first = entries[0]
    train = "" if first["num_train"] is None else f"{first['num_train']} train and "
    test = "no" if first["num_test"] is None else first["num_test"]
    checkpoint = "" if first["update"] is None else f" at update {first['update']}"
    what = f"{first['evaluator']}, {first['weights']} {first['backbone']}{checkpoint}"
    what += f", {train}{test} test images"
    if len(entries) == 1:
        scores = _scores(first)
        return f"{what}: {scores} ({_protocol(first)})" if scores else what
    return "\n".join([what, *(f"  {_protocol(entry)}: {_scores(entry)}" for entry in entries)])


def _protocol(entry: dict[str, Any]) -> str:
    """Its name, and which epoch it reports where that need not be the one that the log ends with."""
    protocol = entry["protocol"]
    name, epochs = str(protocol["name"]), protocol.get("epochs") or 0
    trained = entry["evaluator"] in ("linear", "finetune") and not name.endswith(", saved head")
    selects = trained and protocol.get("select") == "best" and epochs > 1
    return f"{name}, best of {epochs} epochs" if selects else name


def _scores(entry: dict[str, Any]) -> str:
    """Empty where an evaluation has none of its own, such as a curve."""
    if entry["top1"] is None and not entry.get("scores"):
        return ""
    scores = entry.get("scores") or {"top-1": entry["top1"], "top-5": entry["top5"]}
    return ", ".join(f"{name} {score_text(score)}" for name, score in scores.items())


def score_text(score: dict[str, Any] | None) -> str:
    """A score of results.json in words."""
    if score is None:
        return "-"
    spread = f" ± {score['std']:.2f} ({len(score['values'])} seeds)" if len(score["values"]) > 1 else ""
    return f"{score['mean']:.2f} %{spread}"


def _data(entry: dict[str, Any]) -> str:
    """Which data was used for what: it need not be the same."""
    from relssl.report import pretraining_text

    subset = "" if entry["subset"] is None else f" ({entry['subset']})"
    use = {"knn": "neighbours from", "retrieval": "gallery", "analysis": "features of"}.get(
        entry["evaluator"], "trained on"
    )
    trained = "" if entry["train"] is None else f"; {use} {entry['train']}{subset}"
    picture = "" if entry.get("picture") is None else f"\npicture: {entry['picture']}"
    picture += f"\nsaved: {', '.join(entry['saved'])}" if entry.get("saved") else ""
    return f"{pretraining_text(entry)}{trained}; tested on {entry['test']}{picture}"
