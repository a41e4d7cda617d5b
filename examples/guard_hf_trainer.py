"""The guard in Hugging Face's Trainer: one line.

    python examples/guard_hf_trainer.py [--tiny]

Trains a small Llama, made on the spot, with a plain AdamW; some records are damaged so that their loss is NaN. The
steps they belong to are skipped and reported with their number; the checkpoint at the end is sealed with checksums.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from cruxy_triton import files
from cruxy_triton.guard import read_events
from cruxy_triton.integrations.transformers import CruxyCallback

DAMAGED = 999  # only damaged records hold this token


class Damaging(LlamaForCausalLM):
    """Stands for whatever makes a loss NaN: here, the token of a damaged record."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> Any:
        output = super().forward(input_ids.clamp(max=63), labels=labels, **kwargs)
        if bool((input_ids == DAMAGED).any()):
            output.loss = output.loss * math.nan
        return output


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="40 steps instead of 200")
    steps = 40 if parser.parse_args().tiny else 200
    set_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=32)  # fmt: skip
    rows = []
    for i in range(256):
        ids = [(5 * i + 3 * j) % 64 for j in range(24)]
        rows.append({"input_ids": [DAMAGED, *ids[1:]] if i % 100 == 50 else ids, "labels": ids})
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=8, max_steps=steps, learning_rate=2e-3,
            lr_scheduler_type="cosine", warmup_steps=5, max_grad_norm=0.0, logging_steps=20, report_to=[],
            save_steps=steps, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=Damaging(config), args=arguments, train_dataset=rows)
        callback = CruxyCallback(guard=True).attach(trainer)
        trainer.train()
        assert callback.guard is not None
        print(callback.guard.summary())
        skipped = [e for e in read_events(Path(folder) / "guard_events.jsonl") if e.kind == "skip"]
        for event in skipped:
            print(event.line())
        damage = files.damage(Path(folder) / f"checkpoint-{steps}")
    whole = all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
    print(f"{len(skipped)} damaged batches skipped; weights finite: {whole}; checkpoint: {damage or 'whole'}")
    sys.exit(0 if skipped and whole and damage is None else 1)


if __name__ == "__main__":
    main()
