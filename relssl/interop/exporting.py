"""A backbone out to what others load: torchvision, timm, plain safetensors, ONNX.

What is written is loaded again the way a user would, and has to give the same features before it gets its name: a file
that exists is one that works, and its model card lies beside it. A format that cannot hold a backbone refuses it by
name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.errors import ConfigError, RunError, unknown_name
from relssl.evaluate import open_weights
from relssl.interop.export_formats import FORMATS, Format, Network, Onnx, Subject
from relssl.interop.model_card import Card, write_card

_BATCH_SIZES = (1, 3)  # two, so that a batch size that was frozen into a graph shows


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        snippet: lines that load the file from the folder in which `path` was given.
        difference: the largest of features, relative to the largest feature.
    """

    path: Path
    card: Path
    snippet: str
    difference: float


def export(
    run: Path,
    out: Path,
    format: str,
    *,
    bake_normalisation: bool = False,
    licence: str | None = None,
    force: bool = False,
) -> Exported:
    """Write a backbone for others, and a model card beside it.

    Args:
        run: a run folder or a backbone file.
        out: the file to write; the card is `<out>.md`.
        format: of `FORMATS`.
        bake_normalisation: ONNX only: the network takes RGB in [0, 1], and subtracts the mean itself.
        licence: of the weights, for the card.
        force: overwrite what is there.

    Raises:
        ConfigError: an unknown format, a name that does not end as its files do, a backbone that it cannot hold, or a
            file that exists.
        MissingExtraError: the format's package is not installed.
        InputError: there is no backbone, or what the card says of the run cannot be read; nothing is kept.
        RunError: the exported network gives other features; nothing is kept.
    """
    if format not in FORMATS:
        raise ConfigError(unknown_name("format", format, FORMATS))
    writer = FORMATS[format]()
    card = out.with_name(f"{out.name}.md")
    if out.suffix not in writer.suffixes:
        raise ConfigError(f"{out} does not end in {' or '.join(writer.suffixes)}, as files of {format} do")
    if bake_normalisation and not isinstance(writer, Onnx):
        raise ConfigError(f"--bake-normalisation is of onnx, whose files hold a whole network; {format} holds weights")
    for path in (out, card):
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; name the file to write")
        if path.exists() and not force:
            raise ConfigError(f"{path} exists; use --force to overwrite it")
    weights = open_weights(run)
    writer.refuse(weights)
    subject = Subject(weights, bake_normalisation)
    out.parent.mkdir(parents=True, exist_ok=True)
    work, card_work = (path.with_name(f".writing-{path.name}") for path in (out, card))
    try:
        writer.write(subject, work)
        difference = _difference(subject, _loaded(writer, subject, work))
        if not difference <= writer.tolerance:
            raise RunError(
                f"the exported network gives other features than {run}: they differ by {difference:.1e} of the largest "
                f"one, where {writer.tolerance:.0e} is allowed; nothing was written"
            )
        snippet = writer.snippet(subject, out.name)  # the card lies beside the file
        write_card(card_work, Card(weights, work, out.name, format, snippet, subject.preparation, difference, licence))
        card_work.replace(card)
        work.replace(out)
    finally:
        for path in (work, card_work):
            path.unlink(missing_ok=True)
    return Exported(out, card, writer.snippet(subject, str(out)), difference)


def _loaded(writer: Format, subject: Subject, path: Path) -> Network:
    try:
        return writer.load(subject, path)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(
            f"the exported {writer.name} file cannot be loaded again: {reason}; nothing was written"
        ) from error


def _difference(subject: Subject, network: Network) -> float:
    """The largest difference of features, relative to the largest feature, over batches of several sizes.

    Raises:
        RunError: the backbone itself gives features that are not finite, or nothing but zeros.
    """
    worst = 0.0
    with torch.no_grad():
        for count in _BATCH_SIZES:
            x = subject.images(count)
            ours, theirs = subject.network(x), network(x)
            largest = float(ours.abs().max())
            if not (ours.isfinite().all() and largest > 0):
                raise RunError(f"the features of {subject.name} are not finite, or all zero: nothing to export")
            if ours.shape != theirs.shape or not theirs.isfinite().all():
                return float("inf")
            worst = max(worst, float((ours - theirs).abs().max()) / largest)
    return worst
