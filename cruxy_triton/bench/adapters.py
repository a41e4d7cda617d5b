"""LoRA on SmolLM2-135M over GSM8K, as grids of runs train it: short pieces of one long text, few steps.

Questions and answers of the training file follow each other as one stream of tokens, of which a step takes random
pieces; those of the test file are held out.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cruxy_triton.bench.characters import Size
from cruxy_triton.errors import UserError
from cruxy_triton.finetune.smollm2 import Unavailable, smollm2

NAME = "gsm8k"
FILES = ("gsm8k/train.jsonl", "gsm8k/test.jsonl")
RECORDS = 2000  # of each file: more than the steps take
RANK = 8
# Layers and width are the model's; a step of these is about three seconds on two cores.
FULL = Size(layers=30, width=576, context=64, batch=8, steps=40, evaluations=6)
QUICK = Size(layers=30, width=576, context=16, batch=2, steps=2, evaluations=1)
# AdamW's: the best of a coarse grid, ten and thirty times that.
RATES = (1e-3, 1e-2, 3e-2)


class Adapted(nn.Module):
    """The model in float32 with adapters on every linear layer; nothing else is trained."""

    def __init__(self, source: str):
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # a line per run is what there is to see
        base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        base.config.use_cache = False
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model: Any = get_peft_model(base, config)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(input_ids=inputs).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def held_out_loss(self, text: "Questions") -> float:
        pieces = range(text.size.evaluations)
        return statistics.fmean(float(self.loss(*text.batch(i, held_out=True))) for i in pieces)


class Questions:
    """The tokens of GSM8K, and the model that reads them.

    Raises:
        UserError: no folder, a file that cannot be read or is no GSM8K, or the model cannot be had.
    """

    def __init__(self, folder: Path | None, size: Size):
        if folder is None:
            raise UserError(f"--model smollm2 needs --data, a folder with {' and '.join(FILES)}")
        self.size = size
        texts = [_read(folder / name) for name in FILES]
        try:
            self.source = smollm2()
        except Unavailable as error:
            raise UserError(f"SmolLM2-135M cannot be had: {error}") from None
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.source)
        self.train, self.held_out = (
            torch.tensor([token for text in part for token in (*tokenizer(text).input_ids, tokenizer.eos_token_id)])
            for part in texts
        )

    def model(self) -> Adapted:
        return Adapted(self.source)

    def batch(self, number: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (batch, context) each, drawn by `number`."""
        tokens, size = self.held_out if held_out else self.train, self.size
        generator = torch.Generator().manual_seed(number)
        starts = torch.randint(len(tokens) - size.context, (size.batch,), generator=generator)
        rows = torch.stack([tokens[start : start + size.context + 1] for start in starts.tolist()])
        return rows[:, :-1], rows[:, 1:]


def _read(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8") as file:
            records = [json.loads(line) for _, line in zip(range(RECORDS), file, strict=False)]
        return [f"{record['question']}\n{record['answer']}" for record in records]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not GSM8K: expected JSON lines with a question and an answer") from None
