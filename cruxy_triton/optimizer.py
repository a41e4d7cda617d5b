"""CruxyOptimizer: a drop-in for `torch.optim.AdamW` that governs its own learning rate, betas and clipping.

This file holds the arguments, the state and the order of a step. The arithmetic is in `cruxy_kernels`
(telemetry, per-step law, update) and `controllers/meta.py` (slow loop); what a group's settings mean in
`groups.py`, the control vector in `rows.py`, checkpoints in `checkpoint.py`. Modes and laws: Cruxy white paper v2.1.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import cruxy_kernels as kernels
from cruxy_kernels import RULES
from cruxy_kernels import layout as L
from cruxy_kernels.codec import scale_name
from cruxy_triton import checkpoint, distributed, groups
from cruxy_triton.batches import Batch, StepPlan
from cruxy_triton.clipping import Histories
from cruxy_triton.controllers.blade import Blade
from cruxy_triton.controllers.layers import KEY as LAYERS
from cruxy_triton.controllers.layers import LayerControl, StepTensors
from cruxy_triton.controllers.meta import slow_loop
from cruxy_triton.controllers.release import KEY as RELEASE
from cruxy_triton.controllers.sketch_align import SketchAlign
from cruxy_triton.errors import warn
from cruxy_triton.groups import Settings
from cruxy_triton.metrics import History, Reader, calls, named
from cruxy_triton.passes import Passes
from cruxy_triton.rows import ControlRows

CLIPPING = ("global", "tensor", None)
LAYERWISE = ("blade", "sketch_align", None)


class CruxyOptimizer(Optimizer):
    """AdamW or Lion under the Cruxy control laws.

    Args:
        params: parameters, named parameters or groups, as for every torch optimizer. Groups may set any of
            lr, betas, eps, weight_decay, decoupled_weight_decay, use_nesterov, use_lion, rule, use_gc, maximize.
        mode: "meta3" (slow loop over learning rate and beta2), "stability_v2" (curvature, gamma-norm,
            predictive clipping) or "stability_v1" (PD control of beta2).
        lr: learning rate, a float or a one-element tensor; schedulers set it, the controller never does:
            it owns a multiplier of its own.
        betas: coefficients of the two moving averages, which the modes adapt: stability_v1 sets beta1 to 0.9,
            and meta3 keeps beta2 at 0.9 but for steeply falling gradients (a warning says so where other ones
            are asked for). None: the rule's own, (0.9, 0.999) for AdamW and (0.9, 0.99) for Lion.
        eps: beside the square root of the AdamW rule.
        weight_decay: decoupled, scaled by the learning rate that is actually used.
        decoupled_weight_decay: False adds the decay to the gradient instead (AdamW rule only).
        use_nesterov: Nesterov momentum (AdamW rule only).
        use_lion: the Lion rule (one state buffer, sign updates) instead of AdamW's.
        use_gc: gradient centralization: gradients of two or more dimensions lose their mean.
        meta_lr_eta, meta_lr_beta2, meta_interval: gains and period of the slow loop (paper section 4).
        gamma_norm: exponent of the gradient statistic, in [1, 4] (paper eq 1).
        bounds: (lowest, highest) multiplier of the learning rate that a controller may reach. None leaves
            only the clamps of the published laws, and switches the early warning's intervention off.
        guard: keep outlier steps (4x the running level, unless five in a row) out of the statistics, and
            let the early warning act. Steps with non-finite gradients or loss are skipped either way.
        clip: "global", the mode's own limit of the norm of all gradients together (stability_v1 has none); "tensor",
            each tensor's gradient at 1.05 times the norms it has had (AdaGC; docs/laws.md, section 2.6), in its
            place; None, no clipping. Leave the trainer's `max_grad_norm` at 0: what it cuts is not seen here.
        layerwise: "blade", a multiplier of the step size for each layer by the direction and size of its gradients
            (layers by parameter name, so give `model.named_parameters()`; docs/laws.md, section 7); "sketch_align",
            one for all layers; None. Not for sharded parameters.
        response: of "blade": "damped", in which a layer more volatile than the median steps less, or "paper", the
            published law, in which it steps more.
        maximize: ascend.
        rule: the update rule by its name in `cruxy_kernels.RULES`, where use_lion does not say it.
        seed: of the random bits with which 16-bit parameters and some codes are rounded, a whole number below 2^24;
            checkpoints hold it. Two optimizers of one seed round their tensors with the same bits: give each its own.
        state_bits: 32 or 8, for the Lion rule also 4: codes with a bfloat16 scale for each 64 values, 1.03 bytes per
            parameter and buffer with 8 bits (Lion has one, AdamW two), 0.53 with 4. 4 bits and AdamW's second moment
            are rounded at random, with bits of `seed`.
        backend: "triton", "native" or "torch"; None lets the device decide (`cruxy_kernels.explain_backend`).
        capturable: the slow loop and the history find their turn on the device, so that a CUDA graph can
            hold the step (changing learning rates then have to be tensors). Every step then has the 8 small
            launches of the slow loop, not every tenth.
        history: how many past steps `history()` remembers (448 bytes each, on the parameters' device).
        process_group: over which ranks the loss is averaged when torch.distributed runs: "auto" is all of
            them, None is none. Statistics of DTensor parameters are always combined over their mesh.

    A warm-up is built in: the moving averages start at 0, so the phase starts near 1 and the throttle near
    one half, and both relax over about 1,000 steps.

    Raises:
        ValueError: an argument is out of range; the message names it. Settings of a group are checked again
            whenever they change, in the step that would use them, before it changes anything.
        TypeError: an argument that the optimizer does not have.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        mode: str = "meta3",
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
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
        clip: str | None = "global",
        layerwise: str | None = None,
        response: str = "damped",
        backend: str | None = None,
        maximize: bool = False,
        capturable: bool = False,
        history: int = 1000,
        process_group: Any = "auto",
        rule: str | None = None,
        seed: int = 0,
        **unknown: Any,
    ):
        if unknown:
            raise TypeError(_unknown_argument(next(iter(unknown))))
        if mode not in L.LAWS:
            hint = f" (for a learning rate of {mode} write lr={mode})" if isinstance(mode, (float, Tensor)) else ""
            raise ValueError(f"unknown mode {mode!r}; expected one of {', '.join(L.LAWS)}{hint}")
        if not (groups.is_count(meta_interval) and meta_interval >= 1):
            raise ValueError(f"meta_interval is {meta_interval!r}; expected a whole number of steps, at least 1")
        if not (groups.is_number(gamma_norm) and 1.0 <= gamma_norm <= 4.0):
            raise ValueError(f"gamma_norm is {gamma_norm!r}; expected a value from 1 to 4")
        for name, value in (("meta_lr_eta", meta_lr_eta), ("meta_lr_beta2", meta_lr_beta2)):
            if not (groups.is_number(value) and 0.0 <= value < 1.0):
                raise ValueError(f"{name} is {value!r}; expected a value from 0 to below 1")
        if bounds is not None and not (groups.is_pair(bounds) and 0.0 < bounds[0] <= 1.0 <= bounds[1] < math.inf):
            raise ValueError(f"bounds is {bounds!r}; expected (low, high) with 0 < low <= 1 <= high, or None")
        if backend not in (None, "triton", "native", "torch"):
            raise ValueError(f"unknown backend {backend!r}; expected 'triton', 'native', 'torch' or None")
        known = sorted({bits for known in RULES.values() for bits in known.state_bits})
        if state_bits not in known:
            raise ValueError(f"state_bits is {state_bits!r}; expected {' or '.join(map(str, known))}")
        if not isinstance(guard, bool):
            raise ValueError(f"guard is {guard!r}; expected True or False")
        if clip not in CLIPPING:
            raise ValueError(f"clip is {clip!r}; expected one of {', '.join(map(repr, CLIPPING))}")
        if layerwise not in LAYERWISE:
            raise ValueError(f"layerwise is {layerwise!r}; expected one of {', '.join(map(repr, LAYERWISE))}")
        blade = Blade(response)
        if not groups.is_count(history):
            raise ValueError(f"history is {history!r}; expected a number of steps, at least 0")
        if not (groups.is_count(seed) and seed < 1 << 24):
            raise ValueError(f"seed is {seed!r}; expected a whole number from 0 to below 2^24")
        self.mode = mode
        self.state_bits = state_bits
        self.backend = backend
        self.process_group = process_group
        self.meta_lr_eta, self.meta_lr_beta2, self.meta_interval = meta_lr_eta, meta_lr_beta2, meta_interval
        self.gamma_norm = gamma_norm
        self.bounds = None if bounds is None else (float(bounds[0]), float(bounds[1]))
        self.guard = guard
        self.clip = clip
        self.layerwise, self.response = layerwise, response
        self._layers: LayerControl | None = {"blade": blade, "sketch_align": SketchAlign()}.get(layerwise or "")
        self._given_entropy: Any = None
        self.seed = seed
        self._rows = ControlRows()
        self._histories = Histories()
        self._settings: list[Settings] = []
        self._plan: StepPlan | None = None
        # A dict, because wrappers that copy this object's attributes have to share it.
        self._seen = {"state": False}
        self._calls = 0
        self._given_loss: Any = None
        self._calls_without_loss = 0
        self._history = History(history)
        self._reader = Reader()
        self._passes: Passes | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "use_nesterov": use_nesterov,
            "use_lion": use_lion,
            "rule": rule,
            "use_gc": use_gc,
            "maximize": maximize,
            "capturable": capturable,
        }
        self._betas_given = betas is not None
        rule = groups.rule_of(defaults)
        if betas is None:
            defaults["betas"] = RULES[rule].betas
        else:
            groups.warn_of_betas(mode, rule, betas)
        super().__init__(params, defaults)
        self._seen["state"] = False  # the base class put an empty one there
        self._follow_layers()

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Each tensor's state, as in every torch optimizer.

        From the first time that anybody asks for it, each step finds out whether its tensors still lie where they
        did; before that nobody else can have reached them.
        """
        self._seen["state"] = True
        return self._state

    @state.setter
    def state(self, value: Any) -> None:
        self._seen["state"] = True
        self.__dict__["state"] = value

    @property
    def _state(self) -> Any:
        return self.__dict__["state"]

    @property
    def control(self) -> Tensor:
        """The control vector, float32 (rows, `cruxy_kernels.layout.NUM_SLOTS`): a row per group, at least."""
        return self._rows.values

    @property
    def _release(self) -> Tensor | None:
        """What controllers/release.py keeps. In a group, where torch.distributed.checkpoint finds it."""
        return self.param_groups[0].get(RELEASE)

    @_release.setter
    def _release(self, vector: Tensor | None) -> None:
        self.param_groups[0].pop(RELEASE, None)
        if vector is not None:
            self.param_groups[0][RELEASE] = vector

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it joins with the statistics gathered so far. Raises ValueError for bad settings."""
        if isinstance(param_group, dict):
            groups.refuse_shared(param_group, self)
            for name in (LAYERS, RELEASE):  # of another optimizer, whose groups these were
                param_group.pop(name, None)
            rule = groups.rule_of({**self.defaults, **param_group})
            if "betas" in param_group:
                groups.warn_of_betas(self.mode, rule, param_group["betas"])
            elif not self._betas_given:
                param_group["betas"] = RULES[rule].betas
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            groups.check(group, self.state_bits)
            groups.check_params(group, self.state_bits)
        except ValueError:
            self.param_groups.pop()
            raise
        self._rows.follow(self.param_groups)
        self._rows.link(self._state, self.mode)

    # -- a step ------------------------------------------------------------------

    def set_loss(self, loss: float | Tensor) -> None:
        """Give the next step its loss, for loops that call `step` themselves: accelerate, Trainer, Lightning.

        With gradient accumulation that is the mean over the micro-batches; a second call replaces the first.
        """
        self._given_loss = _number(loss)

    def set_entropy(self, entropy: float | Tensor) -> None:
        """Give the next step the mean entropy of the model's output (nats), for `layerwise`; as `set_loss`."""
        self._given_entropy = _number(entropy)

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], Any] | None = None, *, loss: float | Tensor | None = None
    ) -> Any:
        """Take one step; without any gradient, do nothing.

        Args:
            closure: re-evaluates the model and returns the loss.
            loss: the loss of this step, a number or a one-element tensor on any device (no
                synchronisation); it feeds the curvature estimate of stability_v2 and meta3. A non-finite
                loss or gradient skips the step on the device. Without it, what the closure returned or
                `set_loss` was given.

        Returns:
            What the closure returned, else `loss`.

        Raises:
            TypeError, ValueError: no closure, no number, or a group's settings that cannot be used; nothing
                was changed then.
            RuntimeError: sparse gradients.
        """
        # torch would wrap every step in its hooks and a profiler's range: without any, that is a tenth of the time.
        if not (type(self).step is CruxyOptimizer.step and _observed(self)):
            return self._take_step(closure, loss=loss)
        arguments: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        return _observed_step(*arguments, **({} if loss is None else {"loss": loss}))

    step.hooked = True  # pyright: ignore[reportFunctionMemberAccess]

    @torch.no_grad()
    def _take_step(self, closure: Callable[[], Any] | None = None, *, loss: float | Tensor | None = None) -> Any:
        if closure is not None and not callable(closure):
            raise TypeError(
                f"step() got a {type(closure).__name__} for a closure; give the loss by name: step(loss=loss)"
            )
        result = loss
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        given, self._given_loss = self._given_loss, None
        entropy, self._given_entropy = self._given_entropy, None
        number = _number(loss if loss is not None else result if result is not None else given)
        if self._passes is not None:
            self._passes.finish(number)
            return result
        sharded = distributed.active()
        batches = self._gather(sharded)
        if not batches:
            return result
        device = batches[0].device
        control = self._control_on(device)
        self._calls += 1
        # A GradScaler leaves these two here for the time of the step.
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        found_inf, grad_scale = _moved(found_inf, device), _moved(grad_scale, device)
        log = self._history.log(device)
        by_tensor = self.clip == "tensor"
        layers = self._layers
        clip = self._histories.of(batches, self._rows, self._state) if by_tensor else self.clip
        parts = [
            _moved(batch.telemetry(self.gamma_norm, found_inf, self.backend, by_tensor or layers is not None), device)
            for batch in batches
        ]
        telemetry, value = parts[0] if len(parts) == 1 else torch.cat(parts), self._loss(number, device, sharded)
        kernels.control_step(
            control, telemetry, value,
            law=self.mode, found_inf=found_inf, grad_scale=grad_scale, log=log, clip=clip, backend=self.backend,
        )  # fmt: skip
        if self.mode == "meta3" and (self.param_groups[0]["capturable"] or self._calls % self.meta_interval == 0):
            slow_loop(control, bounded=self.bounds is not None, log=log, backend=self.backend)
        factors = multipliers = [None] * len(batches)
        if isinstance(clip, kernels.TensorClip):
            factors = clip.factors.split([len(batch.params) for batch in batches])
        if layers is not None:
            self._follow_layers(device)
            multipliers = layers.step(
                StepTensors.of(batches), telemetry, control[0, L.SKIP], loss=value, grad_scale=grad_scale,
                entropy=None if entropy is None else self._on_device(entropy, device, sharded), backend=self.backend,
            ).split([len(batch.params) for batch in batches])  # fmt: skip
        for batch, own, multiplier in zip(batches, factors, multipliers, strict=True):
            batch.update(control, self.backend, own, multiplier)
        return result

    def _follow_layers(self, device: torch.device | None = None) -> None:
        if self._layers is not None:
            first = next((p for group in self.param_groups for p in group["params"]), self._rows.values)
            self._layers.follow(self.param_groups, device or first.device, (self._rows, self._rows.changes))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in every torch optimizer; released gradients of a step that no `step()` has ended: it is broken off."""
        if self._passes is not None:
            self._passes.end(whole=not self._passes.hooked)
        super().zero_grad(set_to_none)

    supports_fused_back_pass = True

    @torch.no_grad()
    def step_parameter(self, p: Tensor, group: dict[str, Any], i: int | None = None) -> None:
        """Update one tensor from its gradient within the backward pass; OneTrainer calls it so, from a hook.

        The laws see each step's statistics in the next one (docs/full-parameter.md). `step()`, `zero_grad()` and
        `state_dict()` end the step; where nobody calls them, the first tensor that comes again does. The gradient is
        freed. With `clip="global"`
        the limit is held against the gradients that have come so far, and the last step's norm.

        Args:
            p: a tensor of `group["params"]`; without a gradient nothing happens.
            group: its group of `param_groups`. i: its place there.

        Raises:
            ValueError: the tensor is not in this group of this optimizer.
            RuntimeError: `release_gradients` updates them already, or several processes run.
        """
        if p.grad is None:
            return
        if not any(p is q for q in group["params"]) or not any(group is own for own in self.param_groups):
            raise ValueError("step_parameter got a tensor or a group of another optimizer; give p of group['params']")
        if self._passes is None:
            self._passes = Passes(self, None)
        if self._passes.hooked:
            raise RuntimeError("release_gradients updates these tensors already; use one of the two")
        self._passes.step_parameter(p)

    def step_param(self, p: Tensor, group: dict[str, Any]) -> None:
        """`step_parameter` as sd-scripts calls it."""
        self.step_parameter(p, group)

    def _gather(self, sharded: bool) -> list[Batch]:
        """The tensors that have a gradient, in one batch for each kind of update: those of the last step, if it can."""
        settings = self._follow()
        # A graph that is captured has tables of its own: those of a plan are written anew for other gradients.
        plannable = not sharded and not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
        if self._plan is not None and plannable:
            state = self._state if self._seen["state"] else None
            if self._plan.serves(state, self._plan_key(settings)):
                return self._plan.batches
        tensors = [(index, p) for index, group in enumerate(self.param_groups) for p in group["params"]]
        batches, absent = self._sort(settings, tensors, sharded)
        self._plan = None
        if batches and plannable:
            self._rows.link(self._state, self.mode)
            key = self._plan_key(settings)  # tensors may have joined
            self._plan = StepPlan.prepared(batches, absent, self._state, key, len(self._rows.values), self.backend)
        return batches

    def _plan_key(self, settings: list[Settings]) -> Any:
        """What decides the batches beside the tensors: kinds of update, rows, backend, and the stream of the tables."""
        stream = torch.cuda.current_stream().cuda_stream if self._rows.values.is_cuda else None
        return [s[:3] for s in settings], self._rows.changes, self.backend, stream

    def _sort(
        self, settings: list[Settings], tensors: list[tuple[int, Tensor]], sharded: bool
    ) -> tuple[list[Batch], list[Tensor]]:
        """(batches, tensors without a gradient) of tensors with the index of their group; makes missing state."""
        batches: dict[Any, Batch] = {}
        absent: list[Tensor] = []
        for index, p in tensors:
            rule, flags, use_gc = settings[index][:3]
            grad = p.grad
            if grad is None:
                absent.append(p)
                continue
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    "CruxyOptimizer does not support sparse gradients; "
                    "use dense ones (for example Embedding(sparse=False))"
                )
            if grad.is_neg():  # kernels read what lies in memory, and that is the other sign
                grad = p.grad = grad.resolve_neg()
            state, row, number = self._joined(p, index, rule)
            mesh = None
            if sharded:
                grad, mesh = distributed.local_grad(p, grad), distributed.statistics_key(p)
                p, state = distributed.local(p), distributed.local_state(state, p)
            key = (rule, flags, use_gc, p.dtype, p.device, mesh)
            batch = batches.get(key)
            if batch is None:
                batch = batches[key] = Batch(*key)
            batch.add(p, grad, state, row, number)
        return list(batches.values()), absent

    def _joined(self, p: Tensor, index: int, rule: str) -> tuple[dict[str, Any], int, int]:
        """(state, row, number) of a tensor, which has them from now on."""
        state = self._state[p]
        if not state:
            self._init_state(p, rule, state)
            self._rows.forget(p)  # where the state was cleared the tensor starts anew
        row = self._rows.of(p)
        if row is None:
            age = state.get("step")  # of a state that was carried over from another tensor
            row = self._rows.join(p, index, self._calls, None if age is None else float(age))
        return state, row, self._rows.number[p]

    def _follow(self) -> list[Settings]:
        """The groups' settings as they are now; refuses those that cannot be used, before anything is changed."""
        settings = [groups.settings_of(group) for group in self.param_groups]
        if settings != self._settings:
            for group in self.param_groups:
                groups.check(group, self.state_bits)
            if [s.rule for s in settings] != [s.rule for s in self._settings]:
                for group in self.param_groups:
                    groups.check_states(group, self._state)
            self._settings = settings
        self._rows.follow(self.param_groups)
        return settings

    def _init_state(self, p: Tensor, rule: str, state: dict[str, Any]) -> None:
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        for name, codec in zip(RULES[rule].state, RULES[rule].codecs(self.state_bits), strict=True):
            if codec.block:
                state[name] = distributed.codes_like(p, codec)
                state[scale_name(name)] = distributed.scales_like(p, codec)
            else:
                state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)

    def _control_on(self, device: torch.device) -> Tensor:
        """The control vector on this device, with the settings as they are now."""
        self._rows.to(device)
        self._rows.link(self._state, self.mode)
        self._rows.write(
            self._settings,
            gamma=self.gamma_norm,
            meta_lr_eta=self.meta_lr_eta,
            meta_lr_beta2=self.meta_lr_beta2,
            meta_interval=self.meta_interval,
            bounds=self.bounds,
            guard=self.guard,
            seed=self.seed,
        )
        return self._rows.values

    def _loss(self, loss: float | Tensor | None, device: torch.device, sharded: bool) -> Tensor | None:
        """The mean loss of all ranks as a 0-dim fp32 tensor on the control's device."""
        if loss is None:
            self._calls_without_loss += 1
            # Not at the first: torch.distributed.checkpoint takes one step of its own to make the state.
            if self.mode != "stability_v1" and self._calls_without_loss == 2:
                warn(
                    f"CruxyOptimizer(mode={self.mode!r}) gets no loss, so its curvature estimate is off; call "
                    "step(loss=loss) to switch it on, or set_loss(loss) where the step is called for you"
                )
            return None
        return self._on_device(loss, device, sharded)

    def _on_device(self, number: float | Tensor, device: torch.device, sharded: bool) -> Tensor:
        """The mean over all ranks as a 0-dim fp32 tensor."""
        if isinstance(number, Tensor):
            value = number.to(device, torch.float32, non_blocking=True)
        else:
            value = torch.full((), number, dtype=torch.float32, device=device)
        return distributed.mean_loss(value, self.process_group) if sharded else value

    # -- what it did ------------------------------------------------------------------

    def metrics(self, *, wait: bool = False) -> dict[str, Any]:
        """The last step in numbers, as a plain dict; `lrs` lists the learning rate used in each group.

        On an accelerator the numbers are copied in the background: the call returns those of the newest
        copy that has arrived (a call or so old) and orders the next; `wait=True` waits for this step's.
        """
        self._rows.follow(self.param_groups)
        rows = self._reader.read(self.control, wait)
        return {**named(rows[0]), "lrs": [rows[row][L.LR_OUT] for row in self._rows.main]}

    def layer_multipliers(self, *, wait: bool = False) -> dict[str, float]:
        """The last step's multiplier of each layer by name; empty without `layerwise`. `wait`: as for `metrics`."""
        return {} if self._layers is None else self._layers.multipliers(wait=wait)

    def history(self) -> list[dict[str, Any]]:
        """`metrics()` of the last steps of this process (without `lrs`), oldest first."""
        return self._history.read(self.control[0])

    # -- checkpoints ------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        kept = super().__getstate__()
        kept.update({k: v for k, v in self.__dict__.items() if k not in kept and not k.startswith("_optimizer_")})
        for transient in ("grad_scale", "found_inf", "_zero_grad_profile_name"):
            kept.pop(transient, None)
        return {**kept, "_plan": None, "_passes": None}  # hooks are of these tensors

    def __repr__(self) -> str:
        lines = super().__repr__().splitlines()
        hidden = ("    control:", f"    {LAYERS}:", f"    {RELEASE}:", "       ")
        return "\n".join(line for line in lines if not line.startswith(hidden))

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to continue bit for bit; `checkpoint.py` says in which form."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        if self._passes is not None:
            self._passes.end()
        self._rows.follow(self.param_groups)
        self._rows.link(self.state, self.mode)
        self._follow_layers()
        state_dict = checkpoint.pack(self.param_groups, self.state, self.seed)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, state_dict)
            if result is not None:
                state_dict = result
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint; see `checkpoint.read` for what is taken over and what is refused."""
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            if result is not None:
                state_dict = result
        loaded = checkpoint.read(
            state_dict, self.param_groups, mode=self.mode, state_bits=self.state_bits, clip=self.clip,
            defaults=self.defaults,
        )  # fmt: skip
        layers = self._layers
        carried = None if layers is None or loaded.layers is None else layers.check(loaded.layers)
        if layers is not None and carried is None:
            warn("the checkpoint has no layer-wise state; layer-wise control starts afresh")
        self.__setstate__({"state": loaded.state, "param_groups": loaded.groups})
        self._seen = {"state": False}  # all its tensors are copies
        self._plan = None
        self._rows, self._histories = ControlRows(), Histories()
        self._rows.follow(loaded.groups)
        for index, (control, ages) in enumerate(zip(loaded.controls, loaded.ages, strict=True)):
            self._rows.restore(index, control, ages)
            self.seed = self.seed if control is None else int(control[L.SEED])
        self._rows.link(self._state, self.mode)
        self._settings = []
        if layers is not None:
            layers.restart(carried)
            self._follow_layers()
        self._history.begin(self.control[0])
        self._calls = calls(self.control[0])
        self._release = loaded.release
        if self._passes is not None:
            self._passes.adopt()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


_observed_step = Optimizer.profile_hook_step(CruxyOptimizer._take_step)


def _observed(optimizer: Optimizer) -> bool:
    """Whether somebody has a hook around this optimizer's steps, or a profiler runs."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or torch.autograd._profiler_enabled()
    )


class MetaLion(CruxyOptimizer):
    """meta3 over the Lion rule with 8-bit momentum: 1.03 bytes of state per parameter (paper section 5).

    Takes every argument of `CruxyOptimizer` (`state_bits=4`: 0.53 bytes); only the defaults differ. Lion's steps
    have the size of the learning rate whatever the gradient, so it wants 3 to 10 times less of it, and more weight
    decay.
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


def _number(loss: Any) -> float | Tensor | None:
    """A loss as a float or a 0-dim real tensor; TypeError or ValueError where it is none."""
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(f"loss has {loss.numel()} elements; expected one number (the mean loss)")
        if loss.is_complex():
            raise TypeError(f"loss is {loss.dtype}; expected a real number")
        return distributed.local(loss.detach() if loss.requires_grad else loss).reshape(())
    if loss is None or groups.is_number(loss):
        return loss if loss is None else float(loss)
    raise TypeError(f"loss is a {type(loss).__name__}; expected a number or a one-element tensor")


def _moved(value: Any, device: torch.device) -> Any:
    return value if value is None or value.device == device else value.to(device, non_blocking=True)


def _unknown_argument(name: str) -> str:
    why = {
        "max_grad_norm": "clip= says how gradients are clipped",
        "fused": "every step is fused, so leave it out",
        "foreach": "every step takes all tensors at once, so leave it out",
        "amsgrad": "there is no amsgrad form",
        "differentiable": "steps cannot be differentiated",
    }
    return f"CruxyOptimizer got an unexpected argument {name!r}" + (f": {why[name]}" if name in why else "")
