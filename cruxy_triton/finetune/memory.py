"""The run's memory: asks the planner, fills the recipe's open settings from its answer, keeps to the budget."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from cruxy_triton import files, settings
from cruxy_triton.errors import UserError
from cruxy_triton.finetune.recipe import Recipe
from cruxy_triton.planner import Card, Plan, load_model, plan
from cruxy_triton.planner.picture import standalone
from cruxy_triton.planner.search import step_of
from cruxy_triton.planner.timeline import timeline

MIB = 1 << 20
# Allocations that fail outside of PyTorch's CUDA allocator raise a RuntimeError with one of these.
MESSAGES = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "out of memory at line")
PLANNED = [name for name, setting in settings.SETTINGS.items() if "planned" in setting.left_open]


def card_of(recipe: Recipe, device: torch.device, processes: int = 1) -> Card:
    """The device as the planner sees it, cut down to the recipe's budget if it has one; `processes` share a CPU."""
    if device.type == "cpu":
        return Card.cpu(recipe.vram_bytes or psutil.virtual_memory().available // processes)
    return Card.detect().within(recipe.vram_bytes)


def make_plan(
    recipe: Recipe,
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    longest_allowed: int,
    longest_record: int,
    card: Card | None = None,
    processes: int = 1,
) -> Plan:
    """The plan for `recipe`, whose open settings (sequence length, micro-batch, checkpointing, attention; of a full
    fine-tuning also the loss and the bits of the optimizer's state) it decides.

    In this order of preference: the whole length, then no checkpointing, then the largest micro-batch; the
    optimizer step always sees `batch_size` sequences, so the last two change speed and not the result. The plan is that
    of one device: of several `processes` each has its part of the batch, and DDP's copy of the trained gradients.
    Raises UserError when nothing fits, or for a model that the planner cannot follow.
    """
    longest = min(longest_allowed, longest_record)
    card = card or card_of(recipe, device)
    answer = planned(recipe, config, card, dtype, longest, processes)
    if processes > 1:
        buckets = answer.components.get("adapters", 0)  # a float32 gradient is as large as what it is of
        reserved = replace(card, context_bytes=card.context_bytes + buckets)
        answer = planned(recipe, config, reserved, dtype, longest, processes)
    if not answer.fits:
        raise UserError(_too_small(answer, recipe))
    for name in PLANNED:
        setattr(recipe, name, getattr(answer.config, name))
    recipe.batch_size *= processes
    return answer


def planned(
    recipe: Recipe, config: Any, card: Card, dtype: torch.dtype, longest: int | None = None, processes: int = 1
) -> Plan:
    """The planner's answer for `recipe` as it is, on `card`, whether it fits or not; for one of `processes`."""
    given = {name: getattr(recipe, name) for name in settings.CONFIGURES if name not in ("device", "vram_bytes")}
    given["dtype"] = str(dtype).removeprefix("torch.")
    if processes > 1:
        given["batch_size"] //= processes
    return plan(config.to_dict(), card, longest=longest, margin=False, alternatives=False, **given)


def _too_small(nearest: Plan, recipe: Recipe) -> str:
    remedy = "--load-in-4bit, a smaller --lora-r or a smaller model"
    if recipe.load_in_4bit:
        remedy = "a smaller --lora-r or a smaller model"
    elif recipe.method == "full":
        possible = {
            "--optimizer cruxy-lion": nearest.config.optimizer != "cruxy-lion",
            "--release": not recipe.release,
            "--batch-size 1": recipe.release and nearest.config.batch_size > 1,
            "--method lora": True,
        }
        remedy = ", ".join(flag for flag, helps in possible.items() if helps) + " or a smaller model"
    if nearest.needed is not None and nearest.needed.change.startswith("a card"):
        remedy += f", or {nearest.needed.change}"
    return (
        f"no configuration of {recipe.model} fits {nearest.usable_bytes / MIB:,.0f} MiB: the smallest "
        f"({nearest.config.max_seq_length} tokens, one sequence at a time) needs {nearest.peak_bytes / MIB:,.0f} MiB; "
        f"try {remedy}"
    )


def describe(plan: Plan, recipe: Recipe) -> list[str]:
    """The plan as lines for a terminal."""
    settings = (
        f"{recipe.max_seq_length} tokens, {recipe.batch_size} sequences per step in micro-batches of "
        f"{recipe.micro_batch_size}, gradient checkpointing {'on' if recipe.gradient_checkpointing else 'off'}"
    )
    largest = sorted(plan.components.items(), key=lambda item: -item[1])[:5]
    return [
        f"plan: {settings}",
        f"  peak {plan.peak_bytes / MIB:,.0f} MiB (give or take {plan.error_bytes / MIB:,.0f}) of "
        f"{plan.usable_bytes / MIB:,.0f} MiB usable on {plan.card}, in the {plan.peak_phase} phase",
        "  " + ", ".join(f"{name} {size / MIB:,.0f}" for name, size in largest if size) + " MiB",
    ]


def larger(plan: Plan, recipe: Recipe, beyond: int) -> str:
    """A note on weights that take `beyond` bytes more than planned; raises UserError where these do not fit."""
    needed = plan.peak_bytes + beyond
    found = (
        f"{recipe.model} keeps some of its linear layers out of its 4 bits, {beyond / MIB:,.1f} MiB more than planned: "
        f"the peak is {needed / MIB:,.1f} MiB of {plan.usable_bytes / MIB:,.1f} MiB usable"
    )
    if needed > plan.usable_bytes:
        raise UserError(f"{found}; give its unquantized original with --load-in-4bit, or a lower --max-seq-length")
    return f"note: {found}"


def summary(plan: Plan | None) -> str:
    return "nothing" if plan is None else f"{plan.peak_bytes / MIB:,.0f} of {plan.usable_bytes / MIB:,.0f} MiB"


def limit(recipe: Recipe, device: torch.device) -> None:
    """Holds a CUDA run to its budget, so that exceeding it fails here as it would on the smaller card."""
    if device.type != "cuda":
        return
    torch.cuda.reset_peak_memory_stats(device)
    if recipe.vram_bytes is not None:
        total = torch.cuda.mem_get_info(device)[1]
        # PyTorch's allocator is limited without the CUDA context, which the budget includes.
        allowed = recipe.vram_bytes - Card.budget(recipe.vram_bytes).context_bytes
        torch.cuda.set_per_process_memory_fraction(max(0.0, allowed / total), device)


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that memory did not suffice, on a card or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


def measured(device: torch.device) -> dict[str, int]:
    """Peaks of this process in bytes: on the GPU where there is one, else resident memory."""
    if device.type == "cuda":
        return {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    if sys.platform == "win32":
        return {"peak_rss_bytes": psutil.Process().memory_info().peak_wset}
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def draw(path: Path, plan: Plan, config: Any, card: Card, result: dict[str, int]) -> None:
    """Writes the plan over one step as an SVG, with the measured peak of `result` across.

    Model types that the planner has to trace are left out: the trace of a whole model takes minutes.
    """
    shape = load_model(config.to_dict())
    if shape.learned is not None:
        return
    measured = {}
    if "peak_reserved_bytes" in result:
        measured["measured, with context"] = result["peak_reserved_bytes"] + plan.components.get("context", 0)
    if "peak_rss_bytes" in result:
        measured["measured, interpreter and libraries included"] = result["peak_rss_bytes"]
    files.write_text(path, standalone(plan, timeline(step_of(shape, card, plan.config)), measured))
