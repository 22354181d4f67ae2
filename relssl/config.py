"""Recipes: YAML read strictly, overridden from the command line, checked before anything is built.

A recipe opens with its command, the row of the paper that it reproduces and what was measured, then reads
data -> views -> method -> backbone -> optimization -> training -> evaluation. An unknown key is an error that names
the nearest known one.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipelines.engines import check_engine_name
from pipelines.errors import ConfigError, InputError, unknown_name
from pipelines.views import ViewSpec
from relssl.evaluators.protocols import Temperature

FORMAT = 1
# Overrides that leave a recipe the one that reproduces its paper's row.
_LEAVES_THE_ROW = ("data.", "train.seed", "train.log_every", "train.tensorboard", "train.checkpoint", "eval.online")


class Section(BaseModel):
    """A part of a recipe; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PaperRow(Section):
    """The row of a paper that a recipe reproduces."""

    row: str
    metric: str = "linear top-1"
    value: float | None = None
    source: str


class About(Section):
    command: str = ""
    paper: PaperRow | None = None
    assumptions: dict[str, str] = Field(
        default_factory=dict,
        description="keys of this recipe (views.plan.box) whose values no public source has: where they come from",
    )
    measured: str = "unmeasured"


class Data(Section):
    train: str | list[str]
    test: str | list[str] | None = None
    probe: str | list[str] | None = Field(None, description="labelled data for kNN and linear; `train` when absent")
    engine: str = "auto"
    resize: Literal["antialias", "area"] = Field("antialias", description="area: FFCV's own, ffcv engine only")
    workers: int | None = Field(
        None,
        ge=1,
        description="threads that make views; when absent, a share of the cores for each process of the machine",
    )

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, value: str) -> str:
        if value != "auto":
            check_engine_name(value)
        return value


class Normalize(Section):
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class ViewPhase(Section):
    until_epoch: int | None = Field(None, gt=0)
    plan: list[dict[str, Any]]


class Views(Section):
    """Either one `plan`, or `phases` of plans by epoch. `normalize` holds for every view that has none of its own."""

    normalize: Normalize
    plan: list[dict[str, Any]] | None = None
    phases: list[ViewPhase] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Views:
        if (self.plan is None) == (self.phases is None):
            raise ValueError("give either `plan` or `phases`, not both and not neither")
        self.specs()
        return self

    def specs(self) -> list[tuple[int | None, list[ViewSpec]]]:
        """What `ViewLoader` takes as `phases`."""
        phases = self.phases or [ViewPhase(plan=self.plan or [])]
        return [(phase.until_epoch, [self.spec(values) for values in phase.plan]) for phase in phases]

    def spec(self, values: Mapping[str, Any]) -> ViewSpec:
        return ViewSpec.from_dict({"normalize": (self.normalize.mean, self.normalize.std), **values})


class Backbone(Section):
    """Everything but `norm` goes to `relssl.nets.build_backbone`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    norm: str = Field("local", description="batch statistics: local (per process), split(n), sync")

    @field_validator("norm")
    @classmethod
    def _known_norm(cls, value: str) -> str:
        if not re.fullmatch(r"local|sync|split\([1-9]\d*\)", value):
            raise ValueError(f"norm is local, sync or split(n), got {value!r}")
        return value

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Schedule(Section):
    name: Literal["warmup_cosine", "constant", "multistep", "exponential"] = "warmup_cosine"
    warmup_epochs: float = Field(0, ge=0)
    inclusive_warmup: bool = False
    final: float = Field(0.0, ge=0, description="last learning rate, before scaling")
    final_share: float | None = Field(None, ge=0, le=1, description="instead of final: its share of lr")
    milestones: list[int] = Field(default_factory=list, description="epochs at which multistep multiplies by gamma")
    gamma: float = Field(0.1, gt=0)

    @model_validator(mode="after")
    def _complete(self) -> Schedule:
        if self.final and self.final_share is not None:
            raise ValueError("final and final_share say the same thing; give one of them")
        if self.name == "exponential" and not (self.final or self.final_share):
            raise ValueError("exponential falls geometrically to `final`, which must be above 0")
        if self.name == "multistep" and not self.milestones:
            raise ValueError("multistep needs milestones, the epochs at which the rate falls")
        return self


class Optim(Section):
    name: Literal["sgd", "adam", "adamw", "lars"] = "sgd"
    lr: float = Field(gt=0)
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, ge=0)
    trust_coefficient: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    exclude: Literal["none", "by_name", "1d"] = "none"
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def _falls(self) -> Optim:
        if self.final_lr > self.lr:
            raise ValueError(f"schedule.final is {self.final_lr}, above lr {self.lr}: the rate would rise; lower it")
        return self

    @property
    def final_lr(self) -> float:
        """The last learning rate, before scaling."""
        share = self.schedule.final_share
        return self.schedule.final if share is None else share * self.lr


class Checkpointing(Section):
    every_epochs: int | None = Field(1, gt=0)
    every_updates: int | None = Field(None, gt=0)
    keep: int = Field(2, ge=1, description="checkpoints kept; the newest ones")


class Train(Section):
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=1, description="images per update, over all processes and micro-batches")
    num_micro: int = Field(1, ge=1, description="micro-batches per update (gradient accumulation)")
    accumulation: Literal["exact", "approximate"] = "exact"
    drop_last: bool = True
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    seed: int = Field(0, ge=0)
    clip_norm: float | None = Field(None, gt=0)
    channels_last: Literal["auto"] | bool = Field("auto", description="memory order; auto: on CUDA only")
    compile: bool = False
    log_every: int = Field(10, gt=0, description="updates between lines of metrics.jsonl")
    tensorboard: bool = False
    checkpoint: Checkpointing = Checkpointing()


class OnlineMeasure(Section):
    """One evaluator that runs while training."""

    every_epochs: int | None = Field(None, gt=0, description="eval.online.every_epochs when absent")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "knn: k, temperature; linear: protocol (cached), its settings, percent, draw; retrieval: k; probe: its "
            "settings; fewlabel: labels, percent, seeds; finetune: protocol (the recipe's), its settings, percent, "
            "draw. The percent of fewlabel is of the num_train features, that of linear and finetune of all training "
            "images"
        ),
    )


class OnlineMeasures(Section):
    """What runs while training; a list of names stands for their defaults."""

    knn: OnlineMeasure | None = None
    linear: OnlineMeasure | None = None
    retrieval: OnlineMeasure | None = None
    probe: OnlineMeasure | None = None
    fewlabel: OnlineMeasure | None = None
    finetune: OnlineMeasure | None = None
    label_free: OnlineMeasure | None = None

    def chosen(self) -> dict[str, OnlineMeasure]:
        """Those that were asked for, by name."""
        return {name: measure for name in type(self).model_fields if (measure := getattr(self, name)) is not None}


class Online(Section):
    """Evaluation inside training. Without labels, label-free measures take the place of those that need them."""

    every_epochs: int = Field(10, gt=0)
    num_train: int = Field(10_000, gt=0, description="labelled images to look neighbours up in or to train on, at most")
    num_test: int = Field(10_000, gt=0)
    evaluators: OnlineMeasures = OnlineMeasures(knn=OnlineMeasure())

    @field_validator("evaluators", mode="before")
    @classmethod
    def _names_or_sections(cls, value: Any) -> Any:
        if isinstance(value, list):
            for name in value:
                if name not in OnlineMeasures.model_fields:
                    raise ValueError(unknown_name("evaluator", name, OnlineMeasures.model_fields))
            return {name: {} for name in value}
        return value


class Knn(Section):
    """`k` and `temperature` hold while training and where no protocol is named."""

    k: int = Field(20, gt=0)
    temperature: Temperature = 0.07
    protocol: str | None = Field(None, description="a named one of `relssl.evaluators.knn`, for `relssl eval knn`")
    view: dict[str, Any] | None = Field(None, description="the un-augmented view for kNN; eval.view when absent")


class Linear(Section):
    """A named protocol of `relssl.evaluators.linear`, fields of it that differ, and its training views."""

    protocol: str = "cached"
    options: dict[str, Any] = Field(default_factory=dict)
    plan: list[dict[str, Any]] | None = Field(None, description="training views; absent: features extracted once")
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)


class Finetune(Section):
    """A named protocol of `relssl.evaluators.finetune` and fields of it that differ; views are those of `linear`."""

    protocol: str = "plain"
    options: dict[str, Any] = Field(default_factory=dict)
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)


class Eval(Section):
    view: dict[str, Any] = Field(description="the un-augmented view: size and box")
    batch_size: int = Field(512, gt=0)
    online: Online | None = Online()
    knn: Knn = Knn()
    linear: Linear = Linear()
    finetune: Finetune = Finetune()


class Recipe(Section):
    """A complete, checked configuration."""

    format: int = FORMAT
    about: About = About()
    data: Data
    views: Views
    method: dict[str, Any]
    backbone: Backbone
    optim: Optim
    train: Train
    eval: Eval

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.format != FORMAT:
            raise ValueError(f"this is a recipe of format {self.format}; this version reads format {FORMAT}")
        if "name" not in self.method:
            raise ValueError("method needs a name")
        self._check_assumptions()
        self.eval_spec()
        self.knn_spec()
        for values in self.eval.linear.plan or []:
            self.views.spec({"name": "train", **values})
        if self.optim.schedule.warmup_epochs > self.train.epochs and self.optim.schedule.name == "warmup_cosine":
            raise ValueError(
                f"optim.schedule.warmup_epochs {self.optim.schedule.warmup_epochs} is more than the "
                f"{self.train.epochs} epochs; set optim.schedule.warmup_epochs to less"
            )
        splits = re.fullmatch(r"split\((\d+)\)", self.backbone.norm)
        if splits and self.train.batch_size % int(splits[1]):
            raise ValueError(
                f"train.batch_size {self.train.batch_size} does not divide into the groups of backbone.norm: "
                f"{self.backbone.norm}"
            )
        if self.train.batch_size % self.train.num_micro:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} is not a multiple of train.num_micro {self.train.num_micro}"
            )
        return self

    def _check_assumptions(self) -> None:
        if not self.about.assumptions:
            return
        values = self.model_dump(exclude={"about"})
        for key in self.about.assumptions:
            if not _leads_somewhere(values, key.split(".")):
                raise ValueError(
                    f"about.assumptions says where {key} comes from, but this recipe has no such key; give its whole "
                    "path, as in optim.schedule.warmup_epochs or views.plan.box"
                )

    def eval_spec(self) -> ViewSpec:
        """The un-augmented view of an image."""
        return self.views.spec({"name": "image", **self.eval.view})

    def knn_spec(self) -> ViewSpec:
        """The un-augmented view of an image for `relssl eval knn`."""
        return self.views.spec({"name": "image", **(self.eval.knn.view or self.eval.view)})

    def linear_specs(self) -> list[ViewSpec] | None:
        """Training views of the linear probe; None when features are extracted once."""
        plan = self.eval.linear.plan
        return None if plan is None else [self.views.spec({"name": "image", **values}) for values in plan]

    @property
    def method_name(self) -> str:
        """The method's name; of a file of one's own, that of the file."""
        name = str(self.method["name"])
        return Path(name).stem if name.endswith(".py") else name

    def method_config(self) -> Any:
        """The method's own settings, checked. Imports the method."""
        from relssl.methods import load_method

        config = load_method(str(self.method["name"])).Config
        return _validate(config, self.method, "method")

    def check(self) -> None:
        """Everything that can be checked without data, down to building the method without memory."""
        from relssl.build import check_buildable
        from relssl.evaluators.finetune import finetune_protocol
        from relssl.evaluators.knn import knn_protocol
        from relssl.evaluators.linear import linear_protocol
        from relssl.methods import load_method
        from relssl.methods.base import check_plan
        from relssl.online_options import online_settings

        method = load_method(str(self.method["name"]))
        self.method_config()
        for until, plan in self.views.specs():
            where = "views" if until is None else f"views until epoch {until}"
            check_plan(method, plan, where)
        if "full_batch" in method.NEEDS and not self.train.drop_last:
            raise ConfigError(f"method {self.method['name']} needs full batches: set train.drop_last: true")
        if self.train.num_micro > 1:
            self._check_accumulation(method.ACCUMULATION)
        linear_protocol(self.eval.linear.protocol, **self.eval.linear.options)
        finetune_protocol(self.eval.finetune.protocol, **self.eval.finetune.options)
        if self.eval.knn.protocol is not None:
            knn_protocol(self.eval.knn.protocol)
        if self.eval.online is not None:
            online_settings(self.eval)
        check_buildable(self)

    def _check_accumulation(self, kind: str) -> None:
        name, times = self.method["name"], self.train.num_micro
        if kind == "refused":
            raise ConfigError(f"method {name} cannot accumulate gradients; set train.num_micro: 1, got {times}")
        whole_groups = self.backbone.norm.startswith("split")
        if self.train.accumulation == "exact" and not (kind == "exact" and whole_groups):
            reason = (
                "batch statistics see one micro-batch at a time; backbone.norm: split(n) would keep them"
                if kind == "exact"
                else "the loss and the batch statistics see one micro-batch at a time"
            )
            raise ConfigError(
                f"train.num_micro is {times}, but with method {name} gradient accumulation changes the result "
                f"({reason}); set train.accumulation: approximate to accept that, or train.num_micro: 1"
            )

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `key.sub=value` overrides, check everything that needs no data.

    Raises:
        InputError: the file does not exist or is not YAML.
        ConfigError: an unknown key, a wrong type or range, or a combination that cannot work.
    """
    path = Path(path)
    values = read_yaml(path)
    for override in overrides:
        apply_override(values, override)
    changes = [override for override in overrides if not override.startswith(_LEAVES_THE_ROW)]
    if changes and isinstance(values.get("about"), dict):
        values["about"] = _about_changed(values["about"], [change.partition("=")[0].strip() for change in changes])
    recipe = recipe_from(values, str(path))
    recipe.check()
    return recipe


def recipe_from(values: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from a mapping; `where` is named in errors.

    Raises:
        ConfigError: an unknown key, a wrong type or range.
    """
    return _validate(Recipe, values, where)


def _about_changed(about: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Of a recipe in which `keys` were changed: it reproduces no row, and what was chosen is no longer assumed."""
    kept = {key: value for key, value in about.items() if key != "paper"}
    if isinstance(kept.get("assumptions"), dict):
        kept["assumptions"] = {
            assumed: source
            for assumed, source in kept["assumptions"].items()
            if not any(f"{assumed}.".startswith(f"{key}.") or key.startswith(f"{assumed}.") for key in keys)
        }
    return kept


def _leads_somewhere(values: Any, path: Sequence[str]) -> bool:
    """Whether a path of keys leads to a value; through a list, by any of its items."""
    if not path:
        return True
    if isinstance(values, list):
        return any(_leads_somewhere(value, path) for value in values)
    return isinstance(values, dict) and path[0] in values and _leads_somewhere(values[path[0]], path[1:])


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping, by the strict loader."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of sections (data, views, method, ...), got {values!r}")
    return values


def parse_yaml(text: str, where: str) -> Any:
    """YAML 1.2's core scalars: `1e-4` is a number, `no` is a string, `012` is twelve, a duplicate key is an error."""
    try:
        loader = _StrictLoader(text)  # a SafeLoader: builds plain values only
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `a.b=value` in a nested mapping; the value is parsed as YAML.

    Raises:
        ConfigError: no `=`, or the path runs through something that is not a section.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"an override is key.sub=value, got {override!r}")
    *parents, last = key.strip().split(".")
    section: Any = values
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {parent} is not a section")
    section[last] = parse_yaml(text, f"the value of {override!r}")


def _validate(model: Any, values: Mapping[str, Any], where: str) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(model, problem) for problem in error.errors()]
        raise ConfigError(f"{where}: " + ("\n  ".join(["", *lines]) if len(lines) > 1 else lines[0])) from None


def _explain(model: Any, problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _known_keys(model, problem["loc"][:-1])
        section = ".".join(str(part) for part in problem["loc"][:-1])
        return unknown_name(f"key in {section}" if section else "key", problem["loc"][-1], known)
    if problem["type"] == "missing":
        return f"{path} is required"
    message = problem["msg"].removeprefix("Value error, ")
    if not path:
        return message
    got = problem.get("input")
    shown = "" if isinstance(got, (dict, list)) else f"; got {got!r}"
    return f"{path}: {message}{shown}"


def _known_keys(model: Any, loc: Sequence[Any]) -> list[str]:
    """Field names of the section at `loc`."""
    for part in loc:
        info = model.model_fields.get(part) if isinstance(part, str) else None
        if info is None:
            continue
        candidates = [info.annotation, *get_args(info.annotation)]
        candidates += [inner for c in candidates for inner in get_args(c)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return list(model.model_fields)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, where `no` is false, `012` is ten and `1e-4` is a string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$",
        "-+.0123456789",
    ),
    ("merge", r"^<<$", "<"),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(str(loader.construct_scalar(node)).lower().replace(".inf", "inf"))


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)
