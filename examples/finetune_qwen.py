"""Qwen2.5-1.5B with its weights in 4 bits, in 4 GB; then the adapter on the plain model, with peft alone.

    python examples/finetune_qwen.py
    python examples/finetune_qwen.py --tiny      # the same on a CPU, with a stand-in of 100,000 weights
"""

from peft import PeftModel
from stand_in import settings_of, train
from transformers import AutoModelForCausalLM, AutoTokenizer

SETTINGS = {
    "model": "Qwen/Qwen2.5-1.5B-Instruct",
    "data": "openai/gsm8k",
    "subset": "main",
    "output": "runs/qwen",
    "vram_bytes": 4 << 30,
    "load_in_4bit": True,
    "max_steps": 300,
}

if __name__ == "__main__":
    settings = settings_of(SETTINGS, __doc__, "qwen2", chat=True)
    result = train(settings)
    base = AutoModelForCausalLM.from_pretrained(settings["model"], dtype="auto")
    model = PeftModel.from_pretrained(base, result.folder / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(result.folder / "adapter")
    question = [{"role": "user", "content": "Tom has 3 boxes of 12 eggs and drops 5 eggs. How many are left?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=24, pad_token_id=tokenizer.pad_token_id)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
