"""TrainingGuard: sits on the step hooks of an optimizer, judges each step, acts within its budgets.

The order of a step:

    pre-hook    take the reading of the step before: the host's decisions (`ladder.py`);
                judge this step's gradients on the device (`telemetry.py`); clip; skip; multiply the learning rate
    step        the optimizer's own, unchanged
    post-hook   give learning rate and gradients back; measure the update; post this step's report

Decisions of the host are one step late and the same on every rank; clipping and skipping are in time.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cruxy_triton.guard import attach
from cruxy_triton.guard import telemetry as T
from cruxy_triton.guard.actions import HiddenGradients
from cruxy_triton.guard.events import Event, EventLog, plain
from cruxy_triton.guard.ladder import Ladder
from cruxy_triton.guard.policy import Policy
from cruxy_triton.guard.reading import read
from cruxy_triton.guard.regimes import Regime

ABSENT = object()


class TrainingStopped(RuntimeError):
    """The guard ended the run because nothing helped; the message is the report. Weights are the last good ones."""


class TrainingGuard:
    """Keeps a training run alive, above any torch optimizer.

        guard = TrainingGuard(optimizer, model)
        ...
        loss.backward()
        guard.observe(loss)     # optional: with it the guard sees a loss that rises
        optimizer.step()        # as always

    Args:
        optimizer: any `torch.optim.Optimizer`, or one wrapped by accelerate.
        model: names for the report, and buffers for the snapshots; None: parameters are named by number.
        policy: thresholds and budgets; `Policy(act=False)` only observes.
        scaler: a `torch.amp.GradScaler`, so that steps which it refuses are counted.
        events: file for the events, JSON lines; the first rank writes it.
        snapshots: folder, of this run alone, for snapshots that are larger than the policy's `snapshot_max_bytes`;
            None: there are none of those. For one process.
        process_group: over which ranks judgement is shared when torch.distributed runs: "auto" is all of them,
            None is none.
        raise_on_stop: raise `TrainingStopped` from `optimizer.step()`; False: set `stopped` and let every further
            step pass without a change (the Trainer's callback ends the run).

    Raises:
        TypeError: `optimizer` has no step hooks.
        ValueError: a folder for snapshots under several ranks.
    """

    def __init__(
        self,
        optimizer: Any,
        model: nn.Module | None = None,
        policy: Policy | None = None,
        *,
        scaler: Any = None,
        events: str | os.PathLike[str] | None = None,
        snapshots: str | os.PathLike[str] | None = None,
        process_group: Any = "auto",
        raise_on_stop: bool = True,
    ):
        self.optimizer = attach.unwrap(optimizer)
        self.policy = policy or Policy()
        self.scaler = scaler
        self.raise_on_stop = raise_on_stop
        self.log = EventLog(events if attach.first_rank() else None)
        self._model = model
        self._group = process_group if attach.many_ranks() else None
        if snapshots is not None and attach.many_ranks():
            raise ValueError("snapshots on disk are of one process, and this is one of several; leave out snapshots=")
        self._ladder = Ladder(self.optimizer, model, self.policy, self.log, snapshots)
        self._telemetry: T.Telemetry | None = None
        self._ratio: T.UpdateRatio | None = None
        self._mail, self._scales = T.Mailbox(), T.Mailbox()
        self._last_scale: float | None = None
        self._hidden = HiddenGradients()
        self._losses: list[Tensor] = []
        self._shared = False
        self._batch: Any = None
        self._verdict: T.Verdict | None = None
        self._labels: dict[str, Any] = {}
        self._before_step: dict[str, Any] = {}  # what the optimizer's attributes were
        self._steps = 0
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]

    # -- what the user calls --------------------------------------------------------------------------------

    def observe(self, loss: Any = None, *, batch: Any = None, share: bool = False) -> None:
        """Tell this step's loss, and optionally which batch it is; with accumulation, once per micro-batch.

        Args:
            loss: one element, a tensor on any device (not waited for) or a number; the mean over the micro-batches
                of a step is judged. Give the loss itself, not the one that a GradScaler multiplied.
            batch: anything that names the batch in the report: its index, the ids of its records.
            share: the loss is divided among the micro-batches already: they are summed instead.
        """
        self._watch_scale()
        if loss is not None:
            value = loss.detach() if isinstance(loss, Tensor) else torch.tensor(float(loss))
            self._losses.append(value.reshape(()) if value.numel() == 1 else value.float().mean())
            self._shared = share
        if batch is not None:
            self._batch = batch

    def overflowed(self) -> None:
        """A loss scaler refused a step, so that `optimizer.step` never ran (the integrations call this)."""
        self._losses, self._batch = [], None
        self._steps += 1
        self._ladder.step = self._steps
        self._ladder.overflowed()
        self._raise_if_stopped()

    def settle(self) -> None:
        """Take the reading of the step that was just taken now, not at the next one.

        For loops that wait for the device after each step anyway, to write its loss down: then this waits for
        nothing, and events, metrics and a rollback belong to the step that they are of. Call it when the gradients
        are gone.
        """
        self._take_reading()
        self._ladder.rolled_back = False  # the next gradients are of the weights that were put back

    def finish(self) -> str:
        """Take the last reading in; returns the summary of the run."""
        self._take_reading()
        return self.summary()

    @property
    def stopped(self) -> str | None:
        """The report of a run that was ended, else None."""
        return self._ladder.stopped

    @property
    def regime(self) -> Regime:
        return self._ladder.regimes.current

    @property
    def lr_factor(self) -> float:
        """What the learning rates are multiplied by at present."""
        return self._ladder.rate.factor if self.policy.act else 1.0

    @property
    def metrics(self) -> dict[str, Any]:
        """The newest reading in numbers: loss, norms, scores, regime, factor. One step old."""
        return self._ladder.metrics

    def summary(self) -> str:
        regime = self.regime.value
        return f"guard: {self._steps} steps, now {regime}, learning rate x {self.lr_factor:.3g}; {self.log.summary()}"

    def detach(self) -> None:
        """Leave the optimizer alone from now on."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run continues with: baselines, regime, rate, budgets, events, and which snapshots are on disk.

        Numbers, words and small tensors.
        """
        pending = self._mail.pending
        if pending is not None:
            pending = (pending[0], {**pending[1], "batch": plain(pending[1]["batch"])})  # loads with weights_only
        return {
            "steps": self._steps,
            "ladder": self._ladder.state_dict(),
            "baselines": None if self._telemetry is None else self._telemetry.state.cpu().clone(),
            "pending": None if pending is None else [pending[0].clone(), dict(pending[1])],
            "events": self.log.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, with its events; snapshots that were in memory begin afresh.

        Raises ValueError for another set of parameters and for what is no state of a guard; nothing is changed then.
        """
        try:
            events = [Event(**event) for event in state["events"]]
            steps, baselines, pending = int(state["steps"]), state["baselines"], state["pending"]
            Ladder(self.optimizer, None, self.policy, EventLog()).load_state_dict(
                {**state["ladder"], "snapshots": {"start": None, "good": [], "candidate": None}}
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"this is no state of a guard ({type(error).__name__}: {error})") from None
        if baselines is not None:
            telemetry = self._ready()
            if baselines.shape != telemetry.state.shape:
                raise ValueError(
                    f"the guard's state is of {baselines.shape[-1] - 1} tensors and the optimizer has "
                    f"{len(telemetry)}; load it beside the optimizer of the run that saved it"
                )
            telemetry.state.copy_(baselines)
        self._steps = steps
        self.log.load(events)
        self._ladder.load_state_dict(state["ladder"])
        if pending is not None:
            self._mail.put(pending[0].clone(), dict(pending[1]))

    # -- hooks --------------------------------------------------------------------------------------------

    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        self._restore()  # a step that raised never came to its end
        self._take_reading()
        closure = kwargs.get("closure", args[1] if len(args) > 1 and callable(args[1]) else None)
        stale, self._ladder.rolled_back = self._ladder.rolled_back, False
        if self.stopped is not None or (stale and closure is None):
            # After a stop no step is taken; after a rollback these gradients are of weights that are gone.
            self._losses, self._batch = [], None
            self._steps += 1
            self._hidden.hide(p for group in self.optimizer.param_groups for p in group["params"])
            return None
        if closure is None:
            if kwargs.get("loss") is not None and not self._losses:
                self.observe(kwargs["loss"])
            self._judge()
            return None

        # With a closure the gradients are made inside the step; the first evaluation is the one that is judged.
        judged = []

        def watched() -> Any:
            result = closure()
            if not judged:
                judged.append(True)
                if isinstance(result, Tensor) and result.numel() == 1 and not self._losses:
                    self.observe(result)
                self._judge()
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": watched}
        return (*args[:1], watched, *args[2:]), kwargs

    @torch.no_grad()
    def _judge(self) -> None:
        telemetry = self._ready()
        losses, batch, self._losses, self._batch = self._losses, self._batch, [], None
        loss = losses[0] if losses else None
        if len(losses) > 1:
            stacked = torch.stack([x.to(telemetry.device, torch.float32, non_blocking=True) for x in losses])
            loss = stacked.sum() if self._shared else stacked.mean()
        found_inf = getattr(self.optimizer, "found_inf", None)
        calm = self.regime in (Regime.WARMING, Regime.STABLE)
        verdict = telemetry.judge(
            loss,
            grad_scale=getattr(self.optimizer, "grad_scale", None),
            found_inf=found_inf if isinstance(found_inf, Tensor) else None,
            sigmas=self.policy.clip_sigmas if calm else self.policy.clip_sigmas_stressed,
        )
        if verdict is None:
            return
        if self._ladder.snapshots.empty:
            self._ladder.take_snapshot(self._steps)
            self._ladder.snapshots.empty = False
        self._steps += 1
        self._verdict = verdict
        self._labels = {"step": self._steps, "batch": batch, "loss": loss is not None}
        if self.policy.act:
            self._protect(verdict, telemetry, calm)
            self._ladder.rate.apply(self.optimizer)
        if self._ratio is not None and self._measures():
            self._ratio.begin()

    def _protect(self, verdict: T.Verdict, telemetry: T.Telemetry, calm: bool) -> None:
        """Skip or clip this step, in time."""
        if self._decides_on_device(telemetry.device):
            # The optimizer reads both on the device, as it does for a GradScaler: exact, and nobody waits.
            handed = {"found_inf": verdict.found_inf}
            by_tensor = not calm or self.policy.tensor_ratio is not None
            if not by_tensor:
                handed["grad_scale"] = verdict.grad_scale
            attributes = vars(self.optimizer)
            self._before_step = {name: attributes.get(name, ABSENT) for name in handed}
            attributes.update(handed)
            if not by_tensor:
                return
        else:
            skip, clip = verdict.read()
            if skip:
                self._hidden.hide(telemetry.params)
            if skip or not clip:
                return
        grads = [T.values(p.grad) for p in telemetry.params if p.grad is not None]
        factors = (f for p, f in zip(telemetry.params, verdict.factors.unbind(), strict=True) if p.grad is not None)
        for grad, factor in zip(grads, factors, strict=True):
            grad.mul_(factor.to(grad.device, grad.dtype, non_blocking=True))

    def _decides_on_device(self, device: torch.device) -> bool:
        """Whether the optimizer skips and clips by its own `found_inf` and `grad_scale`: on an accelerator, if it can.

        Elsewhere the flags are read by the host: free on a CPU; on an accelerator the wait that a GradScaler has too.
        """
        return device.type != "cpu" and bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))

    def _after(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        verdict, self._verdict = self._verdict, None
        self._restore()
        if verdict is None:
            return
        ratio = None if self._ratio is None else self._ratio.end()
        if ratio is not None:
            verdict.report[T.RATIO] = ratio.to(verdict.report.device)
        self._mail.post(verdict.report, self._labels)

    def _restore(self) -> None:
        self._ladder.rate.restore()
        self._hidden.restore()
        for name, value in self._before_step.items():
            if value is ABSENT:
                vars(self.optimizer).pop(name, None)
            else:
                vars(self.optimizer)[name] = value
        self._before_step = {}

    def _measures(self) -> bool:
        held = self._ladder.rate.target is not None
        return held or self._steps <= 20 or self._steps % self.policy.ratio_interval == 0

    def _take_reading(self) -> None:
        mail = self._mail.take()
        if mail is not None:
            self._ladder.take(read(*mail))
        self._raise_if_stopped()

    def _raise_if_stopped(self) -> None:
        if self.stopped is not None and self.raise_on_stop:
            raise TrainingStopped(self.stopped)

    def _watch_scale(self) -> None:
        """Notice refused steps by the scaler's falling scale, read one call late, where `step` is never called."""
        scale = getattr(self.scaler, "_scale", None)
        if scale is None or getattr(self.optimizer, "_step_supports_amp_scaling", False):
            return
        mail = self._scales.take()
        if mail is not None:
            value = float(mail[0])
            if self._last_scale is not None and value < self._last_scale:
                self.overflowed()
            self._last_scale = value
        self._scales.post(scale.reshape(1), None)

    def _ready(self) -> T.Telemetry:
        """Telemetry of the optimizer's present parameters; groups may have been added."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        old = self._telemetry
        if old is not None and len(old) == len(params) and all(map(lambda a, b: a is b, old.params, params)):
            return old
        # CruxyOptimizer compiles loops where steps are large; for another optimizer's guard nothing is compiled.
        new = T.Telemetry(params, self.policy, self._group, compiles=hasattr(self.optimizer, "backend"))
        if old is not None:
            known = {id(p): i for i, p in enumerate(old.params)}
            for i, p in enumerate(params):
                if id(p) in known:
                    new.state[:, i] = old.state[:, known[id(p)]]
            new.state[:, -1] = old.state[:, -1]
            self._mail.take()
        self._telemetry = new
        self._ladder.watch(params, attach.names(self.optimizer, self._model), new.state)
        if self.policy.update_ratio_limit is not None:
            self._ratio = T.UpdateRatio(params, process_group=self._group)
            scale = self.policy.adapter_ratio if attach.are_adapters(params, self._group) else 1.0
            self._ladder.ratio_limit = self.policy.update_ratio_limit * scale
            self._ladder.ratio_target = self.policy.update_ratio_target * scale
        return new

