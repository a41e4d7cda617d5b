"""CruxyOptimizer: a drop-in for `torch.optim.AdamW` that governs its own learning rate, betas and clipping.

This file holds the arguments, the parameter groups, the state and the order of a step. The arithmetic is
in `cruxy_kernels` (telemetry, per-step law, update) and `controllers/meta.py` (slow loop), checkpoints in
`checkpoint.py`. Modes and laws: Cruxy white paper v2.1.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import cruxy_kernels as kernels
from cruxy_kernels import CODECS
from cruxy_kernels import layout as L
from cruxy_kernels.laws.telemetry import combine
from cruxy_triton import checkpoint, distributed
from cruxy_triton.controllers.meta import slow_loop

# Slots of `metrics()`, by the name they have there.
METRICS = {
    "step": L.STEP,
    "lr": L.LR_OUT,
    "lr_scale": L.LR_SCALE,
    "phase": L.PHASE,
    "v_fast": L.V_FAST,
    "v_slow": L.V_SLOW,
    "curvature": L.CURVATURE,
    "beta1": L.BETA1_OUT,
    "beta2": L.BETA2_OUT,
    "clip_threshold": L.CLIP_THRESHOLD,
    "clip_coef": L.CLIP_COEF,
    "grad_norm": L.GRAD_NORM,
    "gamma_norm": L.GAMMA_NORM,
    "max_grad": L.MAX_GRAD,
    "loss": L.LOSS,
    "skipped": L.SKIP,
    "skipped_steps": L.SKIPPED,
    "nonfinite": L.NONFINITE,
    "warning": L.WARNING,
    "warnings": L.WARNINGS,
}
_COUNTS = ("step", "skipped", "skipped_steps", "nonfinite", "warnings")


class CruxyOptimizer(Optimizer):
    """AdamW or Lion under the Cruxy control laws.

    Args:
        params: parameters, named parameters or groups, as for every torch optimizer. Groups may set any of
            lr, betas, eps, weight_decay, decoupled_weight_decay, use_nesterov, use_lion, use_gc, maximize.
        mode: "meta3" (slow loop over learning rate and beta2), "stability_v2" (curvature, gamma-norm,
            predictive clipping) or "stability_v1" (PD control of beta2).
        lr: learning rate, a float or a one-element tensor; schedulers set it, the controller never does:
            it owns a multiplier of its own.
        betas: coefficients of the two moving averages; the modes adapt them.
        eps: beside the square root of the AdamW rule.
        weight_decay: decoupled, scaled by the learning rate that is actually used.
        decoupled_weight_decay: False adds the decay to the gradient instead (AdamW rule only).
        use_nesterov: Nesterov momentum (AdamW rule only).
        use_lion: the Lion rule (one state buffer, sign updates) instead of AdamW's.
        use_gc: gradient centralisation: gradients of two or more dimensions lose their mean.
        meta_lr_eta, meta_lr_beta2, meta_interval: gains and period of the slow loop (paper section 4).
        gamma_norm: exponent of the gradient statistic, in [1, 4] (paper eq 1).
        bounds: (lowest, highest) multiplier of the learning rate that a controller may reach. None leaves
            only the seeds' own clamps, and switches the early warning's intervention off.
        guard: keep outlier steps (4x the running level, unless five in a row) out of the statistics, and
            let the early warning act. Steps with non-finite gradients or loss are skipped either way.
        maximize: ascend.
        state_bits: 32, or 8 for int8 momentum with a bfloat16 scale for each 64 values (Lion rule only).
        backend: "triton" or "torch"; None lets the device decide (`cruxy_kernels.explain`).
        capturable: the slow loop and the history find their turn on the device, so that a CUDA graph can
            hold the step (changing learning rates then have to be tensors).
        history: how many past steps `history()` remembers (448 bytes each, on the parameters' device).
        process_group: over which ranks the loss is averaged when torch.distributed runs: "auto" is all of
            them, None is none. Statistics of DTensor parameters are always combined over their mesh.

    A warm-up is built in: the moving averages start at 0, so the phase starts near 1 and the throttle near
    one half, and both relax over about 1,000 steps.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        mode: str = "meta3",
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        decoupled_weight_decay: bool = True,
        use_nesterov: bool = True,
        use_lion: bool = False,
        use_gc: bool = False,
        meta_lr_eta: float = 0.05,
        meta_lr_beta2: float = 0.03,
        meta_interval: int = 10,
        gamma_norm: float = 1.5,
        *,
        state_bits: int = 32,
        bounds: tuple[float, float] | None = (0.1, 4.0),
        guard: bool = True,
        backend: str | None = None,
        maximize: bool = False,
        capturable: bool = False,
        history: int = 1000,
        process_group: Any = "auto",
    ):
        if mode not in L.LAWS:
            raise ValueError(f"unknown mode {mode!r}; expected one of {', '.join(L.LAWS)}")
        if not (isinstance(meta_interval, int) and meta_interval >= 1):
            raise ValueError(f"meta_interval is {meta_interval!r}; expected a whole number of steps, at least 1")
        if not 1.0 <= gamma_norm <= 4.0:
            raise ValueError(f"gamma_norm is {gamma_norm}; expected a value from 1 to 4")
        for name, value in (("meta_lr_eta", meta_lr_eta), ("meta_lr_beta2", meta_lr_beta2)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} is {value}; expected a value from 0 to below 1")
        if bounds is not None and not (len(bounds) == 2 and 0.0 < bounds[0] <= 1.0 <= bounds[1] < math.inf):
            raise ValueError(f"bounds is {bounds}; expected (low, high) with 0 < low <= 1 <= high, or None")
        if backend not in (None, "triton", "torch"):
            raise ValueError(f"unknown backend {backend!r}; expected 'triton', 'torch' or None")
        if state_bits not in (8, 32):
            raise ValueError(f"state_bits is {state_bits!r}; expected 8 or 32")
        if not (isinstance(history, int) and history >= 0):
            raise ValueError(f"history is {history!r}; expected a number of steps, at least 0")
        self.mode = mode
        self.state_bits = state_bits
        self.backend = backend
        self.process_group = process_group
        self.meta_lr_eta, self.meta_lr_beta2, self.meta_interval = meta_lr_eta, meta_lr_beta2, meta_interval
        self.gamma_norm = gamma_norm
        self.bounds = None if bounds is None else (float(bounds[0]), float(bounds[1]))
        self.guard = guard
        self._control = torch.zeros((0, L.NUM_SLOTS))
        # Host's view of the control rows: the group of each, and the call in which its first tensor joined
        # (None: no tensor yet). The first row of a group carries its statistics into checkpoints.
        self._row_group: list[int] = []
        self._row_born: list[int | None] = []
        self._param_row: dict[Tensor, int] = {}
        self._calls = 0
        self._written: list[Any] = []
        self._calls_without_loss = 0
        self._log = torch.zeros((history, L.NUM_SLOTS))
        self._log_start = 0  # calls before the log began: a resumed run has those of the run it continues
        self._pending: tuple[Any, Tensor] | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "use_nesterov": use_nesterov,
            "use_lion": use_lion,
            "use_gc": use_gc,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    # -- groups and rows ------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it joins with the statistics gathered so far. Raises ValueError for bad settings."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group, self.state_bits)
        except ValueError:
            self.param_groups.pop()
            raise
        self._add_row(len(self.param_groups) - 1, self._control[0] if len(self._control) else None)

    def _add_row(self, group_index: int, like: Tensor | None) -> int:
        """Append a control row; `like` is the row whose statistics it continues (AGE starts at 0)."""
        row = torch.zeros(L.NUM_SLOTS, device=self._control.device) if like is None else like.clone()
        beta2 = self.param_groups[group_index]["betas"][1]
        row[L.AGE] = 0
        if like is None:
            row[L.LR_SCALE] = 1
        row[L.META_BETA2] = beta2
        self._control = torch.cat([self._control, row[None]])
        self._row_group.append(group_index)
        self._row_born.append(None)
        self._control_moved()
        return len(self._row_group) - 1

    def _control_moved(self) -> None:
        """Renew what refers to the control tensor: `group["control"]` and the `step` of a state are views.

        They are there because torch.distributed.checkpoint saves the keys of the live groups and states.
        """
        self._written = []
        for index, group in enumerate(self.param_groups):
            if index in self._row_group:
                group["mode"], group["control"] = self.mode, self._control[self._row_group.index(index)]
        for p, row in self._param_row.items():
            if self.state.get(p):
                self.state[p]["step"] = self._control[row, L.AGE]

    def _assign_row(self, param: Tensor, group_index: int) -> int:
        """Give a tensor that joins in this call the row of its group and age."""
        for row, group in enumerate(self._row_group):
            if group == group_index and self._row_born[row] in (None, self._calls):
                break
        else:
            row = self._add_row(group_index, self._control[self._row_group.index(group_index)])
        if self._row_born[row] is None:
            self._row_born[row] = self._calls
            self._control[row, L.AGE] = 0
        self._param_row[param] = row
        self.state[param]["step"] = self._control[row, L.AGE]
        return row

    def _write_inputs(self) -> None:
        """Copy the groups' settings into the control vector, where they changed."""
        table = []
        for index in self._row_group:
            group = self.param_groups[index]
            lr = group["lr"]
            table.append(
                kernels.control_inputs(
                    lr=0.0 if isinstance(lr, Tensor) else float(lr), weight_decay=group["weight_decay"],
                    betas=group["betas"], eps=group["eps"], maximize=group["maximize"], gamma=self.gamma_norm,
                    meta_lr_eta=self.meta_lr_eta, meta_lr_beta2=self.meta_lr_beta2, meta_interval=self.meta_interval,
                    bounds=self.bounds, guard=self.guard,
                )
            )  # fmt: skip
        if table != self._written:
            values = torch.tensor(table, dtype=torch.float32, pin_memory=self._control.is_cuda)
            self._control[:, : values.shape[1]].copy_(values, non_blocking=True)
            self._written = table
        for row, index in enumerate(self._row_group):
            lr = self.param_groups[index]["lr"]
            if isinstance(lr, Tensor):
                self._control[row, L.LR].copy_(lr.detach().reshape(()), non_blocking=True)

    # -- a step ------------------------------------------------------------------

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], Any] | None = None, *, loss: float | Tensor | None = None
    ) -> Any:
        """Take one step; without any gradient, do nothing.

        Args:
            closure: re-evaluates the model and returns the loss.
            loss: the loss of this step, a number or a one-element tensor on any device (no
                synchronisation); it feeds the curvature estimate of stability_v2 and meta3. A non-finite
                loss or gradient skips the step on the device.

        Returns:
            What the closure returned, else `loss`.
        """
        result = loss
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if loss is None:
            loss = result
        batches = self._gather()
        if not batches:
            return result
        device = batches[0].grads[0].device
        if self._control.device != device:
            self._control = self._control.to(device)
            self._control_moved()
        control = self._control
        self._write_inputs()
        self._calls += 1
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        found_inf = found_inf.to(device, non_blocking=True) if isinstance(found_inf, Tensor) else None
        if isinstance(grad_scale, Tensor):
            grad_scale = grad_scale.to(device, non_blocking=True)
        telemetry = self._telemetry(batches, device, found_inf)
        kernels.control_step(
            control, telemetry, self._loss(loss, device), law=self.mode, found_inf=found_inf, grad_scale=grad_scale,
            backend=self.backend,
        )  # fmt: skip
        capturable = self.param_groups[0]["capturable"]
        if self.mode == "meta3" and (capturable or self._calls % self.meta_interval == 0):
            slow_loop(control, bounded=self.bounds is not None)
        controls = {device: control}
        for batch in batches:
            if batch.device not in controls:
                controls[batch.device] = control.to(batch.device, non_blocking=True)
            batch.update(controls[batch.device], self.backend)
        self._remember(control[0], capturable)
        return result

    def _telemetry(
        self,
        batches: list["_Batch"],
        device: torch.device,
        found_inf: Tensor | None,
    ) -> Tensor:
        """The statistics over all gradients of all ranks, (n, 4) on `device`: their sum is the total."""
        grads: dict[Any, list[Tensor]] = {}
        for batch in batches:
            for key, grad in zip(batch.keys, batch.grads, strict=True):
                grads.setdefault(key, []).append(grad)
        parts = []
        for (_, mesh_key), tensors in grads.items():
            part = kernels.gradient_telemetry(tensors, gamma=self.gamma_norm, partial=True, backend=self.backend)
            part = part.to(device, non_blocking=True)
            if mesh_key is not None:
                part = combine(part)
                if found_inf is not None:  # a rank's GradScaler knows only its own shards
                    part[L.COUNT_NONFINITE] += found_inf.reshape(())
                part = distributed.over_mesh(part, mesh_key)[None]
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _loss(self, loss: Any, device: torch.device) -> Tensor | None:
        """The loss as a 0-dim fp32 tensor on the control's device."""
        if loss is None:
            self._calls_without_loss += 1
            # Not at the first: torch.distributed.checkpoint takes one step of its own to make the state.
            if self.mode != "stability_v1" and self._calls_without_loss == 2:
                warnings.warn(
                    f"CruxyOptimizer(mode={self.mode!r}) gets no loss, so its curvature estimate is off; "
                    "call step(loss=loss) to switch it on",
                    stacklevel=5,
                )
            return None
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(f"loss has {loss.numel()} elements; expected one number (the mean loss)")
            value = distributed.local(loss.detach()).reshape(()).to(device, torch.float32, non_blocking=True)
        else:
            value = torch.full((), float(loss), dtype=torch.float32, device=device)
        return distributed.mean_loss(value, self.process_group) if distributed.active() else value

    def _gather(self) -> list["_Batch"]:
        """The tensors that have a gradient, in one batch for each update rule; makes missing state."""
        batches: dict[Any, _Batch] = {}
        sharded = distributed.active()
        for index, group in enumerate(self.param_groups):
            rule = (group["use_lion"], group["use_nesterov"], group["decoupled_weight_decay"], group["use_gc"])
            for p in group["params"]:
                grad = p.grad
                if grad is None:
                    continue
                if grad.layout is not torch.strided:
                    raise RuntimeError(
                        "CruxyOptimizer does not support sparse gradients; "
                        "use dense ones (for example Embedding(sparse=False))"
                    )
                state = self.state[p]
                if not state:
                    self._init_state(p, group, state)
                    self._param_row.pop(p, None)  # the state was cleared: the tensor starts anew
                row = self._param_row.get(p)
                if row is None:
                    row = self._assign_row(p, index)
                key = (rule, p.dtype, p.device)
                batch = batches.get(key)
                if batch is None:
                    batch = batches[key] = _Batch(group, p.device)
                batch.add(p, grad, state, row, sharded)
        return list(batches.values())

    def _init_state(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if self.state_bits == 8:
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.int8, memory_format=torch.contiguous_format)
            state["exp_avg_scale"] = distributed.scales_like(p)
            return
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        if not group["use_lion"]:
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)

    # -- what it did ------------------------------------------------------------------

    def _remember(self, row: Tensor, capturable: bool) -> None:
        """Copy a row of the control vector into the log, on the device."""
        size = len(self._log)
        if size == 0:
            return
        if self._log.device != row.device:
            self._log = self._log.to(row.device)
        if capturable:
            turn = torch.remainder(row[L.STEP] + row[L.SKIPPED] - 1, size).long()
            self._log.index_copy_(0, turn.reshape(1), row[None])
        else:
            self._log[(self._calls - 1) % size].copy_(row)

    def metrics(self, *, wait: bool = False) -> dict[str, Any]:
        """The last step in numbers, as a plain dict; `lrs` lists the learning rate used in each group.

        On an accelerator the numbers are copied in the background: the call returns those of the newest
        copy that has arrived (a call or so old) and orders the next; `wait=True` waits for this step's.
        """
        rows = self._read(wait)
        values = _named(rows[0])
        values["lrs"] = [rows[self._row_group.index(i)][L.LR_OUT] for i in range(len(self.param_groups))]
        return values

    def _read(self, wait: bool) -> list[list[float]]:
        # Off the step path: only metrics() reads values to the host, and without `wait` from a copy that has arrived.
        control = self._control
        if not control.is_cuda:
            return control.tolist()
        old = self._pending
        if old is None or old[0].query():
            copy = torch.empty(control.shape, dtype=control.dtype, pin_memory=True)
            copy.copy_(control, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = (event, copy)
        if wait:
            return control.tolist()
        if old is None or not old[0].query():
            old = self._pending
            assert old is not None
            old[0].synchronize()  # nothing has arrived yet: this once, wait
        return old[1].tolist()

    def history(self) -> list[dict[str, Any]]:
        """`metrics()` of the last steps of this process (without `lrs`), oldest first."""
        size = len(self._log)
        # Counted on the device: a replayed CUDA graph takes steps that the host does not see.
        calls = int(self._control[0, L.STEP] + self._control[0, L.SKIPPED])
        count = min(calls - self._log_start, size)
        rows = self._log.tolist()  # waits for the device; whoever plots a history can
        return [_named(rows[call % size]) for call in range(calls - count, calls)]

    # -- checkpoints ------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        kept = super().__getstate__()
        kept.update({k: v for k, v in self.__dict__.items() if k not in kept and not k.startswith("_optimizer_")})
        for transient in ("grad_scale", "found_inf", "_pending", "_zero_grad_profile_name"):
            kept.pop(transient, None)
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_pending", None)
        self._control_moved()

    def __repr__(self) -> str:
        lines = super().__repr__().splitlines()
        return "\n".join(line for line in lines if "control:" not in line and not line.startswith("       "))

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to continue bit for bit; see `checkpoint.pack` for the form."""
        return checkpoint.pack(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint; see `checkpoint.unpack` for what is taken over and what refused."""
        checkpoint.unpack(self, state_dict)


class MetaLion(CruxyOptimizer):
    """meta3 over the Lion rule with 8-bit momentum: 1.03 bytes of state a parameter (paper section 5).

    Takes every argument of `CruxyOptimizer`; only the defaults differ. Lion's steps have the size of the
    learning rate whatever the gradient, so it wants 3 to 10 times less of it, and more weight decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        *,
        state_bits: int = 8,
        **kwargs: Any,
    ):
        fixed = {"mode": "meta3", "use_lion": True}
        for name, value in fixed.items():
            if kwargs.setdefault(name, value) != value:
                raise ValueError(f"MetaLion is {name}={value!r}; use CruxyOptimizer for {kwargs[name]!r}")
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, state_bits=state_bits, **kwargs)


class _Batch:
    """The tensors of one update rule, as the parallel lists that the kernels take."""

    def __init__(self, group: dict[str, Any], device: torch.device):
        self.device = device
        self.lion = group["use_lion"]
        self.nesterov, self.decoupled = group["use_nesterov"], group["decoupled_weight_decay"]
        self.centralise = group["use_gc"]
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.keys: list[Any] = []
        self.state: dict[str, list[Tensor]] = {}
        self.rows: list[int] = []

    def add(self, param: Tensor, grad: Any, state: dict[str, Any], row: int, sharded: bool) -> None:
        key = None
        if sharded:
            grad, key = distributed.local_grad(param, grad), distributed.statistics_key(param)
            state = {name: distributed.local(tensor) for name, tensor in state.items()}
            param = distributed.local(param)
            if "exp_avg_scale" in state:
                state["exp_avg_scale"] = state["exp_avg_scale"][: CODECS[8].scale_count(param.numel())]
        self.params.append(param)
        self.grads.append(grad)
        self.keys.append((grad.device, key))
        for name, tensor in state.items():
            if name != "step":
                self.state.setdefault(name, []).append(tensor)
        self.rows.append(row)

    def update(self, control: Tensor, backend: str | None) -> None:
        grads = self.grads
        if self.centralise:
            grads = [_centralised(g) if g.dim() > 1 and g.numel() else g for g in grads]
        if self.lion:
            kernels.lion_update_(
                self.params, grads, self.state["exp_avg"], control,
                exp_avg_scales=self.state.get("exp_avg_scale"),
                rows=self.rows, backend=backend,
            )  # fmt: skip
        else:
            kernels.adamw_update_(
                self.params, grads, self.state["exp_avg"], self.state["exp_avg_sq"], control,
                rows=self.rows, nesterov=self.nesterov, decoupled=self.decoupled, backend=backend,
            )  # fmt: skip


def _named(row: list[float]) -> dict[str, Any]:
    """The slots of METRICS by name; those that count are whole numbers."""
    return {name: int(row[slot]) if name in _COUNTS else row[slot] for name, slot in METRICS.items()}


def _centralised(grad: Tensor) -> Tensor:
    """Gradient centralisation (arXiv 2004.01461): no mean over all dimensions but the first."""
    grad = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
    return grad - grad.mean(dim=tuple(range(1, grad.dim())), keepdim=True)


def _check_group(group: dict[str, Any], state_bits: int) -> None:
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got {lr.numel()} elements")
    elif not 0.0 <= lr < math.inf:
        raise ValueError(f"lr is {lr}; expected a finite value of at least 0")
    if len(betas) != 2 or any(isinstance(b, Tensor) for b in betas) or not all(0.0 <= b < 1.0 for b in betas):
        raise ValueError(f"betas is {betas}; expected two floats, each from 0 to below 1")
    for name in ("eps", "weight_decay"):
        if not 0.0 <= group[name] < math.inf:
            raise ValueError(f"{name} is {group[name]}; expected a finite value of at least 0")
    if state_bits == 8 and not group["use_lion"]:
        raise ValueError("state_bits=8 needs use_lion=True: the second moment of the AdamW rule has no 8-bit form")
    for p in group["params"]:
        if p.is_complex():
            raise ValueError("CruxyOptimizer does not support complex parameters; use torch.view_as_real")
        if state_bits == 8 and p.dtype == torch.float64:
            raise ValueError("state_bits=8 does not support float64 parameters; use state_bits=32")
