"""What a view is: a crop, its size, and the colour operations after it, as a paper's appendix would list them.

A plan is a list of `ViewSpec`s. Views are numbered in plan order and that number keys the draw, so a spec never
mentions randomness beyond probabilities and ranges. Specs hold plain numbers only; `draw` turns them into
parameters, engines and `colour` carry them out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from pipelines.errors import ConfigError, unknown_name

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_RATIO = (3 / 4, 4 / 3)

# kind -> {parameter: default}; a default of None means that the parameter must be given
BOXES: dict[str, dict[str, Any]] = {
    "random_resized": {"scale": (0.08, 1.0), "ratio": DEFAULT_RATIO},  # torchvision's RandomResizedCrop
    "byol": {"scale": (0.08, 1.0), "ratio": DEFAULT_RATIO},  # BYOL's: one try, cut down to the image's sides
    "center": {"resize": None},  # resize the short side, then take the middle
    "byol_center": {"share": 0.875},  # BYOL's and ReLICv2's for evaluation: the middle, then resized to the square
    "whole": {},  # the whole image, resized to the square
    "pad_crop": {"padding": None},  # torchvision's RandomCrop(size, padding): nothing is resized
}
OPS: dict[str, dict[str, Any]] = {
    "jitter": {
        "brightness": 0.0,
        "contrast": 0.0,
        "saturation": 0.0,
        "hue": 0.0,
    },  # torchvision's ColorJitter
    "jitter_byol": {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0},  # BYOL's and ReLIC's
    "grey": {},
    "blur": {"sigma": None, "kernel": "torchvision"},  # standard deviation in pixels, uniform over [low, high]
    "solarise": {"threshold": 128 / 255},
    "randaugment": {"n": 5, "m": 10},  # FixMatch's: n operations of a pool of 14, of levels below m
    "affine": {"degrees": None, "translate": 0.0, "scale": (1.0, 1.0), "shear": 0.0},  # torchvision's RandomAffine
    "erase": {"scale": (0.02, 0.33), "ratio": (0.3, 3.3), "value": 0.0},  # torchvision's RandomErasing
}
BLUR_KERNELS = ("torchvision", "byol")
RANDAUGMENT_MOST = {"n": 6, "m": 10}  # as many numbers as an op may have, and FixMatch's largest
INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class ViewSpec:
    """One kind of view of an image.

    Attributes:
        name: the method's name for it (`teacher`, `student`, `large`, ...); specs of one name concatenate.
        size: side of the square output in pixels.
        count: how many independent views of this kind.
        box: `{kind: {parameter: value}}`, kind a key of `BOXES`.
        interpolation: `bilinear` or `bicubic`.
        antialias: whether the filter grows with a reduction, as in PIL. Without, a pixel comes from its 2 x 2 or 4 x 4
            neighbours whatever the reduction, as TensorFlow resizes; the cubic is Keys' with a = -1/2 either way.
        flip: probability of a horizontal flip. It is part of the crop, so it comes before the ops, as in the papers'
            lists. (`affine`, `erase` and `randaugment` would differ after it, the other ops commute with
            it.)
        ops: `(op, probability, {parameter: value})` in the order in which they are applied. `erase` comes after the
            normalisation and is the last.
        mask_p: probability that the background of a view is filled with mid-grey, 0.5, before the ops; each view of a
            sample draws for itself. What is background says the mask of the image, so the data needs masks.
        normalize: per-channel mean and std of pixels in [0, 1], or None to leave pixels in [0, 1].

    Raises:
        ConfigError: a value that cannot be; the message names the view and the value.
    """

    name: str
    size: int
    count: int = 1
    box: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"random_resized": {}})
    interpolation: str = "bilinear"
    antialias: bool = True
    flip: float = 0.0
    ops: Sequence[Sequence[Any]] = ()
    mask_p: float = 0.0
    normalize: tuple[Sequence[float], Sequence[float]] | None = (IMAGENET_MEAN, IMAGENET_STD)

    def __post_init__(self) -> None:
        where = f"view {self.name!r}"
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ConfigError(f"{where}: a name is lower-case letters, digits and _, and starts with a letter")
        _check_integer(self.size, 1, f"{where}: size")
        _check_integer(self.count, 1, f"{where}: count")
        _check_probability(self.flip, f"{where}: flip")
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(
                f"{where}: interpolation is one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}"
            )
        if not isinstance(self.antialias, bool):
            raise ConfigError(f"{where}: antialias is true or false, got {self.antialias!r}")
        _check_probability(self.mask_p, f"{where}: mask_p")
        object.__setattr__(self, "box", _checked_box(self.box, where))
        if self.box_kind == "center" and self.box_options["resize"] < self.size:
            raise ConfigError(
                f"{where}: box center takes {self.size} pixels out of a short side of {self.box_options['resize']}; "
                f"set resize to at least {self.size}"
            )
        if self.box_kind == "pad_crop" and self.box_options["padding"] >= self.size:
            raise ConfigError(
                f"{where}: box pad_crop with a padding of {self.box_options['padding']} pixels and a size of "
                f"{self.size} would give views without a pixel of the image; set padding to at most {self.size - 1}"
            )
        object.__setattr__(self, "ops", tuple(_checked_op(op, where) for op in self.ops))
        if "erase" in [name for name, _, _ in self.ops[:-1]]:
            raise ConfigError(f"{where}: erase comes after the normalisation; list it once, as the last of the ops")
        object.__setattr__(self, "normalize", _checked_normalize(self.normalize, where))

    @property
    def box_kind(self) -> str:
        return next(iter(self.box))

    @property
    def box_options(self) -> Mapping[str, Any]:
        return self.box[self.box_kind]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ViewSpec:
        """Build from a config's mapping; an unknown key is an error that names the nearest known one."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"a view is a mapping such as {{name: student, size: 32}}, got {values!r}")
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(unknown_name(f"key of view {values.get('name', '?')!r}", key, known))
        missing = [key for key in ("name", "size") if key not in values]
        if missing:
            raise ConfigError(f"view {dict(values)!r} lacks {' and '.join(missing)}")
        options = dict(values)
        if isinstance(options.get("normalize"), Mapping):
            options["normalize"] = (options["normalize"].get("mean"), options["normalize"].get("std"))
        return cls(**options)


def expand(plan: Sequence[ViewSpec]) -> list[ViewSpec]:
    """One spec per view, in plan order: the place in this list is the view's number."""
    return [spec for spec in plan for _ in range(spec.count)]


def view_counts(plan: Sequence[ViewSpec]) -> dict[str, int]:
    """How many views of each name a plan makes, names in plan order."""
    counts: dict[str, int] = {}
    for spec in plan:
        counts[spec.name] = counts.get(spec.name, 0) + spec.count
    return counts


def _checked_box(box: Any, where: str) -> dict[str, dict[str, Any]]:
    if isinstance(box, str):
        box = {box: {}}
    if not isinstance(box, Mapping) or len(box) != 1:
        raise ConfigError(f"{where}: box is one kind with its options, e.g. {{random_resized: {{scale: [0.2, 1]}}}}")
    kind, options = next(iter(box.items()))
    _check_known("box", kind, BOXES, where)
    options = _filled(BOXES[kind], options or {}, f"{where}: box {kind}")
    if kind in ("random_resized", "byol"):
        options["scale"] = _checked_range(options["scale"], 0.0, f"{where}: scale", above=True)
        options["ratio"] = _checked_range(options["ratio"], 0.0, f"{where}: ratio", above=True)
        if options["scale"][1] > 1:
            raise ConfigError(f"{where}: scale is a share of the image's area, at most 1, got {options['scale']}")
    if kind == "center":
        _check_integer(options["resize"], 1, f"{where}: box center: resize")
    if kind == "byol_center":
        share = options["share"]
        if not _is_number(share) or not 0 < share <= 1:
            raise ConfigError(f"{where}: box byol_center: share of the short side is a number in (0, 1], got {share!r}")
    if kind == "pad_crop":
        _check_integer(options["padding"], 0, f"{where}: box pad_crop: padding")
    return {kind: options}


def _checked_op(op: Any, where: str) -> tuple[str, float, dict[str, Any]]:
    if isinstance(op, str) or not isinstance(op, Sequence) or not 2 <= len(op) <= 3:
        raise ConfigError(f"{where}: an op is [name, probability, {{options}}], got {op!r}")
    name, probability = op[0], op[1]
    _check_known("op", name, OPS, where)
    _check_probability(probability, f"{where}: probability of {name}")
    options = _filled(OPS[name], op[2] if len(op) == 3 else {}, f"{where}: {name}")
    if name == "blur":
        options["sigma"] = _checked_range(options["sigma"], 0.0, f"{where}: blur: sigma", above=True)
        if options["kernel"] not in BLUR_KERNELS:
            raise ConfigError(f"{where}: blur: kernel is one of {', '.join(BLUR_KERNELS)}, got {options['kernel']!r}")
    if name in ("jitter", "jitter_byol"):
        limits = {"hue": 0.5, "brightness": 1.0} if name == "jitter_byol" else {"hue": 0.5}  # a sum, not a factor
        for key, value in options.items():
            limit = limits.get(key, float("inf"))
            if not _is_number(value) or not 0 <= value <= limit:
                raise ConfigError(f"{where}: {name}: {key} is a strength in [0, {limit}], got {value!r}")
    if name == "solarise":
        _check_probability(options["threshold"], f"{where}: solarise: threshold")
    if name == "randaugment":
        for key, least in (("n", 1), ("m", 2)):
            _check_integer(options[key], least, f"{where}: randaugment: {key}")
            if options[key] > RANDAUGMENT_MOST[key]:
                raise ConfigError(f"{where}: randaugment: {key} is at most {RANDAUGMENT_MOST[key]}, got {options[key]}")
    if name == "affine":
        options = _checked_affine(options, f"{where}: affine")
    if name == "erase":
        options = _checked_erase(options, f"{where}: erase")
    return name, float(probability), options


def _checked_affine(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Ranges in full: degrees (low, high), translate (x, y), scale (low, high), shear (low, high of x, then of y)."""
    translate = options["translate"]
    translate = (translate, translate) if _is_number(translate) else _numbers(translate)
    if len(translate) != 2 or not all(0 <= x <= 1 for x in translate):
        raise ConfigError(
            f"{where}: translate is a share of the view's side in [0, 1], or [x, y], got {options['translate']!r}"
        )
    shear = _numbers(options["shear"])
    shear_x, shear_y = (shear[:2], shear[2:]) if len(shear) == 4 else (options["shear"], 0.0)
    return {
        "degrees": _checked_angles(options["degrees"], 360.0, f"{where}: degrees"),
        "translate": (float(translate[0]), float(translate[1])),
        "scale": _checked_range(options["scale"], 0.0, f"{where}: scale", above=True),
        "shear": tuple(x for part in (shear_x, shear_y) for x in _checked_angles(part, 89.0, f"{where}: shear")),
    }


def _checked_erase(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    scale = _checked_range(options["scale"], 0.0, f"{where}: scale", above=True)
    if scale[1] > 1:
        raise ConfigError(f"{where}: scale is a share of the view's area, at most 1, got {scale}")
    if not _is_number(options["value"]):
        raise ConfigError(f"{where}: value is a number, in units of the normalised view, got {options['value']!r}")
    ratio = _checked_range(options["ratio"], 0.0, f"{where}: ratio", above=True)
    return {"scale": scale, "ratio": ratio, "value": float(options["value"])}


def _checked_angles(value: Any, most: float, where: str) -> tuple[float, float]:
    pair = (-value, value) if _is_number(value) else _numbers(value)
    if len(pair) != 2 or not -most <= pair[0] <= pair[1] <= most:
        raise ConfigError(
            f"{where} is a number x for [-x, x], or [low, high], of at most {most:g} degrees, got {value!r}"
        )
    return float(pair[0]), float(pair[1])


def _numbers(value: Any) -> tuple[float, ...]:
    """The numbers of a list; nothing when it is none, or something else is in it."""
    listed = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    return listed if all(_is_number(x) for x in listed) else ()


def _checked_normalize(value: Any, where: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    if value is None:
        return None
    try:
        mean, std = (tuple(float(x) for x in part) for part in value)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: normalize is {{mean: [r, g, b], std: [r, g, b]}}, got {value!r}") from None
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ConfigError(f"{where}: normalize takes three means and three positive stds, got {value!r}")
    return mean, std


def _check_known(what: str, name: Any, known: Mapping[str, Any], where: str) -> None:
    if name not in known:
        raise ConfigError(f"{where}: {unknown_name(what, name, known)}")


def _filled(defaults: Mapping[str, Any], given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: options are a mapping, got {given!r}")
    for key in given:
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            raise ConfigError(f"{where}: unknown option {key!r}; known: {known}")
    options = {**defaults, **given}
    missing = [key for key, value in options.items() if value is None]
    if missing:
        raise ConfigError(f"{where}: {' and '.join(missing)} must be given")
    return options


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_integer(value: Any, least: int, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{where} is a whole number of at least {least}, got {value!r}")


def _check_probability(value: Any, where: str) -> None:
    if not _is_number(value) or not 0 <= value <= 1:
        raise ConfigError(f"{where} is a number in [0, 1], got {value!r}")


def _checked_range(value: Any, least: float, where: str, *, above: bool = False) -> tuple[float, float]:
    pair = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    fits = len(pair) == 2 and all(_is_number(x) for x in pair) and pair[0] <= pair[1]
    if not fits or pair[0] < least or (above and pair[0] <= least):
        raise ConfigError(f"{where} is [low, high] with {least} < low <= high, got {value!r}")
    return float(pair[0]), float(pair[1])
