"""CruxyOptimizer in Hugging Face's Trainer (TRL's are the same): one argument and one line.

    python examples/hf_trainer.py

Fine-tunes a tiny Llama, made on the spot, on a toy sequence. The optimizer clips inside its update, so the
Trainer's own clipping is off; the Trainer's scheduler sets the learning rate and the controller scales it.
"""

import sys
import tempfile

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from cruxy_triton.integrations.transformers import CruxyCallback, optimizer_cls_and_kwargs


def main() -> None:
    set_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=32)  # fmt: skip
    rows = []
    for i in range(256):
        ids = [(5 * i + 3 * j) % 64 for j in range(24)]
        rows.append({"input_ids": ids, "labels": ids})
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=40,
            learning_rate=1e-2, warmup_steps=5, lr_scheduler_type="cosine", max_grad_norm=0.0, logging_steps=4,
            report_to=[], save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        optimizer = optimizer_cls_and_kwargs(args, rule="lion", state_bits=8)
        model = LlamaForCausalLM(config)
        trainer = Trainer(model=model, args=args, train_dataset=rows, optimizer_cls_and_kwargs=optimizer)
        CruxyCallback().attach(trainer)
        trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    for row in rows:
        sys.stdout.write(
            f"step {row['step']:3d}  loss {row['loss']:.3f}  lr used {row['lr_used']:.2e}  phase {row['phase']:.2f}  "
            f"curvature {row['curvature']:+.3f}\n"
        )
    raise SystemExit(0 if rows[-1]["loss"] < 0.5 * rows[0]["loss"] else 1)


if __name__ == "__main__":
    main()
