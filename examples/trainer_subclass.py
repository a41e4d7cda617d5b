"""CruxyOptimizer in Hugging Face's Trainer: a subclass that makes it and gives it the loss.

    python examples/trainer_subclass.py

Fine-tunes a tiny Llama, made on the spot, on a toy sequence. The optimizer clips inside its update, so the
Trainer's own clipping is off; the Trainer's scheduler sets the learning rate and the controller scales it.
"""

import sys
import tempfile
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from cruxy_triton import MetaLion


class CruxyTrainer(Trainer):
    loss_sum: Any = 0.0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.cruxy = MetaLion(parameters, lr=self.args.learning_rate)
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Called for each micro-batch; its loss is divided by the number of them already."""
        loss = super().training_step(*args, **kwargs)
        self.loss_sum = self.loss_sum + loss
        if self.accelerator.sync_gradients:  # the last before a step: a tensor, so nothing waits for the device
            self.cruxy.set_loss(self.loss_sum)
            self.loss_sum = 0.0
        return loss


def main() -> None:
    set_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=32)  # fmt: skip
    rows = []
    for i in range(256):
        ids = [(5 * i + 3 * j) % 64 for j in range(24)]
        rows.append({"input_ids": ids, "labels": ids})
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=40,
            learning_rate=1e-2, warmup_steps=5, lr_scheduler_type="cosine", max_grad_norm=0.0, logging_steps=20,
            report_to=[], save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = CruxyTrainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=rows)
        trainer.train()
    history = trainer.cruxy.history()
    for row in (*history[::10], history[-1]):
        sys.stdout.write(
            f"step {row['step']:3d}  loss {row['loss']:.3f}  lr used {row['lr']:.2e}  phase {row['phase']:.2f}  "
            f"curvature {row['curvature']:+.3f}\n"
        )
    raise SystemExit(0 if history[-1]["loss"] < 0.5 * history[0]["loss"] else 1)


if __name__ == "__main__":
    main()
