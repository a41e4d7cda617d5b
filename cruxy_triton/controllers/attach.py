"""Layer-wise control of any torch optimizer: its groups are split by layer, and each takes its step at its own rate.

    blade = attach_blade(optimizer, model)          # before the learning-rate scheduler is made
    loss.backward()
    blade.observe(loss, entropy)                    # before gradients are clipped; both may be device tensors
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

`group["lr"]` is multiplied for the time of the step and is the scheduler's otherwise. The state is in
`optimizer.param_groups[0]["layers"]`, so the optimizer's own state_dict holds it. Where the multipliers can stay on the
device (groups that are `capturable` or `fused`, whose rate may be a tensor) no value is read by the host; other
optimizers on an accelerator wait for one copy per step.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import cruxy_kernels as kernels
from cruxy_kernels import layout as L
from cruxy_triton import distributed
from cruxy_triton.controllers.blade import Blade
from cruxy_triton.controllers.layers import LayerControl, StepTensors, in_layers
from cruxy_triton.controllers.sketch_align import SketchAlign

LAYER = "layer"  # of a group: its layer's name
PER_PARAMETER = ("params", "param_names")  # what of a group has an entry for each parameter
# Optimizers of others that decay the weights themselves, at the rate of the group.
DECOUPLED = ("AdamW", "PagedAdamW", "Lion", "PagedLion")


def attach_blade(
    optimizer: Optimizer,
    model: nn.Module | None = None,
    *,
    response: str = "damped",
    seed: int = L.BLADE_SEED,
    process_group: Any = "auto",
) -> "Attached":
    """BLADE (docs/laws.md, section 7) above a torch optimizer.

    Args:
        optimizer: any torch optimizer but CruxyOptimizer, which takes `layerwise="blade"`. Its groups are split.
        model: whose parameter names say the layers; None: the names that the optimizer was given, else a layer for
            each tensor.
        response, seed: see `Blade`.
        process_group: over which ranks loss and entropy are averaged when torch.distributed runs; "auto": all, None:
            none. Gradients have to be the same on all of them (DDP).

    Raises:
        TypeError: no torch optimizer, or a CruxyOptimizer.
        ValueError: a learning-rate scheduler has been made already, parameters are sharded, an argument is wrong.
    """
    return Attached(Blade(response, seed), optimizer, model, process_group)


def attach_sketch_align(
    optimizer: Optimizer, model: nn.Module | None = None, *, process_group: Any = "auto"
) -> "Attached":
    """SKETCH-ALIGN above a torch optimizer; see `attach_blade`."""
    return Attached(SketchAlign(), optimizer, model, process_group)


class Attached:
    """Layer-wise control on an optimizer; see the module's docstring."""

    def __init__(
        self, control: LayerControl, optimizer: Optimizer, model: nn.Module | None, process_group: Any = "auto"
    ) -> None:
        if not isinstance(optimizer, Optimizer) or "_optimizer_step_pre_hooks" not in vars(optimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}; expected a torch optimizer without a wrapper")
        if hasattr(optimizer, "layerwise"):
            raise TypeError(f"{type(optimizer).__name__} takes layerwise={control.kind!r} itself")
        if any(LAYER in group for group in optimizer.param_groups):
            raise ValueError("the optimizer has layer-wise control already")
        if any("initial_lr" in group for group in optimizer.param_groups):
            raise ValueError(
                "the optimizer has a learning-rate scheduler already, which knows its groups; attach layer-wise "
                "control first"
            )
        self.control, self.optimizer, self.process_group = control, optimizer, process_group
        self._names: dict[Tensor, str] = {} if model is None else {p: name for name, p in model.named_parameters()}
        self._params: list[Tensor] = []
        self._dtypes: list[torch.dtype] = []
        self._observed = self._there = False
        self._changed: list[tuple[dict[str, Any], Any, Any]] = []
        groups = split_by_layer(optimizer.param_groups, self._names)
        first = next((p for group in groups for p in group["params"]), torch.zeros(0))
        control.follow(groups, first.device, tuple(map(id, groups)), self._names)  # refuses before anything is changed
        optimizer.param_groups[:] = groups
        self._handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        # First of all: who changes the rate before this hook does finds it afterwards as it left it.
        hooks: Any = optimizer._optimizer_step_post_hooks
        hooks.move_to_end(self._handles[1].id, last=False)

    @torch.no_grad()
    def observe(self, loss: float | Tensor | None = None, entropy: float | Tensor | None = None) -> None:
        """Take the gradients as they are now for those of the step that follows, with its loss and output entropy.

        Where it is not called the step's own gradients count, clipped or not, and there is no loss.

        Raises ValueError for gradients on several devices, or a loaded state that does not fit.
        """
        groups = self.optimizer.param_groups
        params = [p for group in groups for p in group["params"] if p.grad is not None]
        self._observed, self._there = True, bool(params)
        if not params:
            return
        grads = [p.grad for p in params if p.grad is not None]
        device = params[0].device
        if any(p.device != device for p in params):
            raise ValueError("parameters are on several devices; layer-wise control needs them on one")
        self.control.follow(groups, device, tuple(map(id, groups)), self._names)
        dtypes = [g.dtype for g in grads]
        known = len(params) == len(self._params) and all(map(operator.is_, params, self._params))
        if not known or dtypes != self._dtypes:
            self._params, self._dtypes = params, dtypes
        telemetry = kernels.gradient_telemetry(grads, per_tensor=True)
        bad = telemetry[:, L.COUNT_NONFINITE].sum()
        value, spread = self._on_device(loss, device), self._on_device(entropy, device)
        if value is not None:
            bad = bad + (~value.isfinite())
        scale = getattr(self.optimizer, "grad_scale", None)
        scale = None if scale is None else scale.to(device, torch.float32).reshape(())
        tensors = StepTensors(lambda: self._params, lambda: grads, self._params)
        self.control.step(tensors, telemetry, bad.float(), loss=value, entropy=spread, grad_scale=scale)

    def multipliers(self, *, wait: bool = False) -> dict[str, float]:
        """The last step's multiplier of each layer; on an accelerator the newest that have arrived."""
        return self.control.multipliers(wait=wait)

    def detach(self) -> None:
        """Leave the optimizer as it is, with its groups split."""
        for handle in self._handles:
            handle.remove()

    def _on_device(self, number: float | Tensor | None, device: torch.device) -> Tensor | None:
        if number is None:
            return None
        value = torch.as_tensor(number, dtype=torch.float32).detach().to(device, non_blocking=True)
        if value.numel() != 1:
            raise ValueError(f"loss or entropy has {value.numel()} elements; expected one number, its mean")
        value = value.reshape(())
        return distributed.mean_loss(value, self.process_group) if distributed.active() else value

    @torch.no_grad()
    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._restore()  # a step that raised never came to its end
        if not self._observed:
            self.observe()
        self._observed = False
        if not self._there:
            return
        groups = optimizer.param_groups
        found = self.control.entry["multipliers"]
        keeps = found.is_cuda and all(group.get("capturable") or group.get("fused") for group in groups)
        values: Sequence[Any] = found.unbind() if keeps else found.tolist()  # the module says who waits
        of = dict(zip(self.control.layers.names, values, strict=True))
        overflow = getattr(optimizer, "found_inf", None)
        for group in groups:
            if group.get(LAYER) not in of:
                continue
            lr, decay = group["lr"], group.get("weight_decay", 0)
            self._changed.append((group, lr, decay))
            if decay and _decoupled(optimizer, group):
                factor = 1 - lr * decay * (1 if overflow is None else overflow.reshape(()) <= 0)
                torch._foreach_mul_([p for p in group["params"] if p.grad is not None], factor)
                group["weight_decay"] = 0.0
            group["lr"] = lr * of[group[LAYER]]

    def _after(self, *_: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        for group, lr, decay in self._changed:
            group["lr"] = lr
            if "weight_decay" in group:
                group["weight_decay"] = decay
        self._changed.clear()


def split_by_layer(groups: Sequence[dict[str, Any]], names: dict[Tensor, str]) -> list[dict[str, Any]]:
    """The groups, each cut into one for each of its layers, which it names as `layer`."""
    parts: dict[tuple[int, str], list[int]] = {}
    for index, place, layer in in_layers(groups, names):
        parts.setdefault((index, layer), []).append(place)
    return [
        {**groups[index], LAYER: layer, **{key: [groups[index][key][at] for at in places] for key in PER_PARAMETER
                                           if key in groups[index]}}
        for (index, layer), places in parts.items()
    ]  # fmt: skip


def _decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    said = group.get("decoupled_weight_decay")
    return type(optimizer).__name__.startswith(DECOUPLED) if said is None else bool(said)
