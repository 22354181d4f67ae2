"""The program `relssl`: each verb is a thin shell over the library.

Nothing heavy is imported before a verb needs it, so `relssl --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.errors import ConfigError, RelsslError
from relssl import share_cores
from relssl.cli import analysis, base
from relssl.cli.base import Force, Out, Overrides, command_line, different_seeds, load, progress_bar, set_up_log
from relssl.cli.bench import bench_app
from relssl.cli.evaluation import eval_app
from relssl.cli.interop import export_weights, import_weights
from relssl.cli.runs import compare, ls

app = typer.Typer(
    name="relssl",
    help="Train and evaluate relational self-supervised learning, fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
eval_app.command("probe")(analysis.eval_probe)
eval_app.command("fewlabel")(analysis.eval_fewlabel)
eval_app.command("analyse")(analysis.eval_analyse)
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")
app.command()(compare)
app.command()(ls)

# Parts of later versions: refused by name, so that nobody looks for a spelling mistake.
PLANNED_PARTS = {
    "bench": (("step", "budget"), "losses, parity, views"),
}

# Click's base of usage errors. Typer carries click inside itself in some versions and depends on it in others.
_UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


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
    base.arguments[:] = arguments
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
    if sheet is not None:
        from relssl.pictures import check_place

        check_place(sheet)
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
    chosen = None if seeds is None else different_seeds(seeds)
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


app.command("import")(import_weights)
app.command("export")(export_weights)


def _after_training(recipe: Any, folder: Path) -> None:
    """The report, and what to type next."""
    from relssl.report import write_report

    typer.echo(f"report: {write_report(folder)}")
    if recipe.data.test is not None:
        typer.echo(f"next: relssl eval knn --weights {folder}\n      relssl eval linear --weights {folder}")
    else:
        typer.echo(f"next: relssl eval knn --weights {folder} --train LABELLED.beton --test TEST.beton")


def _refuse_planned(arguments: list[str]) -> None:
    planned, there = PLANNED_PARTS.get(arguments[0], ((), "")) if arguments else ((), "")
    if len(arguments) > 1 and arguments[1] in planned:
        raise ConfigError(f"`relssl {arguments[0]} {arguments[1]}` is not in this version yet; there are: {there}")


def _say_error(message: str) -> None:
    if message:
        typer.echo(f"relssl: {message}", err=True)
