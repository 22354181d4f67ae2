"""A model card: what a reader of an exported file needs to know, from the run itself.

Its head is the metadata of Hugging Face's hub, so that the card can become the README.md of a repository there. What
the run does not say is called unknown, and a licence that nobody gave is left for its owner to fill in.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from pipelines.errors import InputError
from relssl import checkpoint
from relssl.compare import METRICS, metrics_of
from relssl.config import Recipe
from relssl.evaluate import Weights
from relssl.methods import load_method
from relssl.report import DISPLAY, accuracy_text, protocol_text
from relssl.runfolder import RunFolder, now, read_results, write_atomically

_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Card:
    """What goes into a card besides the run.

    Attributes:
        file: the weights as they lie now, whose size and hash are told.
        name: of the file when it is done.
        preparation: of an image, in words.
        difference: of features after exporting, relative to the largest.
        licence: of the weights; None leaves it open.
    """

    weights: Weights
    file: Path
    name: str
    format: str
    snippet: str
    preparation: str
    difference: float
    licence: str | None


def write_card(path: Path, card: Card) -> None:
    """Write the card, whole or not at all."""
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("relssl", "templates"),
        autoescape=False,  # Markdown
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    ).get_template("model_card.md")
    weights, recipe = card.weights, card.weights.recipe
    folder = RunFolder(weights.folder)
    text = template.render(
        title=f"{recipe.method_name}, {recipe.backbone.name}",
        about=_about(recipe, folder),
        method=recipe.method_name,
        trained=_trained(weights, folder),
        origin=weights.imported and {"continued": False, **weights.imported},
        training=list(_training(weights, folder)),
        rows=[_row(entry) for entry in _results(weights)],
        paper=recipe.about.paper,
        file=card.name,
        size=f"{card.file.stat().st_size / 2**20:.1f} MiB",
        sha256=checkpoint.sha256(card.file),
        format=card.format,
        preparation=card.preparation,
        snippet=card.snippet,
        difference=f"{card.difference:.1e}",
        licence=card.licence,
        front=yaml.safe_dump(_front(recipe, card), sort_keys=False).strip(),
        config=_config(recipe).strip(),
        date=now()[:10],
    )
    write_atomically(path, text)


def _front(recipe: Recipe, card: Card) -> dict[str, Any]:
    libraries = {"torchvision": "pytorch", "timm": "timm", "safetensors": "pytorch", "onnx": "onnx"}
    return {
        "license": card.licence or "unknown",
        "library_name": libraries[card.format],
        "pipeline_tag": "image-feature-extraction",
        "tags": ["self-supervised-learning", recipe.method_name, recipe.backbone.name],
    }


def _about(recipe: Recipe, folder: RunFolder) -> str:
    """The first line of the method's file, which names its paper."""
    module = sys.modules[load_method(folder.method_place(recipe)).__module__]
    return (module.__doc__ or recipe.method_name).strip().splitlines()[0].rstrip(":.")


def _trained(weights: Weights, folder: RunFolder) -> str:
    if weights.origin == "random":
        return "with its initial weights"
    labels = "with" if "labels" in load_method(folder.method_place(weights.recipe)).NEEDS else "without"
    return f"pre-trained {labels} labels" + (", then fine-tuned with labels" if weights.origin == "finetuned" else "")


def _training(weights: Weights, folder: RunFolder) -> Iterator[tuple[str, str]]:
    """Rows of the table of the training."""
    recipe, origin = weights.recipe, weights.imported or {}
    of_others = bool(origin) and not origin.get("continued")
    guessed = of_others and origin.get("recipe_is") == "assumed"
    yield "epochs", _UNKNOWN if weights.epochs is None else str(weights.epochs)
    yield "images per update", _UNKNOWN if guessed else str(recipe.train.batch_size)
    views = ", ".join(f"{spec.count} x {spec.name} {spec.size} px" for spec in recipe.views.specs()[-1][1])
    yield "views of an image", _UNKNOWN if guessed else views
    yield "optimizer", _UNKNOWN if guessed else _optimizer(recipe)
    if of_others:
        yield "settings from", f"the recipe {origin.get('recipe')}; those of the original run are its authors'"
        return
    yield "data", _data(recipe, folder)
    yield "seed", str(recipe.train.seed)
    yield from _machine(folder)


def _optimizer(recipe: Recipe) -> str:
    optim = recipe.optim
    scaled = {"none": "", "linear": " x batch / 256", "sqrt": " x sqrt(batch)"}[optim.lr_scaling]
    warmup = f", warm-up {optim.schedule.warmup_epochs:g} epochs" if optim.schedule.warmup_epochs else ""
    schedule = optim.schedule.name.replace("_", " ")
    return f"{optim.name}, rate {optim.lr:g}{scaled}, weight decay {optim.weight_decay:g}, {schedule}{warmup}"


def _data(recipe: Recipe, folder: RunFolder) -> str:
    found = checkpoint.list_checkpoints(folder.checkpoints)
    images = ""
    if found:
        try:
            images = f", {checkpoint.load(found[-1]).extra['data']['images']:,} images"
        except (InputError, KeyError, TypeError):
            images = ""
    return _short(recipe.data.train) + images


def _machine(folder: RunFolder) -> Iterator[tuple[str, str]]:
    try:
        env = json.loads((folder.path / "env.json").read_text(encoding="utf-8"))
        devices = ", ".join(env["devices"]) or f"{env['cores']} cores of {env['processor']}"
        yield "trained on", f"{devices}, {env['world_size']} process(es), torch {env['torch']}, relssl {env['relssl']}"
        yield "started", str(env["started"])
    except (OSError, ValueError, KeyError, TypeError):
        yield "trained on", _UNKNOWN


def _results(weights: Weights) -> list[dict[str, Any]]:
    """Evaluations of these very weights, and, where there are some, of random ones beside them."""

    def is_ours(entry: Mapping[str, Any]) -> bool:
        mine, theirs = weights.imported or {}, entry.get("imported") or {}
        same_import = all(mine.get(key) == theirs.get(key) for key in ("sha256", "branch"))
        same_name = entry.get("weights_file") == weights.file and entry.get("weights") == weights.origin
        same_time = entry.get("epochs") == weights.epochs and entry.get("update") == weights.update
        return same_name and same_time and same_import

    entries = read_results(weights.folder)
    if not any(map(is_ours, entries)):
        return []
    network = weights.recipe.backbone.name
    return [e for e in entries if is_ours(e) or (e.get("weights") == "random" and e.get("backbone") == network)]


def _row(entry: Mapping[str, Any]) -> dict[str, str]:
    name = str(entry.get("evaluator"))
    figures = [_figure(metric, score) for metric, score in metrics_of(entry)]
    return {
        "evaluator": DISPLAY.get(name, name),
        "weights": str(entry.get("weights")),
        "figures": ", ".join(figures) or "-",
        "how": protocol_text(entry),
        "date": str(entry.get("date", ""))[:10],
    }


def _figure(metric: str, score: Mapping[str, Any]) -> str:
    if metric.startswith("label_free."):
        return f"{metric.removeprefix('label_free.')} {score['mean']:.3g}"
    return f"{METRICS.get(metric, metric)} {accuracy_text(score)} %"


def _config(recipe: Recipe) -> str:
    """The configuration, with names of files instead of places."""
    values = recipe.model_dump(mode="json")
    for key in ("train", "test", "probe"):
        if values["data"][key] is not None:
            values["data"][key] = _short(values["data"][key])
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)


def _short(place: str | list[str]) -> str:
    return " + ".join(Path(p).name for p in (place if isinstance(place, list) else [place]))
