"""TinyLlama-1.1B on your own records in 4 GB of GPU memory, as a library call instead of the command.

    python examples/finetune_tinyllama.py train.jsonl

The same as `cruxy-triton finetune TinyLlama/TinyLlama-1.1B-Chat-v1.0 --data train.jsonl --vram 4GiB`.
"""

import sys

from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.recipe import Recipe
from cruxy_triton.finetune.run import Hooks, finetune


def main(model: str, data: str) -> None:
    recipe = Recipe(
        model=model,
        data=data,
        output="runs/tinyllama",
        vram_bytes=4 * 2**30,
        lora_r=8,
        max_steps=200,
    )
    result = finetune(recipe, RunFolder(recipe.output), Hooks(say=print))
    assert result.after is not None
    print(f"held-out perplexity {result.before['perplexity']:.2f} -> {result.after['perplexity']:.2f}")


if __name__ == "__main__":
    main("TinyLlama/TinyLlama-1.1B-Chat-v1.0", sys.argv[1])
