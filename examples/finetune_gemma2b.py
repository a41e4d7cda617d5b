"""Gemma 2B with its weights in 4 bits, in 4 GB; then base and adapter as one model, which plain transformers loads.

    hf auth login                                # Gemma's licence has to be accepted on its page
    python examples/finetune_gemma2b.py
    python examples/finetune_gemma2b.py --tiny   # the same on a CPU, with a stand-in of 100,000 weights

A vocabulary of 256,000 makes the logits the largest thing in memory: the loss is computed in tiles, so that they are
never there as a whole. merge() takes the plain weights in float32: 10 GB of RAM at full size.
"""

from stand_in import settings_of, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from cruxy_triton.finetune import adapter

SETTINGS = {
    "model": "google/gemma-2b",
    "data": "openai/gsm8k",
    "subset": "main",
    "output": "runs/gemma2b",
    "vram_bytes": 4 << 30,
    "load_in_4bit": True,
    "lora_r": 8,
    "max_steps": 300,
}

if __name__ == "__main__":
    result = train(settings_of(SETTINGS, __doc__, "gemma", chat=False))
    merged = result.folder / "merged"
    adapter.merge(adapter.find(str(result.folder)), merged)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    inputs = tokenizer("Question: What is 3 plus 4?\nAnswer:", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
