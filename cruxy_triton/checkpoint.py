"""Checkpoints of CruxyOptimizer: packing its state into the form of torch.optim, and taking states over.

The form is torch's own, so that tools which know `torch.optim.AdamW` know ours:

    {"state": {index: {"step": 0-dim fp32, "exp_avg": ..., "exp_avg_sq": ...}},
     "param_groups": [{"lr": ..., "params": [index, ...], "mode": "meta3", "control": fp32 (NUM_SLOTS,)}]}

`control` is the group's row of the control vector: the statistics, the controller's multiplier and its
histories. It stands in the group, because `torch.distributed.checkpoint` keeps nothing else.
"""

import warnings
from collections import defaultdict
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cruxy_kernels import dequantize_blockwise, quantize_blockwise
from cruxy_kernels import layout as L
from cruxy_triton import distributed

if TYPE_CHECKING:
    from cruxy_triton.optimizer import CruxyOptimizer

# What a state may hold: the torch AdamW's and lion-pytorch's keys, and our scales of the 8-bit momentum.
_STATE_KEYS = {"step", "exp_avg", "exp_avg_sq", "exp_avg_scale"}
# Settings that another optimizer's group shares with ours.
_FOREIGN_SETTINGS = ("lr", "betas", "eps", "weight_decay", "maximize", "initial_lr")


def pack(optimizer: "CruxyOptimizer") -> dict[str, Any]:
    """The optimizer's state_dict. Tensors of the state are shared with the optimizer, as in torch."""
    for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
        pre_hook(optimizer)
    index = {p: i for i, p in enumerate(chain.from_iterable(g["params"] for g in optimizer.param_groups))}
    groups = []
    for group in optimizer.param_groups:
        packed = {k: v for k, v in group.items() if k != "params"}
        packed["control"] = packed["control"].clone()
        packed["params"] = [index[p] for p in group["params"]]
        groups.append(packed)
    state: dict[Any, Any] = {}
    for p, value in optimizer.state.items():
        if p in index and "step" in value:
            state[index[p]] = {**value, "step": value["step"].clone()}
        else:
            state[index.get(p, p)] = value
    state_dict: dict[str, Any] = {"state": state, "param_groups": groups}
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        result = post_hook(optimizer, state_dict)
        if result is not None:
            state_dict = result
    return state_dict


def unpack(optimizer: "CruxyOptimizer", state_dict: dict[str, Any]) -> None:
    """Load a state_dict of ours, of torch's Adam or AdamW, or of lion-pytorch; it is not changed.

    A run of the same mode and rule continues bit for bit. Otherwise:

    - stability_v2 and meta3 share their statistics; between them and stability_v1, or from another
      optimizer, the statistics start afresh (with a warning) while moments and ages are kept;
    - a checkpoint of the other rule gives only its momentum (AdamW to Lion; the settings stay the
      optimizer's own); from Lion to AdamW there is no second moment to take over, so it is refused;
    - momentum is converted where `state_bits` differs.

    Raises:
        ValueError: the checkpoint has other parameters, or a state that this optimizer cannot use. The
            optimizer is unchanged then.
    """
    state_dict = state_dict.copy()
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        result = pre_hook(optimizer, state_dict)
        if result is not None:
            state_dict = result

    groups, saved_groups = optimizer.param_groups, deepcopy(state_dict["param_groups"])
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups ({len(saved_groups)}) than the "
            f"optimizer ({len(groups)}); build the optimizer with the groups of the run that saved it"
        )
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"loaded state dict contains a parameter group that doesn't match the size of optimizer's "
                f"group: group {i} has {len(saved['params'])} parameters there and {len(group['params'])} here"
            )

    state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    ages: dict[Tensor, float] = {}
    known: set[Any] = set()
    new_groups, rows = [], []
    for group, saved in zip(groups, saved_groups, strict=True):
        held = [state_dict["state"][key] for key in saved["params"] if state_dict["state"].get(key)]
        ours, same_rule = "control" in saved, _check_rule(group, held)
        for key, p in zip(saved["params"], group["params"], strict=True):
            known.add(key)
            value = state_dict["state"].get(key)
            if not value:
                continue
            if "step" in value:
                ages[p] = float(value["step"])
            state[p] = _tensors(value, p, group["use_lion"], optimizer.state_bits)
        rows.append(_control_row(optimizer, saved))
        if ours and same_rule:
            merged = {**optimizer.defaults, **saved, "use_lion": group["use_lion"]}
        elif same_rule:
            merged = {**group, **{k: saved[k] for k in _FOREIGN_SETTINGS if k in saved}}
        else:
            merged = dict(group)
        merged["params"] = group["params"]
        names = saved.get("param_names", group.get("param_names"))
        if names is not None:
            merged["param_names"] = names
        new_groups.append(merged)
    for key, value in state_dict["state"].items():
        if key not in known:  # as torch does: state of no parameter is kept as it is
            state[key] = value

    optimizer._control = optimizer._control.new_zeros((0, L.NUM_SLOTS))
    optimizer._row_group, optimizer._row_born, optimizer._param_row = [], [], {}
    optimizer.__setstate__({"state": state, "param_groups": new_groups})  # the rows follow, group by group
    for i, row in enumerate(rows):
        _restore_rows(optimizer, i, row, ages)
    first = optimizer._control[0]
    optimizer._calls = int(first[L.STEP] + first[L.SKIPPED])
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _check_rule(group: dict[str, Any], held: list[dict[str, Any]]) -> bool:
    """Whether a saved group's states are of the group's own rule; refuses states that cannot be used."""
    keys = set().union(*held)
    unknown = keys - _STATE_KEYS
    if unknown or (held and "exp_avg" not in keys):
        raise ValueError(
            f"the checkpoint's state holds {', '.join(sorted(map(str, keys)))}; expected exp_avg, with exp_avg_sq "
            "for the AdamW rule: states of Adam, AdamW (without amsgrad), Lion and CruxyOptimizer can be loaded"
        )
    if held and not group["use_lion"] and "exp_avg_sq" not in keys:
        raise ValueError(
            "the checkpoint is of the Lion rule and has no second moment (exp_avg_sq), which AdamW needs; "
            "build the optimizer with use_lion=True, or start it without this checkpoint"
        )
    return not held or ("exp_avg_sq" not in keys) == group["use_lion"]


def _tensors(value: dict[str, Any], param: Tensor, lion: bool, state_bits: int) -> dict[str, Any]:
    """A parameter's state in the form that the optimizer keeps, on the parameter's device."""
    kept = {k: _copied(v, param) for k, v in value.items() if k != "step" and not (lion and k == "exp_avg_sq")}
    exp_avg = kept["exp_avg"]
    if exp_avg.shape != param.shape:
        raise ValueError(
            f"the checkpoint has a state of shape {tuple(exp_avg.shape)} for a parameter of shape "
            f"{tuple(param.shape)}; it belongs to another model"
        )
    coded = exp_avg.dtype == torch.int8
    if coded and "exp_avg_scale" not in kept:
        raise ValueError("the checkpoint has int8 momentum without exp_avg_scale; it is incomplete")
    if coded == (state_bits == 8):
        if not coded:
            wanted = torch.float64 if param.dtype == torch.float64 else torch.float32
            kept = {k: v.to(wanted) if v.is_floating_point() else v for k, v in kept.items()}
        return kept
    if distributed.is_sharded(param):
        raise ValueError("state_bits of the checkpoint and the optimizer differ, which sharded states do not allow")
    if coded:
        kept["exp_avg"] = dequantize_blockwise(exp_avg, kept.pop("exp_avg_scale")).to(
            torch.float64 if param.dtype == torch.float64 else torch.float32
        )
    else:
        kept["exp_avg"], kept["exp_avg_scale"] = quantize_blockwise(exp_avg)
    return kept


def _control_row(optimizer: "CruxyOptimizer", saved: dict[str, Any]) -> Tensor | None:
    """The saved group's control row, taken out of it; None where the statistics have to start afresh."""
    row, mode = saved.pop("control", None), saved.pop("mode", None)
    if row is None:
        return None
    if row.shape != (L.NUM_SLOTS,):
        raise ValueError(
            f"the checkpoint's control state has shape {tuple(row.shape)} and this version's ({L.NUM_SLOTS},); "
            "load it with the version that saved it"
        )
    if (mode == "stability_v1") != (optimizer.mode == "stability_v1"):
        warnings.warn(
            f"the checkpoint is of mode {mode!r}, whose statistics mean nothing to {optimizer.mode!r}: the moments "
            "are taken over, the statistics start afresh",
            stacklevel=4,
        )
        return None
    return row


def _restore_rows(
    optimizer: "CruxyOptimizer", group_index: int, saved: Tensor | None, ages: dict[Tensor, float]
) -> None:
    """The control rows of one group: its own, and one more for each other age among its tensors."""
    main = optimizer._add_row(group_index, None)
    if saved is not None:
        optimizer._control[main] = saved.to(optimizer._control.device, torch.float32)
    own_age = float(optimizer._control[main, L.AGE])
    tensors = [p for p in optimizer.param_groups[group_index]["params"] if p in optimizer.state]
    row_of_age: dict[float, int] = {}
    for p in tensors:
        age = ages.get(p, 0.0)  # Lion's states may have none, and Lion has no bias correction
        if age not in row_of_age:
            if age == own_age or (saved is None and not row_of_age):
                row = main
            else:
                row = optimizer._add_row(group_index, optimizer._control[main])
                optimizer._control[row, L.META_BETA2] = optimizer._control[main, L.META_BETA2]
            optimizer._control[row, L.AGE] = age
            optimizer._row_born[row] = -1  # before any call of this run
            row_of_age[age] = row
        optimizer._param_row[p] = row_of_age[age]
    optimizer._control_moved()


def _copied(value: Any, param: Tensor) -> Any:
    """A copy on the parameter's device in its own dtype: torch would cast it to the parameter's."""
    return value.detach().to(param.device).clone() if isinstance(value, Tensor) else deepcopy(value)
