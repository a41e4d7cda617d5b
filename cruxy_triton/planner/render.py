"""A plan as text: the verdict, a table of memory by component with a bar, what was given up, what else there is."""

from __future__ import annotations

import shlex

from cruxy_triton import settings
from cruxy_triton.planner.card import GiB, MiB
from cruxy_triton.planner.plan import Configuration, Plan
from cruxy_triton.planner.search import describe_optimizer

_BAR = 40  # characters for the usable memory
ORDER = (
    "weights",
    "quantization",
    "adapters",
    "gradients",
    "optimizer state",
    "activations",
    "logits and loss",
    "workspaces",
    "allocator",
    "context",
)
MEANING = {
    "weights": "base weights",
    "quantization": "4-bit scales",
    "adapters": "LoRA, float32",
    "activations": "kept and passing activations",
    "logits and loss": "head and cross-entropy",
    "workspaces": "cuBLAS, dequantized weights, attention",
    "allocator": "PyTorch's rounding and fragmentation",
    "context": "CUDA context",
}


def describe(config: Configuration) -> str:
    """One line: what a configuration is."""
    base = config.precision + (" (double quantization)" if config.double_quant else "")
    if config.method == "full":
        learned = "full fine-tuning" + (", gradients released" if config.release else "")
    else:
        learned = f"LoRA r={config.lora_r} on {', '.join(config.target_modules)}"
    return (
        f"{base}, {config.max_seq_length} tokens, batch {config.micro_batch_size} x {config.gradient_accumulation}, "
        f"{learned}, checkpointing {'on' if config.gradient_checkpointing else 'off'}, "
        f"{'chunked' if config.chunked_loss else 'stock'} loss, {config.attention} attention, "
        f"{describe_optimizer(config)}"
    )


def finetune_command(plan: Plan, plan_file: str | None = None) -> str:
    """The `cruxy-triton finetune` line that runs the plan; with `plan_file` it names that file instead.

    Every setting of the plan is in it that is not finetune's own default. MODEL stands where the plan was made for
    dimensions alone.
    """
    words = ["cruxy-triton", "finetune", plan.folder or plan.hf_id or "MODEL", "--data", "train.jsonl"]
    if plan_file is not None:
        return shlex.join([*words, "--plan", plan_file])
    return shlex.join(words + settings.command_words(vars(plan.config)))


def _line(label: str, size: int, whole: int, note: str = "") -> str:
    filled = round(_BAR * size / whole)
    mark = "#" * filled if filled else ("." if size else "")
    return f"  {label:16s} {size / MiB:8,.0f} MiB  {mark:{_BAR}s}  {note}".rstrip()


def render(plan: Plan, plan_file: str | None = None) -> str:
    """The plan for a terminal, at most 100 columns wide apart from the command line."""
    c = plan.config
    if plan.fits:
        verdict = "fits, tightly" if plan.tight else "fits"
    else:
        verdict = "does not fit"
    where = plan.card if plan.os == "any" else f"{plan.card}, {plan.os}"
    lines = [
        f"{plan.model} ({plan.parameters / 1e9:.2f} B parameters) on {where}: {verdict}",
        f"  {'' if plan.fits else 'nearest: '}{describe(c)}",
        "",
    ]
    whole = max(plan.usable_bytes, plan.peak_bytes)
    for name in ORDER:
        if plan.components.get(name):
            lines.append(_line(name, plan.components[name], whole, MEANING.get(name, "")))
    share = 100 * plan.peak_bytes / plan.usable_bytes
    lines += [
        f"  {'-' * 24}",
        _line("peak", plan.peak_bytes, whole, f"give or take {plan.error_bytes / MiB:,.0f}"),
        _line("usable", plan.usable_bytes, whole, f"{share:.0f} % used"),
    ]
    if plan.fits:
        lines.append(f"  headroom         {plan.headroom_bytes / MiB:8,.0f} MiB")
    else:
        lines.append(f"  missing          {-plan.headroom_bytes / MiB:8,.0f} MiB")
    lines += ["", f"peak phase: {plan.peak_phase}"]
    phases = ", ".join(f"{name} {size / MiB:,.0f}" for name, size in plan.phases.items())
    lines.append(f"allocated by phase (MiB): {phases}")
    lines.append(f"reserved by PyTorch where nothing limits it: {plan.reserved_bytes / MiB:,.0f} MiB")
    if plan.trainable_parameters:
        lines.append(f"trainable parameters: {plan.trainable_parameters:,}")
    if plan.step_seconds:
        lines.append(
            f"one optimizer step takes at least {plan.step_seconds:.2f} s (roofline of the card; not measured)"
        )
    if plan.verified:
        got = plan.verified
        off = 100 * (plan.allocated_bytes / got["allocated_bytes"] - 1)
        lines.append(
            f"verified by a trace of the real step: allocated {got['allocated_bytes'] / MiB:,.0f} MiB (plan {off:+.2f} "
            f"%), reserved {got['reserved_bytes'] / MiB:,.0f}, survives in {got['smallest_pool_bytes'] / MiB:,.0f}"
        )
    for title, items in (("given up", plan.gave_up), ("note", plan.notes)):
        lines += [f"{title}: {item}" for item in items]
    for option in plan.alternatives:
        lines.append(f"or: {option.change} (about {option.peak_bytes / GiB:.2f} GiB)")
    if plan.needed is not None:
        lines.append(
            f"what would do it: {plan.needed.change} (about {plan.needed.peak_bytes / GiB:.2f} GiB): "
            f"{describe(plan.needed.config)}"
        )
    if plan.fits:
        lines += ["", finetune_command(plan, plan_file)]
    return "\n".join(lines)
