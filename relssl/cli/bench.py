"""`relssl bench`: what it costs, beside what others take for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relssl.cli.base import Device, command_line, set_up_log

bench_app = typer.Typer(help="Measure and prove: views, losses, parity.", no_args_is_help=True)


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
