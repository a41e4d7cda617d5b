"""The model families that the planner knows without torch, as data: a new one is one entry here.

A family is transformers' `model_type`. What its config.json says stands in `ModelShape`; here is what the class
fixes beyond its numbers, and what it assumes where a config.json is silent (transformers' configuration_*.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Family:
    """What a model_type fixes. `names`: the linear layers of a block in order of execution, attention's four first."""

    norm: str = "rms"  # rms: Llama's RMSNorm; gemma: 1 + weight in fp32; layer: LayerNorm
    gated: bool = True  # down(act(gate(x)) * up(x)), else fc2(act(fc1(x)))
    qkv_bias: bool | None = None  # None: as the config's attention_bias says
    out_bias: bool | None = None
    mlp_bias: bool | None = None  # None: as the config's mlp_bias says
    head_bias: bool = False
    parallel: bool = False  # attention and MLP read the same normalized input (Phi)
    qk_norm: bool = False  # an RMSNorm per head on q and k (Qwen3)
    sandwich: bool = False  # norms behind attention and MLP too (Gemma 2)
    sdpa: bool = True  # Gemma 2's class refuses it: only its eager path caps the attention scores
    masks: int = 1  # kinds of eager attention mask: Gemma 2 has one more for its sliding windows
    scaled_embedding: bool = False  # Gemma multiplies the embedding by sqrt(hidden_size)
    names: tuple[str, ...] = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)


_GEMMA = {"head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}

FAMILIES: dict[str, Family] = {
    "arcee": Family(gated=False, names=(*ATTENTION, "up_proj", "down_proj")),
    "hunyuan_v1_dense": Family(qk_norm=True),
    "llama": Family(),
    "mistral": Family(qkv_bias=False, out_bias=False, mlp_bias=False, defaults={"num_key_value_heads": 8}),
    "qwen2": Family(qkv_bias=True, out_bias=False, mlp_bias=False, defaults={"num_key_value_heads": 32}),
    "qwen3": Family(mlp_bias=False, qk_norm=True, defaults={"head_dim": 128, "num_key_value_heads": 32}),
    "gemma": Family(
        norm="gemma", mlp_bias=False, scaled_embedding=True, defaults={**_GEMMA, "num_key_value_heads": 16}
    ),
    "gemma2": Family(
        norm="gemma",
        mlp_bias=False,
        sandwich=True,
        sdpa=False,
        masks=2,
        scaled_embedding=True,
        defaults={**_GEMMA, "num_key_value_heads": 4, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "phi": Family(
        norm="layer",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
        parallel=True,
        names=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
        defaults={"partial_rotary_factor": 0.5, "hidden_act": "gelu_new"},
    ),
}
