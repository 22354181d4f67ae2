"""A checkpoint of the original codes, opened and checked to the last name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.errors import ConfigError, InputError
from relssl._version import __version__
from relssl.checkpoint import sha256
from relssl.interop import haiku
from relssl.interop.formats import RELICV2, Layout, begins, layout_of
from relssl.interop.keys import Shapes, check_keys, few, fractions_of, identify, shapes_of, summary
from relssl.interop.reading import read_foreign
from relssl.methods import load_method
from relssl.methods.base import DataInfo
from relssl.nets import build_backbone
from relssl.runfolder import now

_DDP = "module."
# As little as every method takes: only names and shapes are wanted.
_ANY_DATA = DataInfo(num_samples=4, num_classes=None, global_batch=4, total_updates=1, updates_per_epoch=1)


@dataclass
class Foreign:
    """A checkpoint whose names and shapes are those of its layout.

    Attributes:
        tensors: by the original's names, without DDP's prefix.
        entries: what else is at the top of the file, such as `optimizer`.
        architecture: name and options for `build_backbone`.
        settings: of the method, as far as shapes say them.
        epoch: epochs done, where the file says so.
        updates: of the parameters, where the file says so.
        unread: groups of names in the file that nobody needs.
    """

    path: Path
    layout: Layout
    tensors: dict[str, Tensor]
    entries: Mapping[str, Any]
    architecture: tuple[str, dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    updates: int | None = None
    unread: list[str] = field(default_factory=list)

    def backbone(self, branch: str | None = None) -> dict[str, Tensor]:
        """The state dict of a branch, in the names of `relssl.nets`; the evaluated branch when None."""
        return _backbone(self.tensors, self.layout, self.branch(branch))

    def branch(self, wanted: str | None = None) -> str:
        """The branch that is meant.

        Raises:
            ConfigError: this layout has no such branch.
            InputError: this file does not hold it.
        """
        branch, there = wanted or self.layout.evaluated, _branches(self.tensors, self.layout)
        if branch not in self.layout.backbones:
            raise ConfigError(
                f"a {self.layout.kind} has no branch {branch!r}; it has: {', '.join(self.layout.backbones)}"
            )
        if branch not in there:
            raise InputError(f"{self.path} does not hold the {branch} branch, only: {', '.join(there)}; see --branch")
        return branch

    def metadata(self, branch: str | None = None) -> dict[str, Any]:
        """Where a branch comes from, as plain values."""
        name, options = self.architecture
        return {
            "file": self.path.name,
            "sha256": sha256(self.path),
            "bytes": self.path.stat().st_size,
            "source": self.layout.source,
            "kind": self.layout.kind,
            "method": self.layout.method,
            "branch": self.branch(branch),
            "epoch": self.epoch,
            "updates": self.updates,
            "architecture": name,
            "options": options,
            "unread": self.unread,
            "date": now(),
            "relssl": __version__,
        }


def open_foreign(path: str | Path, source: str = "auto") -> Foreign:
    """Read a checkpoint, recognise it by its keys, and check every one of them.

    Raises:
        InputError: see `import_checkpoint`.
        ConfigError: see `import_checkpoint`.
    """
    path = Path(path)
    contents = read_foreign(path)
    if haiku.is_haiku(contents):
        return _open_haiku(path, contents, source)
    tensors, entries = _tensors_of(contents, str(path))
    if all(name.startswith(_DDP) for name in tensors):
        tensors = {name.removeprefix(_DDP): tensor for name, tensor in tensors.items()}
    _check_tensors(tensors, str(path))
    layout = layout_of(tensors, entries, source, str(path))
    architecture, settings = _check_names(tensors, layout, str(path))
    return Foreign(
        path,
        layout,
        tensors,
        entries,
        architecture,
        settings,
        epoch=_whole_number(entries.get("epoch")),
        updates=_adam_steps(entries.get("optimizer")),
        unread=_unread(tensors, layout),
    )


def _open_haiku(path: Path, contents: Mapping[str, Any], source: str) -> Foreign:
    if source not in ("auto", RELICV2.source):
        raise InputError(f"{path} is no checkpoint of {source} but a {RELICV2.kind}: it holds experiment_state")
    tensors, beside = haiku.networks(contents, str(path))
    _check_tensors(tensors, str(path))
    architecture, _ = _check_names(tensors, RELICV2, str(path))
    step = _whole_number(contents.get("step"))
    return Foreign(path, RELICV2, tensors, {}, architecture, updates=step, unread=beside)


def _tensors_of(contents: Any, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a torch file by name, and its other entries."""
    if not isinstance(contents, Mapping):
        raise InputError(f"{where} holds a {type(contents).__name__}; expected a dictionary with a state dict in it")
    entries = {str(key): value for key, value in contents.items()}
    for wrapper in ("model", "state_dict"):
        if isinstance(entries.get(wrapper), Mapping):
            return _only_tensors(entries.pop(wrapper), f"{where}: {wrapper}"), entries
    if isinstance(entries.get("backbone"), Mapping):
        parts = [n for n, part in entries.items() if isinstance(part, Mapping) and not n.startswith("optimizer")]
        groups = {part: _only_tensors(entries.pop(part), f"{where}: {part}") for part in parts}
        return {f"{part}.{name}": tensor for part, group in groups.items() for name, tensor in group.items()}, entries
    if not any(isinstance(value, Tensor) for value in entries.values()):
        raise InputError(
            f"{where} holds no state dict: its entries are {summary(entries)}; expected model, state_dict, backbone, "
            "or tensors by name"
        )
    return _only_tensors(entries, where), {}


def _only_tensors(group: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    others = [str(name) for name, value in group.items() if not isinstance(value, Tensor)]
    if others:
        raise InputError(f"{where} is no state dict: these entries are no tensors: {few(others)}")
    return {str(name): tensor.detach() for name, tensor in group.items()}


def _check_tensors(tensors: Mapping[str, Tensor], where: str) -> None:
    """Ordinary tensors, which are no larger than what the file holds, and finite; variances are not negative."""
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_complex()
        if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f"{where}: {name} is no ordinary tensor ({tensor.layout}, {tensor.dtype})")
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise InputError(f"{where} holds numbers that are not finite, in {few(bad)}; it comes from a failed training")
    negative = [name for name, tensor in tensors.items() if name.endswith("running_var") and (tensor < 0).any()]
    if negative:
        raise InputError(
            f"{where} holds negative variances, in {few(negative)}; it is damaged, or no checkpoint of these"
        )


def _check_kinds(
    tensors: Mapping[str, Tensor], layout: Layout, architecture: tuple[str, dict[str, Any]], where: str
) -> None:
    """Floating-point numbers where the backbone has them: quantised weights, say, have the same names and shapes."""
    fractions = set(fractions_of(*architecture))
    bad = [
        f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
        for branch in _branches(tensors, layout)
        for name, tensor in tensors.items()
        if begins(name, layout.backbones[branch])
        and layout.rename(name.removeprefix(layout.backbones[branch])) in fractions
        and not tensor.is_floating_point()
    ]
    if bad:
        raise InputError(f"{where} holds whole numbers where the backbone has floating-point ones, in {few(bad)}")


def _check_names(tensors: Mapping[str, Tensor], layout: Layout, where: str) -> tuple[tuple[str, Any], dict[str, Any]]:
    """Architecture and settings of the method; refuses any name, shape or kind of number that does not belong."""
    got = {
        name: shape
        for name, shape in shapes_of(tensors).items()
        if not any(begins(name, prefix) for prefix in layout.unread)
    }
    branches = _branches(tensors, layout)
    found = [
        identify(
            shapes_of(_backbone(tensors, layout, branch)),
            f"{where}, {branch} branch" if len(branches) > 1 else where,
            haiku=layout is RELICV2,
        )
        for branch in branches
    ]
    if any(architecture != found[0] for architecture in found):
        raise InputError(f"{where} holds two different backbones: {found[0][0]} and {found[1][0]}")
    name, options = found[0][0], {**found[0][1], **layout.options}
    settings: dict[str, Any] = {}
    if layout.groups:
        settings = _settings(layout, got)
        expected = _expected(layout, (name, options), settings, got)
    else:
        expected = {entry: shape for entry, shape in got.items() if _is_in_a_backbone(entry, layout)}
    check_keys(expected, got, where, f"a {layout.kind} with {name}")
    _check_kinds(tensors, layout, (name, options), where)
    return (name, options), settings


def _settings(layout: Layout, shapes: Shapes) -> dict[str, Any]:
    if layout.settings is None:
        return {}
    try:
        return layout.settings(shapes)
    except (KeyError, IndexError, ValueError):  # an incomplete head: its default says below what is missing
        return {}


def _expected(
    layout: Layout, architecture: tuple[str, dict[str, Any]], settings: Mapping[str, Any], got: Shapes
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the method's state in the file's words; of the groups that the file has at all."""
    assert layout.method is not None
    method = load_method(layout.method)
    name, options = architecture
    with torch.device("meta"):
        module = method(
            lambda: build_backbone(name, **options), method.Config(name=layout.method, **settings), _ANY_DATA
        )
    expected = {layout.theirs(key): shape for key, shape in shapes_of(module.state_dict()).items()}
    expected = {key: shape[::-1] if key in layout.transposed else shape for key, shape in expected.items()}
    there = [prefix for prefix in layout.groups if any(begins(name, prefix) for name in got)]
    return {key: shape for key, shape in expected.items() if any(begins(key, prefix) for prefix in there)}


def _branches(tensors: Mapping[str, Tensor], layout: Layout) -> list[str]:
    """The branches that a file holds."""
    return [name for name, prefix in layout.backbones.items() if any(begins(entry, prefix) for entry in tensors)]


def _backbone(tensors: Mapping[str, Tensor], layout: Layout, branch: str) -> dict[str, Tensor]:
    prefix = layout.backbones[branch]
    return {layout.rename(n.removeprefix(prefix)): tensor for n, tensor in tensors.items() if begins(n, prefix)}


def _is_in_a_backbone(name: str, layout: Layout) -> bool:
    return any(begins(name, prefix) for prefix in layout.backbones.values())


def _unread(tensors: Mapping[str, Tensor], layout: Layout) -> list[str]:
    return [prefix.rstrip(".") for prefix in layout.unread if any(begins(name, prefix) for name in tensors)]


def _whole_number(value: Any) -> int | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = int(value)
    except (TypeError, ValueError, RuntimeError):  # a tensor or an array of several
        return None
    return number if number >= 0 else None


def _adam_steps(optimizer: Any) -> int | None:
    """How often Adam has stepped; SGD does not count."""
    states = optimizer.get("state") if isinstance(optimizer, Mapping) else None
    if not isinstance(states, Mapping):
        return None
    steps = {_whole_number(state.get("step")) for state in states.values() if isinstance(state, Mapping)}
    return next(iter(steps)) if len(steps) == 1 else None
