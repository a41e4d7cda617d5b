"""The parameter shapes that benchmarks run over: real models' tensors, without the models."""

from cruxy_triton.errors import UserError

# TinyLlama/TinyLlama-1.1B config.json: hidden 2048, 22 layers, 32 heads of 64 with 4 key/value heads,
# MLP 5632, vocabulary 32000, untied head.
TINYLLAMA_LINEARS = {
    "q_proj": (2048, 2048),
    "k_proj": (256, 2048),
    "v_proj": (256, 2048),
    "o_proj": (2048, 2048),
    "gate_proj": (5632, 2048),
    "up_proj": (5632, 2048),
    "down_proj": (2048, 5632),
}
TINYLLAMA_LAYERS = 22


def tinyllama_lora(r: int) -> list[tuple[int, ...]]:
    """LoRA of rank r on all seven linears of TinyLlama's 22 layers: 308 tensors, 6.3 M elements at r=8."""
    one_layer = [shape for out, into in TINYLLAMA_LINEARS.values() for shape in ((r, into), (out, r))]
    return one_layer * TINYLLAMA_LAYERS


def tinyllama_full() -> list[tuple[int, ...]]:
    """All 201 tensors of TinyLlama, 1.1 G elements."""
    one_layer = [*TINYLLAMA_LINEARS.values(), (2048,), (2048,)]
    return [(32000, 2048), *one_layer * TINYLLAMA_LAYERS, (2048,), (32000, 2048)]


def gpt2() -> list[tuple[int, ...]]:
    """GPT-2 small (openai-community/gpt2 config.json), 148 tensors, 124 M elements, head tied."""
    d = 768
    norm, attention = [(d,), (d,)], [(d, 3 * d), (3 * d,), (d, d), (d,)]
    one_layer = [*norm, *attention, *norm, (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *one_layer * 12, (d,), (d,)]


CENSUSES = {
    "lora-r8": lambda: tinyllama_lora(8),
    "lora-r16": lambda: tinyllama_lora(16),
    "gpt2-124m": gpt2,
    "tinyllama-full": tinyllama_full,
    "one-16384x16384": lambda: [(16384, 16384)],
}


def census(name: str) -> list[tuple[int, ...]]:
    """The shapes of a named census."""
    if name not in CENSUSES:
        raise UserError(f"unknown census {name!r}: expected one of {', '.join(CENSUSES)}")
    return CENSUSES[name]()
