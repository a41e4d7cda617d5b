"""The guard in Hugging Face's Trainer (and TRL's): a callback.

    Trainer(..., callbacks=[GuardCallback()])

It attaches when training begins, when the Trainer's optimizer exists; reads the loss of every micro-batch from the
model's own output; adds its numbers to the Trainer's log; ends the run where the guard stops; checksums every
checkpoint that the Trainer writes, and keeps the guard's own state in it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from cruxy_triton import files
from cruxy_triton.guard.guard import TrainingGuard
from cruxy_triton.guard.policy import Policy

STATE_FILE = "guard.pt"
_LOGGED = ("regime", "pressure", "lr_factor", "update_ratio", "grad_score", "loss_phase")


class GuardCallback(TrainerCallback):
    """
    Args:
        policy: thresholds and budgets.
        events: file name of the events; a relative one lies in the Trainer's output folder.

    `guard` is the TrainingGuard while and after the run. The Trainer measures (and with `max_grad_norm` clips) the
    global norm before the optimizer is called, which spreads one NaN over all gradients: of a non-finite gradient the
    report can then only say that all tensors hold it.

    TensorBoard and W&B are called before a user's callbacks: `attach(trainer)` instead of `callbacks=[...]` puts this
    one first, so that they log the guard's numbers as well.
    """

    def __init__(self, policy: Policy | None = None, *, events: str | None = "guard_events.jsonl"):
        self.policy, self.events = policy, events
        self.guard: TrainingGuard | None = None
        self._hook: Any = None

    def attach(self, trainer: Any) -> "GuardCallback":
        """Join a Trainer before every other callback."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        path = None if self.events is None else Path(args.output_dir) / self.events
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.guard = TrainingGuard(optimizer, model, self.policy, events=path, raise_on_stop=False)
        if state.global_step:
            saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
            if saved.is_file():
                self.guard.load_state_dict(torch.load(saved, weights_only=True))
        self._hook = model.register_forward_hook(self._seen, with_kwargs=True)

    def _seen(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """The loss of a micro-batch, where the model computes it."""
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if self.guard is not None and model.training and torch.is_grad_enabled() and isinstance(loss, Tensor):
            # With num_items_in_batch the model divides by the tokens of all micro-batches of the step.
            self.guard.observe(loss, share=kwargs.get("num_items_in_batch") is not None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.guard is not None:
            self.guard.observe(batch=f"of step {state.global_step + 1}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.guard is None:
            return
        if getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            self.guard.overflowed()
        if self.guard.stopped is not None:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.guard is None or logs is None or "loss" not in logs:
            return
        metrics = self.guard.metrics
        numbers = {f"guard_{name}": metrics[name] for name in _LOGGED if name in metrics}
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.guard is None or not state.is_world_process_zero or not folder.is_dir():
            return
        torch.save(self.guard.state_dict(), folder / STATE_FILE)
        files.seal(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self.guard is not None:
            self.guard.finish()
            self.guard.detach()
