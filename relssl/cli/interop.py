"""`relssl import`, `relssl export`: weights in from the original codes, and out to what others load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.errors import ConfigError
from relssl.cli.base import Force, Overrides, command_line, set_up_log


def import_weights(
    checkpoint: Annotated[Path, typer.Argument(help="a file of ReSSL, WCL, ReLICv2, ReSA or relational reasoning")],
    out: Annotated[Path, typer.Argument(help="backbone file to write, *.safetensors; with --full a new run folder")],
    overrides: Overrides = None,
    source: Annotated[
        str, typer.Option("--from", help="ressl, wcl, relicv2, resa, relational; found out by the keys when auto")
    ] = "auto",
    branch: Annotated[
        str | None, typer.Option(help="online or teacher; by default the one that the original evaluates")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="whose views and protocols belong to it; by default the one that fits")
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="heads, teacher, queue, optimizer too: a run that relssl train goes on with; data.train=FILE.beton",
        ),
    ] = False,
    epoch: Annotated[int | None, typer.Option(help="epochs of training, where the file does not say", min=0)] = None,
    fresh_optimizer: Annotated[
        bool, typer.Option("--fresh-optimizer", help="with --full, for a file without an optimizer")
    ] = False,
    force: Force = False,
) -> None:
    """Import a checkpoint of the original codes, strictly: a name too many or too few is an error."""
    if full:
        if branch is not None or force:
            raise ConfigError("--full takes all branches into a new folder; leave --branch and --force out")
        _import_run(checkpoint, out, overrides, source, recipe, epoch, fresh_optimizer)
        return
    if fresh_optimizer:
        raise ConfigError("--fresh-optimizer goes with --full")
    if out.suffix != ".safetensors":
        raise ConfigError(
            f"{out} is to be a backbone file, called NAME.safetensors; for a run folder that training goes on in, add "
            "--full"
        )
    _check_free(out, force)
    from relssl.interop.importing import import_backbone

    foreign, chosen = import_backbone(
        checkpoint, out, source=source, branch=branch, recipe=recipe, overrides=overrides or (), epoch=epoch
    )
    _say_what_it_is(foreign, foreign.branch(branch), epoch)
    _say_recipe(chosen)
    typer.echo(
        f"backbone: {out}\n"
        f"next: relssl eval knn --weights {out} --train TRAIN.beton --test TEST.beton\n"
        f"      relssl eval linear --weights {out} --train TRAIN.beton --test TEST.beton"
    )


def export_weights(
    run: Annotated[Path, typer.Argument(help="run folder or backbone file")],
    out: Annotated[Path, typer.Argument(help="file to write; a model card is written beside it as OUT.md")],
    format: Annotated[str, typer.Option(help="torchvision, timm, safetensors, onnx")],
    bake_normalisation: Annotated[
        bool, typer.Option("--bake-normalisation", help="onnx: the network takes RGB in [0, 1]")
    ] = False,
    licence: Annotated[str | None, typer.Option(help="of the weights, for the card, such as apache-2.0")] = None,
    force: Force = False,
) -> None:
    """Export a backbone for others; it is loaded again and compared before it is kept."""
    from relssl.interop.exporting import export

    done = export(run, out, format, bake_normalisation=bake_normalisation, licence=licence, force=force)
    typer.echo(
        f"{format}: {done.path}, loaded again: features differ by at most {done.difference:.1e} of the largest\n"
        f"model card: {done.card}{'' if licence else ' (its licence is left open: fill it in, or use --licence)'}\n"
        f"\n{done.snippet}"
    )


def _import_run(
    checkpoint: Path,
    out: Path,
    overrides: list[str] | None,
    source: str,
    recipe: str | None,
    epoch: int | None,
    fresh_optimizer: bool,
) -> None:
    set_up_log()
    from relssl.interop.resume import import_run

    foreign, chosen, position = import_run(
        checkpoint,
        out,
        source=source,
        recipe=recipe,
        overrides=overrides or (),
        epoch=epoch,
        fresh_optimizer=fresh_optimizer,
        command=command_line(),
    )
    _say_what_it_is(foreign, None, epoch)
    _say_recipe(chosen)
    epochs = chosen.recipe.train.epochs
    typer.echo(
        f"run: {out}, at epoch {position.epoch} of {epochs} (update {position.total}), "
        f"{'with an empty optimizer' if fresh_optimizer else 'with its optimizer'}"
    )
    if position.epoch >= epochs:
        typer.echo(
            f"note: all {epochs} epochs are done, and training would only write the backbone; to go on, import it "
            f"with train.epochs={position.epoch + epochs}, say"
        )
    typer.echo(f"next: relssl train {out}/config.yaml --out {out} --resume auto")


def _say_what_it_is(foreign: Any, branch: str | None, epoch: int | None) -> None:
    name, options = foreign.architecture
    told = name + "".join(f", {key} {value}" for key, value in options.items())
    epochs = "epochs not in the file" if foreign.epoch is None else f"{foreign.epoch} epochs"
    if foreign.epoch is None and epoch is not None:
        epochs = f"{epoch} epochs, as given"
    which = "" if branch is None or len(foreign.layout.backbones) == 1 else f", {branch} branch"
    typer.echo(
        f"{foreign.path}: {foreign.layout.kind}, {told}, {epochs}{which}; {len(foreign.tensors)} entries, all fit"
    )
    if foreign.unread:
        typer.echo(f"not read: {', '.join(foreign.unread)}")


def _say_recipe(chosen: Any) -> None:
    text = f"recipe: {chosen.name} ({chosen.certainty})"
    if chosen.replaced:
        text += f", its backbone {chosen.replaced} replaced by the file's"
    if chosen.others:
        text += (
            f"; {', '.join(chosen.others)} would fit as well and evaluates alike. Batch and views of the training are "
            "recorded as unknown; --recipe says which it was"
        )
    typer.echo(text)


def _check_free(out: Path, force: bool) -> None:
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name the file to write")
    if out.exists() and not force:
        raise ConfigError(f"{out} exists; use --force to overwrite it")
