"""Updates within the backward pass: the order of a step whose layers come one after the other.

    update(layer, ...)    for each layer as its gradients are complete: telemetry, its law, update, gradients freed
    finish(loss)          once they all have been: the sums wait for the next step's law

The law is in controllers/release.py. `release.py` calls this from hooks, and trainers with hooks of their own through
`CruxyOptimizer.step_parameter` and `step_param`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import cruxy_kernels as kernels
from cruxy_kernels import layout as L
from cruxy_triton import distributed
from cruxy_triton.batches import Batch, StepPlan
from cruxy_triton.controllers import release as law
from cruxy_triton.controllers.meta import slow_loop
from cruxy_triton.groups import Settings
from cruxy_triton.metrics import calls


class Layer:
    """Tensors that are updated together."""

    def __init__(self, name: str, tensors: Sequence[Tensor]) -> None:
        self.name, self.tensors = name, list(tensors)
        self.plan: StepPlan | None = None


class Passes:
    """The steps of an optimizer that is updated in the backward pass.

    scale: the first loss scale, None for none. hooked: whether the hooks of `release_gradients` call `update`; else
    trainers do. A tensor that comes again begins a new step there, because some of them never call `step()`.
    """

    def __init__(
        self, optimizer: Any, scale: float | None, interval: int = law.GROWTH_INTERVAL, *, hooked: bool = False
    ) -> None:
        if optimizer.layerwise is not None:
            raise ValueError(
                f"layerwise={optimizer.layerwise!r} compares the layers' gradients, and an update in the backward pass "
                "frees them before the last one is there; use layerwise=None, or do without release"
            )
        self.optimizer, self.hooked = optimizer, hooked
        self.scaled, self.first_scale, self.interval = scale is not None, scale or 1.0, interval
        self.open = False
        self.loss: Tensor | None = None  # that the step began with
        self.begun = False  # whether `begin` has scaled it
        self._layers: dict[Tensor, Layer] = {}  # of `step_parameter`
        self._seen: set[int] = set()
        self._names: list[str] = []  # of the layers in the order of this step
        self._table = torch.zeros((0, L.NUM_TELEMETRY))
        self._settings: list[Settings] = []
        self._home: dict[Tensor, int] = {}
        self.adopt()

    def adopt(self) -> None:
        """Take the optimizer's release vector, which a checkpoint may have brought; plans are of the tensors before."""
        optimizer = self.optimizer
        if optimizer._release is None:
            optimizer._release = law.new_release(optimizer.control, self.first_scale)
        elif not self.scaled:
            optimizer._release[law.SCALE] = 1.0
        release = optimizer._release.tolist()
        self._has_loss = release[law.HAS_LOSS] > 0
        # The law has yet to see the step that waits.
        optimizer._calls = calls(optimizer.control[0]) + int(release[law.FRESH] + release[law.SKIPPED])
        self._layers.clear()
        self._forget()

    def _forget(self) -> None:
        """Ready for the next step."""
        self.open = self.begun = False
        self.loss = None
        self._waiting: Layer | None = None
        self._missing = 0  # of the layer that waits
        self._seen.clear()

    def vector(self, device: torch.device) -> Tensor:
        """The release vector on this device."""
        if self.optimizer._release.device != device:
            self.optimizer._release = self.optimizer._release.to(device)
        return self.optimizer._release

    # -- a step ------------------------------------------------------------------

    def begin(self, loss: Tensor, grad: Tensor) -> Tensor:
        """The backward pass has come to the loss: the gradient that it goes on with."""
        loss = loss.float()
        self.loss = loss if self.loss is None else self.loss + loss
        self.begun = True
        return grad * self.vector(grad.device)[law.SCALE].to(grad.dtype) if self.scaled else grad

    def seen(self, p: Tensor) -> bool:
        """Whether this tensor has been updated, or waits to be, in this step; from now on it has."""
        if id(p) in self._seen:
            return True
        self._seen.add(id(p))
        return False

    def arrived(self, p: Tensor, layer: Layer) -> None:
        """A tensor of this layer has its gradient, for the first time in this step: the last one brings the update."""
        if self._waiting is not layer:
            self._update_waiting()  # some of its tensors get no gradient in this step
            self._waiting, self._missing = layer, len(layer.tensors)
        self._missing -= 1
        if not self._missing:
            self._update_waiting()

    def _update_waiting(self) -> None:
        layer, self._waiting = self._waiting, None
        if layer is not None:
            self.update(layer)

    @torch.no_grad()
    def update(self, layer: Layer) -> None:
        """Update the tensors of a layer that have a gradient, and free those."""
        optimizer = self.optimizer
        if not self.open:
            self._open()
        batches = self._batches(layer)
        if not batches:
            return
        device = self._table.device
        control, release = optimizer._rows.values, self.vector(device)
        by_tensor = optimizer.clip == "tensor"
        clip = optimizer.clip
        if by_tensor:
            clip = optimizer._histories.of(batches, optimizer._rows, optimizer._state)
        parts = [
            batch.telemetry(optimizer.gamma_norm, None, optimizer.backend, by_tensor).to(device, non_blocking=True)
            for batch in batches
        ]
        self._names.append(layer.name)
        table = self._table[: len(self._names)]
        loss = None if self.loss is None else self.loss.to(device, non_blocking=True)
        own = law.layer_step(
            control, release, table, parts[0] if len(parts) == 1 else torch.cat(parts), clip=clip, loss=loss
        )
        factors: Any = [None] * len(batches)
        if isinstance(clip, kernels.TensorClip):
            factors = clip.factors.split([len(batch.params) for batch in batches])
        for batch, factor in zip(batches, factors, strict=True):
            batch.update(own, optimizer.backend, factor)
            # Kernels write by address. Where the rest of this backward pass needs what a tensor was, autograd says so.
            torch.autograd.graph.increment_version(batch.params)
            for p in batch.params:
                p.grad = None

    def step_parameter(self, p: Tensor) -> None:
        """Update one tensor, for a trainer's own hook."""
        if self.seen(p):
            self.end()
            self.seen(p)
        layer = self._layers.get(p)
        if layer is None:
            layer = self._layers[p] = Layer(f"tensor {len(self._layers)}", [p])
        self.update(layer)

    def _open(self) -> None:
        optimizer = self.optimizer
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                "updates in the backward pass work in one process: DDP and FSDP combine the gradients of the ranks "
                "after a layer would have been updated; run on one device, or call step() after the backward pass"
            )
        if self.scaled and not self.begun:
            raise RuntimeError(
                "gradients came without a loss scale; call released.scale(loss).backward(), or "
                "released.attach(trainer) for a Trainer, or make it with loss_scale=False"
            )
        settings = optimizer._follow()
        self._home = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        wanted = [(p, i) for p, i in self._home.items() if p.requires_grad]
        for p, i in wanted:
            if distributed.is_sharded(p):
                raise RuntimeError("updates in the backward pass cannot serve DTensors; call step() after it instead")
            optimizer._joined(p, i, settings[i].rule)
        device = wanted[0][0].device
        control, release = optimizer._control_on(device), self.vector(device)
        log = optimizer._history.log(device)
        law.open_step(
            control, release, law=optimizer.mode, clip=optimizer.clip, has_loss=self._has_loss, log=log,
            backend=optimizer.backend,
        )  # fmt: skip
        if optimizer.mode == "meta3" and optimizer._calls and optimizer._calls % optimizer.meta_interval == 0:
            slow_loop(control, bounded=optimizer.bounds is not None, log=log, backend=optimizer.backend)
        if self._table.device != device or len(self._table) < len(self._home):
            self._table = torch.zeros((len(self._home), L.NUM_TELEMETRY), device=device)
        self._settings, self._names, self.open = settings, [], True

    def _batches(self, layer: Layer) -> list[Batch]:
        optimizer = self.optimizer
        key = optimizer._rows, optimizer._plan_key(self._settings)
        state = self._states(layer) if optimizer._seen["state"] else None
        if layer.plan is not None and layer.plan.serves(state, key):
            return layer.plan.batches
        tensors = [(self._home[p], p) for p in layer.tensors]
        batches, absent = optimizer._sort(self._settings, tensors, False)
        layer.plan = None
        if batches:
            rows = len(optimizer._rows.values)
            layer.plan = StepPlan.prepared(batches, absent, self._states(layer), key, rows, optimizer.backend)
        return batches

    def _states(self, layer: Layer) -> dict[Tensor, dict[str, Any]]:
        state = self.optimizer._state
        return {p: state[p] for p in layer.tensors if p in state}

    @torch.no_grad()
    def finish(self, loss: float | Tensor | None) -> None:
        """The backward pass is over; `loss`: of the step, instead of the one that it began with."""
        optimizer = self.optimizer
        if any(getattr(optimizer, name, None) is not None for name in ("found_inf", "grad_scale")):
            raise RuntimeError(
                "a GradScaler cannot serve updates in the backward pass: it unscales when they have been made; leave "
                "it out (a Trainer's fp16=True brings one): released.scale(loss) is its replacement"
            )
        self._update_waiting()
        left = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if left:  # of tensors that have no hook
            self.update(Layer("others", left))
        self.end(loss)

    def end(self, loss: float | Tensor | None = None, *, whole: bool = True) -> None:
        """No more tensors come in this step. whole: False where it is broken off, as by an error in backward()."""
        if whole:
            self._update_waiting()
        if self.open:
            given, self.optimizer._given_loss = self.optimizer._given_loss, None
            chosen = next((value for value in (loss, self.loss, given) if value is not None), None)
            self._close(chosen, whole)
        self._forget()

    def _close(self, loss: float | Tensor | None, whole: bool) -> None:
        optimizer, device = self.optimizer, self._table.device
        value = optimizer._loss(loss, device, False) if whole else None
        self._has_loss = value is not None
        law.close_step(
            self.vector(device), self._table[: len(self._names)], value, optimizer.gamma_norm, scaled=self.scaled,
            whole=whole, interval=self.interval,
        )  # fmt: skip
        optimizer._calls += 1

    # -- what it did ------------------------------------------------------------------

    def metrics(self) -> dict[str, Any]:
        """The last step in numbers; waits for the device."""
        release = self.optimizer._release.tolist()
        rows = self._table[: len(self._names)]
        bad = (~law.usable(rows)).tolist()
        return {
            "loss_scale": release[law.SCALE],
            "overflows": int(release[law.OVERFLOWS]),
            "grad_norm": release[law.TOTALS + L.SUM_SQ] ** 0.5,
            "max_grad": release[law.TOTALS + L.MAX_ABS],
            "nonfinite": int(release[law.TOTALS + L.COUNT_NONFINITE]),
            "nonfinite_layers": [name for name, is_bad in zip(self._names, bad, strict=True) if is_bad],
            "layers": len(self._names),
        }
