"""The run's memory: asks the planner, fills the recipe's open settings from its answer, keeps to the budget."""

import sys
from typing import Any

import psutil
import torch

from cruxy_triton.errors import UserError
from cruxy_triton.finetune.recipe import Recipe
from cruxy_triton.planner import Card, Plan, plan
from cruxy_triton.planner.families import FAMILIES
from cruxy_triton.planner.optimizers import FINETUNE_OPTIMIZERS

MIB = 1 << 20
DEFAULT_LENGTH = 1024  # tokens, where neither the recipe nor shorter data says otherwise
SHORTER = (768, 512, 384, 256, 128, 64)


def codec_of(recipe: Recipe) -> str:
    """The planner's name for the optimizer state that `recipe` keeps."""
    wanted = (recipe.optimizer, recipe.state_bits)
    return next(codec for codec, names in FINETUNE_OPTIMIZERS.items() if names == wanted)


def settings_of(plan: Plan) -> dict[str, Any]:
    """The recipe's settings that a saved plan decides; raises UserError for a plan that `finetune` cannot run."""
    config = plan.config
    if config.method != "lora":
        raise UserError(f"the plan is for {config.method} fine-tuning; `cruxy-triton finetune` trains LoRA adapters")
    if not config.chunked_loss:
        raise UserError("the plan keeps whole logits (chunked_loss = false); finetune's loss is always chunked")
    if config.optimizer not in FINETUNE_OPTIMIZERS:
        raise UserError(f"the plan's optimizer {config.optimizer!r} is none of {', '.join(FINETUNE_OPTIMIZERS)}")
    optimizer, bits = FINETUNE_OPTIMIZERS[config.optimizer]
    quantized = config.precision == "nf4"
    return {
        "max_seq_length": config.max_seq_length,
        "batch_size": config.batch_size * config.gradient_accumulation,
        "micro_batch_size": config.batch_size,
        "gradient_checkpointing": config.gradient_checkpointing,
        "lora_r": config.lora_r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": list(config.target_modules),
        "load_in_4bit": quantized,
        "double_quant": config.double_quant if quantized else True,
        "dtype": "auto" if quantized else config.precision,
        "optimizer": optimizer,
        "state_bits": bits,
    }


def card_of(recipe: Recipe, device: torch.device) -> Card:
    """The device as the planner sees it, cut down to the recipe's budget if it has one."""
    if device.type == "cpu":
        return Card.cpu(recipe.vram_bytes or psutil.virtual_memory().available)
    card = Card.detect()
    if recipe.vram_bytes is None:
        return card
    if recipe.vram_bytes > card.vram_bytes:
        raise UserError(
            f"--vram of {recipe.vram_bytes / MIB:,.0f} MiB is more than {card.name} has "
            f"({card.vram_bytes / MIB:,.0f} MiB)"
        )
    return Card.budget(recipe.vram_bytes, card.capability)


def make_plan(
    recipe: Recipe, config: Any, device: torch.device, dtype: torch.dtype, longest_allowed: int, longest_record: int
) -> Plan | None:
    """The plan for `recipe`, whose open settings (sequence length, micro-batch, checkpointing) it decides.

    In this order of preference: the whole length, then no checkpointing, then the largest micro-batch; the
    optimizer step always sees `batch_size` sequences, so the last two change speed and not the result.
    None where the planner does not know the architecture. Raises UserError when nothing fits.
    """
    wanted = min(longest_allowed, longest_record, DEFAULT_LENGTH)
    lengths = [recipe.max_seq_length] if recipe.max_seq_length else [wanted, *(n for n in SHORTER if n < wanted)]
    if config.model_type not in FAMILIES:
        recipe.max_seq_length = lengths[0]
        recipe.micro_batch_size = recipe.micro_batch_size or 1
        recipe.gradient_checkpointing = recipe.gradient_checkpointing is not False and device.type == "cuda"
        return None
    divisors = [n for n in range(min(recipe.batch_size, 32), 0, -1) if recipe.batch_size % n == 0]
    micro_batches = [recipe.micro_batch_size] if recipe.micro_batch_size else divisors
    checkpointing = [False, True] if recipe.gradient_checkpointing is None else [recipe.gradient_checkpointing]
    options = [(c, m) for c in checkpointing for m in micro_batches]  # fastest first, most frugal last
    card = card_of(recipe, device)

    def ask(length: int, option: tuple[bool, int]) -> Plan:
        return plan(
            config.to_dict(),
            card,
            seq=length,
            batch=option[1],
            accumulation=recipe.batch_size // option[1],
            precision="nf4" if recipe.load_in_4bit else str(dtype).removeprefix("torch."),
            double_quant=recipe.double_quant if recipe.load_in_4bit else None,
            lora_r=recipe.lora_r,
            targets="all" if recipe.target_modules == ["all-linear"] else recipe.target_modules,
            lora_dropout=recipe.lora_dropout,
            checkpointing=option[0],
            chunked_loss=True,  # the only path of TRL's SFTTrainer
            optimizer=codec_of(recipe),
            alternatives=False,
        )

    for length in lengths:
        frugal = ask(length, options[-1])
        if frugal.fits:
            break
    else:
        raise UserError(_too_small(frugal, recipe))
    answer = next((p for option in options[:-1] if (p := ask(length, option)).fits), frugal)
    recipe.max_seq_length = answer.config.max_seq_length
    recipe.micro_batch_size = answer.config.batch_size
    recipe.gradient_checkpointing = answer.config.gradient_checkpointing
    return answer


def _too_small(nearest: Plan, recipe: Recipe) -> str:
    remedy = "--load-in-4bit, a smaller --lora-r or a smaller model"
    if recipe.load_in_4bit:
        remedy = "a smaller --lora-r or a smaller model"
    if nearest.needed is not None and nearest.needed.change.startswith("a card"):
        remedy += f", or {nearest.needed.change}"
    return (
        f"no configuration of {recipe.model} fits {nearest.usable_bytes / MIB:,.0f} MiB: the smallest "
        f"({nearest.config.max_seq_length} tokens, one sequence at a time) needs {nearest.peak_bytes / MIB:,.0f} MiB; "
        f"try {remedy}"
    )


def describe(plan: Plan | None, recipe: Recipe) -> list[str]:
    """The plan as lines for a terminal."""
    settings = (
        f"{recipe.max_seq_length} tokens, {recipe.batch_size} sequences a step in micro-batches of "
        f"{recipe.micro_batch_size}, gradient checkpointing {'on' if recipe.gradient_checkpointing else 'off'}"
    )
    if plan is None:
        return [f"plan: the planner does not know this architecture, so memory is not predicted; {settings}"]
    largest = sorted(plan.components.items(), key=lambda item: -item[1])[:5]
    return [
        f"plan: {settings}",
        f"  peak {plan.peak_bytes / MIB:,.0f} MiB (give or take {plan.error_bytes / MIB:,.0f}) of "
        f"{plan.usable_bytes / MIB:,.0f} MiB usable on {plan.card}, in the {plan.peak_phase} phase",
        "  " + ", ".join(f"{name} {size / MIB:,.0f}" for name, size in largest if size) + " MiB",
    ]


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
