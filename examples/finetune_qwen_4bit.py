"""Qwen2.5-1.5B in 4-bit on the GSM8K questions, then the adapter loaded back with plain peft.

    python examples/finetune_qwen_4bit.py
"""

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.recipe import Recipe
from cruxy_triton.finetune.run import Hooks, finetune

MODEL = "Qwen/Qwen2.5-1.5B-Instruct"


def main() -> None:
    recipe = Recipe(
        model=MODEL,
        data="openai/gsm8k",
        subset="main",
        output="runs/qwen-gsm8k",
        load_in_4bit=True,
        vram_bytes=4 * 2**30 if torch.cuda.is_available() else None,
        max_steps=300,
    )
    result = finetune(recipe, RunFolder(recipe.output), Hooks(say=print))

    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    model = PeftModel.from_pretrained(base, result.folder / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(result.folder / "adapter")
    question = [{"role": "user", "content": "Tom has 3 boxes of 12 eggs and drops 5 eggs. How many are left?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=120)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
