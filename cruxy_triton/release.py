"""Gradient release: every layer is updated in the backward pass as soon as its gradients are there, and they are freed.

    released = release_gradients(model, optimizer)
    released.scale(loss).backward()      # updates
    optimizer.step()                     # ends the step

So the gradients of one layer are alive at a time, instead of the model's. This file has the layers, the hooks, and
what release cannot go together with; passes.py the order of a step, controllers/release.py its law
(docs/full-parameter.md).
"""

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad

from cruxy_triton.controllers import release as law
from cruxy_triton.groups import is_count, is_number
from cruxy_triton.optimizer import CruxyOptimizer
from cruxy_triton.passes import Layer, Passes


def release_gradients(
    model: nn.Module,
    optimizer: Any,
    *,
    loss_scale: bool | float | str = "auto",
    growth_interval: int = law.GROWTH_INTERVAL,
) -> "Released":
    """Update each layer of `model` in the backward pass, and free its gradients at once.

    The optimizer's laws see a step's statistics in the step after it. `clip="tensor"` clips every tensor by its own
    norms, exact and in time; `clip="global"` holds the limit against the gradients that have come so far and the last
    step's norm. A layer with a non-finite element is left alone. `optimizer.step()` ends a step and is still to be
    called once for each backward pass; learning-rate schedulers work as ever.

    The loss scale, the statistics that wait and the histories are in `optimizer.state_dict()`: to resume, load it,
    before or after this call.

    Args:
        model: its parameters that require a gradient are in the optimizer. Checkpointing, tied tables and adapters
            need nothing.
        optimizer: a CruxyOptimizer (MetaLion), or an accelerate wrapper of one.
        loss_scale: "auto": where parameters are float16; False: none; True, or a first value between 2^-14 and 2^24.
            It lives on the device: halved after a step with a non-finite gradient, doubled after `growth_interval`
            steps without.
        growth_interval: see there, at least 1.

    Raises:
        TypeError: no CruxyOptimizer. ValueError: parameters that require a gradient and are not in the optimizer,
            an optimizer that is in use already, DDP or FSDP, a loss scale out of range. Later, RuntimeError: a
            second backward pass before `step()` (gradient accumulation), a GradScaler, `clip_grad_norm_`, several
            processes, gradients without the loss scale.
    """
    inner = optimizer
    while not isinstance(inner, CruxyOptimizer) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, CruxyOptimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; expected a CruxyOptimizer or MetaLion")
    if inner._passes is not None:
        raise ValueError("this optimizer is updated in the backward pass already; call remove() of the first one")
    if isinstance(model, nn.parallel.DistributedDataParallel) or "FullySharded" in type(model).__name__:
        raise ValueError(
            f"model is a {type(model).__name__}, which combines the gradients of the ranks after a layer would have "
            "been updated; give the model itself and run one process, or do without release"
        )
    if not (is_count(growth_interval) and growth_interval >= 1):
        raise ValueError(f"growth_interval is {growth_interval!r}; expected a whole number of steps, at least 1")
    known = {id(p) for group in inner.param_groups for p in group["params"]}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if missing:
        raise ValueError(
            f"{len(missing)} parameters that require a gradient are not in the optimizer ({', '.join(missing[:3])}), "
            "so nobody would free theirs; add them, or freeze them with requires_grad_(False)"
        )
    return Released(model, inner, _first_scale(loss_scale, model), growth_interval)


def _first_scale(loss_scale: Any, model: nn.Module) -> float | None:
    if loss_scale == "auto":
        half = any(p.dtype == torch.float16 for p in model.parameters() if p.requires_grad)
        return law.INITIAL_SCALE if half else None
    if isinstance(loss_scale, bool):
        return law.INITIAL_SCALE if loss_scale else None
    if not (is_number(loss_scale) and law.MIN_SCALE <= loss_scale <= law.MAX_SCALE):
        raise ValueError(
            f"loss_scale is {loss_scale!r}; expected 'auto', True, False or a number from 2^-14 to 2^24 (16777216)"
        )
    return float(loss_scale)


def layer_groups(model: nn.Module) -> list[tuple[str, list[nn.Parameter]]]:
    """(name, parameters) of what is updated together, in the order of `named_modules`: parameters that require a
    gradient, each once.

    A layer is an element of a ModuleList or Sequential, with all that is in it; where such an element holds more than
    half of all and has layers itself, those. What is in no layer (embedding, last norm, head) goes by module.
    """
    found: list[tuple[str, list[nn.Parameter]]] = []
    taken: set[int] = set()
    half = sum(p.numel() for p in model.parameters() if p.requires_grad) / 2

    def add(name: str, parameters: Iterable[nn.Parameter]) -> None:
        own = [p for p in parameters if p.requires_grad and id(p) not in taken]
        taken.update(map(id, own))
        if own:
            found.append((name or type(model).__name__, own))

    def walk(name: str, module: nn.Module) -> None:
        add(name, module.parameters(recurse=False))
        for key, child in module.named_children():
            path = f"{name}.{key}" if name else key
            if isinstance(module, nn.ModuleList | nn.Sequential) and not _is_stack(child, half):
                add(path, child.parameters())
            else:
                walk(path, child)

    walk("", model)
    return found


def _is_stack(module: nn.Module, half: float) -> bool:
    """Whether a module is layers rather than one."""
    within = [m for m in module.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1]
    return bool(within) and sum(p.numel() for p in module.parameters() if p.requires_grad) > half


class Released:
    """What `release_gradients` returns: the hooks on a model.

    layers: (name, parameters) of what is updated together.
    """

    def __init__(self, model: nn.Module, optimizer: CruxyOptimizer, scale: float | None, interval: int) -> None:
        self._optimizer = optimizer
        groups = layer_groups(model)
        inside = {id(p) for _, parameters in groups for p in parameters}
        others = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        groups += [(f"parameter {i}", [p]) for i, p in enumerate(others) if id(p) not in inside]
        self.layers = groups
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._passes = optimizer._passes = Passes(optimizer, scale, interval, hooked=True)
        self._undo: list[Callable[[], None]] = []
        for name, parameters in groups:
            layer = Layer(name, parameters)
            for p in parameters:
                self._undo.append(p.register_post_accumulate_grad_hook(self._hook(layer)).remove)
        _released.add(self)

    # -- a step ------------------------------------------------------------------

    def scale(self, loss: Tensor) -> Tensor:
        """The loss, to call `backward()` of: its value is the same, its gradient is multiplied by the loss scale.

        The optimizer takes it for the loss of the step, so `step(loss=...)` is not needed; where it is not finite
        nothing is updated. Without a loss scale it may be left out.

        Raises TypeError for what has no gradient, ValueError for more than one number.
        """
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            got = "a tensor without a gradient" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TypeError(f"scale() got {got}; expected the loss, before backward()")
        if loss.numel() != 1:
            raise ValueError(f"scale() got {loss.numel()} numbers; expected the loss, one number (loss.mean())")
        return _Scaled.apply(loss, self._passes)  # pyright: ignore[reportReturnType]

    def _hook(self, layer: Layer) -> Callable[[Tensor], None]:
        def arrived(p: Tensor) -> None:
            if self._passes.seen(p):
                p.grad = None
                raise RuntimeError(
                    f"{self._names.get(id(p), 'a parameter')} got a second gradient before optimizer.step(): with "
                    "release each backward pass is a step, so gradients cannot be accumulated; set "
                    "gradient_accumulation_steps=1 (checkpointing makes room for a larger batch), and "
                    "use_reentrant=False where checkpointed layers share weights"
                )
            self._passes.arrived(p, layer)

        return arrived

    def attach(self, trainer: Any) -> "Released":
        """Put `scale` into a transformers or TRL Trainer, which calls `backward` itself.

        Raises ValueError for its settings that release cannot serve; the message says which to change.
        """
        args = trainer.args
        for name, wanted, why in (
            ("gradient_accumulation_steps", (1,), "each backward pass is a step"),
            ("max_grad_norm", (0, None), "when it would clip, the gradients are gone; CruxyOptimizer's clip= does"),
            ("fp16", (False,), "it brings a GradScaler; load the model in float16 instead"),
        ):
            if getattr(args, name) not in wanted:
                raise ValueError(
                    f"the Trainer has {name}={getattr(args, name)}; with release set {name}={wanted[0]}: {why}"
                )
        accelerator = trainer.accelerator
        original = accelerator.backward

        def backward(loss: Tensor, **kwargs: Any) -> None:
            original(self.scale(loss), **kwargs)

        accelerator.backward = backward
        self._undo.append(lambda: setattr(accelerator, "backward", original))
        return self

    # -- what it did ------------------------------------------------------------------

    def metrics(self) -> dict[str, Any]:
        """The last step in numbers, as a plain dict; waits for the device.

        loss_scale: of the next step. overflows: steps with a non-finite gradient so far. grad_norm, max_grad: of the
        last step that had none, unscaled. nonfinite, nonfinite_layers: elements of the last step, and the names of the
        layers that were left alone. layers: updates it consisted of. `optimizer.metrics()` has what the laws made of
        the step before.
        """
        return self._passes.metrics()

    def remove(self) -> None:
        """Take the hooks away: `optimizer.step()` is an ordinary step again."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        _released.discard(self)
        if self._optimizer._passes is self._passes:
            self._passes.end(whole=False)
            self._optimizer._passes = self._optimizer._release = None


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, passes: Passes) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.passes, ctx.loss = passes, loss.detach().reshape(())
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.passes.begin(ctx.loss, grad), None


# -- clip_grad_norm_ ------------------------------------------------------------------
# It would find no gradients, and clip nothing without a word. So its innermost function first asks whose they are.

_released: "weakref.WeakSet[Released]" = weakref.WeakSet()
_INNERMOST = "_clip_grads_with_norm_" if hasattr(clip_grad, "_clip_grads_with_norm_") else "clip_grad_norm_"
_clip_grads = getattr(clip_grad, _INNERMOST)


def _ask_before_clipping(parameters: Any, max_norm: Any, *args: Any, **kwargs: Any) -> Any:
    tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if _released and math.isfinite(max_norm):  # Trainers measure with an infinite one
        ours = {id(p) for released in _released for _, layer in released.layers for p in layer}
        if any(id(p) in ours for p in tensors):
            raise RuntimeError(
                "clip_grad_norm_ comes when released gradients have been used and freed; leave it out "
                "(max_grad_norm=0 in a Trainer) and give the optimizer clip='tensor'"
            )
    return _clip_grads(tensors, max_norm, *args, **kwargs)


setattr(clip_grad, _INNERMOST, _ask_before_clipping)
