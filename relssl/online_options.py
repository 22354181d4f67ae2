"""What the options of `eval.online.evaluators` mean: settings of each evaluator that runs while training.

A recipe is checked by making them, so whatever they refuse is refused before a run begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import ConfigError, unknown_name
from relssl.config import Eval
from relssl.evaluators.few_labels import Amount
from relssl.evaluators.finetune import FinetuneProtocol, finetune_protocol
from relssl.evaluators.linear import LinearProtocol, linear_protocol
from relssl.evaluators.probe import FEATURES, ProbeProtocol, probe_protocol
from relssl.evaluators.protocols import usable_temperature

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Knn:
    k: int
    temperature: float


@dataclass(frozen=True)
class Retrieval:
    k: Sequence[int]


@dataclass(frozen=True)
class FewLabels:
    """Amounts of the images whose features there are, `num_train` at most, and not of all training images.

    `amounts` None: 1, 10 and 100 labels a class, as far as there are so many.
    """

    amounts: Sequence[Amount] | None
    seeds: Sequence[int]


@dataclass(frozen=True)
class Labelled:
    """A protocol, and the share of all training images that has labels; None: the features that there are, or all."""

    protocol: LinearProtocol | FinetuneProtocol
    percent: float | None
    draw: int


@dataclass(frozen=True)
class LabelFree:
    pass


Settings = Knn | Retrieval | FewLabels | Labelled | LabelFree | ProbeProtocol


def online_settings(section: Eval) -> dict[str, Settings]:
    """Settings of the evaluators that `eval.online` asks for, by name.

    Raises:
        ConfigError: an unknown option, or a value that cannot be.
    """
    assert section.online is not None
    return {
        name: _READERS[name](section, f"eval.online.evaluators.{name}", measure.options)
        for name, measure in section.online.evaluators.chosen().items()
    }


def _knn(section: Eval, where: str, options: Options) -> Knn:
    found = _known(where, options, {"k": section.knn.k, "temperature": section.knn.temperature})
    temperature = found["temperature"]
    if not _is_number(temperature):
        raise ConfigError(f"{where}.temperature is a number, got {temperature!r}")
    try:
        usable_temperature(temperature)
    except ValueError as error:
        raise ConfigError(f"{where}.temperature: {error}, got {temperature!r}") from None
    return Knn(_whole_number(f"{where}.k", found["k"]), float(temperature))


def _retrieval(section: Eval, where: str, options: Options) -> Retrieval:
    return Retrieval(_whole_numbers(f"{where}.k", _known(where, options, {"k": [1, 5, 10]})["k"]))


def _linear(section: Eval, where: str, options: Options) -> Labelled:
    """The protocol is our quick one unless another is named: the recipe's own may take hours."""
    settings, percent, draw = _portion(where, options)
    return Labelled(linear_protocol(settings.pop("protocol", "cached"), **settings), percent, draw)


def _finetune(section: Eval, where: str, options: Options) -> Labelled:
    settings, percent, draw = _portion(where, options)
    own = section.finetune
    if "protocol" not in settings:
        settings = {**own.options, **settings, "protocol": own.protocol}
    return Labelled(finetune_protocol(settings.pop("protocol"), **settings), percent, draw)


def _probe(section: Eval, where: str, options: Options) -> ProbeProtocol:
    settings = probe_protocol(**options)
    if list(settings.layer) != [FEATURES]:
        raise ConfigError(
            f"{where}.layer: while training, the backbone's own output is all that is probed, got "
            f"{', '.join(settings.layer)}; `relssl eval probe --follow RUN --grid layer=...` probes layers"
        )
    return settings


def _few_labels(section: Eval, where: str, options: Options) -> FewLabels:
    found = _known(where, options, {"labels": [], "percent": [], "seeds": [0, 1, 2]})
    percentages = found["percent"] if isinstance(found["percent"], list) else [found["percent"]]
    amounts = [Amount(per_class=k) for k in _whole_numbers(f"{where}.labels", found["labels"])]
    amounts += [Amount(percent=_percentage(f"{where}.percent", percent)) for percent in percentages]
    seeds = _whole_numbers(f"{where}.seeds", found["seeds"], least=0)
    if not seeds:
        raise ConfigError(f"{where}.seeds needs at least one seed")
    return FewLabels(amounts or None, seeds)


def _label_free(section: Eval, where: str, options: Options) -> LabelFree:
    _known(where, options, {})
    return LabelFree()


_READERS: dict[str, Callable[[Eval, str, Options], Settings]] = {
    "knn": _knn,
    "linear": _linear,
    "retrieval": _retrieval,
    "probe": _probe,
    "fewlabel": _few_labels,
    "finetune": _finetune,
    "label_free": _label_free,
}


def _known(where: str, options: Options, defaults: dict[str, Any]) -> dict[str, Any]:
    for key in options:
        if key not in defaults:
            what = f"option of {where}"
            raise ConfigError(unknown_name(what, key, defaults) if defaults else f"unknown {what}: {key!r}")
    return {**defaults, **options}


def _portion(where: str, options: Options) -> tuple[dict[str, Any], float | None, int]:
    """The settings of a protocol, and apart from them the share of the labels, and which draw of it."""
    settings = dict(options)
    percent, draw = settings.pop("percent", None), _whole_number(f"{where}.draw", settings.pop("draw", 0), least=0)
    if percent is not None:
        percent = _percentage(f"{where}.percent", percent)
    elif draw:
        raise ConfigError(f"{where}.draw: {draw} is one of the draws of percent; give percent, too")
    return settings, percent, draw


def _whole_numbers(where: str, value: Any, *, least: int = 1) -> list[int]:
    return [_whole_number(where, each, least=least) for each in (value if isinstance(value, list) else [value])]


def _whole_number(where: str, value: Any, *, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{where} takes whole numbers from {least}, got {value!r}")
    return value


def _percentage(where: str, value: Any) -> float:
    if not _is_number(value) or not 0 < value <= 100:
        raise ConfigError(f"{where} is above 0 and at most 100, got {value!r}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
