"""What the guard has to know of the optimizer that it watches: the one inside wrappers, names, adapters, ranks."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from cruxy_triton import distributed


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside what accelerate and others make of it. Raises TypeError where there is none."""
    inner = optimizer
    while not _has_hooks(inner) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not _has_hooks(inner):
        raise TypeError(
            f"{type(optimizer).__name__} has no step hooks; expected a torch.optim.Optimizer or a wrapper that holds "
            "one as `.optimizer`"
        )
    return inner


def _has_hooks(optimizer: Any) -> bool:
    # accelerate's wrapper inherits from Optimizer without being initialised as one.
    return isinstance(optimizer, Optimizer) and "_optimizer_step_pre_hooks" in vars(optimizer)


def names(optimizer: Optimizer, model: nn.Module | None) -> list[str]:
    """A name per parameter, in the order of the groups: the model's, the optimizer's, or a number."""
    known: dict[int, str] = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        known.update({id(p): n for p, n in zip(group["params"], group.get("param_names", ()), strict=False)})
    if model is not None:
        known.update({id(p): n for n, p in model.named_parameters()})
    return [known.get(id(p), f"parameter {i}") for i, p in enumerate(params)]


def are_adapters(params: Sequence[Tensor], process_group: Any) -> bool:
    """Whether a quarter or more of the matrices begins at zero, as LoRA's B does. Read once, at the first step."""
    matrices = [distributed.local(p.detach()) for p in params if p.dim() >= 2]
    if not matrices:
        return False
    filled = torch.stack([(p != 0).any().float().to(matrices[0].device) for p in matrices])
    if process_group is not None:
        dist.all_reduce(filled, dist.ReduceOp.MAX, group=None if process_group == "auto" else process_group)
    return bool((filled == 0).float().mean() >= 0.25)


def many_ranks() -> bool:
    return distributed.active() and dist.get_world_size() > 1


def first_rank() -> bool:
    return not distributed.active() or dist.get_rank() == 0
