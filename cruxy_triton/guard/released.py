"""The guard above steps that are taken layer by layer in the backward pass (`release_gradients`).

When such a step is over its gradients are gone, so that it can be judged and not be undone: the optimizer itself clips
each tensor in time and leaves layers that are not finite alone. What is left to the guard is what the host decides once
it is over: learning rate, momentum, rollback and stop, by the loss, the norm of all gradients and the update's size.

    guard.begin()                   # before the backward pass: the learning rate that it is to have
    released.scale(loss).backward()
    guard.end()                     # gives the groups their own rates back
    guard.observe(loss)
    optimizer.step()
"""

from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from cruxy_kernels import layout as L
from cruxy_triton.controllers import release as law
from cruxy_triton.guard import attach
from cruxy_triton.guard import telemetry as T
from cruxy_triton.guard.guard import TrainingGuard
from cruxy_triton.guard.reading import read

NEVER = 1e9  # deviations


class ReleasedGuard(TrainingGuard):
    """A `TrainingGuard` for one process; `released` is what `release_gradients` returned.

    Raises ValueError where the optimizer is not updated in the backward pass.
    """

    def __init__(self, released: Any, optimizer: Any, *arguments: Any, **settings: Any) -> None:
        super().__init__(optimizer, *arguments, **settings)
        self._released = released
        if getattr(self.optimizer, "_passes", None) is None:
            raise ValueError("this optimizer has ordinary steps; give release_gradients(model, optimizer) to it first")

    def begin(self) -> None:
        """Before a backward pass: its learning rate; the first snapshot."""
        self._take_reading()
        self._ladder.rolled_back = False  # the gradients are yet to be made
        self._ready()
        if self._ladder.snapshots.empty:
            self._ladder.take_snapshot(self._steps)
            self._ladder.snapshots.empty = False
        if self.policy.act:
            self._ladder.rate.apply(self.optimizer)
        self._steps += 1
        if self._ratio is not None and self._measures():
            self._ratio.begin()

    def end(self) -> None:
        """After it: the groups' learning rates are their own again."""
        self._restore()

    def _before(self, *_: Any) -> None:
        """All of it has been done."""

    @torch.no_grad()
    def _after(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        losses, batch, self._losses, self._batch = self._losses, self._batch, [], None
        telemetry, sums = self._ready(), self.optimizer._release  # type: ignore[attr-defined]
        broken = sums[law.TOTALS + L.COUNT_NONFINITE] > 0
        norm = torch.where(broken, torch.inf, sums[law.TOTALS + L.SUM_SQ].sqrt())
        telemetry.params[0].grad = norm.reshape(1)
        scaled = self.optimizer._passes.scaled  # type: ignore[attr-defined]
        verdict = telemetry.judge(
            losses[-1] if losses else None,
            found_inf=broken.float() if scaled else None,
            sigmas=self.policy.clip_sigmas,
        )
        assert verdict is not None
        ratio = None if self._ratio is None else self._ratio.end()
        if ratio is not None:
            verdict.report[T.RATIO] = ratio.to(verdict.report.device)
        self._mail.post(verdict.report, {"step": self._steps, "batch": batch, "loss": bool(losses)})

    def _take_reading(self) -> None:
        mail = self._mail.take()
        if mail is not None:
            reading = read(*mail)
            reading.norms = reading.norms[:0]  # there is one for all tensors, and no tensor's own
            reading.layers = [] if reading.finite else self._not_finite()
            self._ladder.take(reading)
        self._raise_if_stopped()

    def _not_finite(self) -> list[int]:
        """The numbers of the tensors in layers that the last step left alone."""
        names = set(self._released.metrics()["nonfinite_layers"])
        among = {id(p) for name, params in self._released.layers if name in names for p in params}
        return [i for i, p in enumerate(self._ladder.params) if id(p) in among]

    def _ready(self) -> T.Telemetry:
        """Telemetry of one number, the norm of all gradients."""
        if self._telemetry is None:
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            policy = replace(self.policy, clip=False, tensor_ratio=None, skip_sigmas=NEVER)
            self._telemetry = T.Telemetry([torch.zeros(1, device=params[0].device)], policy)
            self._ladder.watch(params, attach.names(self.optimizer, self._model), self._telemetry.state)
            if self.policy.update_ratio_limit is not None:
                self._ratio = T.UpdateRatio(params)
        return self._telemetry
