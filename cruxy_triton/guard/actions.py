"""Bounded actions on an optimizer that is not ours: the learning-rate factor, a step without gradients, momentum.

Each leaves the optimizer as it found it once the step is over, apart from what the action is for.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cruxy_triton.guard.policy import Policy

# State entries that are momentum: a first moment, and the scales of a blockwise quantized one.
MOMENTUM = ("exp_avg", "momentum_buffer", "exp_avg_scale", "state1", "absmax1")


class LearningRate:
    """A factor in [min_lr_factor, 1] that multiplies every group's learning rate during the step only.

    `apply` before the step, `restore` after it: otherwise the `lr` of a group is the user's and the scheduler's. The
    factor falls at once (`cut`) and rises slowly (`recover`). After a cut it climbs quickly only to 0.7 of where the
    trouble was, and a tenth as fast beyond. `hold` keeps the update-to-weight ratio at a target instead.
    """

    def __init__(self, policy: Policy):
        self.policy = policy
        self.factor = 1.0
        self.ceiling = 1.0  # beyond it the factor climbs slowly
        self.target: float | None = None  # update-to-weight ratio to hold
        self.cuts = 0
        self._applied: list[tuple[dict[str, Any], Any, Any]] = []

    def cut(self, multiplier: float) -> bool:
        """Lower the factor; False where it is at its floor or its budget is spent."""
        if self.cuts >= self.policy.max_lr_cuts or self.factor <= self.policy.min_lr_factor:
            return False
        self.cuts += 1
        self.ceiling = min(self.ceiling, max(0.7 * self.factor, self.policy.min_lr_factor))
        self.factor = max(self.factor * multiplier, self.policy.min_lr_factor)
        return True

    def recover(self) -> None:
        """One calm step."""
        speed = self.policy.lr_recovery
        if self.factor >= self.ceiling:
            speed = 1 + (speed - 1) / 10
        self.factor = min(1.0, self.factor * speed)

    def hold(self, ratio: float, *, calm: bool) -> None:
        """A measured update-to-weight ratio: down to the target at once, up to it by at most 5 %."""
        assert self.target is not None
        step = min(1.05 if calm else 1.0, self.target / max(ratio, 1e-12))
        self.factor = min(1.0, max(self.factor * step, self.policy.min_lr_factor))

    def apply(self, optimizer: Optimizer) -> None:
        """Multiply the groups' rates for the step that follows."""
        self.restore()  # a step that raised never came to its end
        if self.factor == 1.0:
            return
        for group in optimizer.param_groups:
            lr = group["lr"]
            if isinstance(lr, Tensor):
                self._applied.append((group, lr.clone(), None))
                lr.mul_(self.factor)
            else:
                written = lr * self.factor
                self._applied.append((group, lr, written))
                group["lr"] = written

    def restore(self) -> None:
        """Give the groups their own rates back, unless somebody has set another one meanwhile."""
        for group, lr, written in self._applied:
            if isinstance(lr, Tensor):
                group["lr"].copy_(lr)
            elif group["lr"] == written:
                group["lr"] = lr
        self._applied = []

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor, "ceiling": self.ceiling, "target": self.target, "cuts": self.cuts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor, self.ceiling = float(state["factor"]), float(state["ceiling"])
        self.target = None if state["target"] is None else float(state["target"])
        self.cuts = int(state["cuts"])


class HiddenGradients:
    """Takes the gradients away for one step: every torch optimizer leaves a parameter without one alone.

    So neither weight decay nor momentum nor the step count moves. They come back after the step.
    """

    def __init__(self) -> None:
        self._hidden: list[tuple[Tensor, Tensor]] = []

    def hide(self, params: Iterable[Tensor]) -> None:
        self._hidden = [(p, p.grad) for p in params if p.grad is not None]
        for p, _ in self._hidden:
            p.grad = None

    def restore(self) -> None:
        for p, grad in self._hidden:
            if p.grad is None:
                p.grad = grad
        self._hidden = []


@torch.no_grad()
def reset_momentum(optimizer: Optimizer) -> int:
    """Zero the first moments; the second moments and step counts stay. Returns how many tensors were zeroed."""
    count = 0
    for state in optimizer.state.values():
        if not isinstance(state, dict):
            continue
        coded = state.get("state1")
        for name in MOMENTUM:
            value = state.get(name)
            if not isinstance(value, Tensor) or (name == "state1" and not value.is_floating_point()):
                continue  # bitsandbytes codes: zero scales (absmax1) make them zero
            if name == "absmax1" and coded is None:
                continue
            value.zero_()
            count += 1
    return count


@torch.no_grad()
def nonfinite_tensors(named: Iterable[tuple[str, Any]]) -> list[str]:
    """Names of the tensors that hold NaN or infinity. Waits for the device: for emergencies only."""
    found = []
    for name, tensor in named:
        local = tensor.to_local() if hasattr(tensor, "device_mesh") else tensor
        if isinstance(local, Tensor) and local.is_floating_point() and not bool(torch.isfinite(local).all()):
            found.append(name)
    return found
