"""CruxyOptimizer and the guard in Hugging Face's Trainer and in TRL's: one callback.

    trainer = SFTTrainer(..., args=args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args))
    CruxyCallback(guard=True).attach(trainer)
    trainer.train()

It takes the loss where every Trainer has it, from `training_step`, and hands it to the optimizer as the tensor that it
is: nothing waits for the device. What optimizer and guard did is added to each entry of the Trainer's log. The guard
may watch any torch optimizer; it ends the run where it stops, and its state and checksums are in every checkpoint.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from cruxy_triton import files
from cruxy_triton.errors import warn
from cruxy_triton.guard import Policy, TrainingGuard
from cruxy_triton.guard.attach import unwrap
from cruxy_triton.guard.events import ACTIONS
from cruxy_triton.optimizer import CruxyOptimizer

GUARD_STATE = "guard.pt"  # in a checkpoint
_OF_THE_TRAINER = ("step", "loss", "lr", "lrs")  # numbers of the optimizer that the Trainer's log has itself
_OF_THE_GUARD = ("grad_norm", "pressure", "lr_factor", "update_ratio", "grad_score", "loss_phase")


def optimizer_cls_and_kwargs(args: Any, **settings: Any) -> tuple[type[CruxyOptimizer], dict[str, Any]]:
    """What a Trainer takes as `optimizer_cls_and_kwargs=`: CruxyOptimizer at the learning rate of its arguments.

    Args:
        args: the Trainer's TrainingArguments (SFTConfig, ...): learning rate, and weight decay by group.
        settings: further arguments of CruxyOptimizer, as `state_bits=8` or `rule="lion"`; checked when it is made.
    """
    if args.max_grad_norm:
        warn(
            f"the Trainer clips gradients at max_grad_norm={args.max_grad_norm} before CruxyOptimizer sees them; set "
            "max_grad_norm=0.0, since it clips inside its own update"
        )
    return CruxyOptimizer, {"lr": args.learning_rate, **settings}


class CruxyCallback(TrainerCallback):
    """
    Args:
        guard: True, or a `Policy` with thresholds and budgets, for a TrainingGuard on the Trainer's optimizer.
        events: file of the guard's events; a relative one lies in the Trainer's output folder. None: no file.
        snapshots: folder for what a guard goes back to, as TrainingGuard takes it.
        label: names the batch of a step (a number from 1) in the guard's events.
        settle: take the guard's reading at the end of each step and not at the next; for a Trainer whose host waits
            for each step's loss anyway.

    `guard` is the TrainingGuard while and after the run. The Trainer measures (and with `max_grad_norm` clips) the
    global norm before the optimizer is called, which spreads one NaN over all gradients: of a non-finite gradient the
    report can then only say that all tensors hold it.
    """

    def __init__(
        self,
        guard: Policy | bool | None = None,
        *,
        events: str | os.PathLike[str] | None = "guard_events.jsonl",
        snapshots: str | os.PathLike[str] | None = None,
        label: Callable[[int], Any] = lambda step: f"of step {step}",
        settle: bool = False,
    ):
        self.policy = Policy() if guard is True else guard or None
        self.events, self.snapshots, self.label, self.settle = events, snapshots, label, settle
        self.guard: TrainingGuard | None = None
        self.loss: Tensor | None = None  # of the step, up to now
        self.lr: float | Tensor = 0.0  # of the step, in the first group
        self._trainer: Any = None
        self._optimizer: Any = None
        self._known_events = 0

    def attach(self, trainer: Any) -> "CruxyCallback":
        """Join a Trainer, before its other callbacks, so that TensorBoard and the like log these numbers as well."""
        take_step = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> Tensor:
            loss = take_step(*args, **kwargs)  # divided by the micro-batches, or tokens, of the whole step already
            self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()
            return loss

        trainer.training_step = training_step
        trainer.callback_handler.callbacks.insert(0, self)
        self._trainer = trainer
        return self

    def watch(
        self, optimizer: Any, model: Any, folder: str | os.PathLike[str] = "", guard: TrainingGuard | None = None
    ) -> None:
        """Be about this optimizer from now on; the Trainer's is found when training begins.

        folder: where a relative file of events lies. guard: one that is on the optimizer already, in place of one by
        the policy. Raises TypeError for an optimizer that is none of torch's.
        """
        self._optimizer = unwrap(optimizer)
        self.guard = guard
        if self.policy is None or guard is not None:
            return
        events = None if self.events is None else Path(folder) / self.events
        if events is not None:
            events.parent.mkdir(parents=True, exist_ok=True)
        self.guard = TrainingGuard(
            self._optimizer, model, self.policy, events=events, snapshots=self.snapshots, raise_on_stop=False
        )

    def save(self, checkpoint: Path) -> None:
        """Put the guard's state into the folder of a checkpoint."""
        if self.guard is not None:
            torch.save(self.guard.state_dict(), checkpoint / GUARD_STATE)

    def load(self, checkpoint: Path) -> None:
        """Continue with the guard's state of a checkpoint, of which there must be one."""
        if self.guard is not None:
            self.guard.load_state_dict(torch.load(checkpoint / GUARD_STATE, weights_only=True))

    def numbers(self, step: int) -> dict[str, Any]:
        """What optimizer and guard did in `step`, the last one, by the names of their own `metrics`.

        `lr_used` is the learning rate after control, `actions` what the guard has done since this was last asked.
        Waits for the device.
        """
        found: dict[str, Any] = {}
        if isinstance(self._optimizer, CruxyOptimizer):
            metrics = self._optimizer.metrics(wait=True)
            found = {"lr_used": metrics["lr"], **{k: v for k, v in metrics.items() if k not in _OF_THE_TRAINER}}
        if self.guard is None:
            return found
        if "lr_used" not in found and self.guard.lr_factor != 1:
            found["lr_used"] = float(self.lr) * self.guard.lr_factor
        metrics = self.guard.metrics
        if not self.settle or metrics.get("step") == step:  # none of a step that the loss scaler refused
            found |= {k: metrics[k] for k in _OF_THE_GUARD if k in metrics and k not in found}
        found["regime"] = self.guard.regime.value
        new, self._known_events = self.guard.log.events[self._known_events :], len(self.guard.log)
        if actions := [event.kind for event in new if event.kind in ACTIONS]:
            found["actions"] = actions
        return found

    # -- what the Trainer calls ------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer is None:
            raise RuntimeError(
                "CruxyCallback sees no loss as one of callbacks=[...]; leave it out there and call "
                "CruxyCallback(...).attach(trainer) before trainer.train()"
            )
        self.loss = None
        if self._optimizer is None:
            self.watch(kwargs["optimizer"], kwargs["model"], args.output_dir)
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if (checkpoint / GUARD_STATE).is_file():
                self.load(checkpoint)
        self._known_events = 0 if self.guard is None else len(self.guard.log)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loss = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lr = self._optimizer.param_groups[0]["lr"]
        self.lr = lr.clone() if isinstance(lr, Tensor) else lr  # the scheduler moves on before on_step_end
        if isinstance(self._optimizer, CruxyOptimizer) and self.loss is not None:
            self._optimizer.set_loss(self.loss)
        if self.guard is not None:
            self.guard.observe(self.loss, batch=self.label(state.global_step + 1))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.guard is None:
            return
        if self._trainer.accelerator.optimizer_step_was_skipped:
            self.guard.overflowed()
        if self.settle:
            self.guard.settle()
        if self.guard.stopped is not None:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        # The Trainer has waited for the device already: the loss in `logs` is a number.
        numbers = {k: v for k, v in self.numbers(state.global_step).items() if k not in logs and k != "actions"}
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.guard is None or not state.is_world_process_zero or not checkpoint.is_dir():
            return
        self.save(checkpoint)
        files.seal(checkpoint)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer = None  # the next training may have another one
        if self.guard is not None:
            self.guard.finish()
            self.guard.detach()
