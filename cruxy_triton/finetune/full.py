"""Training every weight (--method full): what it needs beside what LoRA needs, and what it writes.

The weights are in the dtype that they are trained in: bfloat16 from compute capability 8.0, float16 before, float32 on
a CPU, where 16-bit weights would be computed with in 16 bits. CruxyOptimizer rounds 16-bit weights at random, so that
updates below their spacing are not lost. A checkpoint is a model folder: a resumed run loads its weights from there, as
a new one does from the base, tensor by tensor onto the device.
"""

from pathlib import Path
from typing import Any

import torch

from cruxy_triton.finetune.recipe import Recipe
from cruxy_triton.planner.optimizers import FINETUNE_OPTIMIZERS, OPTIMIZERS
from cruxy_triton.settings import TORCHS, check_together

# The guard's snapshots of a run go to its disk, seven of them at most. A copy that is larger than this (bytes) is not
# taken: each would stop the training for many seconds, and putting one back needs the memory of a second state.
LARGEST_SNAPSHOT = 1 << 30


def check(recipe: Recipe, dtype: torch.dtype) -> list[str]:
    """Notes on a run in `dtype`, which the device may have decided. Raises UserError where it cannot be trained."""
    check_together({**vars(recipe), "dtype": str(dtype).removeprefix("torch.")})
    if recipe.method == "full" and recipe.optimizer in TORCHS and dtype is torch.bfloat16:
        return [
            f"note: {recipe.optimizer} rounds bfloat16 weights to the nearest, which loses steps that are smaller than "
            "their spacing; cruxy-lion and cruxy round at random"
        ]
    return []


def copy_bytes(recipe: Recipe, parameters: list[torch.nn.Parameter]) -> tuple[int, int]:
    """Bytes of the trained `parameters`, and of a checkpoint or snapshot: these and the optimizer's state."""
    codec = next(k for k, names in FINETUNE_OPTIMIZERS.items() if names == (recipe.optimizer, recipe.state_bits))
    trained = sum(p.numel() * p.element_size() for p in parameters)
    state = sum(sum(OPTIMIZERS[codec].tensors(p.numel())) for p in parameters)
    return trained, trained + state


def keeps_snapshots(recipe: Recipe, parameters: list[torch.nn.Parameter]) -> bool:
    """Whether the guard has copies of the run to go back to."""
    small = recipe.method == "lora" or copy_bytes(recipe, parameters)[1] <= LARGEST_SNAPSHOT
    return recipe.guard == "act" and small


def write_weights(model: Any, folder: str | Path) -> None:
    """Writes what was trained to `folder`: the adapter (peft), or the whole model, in shards where it is large."""
    if hasattr(model, "peft_config"):
        # Embeddings are never resized, so that peft need not load the base's config again to compare.
        model.save_pretrained(folder, save_embedding_layers=False)
        return
    model.config.use_cache = True  # off while training only
    try:
        model.save_pretrained(folder)
    finally:
        model.config.use_cache = False
