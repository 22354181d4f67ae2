"""What was measured how on what: which entries of results.json may stand side by side, and what tells the others apart.

Two figures are the same measurement if evaluator, protocol, images and their preparation are equal, by their settings
and by the content of the files. Names only serve as labels: two data sets, or two settings, may have one name. The
normalisation that weights were trained with belongs to the weights, as their first layer does; only another one, of
another recipe, tells a measurement apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from relssl.runfolder import flat_settings

Entry = Mapping[str, Any]
Teller = Callable[[Sequence[int]], Sequence[str]]

_MOST_SETTINGS = 3  # in a label; of more, a hash tells the rest
_HASH_DIGITS = 8


@dataclass(frozen=True)
class Measurement:
    """An evaluator, its protocol, its data. All fields but the first are JSON."""

    evaluator: str
    protocol: str
    data: str  # content hashes of the files and of the choice of images; see `knows_content`
    view: str  # how the un-augmented images were made
    training_views: str  # how the augmented ones were made, of a protocol that has some

    @classmethod
    def of(cls, entry: Entry) -> Measurement:
        """That of an entry of results.json, which may be an older version's."""
        protocol, view, training = _json(entry.get("protocol")), _json(_view(entry)), _json(_training_views(entry))
        data = entry.get("data")
        if not knows_content(entry):
            data = [data, *(entry.get(key) for key in ("train", "test", "num_train", "num_test", "subset"))]
        return cls(str(entry.get("evaluator")), protocol, _json(data), view, training)


def knows_content(entry: Entry) -> bool:
    """Whether an entry has the content hash of each of its files, and of the chosen images where only some were used.

    A `.beton` without a manifest has none; it is told from others by name, number of images and share.
    """
    hashes = entry.get("data")
    needed = max(1, len(_files(entry)) + bool(entry.get("subset")))
    return isinstance(hashes, list) and all(hashes) and len(hashes) >= needed


def short_hash(value: str) -> str:
    """The beginning of a hash, which is enough to tell a few apart."""
    return value[:_HASH_DIGITS]


def protocol_name(entry: Entry) -> str:
    protocol = entry.get("protocol")
    if not isinstance(protocol, Mapping):
        return ""
    numbers = (f"{k} {v}" for k, v in protocol.items() if isinstance(v, (int, float)) and not isinstance(v, bool))
    return str(protocol.get("name") or ", ".join(numbers))


def view_text(entry: Entry) -> str:
    """How the un-augmented images were made, in a few words; empty where an entry does not say."""
    view = entry.get("view")
    if not isinstance(view, Mapping):
        return ""
    filtered = "" if view.get("interpolation") in (None, "bilinear") else f" {view['interpolation']}"
    return f"{view.get('size')} px{filtered}"


def labelled(name: str, words: Sequence[str]) -> str:
    """A label: a name, and in brackets what tells it from others of the name."""
    return f"{name} ({', '.join(words)})" if words else name


def protocol_word(name: str, entry: Entry) -> str:
    """The protocol's name; of one that begins like the label only what is more."""
    told = protocol_name(entry)
    return told.removeprefix(name).strip(" ()") if told.startswith(name) else told


def tell_apart(
    labels: Sequence[str], tellers: Sequence[Teller], words: Sequence[Sequence[str]] | None = None
) -> list[list[str]]:
    """For each label the words that tell it from its equals: those of the first teller that can, and so on.

    Args:
        tellers: each is given the places of labels that are still equal, and returns a word, or "", for each.
        words: what is told of each label already.
    """
    found = [list(told) for told in words or [()] * len(labels)]
    for teller in tellers:
        equals: dict[tuple[str, ...], list[int]] = {}
        for place, label in enumerate(labels):
            equals.setdefault((label, *found[place]), []).append(place)
        for same in equals.values():
            told = teller(same) if len(same) > 1 else []
            if len(set(told)) > 1:
                for place, word in zip(same, told, strict=True):
                    found[place] += [word] if word else []
    return found


def tellers(names: Sequence[str], entries: Sequence[Entry]) -> list[Teller]:
    """What tells entries of different measurements apart, the most telling first: one of them always can.

    Args:
        names: the label of each entry.
    """

    def by(tell: Callable[[Entry], str]) -> Teller:
        return lambda places: [tell(entries[place]) for place in places]

    def by_settings(tell: Callable[[Entry], Any]) -> Teller:
        return lambda places: _differing([tell(entries[place]) for place in places])

    return [
        lambda places: [protocol_word(names[place], entries[place]) for place in places],
        by_settings(lambda entry: _without_name(entry.get("protocol"))),
        by(view_text),
        by_settings(_view),
        lambda places: _views_words([_training_views(entries[place]) for place in places]),
        by(lambda entry: str(entry.get("subset") or "all images")),
        lambda places: _differing_names([entries[place] for place in places]),
        lambda places: _differing_counts([entries[place] for place in places]),
        lambda places: _differing_content([entries[place] for place in places]),
        by(lambda entry: short_hash(hashlib.sha256(_json(astuple(Measurement.of(entry))).encode()).hexdigest())),
    ]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _view(entry: Entry) -> Any:
    return _prepared(entry, entry.get("view"))


def _training_views(entry: Entry) -> Any:
    views = entry.get("training_views")
    return [_prepared(entry, view) for view in views] if isinstance(views, list) else views


def _prepared(entry: Entry, view: Any) -> Any:
    """A view, without the normalisation if that is the weights' own."""
    if not isinstance(view, Mapping) or entry.get("own_normalisation") is False:
        return view
    return {key: value for key, value in view.items() if key != "normalize"}


def _files(entry: Entry) -> list[str]:
    return [name for name in ("train", "test") if entry.get(name)]


def _without_name(protocol: Any) -> Any:
    return {key: value for key, value in protocol.items() if key != "name"} if isinstance(protocol, Mapping) else {}


def _differing(values: Sequence[Any]) -> list[str]:
    """The settings that are not the same in all."""
    flat = [flat_settings(_by_place(value)) for value in values]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    differing = [key for key in keys if len({_json(settings.get(key)) for settings in flat}) > 1]
    shown, more = differing[:_MOST_SETTINGS], len(differing) - _MOST_SETTINGS
    rest = f", {more} more" if more > 0 else ""
    return [", ".join(f"{key} {_setting(settings.get(key))}".strip() for key in shown) + rest for settings in flat]


def _by_place(value: Any) -> Any:
    """Dictionaries in a list as a dictionary by their number; a single one as itself."""
    if isinstance(value, Mapping):
        return {key: _by_place(inner) for key, inner in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return _by_place(value[0]) if len(value) == 1 else {str(i): _by_place(item) for i, item in enumerate(value)}
    return value


def _setting(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "none"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _views_words(views: Sequence[Any]) -> list[str]:
    told = _differing([each for each in views if each is not None])
    words = iter(f"training views: {word}" if word else "" for word in told)
    return ["training views not recorded" if each is None else next(words) for each in views]


def _differing_names(entries: Sequence[Entry]) -> list[str]:
    keys = [key for key in ("train", "test") if len({str(entry.get(key)) for entry in entries}) > 1]
    return [", ".join(str(entry.get(key) or f"no {key} images") for key in keys) for entry in entries]


def _differing_counts(entries: Sequence[Entry]) -> list[str]:
    told = {"num_train": "training images", "num_test": "test images"}
    keys = [key for key in told if len({entry.get(key) for entry in entries}) > 1]
    return [", ".join(f"{entry.get(key)} {told[key]}" for key in keys) for entry in entries]


def _differing_content(entries: Sequence[Entry]) -> list[str]:
    """The files whose content differs, and what of their hash."""
    told = [_hashes(entry) for entry in entries]
    keys = list(dict.fromkeys(key for hashes in told for key in hashes))
    differing = [key for key in keys if len({hashes.get(key) for hashes in told}) > 1]
    return [", ".join(f"{key} {hashes.get(key, 'of unknown content')}" for key in differing) for hashes in told]


def _hashes(entry: Entry) -> dict[str, str]:
    hashes = entry.get("data")
    known = hashes if isinstance(hashes, list) else []
    of = [*_files(entry), "choice of images"]
    return {name: short_hash(str(value)) for name, value in zip(of, known, strict=False) if value}
