"""Checkpoints of CruxyOptimizer: its state in the form of torch.optim, and what of a saved one can be taken over.

The form is torch's own, so that tools which know `torch.optim.AdamW` know ours:

    {"state": {index: {"step": 0-dim fp32, "exp_avg": ..., "exp_avg_sq": ..., "clip": fp32 (NUM_HISTORY,)}},
     "param_groups": [{"lr": ..., "params": [index, ...], "mode": "meta3", "control": fp32 (NUM_SLOTS,)}]}

`release`, in the first group, is there where gradients have been released (controllers/release.py), and `layers` where
there is layer-wise control (controllers/layers.py). `control` is the group's main row of the control vector: the
statistics, the controller's multiplier and its histories. It stands in the group, because
`torch.distributed.checkpoint` keeps nothing else. State in fewer bits
is a tensor of codes with its scales beside it (`exp_avg`, `exp_avg_scale`). `clip` is there with `clip="tensor"` alone.

The functions here are pure: `read` makes and checks everything before an optimizer is touched.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from cruxy_kernels import RULES, dequantize_blockwise, quantize_blockwise
from cruxy_kernels import layout as L
from cruxy_kernels.codec import Codec, scale_name
from cruxy_kernels.rules import codec_of
from cruxy_triton import distributed, groups
from cruxy_triton.controllers.layers import KEY as LAYERS
from cruxy_triton.controllers.release import KEY as RELEASE
from cruxy_triton.controllers.release import NUM_RELEASE, SCALE
from cruxy_triton.errors import warn
from cruxy_triton.groups import Group, rule_of

# Settings that another optimizer's group shares with ours.
FOREIGN_SETTINGS = ("lr", "betas", "eps", "weight_decay", "maximize", "initial_lr")
# Slots of a control row that are never negative.
NON_NEGATIVE = (
    L.STEP, L.AGE, L.SKIPPED, L.V_FAST, L.V_SLOW, L.PREV_NORM, L.OUTLIERS, L.WARNINGS, L.COOLDOWN,
    *range(L.FAST_HISTORY, L.FAST_HISTORY + L.FAST_HISTORY_LEN),
    *range(L.META_HISTORY, L.META_HISTORY + L.META_HISTORY_LEN),
)  # fmt: skip


def pack(param_groups: Sequence[Group], state: Mapping[Any, dict[str, Any]], seed: int) -> dict[str, Any]:
    """The state_dict of these groups and states. Moments are shared with the optimizer, as in torch.

    A state whose tensor is in no group (any more) is left out.
    """
    index = {p: place for place, p in enumerate(chain.from_iterable(group["params"] for group in param_groups))}
    packed = [
        {**group, "control": group["control"].clone(), "params": [index[p] for p in group["params"]]}
        for group in param_groups
    ]
    for group in packed:
        group["control"][L.SEED] = seed  # before the first step it is not there yet
        if LAYERS in group:
            group[LAYERS] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in group[LAYERS].items()}
        if RELEASE in group:
            group[RELEASE] = group[RELEASE].clone()
    states = {
        index.get(key, key): value | {name: value[name].clone() for name in groups.NO_MOMENTS if name in value}
        for key, value in state.items()
        if key in index or not isinstance(key, Tensor)
    }
    return {"state": states, "param_groups": packed}


@dataclass
class Checkpoint:
    """What `read` found, in the form that the optimizer keeps; nothing is shared with what was read.

    controls: the main row of each group, None where its statistics start afresh.
    ages: of each group's tensors that have a state, the steps that it has seen.
    layers: the state of layer-wise control as it was saved, not checked.
    release: what controllers/release.py keeps, None where no gradients have been released.
    """

    state: defaultdict[Any, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    groups: list[Group] = field(default_factory=list)
    controls: list[Tensor | None] = field(default_factory=list)
    ages: list[dict[Tensor, float]] = field(default_factory=list)
    layers: Any = None
    release: Tensor | None = None


def read(
    state_dict: Mapping[str, Any],
    param_groups: Sequence[Group],
    *,
    mode: str,
    state_bits: int,
    clip: str | None,
    defaults: Mapping[str, Any],
) -> Checkpoint:
    """Check a state_dict of ours, of torch's Adam or AdamW, or of lion-pytorch against an optimizer's groups.

    A run of the same mode and rule continues bit for bit. Otherwise:

    - stability_v2 and meta3 share their statistics; between them and stability_v1, or from another
      optimizer, the statistics start afresh (with a warning) while moments and ages are kept;
    - a checkpoint of another rule gives the state that both have (the momentum, from AdamW to Lion; the settings
      stay the optimizer's own); where the optimizer's rule needs more than that, it is refused;
    - state is converted where `state_bits` differs, to the nearest codes;
    - histories of `clip="tensor"` are taken over by an optimizer that clips so; where there are none, they begin.

    Raises:
        ValueError: the checkpoint has other parameters, settings out of range, or a state that cannot be used:
            shapes, dtypes, values that are not finite, negative second moments. The message says which.
    """
    states, saved_groups = state_dict.get("state"), deepcopy(state_dict.get("param_groups"))
    if not (isinstance(states, Mapping) and isinstance(saved_groups, list)):
        raise ValueError(f"expected a state_dict with 'state' and 'param_groups', got one with {_names(state_dict)}")
    if len(param_groups) != len(saved_groups):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups ({len(saved_groups)}) than the "
            f"optimizer ({len(param_groups)}); build the optimizer with the groups of the run that saved it"
        )
    for i, (group, saved) in enumerate(zip(param_groups, saved_groups, strict=True)):
        if not (isinstance(saved, Mapping) and _is_list_of_keys(saved.get("params"))):
            got = f"one with {_names(saved)}" if isinstance(saved, Mapping) else f"a {type(saved).__name__}"
            raise ValueError(
                f"group {i} of the checkpoint is {got}; expected its settings and 'params', the list of its parameters"
            )
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"loaded state dict contains a parameter group that doesn't match the size of optimizer's "
                f"group: group {i} has {len(saved['params'])} parameters there and {len(group['params'])} here"
            )
    found = Checkpoint()
    known: set[Any] = set()
    for i, (group, saved) in enumerate(zip(param_groups, saved_groups, strict=True)):
        known.update(saved["params"])
        held = {p: states[key] for key, p in zip(saved["params"], group["params"], strict=True) if states.get(key)}
        where = [f"group {i}, parameter {key}" for key in saved["params"] if states.get(key)]
        same_rule = _check_rule(group, list(held.values()))
        found.ages.append({})
        for place, (p, value) in zip(where, held.items(), strict=True):
            found.ages[-1][p] = _age(value, saved, rule_of(group), place)
            found.state[p] = _state(value, p, rule_of(group), state_bits, place)
            if clip == "tensor" and "clip" in value:
                found.state[p]["clip"] = _history(value["clip"], place)
        control, saved_mode = saved.pop("control", None), saved.pop("mode", None)
        layers = saved.pop(LAYERS, None)
        found.layers = layers if found.layers is None else found.layers
        release = saved.pop(RELEASE, None)
        if release is not None:
            found.release = _release(release, f"group {i}")
        found.controls.append(_control(control, saved_mode, mode, f"group {i}"))
        found.groups.append(_settings(group, saved, defaults, ours=control is not None, same_rule=same_rule))
        try:
            groups.check(found.groups[-1], state_bits)
        except ValueError as error:
            raise ValueError(f"group {i} of the checkpoint cannot be used: {error}") from None
    for key, value in states.items():
        if key not in known:  # as torch does: state of no parameter is kept as it is
            found.state[key] = value
    return found


def _is_list_of_keys(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(key, (int, str)) for key in value)


def _names(values: Any) -> str:
    return ", ".join(sorted(map(str, values))) or "nothing"


def _settings(group: Group, saved: Group, defaults: Mapping[str, Any], *, ours: bool, same_rule: bool) -> Group:
    """The settings that a group has after loading: the checkpoint's, where they are of its rule."""
    if ours and same_rule:
        merged = {**defaults, **saved, "use_lion": group["use_lion"]}
    elif same_rule:
        merged = {**group, **{name: saved[name] for name in FOREIGN_SETTINGS if name in saved}}
    else:
        merged = dict(group)
    merged["params"] = group["params"]
    names = saved.get("param_names", group.get("param_names"))
    return merged if names is None else {**merged, "param_names": names}


def _check_rule(group: Group, held: list[Any]) -> bool:
    """Whether a saved group's states are of the group's own rule; refuses states that cannot be used."""
    if not held:
        return True
    for value in held:
        if not isinstance(value, Mapping):
            raise ValueError(f"the checkpoint's state holds a {type(value).__name__}; expected names and tensors")
    keys = set().union(*held)
    moments = {name for rule in RULES.values() for name in rule.state}
    unknown = keys - moments - {scale_name(name) for name in moments} - set(groups.NO_MOMENTS)
    if unknown or "exp_avg" not in keys:
        raise ValueError(
            f"the checkpoint's state holds {_names(keys)}; expected exp_avg, with exp_avg_sq for the AdamW rule: "
            "states of Adam, AdamW (without amsgrad), Lion and CruxyOptimizer can be loaded"
        )
    wanted = set(RULES[rule_of(group)].state)
    if wanted - keys:
        raise ValueError(
            f"the checkpoint is of another rule and has no second moment ({_names(wanted - keys)}), which "
            f"{rule_of(group)} needs; build the optimizer with use_lion=True, or start it without this checkpoint"
        )
    return keys & moments == wanted


def _age(value: Mapping[str, Any], saved: Group, rule: str, place: str) -> float:
    """Steps that a state has seen, by itself or by its group (apex); 0 where neither says and the rule does not ask."""
    step = given = value.get("step", saved.get("step", None if RULES[rule].ages else 0.0))
    if given is None:
        raise ValueError(
            f"{place} of the checkpoint has no step, and its group has none: the {rule} rule corrects young moments by "
            "the steps that they have seen; add 'step' to the state, or start without this checkpoint"
        )
    if isinstance(step, Tensor):
        step = step.item() if step.numel() == 1 else math.nan
    if not (isinstance(step, (int, float)) and 0 <= step < math.inf):
        raise ValueError(f"{place} of the checkpoint: step is {given!r}; expected a number of at least 0")
    return float(step)


def _history(value: Any, place: str) -> Tensor:
    """The norms that a tensor's gradients have had."""
    fits = isinstance(value, Tensor) and value.shape == (L.NUM_HISTORY,) and value.dtype == torch.float32
    if not fits or not bool((value.isfinite() & (value >= 0)).all()):
        raise ValueError(
            f"{place} of the checkpoint: clip is not {L.NUM_HISTORY} float32 numbers of at least 0; it is damaged"
        )
    return value.detach().clone()


def _state(value: Mapping[str, Any], param: Tensor, rule: str, state_bits: int, place: str) -> dict[str, Any]:
    """A parameter's state in the form that the optimizer keeps, on the parameter's device."""
    kept: dict[str, Any] = {}
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    for name, wanted in zip(RULES[rule].state, RULES[rule].codecs(state_bits), strict=True):
        given, scale = _tensor(value, name, place), value.get(scale_name(name))
        coded = codec_of(name, given)
        shape = param.shape if coded.packed == 1 else distributed.codes_like(param, coded).shape
        if given.shape != shape or distributed.is_sharded(given) != distributed.is_sharded(param):
            raise ValueError(
                f"{place} of the checkpoint: {name} has shape {tuple(given.shape)} for a parameter of shape "
                f"{tuple(param.shape)}; it belongs to another model"
            )
        if coded.block:
            values, scale = given, _scale(value, name, param, coded, place)
        elif given.is_floating_point():
            if scale is not None:
                raise ValueError(
                    f"{place} of the checkpoint: {name} is {given.dtype} beside {scale_name(name)}; "
                    "only codes have scales"
                )
            values = _finite(_finite(given, name, place).to(wide), f"{name} in {wide}", place)
        else:
            raise ValueError(f"{place} of the checkpoint: {name} is {given.dtype}; expected floating point or codes")
        if name.endswith("_sq") and bool((distributed.local(values) < 0).any()):
            raise ValueError(f"{place} of the checkpoint: {name} has negative values; it is a mean of squares")
        values = values.to(param.device).clone()
        if coded == wanted:
            kept[name] = values.to(wide) if scale is None else values
            if scale is not None:
                kept[scale_name(name)] = scale.to(param.device).clone()
        elif distributed.is_sharded(param):
            raise ValueError("state_bits of the checkpoint and the optimizer differ, which sharded states do not allow")
        else:
            if scale is not None:
                values = dequantize_blockwise(values, scale.to(param.device), codec=coded.name, shape=param.shape)
            if wanted.block:
                kept[name], kept[scale_name(name)] = quantize_blockwise(values, codec=wanted.name)
            else:
                kept[name] = values.to(wide)
    return kept


def _tensor(value: Mapping[str, Any], name: str, place: str) -> Tensor:
    tensor = value.get(name)
    if not isinstance(tensor, Tensor):
        what = "missing" if tensor is None else f"a {type(tensor).__name__}"
        raise ValueError(f"{place} of the checkpoint: {name} is {what}; expected a tensor")
    return tensor.detach()


def _finite(tensor: Tensor, name: str, place: str) -> Tensor:
    if not bool(distributed.local(tensor).isfinite().all()):
        raise ValueError(f"{place} of the checkpoint: {name} has values that are not finite")
    return tensor


def _scale(value: Mapping[str, Any], name: str, param: Tensor, codec: Codec, place: str) -> Tensor:
    """The scales of a coded state buffer, checked."""
    if value.get(scale_name(name)) is None:
        raise ValueError(
            f"{place} of the checkpoint: {name} is {codec.dtype} without {scale_name(name)}; it is incomplete"
        )
    scale, wanted = _tensor(value, scale_name(name), place), distributed.scales_like(param, codec)
    if scale.dtype != wanted.dtype or scale.shape != wanted.shape:
        raise ValueError(
            f"{place} of the checkpoint: {scale_name(name)} is {scale.dtype} {tuple(scale.shape)}; expected "
            f"{wanted.dtype} {tuple(wanted.shape)}"
        )
    if bool((distributed.local(_finite(scale, scale_name(name), place)) < 0).any()):
        raise ValueError(f"{place} of the checkpoint: {scale_name(name)} has negative values")
    return scale


def _release(value: Any, place: str) -> Tensor:
    """What a run with released gradients keeps beside its control row, on the CPU."""
    fits = isinstance(value, Tensor) and value.shape == (NUM_RELEASE,) and value.dtype == torch.float32
    if not fits or not bool(value.isfinite().all() & (value[SCALE] > 0)):
        raise ValueError(
            f"{place} of the checkpoint: release is not {NUM_RELEASE} finite float32 numbers with a positive loss "
            "scale; it is damaged, or of another version"
        )
    return value.detach().cpu().clone()


def _control(row: Any, saved_mode: Any, mode: str, place: str) -> Tensor | None:
    """A saved group's control row; None where the statistics have to start afresh."""
    if row is None:
        return None
    if not isinstance(row, Tensor) or row.shape != (L.NUM_SLOTS,) or row.dtype != torch.float32:
        got = f"{row.dtype} {tuple(row.shape)}" if isinstance(row, Tensor) else f"a {type(row).__name__}"
        raise ValueError(
            f"{place} of the checkpoint: its control state is {got}, and this version's torch.float32 "
            f"({L.NUM_SLOTS},); load it with the version that saved it"
        )
    row = row.detach().cpu().clone()
    seed = row[L.SEED]
    if not (0 <= seed < 1 << 24 and seed == seed.floor()):
        raise ValueError(f"{place} of the checkpoint: its seed is {seed:g}; expected a whole number below 2^24")
    state = row[L.NUM_INPUTS : L.OUTPUTS]
    if not bool(state.isfinite().all()):
        raise ValueError(f"{place} of the checkpoint: its control state has values that are not finite")
    if bool((row[list(NON_NEGATIVE)] < 0).any()) or row[L.LR_SCALE] <= 0 or not 0 <= row[L.META_BETA2] < 1:
        raise ValueError(
            f"{place} of the checkpoint: its control state is out of range (lr_scale {row[L.LR_SCALE]:g}, beta2 "
            f"{row[L.META_BETA2]:g}, step {row[L.STEP]:g}); it is damaged"
        )
    if saved_mode not in L.LAWS:
        raise ValueError(f"{place} of the checkpoint: its mode is {saved_mode!r}; expected one of {', '.join(L.LAWS)}")
    if (saved_mode == "stability_v1") != (mode == "stability_v1"):
        warn(
            f"the checkpoint is of mode {saved_mode!r}, whose statistics mean nothing to {mode!r}: the moments "
            "are taken over, the statistics start afresh"
        )
        return None
    return row
