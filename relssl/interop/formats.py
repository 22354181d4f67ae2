"""The layouts of released and training checkpoints, told apart by their keys alone.

A layout says which keys of the original become which keys of our method's state, which of them are backbones, and in
which order its optimizer counted parameters. The map goes by prefixes: what follows is called alike on both sides.

    ressl        {model, optimizer, epoch}; encoder_q and encoder_k with net and head, queue (D, K), queue_ptr
    ressl        the small-data code: net and encoder_k as a list of layers, head_q, head_k, queue
    wcl          {model, optimizer, epoch}; net, head1, head2
    resa         {state_dict, optimizer, epoch}; encoder, projector, predictor, momentum_encoder, momentum_projector
    relational   {backbone, relation, optimizer}, and those of the repository's baselines
    relicv2      a pickle of Haiku, {experiment_state: {online_params, online_state, ...}}

A state dict without any prefix says nothing about its method; that of the essential script of relational reasoning,
whose layers are numbered, is the exception.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.errors import ConfigError, InputError, unknown_name
from relssl.interop.keys import Shapes, summary

SOURCES = ("ressl", "wcl", "relicv2", "resa", "relational")


@dataclass(frozen=True)
class Layout:
    """One way in which checkpoints are written.

    Attributes:
        source: the code that writes it, of `SOURCES`.
        kind: in words.
        method: of `relssl.methods`; None where the file does not say.
        groups: prefix (or whole name) in the file -> in the method's state dict. Every name must fit exactly.
        transposed: names in the file of matrices that we store the other way round.
        unread: prefixes that the original writes and nobody reads.
        backbones: branch (`online`, `teacher`, or `encoder` where there is one and no saying which) -> prefix of a
            backbone in the file.
        evaluated: the branch that the original evaluates.
        rename: name of a backbone's entry in the file, without prefix -> torchvision's.
        options: of the backbone that only the names say.
        settings: shapes of the file -> the method's settings that they say.
        optimizer: how the optimizer's groups were made: `by_name` (those with "bn" or "bias" in their name, then the
            others), `one`, `by_part` (encoder, then the rest); None where no source says it.
    """

    source: str
    kind: str
    method: str | None
    backbones: Mapping[str, str]
    groups: Mapping[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    unread: tuple[str, ...] = ()
    evaluated: str = "online"
    rename: Callable[[str], str] = str
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Callable[[Shapes], dict[str, Any]] | None = None
    optimizer: Literal["by_name", "one", "by_part"] | None = None

    @property
    def prefixes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.groups, *self.unread, *self.backbones.values()]))

    def fits(self, names: Sequence[str]) -> bool:
        """Whether there is a backbone of this layout, and most names begin as this layout's do.

        What else there is will be refused by name.
        """
        known = sum(any(begins(name, prefix) for prefix in self.prefixes) for name in names)
        has_backbone = any(begins(name, prefix) for prefix in self.backbones.values() for name in names)
        return has_backbone and 2 * known > len(names)

    def theirs(self, name: str) -> str:
        """What the file calls an entry of our method's state dict."""
        theirs, ours = next(pair for pair in self.groups.items() if begins(name, pair[1]))
        return theirs + name.removeprefix(ours)


def begins(name: str, prefix: str) -> bool:
    """Whether a name is in the group `prefix.`, or is `prefix` itself where that is a whole name."""
    return name.startswith(prefix) if prefix.endswith(".") or not prefix else name == prefix


def _ressl_settings(shapes: Shapes) -> dict[str, Any]:
    return {
        "hidden_dim": shapes["encoder_q.head.linear1.weight"][0],
        "embed_dim": shapes["encoder_q.head.linear2.weight"][0],
        "queue_size": shapes["queue"][1],
    }


def _wcl_settings(shapes: Shapes) -> dict[str, Any]:
    return {"hidden_dim": shapes["head1.linear1.weight"][0], "embed_dim": shapes["head1.linear3.weight"][0]}


def _resa_settings(shapes: Shapes) -> dict[str, Any]:
    return {
        "hidden_dim": shapes["projector.0.weight"][0],
        "embed_dim": shapes["projector.6.weight"][0],
        "predictor": "predictor.0.weight" in shapes,
    }


def _relational_settings(shapes: Shapes) -> dict[str, Any]:
    hidden, inputs = shapes["relation.linear1.weight"]
    features = max((shape[0] for name, shape in shapes.items() if name.startswith("backbone.") and shape), default=0)
    # One feature vector's width is what `sum`, `mean` and `max` have in common.
    return {"hidden_dim": hidden, "aggregation": "cat" if inputs == 2 * features else "sum"}


def _numbered_layers(first_stage: int) -> Callable[[str], str]:
    """The small-data code of ReSSL keeps its ResNet as a list: 0 conv1, 1 bn1, 2 ReLU, [3 max-pool,] four stages."""
    names = {"0": "conv1", "1": "bn1", **{str(first_stage + i): f"layer{i + 1}" for i in range(4)}}

    def rename(name: str) -> str:
        number, _, rest = name.partition(".")
        return f"{names.get(number, number)}.{rest}"

    return rename


def _named_conv4(name: str) -> str:
    """The essential script numbers the layers of a stage: 0 convolution, 1 BatchNorm."""
    stage, number, rest = name.split(".")
    return f"{stage}.{'conv' if number == '0' else 'bn'}.{rest}"


_RESSL = Layout(
    "ressl",
    "training checkpoint of ReSSL",
    "ressl",
    backbones={"online": "encoder_q.net.", "teacher": "encoder_k.net."},
    groups={
        "encoder_q.net.": "encoder.",
        "encoder_q.head.": "head.",
        "encoder_k.net.": "teacher.encoder.",
        "encoder_k.head.": "teacher.head.",
        "queue": "queue.keys",
        "queue_ptr": "queue.pointer",
    },
    transposed=frozenset({"queue"}),
    settings=_ressl_settings,
    optimizer="by_name",
)
_WCL = Layout(
    "wcl",
    "training checkpoint of WCL",
    "wcl",
    backbones={"online": "net."},
    groups={"net.": "encoder.", "head1.": "head1.", "head2.": "head2."},
    settings=_wcl_settings,
    optimizer="by_name",
)
_RESA = Layout(
    "resa",
    "training checkpoint of ReSA",
    "resa",
    backbones={"online": "encoder.", "teacher": "momentum_encoder."},
    groups={
        "encoder.": "encoder.",
        "projector.": "projector.",
        "predictor.": "predictor.",
        "momentum_encoder.": "target.encoder.",
        "momentum_projector.": "target.projector.",
    },
    evaluated="teacher",
    settings=_resa_settings,
    optimizer="one",
)
_RELATIONAL = Layout(
    "relational",
    "training checkpoint of relational reasoning",
    "relational",
    backbones={"online": "backbone."},
    groups={"backbone.": "encoder.", "relation.": "relation."},
    settings=_relational_settings,
    optimizer="by_part",
)
RELICV2 = Layout(
    "relicv2",
    "Haiku checkpoint of ReLICv2",
    "relicv2",
    backbones={"online": "online.", "teacher": "target."},
)


def _small_data(*, pooled: bool) -> Layout:
    return Layout(
        "ressl",
        "training checkpoint of ReSSL's small-data code",
        "ressl",
        backbones={"online": "net.net.", "teacher": "encoder_k.net."},
        unread=("head_q.", "head_k.", "queue", "queue_ptr"),
        rename=_numbered_layers(4 if pooled else 3),
        options={"stem": "small" if pooled else "cifar"},
    )


def _of_the_repository(method: str | None, kind: str, head: str) -> Layout:
    return Layout("relational", kind, method, backbones={"online": "backbone."}, unread=(head,) if head else ())


def layout_of(names: Iterable[str], entries: Iterable[str], source: str, where: str) -> Layout:
    """The layout of a checkpoint.

    Args:
        names: of its tensors, without DDP's `module.`.
        entries: top-level entries of the file beside them (`optimizer_lineval`, ...).
        source: of `SOURCES`, or `auto`.

    Raises:
        ConfigError: no such source.
        InputError: it is none of them, not the one that was asked for, or nothing says which; lists what was seen.
    """
    if source not in ("auto", *SOURCES):
        raise ConfigError(unknown_name("source", source, ("auto", *SOURCES)))
    names = list(names)
    found = [layout for layout in _candidates(names, set(entries)) if names and layout.fits(names)]
    if not found and _is_bare(names):
        if source == "auto":
            raise InputError(
                f"{where} holds a bare network ({', '.join(names[:3])}, ...), and nothing in it says which method it "
                "comes from. ReSA's encoder files look like this, and many others; say where it comes from, such as "
                "--from resa"
            )
        if source != "relicv2":
            return Layout(source, "state dict of an encoder", source, backbones={"encoder": ""}, evaluated="encoder")
    wanted = [layout for layout in found if source in ("auto", layout.source)]
    if len(wanted) == 1:
        return wanted[0]
    seen = f"its {len(names)} keys begin with {summary(names)}"
    if wanted:
        kinds = " or a ".join(layout.kind for layout in wanted)
        raise InputError(f"{where} could be a {kinds}: {seen}. Say which with --from")
    if found:
        raise InputError(f"{where} is no checkpoint of {source} but a {found[0].kind}: {seen}")
    expected = "; ".join(f"{name}: {', '.join(prefixes)}" for name, prefixes in _expected(source).items())
    raise InputError(f"{where} is no checkpoint that relssl knows: {seen}. Expected keys of {expected}")


def _candidates(names: list[str], entries: set[str]) -> list[Layout]:
    small = [name for name in names if name.startswith("net.net.")]
    if small:
        return [_small_data(pooled=not any(name.startswith("net.net.3.") for name in small))]
    if names and all(re.fullmatch(r"layer[1-4]\.[01]\.\w+", name) for name in names):
        kind = "backbone of relational reasoning's essential script"
        essential = Layout("relational", kind, "relational", {"encoder": ""}, evaluated="encoder", rename=_named_conv4)
        return [essential]
    if "optimizer_lineval" in entries:
        kind = "linear evaluation of relational reasoning's repository"
        return [_of_the_repository(None, kind, "classifier.")]
    return [_RESSL, _WCL, _RESA, *_by_head(names)]


def _by_head(names: list[str]) -> list[Layout]:
    """The relational repository: what lies beside the backbone says which of its methods it is."""
    kind = "checkpoint of relational reasoning's repository"
    if not any(name.startswith("backbone.") for name in names):
        return []
    heads = {name.partition(".")[0] for name in names} - {"backbone"}
    if heads in ({"relation"}, set()):
        return [_RELATIONAL if heads else _of_the_repository(None, f"{kind}, backbone only", "")]
    if heads == {"head"}:
        return [_of_the_repository("simclr", f"{kind}, SimCLR", "head.")]
    if heads == {"loss_fn"}:
        return [_of_the_repository("deepinfomax", f"{kind}, Deep InfoMax", "loss_fn.")]
    if heads == {"classifier"}:
        clusters = "classifier.linear1.weight" in names
        method, told = ("deepcluster", "DeepCluster") if clusters else (None, "RotNet or supervised")
        return [_of_the_repository(method, f"{kind}, {told}", "classifier.")]
    return []


def _is_bare(names: list[str]) -> bool:
    return "conv1.weight" in names or "layer1.conv.weight" in names


def _expected(source: str) -> dict[str, tuple[str, ...]]:
    known = {layout.source: layout.prefixes for layout in (_RESSL, _WCL, _RESA, _RELATIONAL)}
    known["relicv2"] = ("a pickle with experiment_state",)
    return {name: prefixes for name, prefixes in known.items() if source in ("auto", name)}
