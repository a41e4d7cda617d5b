"""The settings of a parameter group: which update rule they mean, and whether they can be used.

The one place that knows how the optimizer's public settings are called in `cruxy_kernels`. Everything else
about a rule (names of its state, its flags, its codecs) comes from there.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cruxy_kernels import RULES
from cruxy_triton.errors import warn

Group = dict[str, Any]


# Flags of a rule that a group knows under another name.
SETTING_OF_FLAG = {"nesterov": "use_nesterov", "decoupled": "decoupled_weight_decay"}
SWITCHES = ("use_lion", "use_nesterov", "decoupled_weight_decay", "use_gc", "maximize", "capturable")
# What a tensor's state holds beside the rule's buffers and their scales: views of what the optimizer keeps itself.
NO_MOMENTS = ("step", "clip")
# Settings of the whole optimizer, which a group cannot have of its own.
SHARED = (
    "mode", "state_bits", "bounds", "guard", "clip", "gamma_norm", "meta_lr_eta", "meta_lr_beta2", "meta_interval",
    "backend", "layerwise", "response",
)  # fmt: skip


class Settings(NamedTuple):
    """What a group says, in a form that shows a change: equal settings, equal steps."""

    rule: str
    flags: tuple[bool, ...]  # in the order of the rule's
    use_gc: bool
    lr: float  # 0 for a tensor on another device than the CPU: the host does not wait for it
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool


def rule_of(group: Group) -> str:
    """The name of a group's update rule: `rule` where it is given, else what `use_lion` says.

    Raises ValueError for an unknown rule, and where the two contradict each other.
    """
    rule = group.get("rule") or ("lion" if group["use_lion"] else "adamw")
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; expected one of {', '.join(RULES)}")
    if group["use_lion"] and rule != "lion":
        raise ValueError(f"use_lion=True and rule={rule!r} exclude each other")
    return rule


def settings_of(group: Group) -> Settings:
    rule = rule_of(group)
    flags = [group.get(SETTING_OF_FLAG.get(flag, flag), default) for flag, default in RULES[rule].flags.items()]
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.item() if lr.device.type == "cpu" and lr.numel() == 1 else 0.0
    return Settings(
        rule, tuple(flags), group["use_gc"], lr, group["betas"], group["eps"], group["weight_decay"], group["maximize"]
    )


def named_flags(rule: str, flags: Sequence[bool]) -> dict[str, Any]:
    """The flags of `Settings` by the names that the kernels know."""
    return dict(zip(RULES[rule].flags, flags, strict=True))


def check(group: Group, state_bits: int) -> None:
    """Raise ValueError where a group's settings cannot be used; the message says what was expected."""
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got {group['lr'].numel()} elements")
    for name in SWITCHES:
        if not isinstance(group.get(name, False), bool):
            raise ValueError(f"{name} is {group[name]!r}; expected True or False")
    settings = settings_of(group)
    for name in ("lr", "eps", "weight_decay"):
        value = getattr(settings, name)
        if not (is_number(value) and 0.0 <= value < math.inf):
            raise ValueError(f"{name} is {value!r}; expected a finite number of at least 0")
    betas = settings.betas
    if not (is_pair(betas) and all(0.0 <= b < 1.0 for b in betas)):
        raise ValueError(f"betas is {betas!r}; expected two floats, each from 0 to below 1")
    if state_bits not in RULES[settings.rule].state_bits:
        able = " or ".join(name for name, rule in RULES.items() if state_bits in rule.state_bits)
        hint = "use_lion=True" if able == "lion" else f"the rule {able}"
        raise ValueError(f"state_bits={state_bits} needs {hint}: the {settings.rule} rule has no {state_bits}-bit form")


def check_params(group: Group, state_bits: int) -> None:
    """Raise ValueError for tensors that cannot be optimized."""
    for p in group["params"]:
        if p.is_complex():
            raise ValueError("CruxyOptimizer does not support complex parameters; use torch.view_as_real")
        if state_bits != 32 and p.dtype == torch.float64:
            raise ValueError(f"state_bits={state_bits} does not support float64 parameters; use state_bits=32")


def check_states(group: Group, state: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Raise ValueError where the states of a group's tensors are of another rule than the group."""
    wanted = set(RULES[rule_of(group)].state)
    for p in group["params"]:
        held = state.get(p)
        if held and {name for name in held if name not in NO_MOMENTS and not name.endswith("_scale")} != wanted:
            raise ValueError(
                f"a group's update rule is now {rule_of(group)!r}, but its states are of another rule "
                f"({', '.join(sorted(held))}); make a new optimizer, whose load_state_dict takes over what fits"
            )


def refuse_shared(group: Group, optimizer: Any) -> None:
    """Raise ValueError where a group brings another value for a setting of the whole optimizer."""
    for name in SHARED:
        if name in group and group[name] != getattr(optimizer, name):
            raise ValueError(
                f"{name} is a setting of the whole optimizer ({getattr(optimizer, name)!r} here), not of a group "
                f"({group[name]!r}); make a second optimizer for these parameters"
            )


def warn_of_betas(mode: str, rule: str, betas: Any) -> None:
    """Say where betas that somebody asked for have no effect."""
    if not is_pair(betas):
        return  # refused elsewhere
    if mode == "stability_v1" and betas[0] != 0.9:
        warn(f"betas[0] is {betas[0]}, but mode='stability_v1' sets beta1 to 0.9")
    if mode == "meta3" and betas[1] != RULES[rule].betas[1]:
        warn(
            f"betas[1] is {betas[1]}, but mode='meta3' multiplies beta2 by 1 - 0.3 phase and keeps it at 0.9 or "
            "more: while the phase is above a third, as in most of a run, beta2 is 0.9; metrics()['beta2'] shows it"
        )


def is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(is_number(v) for v in value)


def is_count(value: Any) -> bool:
    """Whether it is a whole number of at least 0; True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
