"""TinyLlama-1.1B in 4 GB of GPU memory, in 16 bits, as a library call in place of the command; then a question to it.

    python examples/finetune_tinyllama.py --data train.jsonl
    python examples/finetune_tinyllama.py --tiny                # the same on a CPU, with a stand-in of 100,000 weights

The same as `cruxy-triton finetune TinyLlama/TinyLlama-1.1B-Chat-v1.0 --data train.jsonl --vram 4GiB --lora-r 8
--max-steps 200`, and `cruxy-triton generate`.
"""

from stand_in import settings_of, train

from cruxy_triton.finetune import adapter

SETTINGS = {
    "model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "data": "openai/gsm8k",
    "subset": "main",
    "output": "runs/tinyllama",
    "vram_bytes": 4 << 30,
    "lora_r": 8,
    "max_steps": 200,
}

if __name__ == "__main__":
    result = train(settings_of(SETTINGS, __doc__, "llama", chat=True))
    source = adapter.find(str(result.folder))
    model, tokenizer, _ = adapter.open_model(source)
    print(adapter.Talk(model, tokenizer, source).ask("What is 3 plus 4?", 24))
