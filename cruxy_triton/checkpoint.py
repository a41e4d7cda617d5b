"""Checkpoints of CruxyOptimizer: packing its state into the form of torch.optim, and taking states over.

The form is torch's own, so that tools which know `torch.optim.AdamW` know ours:

    {"state": {index: {"step": 0-dim fp32, "exp_avg": ..., "exp_avg_sq": ...}},
     "param_groups": [{"lr": ..., ..., "params": [index, ...], "mode": "meta3", "control": fp32 (NUM_SLOTS,)}]}

`control` is the group's row of the control vector: the statistics, the controller's multiplier and its
histories. It stands in the group, because `torch.distributed.checkpoint` keeps nothing else.
"""

from collections import defaultdict
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cruxy_kernels import layout as L

if TYPE_CHECKING:
    from cruxy_triton.optimizer import CruxyOptimizer

# Keys that `pack` adds to a group.
_OURS = ("mode", "control")


def pack(optimizer: "CruxyOptimizer") -> dict[str, Any]:
    """The optimizer's state_dict. Tensors of the state are shared with the optimizer, as in torch."""
    for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
        pre_hook(optimizer)
    index = {p: i for i, p in enumerate(chain.from_iterable(g["params"] for g in optimizer.param_groups))}
    control = optimizer._control
    groups = []
    for i, group in enumerate(optimizer.param_groups):
        packed = {k: v for k, v in group.items() if k != "params"}
        packed["mode"] = optimizer.mode
        packed["control"] = control[optimizer._row_group.index(i)].clone()
        packed["params"] = [index[p] for p in group["params"]]
        groups.append(packed)
    state: dict[Any, Any] = {}
    for p, value in optimizer.state.items():
        if p in index:
            row = optimizer._param_row.get(p)
            step = {} if row is None else {"step": control[row, L.AGE].clone()}
            state[index[p]] = {**step, **value}
        else:
            state[p] = value
    state_dict: dict[str, Any] = {"state": state, "param_groups": groups}
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        result = post_hook(optimizer, state_dict)
        if result is not None:
            state_dict = result
    return state_dict


def unpack(optimizer: "CruxyOptimizer", state_dict: dict[str, Any]) -> None:
    """Load a state_dict. `state_dict` itself is not changed."""
    state_dict = state_dict.copy()
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        result = pre_hook(optimizer, state_dict)
        if result is not None:
            state_dict = result

    groups, saved_groups = optimizer.param_groups, deepcopy(state_dict["param_groups"])
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"the checkpoint has {len(saved_groups)} parameter groups and the optimizer {len(groups)}; "
            "build the optimizer with the groups of the run that saved it"
        )
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"parameter group {i} has {len(saved['params'])} parameters in the checkpoint and "
                f"{len(group['params'])} in the optimizer; they must be the same model's"
            )
    params = dict(
        zip(
            chain.from_iterable(g["params"] for g in saved_groups),
            chain.from_iterable(g["params"] for g in groups),
            strict=True,
        )
    )
    state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    steps: dict[Tensor, float] = {}
    for key, value in state_dict["state"].items():
        if key not in params:
            state[key] = value
            continue
        p = params[key]
        if "step" in value:
            steps[p] = float(value["step"])
        state[p] = {k: _copied(v, p) for k, v in value.items() if k != "step"}

    optimizer._control = optimizer._control.new_zeros((0, L.NUM_SLOTS))
    optimizer._row_group, optimizer._row_born, optimizer._param_row = [], [], {}
    new_groups, rows = [], []
    for group, saved in zip(groups, saved_groups, strict=True):
        rows.append(saved.pop("control", None))
        saved.pop("mode", None)
        saved["params"] = group["params"]
        if "param_names" in group:
            saved.setdefault("param_names", group["param_names"])
        new_groups.append({**optimizer.defaults, **saved})
    optimizer.__setstate__({"state": state, "param_groups": new_groups})
    for i, row in enumerate(rows):
        _restore_rows(optimizer, i, row, steps)
    first = optimizer._control[0]
    optimizer._calls = int(first[L.STEP] + first[L.SKIPPED])
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _restore_rows(
    optimizer: "CruxyOptimizer", group_index: int, saved: Tensor | None, steps: dict[Tensor, float]
) -> None:
    """The control rows of one group: its own, and one more for each other age among its tensors."""
    main = optimizer._add_row(group_index, None)
    if saved is not None:
        optimizer._control[main] = saved.to(optimizer._control.device, torch.float32)
    own_age = float(optimizer._control[main, L.AGE])
    row_of_age: dict[float, int] = {}
    for p in optimizer.param_groups[group_index]["params"]:
        age = steps.get(p)
        if age is None:
            continue
        if age not in row_of_age:
            if not row_of_age and (saved is None or age == own_age):
                row = main
            else:
                row = optimizer._add_row(group_index, optimizer._control[main])
                optimizer._control[row, L.META_BETA2] = optimizer._control[main, L.META_BETA2]
            optimizer._control[row, L.AGE] = age
            optimizer._row_born[row] = -1  # before any call of this run
            row_of_age[age] = row
        optimizer._param_row[p] = row_of_age[age]


def _copied(value: Any, param: Tensor) -> Any:
    """A copy on the parameter's device in its own dtype: torch would cast it to the parameter's."""
    return value.detach().to(param.device, copy=True) if isinstance(value, Tensor) else deepcopy(value)
