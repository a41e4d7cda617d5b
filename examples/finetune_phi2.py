"""Phi-2 (2.8 B) with its weights in 4 bits, in 4 GB: planned first, with what other settings would take, then run.

    python examples/finetune_phi2.py
    python examples/finetune_phi2.py --tiny      # the same on a CPU, with a stand-in of 100,000 weights
"""

from stand_in import settings_of, train

from cruxy_triton.planner import Card, plan

SETTINGS = {
    "model": "microsoft/phi-2",
    "data": "openai/gsm8k",
    "subset": "main",
    "output": "runs/phi2",
    "vram_bytes": 4 << 30,
    "load_in_4bit": True,
    "lora_r": 8,
    "target_modules": ["q_proj", "v_proj"],
    "optimizer": "cruxy-lion",
    "state_bits": 8,
    "max_seq_length": 256,
    "max_steps": 300,
}

if __name__ == "__main__":
    settings = settings_of(SETTINGS, __doc__, "phi", chat=False)
    card = Card.cpu(settings["vram_bytes"]) if settings.get("device") == "cpu" else Card.budget(settings["vram_bytes"])
    pinned = ("load_in_4bit", "lora_r", "target_modules", "optimizer", "state_bits", "max_seq_length")
    answer = plan(settings["model"], card, **{name: settings[name] for name in pinned})
    print(f"{answer.model} on {answer.card}: {answer.peak_bytes / 2**20:,.0f} MiB at the peak")
    for other in answer.alternatives:
        print(f"  {other.change}: {other.peak_bytes / 2**20:,.0f} MiB")
    train(settings)
