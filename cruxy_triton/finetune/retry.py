"""Running out of memory: what is said of it, and the next configuration, which makes the same steps in less memory.

The same steps: as many sequences per optimizer step, as long as before, under the same adapters. Only how a step is
computed changes, so that its loss is the same up to rounding (and the draws of dropout): smaller micro-batches, more
of them; activations computed twice; the loss in tiles; the leanest attention kernel. Nothing else is tried by itself.
"""

import copy
import gc
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cruxy_triton.finetune import memory
from cruxy_triton.finetune.recipe import Recipe
from cruxy_triton.planner import Card, Plan

MIB = 1 << 20


@dataclass
class Attempt:
    """What was tried; holds nothing of the model. `shape` is its config, `begun` says whether the run has a folder."""

    recipe: Recipe
    shape: Any
    plan: Plan
    device: torch.device
    dtype: torch.dtype
    begun: bool


class OutOfMemory(RuntimeError):
    """An attempt that did not fit; its text is the plan beside what was measured."""

    def __init__(self, when: str, attempt: Attempt, error: BaseException) -> None:
        self.attempt = attempt
        super().__init__(
            f"out of memory {when} (the plan said {memory.summary(attempt.plan)}; {_measured(attempt.device)}"
            f"{_asked(error)})"
        )


def _measured(device: torch.device) -> str:
    found = memory.measured(device)
    if "peak_rss_bytes" in found:
        return f"the process, interpreter and libraries included, took {found['peak_rss_bytes'] / MIB:,.0f} MiB"
    free, total = torch.cuda.mem_get_info(device)
    return (
        f"PyTorch had handed out {found['peak_allocated_bytes'] / MIB:,.0f} MiB at most and reserved "
        f"{found['peak_reserved_bytes'] / MIB:,.0f}; {free / MIB:,.0f} of the card's {total / MIB:,.0f} MiB were free"
    )


def _asked(error: BaseException) -> str:
    found = re.search(r"[Tt]ried to allocate ([\d.]+ [KMG]iB|\d+ bytes)", str(error))
    return "" if found is None else f", when {found[1]} more were asked for"


def release(error: BaseException | None) -> None:
    """Lets go of the model and all else that the frames of `error`, which has left them, hold.

    Its traceback goes with them: a frame that is cleared still holds its function, and with it what that encloses.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def leaner(recipe: Recipe, card: Card) -> Iterator[tuple[Recipe, str]]:
    """`recipe` in less and less memory, and what was changed in all, in words."""
    changed: dict[str, Any] = {}
    said: dict[str, str] = {}

    def changes(name: str, value: Any, words: str) -> tuple[Recipe, str]:
        changed[name], said[name] = value, words
        found = copy.deepcopy(recipe)
        for known, setting in changed.items():
            setattr(found, known, setting)
        return found, " and ".join(said.values())

    assert recipe.micro_batch_size is not None, "the plan decides the micro-batch size first"
    # With released gradients each micro-batch is a step, and a smaller one would be another.
    micro = 1 if recipe.releases else recipe.micro_batch_size
    while micro > 1:
        micro = max(n for n in range(1, micro // 2 + 1) if recipe.batch_size % n == 0)
        yield changes(
            "micro_batch_size", micro,
            f"{recipe.batch_size // micro} micro-batches of {micro} instead of "
            f"{recipe.gradient_accumulation_steps} of {recipe.micro_batch_size}",
        )  # fmt: skip
    if not recipe.gradient_checkpointing:
        yield changes("gradient_checkpointing", True, "gradient checkpointing")
    if not recipe.chunked_loss:
        yield changes("chunked_loss", True, "the loss in tiles")
    if recipe.attention != (best := card.attention_kinds[0]):
        yield changes("attention", best, f"{best} attention")


def following(attempt: Attempt) -> tuple[Recipe, str] | None:
    """The next configuration that fits, and a sentence on it; None where none is left.

    It fits where its plan is below both what is free now and the plan of the attempt, which was too little.
    """
    card = memory.card_of(attempt.recipe, attempt.device)
    room = min(card.usable_bytes(), attempt.plan.peak_bytes - 1)
    for recipe, change in leaner(attempt.recipe, card):
        found = memory.planned(recipe, attempt.shape, card, attempt.dtype)
        if found.peak_bytes <= room:
            return recipe, (
                f"trying again with {change}: {recipe.batch_size} sequences of at most {recipe.max_seq_length} tokens "
                f"per step as before, in {found.peak_bytes / MIB:,.0f} MiB by the plan"
            )
    return None


def advice(attempt: Attempt) -> str:
    """What is left to whoever ran out of memory."""
    again = " with --resume" if attempt.begun else ""
    if attempt.recipe.method == "full":
        smaller = "--max-seq-length, --batch-size or --state-bits"
    else:
        smaller = "--max-seq-length or --lora-r" + ("" if attempt.recipe.load_in_4bit else ", or give --load-in-4bit,")
    found = f"close other programs and start again{again}, or lower {smaller} in a new run"
    return found if attempt.recipe.retry else f"{found}; without --no-retry it goes on in less memory where it can"
