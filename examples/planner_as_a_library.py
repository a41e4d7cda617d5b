"""The memory planner as a library: which of four models train on a GTX 1650, and with which settings.

    python examples/planner_as_a_library.py

prints the tables of docs/measurements.md. No GPU, no torch and no network are needed.
"""

from cruxy_triton.planner import Plan, plan

PRECISIONS = {"float16": {"dtype": "float16", "load_in_4bit": False}, "nf4": {"load_in_4bit": True}}
MODELS = [("tinyllama-1.1b", "float16"), ("qwen2.5-1.5b", "float16"), ("gemma-2b", "nf4"), ("phi-2", "nf4")]
LENGTHS = (256, 512, 1024, 2048)


def cell(answer: Plan) -> str:
    """One table cell: yes or no, the settings that it takes, and the peak in GiB."""
    c = answer.config
    if not answer.fits:
        assert answer.needed is not None
        return f"no ({answer.peak_bytes / 2**30:.2f}): {answer.needed.change}"
    layers = "all linear" if len(c.target_modules) > 4 else f"{len(c.target_modules)} layers"
    settings = f"r={c.lora_r} {layers}, {c.micro_batch_size} x {c.gradient_accumulation}"
    settings += ", checkpointing" if c.gradient_checkpointing else ", no checkpointing"
    if c.optimizer != "cruxy":
        settings += f", {c.optimizer} {c.state_bits}-bit"
    return f"{'tight' if answer.tight else 'yes'} ({answer.peak_bytes / 2**30:.2f}): {settings}"


def main() -> None:
    for system, name in (("linux", "headless Linux, 3.81 GiB"), ("windows", "Windows, 3.20 GiB")):
        print(f"\n| GTX 1650, {name} | " + " | ".join(f"{n} tokens" for n in LENGTHS) + " |")
        print("|---" * (len(LENGTHS) + 1) + "|")
        for model, precision in MODELS:
            given = {"os": system, "alternatives": False, **PRECISIONS[precision]}
            cells = [cell(plan(model, "gtx1650", max_seq_length=n, **given)) for n in LENGTHS]
            print(f"| {model} {precision} | " + " | ".join(cells) + " |")

    # What the planner knows of one answer, as plain data:
    answer = plan("qwen2.5-1.5b", "gtx1650", max_seq_length=1024)
    print(f"\n{answer.model} on {answer.card}: {answer.config}")
    for part, size in sorted(answer.components.items(), key=lambda item: -item[1]):
        print(f"  {part:16s} {size / 2**20:8,.0f} MiB")


if __name__ == "__main__":
    main()
