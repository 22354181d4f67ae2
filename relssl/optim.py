"""Optimizers, parameter groups, and schedules, all as plain functions of plain numbers.

A schedule is a function of the global step (0, 1, 2, ...) that returns the value in force *during* that step;
the trainer writes it into every parameter group.  Nothing here keeps state except the optimizers themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipelines.errors import ConfigError, unknown_name


class Lars(torch.optim.Optimizer):
    """SGD with momentum and layer-wise adaptive rates (You et al., arXiv:1708.03888), in WCL's form.

    For each tensor p with gradient g of a group with `lars` on, with weight decay w, trust coefficient c:

        g <- g + w p
        g <- c ||p|| / (||g|| + eps) g          if ||p|| > 0 and ||g|| > 0
        m <- momentum m + g                     (m = g in the first step)
        p <- p - lr m

    With `lars` off the second line is left out.  The rate multiplies outside the buffer, so a step at rate 0
    still fills it.  Nothing waits for the device.

    Args:
        params: parameters, or groups with the keys `lr`, `momentum`, `weight_decay` (default 0) and `lars`
            (default True).
        lr, momentum, trust_coefficient, eps: see the formulas.

    Raises:
        ValueError: a negative number, or momentum outside [0, 1).
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        momentum: float = 0.9,
        trust_coefficient: float = 1e-3,
        eps: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        numbers = {"lr": lr, "trust_coefficient": trust_coefficient, "eps": eps, "weight_decay": weight_decay}
        for name, value in numbers.items():
            if not value >= 0.0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        super().__init__(params, {**numbers, "momentum": momentum, "lars": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        updates: list[Tensor] = [p.grad for p in group["params"] if p.grad is not None]
        if group["weight_decay"] != 0:
            updates = list(torch._foreach_add(updates, params, alpha=group["weight_decay"]))
        if group["lars"]:
            ratios = _trust_ratios(params, updates, group["trust_coefficient"], group["eps"])
            updates = [update * ratio for update, ratio in zip(updates, ratios, strict=True)]
        buffers = []
        for p in params:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(state["momentum_buffer"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(params, buffers, alpha=-group["lr"])


def _trust_ratios(params: list[Tensor], updates: list[Tensor], trust: float, eps: float) -> list[Tensor]:
    """c ||p|| / (||g|| + eps), or 1 where either norm is 0; one 0-d tensor for each parameter."""
    ratios = []
    for p_norm, g_norm in zip(torch._foreach_norm(params), torch._foreach_norm(updates), strict=True):
        ratio = trust * p_norm / (g_norm + eps)
        ratios.append(torch.where((p_norm > 0) & (g_norm > 0), ratio, torch.ones_like(ratio)))
    return ratios


def parameter_groups(
    module: nn.Module, weight_decay: float, exclude: Literal["none", "by_name", "1d"] = "none"
) -> list[dict[str, Any]]:
    """The trainable parameters in one or two groups, in the module's order: the decayed, then the excluded.

    Args:
        weight_decay: of the first group; the second has 0.
        exclude: which parameters take neither decay nor LARS.
            `none`: no one.
            `by_name`: those with "bn" or "bias" in their name, as in ReSSL and WCL.  BatchNorm scales in a
            `downsample` are called `downsample.1.weight` and so are decayed, as they were there.
            `1d`: those with at most one dimension: all biases and norm scales.

    Returns:
        Groups with keys `params`, `weight_decay`, `lars`; a group without parameters is left out.

    Raises:
        ConfigError: an unknown rule, a negative decay, or nothing to train.
    """
    rules: dict[str, Callable[[str, Tensor], bool]] = {
        "none": lambda name, p: False,
        "by_name": lambda name, p: "bn" in name or "bias" in name,
        "1d": lambda name, p: p.ndim <= 1,
    }
    if exclude not in rules:
        raise ConfigError(f"Unknown exclusion {exclude!r}. Known: {', '.join(rules)}.")
    if not weight_decay >= 0.0:
        raise ConfigError(f"weight_decay must be at least 0, got {weight_decay}.")
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ConfigError("There is nothing to train: no parameter of the method requires a gradient.")
    excluded = rules[exclude]
    decayed = [p for name, p in named if not excluded(name, p)]
    others = [p for name, p in named if excluded(name, p)]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay, "lars": True},
        {"params": others, "weight_decay": 0.0, "lars": False},
    ]
    return [group for group in groups if group["params"]]


# What each optimizer takes besides lr and the groups, with its default.
_OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": False}),
    "lars": (Lars, {"momentum": 0.9, "trust_coefficient": 1e-3, "eps": 0.0}),
    "adam": (torch.optim.Adam, {"betas": (0.9, 0.999), "eps": 1e-8}),
    "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8}),
}


def build_optimizer(
    name: str, groups: Iterable[Mapping[str, Any]], *, lr: float, **options: Any
) -> torch.optim.Optimizer:
    """An optimizer over `parameter_groups(...)`, which carry the weight decay.

    Args:
        name: `sgd` (momentum, nesterov), `lars` (momentum, trust_coefficient, eps), `adam` (betas, eps; decay
            is L2) or `adamw` (betas, eps; decay is decoupled).
        lr: of the first step; schedules overwrite it.
        options: those in parentheses; the defaults are PyTorch's, with momentum 0.9.

    Raises:
        ConfigError: an unknown name or option (the known ones are listed), or a value that is refused.
    """
    if name not in _OPTIMIZERS:
        raise ConfigError(unknown_name("optimizer", name, _OPTIMIZERS))
    kind, defaults = _OPTIMIZERS[name]
    for option in options:
        if option not in defaults:
            raise ConfigError(unknown_name(f"option of optimizer {name!r}", option, defaults))
    settings = {**defaults, **options}
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    try:
        return kind([dict(group) for group in groups], lr=lr, **settings)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Optimizer {name!r} refused its settings lr={lr}, {settings}: {error}") from error


def scale_lr(base: float, batch: int, rule: Literal["none", "linear", "sqrt"] = "none") -> float:
    """The learning rate for a global batch.

    Args:
        base: the recipe's number.
        batch: images per update, over all processes and micro-batches.
        rule: `none`: base.  `linear`: base * batch / 256 (ReSA, BYOL).  `sqrt`: base * sqrt(batch) (WCL's
            0.075 * sqrt(batch)).

    Raises:
        ConfigError: an unknown rule.
    """
    factors = {"none": 1.0, "linear": batch / 256, "sqrt": math.sqrt(batch)}
    if rule not in factors:
        raise ConfigError(f"Unknown lr scaling {rule!r}. Known: {', '.join(factors)}.")
    return base * factors[rule]


def warmup_cosine(
    step: int,
    *,
    base: float,
    final: float,
    warmup_steps: int,
    total_steps: int,
    inclusive_warmup: bool = False,
) -> float:
    """Linear warm-up from 0 to `base`, then half a cosine towards `final`, which comes at `total_steps`.

    Args:
        inclusive_warmup: False (ReSSL, WCL): base * step / warmup_steps, so `base` comes at warmup_steps.
            True (ReSA): `base` comes at warmup_steps - 1 already, and again at warmup_steps.
    """
    if step < warmup_steps:
        last = max(warmup_steps - 1, 1) if inclusive_warmup else warmup_steps
        return base * step / last
    progress = _progress(step - warmup_steps, total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1.0 + math.cos(math.pi * progress))


def cosine_ema(step: int, *, base: float, total_steps: int) -> float:
    """Teacher momentum from `base` at step 0 to 1 at `total_steps`, half a cosine (BYOL, ReLICv2, ReSA)."""
    return 1.0 - 0.5 * (1.0 - base) * (1.0 + math.cos(math.pi * _progress(step, total_steps)))


def constant(step: int, *, base: float) -> float:
    """`base` at every step."""
    return base


def multistep(step: int, *, base: float, milestones: Sequence[int], gamma: float = 0.1) -> float:
    """`base`, multiplied by `gamma` at each milestone (a step) that has been reached."""
    return base * gamma ** sum(step >= milestone for milestone in milestones)


def exponential(step: int, *, base: float, final: float, total_steps: int) -> float:
    """Geometric from `base` at step 0 towards `final` at `total_steps`."""
    return base * (final / base) ** _progress(step, total_steps)


def _progress(step: int, total: int) -> float:
    """step / total, held at 1 from the end on (also for an empty stretch)."""
    return 1.0 if step >= total else step / total
