"""Every weight of a model on a 4 GB card: which of six models train on a GTX 1650 with released gradients.

    python examples/every_weight_in_4_gb.py            the table of docs/measurements.md
    python examples/every_weight_in_4_gb.py --trace    with a trace's peaks beside the planned ones (torch, minutes)

512 tokens, one sequence per step, float16 weights, gradient checkpointing, the Lion rule with 8 and with 4 bits of
state; the loss in tiles or from whole logits, whichever takes less.
"""

import sys

from cruxy_triton.planner import Plan, load_card, load_model, plan
from cruxy_triton.planner.search import step_of

MODELS = ("tinyllama-1.1b", "smollm2-360m", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "qwen2.5-1.5b")
CARD, LENGTH, MIB = "gtx1650", 512, 1 << 20
SETTINGS = {
    "method": "full", "release": True, "dtype": "float16", "max_seq_length": LENGTH, "micro_batch_size": 1,
    "batch_size": 1, "gradient_checkpointing": True, "optimizer": "cruxy-lion",
}  # fmt: skip


def planned(model: str, bits: int, system: str) -> Plan:
    return plan(model, CARD, os=system, alternatives=False, state_bits=bits, **SETTINGS)


def verdict(found: Plan) -> str:
    return ("tight" if found.tight else "yes") if found.fits else f"no, {-found.headroom_bytes / MIB:,.0f} MiB short"


def cells(model: str, bits: int, traced: bool) -> list[str]:
    linux, windows = (planned(model, bits, system) for system in ("linux", "windows"))
    allocated = max(linux.phases.values())
    shown = [f"{bits}", "tiles" if linux.config.chunked_loss else "whole", f"{allocated / MIB:,.0f}"]
    if traced:
        from cruxy_triton.planner.trace import trace

        peak = max(trace(step_of(load_model(model), load_card(CARD), linux.config)).phases.values())
        shown.append(f"{peak / MIB:,.0f} ({100 * abs(allocated / peak - 1):.3f} % off)")
    least = min(linux.peak_bytes, windows.peak_bytes)  # the smallest pool that was seen to do
    return [*shown, f"{least / MIB:,.0f}", verdict(linux), verdict(windows)]


def table(traced: bool = False) -> list[str]:
    """The lines of a Markdown table; sizes in MiB."""
    card = load_card(CARD)
    usable = [card.usable_bytes(system) / MIB for system in ("linux", "windows")]
    head = ["model", "state bits", "logits", "allocated, planned", *["allocated, traced"] * traced, "with context"]
    head += [f"headless Linux, {usable[0]:,.0f}", f"Windows, {usable[1]:,.0f}"]
    lines = [head, ["---"] * len(head)]
    lines += [[model, *cells(model, bits, traced)] for model in MODELS for bits in (8, 4)]
    return [f"| {' | '.join(line)} |" for line in lines]


def at_the_peak(model: str) -> str:
    """What a plan that does not fit consists of where it is highest."""
    found, shape = planned(model, 4, "linux"), load_model(model)
    parts = sorted(found.components.items(), key=lambda item: -item[1])
    table = 2 * shape.vocab_size * shape.hidden_size / MIB
    line = f"{model}, 4 bits, {found.peak_phase}: " + ", ".join(f"{name} {size / MIB:,.0f}" for name, size in parts)
    return f"{line}; one gradient of its {shape.vocab_size:,} x {shape.hidden_size:,} table is {table:,.0f}"


def main() -> None:
    print(*table("--trace" in sys.argv[1:]), sep="\n")
    print()
    for model in MODELS:
        if not planned(model, 4, "linux").fits:
            print(at_the_peak(model))


if __name__ == "__main__":
    main()
