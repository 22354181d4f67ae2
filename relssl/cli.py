"""The program `relssl`: each verb is a thin shell over the library.

Nothing heavy is imported before a verb needs it, so `relssl --help` answers at once.
"""

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

from pipelines.errors import ConfigError, RelsslError
from relssl import share_cores

_arguments: list[str] = []  # of the command that runs, for the record

app = typer.Typer(
    name="relssl",
    help="Train and evaluate relational self-supervised learning, fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
eval_app = typer.Typer(help="Evaluate a backbone: knn, linear.", no_args_is_help=True)
app.add_typer(eval_app, name="eval")
bench_app = typer.Typer(help="Measure and prove: views, losses, parity.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

# Verbs and evaluators of later versions: refused by name, so that nobody looks for a spelling mistake.
PLANNED = ("import", "export", "compare", "ls")
PLANNED_PARTS = {
    "eval": (("finetune", "retrieval", "probe"), "knn, linear"),
    "bench": (("step", "budget"), "losses, parity, views"),
}

# Click's base of usage errors. Typer carries click inside itself in some versions and depends on it in others.
_UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, as often as wanted")]
Out = Annotated[Path, typer.Option("--out", help="file to write")]
Force = Annotated[bool, typer.Option("--force", help="overwrite what is there")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; ends the process with its exit code."""
    share_cores()
    arguments = list(sys.argv[1:] if argv is None else argv)
    code = run(arguments)
    if "torch" in sys.modules:
        from relssl import dist

        dist.shutdown(code, agreed=code != 1)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command; the exit code: 0 ok, 1 failed, 2 usage or config, 3 input refused, 128+n after signal n."""
    _arguments[:] = arguments
    try:
        _refuse_planned(arguments)
        code = app(args=arguments, prog_name="relssl", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except RelsslError as error:
        _say_error(str(error))
        return error.exit_code
    except _UsageError as error:
        error.show()
        return 2
    except typer.Exit as error:
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        _say_error("interrupted")
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output has gone, as after `relssl configs | head`
            sys.stderr.close()
            return 141
        _say_error(f"{error}; what was written before is kept")
        return 1


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="folder, archive or archive/folder of images, list file, folder or archive of a published data set, or"
            " its name: cifar10 cifar100 stl10 tiny-imagenet slimagenet64 digits"
        ),
    ],
    out: Annotated[Path, typer.Argument(help="the .beton file to write")],
    format: Annotated[str, typer.Option(help="what the source is, where its path does not say")] = "auto",
    split: Annotated[
        str, typer.Option(help="of a published data set: train, test, val, unlabeled, train+unlabeled, as it has them")
    ] = "train",
    root: Annotated[Path | None, typer.Option(help="folder of the downloaded data set, or of a list's images")] = None,
    download: Annotated[bool, typer.Option("--download", help="fetch the data set when it is not there")] = False,
    url: Annotated[str | None, typer.Option(help="download from here instead of the published address")] = None,
    checksum: Annotated[bool, typer.Option(help="compare a published archive with its MD5")] = True,
    labels: Annotated[bool, typer.Option(help="folder names are classes")] = True,
    coarse: Annotated[bool, typer.Option("--coarse", help="the 20 super-classes of CIFAR-100")] = False,
    resolution: Annotated[int | None, typer.Option(help="reduce the short side to this many pixels")] = None,
    mode: Annotated[str | None, typer.Option(help="jpg or raw")] = None,
    quality: Annotated[int, typer.Option(help="JPEG quality of images that are encoded anew")] = 95,
    window: Annotated[tuple[float, float] | None, typer.Option(help="LOW HIGH of 16-bit images")] = None,
    workers: Annotated[int | None, typer.Option(help="threads; all cores by default")] = None,
    masks: Annotated[
        Path | None, typer.Option(help="folder of pictures called like the images: 128 or more is foreground")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="an unreadable image or mask is an error")] = False,
    force: Force = False,
) -> None:
    """Convert images to one .beton file. Unreadable images are skipped and listed."""
    from dataset_tools.convert import convert_source

    with progress_bar("downloading, then converting" if download else "converting") as progress:
        done = convert_source(
            source,
            out,
            format=format,
            split=split,
            root=root,
            download=download,
            url=url,
            checksum=checksum,
            labels=labels,
            coarse=coarse,
            resolution=resolution,
            mode=mode,
            quality=quality,
            window=window,
            workers=workers,
            strict=strict,
            force=force,
            masks=masks,
            progress=lambda count, total, size: progress(count, total),
        )
    typer.echo(done.text())


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="a .beton file")],
    decode: Annotated[bool | None, typer.Option(help="decode every image too")] = None,
) -> None:
    """Check a .beton file against its manifest, every byte of it."""
    from dataset_tools.verify import verify as check

    with progress_bar("verifying") as progress:
        found = check(file, decode=decode, progress=progress)
    typer.echo(found.text())
    found.raise_if_damaged()


@app.command()
def saliency(
    data: Annotated[Path, typer.Argument(help="a .beton file")],
    out: Annotated[
        Path | None, typer.Argument(help="the .beton file to write: the same images with masks; none: only --sheet")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="draw images, saliency and masks to this picture")] = None,
    images: Annotated[int, typer.Option(help="how many images on the sheet, evenly spaced", min=1)] = 40,
    workers: Annotated[int | None, typer.Option(help="threads; all cores by default")] = None,
    force: Force = False,
) -> None:
    """Find what is foreground in each image, without training, for views with `mask_p`. Writes a new file."""
    if out is None and sheet is None:
        raise ConfigError("nothing to do: name the .beton file to write, or a picture with --sheet, or both")
    if out is not None:
        from dataset_tools.masks import add_masks

        with progress_bar("finding the foreground") as progress:
            done = add_masks(data, out, workers=workers, force=force, progress=progress)
        typer.echo(done.text())
    if sheet is not None:
        from relssl.sheets import draw_saliency

        typer.echo(f"sheet: {draw_saliency(data, sheet, num_images=images)}")


@app.command()
def configs(
    copy: Annotated[str | None, typer.Option(help="put this recipe into the current folder")] = None,
    force: Force = False,
) -> None:
    """List the recipes, or copy one."""
    from relssl.recipes import list_recipes, recipe_path

    if copy is None:
        for name in list_recipes():
            typer.echo(name)
        typer.echo(
            "next: relssl configs --copy NAME, or relssl train NAME data.train=FILE.beton data.test=null", err=True
        )
        return
    path = recipe_path(copy)
    target = Path(path.name)
    if target.exists() and not force:
        raise ConfigError(f"{target} exists; use --force to overwrite it")
    target.write_bytes(path.read_bytes())
    typer.echo(f"{target} is a copy of {copy}\nnext: relssl train {target} data.train=FILE.beton data.test=null")


@app.command()
def validate(
    config: Annotated[str, typer.Argument(help="recipe name or YAML file")], overrides: Overrides = None
) -> None:
    """Check a recipe without any data."""
    recipe = load(config, overrides)
    for until, plan in recipe.views.specs():
        phase = "" if until is None else f" until epoch {until}"
        sizes = ", ".join(f"{spec.count} x {spec.name} {spec.size} px" for spec in plan)
        typer.echo(f"views{phase}: {sizes}")
    typer.echo(
        f"{config} is valid: {recipe.method['name']}, {recipe.backbone.name}, {recipe.train.epochs} epochs, "
        f"batch {recipe.train.batch_size}"
    )


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from relssl.config import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=1))


@app.command()
def doctor() -> None:
    """Say what this machine has and what is missing."""
    from relssl.doctor import doctor as check
    from relssl.doctor import format_checks, has_problem

    checks = check()
    for line in format_checks(checks):
        typer.echo(line)
    if has_problem(checks):
        raise typer.Exit(1)


@app.command()
def views(
    config: Annotated[str, typer.Argument(help="recipe name or YAML file")],
    overrides: Overrides = None,
    out: Out = Path("views.png"),
    images: Annotated[int, typer.Option(help="how many images")] = 8,
    draws: Annotated[int, typer.Option(help="rows per image, each another draw")] = 1,
    epoch: Annotated[int, typer.Option(help="whose views")] = 0,
) -> None:
    """Draw a sheet of the views that a recipe makes of its training images."""
    recipe = load(config, overrides)
    from relssl.sheets import draw_views

    typer.echo(f"views: {draw_views(recipe, out, num_images=images, epoch=epoch, num_draws=draws)}")


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="recipe name or YAML file")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="run folder; runs/<recipe> by default")] = None,
    resume: Annotated[str, typer.Option(help="auto: go on from the newest checkpoint in --out, if any")] = "never",
    seeds: Annotated[str | None, typer.Option(help="several runs, e.g. 1,2,3: folders <out>-seed1, ...")] = None,
) -> int:
    """Train a recipe. With several GPUs: accelerate launch -m relssl.train CONFIG ..."""
    if resume not in ("never", "auto"):
        raise ConfigError(f"--resume is auto or never, got {resume!r}")
    folder = out or Path("runs") / config.removesuffix(".yaml").removeprefix("configs/").replace("/", "-").lstrip(".-")
    chosen = None if seeds is None else _whole_numbers(seeds, "--seeds")
    runs = [(folder, [])] if chosen is None else [(Path(f"{folder}-seed{s}"), [f"train.seed={s}"]) for s in chosen]
    recipes = [load(config, [*(overrides or []), *extra]) for _, extra in runs]
    set_up_log()
    from relssl import dist
    from relssl.train import train as train_recipe

    command = command_line()
    code = 0
    for recipe, (place, _) in zip(recipes, runs, strict=True):
        code = train_recipe(recipe, place, resume=resume == "auto", command=command)
        if code:
            break
        if dist.rank() == 0:
            _after_training(recipe, place)
    return code


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
    _show(entry, chosen.folder)


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
        seeds=None if seeds is None else _whole_numbers(seeds, "--seeds"),
        device=device,
        command=command_line(),
    )
    _show(entry, chosen.folder)


@bench_app.command("views")
def bench_views(
    data: Annotated[list[Path], typer.Argument(help=".beton file; several are one data set")],
    case: Annotated[list[str] | None, typer.Option(help="2x224, 5sizes, cifar-k32, a recipe; repeatable")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="auto or an engine's name; repeatable")] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="decode, ffcv, pil, torchvision-v2, kornia, none; all by default")
    ] = None,
    measure: Annotated[list[str] | None, typer.Option(help="crops or views; both by default")] = None,
    baseline_data: Annotated[
        list[Path] | None, typer.Option(help="the file that the peers read, such as the JPEGs of a raw file")
    ] = None,
    cores: Annotated[int | None, typer.Option(help="bind everybody to so many cores; all by default")] = None,
    batch: Annotated[int, typer.Option(help="images of a batch")] = 64,
    repeats: Annotated[int, typer.Option(help="rounds; in each everybody makes one pass")] = 5,
    seconds: Annotated[float, typer.Option(help="how long one pass should take")] = 2.0,
    device: Device = "auto",
    resize: Annotated[str, typer.Option(help="antialias, or area for the ffcv engine")] = "antialias",
    step: Annotated[str | None, typer.Option(help="a recipe: how much of its training step is waiting")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every number here")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw a chart here: .svg, .png or .pdf")] = None,
) -> None:
    """Images per second, beside PIL, torchvision v2, stock FFCV and kornia in the same run."""
    set_up_log()
    from relssl.bench.record import check_outputs
    from relssl.bench.table import text
    from relssl.bench.views import Settings, write_outputs
    from relssl.bench.views import bench_views as measure_views

    check_outputs(json_file, plot)
    settings = Settings(
        data=data,
        baseline=baseline_data or (),
        cases=case or ("2x224",),
        engines=engine or ("auto",),
        peers=None if peer is None else [name for name in peer if name != "none"],
        measures=measure or ("crops", "views"),
        cores=cores,
        batch=batch,
        repeats=repeats,
        seconds=seconds,
        device=device,
        resize=resize,
        step=step,
    )
    result = measure_views(settings, command=command_line())
    typer.echo(text(result))
    for path in write_outputs(result, json_file, plot):
        typer.echo(f"written: {path}")


@bench_app.command("losses")
def bench_losses(
    case: Annotated[
        list[str] | None, typer.Option(help="relation-cat, nt-xent, ressl-5crop, ...; repeatable, all by default")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="NAME=NUMBER instead of a published size, such as queue=4096; repeatable")
    ] = None,
    dtype: Annotated[str, typer.Option(help="of features, rows and queue: fp32, bf16, fp16, fp64")] = "fp32",
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(help="of torch; as many as it takes by itself by default")] = None,
    rounds: Annotated[int, typer.Option(help="in each every form takes its turn")] = 7,
    seconds: Annotated[float, typer.Option(help="how long a turn should be, one call at least")] = 0.5,
    step: Annotated[bool, typer.Option(help="time the published backbone beside each loss")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every number here")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw a chart here: .svg, .png or .pdf")] = None,
) -> None:
    """Time and memory of the losses, beside the textbook's form in the same run; exits 1 when they differ."""
    set_up_log()
    from relssl.bench.loss_table import text
    from relssl.bench.losses import Settings, size_settings, write_outputs
    from relssl.bench.losses import bench_losses as measure_losses
    from relssl.bench.record import check_outputs

    check_outputs(json_file, plot)
    settings = Settings(
        cases=case,
        sizes=size_settings(size or ()),
        dtype=dtype,
        device=device,
        threads=threads,
        rounds=rounds,
        seconds=seconds,
        step=step,
    )
    result = measure_losses(settings, command=command_line())
    typer.echo(text(result))
    for path in write_outputs(result, json_file, plot):
        typer.echo(f"written: {path}")


@bench_app.command("parity")
def bench_parity(
    file: Annotated[
        Path | None,
        typer.Argument(help="a .beton whose images are used; by default photographs of scikit-learn and matplotlib"),
    ] = None,
    images: Annotated[int, typer.Option(help="at most so many images of the file", min=1)] = 48,
    engine: Annotated[list[str] | None, typer.Option(help="only this engine, as often as wanted")] = None,
    device: Annotated[str, typer.Option(help="auto (the CPU, and CUDA where there is one), cpu, cuda, ...")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything to this file")] = None,
    markdown: Annotated[Path | None, typer.Option(help="a page whose table for these images is written anew")] = None,
) -> None:
    """Compare every engine and colour path with PIL and torchvision; exits 1 when one is off."""
    set_up_log()
    from relssl.bench.parity import bench_parity as run_parity

    passed = run_parity(
        file,
        num_images=images,
        engines=engine,
        device=device,
        json_file=json_file,
        markdown=markdown,
        command=command_line(),
        echo=typer.echo,
    )
    if not passed:
        raise typer.Exit(1)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="run folder")]) -> None:
    """Write report.html into a run folder."""
    from relssl.report import write_report

    typer.echo(f"report: {write_report(run)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="folder for data and run")] = Path("relssl-demo"),
) -> int:
    """Convert, pre-train, evaluate and report on an embedded data set: no data, no GPU, no edits."""
    set_up_log()
    from relssl.demo import run_demo

    return run_demo(out)


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
    if "TORCHELASTIC_RUN_ID" in os.environ and _arguments[:1] == ["train"]:
        processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
        return shlex.join(["torchrun", "--nproc_per_node", processes, "-m", "relssl.train", *_arguments[1:]])
    return shlex.join(["relssl", *_arguments])


def _after_training(recipe: Any, folder: Path) -> None:
    """The report, and what to type next."""
    from relssl.report import write_report

    typer.echo(f"report: {write_report(folder)}")
    if recipe.data.test is not None:
        typer.echo(f"next: relssl eval knn --weights {folder}\n      relssl eval linear --weights {folder}")
    else:
        typer.echo(f"next: relssl eval knn --weights {folder} --train LABELLED.beton --test TEST.beton")


def _show(entry: dict[str, Any], folder: Path) -> None:
    def text(score: dict[str, Any] | None) -> str:
        if score is None:
            return "-"
        spread = f" ± {score['std']:.2f} ({len(score['values'])} seeds)" if len(score["values"]) > 1 else ""
        return f"{score['mean']:.2f} %{spread}"

    typer.echo(
        f"{entry['evaluator']}, {entry['weights']} {entry['backbone']}, {entry['num_train']} train and "
        f"{entry['num_test']} test images: top-1 {text(entry['top1'])}, top-5 {text(entry['top5'])}"
    )
    typer.echo(f"results: {folder / 'results.json'}\nnext: relssl report {folder}")


def _whole_numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option} takes whole numbers with commas between them, such as 1,2,3; got {text!r}"
        ) from None


def _refuse_planned(arguments: list[str]) -> None:
    if arguments and arguments[0] in PLANNED:
        raise ConfigError(f"`relssl {arguments[0]}` is not in this version yet; `relssl --help` lists what is")
    planned, there = PLANNED_PARTS.get(arguments[0], ((), "")) if arguments else ((), "")
    if len(arguments) > 1 and arguments[1] in planned:
        raise ConfigError(f"`relssl {arguments[0]} {arguments[1]}` is not in this version yet; there are: {there}")


def _say_error(message: str) -> None:
    if message:
        typer.echo(f"relssl: {message}", err=True)
