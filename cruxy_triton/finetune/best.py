"""Evaluations during a run: the best of its adapters is kept, and the run ends when no better one comes.

The best one lies in the output folder, and a copy of it in each checkpoint, so that a resumed run knows it, and how
many evaluations have passed since. An evaluation changes nothing in the training: not its random numbers either.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from cruxy_triton import files
from cruxy_triton.finetune.recipe import Recipe

WEIGHTS, RECORD = "best.safetensors", "best.json"


class Best:
    """The evaluations of a run so far: the lowest held-out loss, its step and weights.

    step, loss: of the best evaluation, None and infinity before the first. count: evaluations; since: those after the
    best one. stopped: whether patience has run out.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.folder = folder
        self.step: int | None = None
        self.loss = math.inf
        self.count = self.since = 0
        self.stopped = False

    @property
    def keeps(self) -> bool:
        """Whether weights are kept, to be those of the adapter."""
        return self.recipe.eval_steps is not None and self.recipe.load_best_model_at_end

    def take(self, model: torch.nn.Module, step: int, loss: float) -> None:
        """Counts an evaluation; keeps the weights of `model` that learn where it is the best so far."""
        self.count += 1
        if self.step is None or loss < self.loss - self.recipe.early_stopping_threshold:
            self.since = 0
        else:
            self.since += 1
        if loss < self.loss:  # a loss that is not a number is never the best
            self.step, self.loss = step, loss
            if self.keeps:
                learned = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}
                with files.writing(self.folder), files.replacing(self.folder / WEIGHTS) as temporary:
                    save_file(learned, temporary)
        patience = self.recipe.early_stopping_patience
        self.stopped = patience is not None and self.since >= patience

    def restore(self, model: torch.nn.Module) -> None:
        """Puts the best weights into `model`."""
        learned = load_file(self.folder / WEIGHTS)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(learned[name])

    def record(self) -> dict[str, Any]:
        """The evaluations as data for run.json and checkpoints."""
        known = {name: getattr(self, name) for name in ("step", "count", "since", "stopped")}
        return {**known, "loss": self.loss if math.isfinite(self.loss) else None}

    def save(self, checkpoint: Path) -> None:
        if self.recipe.eval_steps is None:
            return
        (checkpoint / RECORD).write_text(json.dumps(self.record()))
        if (self.folder / WEIGHTS).is_file():
            shutil.copyfile(self.folder / WEIGHTS, checkpoint / WEIGHTS)

    def load(self, checkpoint: Path) -> None:
        """What was known when `checkpoint` was written."""
        (self.folder / WEIGHTS).unlink(missing_ok=True)
        if not (checkpoint / RECORD).is_file():
            return
        for name, value in json.loads((checkpoint / RECORD).read_text()).items():
            setattr(self, name, math.inf if value is None and name == "loss" else value)
        if (checkpoint / WEIGHTS).is_file():
            with files.replacing(self.folder / WEIGHTS) as temporary:
                shutil.copyfile(checkpoint / WEIGHTS, temporary)

    def clear(self) -> None:
        (self.folder / WEIGHTS).unlink(missing_ok=True)


class Evaluation(TrainerCallback):
    """Evaluates every `eval_steps` steps, after the step's own row is written, and ends the run when patience does.

    `trainer` is a `train.Trainer`, `telemetry` what writes its rows. `last`: step and result of the last evaluation.
    """

    def __init__(self, trainer: Any, telemetry: Any, say: Callable[[str], None]) -> None:
        self.trainer, self.telemetry, self.say = trainer, telemetry, say
        self.last: tuple[int, dict[str, Any]] = (-1, {})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, step = self.trainer, state.global_step
        every = trainer.recipe.eval_steps
        if every is None or step % every or step >= state.max_steps:  # the last step is evaluated when all is over
            return
        began = time.perf_counter()
        devices = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            found = trainer.held_out()
        self.last = (step, found)
        self.telemetry.write({"step": step, "eval_loss": found["loss"]})
        best = trainer.best
        best.take(trainer.peft_model, step, found["loss"])
        mark = ", the lowest so far" if best.step == step else f"; the lowest was {best.loss:.4f} at step {best.step}"
        self.say(f"step {step}: held-out loss {found['loss']:.4f}{mark}")
        if best.stopped:
            self.say(f"stopping early: {best.since} evaluations without a lower held-out loss")
            control.should_save = control.should_training_stop = True
        self.telemetry.last += time.perf_counter() - began  # no time of the step

    def conclude(self, step: int) -> dict[str, Any]:
        """The held-out result of the weights that the run ends with, which are the best ones where these are kept."""
        trainer, best = self.trainer, self.trainer.best
        after = self.last[1] if self.last[0] == step else trainer.held_out()
        if not best.stopped:  # by patience: then this step was evaluated, if by another process
            self.telemetry.write({"step": step, "eval_loss": after["loss"], "final": True})
            if best.step is not None:
                best.take(trainer.peft_model, step, after["loss"])
        if best.keeps and best.step not in (None, step):
            self.say(
                f"taking the adapter of step {best.step}: its held-out loss {best.loss:.4f} is the lowest of "
                f"{best.count} evaluations ({after['loss']:.4f} at step {step})"
            )
            best.restore(trainer.peft_model)
            after = trainer.held_out()
        return after
