"""Training with TRL's SFTTrainer and our optimizer: what the trainer lacks for a run that can be trusted.

The loss reaches the optimizer as a device tensor through a step hook; adapters stay float32; a checkpoint
appears whole or not at all; Ctrl-C saves first; the held-out loss is weighted by tokens.
"""

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, get_scheduler
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from cruxy_triton.finetune.data import Data
from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.recipe import Recipe
from cruxy_triton.optimizer import CruxyOptimizer


def make_optimizer(recipe: Recipe, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's optimizer over `parameters` (float32 adapters)."""
    if recipe.optimizer in ("adamw", "sgd"):
        kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.SGD
        return kind(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return CruxyOptimizer(
        parameters,
        mode=recipe.mode,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        use_lion=recipe.optimizer == "cruxy-lion",
        state_bits=recipe.state_bits,
    )


class Trainer(SFTTrainer):
    """SFTTrainer for one recipe. `model` is a peft model with float32 adapters."""

    def __init__(
        self, model: Any, tokenizer: Any, data: Data, recipe: Recipe, folder: RunFolder, dtype: torch.dtype
    ) -> None:
        import datasets

        assert recipe.micro_batch_size is not None, "the plan decides the micro-batch size first"
        self.peft_model = model  # transformers types its own `model` as one that may be absent
        self.recipe = recipe
        self.folder = folder
        self.step_loss: torch.Tensor | None = None
        on_cpu = next(model.parameters()).device.type == "cpu"
        args = SFTConfig(
            output_dir=str(folder.path),
            per_device_train_batch_size=recipe.micro_batch_size,
            per_device_eval_batch_size=recipe.micro_batch_size,
            gradient_accumulation_steps=recipe.gradient_accumulation_steps,
            num_train_epochs=recipe.epochs,
            max_steps=recipe.max_steps or -1,
            max_length=recipe.max_seq_length,
            packing=data.packed,
            # Packing that needs no attention mask by document, which needs flash attention (compute capability 8.0)
            packing_strategy="wrapped",
            gradient_checkpointing=bool(recipe.gradient_checkpointing),
            gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
            bf16=dtype is torch.bfloat16,
            fp16=dtype is torch.float16,
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
            max_grad_norm=0.0 if recipe.optimizer.startswith("cruxy") else 1.0,  # ours clips inside its update
            save_strategy="steps",
            save_steps=recipe.save_steps,
            save_only_model=False,
            eval_strategy="no",  # evaluated here, by tokens
            logging_strategy="no",  # logged here, with the controller's values
            report_to="none",
            disable_tqdm=True,
            seed=recipe.seed,
            data_seed=recipe.seed,
        )
        adapters = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        super().__init__(
            model=model,
            args=args,
            train_dataset=datasets.Dataset.from_list(data.train),
            eval_dataset=datasets.Dataset.from_list(data.held_out),
            processing_class=tokenizer,
        )
        # TRL turns the adapters of a quantized model into bfloat16, which pre-Ampere cards only emulate.
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = adapters[name]
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        parameters = [p for p in self.peft_model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.recipe, parameters)
        if isinstance(self.optimizer, CruxyOptimizer):
            self.optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.set_loss(self.step_loss))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = get_scheduler(
            self.recipe.lr_schedule,
            optimizer=self.optimizer if optimizer is None else optimizer,
            num_warmup_steps=round(self.recipe.warmup_fraction * num_training_steps),
            num_training_steps=num_training_steps,
        )
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # Each micro-batch's loss is already divided by the tokens (or steps) of the whole optimizer step.
        self.step_loss = loss.detach() if self.step_loss is None else self.step_loss + loss.detach()
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        # Without the tiles it is transformers' own loss over whole logits, which SFTTrainer inherits and overrides.
        trainer: Any = super() if self.recipe.chunked_loss else super(SFTTrainer, self)
        return trainer.compute_loss(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The run's own report takes its place."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder.checkpoints / ".partial")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        partial = Path(self._get_output_dir(trial))
        super()._save_checkpoint(model, trial)
        self.folder.keep_checkpoint(partial / f"checkpoint-{self.state.global_step}")
        shutil.rmtree(partial, ignore_errors=True)

    def held_out(self) -> dict[str, float]:
        """Mean negative log-likelihood a token (nats) over the held-out set, its perplexity, and the tokens."""
        self.peft_model.eval()
        total = torch.zeros((), dtype=torch.float64)
        tokens = 0
        one = torch.ones((), device=self.args.device)  # sum instead of mean
        for batch in self.get_eval_dataloader():
            batch = self._prepare_inputs(batch)
            tokens += int((batch["labels"][:, 1:] != -100).sum())
            with torch.no_grad(), self.compute_loss_context_manager():
                total += self.compute_loss(self.peft_model, batch, num_items_in_batch=one).double().cpu()
        self._metrics["eval"].clear()
        self.peft_model.train()
        loss = float(total) / tokens
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": tokens}


class Telemetry(TrainerCallback):
    """Writes a row of metrics.jsonl for each step and shows it."""

    def __init__(self, trainer: Trainer, show: Callable[[dict[str, Any], int], None]) -> None:
        self.trainer = trainer
        self.show = show
        self.last = time.perf_counter()
        self.lr = 0.0

    def write(self, row: dict[str, Any]) -> None:
        # json has no NaN or infinity; null says that there was no finite value
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with self.trainer.folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer.optimizer is not None
        self.lr = float(self.trainer.optimizer.param_groups[0]["lr"])  # the scheduler moves on before on_step_end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        assert trainer.step_loss is not None
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
        now = time.perf_counter()
        row: dict[str, Any] = {"step": state.global_step, "loss": float(trainer.step_loss), "lr": self.lr}
        trainer.step_loss = None
        if isinstance(optimizer, CruxyOptimizer):
            metrics = optimizer.metrics()
            row["lr_used"] = metrics["lr"]
            row |= {name: value for name, value in metrics.items() if name not in ("step", "loss", "lr", "lrs")}
        row["seconds"] = now - self.last
        if torch.cuda.is_available() and args.device.type == "cuda":
            row["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            row["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        self.last = now
        self.write(row)
        self.show(row, state.max_steps)


class GradientRecorder(TrainerCallback):
    """Saves the unscaled gradients of the first `count` steps, float32, as gradients/step-<n>.safetensors."""

    def __init__(self, trainer: Trainer, count: int) -> None:
        self.trainer = trainer
        self.count = count
        self.path = trainer.folder.path / "gradients"

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from safetensors.torch import save_file

        step = state.global_step + 1
        if step > self.count:
            return
        self.path.mkdir(exist_ok=True)
        scaler = self.trainer.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        gradients = {
            name: (p.grad.detach().float() / scale).cpu().contiguous()
            for name, p in self.trainer.peft_model.named_parameters()
            if p.grad is not None
        }
        save_file(gradients, self.path / f"step-{step:05d}.safetensors")


class Interruption(TrainerCallback):
    """Ctrl-C and SIGTERM end the run after the step in progress, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.requested = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    def _request(self, number: int, frame: Any) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = True

    @contextmanager
    def installed(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread only
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(n, self._request) for n in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
