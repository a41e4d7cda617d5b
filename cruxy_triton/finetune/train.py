"""Training with TRL's SFTTrainer and our optimizer: what the trainer lacks for a run that can be trusted.

Loss and guard are `CruxyCallback`'s, as in every other Trainer. Adapters stay float32; a checkpoint appears whole or
not at all; Ctrl-C saves first; the held-out loss is weighted by tokens and is that of the language model alone, without
a router's auxiliary loss.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from cruxy_triton import files
from cruxy_triton.controllers.attach import Attached, attach_blade, attach_sketch_align
from cruxy_triton.errors import UserError
from cruxy_triton.finetune import full
from cruxy_triton.finetune.best import Best
from cruxy_triton.finetune.data import Rows
from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.memory import ran_out
from cruxy_triton.finetune.processes import Processes
from cruxy_triton.finetune.recipe import Recipe
from cruxy_triton.guard import Policy, TrainingGuard, TrainingStopped
from cruxy_triton.guard.events import SKIP
from cruxy_triton.guard.released import ReleasedGuard
from cruxy_triton.integrations.transformers import CruxyCallback
from cruxy_triton.optimizer import CruxyOptimizer
from cruxy_triton.release import Released, release_gradients
from cruxy_triton.settings import TORCHS

# How far the answer at a token may change, as a part of the largest one, with the tokens after it: the rounding of
# experts that see other numbers of tokens, in 16 bits. A model that looks ahead changes by more.
CAUSAL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}

MAX_NORM = 1.0  # torch's optimizers under --clip global
TENSOR_RATIO = 1.05  # and under --clip tensor: AdaGC's multiple of a tensor's own history (arXiv 2502.11034)


def parameter_groups(recipe: Recipe, model: torch.nn.Module) -> list[Any]:
    """The parameters that learn; with LoRA+ (arXiv 2402.12354) in two groups, the B matrices at a larger rate."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    is_larger = ["lora_B" in name or "lora_embedding_B" in name for name, _ in named]
    # Names only where they say the layers: they stand in checkpoints.
    given: list[Any] = list(named) if recipe.layerwise != "none" else [p for _, p in named]
    if recipe.loraplus_lr_ratio == 1:
        return given
    larger, others = ([p for p, b in zip(given, is_larger, strict=True) if b is which] for which in (True, False))
    return [{"params": others}, {"params": larger, "lr": recipe.lr * recipe.loraplus_lr_ratio}]


def make_optimizer(recipe: Recipe, parameters: list[Any]) -> torch.optim.Optimizer:
    """The recipe's optimizer over `parameters`, or groups of them."""
    if recipe.optimizer in TORCHS:
        kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.SGD
        return kind(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return CruxyOptimizer(
        parameters,
        mode=recipe.mode,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        use_lion=recipe.optimizer == "cruxy-lion",
        state_bits=recipe.state_bits,
        clip=None if recipe.clip == "none" else recipe.clip,
        layerwise=None if recipe.layerwise == "none" else recipe.layerwise,
    )


def make_guard(
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module,
    folder: RunFolder,
    processes: Processes,
    released: Released | None = None,
) -> TrainingGuard | None:
    """The recipe's guard, on the optimizer from now on; None where it is off."""
    if recipe.guard == "off":
        return None
    learning = [p for p in model.parameters() if p.requires_grad]
    kept = full.keeps_snapshots(recipe, learning)
    tensors = recipe.clip == "tensor" and not isinstance(optimizer, CruxyOptimizer)
    policy = Policy(
        act=recipe.guard == "act",
        clip=recipe.clip != "none",
        tensor_ratio=TENSOR_RATIO if tensors else None,
        # All on disk: a resumed run finds them again, and the plan's memory stays the run's. Of several processes each
        # keeps its own in host memory.
        snapshot_max_bytes=0 if processes.count == 1 else Policy().snapshot_max_bytes,
    )
    snapshots = folder.snapshots if kept and processes.count == 1 else None
    settings: Any = {"events": folder.events, "snapshots": snapshots, "raise_on_stop": False}
    if released is not None:
        return ReleasedGuard(released, optimizer, model, policy, **settings)
    return TrainingGuard(optimizer, model, policy, **settings)


def lr_factor(schedule: str, step: int, warmup: int, total: int) -> float:
    """Part of the peak learning rate at `step` (from 0) of `total`, of which `warmup` rise to it; never 0 at first."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    return {
        "constant": 1.0,
        "linear": max(0.0, 1.0 - progress),
        "cosine": max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress))),
    }[schedule]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


class Trainer(SFTTrainer):
    """SFTTrainer for one recipe. `model` is a peft model with float32 adapters, or one of which every weight learns;
    `rows`, to train on and held out, are as `data.fit` makes them."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        rows: list[Rows],
        recipe: Recipe,
        folder: RunFolder,
        dtype: torch.dtype,
        *,
        packed: bool,
        processes: Processes = Processes(),  # noqa: B008 (frozen: one process)
    ) -> None:
        import datasets

        assert recipe.micro_batch_size is not None, "the plan decides the micro-batch size first"
        self.peft_model = model  # transformers types its own `model` as one that may be absent
        self.recipe = recipe
        self.folder = folder
        self.dtype = dtype
        self.processes = processes
        self.layers: Attached | None = None  # from `create_optimizer` on, as the next
        self.released: Released | None = None
        self.best = Best(recipe, folder.path)
        self._some_tokens = rows[0][0]["input_ids"][:4].tolist()
        self._start_step()
        on_cpu = next(model.parameters()).device.type == "cpu"
        args = SFTConfig(
            output_dir=str(folder.path.parent),  # made by transformers if absent; checkpoints go to _get_output_dir
            per_device_train_batch_size=recipe.micro_batch_size,
            per_device_eval_batch_size=recipe.micro_batch_size,
            gradient_accumulation_steps=recipe.gradient_accumulation_steps // processes.count,
            num_train_epochs=recipe.epochs,
            max_steps=recipe.max_steps or -1,
            max_length=recipe.max_seq_length if packed else None,  # else the rows have their length already
            packing=packed,
            # Packing that needs no attention mask by document, which needs flash attention (compute capability 8.0)
            packing_strategy="wrapped",
            gradient_checkpointing=bool(recipe.gradient_checkpointing),
            gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
            # Weights that learn in the backward pass are computed with as they are, under a loss scale of their own.
            bf16=dtype is torch.bfloat16 and not recipe.releases,
            fp16=dtype is torch.float16 and not recipe.releases,
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
            max_grad_norm=0.0,  # clipped in the step, by the optimizer or after the guard has seen the gradients
            # Only a router leaves an adapter without a gradient.
            ddp_find_unused_parameters=hasattr(model.config.get_text_config(), "output_router_logits"),
            save_strategy="steps",
            save_steps=recipe.save_steps,
            save_only_model=False,
            eval_strategy="no",  # evaluated here, by tokens
            logging_strategy="no",  # logged here, with the controller's values
            report_to=recipe.report_to,
            run_name=folder.path.name,
            disable_tqdm=True,
            seed=recipe.seed,
            data_seed=recipe.seed,
        )
        learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
        adapters = {n: p.detach().clone() for n, p in learning.items()} if recipe.method == "lora" else {}
        super().__init__(
            model=model,
            args=args,
            train_dataset=datasets.Dataset.from_list(rows[0]),
            eval_dataset=datasets.Dataset.from_list(rows[1]),
            processing_class=tokenizer,
        )
        # TRL turns the adapters of a quantized model into bfloat16, which pre-Ampere cards only emulate.
        for name, parameter in model.named_parameters():
            if name in adapters:
                parameter.data = adapters[name]
        # TRL's counts stay those of this process; they are added up once per step and evaluation.
        self.accelerator.gather_for_metrics = lambda input_data, use_gather_object=False: input_data
        self.sequences = len(self.train_dataset)
        if processes.count > 1:
            self.train_dataset = datasets.concatenate_datasets([self.train_dataset, _untrained(self.train_dataset)])
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                callback.logging_dir = str(folder.path / "tensorboard")
        self.cruxy = CruxyCallback(
            label=lambda step: Batch(self.step_ids, self.processing_class, processes),
            settle=True,  # the host waits for each step's loss, to write it down
        ).attach(self)

    @property
    def guard(self) -> TrainingGuard | None:
        """From `create_optimizer` on."""
        return self.cruxy.guard

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        parameters = [p for p in self.peft_model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.recipe, parameter_groups(self.recipe, self.peft_model))
        ours = isinstance(self.optimizer, CruxyOptimizer)

        def hand_on(optimizer: Any, *_: Any) -> None:
            entropy = _known(self.step_entropy / max(1, self.step_trained))
            if not ours and self.layers is not None:
                self.layers.observe(self.cruxy.loss, entropy)
            elif ours and entropy is not None:
                optimizer.set_entropy(entropy)

        def clip(*_: Any) -> None:
            torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)

        # In this order: the guard judges, and names, the gradients as they came.
        self.optimizer.register_step_pre_hook(hand_on)
        if self.recipe.layerwise != "none" and not ours:
            attach = attach_blade if self.recipe.layerwise == "blade" else attach_sketch_align
            self.layers = attach(self.optimizer, self.peft_model)
        if self.recipe.releases:
            self.released = release_gradients(self.peft_model, self.optimizer).attach(self)
        guard = make_guard(self.recipe, self.optimizer, self.peft_model, self.folder, self.processes, self.released)
        self.cruxy.watch(self.optimizer, self.peft_model, guard=guard)
        if self.recipe.clip == "global" and not ours:
            self.optimizer.register_step_pre_hook(clip)
        return self.optimizer

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> None:
        """Not measured a second time: transformers' way spreads what is not finite over all gradients."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        warmup = round(self.recipe.warmup_fraction * num_training_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer if optimizer is None else optimizer,
            lambda step: lr_factor(self.recipe.lr_schedule, step, warmup, num_training_steps),
        )
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.processes.count == 1:
            return super()._get_train_sampler(train_dataset)
        together = self.processes.count * self.args.per_device_train_batch_size
        return Padded(self.sequences, self.recipe.seed, together)

    def _start_step(self) -> None:
        self.step_tokens = self.step_trained = 0  # tokens read, and those with a label
        self.step_right = 0.0  # labels that the model put first
        self.step_entropy = 0.0  # of its output, summed over labels (nats)
        self.step_ids: list[torch.Tensor] = []  # of each micro-batch

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        trained = _label_count(inputs)
        real = (inputs["labels"] != -100).any(1, keepdim=True)  # not a row of `Padded`
        self.step_tokens += int((inputs["attention_mask"] * real).sum())
        self.step_ids.append(inputs["input_ids"])
        if isinstance(self.guard, ReleasedGuard):
            self.guard.begin()
        loss = super().training_step(model, inputs, *args, **kwargs)
        if isinstance(self.guard, ReleasedGuard):
            self.guard.end()
        self.step_trained += trained
        accuracy, entropy = self._take("train")
        self.step_right += accuracy * trained
        self.step_entropy += entropy * trained
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        # Without the tiles it is transformers' own loss over whole logits, which SFTTrainer inherits and overrides.
        trainer: Any = super() if self.recipe.chunked_loss else super(SFTTrainer, self)
        return trainer.compute_loss(*args, **kwargs)

    def _take(self, mode: str) -> tuple[float, float]:
        """TRL's figures of the last batch: the part of the labels that the model put first, its output's entropy."""
        seen = [self._metrics[mode][name] for name in ("mean_token_accuracy", "entropy")]
        accuracy, entropy = (values[-1] if values else math.nan for values in seen)  # transformers' own loss has none
        self._metrics[mode].clear()
        return accuracy, entropy

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The run's own report takes its place."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder.checkpoints / ".partial")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        assert output_dir is not None
        full.write_weights(self.peft_model, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.recipe.method == "lora":  # else the model was loaded from there in the first place
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        partial = Path(self._get_output_dir(trial))
        with files.writing(self.folder.checkpoints):
            try:
                super()._save_checkpoint(model, trial)  # each process writes the state of its random numbers
                self.processes.wait()
                written = partial / f"checkpoint-{self.state.global_step}"
                if self.processes.first:
                    self.cruxy.save(written)
                    self.best.save(written)
                    self.folder.keep_checkpoint(written)
            finally:
                if self.processes.first:
                    shutil.rmtree(partial, ignore_errors=True)
        self.processes.wait()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.cruxy.load(Path(checkpoint))
            self.best.load(Path(checkpoint))

    def restore_if_trained(self, checkpoint: Path) -> bool:
        """Takes step and result from `checkpoint` if it is that of the last step, after which no step may follow."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.best.load(checkpoint)
        if state.global_step < state.max_steps and not self.best.stopped:
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.create_optimizer()
        self.cruxy.load(checkpoint)
        self.state = state
        return True

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode, without gradients, with the language model's loss alone."""
        auxiliary = self.aux_loss_enabled
        self._use_auxiliary_loss(False)
        self.peft_model.eval()
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                yield
        finally:
            self._use_auxiliary_loss(auxiliary)
            self.peft_model.train()

    def _use_auxiliary_loss(self, on: bool) -> None:
        self.aux_loss_enabled = on
        config = self.peft_model.config.get_text_config()
        if hasattr(config, "output_router_logits"):
            config.output_router_logits = on

    def held_out(self) -> dict[str, Any]:
        """Over the held-out set, per token: mean negative log-likelihood (nats), its perplexity, the part of tokens
        that the model put first; and the tokens and sequences that were evaluated."""
        total = torch.zeros((), dtype=torch.float64)
        tokens = sequences = 0
        right = 0.0
        # The sum instead of the mean; of several processes each multiplies its loss by their number.
        one = torch.full((), float(self.processes.count), device=self.args.device)
        with self._evaluating():
            for batch in self._held_out_batches():
                batch = self._prepare_inputs(batch)
                count = _label_count(batch)
                tokens += count
                sequences += len(batch["labels"])
                total += self.compute_loss(self.peft_model, batch, num_items_in_batch=one).double().cpu()
                right += self._take("eval")[0] * count
        parts = self.processes.gather((float(total), tokens, sequences, right))
        total, tokens, sequences, right = (sum(values) for values in zip(*parts, strict=True))
        loss = total / tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {
            "loss": loss,
            "perplexity": perplexity,
            "accuracy": _known(right / tokens),
            "tokens": tokens,
            "sequences": sequences,
        }

    def _held_out_batches(self) -> Iterator[dict[str, Any]]:
        """This process's part of the held-out batches, which are the same ones however many processes there are."""
        rows: Any = self.eval_dataset
        size = self.args.per_device_eval_batch_size
        starts = range(0, len(rows), size)
        for start in starts[self.processes.rank :: self.processes.count]:
            yield self.data_collator([rows[i] for i in range(start, min(start + size, len(rows)))])

    def generate(self, ids: list[int], count: int) -> str:
        """The model's greedy continuation of `ids` by at most `count` tokens."""
        tokenizer: Any = self.processing_class
        prompt = torch.tensor([ids], device=self.args.device)
        with self._evaluating():
            output = self.peft_model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=count,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
        return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()

    def try_out(self) -> list[str]:
        """Runs a few tokens through the model, in training and evaluation mode; changes nothing.

        Returns notes. Raises UserError for a model that fails, or in which a token sees those after it.
        """
        notes = []
        what = f"{self.recipe.model} ({self.peft_model.config.model_type})"
        ids = torch.tensor([self._some_tokens * 4], device=self.args.device)[:, :4]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            try:
                self.peft_model.train()
                with torch.no_grad(), self.compute_loss_context_manager():
                    try:
                        self.compute_loss(self.peft_model, dict(batch))
                    except (AttributeError, KeyError, TypeError):
                        if not self.aux_loss_enabled:
                            raise
                        self._use_auxiliary_loss(False)
                        self.compute_loss(self.peft_model, dict(batch))
                        notes.append(f"note: {what} trains without its router's auxiliary loss, which TRL cannot form")
                changed = ids.clone()
                changed[0, -1] = ids[0, 0] if ids[0, -1] != ids[0, 0] else (ids[0, 0] + 1) % 2
                with self._evaluating():
                    one, other = (self.peft_model(input_ids=i, use_cache=False).logits[0, :-1] for i in (ids, changed))
            except Exception as error:
                if ran_out(error):
                    raise
                bits = " in 4 bits" if self.recipe.load_in_4bit else ""
                raise UserError(
                    f"{what} cannot be trained here{bits}: running four tokens through it fails with "
                    f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                ) from error
        self._metrics["train"].clear()
        difference, size = ((one - other).float().abs().max(), one.float().abs().max())
        if difference > CAUSAL_TOLERANCE[self.dtype] * size:
            raise UserError(
                f"{what} is no causal language model: what it says of a token changes with the tokens after it, so "
                "that it would learn to copy them; expected a decoder (llama, qwen2, gemma, phi, mistral, ...)"
            )
        return notes


def _label_count(batch: dict[str, Any]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def _untrained(dataset: Any) -> Any:
    """A data set of one row like those of `dataset`, in which no token has a label."""
    row = {name: values[:2] for name, values in dataset[0].items()}
    return type(dataset).from_list([{**row, "labels": [-100] * 2}], features=dataset.features)


class Padded(torch.utils.data.Sampler):
    """The order of one process (accelerate's, of `count` rows), then the row after the last, which trains nothing, so
    often that every process has as many whole micro-batches: else rows of the beginning would be trained on twice."""

    def __init__(self, count: int, seed: int, multiple: int) -> None:
        from accelerate.data_loader import SeedableRandomSampler

        rows: Sized = range(count)
        self.order = SeedableRandomSampler(rows, data_seed=seed)
        self.count, self.padding = count, -count % multiple

    def __iter__(self) -> Iterator[int]:
        yield from self.order
        yield from [self.count] * self.padding

    def __len__(self) -> int:
        return self.count + self.padding

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)


class Batch:
    """The token ids of one step's micro-batches, as text where an event names them: the host need not read others'."""

    def __init__(self, ids: list[torch.Tensor], tokenizer: Any, processes: Processes) -> None:
        self.ids, self.tokenizer, self.processes = ids, tokenizer, processes

    def __repr__(self) -> str:
        rows = [row for part in self.ids for row in part.tolist()]
        texts = [self.tokenizer.decode(row, skip_special_tokens=True)[:60] for row in rows[:4]]
        others = f" and {len(rows) - 4} more" if len(rows) > 4 else ""
        where = f" (of the first of {self.processes.count} processes)" if self.processes.count > 1 else ""
        return ", ".join(map(repr, texts)) + others + where


class Telemetry(TrainerCallback):
    """Writes a row of metrics.jsonl for each step and shows it. Raises TrainingStopped where the guard ends the run."""

    def __init__(self, trainer: Trainer, show: Callable[[dict[str, Any], int], None]) -> None:
        self.trainer = trainer
        self.show = show
        self.last = time.perf_counter()

    def write(self, row: dict[str, Any]) -> None:
        # json has no NaN or infinity; null says that there was no finite value
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        path = self.trainer.folder.metrics
        if self.trainer.processes.first:
            with files.writing(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.trainer.args.report_to:
            shown: dict[str, Any] = {k: v for k, v in row.items() if isinstance(v, (int, float, str)) and k != "step"}
            self.trainer.log(shown)
            self.trainer.state.log_history.clear()  # metrics.jsonl has them, and the checkpoints need not

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, cruxy = self.trainer, self.trainer.cruxy
        assert cruxy.loss is not None
        now = time.perf_counter()
        here = (float(cruxy.loss), trainer.step_tokens, trainer.step_trained, trainer.step_right)
        parts = trainer.processes.gather(here)
        total, tokens, trained, right = (sum(values) for values in zip(*parts, strict=True))
        # Under DDP each process's loss is divided by the tokens of all and multiplied by their number.
        row: dict[str, Any] = {"step": state.global_step, "loss": total / len(parts), "lr": float(cruxy.lr)}
        row |= cruxy.numbers(state.global_step)
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
        if isinstance(optimizer, CruxyOptimizer):
            multipliers = optimizer.layer_multipliers()
        else:
            multipliers = {} if trainer.layers is None else trainer.layers.multipliers()
        if multipliers:
            row["multipliers"] = {name.removeprefix("base_model.model."): m for name, m in multipliers.items()}
        if trainer.released is not None:  # the optimizer's own numbers are of the step before
            found = trainer.released.metrics()
            scaled = ["loss_scale"] if trainer.dtype is torch.float16 else []
            row |= {name: found[name] for name in ("grad_norm", "max_grad", "nonfinite", *scaled)}
            row["skipped"] = int(found["nonfinite"] > 0 or not math.isfinite(row["loss"]))
        row["skipped"] = int(self._was_skipped(row))
        row["accuracy"] = _known(right / max(1, trained))
        row |= {"epoch": state.epoch, "tokens": tokens, "seconds": now - self.last}
        trainer._start_step()
        if torch.cuda.is_available() and args.device.type == "cuda":
            row["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            row["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        self.last = now
        self.write(row)
        self.show(row, state.max_steps)
        if trainer.guard is not None and trainer.guard.stopped is not None:
            raise TrainingStopped(trainer.guard.stopped)

    def _was_skipped(self, row: dict[str, Any]) -> bool:
        """Whether the step changed nothing: the loss scaler, the optimizer or the guard refused its gradients."""
        guard = self.trainer.guard
        by_guard = guard is not None and guard.policy.act and SKIP in row.get("actions", ())
        return bool(self.trainer.accelerator.optimizer_step_was_skipped or row.get("skipped") or by_guard)


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
        scaler = self.trainer.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        gradients = {
            name: (p.grad.detach().float() / scale).cpu().contiguous()
            for name, p in self.trainer.peft_model.named_parameters()
            if p.grad is not None
        }
        with files.writing(self.path):
            self.path.mkdir(exist_ok=True)
            save_file(gradients, self.path / f"step-{step:05d}.safetensors")


class Interruption(TrainerCallback):
    """Ctrl-C and SIGTERM: while training, the step in progress is finished and saved, and a second one ends the
    process at once; elsewhere KeyboardInterrupt. `number` is that of the signal, to whichever process it came."""

    def __init__(self, say: Callable[[str], None], processes: Processes) -> None:
        self.say = say
        self.processes = processes
        self.number: int | None = None
        self.training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A launcher tells all of its processes to stop, but not in the same step.
        self.number = next((number for number in self.processes.gather(self.number) if number is not None), None)
        if self.number is not None:
            control.should_save = True
            control.should_training_stop = True

    def _request(self, number: int, frame: Any) -> None:
        again, self.number = self.number is not None, number
        if not self.training:
            raise KeyboardInterrupt
        if again:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        with contextlib.suppress(RuntimeError):  # the signal came while the same stream was being written to
            self.say("stopping: finishing this step and saving a checkpoint (once more: stop at once)")

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
